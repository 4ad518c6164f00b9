"""What llama.cpp's quantized cache types do to attention, in the tuner's measures: simulated on a
dump, in numpy.

K and V are rotated as llama.cpp does it since its pull request 21038, and rounded as ggml does it,
bit for bit. Q stays exact and sums are in f32: the error is that of the stored numbers alone.
Channels keep the dump's order; the engine's own is that of a dump it wrote itself (KVMIX_DUMP)."""
import json
import pathlib

import numpy as np

from .. import InputError, progress
from .inputs import CACHE_TYPES_FORMAT, expect

BITS = {'q8_0': 8, 'q5_0': 5, 'q4_0': 4}
BLOCK = 32  # numbers that share an f16 scale
DTYPES = {'F16': '<f2', 'BF16': '<u2', 'F32': '<f4'}
QUERIES = 64  # tokens whose queries go through attention together


class Dump:
    """A safetensors file as kvmix-tune takes it (docs/formats.md), read tensor by tensor. shapes:
    of the layers that attend, by layer, as `layer_shapes` has them. prompts: slices of tokens."""

    def __init__(self, path):
        data = np.memmap(path, 'u1', 'r')
        begin = 8 + int.from_bytes(data[:8].tobytes(), 'little')
        self.entries, self.data = json.loads(data[8:begin].tobytes()), data[begin:]
        facts = self.entries.pop('__metadata__', {})
        layers = 1 + max(int(name.split('.')[1]) for name in self.entries)
        shapes = json.loads(facts.get('layer_shapes', json.dumps([{}] * layers)))
        self.shapes = {i: {'attention_scale': float(facts.get('attention_scale', 0)), **shape}
                       for i, shape in enumerate(shapes) if shape is not None}
        expect(any(name.endswith('.q') for name in self.entries),
               'Q, without which there is no attention to measure', 'K and V alone')
        self.tokens = len(self.tensor(min(self.shapes), 'q'))
        lengths = [int(n) for n in facts.get('prompt_tokens', str(self.tokens)).split(',')]
        expect(min(lengths) > 0 and sum(lengths) == self.tokens,
               f'prompt_tokens that sum to {self.tokens}', lengths)
        ends = np.cumsum(lengths)
        self.prompts = [slice(a, b) for a, b in zip([0, *ends], ends)]

    def shape(self, layer, kind):
        name = f'layers.{layer}.{kind}'
        expect(name in self.entries, f'a tensor {name}', 'none')
        return self.entries[name]['shape']

    def tensor(self, layer, kind):
        """[tokens, heads, channels] f32"""
        shape, entry = self.shape(layer, kind), self.entries[f'layers.{layer}.{kind}']
        begin, end = entry['data_offsets']
        x = self.data[begin:end].view(DTYPES[entry['dtype']]).reshape(shape)
        if entry['dtype'] == 'BF16':
            x = (x.astype('<u4') << 16).view('<f4')
        x = (x[0].swapaxes(0, 1) if x.ndim == 4 else x).astype(np.float32)
        expect(np.isfinite(x).all(), f'finite numbers in layers.{layer}.{kind}', 'NaN or infinity')
        return x


def rotation(widths, kind):
    """The matrix that llama.cpp rotates the rows of a cache by, in blocks; its own inverse. widths:
    of the heads in all layers; where they differ, or are not whole blocks of 64, nothing is
    rotated. K's block is the largest power of two that divides them, V's is 64 (build_input_k_rot,
    build_input_v_rot)."""
    width, *others = set(widths)
    block = 1 if others or width % 64 else width & -width if kind == 'k' else 64
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(np.float32(block))


def rounded(x, name):
    """Numbers after a cache of this type (ggml's quantize_row_NAME_ref, dequantize_row_NAME)."""
    blocks = x.reshape(-1, BLOCK)
    peak = np.take_along_axis(blocks, abs(blocks).argmax(1)[:, None], 1)
    half = np.float32(2 ** (BITS[name] - 1))
    scale = abs(peak) / (half - 1) if name == 'q8_0' else peak / -half
    with np.errstate(divide='ignore'):
        y = blocks * np.where(scale == 0, 0, 1 / scale)
    if name == 'q8_0':
        whole = np.floor(abs(y))
        codes = np.sign(y) * (whole + (abs(y) - whole >= 0.5))
    else:
        codes = np.minimum(np.floor(y + (half + np.float32(0.5))), 2 * half - 1) - half
    return (codes * scale.astype(np.float16).astype(np.float32)).reshape(x.shape)


