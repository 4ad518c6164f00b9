"""Dumps K, V and Q of a Hugging Face model as it reads a text, for kvmix-tune. For example:

  kvmix-dump Qwen/Qwen2.5-0.5B corpus.txt -o qwen.safetensors --prompts 8 --tokens 512

MODEL is what transformers' from_pretrained takes: a name or a folder (with --gguf-file: the folder
of a GGUF file). The text is cut into prompts of --tokens tokens, each read by one prefill. What is
written is what attention sees: K and V after RoPE and QK-norm, not repeated over the GQA group, and
Q likewise, as fp16.

Calibrate at the length that will be served: RoPE turns slow channels, so means of short prompts do
not hold for long ones. For a holdout, take another text, or the same one with --skip.

The file is a safetensors file: tensors layers.N.k|v|q, F16, [tokens, heads, head_dim], prompts one
after the other; the metadata name the model, the corpus and the shapes of the layers
(lib/include/kvmix/tune/dump.h). Layers may differ: windows, soft caps, sinks, widths of K and V;
layers that share K and V are written once, those without any are left out. Layers are written as
they come, to a file in OUTPUT.*.part; it becomes OUTPUT when it is whole. Needs: pip install torch
transformers (for GGUF files: gguf accelerate).
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import pathlib
import signal
import struct
import sys

from . import InputError, progress, written_whole


def cut_prompts(ids, prefix, tokens, prompts, skip=0):
    """`prompts` lists of `tokens` ids each: `prefix` (what the tokenizer puts before every text)
    and the next ids after `skip`."""
    step = tokens - len(prefix)
    if step < 1:
        raise InputError(f'--tokens {tokens}: more than the {len(prefix)} that the tokenizer puts '
                         'before every text are needed')
    end = skip + prompts * step
    if end > len(ids):
        raise InputError(f'the text has {len(ids)} tokens, --skip {skip} and {prompts} prompts of '
                         f'{tokens} take {end}')
    return [prefix + ids[start:start + step] for start in range(skip, end, step)]


def header(shapes, metadata, size=0):
    """How a safetensors file of fp16 tensors begins: the length of the JSON, and the JSON with
    blanks up to `size` bytes in all."""
    entries, at = {'__metadata__': metadata}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        entries[name] = {'dtype': 'F16', 'shape': shape, 'data_offsets': [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text = text.ljust(size - 8)
    text += b' ' * (-len(text) % 8)
    return struct.pack('<Q', len(text)) + text


class Recorder(contextlib.ExitStack):
    """Writes what attention sees to its place in a dump. `with` gives the file its name at the end,
    or removes what was written."""

    def __init__(self, path, layers, prompt_tokens, about, attention=()):
        """prompt_tokens: of each prompt. about: model, corpus and rope_theta, for the metadata.
        attention: layers that must have it; others may have none, as in hybrids."""
        super().__init__()
        self.file = self.enter_context(written_whole(path))
        self.layers, self.prompt_tokens, self.tokens = layers, prompt_tokens, sum(prompt_tokens)
        self.about, self.attention = about, attention
        self.shapes = {}  # by layer, as layer_shapes has them
        self.tensors = {}  # name: its shape, in the order of the file
        # The header is written after the first prompt, which tells what it must say.
        self.header_size = self.end = 4096 * (layers + 1)
        self.places = {}  # of tensors in the file
        self.prompt, self.row = 0, 0  # the prompt, its first row
        self.ran = {}  # by layer that it saw: a hash of K and V, by which layers share them

    def add(self, layer, q, k, v, scale, window=None, soft_cap=None, sinks=None):
        """q, k: [heads, tokens, k_dim] f32, v: [heads, tokens, v_dim]. scale: on q.k, before
        softmax. window: tokens that a query sees. soft_cap: of the scores. sinks: [query heads]
        logits."""
        import numpy as np  # (comes with transformers)
        tokens = self.prompt_tokens[self.prompt]
        if v.shape[:2] != k.shape[:2] or q.shape[1:] != k.shape[1:] or q.shape[0] % k.shape[0]:
            raise InputError(f'layer {layer}: q {q.shape}, k {k.shape}, v {v.shape} '
                             '[heads, tokens, head_dim] are not grouped-query attention')
        if k.shape[1] != tokens:
            raise InputError(f'layer {layer}: expected the {tokens} tokens of the prompt, '
                             f'found {k.shape[1]}')
        if max(k.shape[2], v.shape[2]) > 512:
            raise InputError(f'layer {layer}: expected heads of at most 512 channels, found '
                             f'{k.shape[2]} (a latent cache, as of MLA, is not supported)')
        if layer in self.ran:
            raise InputError(f'layer {layer}: expected one attention in a prompt, found a second')
        halves = {}
        for name, x in (('k', k), ('v', v), ('q', q)):
            with np.errstate(over='ignore'):
                halves[name] = np.ascontiguousarray(x.transpose(1, 0, 2), '<f2')
            if not np.isfinite(halves[name]).all():
                raise InputError(f'layer {layer}: {name} has values beyond fp16 '
                                 f'(max {np.abs(x).max():g})')
        seen = hashlib.sha256(halves['k']).digest() + hashlib.sha256(halves['v']).digest()
        shape = {'kv_heads': k.shape[0], 'query_heads': q.shape[0], 'k_dim': k.shape[2],
                 'v_dim': v.shape[2], 'attention_scale': float(scale)}
        shape |= {'window': int(window)} if window else {}
        shape |= {'soft_cap': float(soft_cap)} if soft_cap else {}
        shape |= {'sinks': [float(x) for x in sinks]} if sinks is not None else {}
        owner = next((i for i, other in self.ran.items() if other == seen), None)
        shape |= {'kv_layer': owner} if owner is not None else {}
        expected = self.shapes.get(layer, 'no attention') if self.prompt else shape
        if expected != shape:
            raise InputError(f'layer {layer}: expected {expected}, as in the first prompt, found '
                             f'{shape}')
        self.shapes[layer] = shape
        self.ran[layer] = seen
        if owner is not None:
            del halves['k'], halves['v']
        for name, half in halves.items():
            tensor = f'layers.{layer}.{name}'
            if tensor not in self.places:
                self.tensors[tensor] = (self.tokens, *half.shape[1:])
                self.places[tensor], self.end = self.end, self.end + self.tokens * half[0].nbytes
            self.file.seek(self.places[tensor] + self.row * half[0].nbytes)
            self.file.write(half)

    def end_prompt(self):
        """The first prompt tells already which layers have attention, and all that is wrong."""
        missing = sorted({*self.attention, *self.shapes} - {*self.ran})
        if missing or not self.ran:
            raise InputError('expected attention in the layers '
                             f'{missing or list(range(self.layers))}, found it in '
                             f'{sorted(self.ran)}')
        if self.prompt == 0:
            begin = header(self.tensors, self.meta(), self.header_size)
            if len(begin) != self.header_size:
                raise InputError(f'expected a header of at most {self.header_size} bytes, found '
                                 f'{len(begin)}')
            self.file.seek(0)
            self.file.write(begin)
        self.row += self.prompt_tokens[self.prompt]
        self.prompt, self.ran = self.prompt + 1, {}

    def geometry(self):
        """What is the same in all layers, if nothing else is to be said of them."""
        first = next(iter(self.shapes.values()))
        if (len(self.shapes) < self.layers or first['k_dim'] != first['v_dim']
                or any(shape != first for shape in self.shapes.values())
                or first.keys() & {'window', 'soft_cap', 'sinks'}):
            return None
        return {'kv_heads': first['kv_heads'], 'query_heads': first['query_heads'],
                'head_dim': first['k_dim'], 'attention_scale': first['attention_scale']}

    def meta(self):
        layers = [self.shapes.get(layer) for layer in range(self.layers)]
        facts = {'format': 'kvmix-dump-1', **self.about, 'layers': self.layers,
                 'tokens': self.tokens, 'prompt_tokens': ','.join(map(str, self.prompt_tokens)),
                 **(self.geometry() or {'layer_shapes': json.dumps(layers)})}
        return {name: str(value) for name, value in facts.items()}

    def words(self):
        form = '{kv_heads} KV heads and {query_heads} query heads x {head_dim}'
        geometry = self.geometry()
        if geometry:
            return f'{self.layers} layers, {self.tokens} tokens, {form.format(**geometry)}'
        shared = sum('kv_layer' in shape for shape in self.shapes.values())
        return (f'{self.layers} layers that differ ({self.layers - len(self.shapes)} without K and '
                f'V, {shared} with those of another), {self.tokens} tokens')


def load(args):
    """The tokenizer, the model's configuration, and run(prompt, add): one prefill, whose attention
    goes through `add` (of a Recorder)."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    listener = None

    def attend(query, key, value, mask, scale, soft_cap, sinks):
        """What PyTorch's own attention has not: a soft cap, sinks."""
        group, tokens = query.shape[1] // key.shape[1], key.shape[2]
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scale
        if soft_cap:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        if mask is None:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1, dtype=torch.float32)[..., :tokens].to(value.dtype)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), None

    def attention(module, query, key, value, mask, scaling=None, sliding_window=None, softcap=None,
                  s_aux=None, **rest):
        layer = module.layer_idx
        kind = types[layer] if layer < len(types) else ''
        if rest.get('position_bias') is not None or kind == 'chunked_attention':
            raise InputError(f'layer {layer} attends with a position bias or in chunks, which a '
                             'dump does not describe')
        window = sliding_window
        if window is None and kind == 'sliding_attention':
            window = getattr(module, 'sliding_window', None) or config.sliding_window
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        sinks = None if s_aux is None else s_aux.float().cpu().tolist()
        arrays = (x[0].float().cpu().numpy() for x in (query, key, value))
        listener(layer, *arrays, scale, window, softcap, sinks)
        if softcap or sinks:
            return attend(query, key, value, mask, scale, softcap, s_aux)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling,
                                      sliding_window=sliding_window, **rest)

    def run(prompt, add):
        nonlocal listener
        listener = add
        with torch.inference_mode():  # the body without the head: nobody needs the logits
            model.base_model(input_ids=torch.tensor([prompt], device=args.device),
                             use_cache=bool(getattr(config, 'num_kv_shared_layers', 0)))

    AttentionInterface.register('kvmix', attention)
    AttentionMaskInterface.register('kvmix', sdpa_mask)  # else the mask would silently be none
    source = {'gguf_file': args.gguf_file} if args.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **source)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation='kvmix', **source)
    model = model.to(args.device).eval()
    config = model.config.get_text_config()
    types = layer_types(config)
    return tokenizer, config, run


