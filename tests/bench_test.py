#!/usr/bin/env python3
"""kvmix-bench from outside: names, counters, labels, Google Benchmark's flags, its own, errors.

bench_test.py KVMIX_BENCH
"""
import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

PROGRAM = sys.argv.pop(1) if len(sys.argv) > 1 else 'kvmix-bench'
CODEC = (r'(f16|i8-token|i8-head|i8-token\+hadamard|i8-token-bf16|i8x8-token|i[643]-token-bf16|'
         r'i[84]-token-bf16(\+own-centre)?\+hadamard)')
SHAPE = r'q\d+kv\d+d\d+(x\d+)?'
NAME = re.compile(rf'attend_decode/\w+/k={CODEC},v={CODEC}/{SHAPE}/(512|4k|8k|32k|128k)/t[12]|'
                  rf'attend_prefill/\w+/k={CODEC},v={CODEC}/{SHAPE}/512x(512|4k)/t[12]|'
                  rf'(quantize_token|quantize_head|dequantize_f32|dequantize_f16)/\w+/{SHAPE}/'
                  rf'(24k|128k|256m)/t1|store/\w+/{SHAPE}/1/t1|'
                  rf'append(|_rotated|_i4|_shaped|_newest)/\w+/{SHAPE}/(1|64)/t1|'
                  rf'(fork|shift)/\w+/{SHAPE}/4k/t1|'
                  rf'attend_batch/\w+/k={CODEC},v={CODEC}/{SHAPE}/(16x2k|64x4k\+64)/t[12]')
# Small and hot, one of each kind.
TINY = (r'(attend_decode/.*k=i8-token,v=i8-token/q14kv2d64/512|quantize_token/.*/q14kv2d64/24k|'
        r'append/.*/q14kv2d64/1)/t1$')


def bench(*args):
    return subprocess.run([PROGRAM, *args], capture_output=True, text=True, timeout=300)


def names(*args):
    return bench('--benchmark_list_tests', *args).stdout.split()


class BenchTest(unittest.TestCase):
    def check_entry(self, entry):
        self.assertGreater(entry['real_time'], 0)
        self.assertGreater(entry['bytes_per_second'], 1e6)
        self.assertTrue(0 < entry['limit_fraction'] < 100, entry)
        self.assertRegex(entry['label'], r'^(l1|l2|l3|dram)-(read|copy) [\d.]+ GB/s|'
                         r'^[\w/-]+ \d+ Gmac/s|^row-copy$')
        self.assertNotIn('median_seconds', entry)

    def test_names(self):
        listed = names()
        self.assertEqual([n for n in listed if not NAME.fullmatch(n)], [])
        self.assertEqual(len(set(listed)), len(listed))
        for shape in ('q14kv2d64', 'q12kv2d128', 'q32kv8d128', 'q4kv1d256', 'q32kv32d128',
                      'q10kv2d80', 'q24kv4d256', 'q8kv1d512', 'q16kv16d192x128'):
            for rest in ('k=f16,v=f16/{}/4k/t1', 'k=i8-token,v=i8-token/{}/128k/t2',
                         'k=i8-head,v=i8-token/{}/512x4k/t1'):
                end = rest.format(shape)
                self.assertEqual(len([n for n in listed if n.endswith(end)]), 1, end)
        self.assertTrue(any(n.endswith('k=i8-token,v=i8-token/q32kv32d128/8k/t1') for n in listed))
        quick = names('--quick')
        self.assertTrue(quick and set(quick) < set(listed))

    def test_json(self):
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / 'out.json'
            done = bench('--quick', f'--benchmark_filter={TINY}', '--benchmark_format=json',
                         f'--benchmark_out={out}')
            self.assertEqual((done.returncode, done.stderr), (0, ''))
            parsed = json.loads(done.stdout)
            entries = parsed['benchmarks']
            self.assertEqual(json.loads(out.read_text())['benchmarks'], entries)
        self.assertEqual(len(entries), 3)
        for entry in entries:
            self.assertEqual(entry['name'], entry['run_name'])
            self.assertTrue(NAME.fullmatch(entry['name']), entry['name'])
            self.assertEqual(entry['name'].split('/')[1], parsed['context']['target'])
            self.check_entry(entry)
        decode = entries[0]
        # The rates are those of the time that is reported: 14 x 64 x 512 x 2 multiply-adds, and 272
        # bytes per token, q and the output.
        self.assertEqual(decode['time_unit'], 'ns')
        seconds = decode['real_time'] * 1e-9
        for rate, amount in (('mac_per_second', 917504),
                             ('bytes_per_second', 512 * 272 + 14 * 64 * 6)):
            self.assertTrue(math.isclose(decode[rate] * seconds, amount, rel_tol=1e-6), rate)

    def test_repetitions(self):
        done = bench('--quick', '--benchmark_filter=append/.*/q14kv2d64/1/t1$',
                     '--benchmark_format=json', '--benchmark_repetitions=3')
        entries = json.loads(done.stdout)['benchmarks']
        single = sorted(e['real_time'] for e in entries if e['run_type'] == 'iteration')
        median = [e for e in entries if e.get('aggregate_name') == 'median']
        self.assertEqual(len(single), 3)
        self.assertTrue(math.isclose(median[0]['real_time'], single[1], rel_tol=1e-9))
        self.check_entry(median[0])

    def test_table(self):
        done = bench('--quick', f'--benchmark_filter={TINY}')
        self.assertEqual((done.returncode, done.stderr), (0, ''))
        lines = done.stdout.splitlines()[1:]  # the first names the CPU
        self.assertLessEqual(max(map(len, lines)), 100)
        self.assertRegex(done.stdout, r'\n  k=i8-token,v=i8-token/q14kv2d64/512/t1 +[\d.]+ us '
                         r'+[\d.]+ +[\d.]+ +\d+ %  \S+ ')

    def test_target(self):
        found = re.search(r'--target NAME .*time: ([^(]*)', bench('--help').stdout)
        targets = found[1].strip().split(', ')
        for target in targets:
            listed = names('--target', target)
            self.assertTrue(listed and all(n.split('/')[1] == target for n in listed))
        self.assertEqual(names()[0].split('/')[1], targets[0])

    def test_errors(self):
        for args, words in (
                (['--target', 'AVX9'], 'AVX9'), (['--fast'], '--fast'),
                (['--benchmark_filter=nothing/at/all'], 'nothing/at/all'),
                (['--quick=maybe'], 'quick'), (['--benchmark_format=xml'], 'xml')):
            done = bench(*args)
            self.assertEqual(done.returncode, 1, args)
            self.assertRegex(done.stderr, rf'\Akvmix-bench: error: .*{words}.*\n\Z')


if __name__ == '__main__':
    unittest.main()
