"""Colours. A figure is drawn in the light theme's colours; in the page's copy each of them becomes
a CSS variable, so that one picture serves light, dark and print. The series' colours are of Okabe
and Ito's palette, which colour-blind readers can tell apart, and every series has a marker of its
own besides."""
import re

from .inputs import LABELS

# name: (light, dark). The light values must be unlike each other: they are what is replaced.
COLOURS = {
    'ink': ('#1b1f24', '#e8eaed'),
    'muted': ('#5b6570', '#a3adb8'),
    'grid': ('#d8dde2', '#39424c'),
    'paper': ('#fffffe', '#161a1f'),
    'series0': ('#d55e00', '#ff8c42'),
    'series1': ('#0072b2', '#56b4e9'),
    'series2': ('#c2488f', '#e79bc8'),
    'series3': ('#008861', '#2fc79b'),
    'series4': ('#8a6d00', '#f0e442'),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
MARKERS = 'osD^v'
DASHES = ('-', '--', '-.', '-', ':')


def series(table, index):
    """Matplotlib's style of a table's line; those that have a label always look the same."""
    i = table.place if table.key in LABELS else min(index, 4)
    return {'color': LIGHT[f'series{i}'], 'marker': MARKERS[i], 'linestyle': DASHES[i],
            'linewidth': 1.3}


def css_variables():
    light, dark = (' '.join(f'--{name}: {pair[i]};' for name, pair in COLOURS.items())
                   for i in (0, 1))
    return f''':root {{ color-scheme: light dark; {light} }}
@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}
@media print {{ :root {{ {light} color-scheme: light; }} }}
'''


def with_variables(svg):
    for name, light in LIGHT.items():
        svg = re.sub(light, f'var(--{name})', svg, flags=re.IGNORECASE)
    return svg
