#!/usr/bin/env python3
"""kvmix-tune export: plans by hand, in the words of other engines.
export_test.py KVMIX-TUNE"""
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

TUNE = pathlib.Path(sys.argv.pop()).resolve()
K, V = 'i8-token-bf16+hadamard', 'i4-token-bf16+hadamard'


class Export(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def plan(self, layers, dim=64, **more):
        """layers: [(codec of K, codec of V), one per KV head] of each layer."""
        def codec(name, tensor):
            steps = name.split('+')[1:]
            return {tensor: name,
                    **({f'{tensor}_mean': [0.5] * dim} if 'centre' in steps else {}),
                    **({f'{tensor}_factor': [2.0] * dim} if 'fold' in steps else {})}
        path = self.folder / 'plan.json'
        path.write_text(json.dumps({
            'format': 'kvmix-plan', 'version': [1, 3], **more,
            'geometry': {'layers': len(layers), 'kv_heads': len(layers[0]),
                         'query_heads': 2 * len(layers[0]), 'head_dim': dim},
            'codecs': [[{**codec(k, 'k'), **codec(v, 'v')} for k, v in heads]
                       for heads in layers]}))

    def run_tune(self, *arguments):
        return subprocess.run([TUNE, 'export', *arguments], cwd=self.folder, text=True,
                              capture_output=True)

    def export(self, engine):
        done = self.run_tune('plan.json', '--to', engine, '--json')
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        return json.loads(done.stdout)

    def text(self, engine):
        return self.export(engine)['text']

    def test_llama_cpp_takes_the_worst_need_of_all(self):
        self.plan([[(V, V), (V, V)], [(V, V), (K, V)], [(V, V), (V, V)]])
        found = self.export('llama.cpp')
        self.assertEqual(found['text'], '--cache-type-k q8_0 --cache-type-v q4_0\n')
        self.assertAlmostEqual(found['saved_fraction'], 1 - (8.5 + 4.5) / 32)
        self.assertGreater(found['plan_saved_fraction'], found['saved_fraction'])
        self.assertIn('All layers have one type: 2 of 3 layers need less than this for K, 0 of 3 '
                      'layers need less than this for V.', found['notes'])
        self.assertNotIn('WARNING', ' '.join(found['notes']))
        self.plan([[('i6-token-bf16+hadamard', 'f16')]])  # no type of six bits
        self.assertEqual(self.text('llama.cpp'), '--cache-type-k q8_0 --cache-type-v f16\n')

    def test_ik_llama_cpp_sets_the_first_and_last_layers_apart(self):
        six = 'i6-token-bf16+hadamard'
        self.plan([[(K, V)], [(K, V)], [(V, V)], [(V, V)], [(V, V)], [(V, V)], [(six, V)]])
        found = self.export('ik_llama.cpp')
        self.assertEqual(found['text'], '-ctk q4_0 -ctk-first q8_0,2 -ctk-last q6_0,1 -khad '
                                        '-ctv q4_0 -vhad\n')
        bits = (2 * 8.5 + 4 * 4.5 + 6.5 + 7 * 4.5) / 7
        self.assertAlmostEqual(found['saved_fraction'], 1 - bits / 32)
        self.plan([[(K, V)]] * 3)  # alike: nothing apart
        self.assertEqual(self.text('ik_llama.cpp'), '-ctk q8_0 -khad -ctv q4_0 -vhad\n')
        self.plan([[('i8-token', 'f16')], [('f16', 'f16')], [('i8-token', 'f16')]])
        self.assertEqual(self.text('ik_llama.cpp'),  # not rotated; f16 is in the middle
                         '-ctk f16 -ctk-first q8_0,1 -ctk-last q8_0,1 -ctv f16\n')

    def test_openvino_has_one_precision_for_all_layers(self):
        self.plan([[(V, V), (V, V)], [(V, V), (K, V)], [(V, V), (V, V)]])
        found = self.export('openvino')
        self.assertEqual(json.loads(found['text']), {
            'KEY_CACHE_PRECISION': 'u8', 'KEY_CACHE_GROUP_SIZE': 64,
            'VALUE_CACHE_PRECISION': 'u4', 'VALUE_CACHE_GROUP_SIZE': 64})
        self.assertAlmostEqual(found['saved_fraction'], 1 - (9 + 5) / 32)  # 64 bits a group
        notes = ' '.join(found['notes'])
        self.assertIn('All layers have one precision, no property names one layer: 2 of 3 layers '
                      'need less than this for K, 0 of 3 layers need less than this for V.', notes)
        self.assertRegex(notes, 'WARNING: .* openvino does not rotate')
        self.assertNotIn('u4 for values only', notes)
        self.plan([[('i3-token-bf16+hadamard', 'i6-token-bf16')]], dim=48)
        found = self.export('openvino')
        self.assertEqual(json.loads(found['text']), {
            'KEY_CACHE_PRECISION': 'u4', 'KEY_CACHE_GROUP_SIZE': 48,
            'VALUE_CACHE_PRECISION': 'u8', 'VALUE_CACHE_GROUP_SIZE': 48})
        self.assertIn('u4 for values only', ' '.join(found['notes']))
        self.assertNotIn('multiple of 32', ' '.join(found['notes']))
        self.plan([[('f16', V)], [('f16', 'f16')]])
        found = self.export('openvino')
        self.assertEqual(json.loads(found['text']), {'KEY_CACHE_PRECISION': 'f16',
                                                     'VALUE_CACHE_PRECISION': 'f16'})
        self.assertEqual(found['saved_fraction'], 0)

    def test_openvino_groups_fit_heads_of_every_width(self):
        wide, narrow = ({'kv_heads': 1, 'query_heads': 2, 'k_dim': k, 'v_dim': 128}
                        for k in (192, 128))
        self.plan([[(K, V)]])
        plan = json.loads((self.folder / 'plan.json').read_text())
        del plan['geometry']
        plan.update(version=[1, 3], layers=[wide, narrow], codecs=[[{'k': K, 'v': V}]] * 2)
        (self.folder / 'plan.json').write_text(json.dumps(plan))
        found = self.export('openvino')
        self.assertEqual(json.loads(found['text']), {
            'KEY_CACHE_PRECISION': 'u8', 'KEY_CACHE_GROUP_SIZE': 64,
            'VALUE_CACHE_PRECISION': 'u4', 'VALUE_CACHE_GROUP_SIZE': 128})
        bits = (192 + 128) * 9 + 2 * 128 * 4.5
        self.assertAlmostEqual(found['saved_fraction'], 1 - bits / (16 * (192 + 128 + 2 * 128)))

    def test_model_optimizer_names_a_format_per_layer(self):
        self.plan([[(K, K)], [(V, V)], [(K, V)], [(V, K)], [('f16', V)]])
        found = self.export('model-optimizer')
        self.assertEqual(json.loads(found['text'])['quantization'], {
            'kv_cache_quant_algo': 'MIXED_PRECISION', 'kv_cache_schema_version': 1,
            'kv_cache_quantized_layers': {
                f'model.layers.{layer}.self_attn': {'quant_algo': algorithm}
                for layer, algorithm in enumerate(('FP8', 'NVFP4', 'FP8_K_NVFP4_V', 'FP8'))}})
        bits = (16 + 9 + 12.5 + 16 + 32) / 5
        self.assertAlmostEqual(found['saved_fraction'], 1 - bits / 32)
        self.assertRegex(' '.join(found['notes']), 'WARNING: .* does not rotate')
        self.plan([[(V, V)], [('f16', 'f16')]])
        quantization = json.loads(self.text('model-optimizer'))['quantization']
        self.assertEqual(quantization['kv_cache_quant_algo'], 'NVFP4')
        self.assertEqual(list(quantization['kv_cache_quantized_layers']),
                         ['model.layers.0.self_attn'])
        self.plan([[('f16', 'f16')]])
        self.assertEqual(json.loads(self.text('model-optimizer'))['quantization'],
                         {'kv_cache_quant_algo': None})

    def test_what_is_lost_is_said(self):
        self.plan([[('i4-token-bf16+centre+fold+hadamard', V), (V, V)]], exact_first=4)
        for engine in ('llama.cpp', 'ik_llama.cpp', 'openvino', 'model-optimizer'):
            notes = self.export(engine)['notes']
            self.assertRegex(notes[0], f'WARNING: 1 of 2 K heads are centred .* {engine} does not '
                                       'centre. .*Qwen2')
            self.assertIn(f'1 of 4 K and V are folded in the plan, and not in {engine}.', notes)
            self.assertIn(f'The plan keeps the first 4 tokens in f16, {engine} does not.', notes)

    def test_blocks_of_32(self):
        self.plan([[(K, V)]], dim=48)
        found = self.export('llama.cpp')
        self.assertEqual(found['text'], '--cache-type-k f16 --cache-type-v f16\n')
        self.assertIn('no multiple of 32', ' '.join(found['notes']))
        self.assertEqual(found['saved_fraction'], 0)

    def test_file_and_text(self):
        self.plan([[('i8-token-bf16+centre', V)]])
        done = self.run_tune('plan.json', '--to', 'llama.cpp')
        self.assertRegex(done.stdout, r'\A--cache-type-k q8_0 --cache-type-v q4_0\n\n'
                                      r'What llama.cpp has not:\n - ')
        self.assertLessEqual(max(map(len, done.stdout.splitlines())), 100)
        done = self.run_tune('plan.json', '--to', 'llama.cpp', '-o', 'flags')
        self.assertTrue(done.stdout.startswith('What llama.cpp has not:'))
        self.assertEqual((self.folder / 'flags').read_text(),
                         '--cache-type-k q8_0 --cache-type-v q4_0\n')

    def test_refusals(self):
        self.plan([[(K, V)]])
        for words, arguments in (('--to', ('plan.json',)), ('vllm', ('plan.json', '--to', 'vllm')),
                                 ('none.json', ('none.json', '--to', 'llama.cpp')),
                                 ('nowhere', ('plan.json', '--to', 'llama.cpp', '-o',
                                              '/nowhere/flags'))):
            done = self.run_tune(*arguments)
            self.assertEqual((done.returncode, done.stdout, done.stderr.count('\n')), (1, '', 1))
            self.assertRegex(done.stderr, rf'\Akvmix-tune.*: error: .*{words}')


if __name__ == '__main__':
    unittest.main()
