#!/usr/bin/env python3
"""kvmix-report: the page, the pictures, what it refuses; and the page in a headless browser, where
there is one. report_test.py KVMIX-REPORT (in the build folder, beside the programs that it runs)"""
import copy
import functools
import html.parser
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import unittest
import xml.etree.ElementTree as xml

try:
    import matplotlib.image
except ImportError:
    print('report_test: SKIPPED, no matplotlib (apt-get install python3-matplotlib)')
    sys.exit(77)

REPORT = pathlib.Path(sys.argv.pop()).resolve()

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
BROWSER = os.environ.get('KVMIX_BROWSER') or next(filter(None, map(shutil.which, BROWSERS)), None)
LAYERS, KV_HEADS, QUERY_HEADS = 4, 2, 6
CHARTS = {'pareto_front', 'plan', 'attention_per_layer', 'mse_per_layer',
          'error_heatmap', 'kernel_speeds'}
EXTRA = {'kernel_speeds'}  # only where they are asked for


# ---- inputs as the programs write them -----------------------------------------------------------

def quant(strategy):
    lines = []
    for layer in range(LAYERS):
        for tensor in 'kv':
            for head in range(KV_HEADS):
                kept = strategy == 3 and (tensor, layer, head) == ('k', 0, 1)
                size = 0 if kept else (1 + layer + head) * (50 if tensor == 'k' else 0.5)
                error = size / strategy
                lines.append(f'layers.{layer}.{tensor},{layer},{tensor},64,{head},16,{strategy},'
                             f'{0 if kept else 5:.6f},{error:.6f},{error / 1024:.6f}')
    return '\n'.join(lines) + '\n'


def attention(size):
    lines = ['layer,head,nmse,cos_sim']
    for layer in range(LAYERS):
        lines += [f'{layer},{head},{size * (1 + layer):.6e},{1 - size / 2:.6f}'
                  for head in ('all', *range(QUERY_HEADS))]
    return '\n'.join(lines) + '\n'


SIZE = '''strategy,bytes_per_token,saved,mib_4096
fp16,1024,0.0000,4.0
strat1,512,0.5000,2.0
plan,561,0.4521,2.19
'''
GEOMETRY = {'layers': LAYERS, 'kv_heads': KV_HEADS, 'query_heads': QUERY_HEADS, 'head_dim': 16}
FIDELITY = {'worst_cosine': 0.99871, 'mean_cosine': 0.99985, 'worst_nmse': 2.5e-3,
            'mean_nmse': 1e-4, 'worst_head': {'layer': 1, 'query_head': 2}}
PLAN = {
    'format': 'kvmix-plan', 'version': [1, 0], 'geometry': GEOMETRY,
    'codecs': [[{'k': 'f16' if layer == 0 else 'i8-token+centre', 'v': 'i8-token'}] * KV_HEADS
               for layer in range(LAYERS)]}
TUNE = {
    'format': 'kvmix-tune-1', 'model': 'A <model> & more', 'geometry': GEOMETRY,
    'saved_fraction': 0.4521, 'bytes_per_token': 561,
    'predicted': FIDELITY, 'calibration': FIDELITY, 'holdout': FIDELITY,
    'decode_ns_per_token': {'plan': 1e6, 'fp16': 1.7e6, 'context': 4096},
    'fp16_heads': [{'layer': 0, 'kv_head': h, 'tensor': 'k'} for h in range(KV_HEADS)],
    'heads': [{'layer': layer, 'kv_head': h, 'tensor': x, 'codec': codec}
              for layer, heads in enumerate(PLAN['codecs']) for h, head in enumerate(heads)
              for x, codec in head.items()],
    'front': [{'saved_fraction': 0.49 - i * 0.049, 'decode_ns': 1e6 + i * 7e4, 'fp16_tensors': i,
               'predicted': {**FIDELITY, 'worst_nmse': 0.01 / (i + 1) if i < 10 else 0.0}}
              for i in range(11)]}
BENCH = {
    'context': {'cpu': 'a CPU'},
    'benchmarks': [{'name': f'attend_decode/AVX2/k={c},v={c}/q14kv2d64/4k/t1', 'real_time': 42000.0,
                    'time_unit': 'ns', 'bytes_per_second': 2e10, 'mac_per_second': 1e11,
                    'limit_fraction': 0.5, 'label': 'read, L2'} for c in ('f16', 'i8-token')]}
