"""The pictures. Each function returns a Chart (or None where the inputs do not hold what it shows); save() writes it as PNG and SVG."""
import io
import math
import re
import statistics
from dataclasses import dataclass, field

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .inputs import LABELS
from . import theme

WIDTH = 4.3  # inches; small, so that a phone need not shrink the letters much
COLOURMAP = 'cividis'

plt.rcParams.update({
    'font.size': 9.5, 'axes.titlesize': 10, 'axes.titleweight': 'bold', 'legend.fontsize': 8.5, 'legend.frameon': False, 'svg.fonttype': 'none',
    'figure.facecolor': theme.LIGHT['paper'], 'axes.facecolor': theme.LIGHT['paper'], 'savefig.facecolor': theme.LIGHT['paper'],
    'text.color': theme.LIGHT['ink'], 'axes.labelcolor': theme.LIGHT['ink'], 'axes.titlecolor': theme.LIGHT['ink'], 'axes.edgecolor': theme.LIGHT['muted'],
    'xtick.color': theme.LIGHT['muted'], 'ytick.color': theme.LIGHT['muted'], 'xtick.labelcolor': theme.LIGHT['ink'], 'ytick.labelcolor': theme.LIGHT['ink'],
    'grid.color': theme.LIGHT['grid'], 'grid.linewidth': 0.7, 'axes.axisbelow': True, 'axes.spines.top': False, 'axes.spines.right': False,
    'figure.constrained_layout.use': True,
})

# codec: (colour, letters in a cell, what it is)
CODECS = {
    'f16': ('#e69f00', 'F', 'fp16'),
    'i8-head': ('#f0e442', 'h', 'int8, a scale per head'),
    'i8-token': ('#56b4e9', 't', 'int8, a scale per token'),
    'i8-token-bf16': ('#cc79a7', 'b', 'int8, a bf16 scale per token'),
    'i8-head+centre': ('#b8ad10', 'hc', 'int8, a scale per head, centred'),
    'i8-token+centre': ('#1fa37d', 'tc', 'int8, a scale per token, centred'),
    'i8-token-bf16+centre': ('#c3cbd4', 'bc', 'int8, a bf16 scale per token, centred'),
}
OTHER_CODECS = ('#999999', '#bbbbbb', '#dddddd')


@dataclass
class Chart:
    name: str     # of its files
    title: str
    caption: str  # what to see in it
    alt: str      # what it shows, for those who cannot see it
    figure: object
    header: list = field(default_factory=list)  # of the table beneath
    rows: list = field(default_factory=list)


def plain(x, _=None):
    """1e-05 as 1e-5, 0.01 as it is."""
    return f'{x:g}'.replace('e-0', 'e-')


def log_axis(axis):
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(numticks=7, subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def legend_room(figure, entries):
    """Keeps the axes off a legend of so many lines at the bottom (Matplotlib does so itself from 3.7 on, Debian 12 has 3.6)."""
    share = (0.19 * entries + 0.08) / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, share, 1, 1 - share))


def lines(title_top, title_bottom, y_label, tables, top, bottom):
    """Two panels of one line per table over the layers; top and bottom: table -> values, of which those that are 0 are left out."""
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 4.6), sharex=True)
    for ax, title, values in ((axes[0], title_top, top), (axes[1], title_bottom, bottom)):
        for i, table in enumerate(tables):
            y = [v if v > 0 else math.nan for v in values(table)]
            ax.plot(range(table.layers), y, label=table.label, **theme.series(table, i), markersize=3.5 if table.layers <= 40 else 2)
        ax.set_yscale('log')
        log_axis(ax.yaxis)
        ax.set_title(title, loc='left')
        ax.set_ylabel(y_label)
        ax.grid(True)
    axes[1].set_xlabel('layer')
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*axes[0].get_legend_handles_labels(), loc='lower left', ncol=1)
    legend_room(figure, len(tables))
    return figure


def names(tables):
    return '; '.join(table.label for table in tables)


def mse_per_layer(inputs):
    if not inputs.quant:
        return None
    tables = inputs.quant

    def mean(tensor):
        return lambda t: [sum(t.cells[tensor, layer, h] for h in range(t.heads)) / t.heads for layer in range(t.layers)]
    figure = lines('Keys', 'Values', 'MSE', tables, mean('k'), mean('v'))
    rows = [[layer] + [f'{mean(x)(t)[layer]:.3e}' for t in tables for x in 'kv'] for layer in range(tables[0].layers)]
    return Chart('mse_per_layer', 'Quantization error per layer',
                 'Mean squared error of K and V, averaged over the KV heads; the axis is logarithmic. A layer whose heads are all in fp16 has none and no point.',
                 f'Line charts of the mean squared error of keys and of values over {tables[0].layers} layers for: {names(tables)}. The table beneath has the numbers.',
                 figure, ['layer'] + [f'{x.upper()}, {t.label}' for t in tables for x in 'kv'], rows)


