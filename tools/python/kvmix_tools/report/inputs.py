"""Reads what kvmix-eval, kvmix-tune and kvmix-bench write. What a file is follows from its content;
whatever is wrong with one is an InputError: the file, what was expected, what was found."""
import csv
import functools
import itertools
import json
import math
import operator
import pathlib
import re
from dataclasses import dataclass, field

import numpy as np

from .. import InputError

# How the tables of kvmix-eval attention and kvmix-eval size begin.
HEADERS = {row[0]: row for row in (['layer', 'head', 'nmse', 'cos_sim'],
                                   ['strategy', 'bytes_per_token', 'saved'])}
# No header. The MSE has six decimals only: it is worked out anew from the sum.
QUANT_COLUMNS = ('file', 'layer', 'k|v', 'tokens', 'head', 'head_dim', 'strategy', 'max|x|',
                 'sum of squared error', 'MSE')
PLAN_FORMAT, PLAN_MAJOR = 'kvmix-plan', 1
TUNE_FORMAT = 'kvmix-tune-1'

# Known by the end of a file's name (quant_c4_s1.csv, attention_plan.csv), and drawn in this order.
LABELS = {
    's1': 'strategy 1: int8, a scale per head', 's2': 'strategy 2: int8, a scale per token',
    's3': 'strategy 3: outlier K heads in fp16', 'plan': 'the plan'}


@dataclass
class Table:
    """A CSV of errors. key: 's1' .. 'plan', or the file's stem. cells: MSE [K|V, layer, KV head],
    or [NMSE|cosine, layer, 0: all query heads | 1 + query head]; NaN where a layer has no such
    head. missing: what is wrong with that, unless layers differ."""
    path: str
    key: str
    heads: int
    cells: np.ndarray
    missing: str

    @property
    def label(self):
        return LABELS.get(self.key, self.key)

    @property
    def place(self):
        """In the order of LABELS, which others come after."""
        return [*LABELS, self.key].index(self.key)

    @property
    def layers(self):
        return self.cells.shape[1]


@dataclass
class Inputs:
    quant: list = field(default_factory=list)      # Table
    attention: list = field(default_factory=list)  # Table
    size: list = field(default_factory=list)       # rows of cells, the first one the header
    tune: dict = None
    plan: dict = None
    bench: list = None                             # the runs of kvmix-bench


def expect(good, wanted, found, where=''):
    if not good:
        raise InputError(f'{where and f"{where}: "}expected {wanted}, found {found}')


def number(text, where, at_least, cast=float):
    try:
        x = cast(text)
    except ValueError:
        x = math.nan
    kind = 'whole' if cast is int else 'finite'
    expect(at_least <= x < math.inf, f'a {kind} number of at least {at_least}', repr(text), where)
    return x


def key_of(path, fallback=None):
    end = re.split(r'[_.-]', pathlib.Path(path).stem)[-1]
    return end if end in LABELS else fallback or pathlib.Path(path).stem


def array(entries, least, what):
    """Entries (line, index, value) as an array, NaN where there is none, and what is wrong if any
    is missing; `least` is its smallest shape."""
    cells = {}
    for line, index, value in entries:
        if index in cells:
            raise InputError(f'line {line}: its layer and head are there twice')
        cells[index] = value
    shape = [max(n - 1, *indices) + 1 for n, indices in zip(least, zip(*cells))]
    rows, none = math.prod(shape), np.full_like(next(iter(cells.values()), 0), np.nan, float)
    missing = '' if len(cells) == rows else (
        f'expected {rows} rows ({" x ".join(map(str, shape))}: {what}), found {len(cells)}')
    filled = [cells.get(index, none) for index in np.ndindex(*shape)]
    return np.array(filled).reshape(*shape, -1), missing


def numbered(rows, first, columns, source):
    """(line, row) from the row `first` on, each with the columns of `source`."""
    for line, row in enumerate(rows[first - 1:], first):
        expect(len(row) == len(columns), f'the {len(columns)} columns of {source}', len(row),
               f'line {line}')
        yield line, row


