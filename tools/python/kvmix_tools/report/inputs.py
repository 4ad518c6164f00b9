"""Reads what kvmix-eval, kvmix-tune and kvmix-bench write. What a file is follows from its content; whatever is wrong with one is an
InputError of one line: the file, what was expected, what was found."""
import csv
import json
import math
import pathlib
import re
from dataclasses import dataclass, field

ATTENTION_COLUMNS = ['layer', 'head', 'nmse', 'cos_sim']
SIZE_COLUMNS = ['strategy', 'bytes_per_token', 'saved']
QUANT_COLUMNS = 10  # file, layer, k|v, tokens, head, head_dim, strategy, max|x|, sum of squared error, MSE; no header
PLAN_FORMAT, PLAN_MAJOR = 'kvmix-plan', 1
TUNE_FORMAT = 'kvmix-tune-1'

# Known by the end of a file's name (quant_c4_s1.csv, attention_plan.csv); also the order in which they are drawn.
LABELS = {'s1': 'strategy 1: int8, a scale per head', 's2': 'strategy 2: int8, a scale per token', 's3': 'strategy 3: outlier K heads in fp16', 'plan': 'the plan'}


class InputError(Exception):
    """One line that can be shown as it stands."""


@dataclass
class Table:
    """A CSV of errors: key is 's1' .. 'plan', or the file's stem; cells by (tensor, layer, head) or (layer, head)."""
    path: str
    key: str
    layers: int
    heads: int
    cells: dict

    @property
    def label(self):
        return LABELS.get(self.key, self.key)


@dataclass
class Inputs:
    quant: list = field(default_factory=list)      # Table; cells: MSE by ('k'|'v', layer, KV head)
    attention: list = field(default_factory=list)  # Table; cells: (NMSE, cosine) by (layer, query head | 'all')
    size: list = field(default_factory=list)       # rows of cells, the first one the header
    tune: dict = None
    plan: dict = None
    bench: dict = None


def number(text, path, line, column, at_least=None, cast=float):
    try:
        x = cast(text)
    except (TypeError, ValueError):
        raise InputError(f'{path}: line {line}, {column}: expected a number, found {text!r}') from None
    if not math.isfinite(x) or (at_least is not None and x < at_least):
        raise InputError(f'{path}: line {line}, {column}: expected a finite number{"" if at_least is None else f" of at least {at_least}"}, found {text!r}')
    return x


def key_of(path, fallback=None):
    end = re.split(r'[_.-]', pathlib.Path(path).stem)[-1]
    return end if end in LABELS else fallback or pathlib.Path(path).stem


def complete(path, cells, kinds, layers, heads, what):
    """Every layer and head is there."""
    expected = len(kinds) * layers * heads
    if len(cells) != expected:
        raise InputError(f'{path}: expected {expected} rows ({layers} layers x {heads} {what}{" x K and V" if len(kinds) == 2 and what == "KV heads" else ""}), found {len(cells)}')


def put(cells, key, value, path, line):
    if key in cells:
        raise InputError(f'{path}: line {line}: {" ".join(map(str, key))} is there twice')
    cells[key] = value


def read_quant(path, rows):
    cells, strategies = {}, set()
    for line, row in enumerate(rows, 1):
        if len(row) != QUANT_COLUMNS:
            raise InputError(f'{path}: line {line}: expected the {QUANT_COLUMNS} columns of kvmix-eval quant, found {len(row)}')
        layer, head, tokens, dim, strategy = (number(row[i], path, line, f'column {i + 1}', 0, int) for i in (1, 4, 3, 5, 6))
        if row[2] not in ('k', 'v'):
            raise InputError(f'{path}: line {line}, column 3: expected k or v, found {row[2]!r}')
        for i in (7, 9):
            number(row[i], path, line, f'column {i + 1}', 0)
        error = number(row[8], path, line, 'column 9', 0)  # the MSE beside it has six decimals only
        put(cells, (row[2], layer, head), error / max(tokens * dim, 1), path, line)
        strategies.add(strategy)
    if len(strategies) != 1:
        raise InputError(f'{path}: expected rows of one strategy, found {", ".join(map(str, sorted(strategies)))}')
    layers, heads = (max(key[i] for key in cells) + 1 for i in (1, 2))
    complete(path, cells, 'kv', layers, heads, 'KV heads')
    return Table(path, key_of(path, f's{strategies.pop()}'), layers, heads, cells)