def cells_of(ax, values, layers, heads, **style):
    mesh = ax.pcolormesh([x - 0.5 for x in range(layers + 1)], [y - 0.5 for y in range(heads + 1)], values, edgecolors=theme.LIGHT['paper'], linewidth=0.6, **style)
    ax.set_ylim(heads - 0.5, -0.5)
    ax.set_yticks(range(0, heads, max(1, heads // 8)))
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return mesh


def heatmap(inputs):
    if not inputs.quant:
        return None
    tables = inputs.quant
    panels = [(t, x) for t in tables for x in 'kv']
    values = [v for t in tables for v in t.cells.values() if v > 0]
    if not values:
        return None
    colours = plt.get_cmap(COLOURMAP).copy()
    colours.set_bad(theme.LIGHT['grid'])
    norm = LogNorm(min(values), max(values) if max(values) > min(values) else min(values) * 10)
    heads, layers = tables[0].heads, tables[0].layers
    figure, axes = plt.subplots(len(panels), 1, figsize=(WIDTH, 0.8 + len(panels) * (0.42 + 0.16 * heads)), sharex=True)
    for ax, (table, tensor) in zip(axes, panels):
        grid = [[table.cells[tensor, layer, h] or math.nan for layer in range(layers)] for h in range(heads)]
        mesh = cells_of(ax, grid, layers, heads, cmap=colours, norm=norm)
        for layer in range(layers if layers <= 40 else 0):
            for h in range(heads):
                if math.isnan(grid[h][layer]):
                    ax.text(layer, h, 'F', ha='center', va='center', fontsize=6.5 if layers <= 24 else 5.2)
        ax.set_title(f'{tensor.upper()}, {table.label}', loc='left', fontsize=9)
        ax.set_ylabel('head')
    axes[-1].set_xlabel('layer')
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(mesh, ax=axes, aspect=40, pad=0.02, label='MSE (lighter is worse; F: fp16)')
    bar.outline.set_visible(False)
    log_axis(bar.ax.yaxis)
    worst = sorted(((v, key, t) for t in tables for key, v in t.cells.items()), key=lambda x: -x[0])[0]
    rows = [[layer, h] + [f'{t.cells[x, layer, h]:.3e}' for t in tables for x in 'kv'] for layer in range(layers) for h in range(heads)]
    median = {x: statistics.median(v for key, v in tables[0].cells.items() if key[0] == x) for x in 'kv'}
    return Chart('error_heatmap', 'Error of every KV head', f'One cell per layer and KV head, one colour scale for all. The median K head has an MSE of {median["k"]:.1e}, the median V head of {median["v"]:.1e} ({tables[0].label}).',
                 f'Heat maps of the mean squared error by layer and KV head, for K and V under: {names(tables)}. The largest error is {worst[0]:.2e}, {worst[1][0].upper()} of layer {worst[1][1]}, head {worst[1][2]}, {worst[2].label}.',
                 figure, ['layer', 'KV head'] + [f'{x.upper()}, {t.label}' for t in tables for x in 'kv'], rows)


def attention_per_layer(inputs):
    if not inputs.attention:
        return None
    tables = inputs.attention

    def heads(t, layer, i):
        return [t.cells[layer, h][i] for h in range(t.heads)]
    figure = lines('All query heads together', 'The worst query head', 'NMSE of the output', tables, lambda t: [t.cells[layer, 'all'][0] for layer in range(t.layers)],
                   lambda t: [max(heads(t, layer, 0)) for layer in range(t.layers)])
    rows = [[layer] + [cell for t in tables for cell in (f'{t.cells[layer, "all"][0]:.2e}', f'{t.cells[layer, "all"][1]:.6f}', f'{min(heads(t, layer, 1)):.6f}')] for layer in range(tables[0].layers)]
    worst = [(min((c[1], key) for key, c in t.cells.items() if key[1] != 'all'), t) for t in tables]
    text = '; '.join(f'{t.label}: {cosine:.5f} (layer {key[0]}, head {key[1]})' for (cosine, key), t in worst)
    return Chart('attention_per_layer', 'What attention makes of it', f'Attention outputs against those of exact K and V, causal within each prompt. Cosine of the worst single query head: {text}.',
                 f'Line charts of the normalised error of attention outputs over {tables[0].layers} layers, logarithmic, for: {names(tables)}. Worst cosines: {text}.',
                 figure, ['layer'] + [f'{what}, {t.label}' for t in tables for what in ('NMSE', 'cosine', 'worst head\'s cosine')], rows)


def pareto(inputs):
    if not inputs.tune:
        return None
    front = inputs.tune['front']
    x, y, ms = [100 * p['saved_fraction'] for p in front], [p['predicted']['worst_nmse'] for p in front], [p['decode_ns'] / 1e6 for p in front]
    figure, ax = plt.subplots(figsize=(WIDTH, 3.5))
    seen = [i for i in range(len(front)) if y[i] > 0]  # fp16 has no error, and no place on a logarithmic axis
    ax.plot([x[i] for i in seen], [y[i] for i in seen], color=theme.LIGHT['muted'], linewidth=0.8, zorder=1)
    points = ax.scatter([x[i] for i in seen], [y[i] for i in seen], c=[ms[i] for i in seen], cmap=COLOURMAP, s=26, edgecolors=theme.LIGHT['ink'], linewidths=0.5, zorder=2)
    chosen = inputs.tune
    ax.plot(100 * chosen['saved_fraction'], chosen['predicted']['worst_nmse'], '*', markersize=15, markerfacecolor='none', markeredgecolor=theme.LIGHT['series0'], markeredgewidth=1.6, label='the plan, predicted', zorder=3)
    holdout = chosen['holdout']
    if holdout:
        ax.plot(100 * chosen['saved_fraction'], holdout['worst_nmse'], 'P', markersize=8, markerfacecolor='none', markeredgecolor=theme.LIGHT['series0'], markeredgewidth=1.4, label='the plan, measured on held-out text', zorder=3)
    ax.set_yscale('log')
    log_axis(ax.yaxis)
    ax.set_xlabel('KV bytes saved, %')
    ax.set_ylabel('NMSE of the worst query head')
    ax.grid(True)
    ax.legend(loc='upper left')
    bar = figure.colorbar(points, ax=ax, pad=0.02, label='decode, ms per token')
    bar.outline.set_visible(False)
    rows = [[f'{a:.2f} %', f'{p["predicted"]["worst_cosine"]:.6f}', f'{b:.2e}', f'{c:.3f}', p['fp16_tensors']] for p, a, b, c in zip(front, x, y, ms)]
    return Chart('pareto_front', 'What another budget would cost', 'Every point is the best plan for its bytes: K and V of each head added up, as the tuner predicts. The colour is the predicted decode time of attention, all layers, 1 thread.',
                 f'Scatter plot of {len(front)} plans: from {x[0]:.1f} % of the bytes saved at a worst-head NMSE of {y[0]:.1e} and {ms[0]:.2f} ms, to {x[-1]:.1f} % at {y[-1]:.1e} and {ms[-1]:.2f} ms. The plan saves {100 * chosen["saved_fraction"]:.2f} %.',
                 figure, ['saved', 'worst cosine', 'worst NMSE', 'decode, ms', 'K and V in fp16'], rows)


def plan_cells(inputs):
    """Codec names by (tensor, layer, head), and the geometry; None without a plan."""
    if inputs.plan:
        return {(x, layer, h): head[x] for layer, heads in enumerate(inputs.plan['codecs']) for h, head in enumerate(heads) for x in 'kv'}, inputs.plan['geometry']
    if inputs.tune:
        return {(head['tensor'], head['layer'], head['kv_head']): head['codec'] for head in inputs.tune['heads']}, inputs.tune['geometry']
    return None


def plan_grid(inputs):
    found = plan_cells(inputs)
    if not found:
        return None
    cells, g = found
    used = sorted(set(cells.values()), key=lambda c: (list(CODECS).index(c) if c in CODECS else len(CODECS), c))
    kinds = {c: CODECS.get(c) or (OTHER_CODECS[i % 3], '?', c) for i, c in enumerate(used)}
    layers, heads = g['layers'], g['kv_heads']
    figure, axes = plt.subplots(2, 1, figsize=(WIDTH, 1.0 + 0.2 * len(used) + 0.4 * heads), sharex=True)
    norm = BoundaryNorm([i - 0.5 for i in range(len(used) + 1)], max(len(used), 2)) if len(used) > 1 else None
    for ax, tensor in zip(axes, 'kv'):
        codes = [[used.index(cells[tensor, layer, h]) for layer in range(layers)] for h in range(heads)]
        cells_of(ax, codes, layers, heads, cmap=ListedColormap([kinds[c][0] for c in used]), norm=norm)
        ax.set_title('Keys' if tensor == 'k' else 'Values', loc='left')
        ax.set_ylabel('head')
        for layer in range(layers if layers <= 40 and heads <= 16 else 0):
            for h in range(heads):
                ax.text(layer, h, kinds[used[codes[h][layer]]][1], ha='center', va='center', color='#101010', fontsize=6.5 if layers <= 24 else 5.2)
    axes[1].set_xlabel('layer')
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    count = {c: sum(v == c for v in cells.values()) for c in used}
    figure.legend(handles=[Patch(color=kinds[c][0], label=f'{kinds[c][1]}  {kinds[c][2]}: {count[c]}') for c in used], loc='lower left', ncol=1)
    legend_room(figure, len(used))
    rows = [[layer, h, cells['k', layer, h], cells['v', layer, h]] for layer in range(layers) for h in range(heads)]
    return Chart('plan', 'The plan', 'How K and V of every KV head are stored.', f'Grids of {layers} layers by {heads} KV heads, one for K and one for V: ' + ', '.join(f'{kinds[c][2]} {count[c]} times' for c in used) + '.',
                 figure, ['layer', 'KV head', 'K', 'V'], rows)


def size_label(strategy):
    """strat1 -> its label, others as they are"""
    return LABELS.get(strategy.replace('strat', 's'), strategy)


MAX_BARS = 24


def kernel_speeds(inputs):
    if not inputs.bench:
        return None
    runs = inputs.bench['runs']
    shown = runs[:MAX_BARS]
    figure, ax = plt.subplots(figsize=(WIDTH, 0.9 + 0.42 * len(shown)))
    for i, run in enumerate(shown):
        part = 100 * run['limit_fraction']
        ax.barh(i, part, height=0.42, color=theme.LIGHT['series1'])
        ax.text(0, i - 0.29, short_name(run['name']), va='bottom', ha='left', fontsize=8)
        ax.text(part, i, f' {part:.0f} %', va='center', ha='left', fontsize=8)
    ax.set_xlim(0, max(108, 1.1 * max(100 * r['limit_fraction'] for r in shown)))
    ax.set_ylim(len(shown) - 0.6, -0.8)
    ax.axvline(100, color=theme.LIGHT['muted'], linewidth=1, linestyle='--')
    ax.set_yticks([])
    ax.spines['left'].set_visible(False)
    ax.set_xlabel('% of the limit that binds')
    rows = [[run['name'], time_text(run), f'{run.get("bytes_per_second", 0) / 1e9:.1f}', f'{run.get("mac_per_second", 0) / 1e9:.1f}', f'{100 * run["limit_fraction"]:.0f} %', run.get('label', '')] for run in runs]
    more = f' The first {MAX_BARS} of {len(runs)}.' if len(runs) > MAX_BARS else ''
    best = max(runs, key=lambda r: r['limit_fraction'])
    return Chart('kernel_speeds', 'Kernels against this machine’s limits', f'Each kernel’s speed as a part of what binds it, memory or arithmetic, probed in the same run.{more}',
                 f'Bar chart of {len(shown)} kernels; the nearest to its limit is {best["name"]} at {100 * best["limit_fraction"]:.0f} %.{more}',
                 figure, ['kernel', 'time', 'GB/s', 'Gmac/s', 'of the limit', 'limit'], rows)


def time_text(run):
    seconds = run['real_time'] * {'ns': 1e-9, 'us': 1e-6, 'ms': 1e-3, 's': 1.0}[run['time_unit']]
    unit, factor = ('ms', 1e3) if seconds >= 1e-3 else ('µs', 1e6)
    return f'{factor * seconds:.4g} {unit}'


def short_name(name):
    """attend_decode/AVX2/k=i8-token,v=i8-token/q14kv2d64/32k/t1 -> decode i8-token, q14kv2d64 32k, AVX2"""
    parts = name.split('/')
    match = re.fullmatch(r'k=(.*),v=(.*)', parts[2]) if len(parts) >= 6 else None
    if not match:
        return name
    k, v = match.groups()
    return f'{parts[0].replace("attend_", "")} {k if k == v else f"K {k}, V {v}"}, {parts[3]} {parts[4]}, {parts[1]}' + ('' if parts[5] == 't1' else f', {parts[5]}')


def draw_all(inputs):
    return [chart for make in (pareto, plan_grid, attention_per_layer, mse_per_layer, heatmap, kernel_speeds) if (chart := make(inputs))]


def svg(chart):
    """The picture as SVG text, the same for the same inputs; text stays text."""
    out = io.StringIO()
    with plt.rc_context({'svg.hashsalt': chart.name}):
        chart.figure.savefig(out, format='svg', metadata={'Date': None, 'Creator': None, 'Format': None, 'Type': None})
    return out.getvalue()


def save(chart, folder):
    chart.figure.savefig(folder / f'{chart.name}.png', dpi=160)
    (folder / f'{chart.name}.svg').write_text(svg(chart))