def read_quant(path, rows):
    cells, strategies = [], set()
    for line, row in numbered(rows, 1, QUANT_COLUMNS, 'kvmix-eval quant'):
        layer, tokens, head, dim, strategy, _, error, _ = (
            number(row[i], f'line {line}, column {i + 1}', 0, int if i < 7 else float)
            for i in (1, 3, 4, 5, 6, 7, 8, 9))
        expect(row[2] in ('k', 'v'), 'k or v', repr(row[2]), f'line {line}, column 3')
        cells.append((line, ('kv'.index(row[2]), layer, head), error / max(tokens * dim, 1)))
        strategies.add(strategy)
    expect(len(strategies) == 1, 'rows of one strategy', ', '.join(map(str, sorted(strategies))))
    errors, missing = array(cells, (2, 1, 1), 'K and V, layers, KV heads')
    return Table(path, key_of(path, f's{strategies.pop()}'), errors.shape[2], errors[..., 0],
                 missing)


def read_attention(path, rows):
    cells = []
    for line, row in numbered(rows, 2, rows[0], 'the header'):
        layer = number(row[0], f'line {line}, layer', 0, int)
        head = 0 if row[1] == 'all' else 1 + number(row[1], f'line {line}, head', 0, int)
        errors = (number(row[2], f'line {line}, nmse', 0),
                  number(row[3], f'line {line}, cos_sim', -1.001))
        cells.append((line, (layer, head), errors))
    errors, missing = array(cells, (1, 2), 'layers, all and each query head')
    return Table(path, key_of(path), errors.shape[1] - 1, np.moveaxis(errors, 2, 0), missing)


def read_size(rows):
    for line, row in numbered(rows, 2, rows[0], 'the header'):
        for name, cell in zip(rows[0][1:], row[1:]):
            number(cell, f'line {line}, {name}', 0)
    return rows


def need(values, *keys):
    """value[k1][k2].. is there in each value for each key 'k1.k2'."""
    for value, dotted in itertools.product(values, keys):
        try:
            functools.reduce(operator.getitem, dotted.split('.'), value)
        except (KeyError, TypeError):
            raise InputError(f'expected "{dotted}", which is missing') from None


def shape(value):
    if 'layers' in value:
        kv, queries = value['by_layer'].values()
        return (f'{len(kv)} layers that differ, {sum(kv)} KV heads of their own, {sum(queries)} '
                'query heads')
    return ('{layers} layers x {kv_heads} KV heads x {head_dim}, {query_heads} query heads'
            .format(**value['geometry']))


def by_layer(value):
    """How many KV heads of its own and query heads each layer of a plan or a report has."""
    if 'layers' not in value:
        need([value], *(f'geometry.{key}'
                        for key in ('layers', 'kv_heads', 'query_heads', 'head_dim')))
        g = value['geometry']
        return {what: [g[what.lower().replace(' ', '_')]] * g['layers']
                for what in ('KV heads', 'query heads')}
    layers = [layer or {'kv_heads': 0, 'query_heads': 0} for layer in value['layers']]
    need(layers, 'kv_heads', 'query_heads')
    return {'KV heads': [0 if 'kv_layer' in layer else layer['kv_heads'] for layer in layers],
            'query heads': [layer['query_heads'] for layer in layers]}


FIDELITY = [f'{part}.{which}_{error}' for part in ('predicted', 'calibration')
            for which in ('worst', 'mean') for error in ('cosine', 'nmse')]


def read_tune(value):
    expect(value['format'] == TUNE_FORMAT, f'format {TUNE_FORMAT}',
           f'{value["format"]}: written by another version of kvmix-tune')
    need([value], 'model', 'saved_fraction', 'bytes_per_token', 'fp16_heads', 'front', 'heads',
         'holdout', 'decode_ns_per_token.plan', 'decode_ns_per_token.fp16', *FIDELITY)
    expect(value['front'], 'points of the Pareto front', 'none')
    need(value['front'], 'saved_fraction', 'predicted.worst_nmse', 'predicted.worst_cosine',
         'predicted.mean_nmse', 'decode_ns', 'fp16_tensors')
    need(value['heads'], 'layer', 'kv_head', 'tensor', 'codec')
    cells = {(x['tensor'], x['kv_head'], x['layer']): x['codec'] for x in value['heads']}
    return {**value, 'cells': cells, 'by_layer': by_layer(value)}


def read_plan(value):
    need([value], 'version', 'codecs')
    version, codecs = value['version'], value['codecs']
    expect(isinstance(version, list) and version[:1] == [PLAN_MAJOR],
           f'a plan of version {PLAN_MAJOR}', version)
    value = {**value, 'by_layer': by_layer(value)}
    expect([len(layer or ()) for layer in codecs] == value['by_layer']['KV heads'],
           f'codecs of {shape(value)}', 'other numbers')
    need(itertools.chain(*filter(None, codecs)), 'k', 'v')
    cells = {(x, i, layer): head[x] for layer, heads in enumerate(codecs)
             for i, head in enumerate(heads or ()) for x in 'kv'}
    return {**value, 'cells': cells}