def read_attention(path, rows):
    cells = {}
    for line, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            raise InputError(f'{path}: line {line}: expected {len(rows[0])} columns, found {len(row)}')
        layer = number(row[0], path, line, 'layer', 0, int)
        head = 'all' if row[1] == 'all' else number(row[1], path, line, 'head', 0, int)
        put(cells, (layer, head), (number(row[2], path, line, 'nmse', 0), number(row[3], path, line, 'cos_sim', -1.001)), path, line)
    if not cells:
        raise InputError(f'{path}: expected a row per layer and head, found none')
    layers, heads = max(key[0] for key in cells) + 1, max((key[1] for key in cells if key[1] != 'all'), default=-1) + 1
    complete(path, cells, '1', layers, heads + 1, 'rows: each query head, and all')
    return Table(path, key_of(path), layers, heads, cells)


def read_size(path, rows):
    if len(rows) < 2:
        raise InputError(f'{path}: expected a row per strategy, found none')
    for line, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            raise InputError(f'{path}: line {line}: expected {len(rows[0])} columns, found {len(row)}')
        for name, cell in zip(rows[0][1:], row[1:]):
            number(cell, path, line, name, 0)
    return rows


def need(path, value, keys):
    """value[k1][k2].. for each dotted key, all there and finite where they are numbers."""
    for dotted in keys:
        at = value
        for part in dotted.split('.'):
            if not isinstance(at, dict) or part not in at:
                raise InputError(f'{path}: expected "{dotted}", which is missing')
            at = at[part]


def shape(geometry):
    return '{layers} layers x {kv_heads} KV heads x {head_dim}, {query_heads} query heads'.format(**geometry)


GEOMETRY = tuple(f'geometry.{key}' for key in ('layers', 'kv_heads', 'query_heads', 'head_dim'))


def read_tune(path, value):
    if value['format'] != TUNE_FORMAT:
        raise InputError(f'{path}: expected format {TUNE_FORMAT}, found {value["format"]}: written by another version of kvmix-tune')
    fidelity = [f'{part}.{key}' for part in ('predicted', 'calibration') for key in ('worst_cosine', 'mean_cosine', 'worst_nmse', 'mean_nmse')]
    need(path, value, ['model', 'saved_fraction', 'bytes_per_token', 'fp16_heads', 'front', 'heads', 'holdout', 'decode_ns_per_token.plan', 'decode_ns_per_token.fp16', *GEOMETRY, *fidelity])
    if not value['front']:
        raise InputError(f'{path}: expected points of the Pareto front, found none')
    for point in value['front']:
        need(path, point, ['saved_fraction', 'predicted.worst_nmse', 'predicted.worst_cosine', 'decode_ns', 'fp16_tensors'])
    for head in value['heads']:
        need(path, head, ['layer', 'kv_head', 'tensor', 'codec'])
    return value


def read_plan(path, value):
    need(path, value, ['version', 'codecs', *GEOMETRY])
    version = value['version']
    if not isinstance(version, list) or not version or version[0] != PLAN_MAJOR:
        raise InputError(f'{path}: expected a plan of version {PLAN_MAJOR}, found {version}')
    g = value['geometry']
    if len(value['codecs']) != g['layers'] or any(len(layer) != g['kv_heads'] for layer in value['codecs']):
        raise InputError(f'{path}: expected codecs of {g["layers"]} layers x {g["kv_heads"]} KV heads, found other numbers')
    for layer in value['codecs']:
        for head in layer:
            need(path, head, ['k', 'v'])
    return value


