#!/usr/bin/env python3
"""The whole kvmix-tune run on the built-in sample: figures, files, refusals.
tune_test.py KVMIX-TUNE KVMIX-EVAL EXAMPLE-TUNE"""
import json
import os
import pathlib
import random
import re
import struct
import subprocess
import sys
import tempfile
import unittest

import numpy as np

EXAMPLE = pathlib.Path(sys.argv.pop()).resolve()
EVAL = pathlib.Path(sys.argv.pop()).resolve()
TUNE = pathlib.Path(sys.argv.pop()).resolve()

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'tools' / 'python'
sys.path.insert(0, str(PACKAGE))
from kvmix_tools.dump import header  # noqa: E402

# What the sample gave at a budget of 0.45, by candidates, and how much play that has. Instruction
# sets round differently, and between codecs that are about equally accurate that decides: the
# holdout's worst cosine moves by less than this, where losing an outlier head costs ten times as
# much.
HOLDOUT_WORST_COSINE = {'all': (0.99993, 0.00005), 'int8': (0.99927, 0.0003),
                        'seed': (0.99927, 0.0003)}
OUTLIERS = {(0, 0), (0, 1), (1, 0), (7, 1), (15, 1)}  # (layer, KV head) of K


def k_heads(heads):
    return {(head['layer'], head['kv_head']) for head in heads if head['tensor'] == 'k'}


