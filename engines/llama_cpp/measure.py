#!/usr/bin/env python3
"""Speed and accuracy of llama.cpp with kvmix and without, by llama.cpp's own programs.

    export LLAMA_BIN=/path/to/llama.cpp/build/bin GGML_KVMIX=/path/libggml-kvmix.so
    measure.py speed model.gguf --plan plan.json --depths 0,1024,4096 --turns 2 -o speed.jsonl
    measure.py kl model-f32.gguf --plan plan.json --text wiki.txt -o kl.jsonl
    measure.py table speed.jsonl kl.jsonl            # of one run or of many
    measure.py draw speed.jsonl kl.jsonl -o folder   # speed.svg, kl.svg

speed runs llama-bench, each setting once a turn and the order turned around from turn to turn. kl
runs llama-perplexity --kl-divergence against f16 without flash attention; with a model in f32 it
shows the cache and little else. Settings: the engine's caches f16 (flash attention on and off),
q8_0, q4_0, and kvmix, with the plan and without.
"""
import argparse
import csv
import io
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

FLASH = 'f16, flash attention'
SETTINGS = {  # arguments of the engine; the part of f16's bytes that is saved
    FLASH: (['-fa', '1'], 0.0),
    'f16': (['-fa', '0'], 0.0),
    'q8_0': (['-fa', '1', '-ctk', 'q8_0', '-ctv', 'q8_0'], 1 - 34 / 64),
    'q4_0': (['-fa', '1', '-ctk', 'q4_0', '-ctv', 'q4_0'], 1 - 18 / 64),
    'kvmix': (['-fa', '1'], None),
    'kvmix, no plan': (['-fa', '1'], None),
}


def need(variable):
    if variable not in os.environ:
        sys.exit(f'measure.py: error: {variable} is not set; --help says what it is')
    return os.environ[variable]


def run(program, setting, arguments, plan):
    """What a program writes."""
    env = dict(os.environ)
    if setting.startswith('kvmix'):
        env['GGML_BACKEND_PATH'] = need('GGML_KVMIX')
        if setting == 'kvmix':
            env['KVMIX_PLAN'] = plan
        if program == 'llama-perplexity':  # for builds that load nothing by themselves
            arguments = [*arguments, '-dev', 'KVMIX']
    command = [str(pathlib.Path(need('LLAMA_BIN')) / program), *SETTINGS[setting][0], *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f'measure.py: error: {" ".join(command)} failed:\n{done.stderr[-2000:]}')
    return done.stdout + done.stderr if program == 'llama-perplexity' else done.stdout


def saved(setting, plan):
    if setting == 'kvmix':
        return json.loads(pathlib.Path(plan).read_text())['saved_fraction']
    return SETTINGS[setting][1]


def chosen(args):
    names = args.settings.split(';') if args.settings else list(SETTINGS)
    if args.command == 'kl':
        names = [n for n in names if n != 'f16']  # what the others are compared with
    unknown = [n for n in names if n not in SETTINGS]
    if unknown:
        sys.exit(f'measure.py: error: no setting {unknown[0]!r}; there are {list(SETTINGS)}')
    return [n for n in names if n != 'kvmix' or args.plan]


def speed(args, write):
    names = chosen(args)
    for turn in range(args.turns):
        for name in names if turn % 2 == 0 else reversed(names):
            text = run('llama-bench', name, [
                '-m', args.model, '-o', 'csv', '-r', '1', '-t', str(args.threads),
                '-d', args.depths, '-p', str(args.prefill), '-n', str(args.decode)], args.plan)
            for row in csv.DictReader(io.StringIO(text)):
                write({'what': 'prefill' if row['n_prompt'] != '0' else 'decode', 'setting': name,
                       'depth': int(row['n_depth']), 'threads': args.threads,
                       'tokens_per_second': float(row['avg_ts'])})


def kl(args, write):
    numbers = {'kl': r'^Mean +KLD: +(\S+)', 'kl_99.9': r'^99\.9% +KLD: +(\S+)',
               'same_top': r'^Same top p: +(\S+)', 'perplexity': r'^Mean PPL\(Q\) +: +(\S+)'}
    with tempfile.TemporaryDirectory() as folder:
        common = ['-m', args.model, '-f', args.text, '-c', '512', '-b', '512', '--chunks',
                  str(args.chunks), '--kl-divergence-base', f'{folder}/base']
        run('llama-perplexity', 'f16', common, None)
        for name in chosen(args):
            text = run('llama-perplexity', name, [*common, '--kl-divergence'], args.plan)
            found = {key: re.search(pattern, text, re.M) for key, pattern in numbers.items()}
            write({'what': 'kl', 'setting': name, 'saved': saved(name, args.plan),
                   **{key: float(m.group(1)) for key, m in found.items() if m}})