def read_bench(path, value):
    runs = [b for b in value['benchmarks'] if 'limit_fraction' in b and b.get('aggregate_name', 'median') == 'median']
    if not runs:
        raise InputError(f'{path}: expected benchmarks with a "limit_fraction", as kvmix-bench writes them, found none')
    for run in runs:
        need(path, run, ['name', 'limit_fraction', 'real_time', 'time_unit'])
    return {'path': path, 'context': value.get('context', {}), 'runs': runs}


def refuse_constant(path):
    def refuse(text):
        raise InputError(f'{path}: expected finite numbers, found {text}')
    return refuse


def read_json(path, text, inputs):
    try:
        value = json.loads(text, parse_constant=refuse_constant(path))
    except json.JSONDecodeError as error:
        raise InputError(f'{path}: not JSON: {error}') from None
    if isinstance(value, dict) and isinstance(value.get('benchmarks'), list):
        inputs.bench = read_bench(path, value)
    elif isinstance(value, dict) and str(value.get('format', '')).startswith('kvmix-tune'):
        inputs.tune = {**read_tune(path, value), 'path': path}
    elif isinstance(value, dict) and value.get('format') == PLAN_FORMAT:
        inputs.plan = {**read_plan(path, value), 'path': path}
    else:
        raise InputError(f'{path}: expected a report of kvmix-tune --json, a plan or the JSON of kvmix-bench, found other JSON')


def read_csv(path, text, inputs):
    rows = [row for row in csv.reader(text.splitlines()) if row]
    if not rows:
        raise InputError(f'{path}: expected a table, found an empty file')
    header = rows[0]
    if header[:len(ATTENTION_COLUMNS)] == ATTENTION_COLUMNS:
        inputs.attention.append(read_attention(path, rows))
    elif header[:len(SIZE_COLUMNS)] == SIZE_COLUMNS:
        inputs.size = read_size(path, rows)
    elif header[0] == 'layer' or header[0] == 'strategy':
        expected = ATTENTION_COLUMNS if header[0] == 'layer' else SIZE_COLUMNS
        raise InputError(f'{path}: expected the columns {",".join(expected)}, found {",".join(header)}')
    else:
        inputs.quant.append(read_quant(path, rows))


def check_geometry(inputs):
    """All files are of one model; the first that says its shape is right."""
    known = inputs.tune or inputs.plan
    if not known:
        return
    g, of = known['geometry'], known['path']
    if inputs.plan and inputs.plan['geometry'] != g:
        raise InputError(f'{inputs.plan["path"]}: expected a plan for {shape(g)}, as {of} has, found {shape(inputs.plan["geometry"])}')
    for tables, heads, what in ((inputs.quant, g['kv_heads'], 'KV heads'), (inputs.attention, g['query_heads'], 'query heads')):
        for table in tables:
            if (table.layers, table.heads) != (g['layers'], heads):
                raise InputError(f'{table.path}: expected {g["layers"]} layers x {heads} {what}, as {of} has, found {table.layers} x {table.heads}')


def read(paths):
    inputs = Inputs()
    for path in map(str, paths):
        try:
            text = pathlib.Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f'{path}: {getattr(error, "strerror", None) or "not a text file"}') from None
        try:
            (read_json if text.lstrip()[:1] in ('{', '[') else read_csv)(path, text, inputs)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f'{path}: not as this version of kvmix writes it: {error!r}') from None
    check_geometry(inputs)
    order = list(LABELS)
    for tables in (inputs.quant, inputs.attention):
        tables.sort(key=lambda table: (order.index(table.key) if table.key in order else len(order), table.key))
        for table in tables:
            if (table.layers, table.heads) != (tables[0].layers, tables[0].heads):
                raise InputError(f'{table.path}: expected {tables[0].layers} layers x {tables[0].heads} heads, as {tables[0].path} has, found {table.layers} x {table.heads}')
    return inputs
