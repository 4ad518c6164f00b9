#!/usr/bin/env python3
"""Tests count_results.py: what it counts decides whether a run of all tests passes, so it may not
miss a failure."""
import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

PROGRAM = pathlib.Path(__file__).with_name('count_results.py')


def run(tests, reports=None):
    """Last line and exit code for tests {name: Meson's result} and GoogleTest reports {name: XML of
    the cases}."""
    with tempfile.TemporaryDirectory() as folder:
        build = pathlib.Path(folder)
        (build / 'meson-logs').mkdir()
        lines = [json.dumps({'name': n, 'result': r}) for n, r in tests.items()]
        (build / 'meson-logs' / 'testlog.json').write_text('\n'.join(lines))
        for name, cases in (reports or {}).items():
            (build / f'{name}.xml').write_text(
                f'<testsuites><testsuite>{cases}</testsuite></testsuites>')
        done = subprocess.run([sys.executable, PROGRAM, folder], capture_output=True, text=True)
        return done.stdout.splitlines()[-1], done.returncode


GOOD = '<testcase name="a" status="run" result="completed"/>'
BAD = '<testcase name="b" status="run"><failure message="x"/></testcase>'
SKIPPED = '<testcase name="c" status="run" result="skipped"><skipped/></testcase>'


class Count(unittest.TestCase):
    def test_sums_cases_and_plain_tests(self):
        self.assertEqual(run({'x': 'OK', 'y': 'OK'}, {'x': GOOD * 3 + SKIPPED}),
                         ('4 passed, 0 failed', 0))

    def test_failed_case(self):
        self.assertEqual(run({'x': 'FAIL', 'y': 'OK'}, {'x': GOOD + BAD * 2}),
                         ('2 passed, 2 failed', 1))

    def test_failed_plain_tests(self):
        for result in ('FAIL', 'TIMEOUT', 'ERROR', 'UNEXPECTEDPASS', 'INTERRUPT'):
            self.assertEqual(run({'y': result, 'z': 'OK'}), ('1 passed, 1 failed', 1), result)

    def test_crash_after_good_cases(self):
        self.assertEqual(run({'x': 'FAIL'}, {'x': GOOD}), ('1 passed, 1 failed', 1))

    def test_crash_without_report(self):
        self.assertEqual(run({'x': 'FAIL', 'y': 'OK'}), ('1 passed, 1 failed', 1))

    def test_nothing_ran(self):
        self.assertEqual(run({}), ('0 passed, 0 failed', 1))
        self.assertEqual(run({'x': 'SKIP'}), ('0 passed, 0 failed', 1))

    def test_no_log(self):
        done = subprocess.run([sys.executable, PROGRAM, '/nonexistent'], capture_output=True,
                              text=True)
        self.assertEqual((done.stdout, done.returncode), ('0 passed, 1 failed\n', 1))


if __name__ == '__main__':
    unittest.main()
