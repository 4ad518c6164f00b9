"""One HTML page that needs nothing else: pictures inline, no script, no request; light and dark,
narrow and wide, and print."""
import html
import pkgutil
import re

from . import charts, theme
from .inputs import LABELS, shape

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def escape(x):
    return html.escape(str(x))


def table(columns):
    """columns: [title, cell, ..]"""
    header, *rows = zip(*columns)
    head = ''.join(f'<th scope="col">{escape(title)}</th>' for title in header)
    body = ''.join(f'<tr>{"".join(f"<td>{escape(cell)}</td>" for cell in row)}</tr>\n'
                   for row in rows)
    return (f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
            f'<tbody>{body}</tbody></table></div>')


def inline_svg(chart):
    """Without what only a file of its own needs, ids made unique within the page, colours as
    variables."""
    tag, text = re.fullmatch(r'.*?<svg([^>]*)>(.*)', charts.svg(chart), re.DOTALL).groups()
    view = re.search(r'viewBox="[^"]*"', tag)[0]
    text = re.sub(r'<metadata>.*?</metadata>|\sxmlns(:\w+)?="[^"]*"', '', text, flags=re.DOTALL)
    text = text.replace('xlink:href', 'href')
    text = re.sub(r'(\bid="|href="#|url\(#)', rf'\1{chart.name}-', text)
    svg = f'<svg {view} role="img" aria-label="{escape(chart.alt)}">{text}'
    return theme.with_variables(svg)


def figure(chart):
    return (f'<section id="{chart.name}"><h2>{escape(chart.title)}</h2>\n<figure>\n'
            f'<figcaption>{escape(chart.caption)}</figcaption>\n{inline_svg(chart)}</figure>\n'
            f'<details><summary>The numbers</summary>{table(chart.columns)}</details></section>\n')


def tiles(tune):
    """The few numbers that matter, as (value, what it is)."""
    measured = tune['holdout'] or tune['calibration']
    text = 'held-out text' if tune['holdout'] else 'the calibration text'
    decode = tune['decode_ns_per_token']
    k = sum(head['tensor'] == 'k' for head in tune['fp16_heads'])
    context = decode.get('context', '?')
    left = (f'{tune["context_bytes"]} bytes at a context of {context} tokens'
            if 'context_bytes' in tune else f'{tune["bytes_per_token"]} bytes per token')
    return [(f'{100 * tune["saved_fraction"]:.2f} %', f'of the KV cache saved: {left}'),
            (f'{measured["worst_cosine"]:.5f}', f'cosine of the worst query head, on {text}'),
            (f'{measured["mean_cosine"]:.5f}', f'mean cosine, on {text}'),
            (f'{k} + {len(tune["fp16_heads"]) - k}', 'heads whose K + V stay in fp16'),
            (f'{decode["fp16"] / decode["plan"]:.2f} ×', 'decode speed of attention against fp16, '
             f'at context {context}')]


def about(tune):
    def dump(name, tokens):
        return f'{tune.get(name, "?")} ({tune.get(tokens, "?")} tokens)'
    decode = tune['decode_ns_per_token']
    parts = [tune['model'] or 'unknown model', shape(tune).replace(' x ', ' × '),
             f'calibrated on {dump("calibration_dumps", "calibration_tokens")}',
             f'held out {dump("holdout_dump", "holdout_tokens")}' if tune['holdout'] else '',
             f'{decode["target"]} on {decode["cpu"]}' if 'cpu' in decode else '']
    return ' · '.join(filter(None, parts))


def size_section(size):
    named = {'strategy': 'stored as', 'bytes_per_token': 'bytes per token', 'saved': 'saved'}
    titles = [named.get(c, re.sub(r'mib_(\d+)', r'MiB at \1 tokens', c)) for c in size[0]]
    columns = zip(titles, *((LABELS.get(what.replace('strat', 's'), what), per_token,
                             f'{100 * float(saved):.2f} %', *mib)
                            for what, per_token, saved, *mib in size[1:]))
    return f'<section id="size"><h2>Size of the cache</h2>\n{table(columns)}</section>\n'


def page(inputs, drawn, title):
    tune = inputs.tune
    numbers = ''.join(f'<li><b>{escape(value)}</b> {escape(what)}</li>\n'
                      for value, what in tiles(tune)) if tune else ''
    return f'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{theme.css_variables()}{pkgutil.get_data(__package__, "style.css").decode()}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
<p class="about">{escape(about(tune)) if tune else ''}</p></header>
<main>
{f'<ul class="tiles">{numbers}</ul>' if numbers else ''}
<div class="charts">
{''.join(map(figure, drawn))}{size_section(inputs.size) if inputs.size else ''}</div>
</main>
</body>
</html>
'''