GOOD = {
    'quant_s1.csv': quant(1), 'quant_s2.csv': quant(2), 'quant_plan.csv': quant(3),
    'attention_s1.csv': attention(0.05), 'attention_plan.csv': attention(0.001), 'size.csv': SIZE,
    'plan.json': json.dumps(PLAN), 'tune.json': json.dumps(TUNE), 'bench.json': json.dumps(BENCH)}


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = pathlib.Path(self.folder.name)

    def run_report(self, *arguments, **options):
        return subprocess.run([sys.executable, str(REPORT), *map(str, arguments)], cwd=self.path,
                              capture_output=True, text=True, **options)

    def report(self, files, *arguments):
        for name, text in files.items():
            (self.path / name).write_text(text)
        done = self.run_report(*files, *arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        return (self.path / 'report.html').read_text()


class Page(html.parser.HTMLParser):
    """What the tests ask of the page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.labels, self.text = [], [], [], [], ''
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.tags.append(tag)
        self.ids += [a['id']] if 'id' in a else []
        links = ('href', 'src', 'xlink:href', 'action', 'data')
        self.links += [a[key] for key in links if key in a]
        if tag == 'svg':
            self.labels.append((a.get('role'), a.get('aria-label')))

    def handle_data(self, data):
        self.text += data


# Layer 1 has no K and V, layer 2 fewer heads than layer 0, layer 3 reads layer 0's.
UNLIKE = [{'kv_heads': 2, 'query_heads': 4}, None, {'kv_heads': 1, 'query_heads': 2},
          {'kv_heads': 2, 'query_heads': 2, 'kv_layer': 0}]
UNLIKE_CODECS = [[{'k': 'f16', 'v': 'i8-token'}] * 2, None, [{'k': 'i8-token', 'v': 'f16'}], None]


def unlike_files():
    kv = [''.join(f'f,{layer},{x},64,{head},16,2,1.0,{1 + head},0\n' for layer, head in
                  ((0, 0), (0, 1), (2, 0))) for x in 'kv']
    rows = [f'{layer},{head},{1e-4 * (layer + 1)},0.999\n'
            for layer, heads in ((0, 4), (2, 2), (3, 2)) for head in ('all', *range(heads))]
    shape = {'layers': UNLIKE}
    heads = [{'layer': layer, 'kv_head': h, 'tensor': x, 'codec': codec}
             for layer, heads in enumerate(UNLIKE_CODECS) for h, head in enumerate(heads or ())
             for x, codec in head.items()]
    tune = {key: value for key, value in TUNE.items() if key != 'geometry'}
    return {
        'quant_s2.csv': ''.join(kv),
        'attention_s2.csv': 'layer,head,nmse,cos_sim\n' + ''.join(rows),
        'plan.json': json.dumps({'format': 'kvmix-plan', 'version': [1, 2],
                                 'codecs': UNLIKE_CODECS, **shape}),
        'tune.json': json.dumps({**tune, 'heads': heads, 'context_bytes': 12345, **shape})}


class Unlike(Case):
    def test_layers_that_differ(self):
        text = Page(self.report(unlike_files())).text
        self.assertIn('4 layers that differ, 3 KV heads of their own, 8 query heads', text)
        self.assertIn('12345 bytes at a context of 4096 tokens', text)

    def test_without_a_plan_all_rows_must_be_there(self):
        files = unlike_files()
        (self.path / 'quant_s2.csv').write_text(files['quant_s2.csv'])
        done = self.run_report('quant_s2.csv')
        self.assertEqual(done.returncode, 1)
        self.assertIn('quant_s2.csv: expected 12 rows (2 x 3 x 2: K and V, layers, KV heads), '
                      'found 6', done.stderr)

    def test_rows_of_other_layers(self):
        for name, row, pattern in (
                ('quant_s2.csv', 'f,1,k,64,0,16,2,1,1,0\n', 'layer 1: expected 0 KV heads'),
                ('quant_s2.csv', 'f,4,k,64,0,16,2,1,1,0\n', 'layer 4: expected 0 KV heads'),
                ('attention_s2.csv', '3,2,0.1,0.9\n', 'layer 3: expected 2 query heads, .* 3')):
            files = unlike_files()
            files[name] += row
            for path, text in files.items():
                (self.path / path).write_text(text)
            done = self.run_report(*files)
            self.assertEqual((done.returncode, done.stderr.count('\n')), (1, 1), done.stderr)
            self.assertRegex(done.stderr, f'{name}: {pattern}')


class Pages(Case):
    def test_all_charts(self):
        text = self.report(GOOD)
        page = Page(text)
        self.assertLessEqual(CHARTS | {'size'}, set(page.ids))
        self.assertEqual(page.tags.count('svg'), len(CHARTS))
        for role, label in page.labels:
            self.assertEqual(role, 'img')
            self.assertGreater(len(label), 40)
        self.assertEqual(page.tags.count('table'), len(CHARTS) + 1)
        for cell in ('45.21 %', '0.99871', '561', '1.70 ×', 'A <model> & more',
                     'strategy 1: int8, a scale per head', 'read, L2', '42.0 µs',
                     'F  f16: 2', 'a  i8-token: 8', 'b  i8-token+centre: 6'):
            self.assertIn(cell, page.text)
        self.assertEqual(len(page.ids), len(set(page.ids)), 'an id is there twice')

    def test_nothing_leaves_it(self):
        text = self.report(GOOD)
        page = Page(text)
        self.assertNotRegex(text, r'(?i)https?:|@import|//[a-z]+\.|\bsrc=')
        for link in page.links:
            self.assertRegex(link, r'^(#|data:)')
            if link.startswith('#'):
                self.assertIn(link[1:], page.ids)
        for target in re.findall(r'url\(([^)]*)\)', text):
            self.assertIn(target.strip('"\'').lstrip('#'), page.ids)
        self.assertFalse({'script', 'iframe', 'object', 'embed'} & set(page.tags))

    def test_the_same_inputs_give_the_same_page(self):
        self.assertEqual(self.report(GOOD), self.report(GOOD))

    def test_some_of_the_inputs(self):
        for name, charts in (('quant_s1.csv', {'mse_per_layer', 'error_heatmap'}),
                             ('attention_plan.csv', {'attention_per_layer'}),
                             ('tune.json', {'pareto_front', 'plan'}), ('plan.json', {'plan'}),
                             ('bench.json', {'kernel_speeds'}), ('size.csv', set())):
            page = Page(self.report({name: GOOD[name]}))
            self.assertEqual(CHARTS & set(page.ids), charts)

    def test_pictures(self):
        self.report(GOOD, '--images', 'pictures')
        self.assertEqual({p.name for p in (self.path / 'pictures').iterdir()},
                         {f'{c}.{end}' for c in CHARTS for end in ('png', 'svg')})
        for chart in CHARTS:
            pixels = matplotlib.image.imread(self.path / 'pictures' / f'{chart}.png')
            self.assertGreater(pixels.shape[1], 500)
            self.assertGreater(pixels[..., :3].std(), 0.03, chart)
            text = (self.path / 'pictures' / f'{chart}.svg').read_text()
            self.assertNotIn('var(', text)
            paths = xml.fromstring(text).findall('.//{http://www.w3.org/2000/svg}path')
            self.assertGreater(len(paths), 5)


class Errors(Case):
    def refused(self, pattern, files, *arguments):
        for name, text in files.items():
            (self.path / name).write_text(text)
        done = self.run_report(*files, *arguments)
        self.assertTrue(1 <= done.returncode <= 123, done)
        self.assertEqual(done.stderr.count('\n'), 1, done.stderr)
        self.assertRegex(done.stderr, f'^kvmix-report: error: .*{pattern}')
        self.assertFalse((self.path / 'report.html').exists())

    def edited(self, value, *path_and_new):
        value, (*path, last, new) = copy.deepcopy(value), path_and_new
        at = functools.reduce(lambda x, key: x[key], path, value)
        if new is None:
            del at[last]
        else:
            at[last] = new
        return json.dumps(value)

    def test_csv(self):
        self.refused('a.csv: .*empty', {'a.csv': ''})
        self.refused('a.csv: .*found none', {'a.csv': 'layer,head,nmse,cos_sim\n'})
        self.refused('a.csv: .*found none', {'a.csv': 'strategy,bytes_per_token,saved\n'})
        self.refused('expected the columns layer,head,nmse,cos_sim, found layer,head,cos_sim',
                     {'a.csv': 'layer,head,cos_sim\n0,all,1\n'})
        nan = attention(0.1).replace('1.000000e-01', 'nan', 2).replace('nan', '1e-1', 1)
        self.refused("a.csv: line 3, nmse: .*'nan'", {'a.csv': nan})
        self.refused("a.csv: line 1, column 9: .*'nan'",
                     {'a.csv': quant(1).replace('50.000000', 'nan', 1)})
        self.refused('a.csv: line 2: expected the 10 columns.*found 9',
                     {'a.csv': quant(1).replace(',0.097656\n', '\n', 1)})
        self.refused('a.csv: expected 16 rows.*found 15', {'a.csv': quant(1).split('\n', 1)[1]})
        self.refused('a.csv: line 17: .*twice', {'a.csv': quant(1) + quant(1)})
        first, rest = quant(1).split('\n', 1)[0], quant(2).split('\n', 1)[1]
        self.refused('one strategy, found 1, 2', {'a.csv': f'{first}\n{rest}'})
        self.refused('nothing.csv: No such file', {}, 'nothing.csv')
        (self.path / 'b.csv').write_bytes(b'\xff\xfe\x00')
        self.refused('b.csv: not a text file', {}, 'b.csv')

    def test_json(self):
        self.refused('a.json: not JSON', {'a.json': '{"format":'})
        self.refused('a.json: expected a report', {'a.json': '{"format": "something"}'})
        for pattern, *edit in (
                ('expected format kvmix-tune-1, found kvmix-tune-2', TUNE, 'format',
                 'kvmix-tune-2'),
                (r'expected a plan of version 1, found \[2, 0\]', PLAN, 'version', [2, 0]),
                ('"predicted.worst_nmse", which is missing', TUNE, 'front', 3, 'predicted',
                 'worst_nmse', None),
                ('Pareto front, found none', TUNE, 'front', []),
                ('finite numbers, found NaN', TUNE, 'saved_fraction', float('nan')),
                ('a.json: not as this version', TUNE, 'front', 7)):
            self.refused(pattern, {'a.json': self.edited(*edit)})
        self.refused('limit_fraction', {'a.json': json.dumps({'benchmarks': [{'name': 'x'}]})})

    def test_files_of_several_models(self):
        plan = {**PLAN, 'geometry': {**GEOMETRY, 'layers': 3}, 'codecs': PLAN['codecs'][:3]}
        self.refused('plan.json: expected a plan for 4 layers .* as tune.json has, found 3 layers',
                     {'tune.json': GOOD['tune.json'], 'plan.json': json.dumps(plan)})
        short = ''.join(attention(0.1).splitlines(True)[:1 + 3 * 7])
        self.refused('a.csv: expected 4 layers x 6 query heads, as plan.json has, found 3 x 6',
                     {'plan.json': GOOD['plan.json'], 'a.csv': short})
        self.refused('b.csv: expected 4 layers x 6 query heads, as a.csv has, found 3 x 6',
                     {'a.csv': attention(0.1), 'b.csv': short})

    def test_calls(self):
        self.refused('expected a file in a folder', {'size.csv': SIZE}, '-o', 'no/such/folder.html')
        self.refused('kvmix-tune: expected it in', {}, '--sample', '--bin', self.path)
        self.assertEqual(self.run_report().returncode, 2)

    def test_without_matplotlib(self):
        (self.path / 'matplotlib.py').write_text('raise ImportError("No module named that")\n')
        (self.path / 'size.csv').write_text(SIZE)
        done = self.run_report('size.csv', env={**os.environ, 'PYTHONPATH': str(self.path)})
        self.assertEqual((done.returncode, done.stderr.count('\n')), (1, 1))
        self.assertRegex(done.stderr, 'matplotlib.*apt-get install python3-matplotlib')


class Sample(Case):
    def test_from_the_sample_to_the_page(self):
        done = self.run_report('--sample', '--keep', 'kept')
        self.assertEqual((done.returncode, done.stderr, done.stdout),
                         (0, '', 'report written to report.html\n'))
        page = Page((self.path / 'report.html').read_text())
        self.assertLessEqual(CHARTS - EXTRA, set(page.ids))
        tune = json.loads((self.path / 'kept/tune.json').read_text())
        self.assertGreaterEqual(tune['saved_fraction'], 0.45)

    def test_an_error_of_a_program_is_shown(self):
        done = self.run_report('--dump', 'nothing.safetensors')
        self.assertEqual((done.returncode, done.stderr.count('\n')), (1, 1))
        self.assertIn('nothing.safetensors', done.stderr)


# Loads the page in frames of three widths and says in its own text what it found there.
PROBE = '''<!DOCTYPE html><link rel="icon" href="data:,"><body><script>
let left = 3, found = [];
for (const width of [360, 800, 1300]) {
  const frame = document.createElement('iframe');
  frame.width = width; frame.height = 900; frame.src = 'report.html';
  frame.onload = () => {
    const page = frame.contentDocument, style = getComputedStyle(page.body);
    const boxes = [...page.querySelectorAll('svg')].map(s => s.getBoundingClientRect());
    found.push({width, scroll: page.documentElement.scrollWidth,
                pictures: boxes.filter(b => b.width > 250 && b.height > 80).length,
                shapes: page.querySelectorAll('svg path').length,
                widest: Math.max(...boxes.map(b => b.right)),
                ink: style.color, paper: style.backgroundColor});
    if (--left == 0) document.body.textContent = 'FOUND' + JSON.stringify(found) + 'END';
  };
  document.body.append(frame);
}
</script>'''


class Server:
    """Serves a folder, remembers what was asked for."""

    def __init__(self, folder):
        asked = self.asked = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_):
                asked.append(self.path)
        handler = functools.partial(Handler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}'

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


SCHEME = '--blink-settings=preferredColorScheme={}'  # 0: dark, 1: light


@unittest.skipUnless(BROWSER, 'no browser: apt-get install chromium, or name one in KVMIX_BROWSER')
class Browser(Case):
    def browse(self, *arguments):
        profile = tempfile.mkdtemp(dir=self.path)
        return subprocess.run([BROWSER, '--headless', '--no-sandbox', '--disable-gpu',
                               '--hide-scrollbars', '--disable-background-networking',
                               '--disable-component-update', '--no-first-run',
                               f'--user-data-dir={profile}', '--enable-logging=stderr',
                               '--virtual-time-budget=5000', *arguments],
                              capture_output=True, text=True, timeout=120)

    def test_it_renders_at_every_width_and_asks_for_nothing(self):
        self.report(GOOD)
        (self.path / 'probe.html').write_text(PROBE)
        for dark in (False, True):
            with Server(self.path) as server:
                done = self.browse('--dump-dom', SCHEME.format(0 if dark else 1),
                                   f'{server.url}/probe.html')
            self.assertEqual(set(server.asked), {'/probe.html', '/report.html'})
            self.assertNotIn('CONSOLE', done.stderr)
            found = re.search('FOUND(.*)END', done.stdout)
            self.assertTrue(found, done.stdout[-500:] + done.stderr[-500:])
            for frame in json.loads(found[1]):
                self.assertEqual(frame['pictures'], len(CHARTS), frame)
                self.assertGreater(frame['shapes'], 150)
                self.assertLessEqual(max(frame['scroll'], frame['widest']), frame['width'], frame)
                ink, paper = (sum(map(int, re.findall(r'\d+', frame[key])[:3]))
                              for key in ('ink', 'paper'))
                self.assertEqual(ink > paper + 300, dark, frame)
                self.assertEqual(paper > ink + 300, not dark, frame)

    def test_it_opens_from_a_file(self):
        self.report(GOOD)
        for scheme, paper in ((1, 1.0), (0, 0.1)):
            shot = self.path / f'{scheme}.png'
            done = self.browse(f'--screenshot={shot}', '--window-size=1300,1800',
                               SCHEME.format(scheme), (self.path / 'report.html').as_uri())
            self.assertNotIn('CONSOLE', done.stderr)
            pixels = matplotlib.image.imread(shot)[..., :3]
            self.assertAlmostEqual(float(pixels[2, 2].mean()), paper, delta=0.05)
            self.assertGreater(pixels.std(), 0.05)

    def test_it_prints(self):
        self.report(GOOD)
        done = self.browse(f'--print-to-pdf={self.path / "report.pdf"}',
                           (self.path / 'report.html').as_uri())
        self.assertEqual(done.returncode, 0, done.stderr[-500:])
        self.assertGreater((self.path / 'report.pdf').stat().st_size, 20000)


if __name__ == '__main__':
    if not BROWSER:
        print('report_test: the browser tests are SKIPPED: no chromium, and no KVMIX_BROWSER',
              file=sys.stderr)
    unittest.main()
