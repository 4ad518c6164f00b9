#!/usr/bin/env python3
"""Reads what the compiler has made of attention by tiles: amx_assembly_test.py LIBRARY.
Tiles belong to the caller of a function, so no call may stand between two of their instructions;
a spilled vector in a loop beside them costs the loads and stores that the tiles need. LIBRARY: the
kernels, of an optimized build; where they have no tiles the test is skipped (exit code 77)."""
import re
import subprocess
import sys
import unittest

LIBRARY = sys.argv.pop()
PRODUCT = re.compile(r'tdpb(us|su)d\b')
SPILL = re.compile(r'vmov\w+\s+%zmm\d+,[^(]*\(%r[sb]p\)')
MOST_SPILLS = 4  # outside of loops


def functions():
    """The instructions of every function that multiplies or configures tiles, by name."""
    text = subprocess.run(['objdump', '-d', '-C', '--no-show-raw-insn', LIBRARY], check=True,
                          text=True, stdout=subprocess.PIPE).stdout
    found = {}
    for part in re.split(r'\n(?=[0-9a-f]{8,} <.*>:\n)', text):
        head, *lines = part.split('\n')
        code = [line.split('\t', 1)[1].strip() for line in lines if '\t' in line]
        if any(PRODUCT.match(c) or c.startswith('ldtilecfg') for c in code):
            found[re.search(r'<(.*)>', head)[1]] = code
    return found


FUNCTIONS = functions()
if not FUNCTIONS:
    print('SKIPPED: these kernels have no tiles')
    sys.exit(77)


class Assembly(unittest.TestCase):
    def test_there_are_products_to_look_at(self):
        for name in ('Score', 'WeightSteps', 'Finish'):
            self.assertTrue(any(name in f for f in FUNCTIONS), name)

    def test_no_call_among_products(self):
        for name, code in FUNCTIONS.items():
            if any(PRODUCT.match(c) for c in code):
                self.assertEqual([c for c in code if c.startswith('call')], [], name)

    def test_vectors_stay_in_registers(self):
        for name, code in FUNCTIONS.items():
            if any(PRODUCT.match(c) for c in code):
                self.assertLessEqual(len([c for c in code if SPILL.match(c)]), MOST_SPILLS, name)

    def test_configured_and_released_once(self):
        for name, code in FUNCTIONS.items():
            configured = [c for c in code if c.startswith('ldtilecfg')]
            released = [c for c in code if c.startswith('tilerelease')]
            self.assertEqual(len(configured), len(released), name)
            self.assertLessEqual(len(configured), 1, name)


if __name__ == '__main__':
    unittest.main()
