#!/usr/bin/env python3
"""kvmix-eval against the study's own arithmetic in numpy, cell by cell. eval_test.py KVMIX-EVAL"""
import csv
import functools
import io
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'tools' / 'python'))
from kvmix_tools.dump import header  # noqa: E402

EVAL = pathlib.Path(sys.argv.pop()).resolve()
LAYERS, KV_HEADS, QUERY_HEADS, DIM = 3, 2, 6, 64
PROMPTS = (37, 1, 90)
TOKENS = sum(PROMPTS)
OUTLIERS = '0:0,0:1,2:1'


def make_dump(seed, layers=LAYERS, kv_heads=KV_HEADS, query_heads=QUERY_HEADS, tokens=TOKENS):
    """Keys with a constant offset in some channels, as a bias of the projection makes them, and
    values that grow with the layer."""
    random = np.random.default_rng(seed)
    dump = {}
    for layer in range(layers):
        k = random.standard_normal((tokens, kv_heads, DIM)) * 2
        k += 12 * (random.random((kv_heads, DIM)) < 0.05)
        v = random.standard_normal((tokens, kv_heads, DIM)) * (0.4 + layer)
        q = random.standard_normal((tokens, query_heads, DIM))
        for name, x in (('k', k), ('v', v), ('q', q)):
            dump[f'layers.{layer}.{name}'] = x.astype(np.float16)
    return dump