def stored(rows, matrix, name):
    def rotated(x):
        return (x.reshape(-1, len(matrix)) @ matrix).reshape(rows.shape)
    return rotated(rounded(rotated(rows), name))


def attention(q, k, v, shape):
    """Causal attention of one prompt. q: [tokens, query heads, channels]; k, v and the output
    likewise."""
    tokens, heads, width = q.shape
    k, v = k.transpose(1, 2, 0), v.swapaxes(0, 1)
    scale = np.float32(shape.get('attention_scale') or width ** -0.5)
    cap, window = shape.get('soft_cap'), shape.get('window') or tokens
    sinks = np.array(shape.get('sinks', [-np.inf] * heads), np.float32)[:, None, None]
    out = []
    for at in range(0, tokens, QUERIES):
        end, begin = min(at + QUERIES, tokens), max(0, at - window + 1)
        grouped = q[at:end].swapaxes(0, 1).reshape(len(k), -1, width)  # [KV head, .., channel]
        scores = scale * (grouped @ k[..., begin:end])
        scores = cap * np.tanh(scores / cap) if cap else scores
        scores = scores.reshape(heads, end - at, -1)
        away = np.arange(at, end)[:, None] - np.arange(begin, end)
        scores[:, (away < 0) | (away >= window)] = -np.inf
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        weights /= weights.sum(-1, keepdims=True) + np.exp(sinks - top)
        sums = weights.reshape(len(v), -1, end - begin) @ v[:, begin:end]
        out.append(sums.reshape(heads, end - at, -1).swapaxes(0, 1))
    return np.concatenate(out)


def compare(exact, found):
    """[NMSE and cosine, query head], as docs/glossary.md has them."""
    exact, found = exact.astype(float), found.astype(float)
    wrong, norm = ((exact - found) ** 2).sum(-1), (exact ** 2).sum(-1)
    with np.errstate(invalid='ignore', divide='ignore'):
        nmse = wrong.sum(0) / norm.sum(0)
        cosine = (exact * found).sum(-1) / np.sqrt(norm * (found ** 2).sum(-1))
    return np.array([np.where(wrong.sum(0) == 0, 0, nmse),
                     np.where(wrong == 0, 1, np.nan_to_num(cosine)).mean(0)])


def errors_of(dump):
    """[type, NMSE and cosine, query head], the heads of all layers."""
    matrices, errors = {}, []
    for windowed in (False, True):  # llama.cpp keeps layers with a window in a cache of their own
        layers = [i for i, shape in dump.shapes.items()
                  if 'kv_layer' not in shape and bool(shape.get('window')) == windowed]
        for kind in 'kv' if layers else '':
            widths = [dump.shape(i, kind)[-1] for i in layers]
            expect(not any(x % BLOCK for x in widths),
                   f'heads of a multiple of {BLOCK} channels, as these cache types need', widths)
            matrices[windowed, kind] = rotation(widths, kind)
    for layer, shape in dump.shapes.items():
        progress(f'llama.cpp: layer {layer} of {max(dump.shapes) + 1}')
        q, k, v = (dump.tensor(layer if x == 'q' else shape.get('kv_layer', layer), x)
                   for x in 'qkv')

        def outputs(k, v, q=q, shape=shape):
            return np.concatenate([attention(q[at], k[at], v[at], shape) for at in dump.prompts])
        exact = outputs(k, v)
        by_k, by_v = (matrices[bool(shape.get('window')), kind] for kind in 'kv')
        errors.append([compare(exact, outputs(stored(k, by_k, name), stored(v, by_v, name)))
                       for name in BITS])
    progress('')
    return np.concatenate(errors, axis=-1)


def simulate(path):
    """What read_cache_types (inputs.py) takes. `path`: a dump."""
    try:
        dump = Dump(path)
        errors = errors_of(dump)
    except InputError as error:
        raise InputError(f'{path}: {error}') from None
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(f'{path}: expected a dump (safetensors), found {error!r}') from None
    heads = [dump.shape(i, 'q')[1] if i in dump.shapes else 0 for i in range(max(dump.shapes) + 1)]
    return {'format': CACHE_TYPES_FORMAT, 'dump': pathlib.Path(path).name, 'tokens': dump.tokens,
            'query_heads': heads,
            'types': [{'type': name, 'saved_fraction': 1 - (bits + 16 / BLOCK) / 16,
                       'worst_nmse': nmse.max(), 'mean_nmse': nmse.mean(),
                       'worst_cosine': cosine.min(), 'mean_cosine': cosine.mean()}
                      for (name, bits), (nmse, cosine) in zip(BITS.items(), errors)]}
