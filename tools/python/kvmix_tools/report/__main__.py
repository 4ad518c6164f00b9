"""Makes a page of what kvmix-eval, kvmix-tune and kvmix-bench found.

  kvmix-report --sample                               tunes and measures the built-in sample
  kvmix-report --dump DUMP [--holdout DUMP]           the same for a dump
  kvmix-report quant_s1.csv plan.json -o plan.html    from files

Files are known by what is in them: CSVs of kvmix-eval quant, attention and size, kvmix-tune --json,
plans, and the JSON of kvmix-bench. Names that end in s1, s2, s3 or plan label the lines. Pictures
also go to --images FOLDER as PNG and SVG.
"""
import argparse
import pathlib
import sys
import tempfile

from .. import InputError, written_whole


def arguments():
    p = argparse.ArgumentParser('kvmix-report', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('files', nargs='*', metavar='FILE', help='CSV or JSON of the other programs')
    p.add_argument('-o', '--output', default='report.html', type=pathlib.Path,
                   help='the page (default: %(default)s)')
    p.add_argument('--images', metavar='FOLDER', help='write every chart as PNG and SVG too')
    p.add_argument('--title', default='kvmix report')
    p.add_argument('--keep', metavar='FOLDER',
                   help='keep what the programs wrote, to name as a FILE')
    run = p.add_argument_group('running the programs')
    run.add_argument('--sample', action='store_true', help='on the built-in sample')
    run.add_argument('--dump', help='on this dump (safetensors)')
    run.add_argument('--holdout', help='dump to measure on')
    run.add_argument('--plan', help='this plan, instead of one tuned on the dump')
    run.add_argument('--budget', default='0.45', help='of a tuned plan (default: %(default)s)')
    run.add_argument('--candidates', help='codecs that the tuner may choose from')
    run.add_argument('--bench', action='store_true', help='time the kernels as well (a minute)')
    run.add_argument('--bin', metavar='FOLDER',
                     help='where the programs are (default: beside this one, then the PATH)')
    args = p.parse_args()
    if args.sample and (args.dump or args.holdout):
        p.error('--sample goes without --dump and --holdout')
    if not (args.files or args.sample or args.dump):
        p.error('nothing to report: name files, or give --sample or --dump')
    return args


def report(args):
    try:
        from . import charts, collect, inputs, page
    except ImportError as error:
        raise InputError(f'needs matplotlib ({error}): install it with "apt-get install '
                         'python3-matplotlib" or "pip install matplotlib"') from None
    if args.output.is_dir() or not args.output.absolute().parent.is_dir():
        raise InputError(f'{args.output}: expected a file in a folder that exists')
    with tempfile.TemporaryDirectory() as scratch:
        files, folder = args.files, pathlib.Path(args.keep or scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if args.sample or args.dump:
            files += collect.collect(args, folder)
        found = inputs.read(files)
    drawn = charts.draw_all(found)
    with written_whole(args.output) as file:
        file.write(page.page(found, drawn, args.title).encode())
    if args.images:
        charts.save(drawn, pathlib.Path(args.images))
    print(f'report written to {args.output}')


def main():
    args = arguments()
    try:
        report(args)
    except (InputError, OSError) as error:
        sys.exit(f'kvmix-report: error: {" ".join(str(error).split())}')
    except KeyboardInterrupt:
        sys.exit(1)


if __name__ == '__main__':
    main()
