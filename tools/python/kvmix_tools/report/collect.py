"""Runs the C++ programs on a dump and leaves their output in a folder: the inputs of a report."""
import os
import pathlib
import shutil
import subprocess
import sys

from .inputs import InputError

BENCH_FILTER = 'attend_decode/.*/q14kv2d64/4k/t1$|attend_prefill/.*/q14kv2d64/.*4k/t1$'


class Programs:
    """kvmix-eval and its like: in `folder`, beside this program, or on the path."""

    def __init__(self, folder, beside):
        self.folders = [pathlib.Path(folder)] if folder else [pathlib.Path(beside)]
        self.on_path = not folder
        self.progress = sys.stderr.isatty()

    def find(self, name):
        for folder in self.folders:
            for path in (folder / name, folder / '..' / 'bench' / name):
                if path.is_file() and os.access(path, os.X_OK):
                    return str(path)
        found = self.on_path and shutil.which(name)
        if not found:
            raise InputError(f'{name}: expected it in {self.folders[0]}{" or on the PATH" if self.on_path else ""}: build it, or name its folder with --bin')
        return found

    def run(self, output, name, *arguments):
        """Standard output goes to the file `output`."""
        command = [self.find(name), *map(str, arguments)]
        if self.progress:
            print(f'\r\033[K{output.name}: {name} {arguments[0]}', end='', file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if self.progress:
            print('\r\033[K', end='', file=sys.stderr, flush=True)
        if done.returncode != 0:
            raise InputError((done.stderr.strip() or f'{name} ended with {done.returncode}').splitlines()[-1])
        output.write_text(done.stdout)
        return output


def collect(programs, folder, dump, holdout, tune_arguments, plan, with_bench, raw):
    """dump None: the built-in sample. plan None: tuned on the dump, by `tune_arguments`. Errors are measured on the holdout where there
    is one, else on the dump. Returns the paths of all files."""
    files = []
    if plan is None:
        plan = folder / 'plan.json'
        aims = [*(['--holdout', holdout] if holdout else []), *raw, *tune_arguments]
        files.append(programs.run(folder / 'tune.json', 'kvmix-tune', *([dump] if dump else []), *aims, '--json', '-o', plan))
    files.append(pathlib.Path(plan))
    measured = [x for x in (holdout or dump,) if x]  # without one, kvmix-eval takes the sample's held-out text
    for strategy in (1, 2):
        files.append(programs.run(folder / f'quant_s{strategy}.csv', 'kvmix-eval', 'quant', *measured, *raw, '--strategy', strategy))
        files.append(programs.run(folder / f'attention_s{strategy}.csv', 'kvmix-eval', 'attention', *measured, *raw, '--strategy', strategy))
    files.append(programs.run(folder / 'quant_plan.csv', 'kvmix-eval', 'quant', *measured, *raw, '--plan', plan))
    files.append(programs.run(folder / 'attention_plan.csv', 'kvmix-eval', 'attention', *measured, *raw, '--plan', plan))
    files.append(programs.run(folder / 'size.csv', 'kvmix-eval', 'size', '--plan', plan, '--tokens', '4096,32768'))
    if with_bench:
        files.append(programs.run(folder / 'bench.json', 'kvmix-bench', f'--benchmark_filter={BENCH_FILTER}', '--benchmark_format=json'))
    return files
