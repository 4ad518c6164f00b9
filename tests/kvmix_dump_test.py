#!/usr/bin/env python3
"""Tests the parts of kvmix-dump that need neither torch nor a model, and whole runs with a model
that is made up. kvmix_dump_test.py [KVMIX-TUNE]: the program must read the file."""
import json
import pathlib
import signal
import struct
import subprocess
import sys
import tempfile
import tracemalloc
import unittest

import numpy as np

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / 'tools' / 'python'
sys.path.insert(0, str(PACKAGE))
from kvmix_tools import InputError, dump, written_whole  # noqa: E402

TUNE = pathlib.Path(sys.argv.pop()).resolve() if len(sys.argv) > 1 else None
ABOUT = {'model': 'model', 'corpus': 'corpus', 'rope_theta': '1000000'}


def layer(seed, tokens=8, heads=2, query_heads=6, dim=16):
    random = np.random.default_rng(seed)
    return [random.standard_normal((h, tokens, dim), np.float32)
            for h in (query_heads, heads, heads)]


def read(path):
    """{tensor: values} of a dump, its metadata under ''."""
    raw = path.read_bytes()
    length = struct.unpack('<Q', raw[:8])[0]
    header, data, at = json.loads(raw[8:8 + length]), raw[8 + length:], 0
    assert length % 8 == 0
    tensors = {'': header.pop('__metadata__')}
    for name, entry in header.items():
        start, end = entry['data_offsets']
        assert (start, entry['dtype']) == (at, 'F16')
        tensors[name] = np.frombuffer(data[start:end], '<f2').reshape(entry['shape'])
        at = end
    assert at == len(data)
    return tensors


