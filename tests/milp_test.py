#!/usr/bin/env python3
"""kvmix-tune's choice on the sample's real errors against an independent solver: SciPy's MILP.
milp_test.py KVMIX-TUNE; without SciPy it is skipped (exit code 77)."""
import json
import subprocess
import sys
import unittest

import numpy as np

try:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, hstack, vstack
except ImportError:
    print('SKIPPED: milp_test needs SciPy (python3-scipy)')
    sys.exit(77)

TUNE = sys.argv.pop()


def tune(*arguments):
    done = subprocess.run([TUNE, '--json', '--explain', *arguments], check=True, text=True,
                          stdout=subprocess.PIPE)
    return json.loads(done.stdout)


class Pairs:
    """All pairs of a K and a V candidate of all KV heads, one after the other."""

    def __init__(self, heads):
        head, size, nmse = [], [], []
        for i, (k_head, v_head) in enumerate(zip(heads[::2], heads[1::2])):
            for k in k_head['candidates']:
                for v in v_head['candidates']:
                    head.append(i)
                    size.append(k['bytes_per_token'] + v['bytes_per_token'])
                    nmse.append(np.add(k['nmse'], v['nmse']))
        self.bytes, nmse = np.array(size, float), np.array(nmse)
        self.worst, self.sum = nmse.max(1), nmse.sum(1)
        self.one_each = csr_array((np.ones(len(head)), (head, range(len(head)))))

    def solve(self, cost, most_bytes, allowed, worst=False):
        """One allowed pair of every head. worst: the largest `cost` counts, and not the sum."""
        heads, pairs = self.one_each.shape
        scale = cost[cost > 0].min()
        rows = [LinearConstraint(hstack([self.one_each, csr_array((heads, 1))]), 1, 1),
                LinearConstraint(np.append(self.bytes, 0.0), -np.inf, most_bytes)]
        if worst:
            above = hstack([self.one_each.multiply(cost / scale), -np.ones((heads, 1))])
            rows.append(LinearConstraint(vstack([above]), -np.inf, 0))
        found = milp(np.append(np.zeros(pairs) if worst else cost / scale, float(worst)),
                     constraints=rows, integrality=np.append(np.ones(pairs), 0),
                     bounds=Bounds(0, np.append(allowed.astype(float), np.inf)),
                     options={'mip_rel_gap': 0})
        assert found.success, found.message
        taken = found.x[:-1] > 0.5
        return cost[taken].max() if worst else cost[taken].sum()


class Milp(unittest.TestCase):
    def test_worst_then_sum(self):
        for candidates, budget in (('int8', 0.2), ('int8', 0.45), ('all', 0.49), ('all', 0.7)):
            with self.subTest(candidates=candidates, budget=budget):
                report = tune('--budget', str(budget), '--candidates', candidates)
                pairs = Pairs(report['heads'])
                most_bytes = np.floor((1 - budget) * report['fp16_bytes_per_token'])
                worst = pairs.solve(pairs.worst, most_bytes, pairs.worst >= 0, worst=True)
                self.assertAlmostEqual(report['worst_limit'] / (1.25 * worst), 1, delta=1e-6)
                least = pairs.solve(pairs.sum, most_bytes,
                                    pairs.worst <= report['worst_limit'])
                queries = report['geometry']['layers'] * report['geometry']['query_heads']
                self.assertAlmostEqual(report['predicted']['mean_nmse'] * queries / least, 1,
                                       delta=1e-6)


if __name__ == '__main__':
    unittest.main()
