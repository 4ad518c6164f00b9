"""Dumps K, V and Q of a Hugging Face model as it reads a text, for kvmix-tune. For example:

  kvmix-dump Qwen/Qwen2.5-0.5B corpus.txt -o qwen.safetensors --prompts 8 --tokens 512

MODEL is what transformers' from_pretrained takes: a name or a folder (with --gguf-file: the folder
of a GGUF file). The text is cut into prompts of --tokens tokens, each read by one prefill. What is
written is what attention sees: K and V after RoPE and QK-norm, not repeated over the GQA group, and
Q likewise, as fp16.

Calibrate at the length that will be served: RoPE turns slow channels, so means of short prompts do
not hold for long ones. For a holdout, take another text, or the same one with --skip.

The file is a safetensors file: tensors layers.N.k|v|q, F16, [tokens, heads, head_dim], prompts one
after the other; the metadata name the model, the corpus and the geometry
(lib/include/kvmix/dump.h). Layers are written as they come, to a file in OUTPUT.*.part; it becomes
OUTPUT when it is whole. Needs: pip install torch transformers (for GGUF files: gguf accelerate).
"""
import argparse
import contextlib
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


def header(shapes, metadata):
    """How a safetensors file of fp16 tensors begins: the length of the JSON, and the JSON."""
    entries, at = {'__metadata__': metadata}, 0
    for name, shape in shapes.items():
        end = at + 2 * math.prod(shape)
        entries[name] = {'dtype': 'F16', 'shape': shape, 'data_offsets': [at, end]}
        at = end
    text = json.dumps(entries).encode()
    text += b' ' * (-len(text) % 8)
    return struct.pack('<Q', len(text)) + text


class Recorder(contextlib.ExitStack):
    """Writes what attention sees to its place in a dump. `with` gives the file its name at the end,
    or removes what was written."""

    def __init__(self, path, layers, prompt_tokens, about):
        """prompt_tokens: of each prompt. about: model, corpus and rope_theta, for the metadata."""
        super().__init__()
        self.file = self.enter_context(written_whole(path))
        self.layers, self.prompt_tokens, self.tokens = layers, prompt_tokens, sum(prompt_tokens)
        self.meta = {'format': 'kvmix-dump-1', **about}
        self.shape = self.scale = None  # of all layers: those of the first
        self.prompt, self.row, self.ran = 0, 0, []  # the prompt, its first row, layers that it saw

    def begin(self, query_heads, kv_heads, head_dim, scale):
        """Writes the header: the first layer of the first prompt tells what it must say."""
        self.shape, self.scale = (query_heads, kv_heads, head_dim), scale
        geometry = {
            'layers': self.layers, 'tokens': self.tokens,
            'prompt_tokens': ','.join(map(str, self.prompt_tokens)), 'kv_heads': kv_heads,
            'query_heads': query_heads, 'head_dim': head_dim, 'attention_scale': float(scale)}
        self.meta |= {name: str(value) for name, value in geometry.items()}
        heads = {'k': kv_heads, 'v': kv_heads, 'q': query_heads}
        shapes = {f'layers.{layer}.{name}': (self.tokens, count, head_dim)
                  for layer in range(self.layers) for name, count in heads.items()}
        self.header_size = self.file.write(header(shapes, self.meta))

    def add(self, layer, q, k, v, scale, window=None):
        """q, k, v: [heads, tokens, head_dim] f32. scale: on q.k, before softmax. window: tokens
        that a query sees, None: all."""
        import numpy as np  # (comes with transformers)
        tokens = self.prompt_tokens[self.prompt]
        if window is not None and window < tokens:
            raise InputError(f'layer {layer} attends over a window of {window} tokens: '
                             f'--tokens {window} at most')
        if v.shape != k.shape or q.shape[1:] != k.shape[1:] or q.shape[0] % k.shape[0]:
            raise InputError(f'layer {layer}: q {q.shape}, k {k.shape}, v {v.shape} '
                             '[heads, tokens, head_dim] are not grouped-query attention')
        if k.shape[1] != tokens:
            raise InputError(f'layer {layer}: expected the {tokens} tokens of the prompt, '
                             f'found {k.shape[1]}')
        shape = q.shape[0], k.shape[0], k.shape[2]
        if self.shape is None:
            self.begin(*shape, scale)
        if shape != self.shape:
            raise InputError(f'layer {layer} has {shape} query heads, KV heads, head_dim, others '
                             f'{self.shape}: a dump has one shape for all layers')
        if scale != self.scale:
            raise InputError(f'layer {layer} has attention scale {scale}, others {self.scale}: '
                             'a dump has one')
        at = self.header_size + layer * self.tokens * (q[:, 0].size + 2 * k[:, 0].size) * 2
        for name, x in (('k', k), ('v', v), ('q', q)):
            with np.errstate(over='ignore'):
                half = np.ascontiguousarray(x.transpose(1, 0, 2), '<f2')
            if not np.isfinite(half).all():
                raise InputError(f'layer {layer}: {name} has values beyond fp16 '
                                 f'(max {np.abs(x).max():g})')
            self.file.seek(at + self.row * half[0].nbytes)
            self.file.write(half)
            at += self.tokens * half[0].nbytes
        self.ran.append(layer)

    def end_prompt(self):
        """The first prompt tells already whether every layer has attention, once."""
        if sorted(self.ran) != list(range(self.layers)):
            raise InputError(f'attention ran in the layers {sorted(self.ran)} of {self.layers}; '
                             'every layer of the model must have it')
        self.row += self.prompt_tokens[self.prompt]
        self.prompt, self.ran = self.prompt + 1, []


def load(args):
    """The tokenizer, the model's configuration, and run(prompt, add): one prefill, whose attention
    goes through `add` (of a Recorder)."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    listener = None

    def attention(module, query, key, value, mask, scaling=None, sliding_window=None, **rest):
        for what, name in (('softcap', 'a soft cap'), ('s_aux', 'attention sinks'),
                           ('position_bias', 'a position bias')):
            if rest.get(what) is not None:
                raise InputError(f'layer {module.layer_idx} attends with {name}, which a dump does '
                                 'not describe')
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        arrays = (x[0].float().cpu().numpy() for x in (query, key, value))
        listener(module.layer_idx, *arrays, scale, sliding_window)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling,
                                      sliding_window=sliding_window, **rest)

    def run(prompt, add):
        nonlocal listener
        listener = add
        with torch.inference_mode():  # the body without the head: nobody needs the logits
            model.base_model(input_ids=torch.tensor([prompt], device=args.device), use_cache=False)

    AttentionInterface.register('kvmix', attention)
    AttentionMaskInterface.register('kvmix', sdpa_mask)  # else the mask would silently be none
    source = {'gguf_file': args.gguf_file} if args.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **source)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, args.dtype), attn_implementation='kvmix', **source)
    model = model.to(args.device).eval()
    return tokenizer, model.config.get_text_config(), run


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
    with Recorder(args.output, config.num_hidden_layers, lengths, about) as recorder:
        for i, prompt in enumerate(prompts, 1):
            progress(f'prompt {i} of {len(prompts)}')
            run(prompt, recorder.add)
            recorder.end_prompt()
    progress('')
    size = os.path.getsize(args.output) / 2**20
    print('{}: {layers} layers, {tokens} tokens, {kv_heads} KV heads and {query_heads} query heads '
          'x {head_dim}, {:.1f} MiB'.format(args.output, size, **recorder.meta))


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