def read(files):
    return [json.loads(line) for f in files for line in pathlib.Path(f).read_text().splitlines()]


def medians(records):
    """{(model, what, threads): {setting: {depth: tokens a second}}}"""
    found = {}
    for r in records:
        if r['what'] != 'kl':
            found.setdefault((r['model'], r['what'], r['threads']), {}).setdefault(
                r['setting'], {}).setdefault(r['depth'], []).append(r['tokens_per_second'])
    return {key: {name: {d: statistics.median(x) for d, x in depths.items()}
                  for name, depths in settings.items()} for key, settings in found.items()}


def table(args):
    records = read(args.files)
    for (model, what, threads), settings in medians(records).items():
        depths = sorted({d for found in settings.values() for d in found})
        print(f'\n{what} of {model}, {threads} threads, tokens a second at depth')
        print(f'  {"":24}' + ''.join(f'{d:>8}' for d in depths))
        for name, found in settings.items():
            print(f'  {name:24}' + ''.join(
                f'{found[d]:8.1f}' if d in found else f'{"":8}' for d in depths))
    models = dict.fromkeys(r['model'] for r in records if r['what'] == 'kl')
    for model in models:
        print(f'\n{model:24}  {"saved":>6} {"KL":>9} {"99.9 %":>9} {"same top":>9} '
              f'{"perplexity":>11}')
        for r in records:
            if r['what'] == 'kl' and r['model'] == model:
                part = '' if r['saved'] is None else f'{100 * r["saved"]:.1f} %'
                print(f'  {r["setting"]:22}  {part:>6} {r["kl"]:9.2e} {r["kl_99.9"]:9.2e} '
                      f'{r["same_top"]:7.1f} % {r["perplexity"]:11.3f}')


def draw(args):
    import matplotlib
    matplotlib.use('svg')
    matplotlib.rcParams['svg.hashsalt'] = 'kvmix'
    from matplotlib import pyplot
    records = read(args.files)
    decode = {k: v for k, v in medians(records).items() if k[1:] == ('decode', args.threads)}
    models = dict.fromkeys(r['model'] for r in records if r['what'] == 'kl')
    colours = dict(zip(SETTINGS, ('C7', 'C0', 'C2', 'C4', 'C3', 'C1')))
    for name, panels in (('speed', decode), ('kl', models)):
        if not panels:
            continue
        figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4),
                                       squeeze=False)
        for axis, key in zip(axes[0], panels):
            if name == 'speed':
                for setting, found in panels[key].items():
                    axis.plot(*zip(*sorted(found.items())), 'o-', label=setting, ms=3,
                              color=colours[setting])
                axis.set(title=key[0], xlabel='tokens in the cache', ylim=(0, None))
                axis.set_ylabel('decode, tokens a second')
            else:
                for r in records:
                    if r['what'] == 'kl' and r['model'] == key and r['saved'] is not None:
                        axis.plot(100 * (1 - r['saved']), r['kl'], 'o', label=r['setting'],
                                  color=colours[r['setting']])
                axis.set(title=key, xlabel='bytes of the cache, % of f16', yscale='log',
                         ylabel='KL against f16', xlim=(0, 105))
        handles = {h.get_label(): h for a in axes[0] for h in a.get_lines()}
        figure.legend(handles.values(), handles.keys(), loc='lower center', frameon=False,
                      ncols=len(handles) if len(panels) > 1 else 2)
        figure.tight_layout(rect=(0, 0.09, 1, 1))
        figure.savefig(pathlib.Path(args.output) / f'{name}.svg', metadata={'Date': None})


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for name in ('speed', 'kl'):
        p = commands.add_parser(name)
        p.add_argument('model')
        p.add_argument('--plan')
        p.add_argument('--settings', help='some of them, parted by ;')
        p.add_argument('-o', '--output', required=True, help='records are added to this file')
        if name == 'speed':
            p.add_argument('--depths', default='0,1024,4096')
            p.add_argument('--threads', type=int, default=2)
            p.add_argument('--turns', type=int, default=2)
            p.add_argument('--prefill', type=int, default=512)
            p.add_argument('--decode', type=int, default=32)
        else:
            p.add_argument('--text', required=True)
            p.add_argument('--chunks', type=int, default=4)
    for name in ('table', 'draw'):
        p = commands.add_parser(name)
        p.add_argument('files', nargs='+')
        if name == 'draw':
            p.add_argument('-o', '--output', default='.')
            p.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    if args.command in ('table', 'draw'):
        return {'table': table, 'draw': draw}[args.command](args)

    def write(record):
        record = {'model': pathlib.Path(args.model).stem, **record}
        print(json.dumps(record), flush=True)
        with open(args.output, 'a') as out:
            out.write(json.dumps(record) + '\n')

    return {'speed': speed, 'kl': kl}[args.command](args, write)


if __name__ == '__main__':
    main()
