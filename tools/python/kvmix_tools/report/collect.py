"""Runs the C++ programs on a dump and leaves their output in a folder: the inputs of a report."""
import os
import pathlib
import shutil
import subprocess
import sys

from .. import InputError, progress

BENCH_FILTER = 'attend_decode/.*/q14kv2d64/4k/t1$|attend_prefill/.*/q14kv2d64/.*4k/t1$'


def find(name, folder):
    """kvmix-eval and its like: in `folder`; without one, beside this program or on the PATH."""
    beside = folder or pathlib.Path(sys.argv[0]).resolve().parent
    folders = [beside, f'{beside}/../bench', *([] if folder else os.get_exec_path())]
    found = shutil.which(name, path=os.pathsep.join(map(str, folders)))
    if not found:
        where = beside if folder else f'{beside} or on the PATH'
        raise InputError(f'{name}: expected it in {where}: build it, or name its folder with --bin')
    return found


def collect(args, folder):
    """What `args` (of the command line) ask for. Errors are measured on the holdout where there is
    one, else on the dump. Returns the paths of all files."""
    files = []

    def run(output, name, *arguments):
        """Standard output goes to the file `output`."""
        progress(f'{output}: {name} {arguments[0]}')
        done = subprocess.run([find(name, args.bin), *map(str, arguments)], capture_output=True,
                              text=True)
        progress('')
        if done.returncode != 0:
            said = done.stderr.strip() or f'{name} ended with {done.returncode}'
            raise InputError(said.splitlines()[-1])
        (folder / output).write_text(done.stdout)
        files.append(folder / output)

    def options(*names):
        """Those of these options that were given, as the other programs take them."""
        given = {name: getattr(args, name) for name in names}
        return [f'--{name}={value}' for name, value in given.items() if value]

    dump = [args.dump] if args.dump else []  # without one, the programs take the sample
    plan = args.plan
    if not plan:
        plan = folder / 'plan.json'
        run('tune.json', 'kvmix-tune', *dump, *options('holdout', 'budget', 'candidates'),
            '--json', '-o', plan)
    files.append(plan)
    measured = [args.holdout] if args.holdout else dump
    for end, codecs in (('s1', ('--strategy', 1)), ('s2', ('--strategy', 2)),
                        ('plan', ('--plan', plan))):
        for what in ('quant', 'attention'):
            run(f'{what}_{end}.csv', 'kvmix-eval', what, *measured, *codecs)
    run('size.csv', 'kvmix-eval', 'size', '--plan', plan, '--tokens', '4096,32768')
    if args.bench:
        run('bench.json', 'kvmix-bench', f'--benchmark_filter={BENCH_FILTER}',
            '--benchmark_format=json')
    return files
