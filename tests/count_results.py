#!/usr/bin/env python3
"""Counts the tests of the last `meson test` run in a build folder and prints the sum: `N passed, N
failed`.

count_results.py BUILD

Reads Meson's own log, meson-logs/testlog.json (one JSON object per line and test), and for
GoogleTest programs their reports, BUILD/<test>.xml, so that every test case counts. A program that
fails without a failed case (a crash, a timeout, a leak) counts as one failure. Exit code 1 if
anything failed or nothing ran.
"""
import json
import pathlib
import sys
import xml.etree.ElementTree as xml

GOOD = ('OK', 'EXPECTEDFAIL')


def count_cases(report):
    """[passed, failed, skipped] of a GoogleTest XML report."""
    counts = [0, 0, 0]
    for case in xml.parse(report).iter('testcase'):
        if case.find('failure') is not None:
            counts[1] += 1
        elif (case.find('skipped') is not None or case.get('status') == 'notrun'
              or case.get('result') == 'skipped'):
            counts[2] += 1
        else:
            counts[0] += 1
    return counts


def count(build):
    """[passed, failed, skipped] over all tests of the last run."""
    total = [0, 0, 0]
    for line in (build / 'meson-logs' / 'testlog.json').read_text().splitlines():
        test = json.loads(line)
        name = test['name'].split(':')[-1].split(' / ')[-1]
        report = build / f'{name}.xml'
        good, skipped = test['result'] in GOOD, test['result'] == 'SKIP'
        failed = not (good or skipped)
        if report.exists():
            counts = count_cases(report)
            if failed and not counts[1]:
                counts[1] = 1
        else:
            counts = [int(good), int(failed), int(skipped)]
        total = [a + b for a, b in zip(total, counts)]
    return total


def main():
    build = pathlib.Path(sys.argv[1])
    try:
        passed, failed, skipped = count(build)
    except (OSError, ValueError, xml.ParseError) as error:
        print(f'count_results.py: no readable test results under {build}: {error}', file=sys.stderr)
        passed, failed, skipped = 0, 1, 0
    if skipped:
        print(f'{skipped} skipped')
    print(f'{passed} passed, {failed} failed')
    return 1 if failed or not passed else 0


if __name__ == '__main__':
    sys.exit(main())