class Case(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.path = self.folder / 'dump.safetensors'

    def files(self):
        return sorted(path.name for path in self.folder.iterdir())


class Prompts(unittest.TestCase):
    def test_cuts_with_the_prefix(self):
        self.assertEqual(dump.cut_prompts(list(range(10)), [99], 4, 2, skip=1),
                         [[99, 1, 2, 3], [99, 4, 5, 6]])

    def test_takes_all_of_the_text_and_no_more(self):
        self.assertEqual(dump.cut_prompts(list(range(6)), [], 3, 2), [[0, 1, 2], [3, 4, 5]])
        with self.assertRaisesRegex(InputError, '6 tokens.*take 7'):
            dump.cut_prompts(list(range(6)), [], 3, 2, skip=1)

    def test_refuses_prompts_of_nothing_but_prefix(self):
        with self.assertRaisesRegex(InputError, '--tokens 1'):
            dump.cut_prompts(list(range(6)), [99], 1, 1)


class Record(Case):
    def test_joins_prompts_with_tokens_first(self):
        first, second = layer(1), layer(2, tokens=5)
        with dump.Recorder(self.path, 1, [8, 5], ABOUT) as recorder:
            recorder.add(0, *first, 0.25)
            recorder.end_prompt()
            recorder.add(0, *second, 0.25)
            recorder.end_prompt()
        tensors = read(self.path)
        self.assertEqual(list(tensors), ['', 'layers.0.k', 'layers.0.v', 'layers.0.q'])
        self.assertEqual(tensors['layers.0.q'].shape, (13, 6, 16))
        for name, i in (('q', 0), ('k', 1), ('v', 2)):
            x = tensors[f'layers.0.{name}']
            self.assertEqual(x[3, 1, 7], np.float16(first[i][1, 3, 7]))
            self.assertEqual(x[8 + 4, 0, 2], np.float16(second[i][0, 4, 2]))

    def test_what_it_holds_is_a_layer_not_a_dump(self):
        x, layers = layer(1, tokens=256), 20
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        with dump.Recorder(self.path, layers, [256] * 3, ABOUT) as recorder:
            for _ in range(3):
                for i in range(layers):
                    x[1][0, 0, 0] = i  # K that no other layer has
                    recorder.add(i, *x, 0.25)
                recorder.end_prompt()
        one = sum(part.nbytes for part in x)
        self.assertLess(tracemalloc.get_traced_memory()[1], 2 * one)
        self.assertGreater(self.path.stat().st_size, layers * 3 * one // 2)

    def refused(self, pattern, *calls, layers=4, finish=False):
        with (self.assertRaisesRegex(InputError, pattern),
              dump.Recorder(self.path, layers, [8, 8], ABOUT) as recorder):
            for call in calls:
                recorder.add(*call)
            if finish:
                recorder.end_prompt()
        self.assertEqual(self.files(), [])

    def test_refuses_what_a_dump_cannot_say(self):
        q, k, v = layer(1)
        self.refused('grouped-query', (0, q[:5], k, v, 0.25))
        self.refused('grouped-query', (0, q, k, v[:1], 0.25))
        self.refused('expected the 8 tokens of the prompt, found 9', (0, *layer(1, 9), 0.25))
        self.refused('at most 512 channels, found 576 .*MLA', (0, *layer(1, dim=576), 0.25))
        self.refused('layer 3: k has values beyond fp16', (3, q, k * np.float32(1e6), v, 0.25))

    def test_refuses_layers_without_attention_after_the_first_prompt(self):
        x = (*layer(1), 0.25)
        self.refused('layer 0: expected one attention in a prompt', (0, *x), (0, *x), layers=2)
        self.refused(r'layers \[0, 1, 2, 3\], found it in \[\]', finish=True)
        with (self.assertRaisesRegex(InputError, r'in the layers \[1\], found it in \[0\]'),
              dump.Recorder(self.path, 2, [8], ABOUT, [0, 1]) as recorder):
            recorder.add(0, *x)
            recorder.end_prompt()

    def test_refuses_layers_that_change_from_prompt_to_prompt(self):
        for change, pattern in ((lambda r: r.add(0, *layer(3), 0.5), 'as in the first prompt'),
                                (lambda r: r.add(1, *layer(3), 0.25), 'expected no attention'),
                                (lambda r: None, r'in the layers \[0\], found it in \[\]')):
            with (self.assertRaisesRegex(InputError, pattern),
                  dump.Recorder(self.path, 2, [8, 8], ABOUT) as recorder):
                recorder.add(0, *layer(1), 0.25)
                recorder.end_prompt()
                change(recorder)
                recorder.end_prompt()

    def record_unlike(self):
        """A local layer, none, a global one of other widths, one with the K and V of the first."""
        one, three = ([layer(seed + p, dim=16) for p in (0, 1)] for seed in (1, 3))
        with dump.Recorder(self.path, 4, [8, 8], ABOUT) as recorder:
            for p in (0, 1):
                recorder.add(0, *one[p], 0.25, window=5, soft_cap=30)
                q, k, v = layer(5 + p, heads=1, query_heads=2, dim=24)
                recorder.add(2, q, k, v[..., :8], 0.5, sinks=[0.5, -1])
                recorder.add(3, three[p][0], *one[p][1:], 0.25)
                recorder.end_prompt()
        return one, three, recorder.words()

    def test_unlike_layers(self):
        one, three, words = self.record_unlike()
        self.assertEqual(words, '4 layers that differ (1 without K and V, 1 with those of '
                                'another), 16 tokens')
        tensors = read(self.path)
        meta = tensors.pop('')
        self.assertFalse(meta.keys() & {'kv_heads', 'head_dim', 'attention_scale'})
        local = {'kv_heads': 2, 'query_heads': 6, 'k_dim': 16, 'v_dim': 16,
                 'attention_scale': 0.25}
        self.assertEqual(json.loads(meta['layer_shapes']), [
            {**local, 'window': 5, 'soft_cap': 30}, None,
            {'kv_heads': 1, 'query_heads': 2, 'k_dim': 24, 'v_dim': 8, 'attention_scale': 0.5,
             'sinks': [0.5, -1]},
            {**local, 'kv_layer': 0}])
        self.assertEqual(sorted(tensors), sorted(
            [f'layers.{i}.{x}' for i in (0, 2) for x in 'kvq'] + ['layers.3.q']))
        self.assertEqual(tensors['layers.2.v'].shape, (16, 1, 8))
        self.assertEqual(tensors['layers.0.v'][9, 1, 3], np.float16(one[1][2][1, 1, 3]))
        self.assertEqual(tensors['layers.3.q'][9, 5, 3], np.float16(three[1][0][5, 1, 3]))

    @unittest.skipUnless(TUNE, 'no kvmix-tune given')
    def test_kvmix_tune_reads_unlike_layers(self):
        self.record_unlike()
        done = subprocess.run([TUNE, self.path, '--budget', '0.3', '--json'], cwd=self.folder,
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        layers = json.loads(done.stdout)['layers']
        self.assertEqual((layers[0]['window'], layers[1], layers[3]['kv_layer']), (5, None, 0))
        self.assertNotIn('attention_scale', layers[0])  # 1 / sqrt(16)


class File(Case):
    def setUp(self):
        super().setUp()
        self.layers = [[layer(2 * prompt + i) for i in range(2)] for prompt in range(2)]
        with dump.Recorder(self.path, 2, [8, 8], ABOUT) as recorder:
            for prompt in self.layers:
                for i, arrays in enumerate(prompt):
                    recorder.add(i, *arrays, 0.25)
                recorder.end_prompt()

    def test_layout(self):
        tensors = read(self.path)
        self.assertEqual(tensors.pop(''), {
            'format': 'kvmix-dump-1', 'model': 'model', 'corpus': 'corpus', 'layers': '2',
            'tokens': '16', 'prompt_tokens': '8,8', 'kv_heads': '2', 'query_heads': '6',
            'head_dim': '16', 'rope_theta': '1000000', 'attention_scale': '0.25'})
        self.assertEqual(len(tensors), 6)
        for name, x in tensors.items():
            _, i, which = name.split('.')
            joined = np.concatenate([p[int(i)]['qkv'.index(which)] for p in self.layers], axis=1)
            np.testing.assert_array_equal(x, joined.transpose(1, 0, 2).astype(np.float16))
        self.assertEqual(self.files(), ['dump.safetensors'])

    def test_a_failed_write_leaves_the_old_file(self):
        before = self.path.read_bytes()
        with (open('/dev/full', 'wb', buffering=0) as full, self.assertRaises(OSError),
              dump.Recorder(self.path, 2, [8, 8], ABOUT) as recorder):
            recorder.file.close()
            recorder.file = full
            recorder.add(0, *layer(1), 0.25)
        self.assertEqual(self.path.read_bytes(), before)
        self.assertEqual(self.files(), ['dump.safetensors'])

    def test_two_writers_at_once_do_not_meet(self):
        with written_whole(self.path) as first, written_whole(self.path) as second:
            first.write(b'the first')
            second.write(b'the second')
        self.assertEqual(self.path.read_bytes(), b'the first')  # it ended last
        self.assertEqual(self.files(), ['dump.safetensors'])
        (self.folder / 'other').touch()  # with the rights of any new file
        self.assertEqual(self.path.stat().st_mode, (self.folder / 'other').stat().st_mode)

    @unittest.skipUnless(TUNE, 'no kvmix-tune given')
    def test_kvmix_tune_reads_it(self):
        done = subprocess.run([TUNE, self.path, '--budget', '0.3', '--json'], cwd=self.folder,
                              capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertGreaterEqual(json.loads(done.stdout)['saved_fraction'], 0.3)


# kvmix-dump with a model of 2 layers that says when a prompt is through, and waits in prompt WAIT.
PROGRAM = f'''
import sys, time, types
import numpy as np
sys.path.insert(0, {str(PACKAGE)!r})
from kvmix_tools import dump
done = []
def run(prompt, add):
    for layer in range(2):
        q, k, v = (np.full((heads, len(prompt), 16), len(done)) for heads in (4, 2, 2))
        add(layer, q, k + layer, v, 0.25)
    done.append(prompt)
    print('prompt', len(done), flush=True)
    if len(done) == WAIT:
        time.sleep(60)
def tokenizer(text, **_):
    return {{'input_ids': text.split()}}
dump.load = lambda args: (tokenizer, types.SimpleNamespace(num_hidden_layers=2), run)
dump.main()
'''


class Run(Case):
    def setUp(self):
        super().setUp()
        (self.folder / 'text').write_text('word ' * 40)
        self.path.write_bytes(b'of the user')

    def command(self, *options, wait=0):
        return [sys.executable, '-c', PROGRAM.replace('WAIT', str(wait)), 'folder/model', 'text',
                '-o', self.path.name, '--tokens', '8', *options]

    def run_program(self, *command):
        return subprocess.run(command, cwd=self.folder, capture_output=True, text=True)

    def refused(self, pattern, *command):
        done = self.run_program(*command)
        self.assertEqual((done.returncode, done.stderr.count('\n')), (1, 1), done.stderr)
        self.assertRegex(done.stderr, r'\Akvmix-dump: error: ' + pattern)
        self.assertEqual((self.files(), self.path.read_bytes()),
                         (['dump.safetensors', 'text'], b'of the user'))

    def test_whole_run(self):
        done = self.run_program(*self.command('--prompts', '5'))
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        self.assertEqual(done.stdout.splitlines()[-1], 'dump.safetensors: 2 layers, 40 tokens, '
                         '2 KV heads and 4 query heads x 16, 0.0 MiB')
        tensors = read(self.path)
        self.assertEqual((tensors['']['model'], tensors['']['rope_theta']), ('model', '0'))
        for i in range(2):
            x = tensors[f'layers.{i}.v']
            np.testing.assert_array_equal(x[:, 1, 3], np.repeat(range(5), 8))

    def test_an_interrupted_run_leaves_what_was_there(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with subprocess.Popen(self.command('--prompts', '5', wait=2), cwd=self.folder,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
                self.assertEqual([run.stdout.readline() for _ in range(2)],
                                 ['prompt 1\n', 'prompt 2\n'])
                part, = self.folder.glob('dump.safetensors.*.part/*')
                self.assertGreater(part.stat().st_size, 0)
                self.assertEqual(self.path.read_bytes(), b'of the user')
                run.send_signal(number)
                _, said = run.communicate(timeout=60)
            self.assertEqual(run.returncode, 1)
            self.assertEqual(said, 'kvmix-dump: error: interrupted: dump.safetensors was not '
                             'written, nothing is left of this run\n')
            self.assertEqual((self.files(), self.path.read_bytes()),
                             (['dump.safetensors', 'text'], b'of the user'))

    def test_refusals(self):
        self.refused('the text has 40 tokens, .* take 48', *self.command('--prompts', '6'))
        self.refused('dump.safetensors: File too large', 'bash', '-c', 'ulimit -f 1; exec "$@"',
                     'bash', *self.command('--prompts', '5'))

    def test_without_torch(self):
        program = (f'import sys; sys.path.insert(0, {str(PACKAGE)!r}); sys.modules["torch"] = None;'
                   ' from kvmix_tools import dump; dump.main()')
        self.refused('.*torch.*: pip install torch transformers', sys.executable, '-c', program,
                     'model', 'text', '-o', self.path.name)

    def test_calls(self):
        for words, pattern in ((['-o', '.'], r'-o \.: expected a file'),
                               (['-o', 'no/file'], '-o no/file: expected a file'),
                               (['--skip', '-1'], '--skip -1'), (['--tokens', '0'], "'0'")):
            done = self.run_program(*self.command(*words))
            self.assertEqual(done.returncode, 2)
            self.assertRegex(done.stderr, pattern)
        module = [sys.executable, '-m', 'kvmix_tools.dump']
        for command in self.command(), module:
            done = subprocess.run([*command, '--help'], cwd=PACKAGE, capture_output=True, text=True)
            self.assertIn('\n  kvmix-dump Qwen/', done.stdout)


if __name__ == '__main__':
    unittest.main()
