#!/usr/bin/env python3
"""Tests the parts of kvmix-dump that need neither torch nor a model. kvmix_dump_test.py [KVMIX-TUNE]: the program must read the file."""
import json
import pathlib
import struct
import subprocess
import sys
import tempfile
import unittest

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'tools/python'))
from kvmix_tools import dump as dump_kv  # noqa: E402

TUNE = pathlib.Path(sys.argv.pop()).resolve() if len(sys.argv) > 1 else None


def layer(seed, tokens=8, heads=2, query_heads=6, dim=16):
    random = np.random.default_rng(seed)
    return [random.standard_normal((h, tokens, dim), np.float32) for h in (query_heads, heads, heads)]


class Prompts(unittest.TestCase):
    def test_cuts_with_the_prefix(self):
        self.assertEqual(dump_kv.cut_prompts(list(range(10)), [99], 4, 2, skip=1), [[99, 1, 2, 3], [99, 4, 5, 6]])

    def test_takes_all_of_the_text_and_no_more(self):
        self.assertEqual(dump_kv.cut_prompts(list(range(6)), [], 3, 2), [[0, 1, 2], [3, 4, 5]])
        with self.assertRaisesRegex(dump_kv.DumpError, '6 tokens.*take 7'):
            dump_kv.cut_prompts(list(range(6)), [], 3, 2, skip=1)

    def test_refuses_prompts_of_nothing_but_prefix(self):
        with self.assertRaisesRegex(dump_kv.DumpError, '--tokens 1'):
            dump_kv.cut_prompts(list(range(6)), [99], 1, 1)


class Record(unittest.TestCase):
    def test_joins_prompts_with_tokens_first(self):
        recorder, first, second = dump_kv.Recorder(), layer(1), layer(2, tokens=5)
        recorder.add(0, *first, 0.25)
        recorder.add(0, *second, 0.25)
        tensors = recorder.tensors()
        self.assertEqual(list(tensors), ['layers.0.k', 'layers.0.v', 'layers.0.q'])
        self.assertEqual(tensors['layers.0.q'].shape, (13, 6, 16))
        for name, i in (('q', 0), ('k', 1), ('v', 2)):
            self.assertEqual(tensors[f'layers.0.{name}'][3, 1, 7], np.float16(first[i][1, 3, 7]))
            self.assertEqual(tensors[f'layers.0.{name}'][8 + 4, 0, 2], np.float16(second[i][0, 4, 2]))

    def refused(self, pattern, *calls, finish=False):
        recorder = dump_kv.Recorder()
        with self.assertRaisesRegex(dump_kv.DumpError, pattern):
            for call in calls:
                recorder.add(*call)
            if finish:
                recorder.tensors()

    def test_refuses_what_a_dump_cannot_say(self):
        q, k, v = layer(1)
        self.refused('window of 7 tokens', (0, q, k, v, 0.25, 7))
        self.refused('grouped-query', (0, q[:5], k, v, 0.25))
        self.refused('grouped-query', (0, q, k, v[:1], 0.25))
        self.refused('attention scale 0.5, others 0.25', (0, q, k, v, 0.25), (1, q, k, v, 0.5))
        self.refused('layer 3: k has values beyond fp16', (3, q, k * np.float32(1e6), v, 0.25))
        self.refused(r'layers \[0, 2\]', (0, q, k, v, 0.25), (2, q, k, v, 0.25), finish=True)
        self.refused(r'layers \[\]', finish=True)
        self.refused('one shape', (0, q, k, v, 0.25), (1, *layer(1, heads=3), 0.25), finish=True)

    def test_a_window_as_long_as_the_prompt_is_fine(self):
        dump_kv.Recorder().add(0, *layer(1), 0.25, 8)


class File(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = pathlib.Path(self.folder.name) / 'dump.safetensors'
        recorder = dump_kv.Recorder()
        for i in range(2):
            recorder.add(i, *layer(i), 0.25)
            recorder.add(i, *layer(i + 2), 0.25)
        self.tensors = recorder.tensors()
        self.meta = dump_kv.metadata(self.tensors, 'model', 'corpus', [8, 8], 1e6, 0.25)
        dump_kv.write_safetensors(self.path, self.tensors, self.meta)

    def test_layout(self):
        raw = self.path.read_bytes()
        length = struct.unpack('<Q', raw[:8])[0]
        self.assertEqual(length % 8, 0)
        header, data, at = json.loads(raw[8:8 + length]), raw[8 + length:], 0
        self.assertEqual(header.pop('__metadata__'), {
            'format': 'kvmix-dump-1', 'model': 'model', 'corpus': 'corpus', 'layers': '2', 'tokens': '16', 'prompt_tokens': '8,8', 'kv_heads': '2',
            'query_heads': '6', 'head_dim': '16', 'rope_theta': '1000000', 'attention_scale': '0.25'})
        for name, entry in header.items():
            start, end = entry['data_offsets']
            self.assertEqual((start, entry['dtype']), (at, 'F16'))
            np.testing.assert_array_equal(np.frombuffer(data[start:end], '<f2').reshape(entry['shape']), self.tensors[name])
            at = end
        self.assertEqual(at, len(data))
        self.assertEqual([p.name for p in self.path.parent.iterdir()], ['dump.safetensors'])

    def test_a_failed_write_leaves_the_old_file(self):
        before = self.path.read_bytes()
        with self.assertRaises(AttributeError):
            dump_kv.write_safetensors(self.path, {**self.tensors, 'layers.9.k': None}, self.meta)
        self.assertEqual(self.path.read_bytes(), before)

    @unittest.skipUnless(TUNE, 'no kvmix-tune given')
    def test_kvmix_tune_reads_it(self):
        done = subprocess.run([str(TUNE), str(self.path), '--budget', '0.3', '--json'], cwd=self.folder.name, capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertGreaterEqual(json.loads(done.stdout)['saved_fraction'], 0.3)


if __name__ == '__main__':
    unittest.main()