class Tune(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def run_program(self, program, *arguments):
        return subprocess.run([str(program), *map(str, arguments)], cwd=self.folder,
                              capture_output=True, text=True, timeout=240)

    def succeed(self, *arguments, program=TUNE):
        done = self.run_program(program, *arguments)
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        return done.stdout

    def fail_with(self, pattern, *arguments):
        """One line on stderr, nothing on stdout, no file left."""
        before = sorted(self.folder.iterdir())
        done = self.run_program(TUNE, *arguments)
        self.assertNotEqual(done.returncode, 0, done.stdout)
        self.assertEqual(done.stdout, '')
        self.assertEqual(done.stderr.count('\n'), 1, done.stderr)
        self.assertRegex(done.stderr, r'\Akvmix-tune( \w+)?: error: .*' + pattern)
        self.assertEqual(sorted(self.folder.iterdir()), before)


class Figures(Tune):
    def holdout_is_as_known(self, report, candidates):
        cosine, tolerance = HOLDOUT_WORST_COSINE[candidates]
        self.assertAlmostEqual(report['holdout']['worst_cosine'], cosine, delta=tolerance)

    def test_budget(self):
        report = json.loads(self.succeed('--budget', '0.45', '--json'))
        self.assertEqual(list(self.folder.iterdir()), [])  # JSON alone writes no plan
        self.assertEqual(report['geometry'],
                         {'layers': 28, 'kv_heads': 2, 'query_heads': 12, 'head_dim': 128})
        self.assertGreaterEqual(report['saved_fraction'], 0.45)
        self.assertLess(report['saved_fraction'], 0.46)  # and no more than was asked for
        kept = report['bytes_per_token'] / report['fp16_bytes_per_token']
        self.assertAlmostEqual(report['saved_fraction'], 1 - kept, places=12)
        self.assertEqual(report['fp16_bytes_per_token'], 28 * 2 * 2 * 128 * 2)
        bits = report['effective_bits']
        self.assertAlmostEqual(bits['all'], 16 * kept)
        self.assertAlmostEqual(bits['all'], (bits['k'] + bits['v']) / 2)
        self.holdout_is_as_known(report, 'all')  # the default
        self.assertEqual((report['calibration_tokens'], report['holdout_tokens']), (64, 64))
        # Errors of K and V added up foretell what the plan does as a whole.
        predicted, measured = report['predicted'], report['calibration']
        self.assertAlmostEqual(predicted['worst_nmse'] / measured['worst_nmse'], 1, delta=0.1)
        self.assertAlmostEqual(predicted['mean_nmse'] / measured['mean_nmse'], 1, delta=0.02)
        self.assertLessEqual(OUTLIERS, k_heads(report['outliers']))
        saved = [point['saved_fraction'] for point in report['front']]
        self.assertEqual(saved, sorted(saved, reverse=True))
        self.assertEqual(saved[-1], 0)  # fp16

    def test_candidates(self):
        for candidates, steps in (('int8', {'centre'}),
                                  ('all', {'centre', 'fold', 'hadamard', 'shape'})):
            report = json.loads(self.succeed('--budget', '0.45', '--candidates', candidates,
                                             '--json'))
            self.assertGreaterEqual(report['saved_fraction'], 0.45)
            self.holdout_is_as_known(report, candidates)
            heads = report['heads']
            self.assertEqual({step for h in heads for step in h['codec'].split('+')[1:]}, steps)
            of_v = [c['codec'] for h in heads if h['tensor'] == 'v' for c in h['candidates']]
            self.assertTrue(of_v and not any('centre' in codec for codec in of_v))

    def test_past_half_of_the_bytes(self):
        report = json.loads(self.succeed('--budget', '0.7', '--json'))
        self.assertGreaterEqual(report['saved_fraction'], 0.7)
        self.assertGreater(report['holdout']['worst_cosine'], 0.97)
        four = [h['codec'] for h in report['heads'] if h['codec'].startswith('i4-')]
        self.assertGreater(len(four), 28)

    def test_the_studys_codecs_keep_outliers_in_fp16(self):
        report = json.loads(self.succeed('--budget', '0.45', '--candidates', 'seed', '--json'))
        self.assertGreaterEqual(report['saved_fraction'], 0.45)
        self.holdout_is_as_known(report, 'seed')
        self.assertLessEqual(OUTLIERS, k_heads(report['fp16_heads']))
        self.assertLessEqual({h['codec'] for h in report['heads']}, {'f16', 'i8-head', 'i8-token'})

    def test_min_cosine_alone_saves_the_most_that_holds_it(self):
        loose, tight = (json.loads(self.succeed('--min-cosine', c, '--json'))
                        for c in ('0.999', '0.9999'))
        self.assertGreaterEqual(loose['predicted']['worst_cosine'], 0.999)
        self.assertGreaterEqual(tight['predicted']['worst_cosine'], 0.9999)
        self.assertGreater(loose['saved_fraction'], tight['saved_fraction'])
        self.assertGreater(tight['saved_fraction'], 0.2)

    def test_explain(self):
        arguments = ('--budget', '0.78', '--explain')
        report = json.loads(self.succeed(*arguments, '--json'))
        limits = set()
        for head in report['heads']:
            why, costs = head['explain'], {c['codec']: c for c in head['candidates']}
            limits.add(why['limit'])
            here = costs[head['codec']]['bytes_per_token']
            smaller = [c['bytes_per_token'] for c in costs.values() if c['bytes_per_token'] < here]
            if why['limit'] == 'none':
                self.assertEqual(smaller, [])
                continue
            other = costs[why['smaller']['codec']]
            self.assertEqual(other['bytes_per_token'], max(smaller))
            self.assertEqual(why['limit'] == 'worst',
                             why['smaller']['worst_nmse'] > report['worst_limit'])
            self.assertLessEqual(why['worst_nmse'], report['worst_limit'])
            self.assertEqual(len(other['nmse']), 6)
            self.assertEqual(max(other['nmse']), other['worst_nmse'])
        self.assertEqual(limits, {'none', 'worst', 'sum'})
        text = self.succeed(*arguments, '-o', 'plan')
        rows = re.findall(r'^ +\d+ +[01]  [KV] +(?:i[3468]-\S+|f16) .*(?:none|worst|sum)$', text,
                          re.MULTILINE)
        self.assertEqual(len(rows), 112)
        self.assertRegex(text, r"\n  worst   a query head's NMSE would be above w = \S+, 1\.25 x")
        self.assertLessEqual(max(map(len, text.splitlines())), 100)
        self.assertNotIn('Why not smaller', self.succeed('--budget', '0.45', '-o', 'plan'))

    def test_every_run_gives_the_same_plan_whatever_the_threads(self):
        plans = set()
        for threads in ('0', '1', '2', '3', '7'):
            text = self.succeed('--budget', '0.45', '--threads', threads, '-o', 'plan')
            self.assertRegex(text, r'\nDecode times did not enter the choice: give --wisdom FILE, '
                                   r'.* within 2 %\.\n')
            plans.add((self.folder / 'plan').read_bytes())
        self.assertEqual(len(plans), 1)

    def test_time_in_ms(self):
        arguments = ('--budget', '0.1', '--json', '--wisdom', 'speeds.json')
        free = json.loads(self.succeed(*arguments))['decode_ns_per_token']['plan']
        bound = json.loads(self.succeed(*arguments, '--max-time', free * 0.97 / 1e6))
        bound = bound['decode_ns_per_token']
        self.assertLess(bound['plan'], free * 0.97)
        self.assertGreater(bound['tensors_decided'], 0)
        text = self.succeed('--budget', '0.1', '--max-time', '100', '-o', 'plan')
        self.assertRegex(text, r'\nDecode times decided \d+ of 112 tensors, and another run, .* '
                               r'may choose otherwise: --wisdom FILE keeps them\.\n')
        self.fail_with(r'decode within 0\.0001 ms a token: the fastest plan .* takes [\d.]+ ms, '
                       r'the fastest of all [\d.]+ ms\n',
                       '--budget', '0.45', '--max-time', '0.0001')


class Files(Tune):
    def plan_fits(self, path):
        plan = json.loads(path.read_text())
        self.assertEqual(plan['format'], 'kvmix-plan')
        self.assertGreaterEqual(plan['saved_fraction'], 0.45)
        self.assertIn(str(plan['bytes_per_token']),
                      self.succeed('size', '--plan', path, program=EVAL))

    def test_output(self):
        text = self.succeed('--budget', '0.45', '-o', 'mine.json')
        self.assertIn('plan written to mine.json\n', text)
        self.assertIn('% saved', text)
        self.assertRegex(text, r'\n +codec +K heads +V heads\n')
        self.assertRegex(text, r'\n  F  f16 +\d+ +\d+\n  a  i\d-token\S* +\d+ +\d+\n')
        matrices = json.loads((self.folder / 'mine.json').read_text())['shaping']['file']
        self.assertEqual({p.name for p in self.folder.iterdir()}, {'mine.json', matrices})
        self.plan_fits(self.folder / 'mine.json')
        text = self.succeed('--budget', '0.45', '-o', 'mine.json', '--json')
        self.assertIsInstance(json.loads(text), dict)  # named: replaced, and JSON as well
        self.plan_fits(self.folder / 'mine.json')

    def test_plan_json_is_never_overwritten_silently(self):
        self.assertIn('plan written to plan.json\n', self.succeed('--budget', '0.45'))
        path = self.folder / 'plan.json'
        self.plan_fits(path)
        path.write_text('of the user')
        # Before the work: no word of the dump.
        self.fail_with('plan.json exists already: .* -o', '--budget', '0.45', 'no_such_dump')
        self.assertEqual(path.read_text(), 'of the user')
        path.unlink()
        path.symlink_to('nowhere')
        self.fail_with('plan.json exists already', '--budget', '0.45')

    def test_wisdom_is_written_read_and_refused(self):
        self.assertRegex(self.succeed('--budget', '0.45', '-o', 'plan', '--wisdom', 'speeds.json'),
            r'\nDecode times decided \d+ of 112 tensors\.\n')
        (self.folder / 'plan').unlink()
        first = json.loads(self.succeed('--budget', '0.45', '--json', '--wisdom', 'speeds.json'))
        path = self.folder / 'speeds.json'
        written = path.read_bytes()
        second = json.loads(self.succeed('--budget', '0.45', '--json', '--wisdom', 'speeds.json'))
        self.assertEqual(second, first)  # the same speeds: the same plan, all digits
        self.assertEqual(path.read_bytes(), written)
        wisdom = json.loads(written)
        cpu = wisdom['cpu']
        wisdom['cpu'] = 'another'
        path.write_text(json.dumps(wisdom))
        self.fail_with(f'speeds.json: cpu: expected "{re.escape(cpu)}", found "another"; '
                       'delete this file', '--budget', '0.45', '--wisdom', 'speeds.json')

    def test_outputs_that_cannot_be_written(self):
        self.fail_with('/nonexistent/plan.json: expected the folder /nonexistent, found none',
                       '--budget', '0.45', '-o', '/nonexistent/plan.json')
        self.fail_with('/dev/full: .*No space left', '--budget', '0.45', '--candidates', 'int8',
                       '-o', '/dev/full')
        self.fail_with('expected a file to write to, found a folder', '--budget', '0.45', '-o',
                       self.folder)
        with open('/dev/full', 'w') as full:
            done = subprocess.run([str(TUNE), '--budget', '0.45', '--json'], cwd=self.folder,
                                  stdout=full, stderr=subprocess.PIPE, text=True)
        self.assertNotEqual(done.returncode, 0)
        self.assertIn('standard output', done.stderr)

    def test_devices_and_pipes(self):
        """A plan's matrices are a file beside it: none is left beside a device or a pipe."""
        before = set(os.listdir('/dev'))
        self.succeed('--budget', '0.45', '-o', '/dev/null')
        os.mkfifo(self.folder / 'pipe')
        for output in ('/dev/stdout', 'pipe'):  # before the work: no word of the dump
            self.fail_with(f'{output}: expected a file, as a plan with .shape has a second file '
                           'beside it, found a device or a pipe', '--budget', '0.45', '-o', output,
                           'no_such_dump')
        self.assertEqual(set(os.listdir('/dev')), before)
        self.assertEqual([p.name for p in self.folder.iterdir()], ['pipe'])


class Programs(Tune):
    def test_a_program_gets_the_plan_of_the_tool_byte_for_byte(self):
        sample = [ROOT / 'data' / 'sample' / f'qwen2.5-coder-1.5b.{part}.safetensors'
                  for part in ('calibration', 'holdout')]
        for name in ('tool', 'program'):
            (self.folder / name).mkdir()
        self.succeed('--budget', '0.45', '-o', 'tool/plan')
        done = self.run_program(EXAMPLE, *sample, 0.45, 'program/plan')
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, r'\Asaves 45\.\d % of the bytes; on qwen.*holdout.* 0\.999')
        self.assertIn('calibrating: done\n', done.stderr)
        written = [{file.name: file.read_bytes() for file in (self.folder / name).iterdir()}
                   for name in ('tool', 'program')]
        self.assertIn('plan', written[0])
        self.assertEqual(*written)