def write_dump(path, dump, prompts):
    tokens, kv_heads, dim = dump['layers.0.k'].shape
    meta = {'format': 'kvmix-dump-1', 'model': 'made up', 'corpus': 'random',
            'layers': str(len(dump) // 3), 'tokens': str(tokens),
            'prompt_tokens': ','.join(map(str, prompts)), 'kv_heads': str(kv_heads),
            'query_heads': str(dump['layers.0.q'].shape[1]), 'head_dim': str(dim),
            'rope_theta': '10000', 'attention_scale': str(dim ** -0.5)}
    with open(path, 'wb') as file:
        file.write(header({name: x.shape for name, x in dump.items()}, meta))
        file.writelines(x.tobytes() for x in dump.values())


# ---- the study's arithmetic (quant.c and validate_attn.py of jnros/kvmix), float32 -------------

def encode(x, per_token):
    """x [tokens, head_dim] float32, encoded and decoded."""
    largest = np.abs(x).max(axis=1 if per_token else None, keepdims=True)
    scale = np.float32(127) / np.where(largest == 0, np.float32(1), largest)
    return (np.rint(x * scale) / scale).astype(np.float32)


def strategy(number, tensor, layer, head, x):
    if number == 1:
        return encode(x, False)
    if number == 2 or tensor == 'v':
        return encode(x, True)
    return x if f'{layer}:{head}' in OUTLIERS.split(',') else encode(x, False)


def attend(q, k, v):
    """[tokens, query heads, head_dim], causal within each prompt, in double precision."""
    out, at = np.empty(q.shape), 0
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    for tokens in PROMPTS:
        rows = slice(at, at + tokens)
        for h in range(q.shape[1]):
            kv = h // (q.shape[1] // k.shape[1])
            scores = q[rows, h] @ k[rows, kv].T * q.shape[2] ** -0.5
            scores[np.triu_indices(tokens, 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[rows, h] = weights / weights.sum(axis=1, keepdims=True) @ v[rows, kv]
        at += tokens
    return out


def metrics(exact, other):
    norms = np.linalg.norm(exact, axis=-1) * np.linalg.norm(other, axis=-1)
    return (np.mean((exact - other) ** 2) / np.mean(exact ** 2),
            np.mean((exact * other).sum(axis=-1) / norms))


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
"""

# ---- tests ---------------------------------------------------------------------------------------

class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.TemporaryDirectory()
        cls.path = pathlib.Path(cls.folder.name)
        cls.dump = make_dump(1)
        write_dump(cls.path / 'dump.safetensors', cls.dump, PROMPTS)

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def run_eval(self, *arguments):
        return subprocess.run([str(EVAL), *map(str, arguments)], cwd=self.path,
                              capture_output=True, text=True)

    def csv(self, *arguments):
        done = self.run_eval(*arguments)
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        return list(csv.reader(io.StringIO(done.stdout)))

    def refused(self, pattern, *arguments):
        done = self.run_eval(*arguments)
        self.assertTrue(1 <= done.returncode <= 123, f'{arguments}: exit code {done.returncode}')
        self.assertEqual((done.stdout, done.stderr.count('\n')), ('', 1), arguments)
        self.assertRegex(done.stderr, pattern)

    def write_plan(self, name, codecs, **geometry):
        shape = {'layers': LAYERS, 'kv_heads': KV_HEADS, 'query_heads': QUERY_HEADS,
                 'head_dim': DIM, **geometry}
        plan = {'format': 'kvmix-plan', 'version': [1, 0], 'geometry': shape, 'codecs': codecs}
        (self.path / name).write_text(json.dumps(plan))


SHAPE = ('--kv-heads', KV_HEADS, '--head-dim', DIM)


class Quant(Case):
    def test_cells_are_the_studys(self):
        for number in (1, 2, 3):
            outliers = ['--fp16-heads', OUTLIERS] if number == 3 else []
            rows = self.csv('quant', 'dump.safetensors', '--strategy', number, *outliers)
            self.assertEqual([(r[1], r[2], r[4]) for r in rows],
                             [(str(layer), x, str(h)) for layer in range(LAYERS) for x in 'kv'
                              for h in range(KV_HEADS)])
            for file, layer, tensor, tokens, head, dim, column, largest, error, mse in rows:
                x = self.dump[f'layers.{layer}.{tensor}'][:, int(head)].astype(np.float32)
                decoded = strategy(number, tensor, layer, head, x)
                self.assertEqual(file, f'layers.{layer}.{tensor}')
                self.assertEqual((tokens, dim, column), (str(TOKENS), str(DIM), str(number)))
                kept = decoded is x  # in fp16: the study prints zeros
                want = float(np.sum((decoded.astype(np.float64) - x) ** 2))
                self.assertEqual(largest, f'{0 if kept else np.abs(x).max():.6f}')
                self.assertRegex(error, r'^\d+\.\d{6}$')
                self.assertAlmostEqual(float(error), want, delta=1e-4 * want)
                self.assertEqual(mse, f'{float(error) / x.size:.6f}')

    def test_small_sums_keep_four_digits(self):
        small = {name: (x.astype(np.float32) * 1e-3).astype(np.float16)
                 for name, x in self.dump.items()}
        write_dump(self.path / 'small.safetensors', small, PROMPTS)
        for row in self.csv('quant', 'small.safetensors', '--strategy', 2):
            x = small[f'layers.{row[1]}.{row[2]}'][:, int(row[4])].astype(np.float32)
            want = float(np.sum((encode(x, True).astype(np.float64) - x) ** 2))
            # (Scales this small differ in their last bits.)
            self.assertAlmostEqual(float(row[8]), want, delta=1e-3 * want)

    def test_the_studys_heads_are_known_for_its_model_only(self):
        dump = make_dump(2, layers=24, tokens=4, query_heads=14)
        write_dump(self.path / 'study.safetensors', dump, [4])
        rows = self.csv('quant', 'study.safetensors', '--strategy', 3)
        self.assertEqual([f'{r[1]}:{r[4]}' for r in rows if float(r[7]) == 0],
                         ['0:0', '0:1', '1:1', '2:0', '2:1', '8:0'])
        heads = self.csv('quant', 'study.safetensors', '--strategy', 3, '--fp16-heads', 'none')
        self.assertFalse([r for r in heads if float(r[7]) == 0])
        self.refused('needs --fp16-heads', 'quant', 'dump.safetensors', '--strategy', 3)

    def test_threads_change_nothing(self):
        one, two = (self.csv('quant', 'dump.safetensors', '--strategy', 2, '--threads', n)
                    for n in (1, 2))
        self.assertEqual(one, two)

    def test_memory_is_that_of_a_few_layers(self):
        peaks = []
        for layers in (2, 50):
            dump = make_dump(3, layers=layers, tokens=2048)
            write_dump(self.path / 'long.safetensors', dump, [512] * 4)
            for command in (('quant',), ('attention',)):
                # From a small process: a child's peak begins with the memory of the one that it was
                # forked from.
                done = subprocess.run([sys.executable, '-c', PEAK, str(EVAL), *command,
                                       'long.safetensors', '--strategy', '1', '--threads', '1'],
                                      cwd=self.path, capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, done.stderr)
                peaks.append(int(done.stderr) / 1024)
        layer = 2048 * (2 * KV_HEADS + QUERY_HEADS) * DIM * 2 / 2 ** 20
        for few, many in zip(peaks[:2], peaks[2:]):
            self.assertLess(many - few, 3 * layer, f'{few:.0f} MiB for 2 layers, {many:.0f} MiB '
                            f'for 50, {layer:.1f} MiB a layer')


class Attention(Case):
    def exact(self, layer):
        return attend(*(self.dump[f'layers.{layer}.{x}'].astype(np.float32) for x in 'qkv'))

    def check(self, rows, decode):
        """decode(tensor, layer, head, x) -> x'"""
        self.assertEqual(rows[0], ['layer', 'head', 'nmse', 'cos_sim'])
        self.assertEqual([(r[0], r[1]) for r in rows[1:]],
                         [(str(layer), str(h)) for layer in range(LAYERS)
                          for h in ('all', *range(QUERY_HEADS))])
        for r in rows[1:]:
            self.assertRegex(r[2], r'^\d\.\d{6}e[+-]\d\d$')
            self.assertRegex(r[3], r'^[01]\.\d{6}$')
        for layer in range(LAYERS):
            q, k, v = (self.dump[f'layers.{layer}.{x}'].astype(np.float32) for x in 'qkv')
            k, v = (np.stack([decode(name, layer, h, x[:, h]) for h in range(KV_HEADS)], axis=1)
                    for name, x in (('k', k), ('v', v)))
            exact, other = self.exact(layer), attend(q, k, v)
            for r in rows[1:]:
                if int(r[0]) == layer:
                    heads = slice(None) if r[1] == 'all' else int(r[1])
                    nmse, cosine = metrics(exact[:, heads], other[:, heads])
                    self.assertAlmostEqual(float(r[2]), nmse, delta=0.01 * nmse + 1e-7, msg=str(r))
                    self.assertAlmostEqual(float(r[3]), cosine, delta=2e-6 + 0.01 * (1 - cosine),
                                           msg=str(r))

    def test_cells_are_the_studys(self):
        for number in (1, 2, 3):
            with self.subTest(strategy=number):
                heads = ['--fp16-heads', OUTLIERS] if number == 3 else []
                rows = self.csv('attention', 'dump.safetensors', '--strategy', number, *heads)
                self.check(rows, functools.partial(strategy, number))

    def means(self):
        return [self.dump[f'layers.{layer}.k'].astype(np.float32).mean(axis=0)
                for layer in range(LAYERS)]

    def test_a_plan_with_centred_keys(self):
        means = self.means()
        self.write_plan('plan.json', [
            [{'k': 'i8-token+centre', 'k_mean': mean.tolist(), 'v': 'f16'} for mean in heads]
            for heads in means])
        rows = self.csv('attention', 'dump.safetensors', '--plan', 'plan.json')

        def decode(tensor, layer, head, x):
            mean = means[layer][head]
            return mean + encode(x - mean, True) if tensor == 'k' else x
        self.check(rows, decode)
        plain = self.csv('attention', 'dump.safetensors', '--strategy', 2)
        self.assertLess(sum(float(r[2]) for r in rows[1:]), sum(float(r[2]) for r in plain[1:]))

    def test_a_plan_with_folded_and_rotated_heads(self):
        means, hadamard = np.array(self.means(), np.float32), np.array([[1.0]])
        while len(hadamard) < DIM:
            hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
        factor = np.float32(2) ** (np.arange(DIM) % 5 - 2)

        def rotate(x):  # its own inverse
            return (x @ hadamard / DIM ** 0.5).astype(np.float32)

        def decoded(name, layer, h, x):
            if name == 'v':
                return rotate(encode(rotate(x), True))
            mean = means[layer, h]
            return mean + factor * rotate(encode(rotate((x - mean) / factor), True))

        self.write_plan('steps.json', [[{
            'k': 'i8-token+centre+fold+hadamard', 'k_mean': means[layer, h].tolist(),
            'k_factor': factor.tolist(), 'v': 'i8-token+hadamard',
        } for h in range(KV_HEADS)] for layer in range(LAYERS)])
        rows = self.csv('attention', 'dump.safetensors', '--plan', 'steps.json')
        self.check(rows, decoded)

    def test_prompts_far_beyond_the_calibration(self):
        head = {'k': 'i8-token+centre', 'k_mean': [0.0] * DIM, 'v': 'f16'}  # means age
        self.write_plan('plan.json', [[head] * KV_HEADS] * LAYERS)
        plan = json.loads((self.path / 'plan.json').read_text())
        for longest in (23, 22):  # 4 x 22 < 90 < 4 x 23
            plan['provenance'] = {'model': '', 'calibration': 'c4', 'calibration_tokens': 99,
                                  'longest_prompt': longest, 'holdout': '', 'holdout_tokens': 0}
            (self.path / 'plan.json').write_text(json.dumps(plan))
            done = self.run_eval('attention', 'dump.safetensors', '--plan', 'plan.json')
            self.assertEqual(done.returncode, 0)
            self.assertEqual(done.stderr, '' if longest == 23 else
                             'kvmix-eval: warning: dump.safetensors: a context of 90 tokens, but '
                             'the plan was calibrated on prompts of at most 22: it may be less '
                             'accurate there. Calibrate on prompts as long as those that are '
                             'served.\n')

class Size(Case):
    def test_the_studys_table(self):
        rows = self.csv('size', '--layers', 24, '--kv-heads', 2, '--head-dim', 64, '--tokens',
                        '4096,32768')
        self.assertEqual([','.join(row) for row in rows], [
            'strategy,bytes_per_token,saved,mib_4096,mib_32768', 'fp16,12288,0.0000,48.0,384.0',
            'strat1,6144,0.5000,24.0,192.0', 'strat2,6528,0.4688,25.5,204.0',
            'strat3,6720,0.4531,26.25,210.0'])

    def test_bits(self):
        self.write_plan('plan.json', [[{'k': 'i4-token', 'v': 'f16'}] * KV_HEADS] * LAYERS)
        rows = self.csv('size', '--plan', 'plan.json', '--bits')
        self.assertEqual(rows[0][3:], ['mib_4096', 'bits', 'k_bits', 'v_bits'])
        k = 4 + 32 / DIM
        self.assertEqual(rows[1][4:], ['16.0000'] * 3)
        self.assertEqual(rows[-1][4:], [f'{bits:.4f}' for bits in ((k + 16) / 2, k, 16)])

    def test_a_plan(self):
        self.write_plan('plan.json', [[{'k': 'i8-token', 'v': 'f16'}] * KV_HEADS] * LAYERS)
        row = ['plan', str(LAYERS * KV_HEADS * (DIM + 4 + 2 * DIM)),
               f'{1 - (3 * DIM + 4) / (4 * DIM):.4f}']
        self.assertEqual(self.csv('size', '--plan', 'plan.json')[-1][:3], row)
        rows = self.csv('size', '--plan', 'plan.json', '--layers', LAYERS, *SHAPE)
        self.assertEqual(rows[-1][:3], row)
        self.refused('24 layers', 'size', '--plan', 'plan.json', '--layers', 24, *SHAPE)


class Errors(Case):
    def test_bad_calls(self):
        self.write_plan('other.json', [[{'k': 'f16', 'v': 'f16'}]], layers=1, kv_heads=1,
                        query_heads=1)
        quant = ('quant', 'dump.safetensors')
        for pattern, arguments in (
                ('subcommand', ()),
                ('frobnicate', (*quant, '--frobnicate')),
                ('strategy', quant),
                ('strategy', (*quant, '--strategy', 4)),
                ('nothing.safetensors', ('quant', 'nothing.safetensors', '--strategy', 1)),
                ('other.json.*1 layers', ('attention', 'dump.safetensors', '--plan', 'other.json')),
                ('none.json', (*quant, '--plan', 'none.json')),
                ('goes with strategy 3', (*quant, '--plan', 'other.json', '--strategy', 2)),
                ("'0-1'", (*quant, '--strategy', 3, '--fp16-heads', '0-1')),
                ('9:0', (*quant, '--strategy', 3, '--fp16-heads', '9:0')),
                ('layers', ('size', *SHAPE)),
                ('tokens', ('size', '--layers', 1, *SHAPE, '--tokens', 'x'))):
            self.refused(pattern, *arguments)

    def test_nan_is_named(self):
        dump = {name: x.copy() for name, x in self.dump.items()}
        dump['layers.1.v'][5, 1, 7] = np.nan
        write_dump(self.path / 'nan.safetensors', dump, PROMPTS)
        for command in ('quant', 'attention'):
            self.refused('nan.safetensors.*layer 1.*head 1.*token 5', command, 'nan.safetensors',
                         '--strategy', 2)

    def test_output_that_cannot_be_written(self):
        with open('/dev/full', 'w') as full:
            done = subprocess.run([str(EVAL), 'size', '--layers', '1', *map(str, SHAPE)],
                                  stdout=full, stderr=subprocess.PIPE, text=True)
        self.assertEqual((done.returncode, done.stderr.count('\n')), (1, 1))


if __name__ == '__main__':
    unittest.main()