def read_bench(value):
    runs = [b for b in value['benchmarks']
            if 'limit_fraction' in b and b.get('aggregate_name', 'median') == 'median']
    expect(runs, 'benchmarks with a "limit_fraction", as kvmix-bench writes them', 'none')
    need(runs, 'name', 'limit_fraction', 'real_time', 'time_unit')
    return runs


def read_json(path, text, inputs):
    value = json.loads(text, parse_constant=functools.partial(expect, False, 'finite numbers'))
    known = value if isinstance(value, dict) else {}
    if isinstance(known.get('benchmarks'), list):
        inputs.bench = read_bench(value)
    elif str(known.get('format')).startswith('kvmix-tune'):
        inputs.tune = {**read_tune(value), 'path': path}
    elif known.get('format') == PLAN_FORMAT:
        inputs.plan = {**read_plan(value), 'path': path}
    else:
        raise InputError('expected a report of kvmix-tune --json, a plan or the JSON of '
                         'kvmix-bench, found other JSON')


def read_csv(path, text, inputs):
    rows = [row for row in csv.reader(text.splitlines()) if row]
    expect(rows, 'a table', 'an empty file')
    header = rows[0]
    expected = HEADERS.get(header[0], [])
    expect(header[:len(expected)] == expected, f'the columns {",".join(expected)}',
           ','.join(header))
    expect(not expected or len(rows) > 1, 'rows below the header', 'none')
    if header[0] == 'layer':
        inputs.attention.append(read_attention(path, rows))
    elif header[0] == 'strategy':
        inputs.size = read_size(rows)
    else:
        inputs.quant.append(read_quant(path, rows))


def check_shapes(inputs):
    """All files are of one model; the first that says its shape is right."""
    plan, known = inputs.plan, inputs.tune or inputs.plan
    if plan:
        expect([plan.get(key) for key in ('geometry', 'layers')] ==
               [known.get(key) for key in ('geometry', 'layers')],
               f'a plan for {shape(known)}, as {known["path"]} has', shape(plan), plan['path'])
    for tables, what in ((inputs.quant, 'KV heads'), (inputs.attention, 'query heads')):
        for table in tables:
            layers, heads, path = tables[0].layers, tables[0].heads, tables[0].path
            if known and 'layers' in known:
                check_heads(table, known['by_layer'][what], f'{what}, as {known["path"]} has')
                continue
            if table.missing:
                raise InputError(f'{table.path}: {table.missing}')
            if known:
                by_layer, path = known['by_layer'][what], known['path']
                layers, heads = len(by_layer), by_layer[0]
            expect((table.layers, table.heads) == (layers, heads),
                   f'{layers} layers x {heads} {what}, as {path} has',
                   f'{table.layers} x {table.heads}', table.path)


def check_heads(table, by_layer, what):
    """The table has rows for the heads of every layer, which may differ, and no others."""
    extra = table.cells.shape[2] - table.heads  # the column of all heads together
    size = (max(len(by_layer), table.layers), max(*by_layer, table.heads) + extra)
    wanted, found = np.zeros(size, bool), np.zeros((len(table.cells), *size), bool)
    for layer, heads in enumerate(by_layer):
        wanted[layer, :heads + extra * (heads > 0)] = True
    found[:, :table.layers, :table.heads + extra] = ~np.isnan(table.cells)
    for layer in np.flatnonzero((found != wanted).any(axis=(0, 2))):
        expect(False, f'{wanted[layer, extra:].sum()} {what}',
               found[:, layer, extra:].sum(axis=1).max(), f'{table.path}: layer {layer}')


def read(paths):
    inputs = Inputs()
    for path in map(str, paths):
        try:
            text = pathlib.Path(path).read_text()
            (read_json if text.lstrip()[:1] in ('{', '[') else read_csv)(path, text, inputs)
        except InputError as error:
            raise InputError(f'{path}: {error}') from None
        except OSError as error:
            raise InputError(f'{path}: {error.strerror}') from None
        except UnicodeDecodeError:
            raise InputError(f'{path}: not a text file') from None
        except json.JSONDecodeError as error:
            raise InputError(f'{path}: not JSON: {error}') from None
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f'{path}: not as this version of kvmix writes it: {error!r}') from None
    for tables in (inputs.quant, inputs.attention):
        tables.sort(key=lambda table: (table.place, table.key))
    check_shapes(inputs)
    return inputs