class UnlikeLayers(Tune):
    """As Gemma has them: five layers that see a window, a global one of another shape; and one
    without K and V, and one that reads the global one's."""
    LOCAL = {'kv_heads': 2, 'query_heads': 4, 'k_dim': 16, 'v_dim': 16, 'window': 64,
             'soft_cap': 50}
    GLOBAL = {'kv_heads': 1, 'query_heads': 4, 'k_dim': 32, 'v_dim': 16, 'sinks': [0.5, 1, -1, 0]}
    LAYERS = [*[LOCAL] * 5, GLOBAL, None, {**GLOBAL, 'kv_layer': 5}]

    def setUp(self):
        super().setUp()
        normal, shapes, data = random.Random(1), {}, b''
        for i, layer in enumerate(self.LAYERS):
            for name in (() if not layer else 'q' if 'kv_layer' in layer else 'kvq'):
                heads = layer['query_heads' if name == 'q' else 'kv_heads']
                shapes[f'layers.{i}.{name}'] = 120, heads, layer[f'{"kv"[name == "v"]}_dim']
        for shape in shapes.values():
            n = shape[0] * shape[1] * shape[2]
            data += struct.pack(f'<{n}e', *(normal.gauss(0, 1) for _ in range(n)))
        about = {'prompt_tokens': '100,20', 'layer_shapes': json.dumps(self.LAYERS)}
        (self.folder / 'dump').write_bytes(header(shapes, about) + data)

    def test_budget_is_that_of_the_context(self):
        fp16 = 5 * 2 * 64 * 64 + 1024 * 96
        text = self.succeed('dump', '--budget', '0.4', '--context', '1024', '-o', 'plan')
        plan = json.loads((self.folder / 'plan').read_text())
        self.assertEqual((plan['version'], len(plan['layers']), plan['layers'][6]),
                         ([1, 4], 8, None))
        self.assertEqual(plan['layers'][7]['kv_layer'], 5)
        self.assertEqual([len(layer or ()) for layer in plan['codecs']],
                         [2, 2, 2, 2, 2, 1, 0, 0])
        found = re.search(r'\nPlan: (\d+) of (\d+) bytes at a context of 1024 tokens, ([\d.]+) %',
                          text)
        self.assertEqual(int(found[2]), fp16)
        self.assertLessEqual(int(found[1]), 0.6 * fp16)
        for words in ('5 layers x 2 KV heads x 16, 4 query heads, window 64, soft cap 50',
                      'ms per KV head x 32/16, 4 queries, 1024 tokens',
                      'ms per KV head x 16/16, 2 queries, 64 tokens'):
            self.assertIn(words, text)
        report = json.loads(self.succeed('dump', '--budget', '0.4', '--context', '1024', '--json'))
        self.assertEqual(report['layers'], plan['layers'])
        self.assertEqual((report['context_bytes'], report['fp16_context_bytes']),
                         (int(found[1]), fp16))
        self.assertAlmostEqual(report['saved_fraction'], 1 - int(found[1]) / fp16)
        # Within the window all layers count alike.
        text = self.succeed('dump', '--budget', '0.4', '--context', '60', '-o', 'short')
        self.assertRegex(text, r'\nPlan: \d+ of 736 bytes per token')

    def test_kvmix_eval_takes_them(self):
        self.succeed('dump', '--budget', '0.4', '-o', 'plan')
        def rows(*arguments):
            return [line.split(',') for line in
                    self.succeed(*arguments, program=EVAL).splitlines()]
        quant = rows('quant', 'dump', '--plan', 'plan')
        self.assertEqual(len(quant), 2 * (5 * 2 + 1))
        self.assertEqual([row[5] for row in quant[-2:]], ['32', '16'])
        found = rows('attention', 'dump', '--strategy', '2')
        self.assertEqual(sorted({row[0] for row in found[1:]}), list('0123457'))
        size = rows('size', '--plan', 'plan', '--tokens', '65536')
        self.assertEqual(size[1], ['fp16', '736', '0.0000', f'{6 + 40960 / 2**20:.2f}'])


