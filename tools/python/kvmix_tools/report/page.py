"""One HTML page that needs nothing else: pictures inline, no script, no request; light and dark, narrow and wide, and print."""
import html
import re

from . import charts, theme

STYLE = '''
:root { color-scheme: light dark; %(light)s }
@media (prefers-color-scheme: dark) { :root { %(dark)s } }
@media print { :root { %(light)s color-scheme: light; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem clamp(.8rem, 3vw, 2rem) 3rem; max-width: 84rem; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: .2rem 0; }
h2 { font-size: 1.1rem; margin: 0 0 .3rem; }
p { margin: .3rem 0 .8rem; }
.about, figcaption { color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem; margin: 1.2rem 0; padding: 0; list-style: none; }
.tiles li { border: 1px solid var(--grid); border-radius: .5rem; padding: .6rem .8rem; }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.charts { columns: 2 26rem; column-gap: 1.2rem; }
section { margin-bottom: 1.2rem; border: 1px solid var(--grid); border-radius: .5rem; padding: .9rem; min-width: 0; break-inside: avoid; }
figure { margin: 0; }
figure svg { display: block; width: 100%%; height: auto; }
figure svg text { font-family: system-ui, sans-serif !important; }
figcaption { font-size: .9rem; margin-bottom: .4rem; }
summary { cursor: pointer; font-size: .9rem; margin-top: .5rem; }
.scroll { overflow: auto; max-height: 24rem; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; min-width: 4.5rem; position: sticky; top: 0; background: var(--paper); }
td:first-child, th:first-child { text-align: left; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .charts { columns: 2; }
  .scroll { overflow: visible; max-height: none; }
  details:not([open]) { display: none; }
}
'''


def escape(x):
    return html.escape(str(x), quote=True)


def table(header, rows):
    head = ''.join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = ''.join('<tr>' + ''.join(f'<td>{escape(cell)}</td>' for cell in row) + '</tr>\n' for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def inline_svg(chart):
    """Without what only a file of its own needs, ids made unique within the page, colours as variables."""
    text = charts.svg(chart)
    text = text[text.index('<svg'):]
    text = re.sub(r'<metadata>.*?</metadata>', '', text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', '', text)
    text = text.replace('xlink:href', 'href')
    text = re.sub(r'\bid="', f'id="{chart.name}-', text)
    text = re.sub(r'href="#', f'href="#{chart.name}-', text)
    text = re.sub(r'url\(#', f'url(#{chart.name}-', text)
    view = re.search(r'viewBox="[^"]*"', text)[0]
    text = re.sub(r'<svg[^>]*>', f'<svg {view} role="img" aria-label="{escape(chart.alt)}">', text, count=1)
    return theme.with_variables(text)


def figure(chart):
    return (f'<section id="{chart.name}"><h2>{escape(chart.title)}</h2>\n<figure>\n<figcaption>{escape(chart.caption)}</figcaption>\n{inline_svg(chart)}</figure>\n'
            f'<details><summary>The numbers</summary>{table(chart.header, chart.rows)}</details></section>\n')


def tiles(inputs):
    """The few numbers that matter, as (value, what it is)."""
    tune = inputs.tune
    if not tune:
        return []
    measured = tune['holdout'] or tune['calibration']
    text = 'held-out text' if tune['holdout'] else 'the calibration text'
    decode = tune['decode_ns_per_token']
    k = sum(head['tensor'] == 'k' for head in tune['fp16_heads'])
    return [(f'{100 * tune["saved_fraction"]:.2f} %', f'of the KV cache saved: {tune["bytes_per_token"]} bytes per token'),
            (f'{measured["worst_cosine"]:.5f}', f'cosine of the worst query head, on {text}'),
            (f'{measured["mean_cosine"]:.5f}', f'mean cosine, on {text}'),
            (f'{k} + {len(tune["fp16_heads"]) - k}', 'heads whose K + V stay in fp16'),
            (f'{decode["fp16"] / decode["plan"]:.2f} ×', f'decode speed of attention against fp16, at context {decode.get("context", "?")}')]


def about(inputs):
    tune, parts = inputs.tune, []
    if tune:
        parts.append(tune['model'] or 'unknown model')
        parts.append('{layers} layers × {kv_heads} KV heads × {head_dim}, {query_heads} query heads'.format(**tune['geometry']))
        parts.append(f'calibrated on {tune.get("calibration_dumps", "?")} ({tune.get("calibration_tokens", "?")} tokens)')
        if tune['holdout']:
            parts.append(f'held out {tune.get("holdout_dump", "?")} ({tune.get("holdout_tokens", "?")} tokens)')
        decode = tune['decode_ns_per_token']
        if 'cpu' in decode:
            parts.append(f'{decode["target"]} on {decode["cpu"]}')
    return ' · '.join(parts)


def size_section(inputs):
    if not inputs.size:
        return ''
    header, rows = inputs.size[0], inputs.size[1:]
    named = {'strategy': 'stored as', 'bytes_per_token': 'bytes per token', 'saved': 'saved'}
    titles = [named.get(c, re.sub(r'mib_(\d+)', r'MiB at \1 tokens', c)) for c in header]
    cells = [[charts.size_label(row[0]), row[1], f'{100 * float(row[2]):.2f} %', *row[3:]] for row in rows]
    return f'<section id="size"><h2>Size of the cache</h2>\n{table(titles, cells)}</section>\n'


def page(inputs, drawn, title):
    style = STYLE % {'light': theme.css_variables(False), 'dark': theme.css_variables(True)}
    numbers = ''.join(f'<li><b>{escape(value)}</b> {escape(what)}</li>\n' for value, what in tiles(inputs))
    return f'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
<p class="about">{escape(about(inputs))}</p></header>
<main>
{f'<ul class="tiles">{numbers}</ul>' if numbers else ''}
<div class="charts">
{''.join(map(figure, drawn))}{size_section(inputs)}</div>
</main>
</body>
</html>
'''
