"""The pictures: a function for each, of inputs that are there, returns a Chart; save() writes it as
PNG and SVG."""
import io
import re
from collections import Counter
from dataclasses import dataclass

import matplotlib
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from . import theme

WIDTH = 4.3  # inches; small, so that a phone need not shrink the letters much
MAX_BARS = 24
COLOURMAP = 'cividis'
# Of codecs, fp16 first: colours behind black letters, and the letters that kvmix-tune prints.
CODEC_COLOURS = ['#e69f00', '#56b4e9', '#f0e442', '#cc79a7', '#1fa37d', '#c3cbd4', '#b8ad10']
LETTERS = 'Fabcdefghijklmnopqrstuvwxyz'

INK, MUTED, GRID, PAPER = (theme.LIGHT[name] for name in ('ink', 'muted', 'grid', 'paper'))
plt.rcParams.update({
    'font.size': 9.5, 'axes.titlesize': 10, 'axes.titleweight': 'bold',
    'axes.titlelocation': 'left', 'legend.fontsize': 8.5, 'legend.frameon': False,
    'svg.fonttype': 'none', 'grid.color': GRID, 'grid.linewidth': 0.7, 'axes.axisbelow': True,
    'axes.spines.top': False, 'axes.spines.right': False, 'figure.constrained_layout.use': True,
    **dict.fromkeys(('figure.facecolor', 'axes.facecolor', 'savefig.facecolor'), PAPER),
    **dict.fromkeys(('axes.edgecolor', 'xtick.color', 'ytick.color'), MUTED),
    **dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.titlecolor', 'xtick.labelcolor',
                     'ytick.labelcolor'), INK)})


@dataclass
class Chart:
    name: str     # of its files
    title: str
    caption: str  # what to see in it
    alt: str      # what it shows, for those who cannot see it
    figure: object
    columns: list  # of the table beneath: [title, cell, ..]


def log_axis(axis):
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(numticks=7, subs=(1, 2, 5) if high <= 30 * low else (1,)))
    axis.set_major_formatter(lambda x, _: f'{x:g}'.replace('e-0', 'e-'))
    axis.set_minor_formatter('')


def panels(titles, height, **title_style):
    """A figure of panels over the layers, one below the other."""
    figure, axes = plt.subplots(len(titles), 1, figsize=(WIDTH, height), sharex=True)
    for ax, title in zip(axes, titles):
        ax.set_title(title, **title_style)
    axes[-1].set_xlabel('layer')
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def legend_below(figure, handles):
    """The axes keep off it (Matplotlib sees to that from 3.7 on, Debian 12 has 3.6)."""
    figure.legend(handles=handles, loc='lower left', ncol=1)
    share = (0.19 * len(handles) + 0.08) / figure.get_figheight()
    figure.get_layout_engine().set(rect=(0, share, 1, 1 - share))


def lines(tables, y_label, values):
    """One line per table over the layers. values: {title of a panel: values by table}, those that
    are 0 are left out."""
    figure, axes = panels(values, 4.6)
    for ax, by_table in zip(axes, values.values()):
        for i, (table, y) in enumerate(zip(tables, by_table)):
            ax.semilogy(y, nonpositive='mask', label=table.label, **theme.series(table, i),
                        markersize=3.5 if table.layers <= 40 else 2)
        log_axis(ax.yaxis)
        ax.set_ylabel(y_label)
        ax.grid(True)
    legend_below(figure, axes[0].lines)
    return figure