def layer_types(config):
    """"full_attention", "sliding_attention", "linear_attention" and so on, where a model says."""
    return getattr(config, 'layer_types', None) or getattr(config, 'layers_block_type', None) or []


def rope_theta(config):
    """0 where the model has none, or several."""
    theta = getattr(config, 'rope_theta', None)
    theta = theta or (getattr(config, 'rope_parameters', None) or {}).get('rope_theta')
    return theta if isinstance(theta, (int, float)) else 0


def dump(args):
    text = pathlib.Path(args.corpus).read_text(encoding='utf-8', errors='replace')
    tokenizer, config, run = load(args)
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    prompts = cut_prompts(ids, tokenizer('')['input_ids'], args.tokens, args.prompts, args.skip)
    about = {'model': args.name or pathlib.Path(args.model).name,
             'corpus': pathlib.Path(args.corpus).name, 'rope_theta': f'{rope_theta(config):.10g}'}
    lengths = [len(prompt) for prompt in prompts]
    attention = [i for i, kind in enumerate(layer_types(config))
                 if kind in ('attention', 'full_attention', 'sliding_attention')]
    with Recorder(args.output, config.num_hidden_layers, lengths, about, attention) as recorder:
        for i, prompt in enumerate(prompts, 1):
            progress(f'prompt {i} of {len(prompts)}')
            run(prompt, recorder.add)
            recorder.end_prompt()
    progress('')
    size = os.path.getsize(args.output) / 2**20
    print(f'{args.output}: {recorder.words()}, {size:.1f} MiB')


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_arguments():
    p = argparse.ArgumentParser('kvmix-dump', description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model', help='name or folder of a causal language model')
    p.add_argument('corpus', help='text file (UTF-8)')
    p.add_argument('-o', '--output', required=True, help='the safetensors file to write')
    p.add_argument('--tokens', type=positive, default=512,
                   help='length of a prompt (default: %(default)s)')
    p.add_argument('--prompts', type=positive, default=8,
                   help='number of prompts (default: %(default)s)')
    p.add_argument('--skip', type=int, default=0,
                   help='tokens of the text to leave out at its start')
    p.add_argument('--gguf-file', help='name of a GGUF file in the folder MODEL')
    p.add_argument('--name', help='model name for the metadata (default: the last part of MODEL)')
    p.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'],
                   help='that the model runs in (default: %(default)s)')
    p.add_argument('--device', default='cpu', help='torch device (default: %(default)s)')
    args = p.parse_args()
    if args.skip < 0:
        p.error(f'--skip {args.skip}: 0 or more')
    output = pathlib.Path(args.output)  # said now, not after the model has run
    if output.is_dir() or not output.parent.is_dir():
        p.error(f'-o {output}: expected a file in a folder that exists')
    return args


def main():
    args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        dump(args)
        return
    except KeyboardInterrupt:
        text = f'interrupted: {args.output} was not written, nothing is left of this run'
    except ImportError as error:
        text = f'{error}: pip install torch transformers'
    except OSError as error:  # transformers raises it too, without a number
        text = f'{error.filename or args.output}: {error.strerror}' if error.errno else str(error)
    except (InputError, ValueError) as error:
        text = str(error)
    progress('')
    sys.exit(f'kvmix-dump: error: {" ".join(text.split())}')


if __name__ == '__main__':
    main()