class Steps(Tune):
    """calibrate, measure, merge, choose: the short form's plan byte for byte, whatever the split;
    what is missing, doubled, foreign or damaged is named, and nothing is written."""
    LAYERS = 6

    def setUp(self):
        super().setUp()
        self.dumps = [self.write_dump('x', 40, 1), self.write_dump('y', 25, 2),
                      self.write_dump('z', 3, 3)]

    def write_dump(self, name, tokens, seed, layers=LAYERS, **metadata):
        normal, shapes = random.Random(seed), {}
        for layer in range(layers):
            for kind in 'kqv':
                shapes[f'layers.{layer}.{kind}'] = tokens, 4 if kind == 'q' else 2, 16
        count = sum(t * h * d for t, h, d in shapes.values())
        data = struct.pack(f'<{count}e', *(normal.gauss(0, 1) for _ in range(count)))
        (self.folder / name).write_bytes(header(shapes, {'model': 'm', **metadata}) + data)
        return name

    def part(self, name, step, *arguments):
        self.succeed(step, *arguments, '-o', name)
        return name

    def calibration(self, *dumps):
        return self.part('calibration', 'calibrate', *dumps)

    def contents(self, *names):
        return [(self.folder / name).read_bytes() for name in names]

    def test_the_plan_of_the_short_form_byte_for_byte(self):
        aim = ('--budget', '0.6', '--holdout', self.write_dump('held', 20, 4))
        (self.folder / 'short').mkdir()
        self.succeed(*self.dumps, *aim, '-o', 'short/plan', '--work', 'work')
        x, y, z = self.dumps
        parts = [self.part('c0', 'calibrate', x, z, '--layers', '0:4'),
                 self.part('c1', 'calibrate', x, '--layers', '4:6', '--threads', '1'),
                 self.part('c2', 'calibrate', z, '--layers', '4:6'),
                 self.part('c3', 'calibrate', y)]
        self.part('c', 'merge', parts[2], parts[0], parts[3], parts[1])
        parts = [self.part('m0', 'measure', y, x, '--calibration', 'c', '--layers', '1:6'),
                 self.part('m1', 'measure', x, y, '--layers', '0:1', '--calibration', *parts),
                 self.part('m2', 'measure', z, '--calibration', 'c', '--threads', '1')]
        self.part('m', 'merge', parts[1], parts[2], parts[0])
        self.assertEqual(*self.contents('m', 'work'))
        (self.folder / 'four').mkdir()
        self.succeed('choose', 'm', z, x, y, *aim, '-o', 'four/plan')
        self.assertEqual(*self.contents('short/plan', 'four/plan'))
        # Without dumps the same codecs, and another budget needs nothing but the file.
        for name in self.dumps:
            (self.folder / name).unlink()
        plan = json.loads((self.folder / 'four' / 'plan').read_text())
        text = self.succeed('choose', 'm', '--budget', '0.6', '-o', 'dumpless')
        self.assertNotIn('calibration, 68 tokens', text)
        self.assertEqual(json.loads((self.folder / 'dumpless').read_text())['codecs'],
                         plan['codecs'])
        report = json.loads(self.succeed('choose', 'm', '--min-cosine', '0.99999', '--json'))
        self.assertGreaterEqual(report['predicted']['worst_cosine'], 0.99999)
        self.assertIsNone(report['calibration'])
        self.assertLess(report['saved_fraction'], plan['saved_fraction'])

    def test_several_holdouts(self):
        x = self.dumps[0]
        held = [self.write_dump('short', 20, 4, prompt_tokens='8,12'),
                self.write_dump('long', 70, 5)]
        aim = ('--budget', '0.6')
        alone = [json.loads(self.succeed(x, *aim, '--holdout', name, '--json')) for name in held]
        both = [argument for name in held for argument in ('--holdout', name)]
        report = json.loads(self.succeed(*both, x, *aim, '--json'))  # x is no third holdout
        self.assertEqual(report['holdouts'], [
            {'dump': name, 'tokens': tokens, 'longest_prompt': longest, **one['holdout']}
            for name, tokens, longest, one in zip(held, (20, 70), (12, 70), alone)])
        worst = min(report['holdouts'], key=lambda h: h['worst_cosine'])
        self.assertEqual({key: report[key] for key in ('holdout', 'holdout_dump')},
                         {'holdout': alone[held.index(worst['dump'])]['holdout'],
                          'holdout_dump': worst['dump']})
        # The same in steps, in the other order; the plan's file keeps the worst.
        self.part('m', 'measure', x, '--calibration', self.calibration(x))
        text = self.succeed('choose', 'm', x, *aim, *both[2:], *both[:2], '-o', 'plan')
        self.assertIn('\nheld out long (70 tokens)\n'
                      'held out short (20 tokens, prompts of up to 12)\n', text)
        self.assertRegex(text, r'\n  holdout 1, 70 tokens  .*\n  holdout 2, 20 tokens  ')
        self.assertLessEqual(max(map(len, text.splitlines())), 100)
        plan = json.loads((self.folder / 'plan').read_text())
        self.assertEqual(plan['provenance']['holdout'], worst['dump'])
        self.assertEqual(plan['provenance']['holdout_tokens'], worst['tokens'])
        self.assertEqual(plan['accuracy']['holdout']['worst_cosine'], worst['worst_cosine'])

    def test_holdouts_that_are_none(self):
        x, y, _ = self.dumps
        (self.folder / 'copy').write_bytes((self.folder / y).read_bytes())
        self.write_dump('small', 40, 1, layers=2)
        self.part('m', 'measure', x, '--calibration', self.calibration(x))
        for first in ((x,), ('choose', 'm', x)):
            aim = (*first, '--budget', '0.6')
            self.fail_with('copy: the same dump as y: expected each once', *aim, '--holdout', y,
                           '--holdout', 'copy')
            self.fail_with('small: expected 6 layers .*, found 2 layers', *aim, '--holdout', y,
                           '--holdout', 'small')
            done = self.run_program(TUNE, *aim, '--holdout', y, '--holdout', x, '--json')
            self.assertEqual((done.returncode, done.stderr),
                             (0, 'kvmix-tune: warning: x: this holdout is a dump of the '
                                 'calibration: take another text\n'))
            found = json.loads(done.stdout)
            self.assertEqual({key: found['holdouts'][1][key] for key in found['calibration']},
                             found['calibration'])

    def test_a_holdout_far_beyond_the_calibration(self):
        x, y, z = self.dumps
        done = self.run_program(TUNE, z, '--budget', '0.6', '--holdout', x, '--holdout', y, '-o',
                                'plan')
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stderr, ''.join(
            rf'kvmix-tune: warning: {name}: a context of {tokens} tokens, but the plan was '
            r'calibrated on prompts of at most 3: .*\n' for name, tokens in ((x, 40), (y, 25))))

    def test_measuring_goes_on_where_it_stopped(self):
        x = self.dumps[0]
        c = self.calibration(x)
        whole = self.contents(self.part('whole', 'measure', x, '--calibration', c))
        self.part('part', 'measure', x, '--calibration', c, '--layers', '2:4')
        text = self.succeed('measure', x, '--calibration', c, '--layers', '0:4', '-o', 'part')
        self.assertEqual(text, 'part\n  holds layers 0 to 3 of x\n  lacks layers 4 to 5 of x\n')
        for _ in range(2):  # the second time there is nothing left to do
            self.part('part', 'measure', x, '--calibration', c)
            self.assertEqual(self.contents('part'), whole)
        before = self.contents('part')
        self.fail_with('part: parts cannot be merged: candidates of K: expected .*, found .*; '
                       'name another file', 'measure', x, '--calibration', c, '--candidates',
                       'int8', '-o', 'part')
        self.part('other', 'calibrate', *self.dumps)
        self.fail_with('part: .*calibration dumps: expected .*, found x ', 'measure', x,
                       '--calibration', 'other', '-o', 'part')
        for step in (['calibrate', x], ['measure', x, '--calibration', c], ['merge', c]):
            self.fail_with('x: expected no file, or one that a step .* wrote, found another', *step,
                           '-o', x)
        self.assertEqual(self.contents('part'), before)

    def test_what_is_missing_or_doubled_is_named(self):
        x, y, _ = self.dumps
        self.part('c0', 'calibrate', x, y, '--layers', '0:4')
        text = self.succeed('merge', 'c0', '-o', 'c')
        for name in (x, y):
            self.assertRegex(text, f'holds .*layers 0 to 3 of {name}')
            self.assertRegex(text, f'lacks .*layers 4 to 5 of {name}')
        self.fail_with('lacks .*layers 4 to 5 of x', 'measure', x, '--calibration', 'c', '-o', 'm')
        self.part('c1', 'calibrate', x, y, '--layers', '3:6')
        self.fail_with('c1: parts cannot be merged: both have .*layer 3 of y', 'merge', 'c0', 'c1',
                       '-o', 'twice')
        self.fail_with('same dump as x', 'calibrate', x, x, '-o', 'twice')
        self.part('c1', 'calibrate', x, y, '--layers', '4:6')
        self.part('c', 'merge', 'c0', 'c1')
        self.part('m0', 'measure', x, '--calibration', 'c')
        self.part('m1', 'measure', y, '--calibration', 'c', '--layers', '1:6')
        self.fail_with('m0: the measurement lacks layers 0 to 5 of y', 'choose', 'm0', '--budget',
                       '0.4')
        self.part('m', 'merge', 'm0', 'm1')
        self.fail_with('m: the measurement lacks layer 0 of y', 'choose', 'm', '--budget', '0.4')
        self.fail_with('m1: parts cannot be merged: both have layers 1 to 5 of y', 'merge', 'm1',
                       'm1', '-o', 'twice')
        self.part('m2', 'measure', y, '--calibration', 'c', '--layers', '0:1')
        self.part('m', 'merge', 'm', 'm2')
        self.fail_with('expected every dump that was measured, x, y, or none, found 1 of 2',
                       'choose', 'm', x, '--budget', '0.4')
        self.fail_with('z: expected one of the dumps that were measured, x, y', 'choose', 'm', 'z',
                       '--budget', '0.4')

    def test_what_does_not_belong_together_is_refused(self):
        x, y, _ = self.dumps
        self.part('cx', 'calibrate', x)
        self.part('cy', 'calibrate', y)
        self.part('mx', 'measure', x, '--calibration', 'cx')
        self.part('my', 'measure', y, '--calibration', 'cy')
        self.fail_with('my: .*calibration dumps: expected x .*, found y ', 'merge', 'mx', 'my',
                       '-o', 'm')
        self.fail_with('y: expected a dump that was calibrated on, x, found one that was not',
                       'measure', y, '--calibration', 'cx', '-o', 'm')
        self.fail_with('mx: format: expected "kvmix-calibration", found "kvmix-measurement"',
                       'merge', 'cx', 'mx', '-o', 'm')
        self.fail_with('cx: format: expected "kvmix-measurement"', 'choose', 'cx', '--budget',
                       '0.4')
        self.part('small', 'measure', x, '--calibration', 'cx', '--layers', '0:1', '--candidates',
                  'int8')
        self.part('rest', 'measure', x, '--calibration', 'cx', '--layers', '1:6')
        self.fail_with('rest: .*candidates of K: expected', 'merge', 'small', 'rest', '-o', 'm')
        self.write_dump('other', 40, 1, layers=2)
        self.part('co', 'calibrate', 'other')
        self.fail_with('co: .*layers: expected 6 layers .*, found 2 layers', 'merge', 'cx', 'co',
                       '-o', 'm')
        self.fail_with('other: 2 layers .* calibrated has 6 layers', 'measure', 'other',
                       '--calibration', 'cx', '-o', 'm')
        # One number of the dump changed since it was calibrated.
        data = bytearray((self.folder / x).read_bytes())
        data[-9] ^= 1
        (self.folder / x).write_bytes(data)
        self.fail_with('x: expected a dump that was calibrated on, x, found one with other numbers '
                       'in layer 5', 'measure', x, '--calibration', 'cx', '-o', 'm')

    def test_damaged_parts(self):
        c = self.calibration(self.dumps[0])
        self.part('m', 'measure', self.dumps[0], '--calibration', c)
        good = self.contents('m')[0]
        for damaged in (good[:-1], good[:len(good) // 2], good[:5], b'', good + b'x',
                        good[:-3000] + bytes([good[-3000] ^ 1]) + good[-2999:],
                        good.replace(b'i8-token', b'i6-token', 1)):
            (self.folder / 'm').write_bytes(damaged)
            self.fail_with('m: .*expected', 'choose', 'm', '--budget', '0.4')
            self.fail_with('m: .*expected', 'merge', 'm', '-o', 'n')
            self.fail_with('m: .*expected', 'measure', self.dumps[0], '--calibration', c, '-o', 'm')
            self.assertEqual(self.contents('m'), [damaged])
        newer = good.replace(rb'\"version\":[1,0]', rb'\"version\":[2,0]', 1)
        self.assertNotEqual(newer, good)
        (self.folder / 'm').write_bytes(newer)
        self.fail_with('m: version: expected major version 1, found 2', 'choose', 'm', '--budget',
                       '0.4')

    def test_numpy_reads_them_as_documented(self):
        x, y, _ = self.dumps
        self.part('m', 'measure', x, y, '--calibration', self.calibration(x, y))

        def tensors(name):
            data = self.contents(name)[0]
            length = struct.unpack_from('<Q', data)[0]
            head, buffer = json.loads(data[8:8 + length]), data[8 + length:]
            metadata = head.pop('__metadata__')
            dtypes = {'F64': '<f8', 'F16': '<f2', 'U64': '<u8'}
            return metadata, {
                key: np.frombuffer(buffer[slice(*t['data_offsets'])],
                                   dtypes[t['dtype']]).reshape(t['shape'])
                for key, t in head.items()}
        metadata, numbers = tensors('calibration')
        about = json.loads(metadata['kvmix'])
        order = [dump['name'] for dump in about['dumps']]
        self.assertEqual(sorted(order), [x, y])
        self.assertEqual([dump['pieces'] for dump in about['dumps']], [list(range(6))] * 2)
        of_x = tensors(x)[1]
        q, k, v = (of_x[f'layers.2.{kind}'].astype(float) for kind in 'qkv')
        prefix = f'dumps.{order.index(x)}.layers.2'
        for kind, rows in (('k', k), ('v', v)):
            np.testing.assert_allclose(numbers[f'{prefix}.{kind}.sum'], rows.sum(0))
            np.testing.assert_array_equal(numbers[f'{prefix}.{kind}.min'], rows.min(0))
            np.testing.assert_array_equal(numbers[f'{prefix}.{kind}.max'], rows.max(0))
        q = q.reshape(40, 2, 2, 16)  # tokens, KV heads, group, head_dim
        np.testing.assert_allclose(numbers[f'{prefix}.k.query_moment'],
                                   np.einsum('thgi,thgj->hij', q, q))
        metadata, numbers = tensors('m')
        candidates = json.loads(metadata['kvmix'])['candidates']
        self.assertEqual(candidates['name'], 'all')
        errors = numbers[f'{prefix}.k.attention']
        self.assertEqual(errors.shape, (2, len(candidates['k']), 2, 3))
        exact = candidates['k'].index('f16')
        self.assertEqual(np.abs(errors[:, exact, :, 0]).max(), 0)
        np.testing.assert_array_equal(errors[:, exact, :, 2], 40)  # cosines of 1, a token each
        values = numbers[f'{prefix}.v.values']
        self.assertEqual(values.shape, (2, len(candidates['v']), 3))
        np.testing.assert_array_equal(values[:, 0, 2], np.abs(v).max((0, 2)))

    def test_one_token_and_a_head_of_zeros(self):
        shapes = {f'layers.0.{kind}': (1, 1, 16) for kind in 'kqv'}
        (self.folder / 'one').write_bytes(header(shapes, {'kv_heads': '1'}) + bytes(3 * 32))
        self.part('m', 'measure', 'one', '--calibration', self.calibration('one'))
        self.succeed('choose', 'm', 'one', '--budget', '0.4', '-o', 'plan')
        self.assertGreaterEqual(json.loads((self.folder / 'plan').read_text())['saved_fraction'],
                                0.4)

    def test_a_dump_may_be_called_as_a_step_is(self):
        (self.folder / 'merge').write_bytes((self.folder / self.dumps[0]).read_bytes())
        self.succeed('./merge', '--budget', '0.4', '-o', 'plan')
        plan = json.loads((self.folder / 'plan').read_text())
        self.assertEqual(plan['provenance']['calibration'], 'merge')

    def test_arguments(self):
        x = self.dumps[0]
        for text in ('1', ':', '0-3', '0:x', '-1:3', ':2', '0:3:4'):
            self.fail_with(f"--layers: expected FIRST:LAST, .* found '{text}'", 'calibrate', x,
                           f'--layers={text}', '-o', 'c')
        self.fail_with('layers 0 to 7: x has layers 0 to 6', 'calibrate', x, '--layers', '0:7',
                       '-o', 'c')
        self.fail_with('--output is required', 'calibrate', x)
        self.fail_with('--calibration is required', 'measure', x, '-o', 'm')
        self.fail_with('PART is required', 'merge', '-o', 'm')
        self.fail_with('FILE is required', 'choose', '--budget', '0.4')
        self.fail_with('give --budget', 'choose', 'm', '-o', 'plan')
        self.fail_with('none: expected a readable file', 'choose', 'none', '--budget', '0.4')
        c = self.calibration(x)
        self.fail_with('AVX9', 'measure', x, '--calibration', c, '--target', 'AVX9', '-o', 'm')


class Refusals(Tune):
    def test_budgets_beyond_the_codecs_say_what_is_possible(self):
        self.fail_with(r'budget 0\.8: the most .* 0\.5000', '--budget', '0.8', '--candidates',
                       'seed')
        self.fail_with(r'budget 0\.85: the most .* 0\.80\d\d', '--budget', '0.85')
        # Of a pair of limits the best of each alone.
        self.fail_with(r'budget 0\.45 with cosine 0\.99999: within this budget the worst head '
                       r'reaches 0\.9999\d\d at best, with this cosine 0\.[0-3]\d* of the bytes',
                       '--min-cosine', '0.99999', '--budget', '0.45')
        self.fail_with(r'budget 0\.9 with cosine 0\.9999: the most that these codecs can save is '
                       r'0\.8046 of the fp16 bytes, with this cosine 0\.5\d* of the bytes',
                       '--min-cosine', '0.9999', '--budget', '0.9')

    def test_numbers_that_are_none(self):
        for text in ('-1', '0', '1', 'abc', 'nan', 'inf', '0.45x'):
            self.fail_with(f"--budget: .*found '{text}'", f'--budget={text}')
            if text != '1':
                self.fail_with(f"--min-cosine: .*found '{text}'", f'--min-cosine={text}')
        self.fail_with('--budget', '--budget')
        self.fail_with('give --budget', '--json')
        self.fail_with('--candidates', '--budget', '0.45', '--candidates', 'int2')
        self.fail_with('no_such.safetensors', '--budget', '0.45', 'no_such.safetensors')


if __name__ == '__main__':
    unittest.main()