def heads_as_cells(ax, values, letters, color=INK, **style):
    """A map of values [head, layer], with a letter in each cell if there is room for it."""
    heads, layers = values.shape
    mesh = ax.pcolormesh(np.arange(layers + 1) - 0.5, np.arange(heads + 1) - 0.5, values,
                         edgecolors=PAPER, linewidth=0.6, **style)
    ax.set(ylabel='head', ylim=(heads - 0.5, -0.5), yticks=range(0, heads, max(1, heads // 8)))
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    for (head, layer), letter in np.ndenumerate(letters):
        if letter and layers <= 40:
            ax.text(layer, head, letter, ha='center', va='center', color=color,
                    fontsize=6.5 if layers <= 24 else 5.2)
    return mesh


def labels(tables):
    return '; '.join(table.label for table in tables)


def column(title, form, values):
    return [title, *(form.format(x) if x == x else '–' for x in values)]  # NaN: no such head


def over_heads(reduce, values):
    """values[.., layer, head] of each layer; NaN where it has no head."""
    return reduce(np.ma.masked_invalid(values), axis=-1).filled(np.nan)


def head_columns(layers, heads):
    return [column('layer', '{}', np.repeat(range(layers), heads)),
            column('KV head', '{}', np.tile(range(heads), layers))]


def error_columns(tables, errors):
    """errors: of K and of V, by table."""
    return [column(f'{x}, {table.label}', '{:.3e}', part.flat)
            for table, both in zip(tables, errors) for x, part in zip('KV', both)]


def mse_per_layer(tables):
    means = [over_heads(np.ma.mean, table.cells) for table in tables]
    layers = tables[0].layers
    return Chart(
        'mse_per_layer', 'Quantization error per layer',
        'Mean squared error of K and V, averaged over the KV heads; the axis is logarithmic. '
        'A layer whose heads are all in fp16 has none and no point.',
        f'Line charts of the mean squared error of keys and of values over {layers} layers for: '
        f'{labels(tables)}. The table beneath has the numbers.',
        lines(tables, 'MSE', dict(zip(('Keys', 'Values'), zip(*means)))),
        [['layer', *range(layers)], *error_columns(tables, means)])


def heatmap(tables):
    parts = [(x, table.label, errors.T) for table in tables for x, errors in zip('KV', table.cells)]
    values = np.concatenate([table.cells.ravel() for table in tables])
    least, largest = values[values > 0].min(), np.nanmax(values)
    norm = LogNorm(least, largest if largest > least else 10 * least)
    colours = plt.get_cmap(COLOURMAP).copy()
    colours.set_bad(GRID)
    layers, heads = tables[0].layers, tables[0].heads
    figure, axes = panels([f'{x}, {label}' for x, label, _ in parts],
                          0.8 + len(parts) * (0.42 + 0.16 * heads), fontsize=9)
    for ax, (*_, errors) in zip(axes, parts):
        mesh = heads_as_cells(ax, errors, np.where(errors == 0, 'F', ''), cmap=colours, norm=norm)
    bar = figure.colorbar(mesh, ax=axes, aspect=40, pad=0.02,
                          label='MSE (lighter is worse; F: fp16)')
    bar.outline.set_visible(False)
    log_axis(bar.ax.yaxis)
    x, label, errors = max(parts, key=lambda part: np.nanmax(part[2]))
    head, layer = np.unravel_index(np.nanargmax(errors), errors.shape)
    k, v = np.nanmedian(tables[0].cells, axis=(1, 2))
    return Chart(
        'error_heatmap', 'Error of every KV head',
        'One cell per layer and KV head, one colour scale for all. The median K head has an MSE of '
        f'{k:.1e}, the median V head of {v:.1e} ({tables[0].label}).',
        'Heat maps of the mean squared error by layer and KV head, for K and V under: '
        f'{labels(tables)}. The largest error is {np.nanmax(errors):.2e}, {x} of layer {layer}, '
        f'head {head}, {label}.',
        figure, head_columns(layers, heads) + error_columns(tables, [t.cells for t in tables]))


def attention_per_layer(tables):
    columns, worst = [['layer', *range(tables[0].layers)]], []
    for table in tables:
        nmse, cosine = table.cells
        heads = cosine[:, 1:]
        columns += [column(f'NMSE, {table.label}', '{:.2e}', nmse[:, 0]),
                    column(f'cosine, {table.label}', '{:.6f}', cosine[:, 0]),
                    column(f"worst head's cosine, {table.label}", '{:.6f}',
                           over_heads(np.ma.min, heads))]
        layer, head = np.unravel_index(np.nanargmin(heads), heads.shape)
        worst.append(f'{table.label}: {np.nanmin(heads):.5f} (layer {layer}, head {head})')
    worst = '; '.join(worst)
    return Chart(
        'attention_per_layer', 'What attention makes of it',
        'Attention outputs against those of exact K and V, causal within each prompt. '
        f'Cosine of the worst single query head: {worst}.',
        f'Line charts of the normalised error of attention outputs over {tables[0].layers} layers, '
        f'logarithmic, for: {labels(tables)}. Worst cosines: {worst}.',
        lines(tables, 'NMSE of the output', {
            'All query heads together': [table.cells[0, :, 0] for table in tables],
            'The worst query head': [over_heads(np.ma.max, table.cells[0, :, 1:])
                                     for table in tables]}),
        columns)


def pareto(tune):
    front = tune['front']
    saved, nmse, cosine, ms = np.array(
        [(100 * point['saved_fraction'], point['predicted']['worst_nmse'],
          point['predicted']['worst_cosine'], point['decode_ns'] / 1e6) for point in front]).T
    figure, ax = plt.subplots(figsize=(WIDTH, 3.5))
    seen = nmse > 0  # fp16 has no error, and no place on a logarithmic axis
    ax.plot(saved[seen], nmse[seen], color=MUTED, linewidth=0.8, zorder=1)
    points = ax.scatter(saved[seen], nmse[seen], c=ms[seen], cmap=COLOURMAP, s=26, edgecolors=INK,
                        linewidths=0.5, zorder=2)
    for part, marker, size, width, label in (
            ('predicted', '*', 15, 1.6, 'the plan, predicted'),
            ('holdout', 'P', 8, 1.4, 'the plan, measured on held-out text')):
        if tune[part]:
            ax.plot(100 * tune['saved_fraction'], tune[part]['worst_nmse'], marker, label=label,
                    markersize=size, markeredgewidth=width, markerfacecolor='none',
                    markeredgecolor=theme.LIGHT['series0'], zorder=3)
    ax.set(yscale='log', xlabel='KV bytes saved, %', ylabel='NMSE of the worst query head')
    log_axis(ax.yaxis)
    ax.grid(True)
    ax.legend(loc='upper left')
    bar = figure.colorbar(points, ax=ax, pad=0.02, label='decode, ms per token')
    bar.outline.set_visible(False)
    first, last = (f'{saved[i]:.1f} % of the bytes saved at a worst-head NMSE of {nmse[i]:.1e} and '
                   f'{ms[i]:.2f} ms' for i in (0, -1))
    return Chart(
        'pareto_front', 'What another budget would cost',
        'Every point is the best plan for its bytes: K and V of each head added up, as the tuner '
        'predicts. The colour is the predicted decode time of attention, all layers, 1 thread.',
        f'Scatter plot of {len(front)} plans: from {first}, to {last}. '
        f'The plan saves {100 * tune["saved_fraction"]:.2f} %.',
        figure,
        [column('saved', '{:.2f} %', saved), column('worst cosine', '{:.6f}', cosine),
         column('worst NMSE', '{:.2e}', nmse), column('decode, ms', '{:.3f}', ms),
         ['K and V in fp16', *(point['fp16_tensors'] for point in front)]])


def plan_grid(plan):
    cells = plan['cells']
    by_layer = plan['by_layer']['KV heads']
    layers, heads = len(by_layer), max(by_layer)
    count = Counter(cells.values())
    used = ['f16', *sorted(count.keys() - {'f16'})]
    letters = np.resize(list(LETTERS), len(used))
    colours = ListedColormap(CODEC_COLOURS, N=len(used))  # from the start again where they end
    figure, axes = panels(('Keys', 'Values'), 1.0 + 0.2 * len(used) + 0.4 * heads)
    for ax, x in zip(axes, 'kv'):
        codes = np.array([[used.index(cells[x, head, layer]) if head < by_layer[layer] else -1
                           for layer in range(layers)] for head in range(heads)])
        heads_as_cells(ax, np.where(codes < 0, np.nan, codes),
                       np.where(codes < 0, '', letters[codes]), color='#101010', cmap=colours,
                       vmin=-0.5, vmax=len(used) - 0.5)
    legend_below(figure, [Patch(color=colours(i), label=f'{letters[i]}  {codec}: {count[codec]}')
                          for i, codec in enumerate(used)])
    return Chart(
        'plan', 'The plan', 'How K and V of every KV head are stored.',
        f'Grids of {layers} layers by {heads} KV heads, one for K and one for V: '
        f'{", ".join(f"{codec} {count[codec]} times" for codec in used)}.',
        figure,
        [*head_columns(layers, heads),
         *([x.upper(), *(cells.get((x, head, layer), '–')
                          for layer in range(layers) for head in range(heads))]
           for x in 'kv')])


def kernel_speeds(runs):
    parts = [100 * run['limit_fraction'] for run in runs]
    gigabytes, gigamacs = ([run.get(rate, 0) / 1e9 for run in runs]
                           for rate in ('bytes_per_second', 'mac_per_second'))
    shown = parts[:MAX_BARS]
    figure, ax = plt.subplots(figsize=(WIDTH, 0.9 + 0.42 * len(shown)))
    bars = ax.barh(range(len(shown)), shown, height=0.42, color=theme.LIGHT['series1'])
    ax.bar_label(bars, fmt='%.0f %%', padding=2, fontsize=8)
    for i, run in enumerate(runs[:MAX_BARS]):
        ax.text(0, i - 0.29, short_name(run['name']), va='bottom', fontsize=8)
    ax.axvline(100, color=MUTED, linewidth=1, linestyle='--')
    ax.spines['left'].set_visible(False)
    ax.set(xlabel='% of the limit that binds', xlim=(0, max(108, 1.1 * max(shown))), yticks=[],
           ylim=(len(shown) - 0.6, -0.8))
    more = f' The first {MAX_BARS} of {len(runs)}.' if len(runs) > MAX_BARS else ''
    best = max(runs, key=lambda run: run['limit_fraction'])
    seconds = {'ns': 1e-9, 'us': 1e-6, 'ms': 1e-3, 's': 1}
    time = EngFormatter('s', places=1)
    return Chart(
        'kernel_speeds', 'Kernels against this machine’s limits',
        'Each kernel’s speed as a part of what binds it, memory or arithmetic, probed in the same '
        f'run.{more}',
        f'Bar chart of {len(shown)} kernels; the nearest to its limit is {best["name"]} at '
        f'{max(parts):.0f} %.{more}',
        figure,
        [['kernel', *(run['name'] for run in runs)],
         ['time', *(time(run['real_time'] * seconds[run['time_unit']]) for run in runs)],
         column('GB/s', '{:.1f}', gigabytes), column('Gmac/s', '{:.1f}', gigamacs),
         column('of the limit', '{:.0f} %', parts),
         ['limit', *(run.get('label', '') for run in runs)]])


def short_name(name):
    """attend_decode/AVX2/k=i8-token,v=i8-token/q14kv2d64/32k/t1 -> decode i8-token,
    q14kv2d64 32k, AVX2"""
    match = re.fullmatch(r'(?:attend_)?(\w+)/(\w+)/k=(.*),v=(.*)/(\w+)/(\w+)/(\w+)', name)
    if not match:
        return name
    what, target, k, v, shape, tokens, threads = match.groups()
    codecs = k if k == v else f'K {k}, V {v}'
    threads = '' if threads == 't1' else f', {threads}'
    return f'{what} {codecs}, {shape} {tokens}, {target}{threads}'


def draw_all(inputs):
    # Without an error the heat map has no scale.
    rounded = any((table.cells > 0).any() for table in inputs.quant)
    charts = ((pareto, inputs.tune), (plan_grid, inputs.plan or inputs.tune),
              (attention_per_layer, inputs.attention), (mse_per_layer, inputs.quant),
              (heatmap, inputs.quant if rounded else None), (kernel_speeds, inputs.bench))
    return [draw(of) for draw, of in charts if of]


def svg(chart):
    """The picture as SVG text, the same for the same inputs; text stays text."""
    out = io.StringIO()
    with plt.rc_context({'svg.hashsalt': chart.name}):
        chart.figure.savefig(out, format='svg',
                             metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type')))
    return out.getvalue()


def save(charts, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        chart.figure.savefig(folder / f'{chart.name}.png', dpi=160)
        (folder / f'{chart.name}.svg').write_text(svg(chart))
