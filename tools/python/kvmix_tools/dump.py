"""Dumps K, V and Q of a Hugging Face model as it reads a text, for kvmix-tune.

  kvmix-dump Qwen/Qwen2.5-0.5B corpus.txt -o qwen.safetensors --prompts 8 --tokens 512

MODEL is what transformers' from_pretrained takes: a name or a folder (with --gguf-file: the folder of a GGUF file). The text is cut
into prompts of --tokens tokens, each read by one prefill. What is written is what attention sees: K and V after RoPE and QK-norm,
not repeated over the GQA group, and Q likewise, as fp16.

Calibrate at the length that will be served: RoPE turns slow channels, so means of short prompts do not hold for long ones. For a
holdout, take another text, or the same one with --skip.

The file is a safetensors file: tensors layers.N.k|v|q, F16, [tokens, heads, head_dim], prompts one after the other; the metadata
name the model, the corpus and the geometry (lib/include/kvmix/dump.h). Needs: pip install torch transformers (and for GGUF files:
gguf accelerate).
"""
import argparse
import json
import os
import pathlib
import struct
import sys

import numpy as np


class DumpError(Exception):
    """What is wrong, in one line."""


def cut_prompts(ids, prefix, tokens, prompts, skip=0):
    """`prompts` lists of `tokens` ids each: `prefix` (what the tokenizer puts before every text) and the next ids after `skip`."""
    step = tokens - len(prefix)
    if step < 1:
        raise DumpError(f'--tokens {tokens}: more than the {len(prefix)} that the tokenizer puts before every text are needed')
    if skip + prompts * step > len(ids):
        raise DumpError(f'the text has {len(ids)} tokens, --skip {skip} and {prompts} prompts of {tokens} take {skip + prompts * step}')
    return [prefix + ids[start:start + step] for start in range(skip, skip + prompts * step, step)]


class Recorder:
    """Collects what attention sees, layer by layer and prompt by prompt."""

    def __init__(self):
        self.parts = {}  # (layer, 'k' | 'v' | 'q') -> one [tokens, heads, head_dim] per prompt
        self.scale = None

    def add(self, layer, q, k, v, scale, window=None):
        """q, k, v: [heads, tokens, head_dim] f32. scale: on q.k, before softmax. window: tokens that a query sees, None: all."""
        tokens = k.shape[1]
        if window is not None and window < tokens:
            raise DumpError(f'layer {layer} attends over a window of {window} tokens: --tokens {window} at most')
        if v.shape != k.shape or q.shape[1:] != k.shape[1:] or q.shape[0] % k.shape[0]:
            raise DumpError(f'layer {layer}: q {q.shape}, k {k.shape}, v {v.shape} [heads, tokens, head_dim] are not grouped-query attention')
        if self.scale is not None and scale != self.scale:
            raise DumpError(f'layer {layer} has attention scale {scale}, others {self.scale}: a dump has one')
        self.scale = scale
        for name, x in (('k', k), ('v', v), ('q', q)):
            with np.errstate(over='ignore'):
                half = np.ascontiguousarray(x.transpose(1, 0, 2), np.float16)
            if not np.isfinite(half).all():
                raise DumpError(f'layer {layer}: {name} has values beyond fp16 (max {np.abs(x).max():g})')
            self.parts.setdefault((layer, name), []).append(half)

    def tensors(self):
        """{'layers.0.k': [tokens, heads, head_dim], ...}, all layers, all prompts joined."""
        layers = sorted({layer for layer, _ in self.parts})
        if not layers or layers != list(range(len(layers))):
            raise DumpError(f'attention ran in the layers {layers}; every layer of the model must have it')
        joined = {f'layers.{layer}.{name}': np.concatenate(self.parts[layer, name]) for layer in layers for name in 'kvq'}
        for name, x in joined.items():
            first = joined[f'layers.0.{name[-1]}']
            if x.shape != first.shape:
                raise DumpError(f'{name} is {x.shape}, layer 0 {first.shape}: a dump has one shape for all layers')
        return joined


def metadata(tensors, model, corpus, prompt_tokens, rope_theta, scale):
    tokens, kv_heads, head_dim = tensors['layers.0.k'].shape
    return {'format': 'kvmix-dump-1', 'model': model, 'corpus': corpus, 'layers': str(len(tensors) // 3), 'tokens': str(tokens),
            'prompt_tokens': ','.join(map(str, prompt_tokens)), 'kv_heads': str(kv_heads),
            'query_heads': str(tensors['layers.0.q'].shape[1]), 'head_dim': str(head_dim), 'rope_theta': f'{rope_theta:.10g}',
            'attention_scale': repr(float(scale))}


def write_safetensors(path, tensors, meta):
    """Writes fp16 arrays: header length (8 bytes), JSON header padded to 8 bytes, data. `path` is whole or untouched."""
    header, at = {'__metadata__': meta}, 0
    for name, x in tensors.items():
        header[name] = {'dtype': 'F16', 'shape': list(x.shape), 'data_offsets': [at, at + x.nbytes]}
        at += x.nbytes
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    part = pathlib.Path(f'{path}.part')
    try:
        with open(part, 'wb') as file:
            file.write(struct.pack('<Q', len(text)) + text)
            for x in tensors.values():
                file.write(x.astype('<f2', copy=False).tobytes())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load(args, recorder):
    """Tokenizer and model, whose attention goes through the recorder."""
    try:
        import torch
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    except ImportError as error:
        raise DumpError(f'{error}: pip install torch transformers') from error

    def attention(module, query, key, value, mask, scaling=None, sliding_window=None, **rest):
        for what, name in (('softcap', 'a soft cap'), ('s_aux', 'attention sinks'), ('position_bias', 'a position bias')):
            if rest.get(what) is not None:
                raise DumpError(f'layer {module.layer_idx} attends with {name}, which a dump does not describe')
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        recorder.add(module.layer_idx, *(x[0].float().cpu().numpy() for x in (query, key, value)), scale, sliding_window)
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, sliding_window=sliding_window, **rest)

    AttentionInterface.register('kvmix', attention)
    AttentionMaskInterface.register('kvmix', sdpa_mask)  # without it the mask would silently be none
    source = {'gguf_file': args.gguf_file} if args.gguf_file else {}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **source)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype), attn_implementation='kvmix', **source)
    return tokenizer, model.to(args.device).eval()


def rope_theta(config):
    """0 where the model has none, or several."""
    theta = getattr(config, 'rope_theta', None) or (getattr(config, 'rope_parameters', None) or {}).get('rope_theta')
    return theta if isinstance(theta, (int, float)) else 0


def dump(args):
    recorder = Recorder()
    text = pathlib.Path(args.corpus).read_text(encoding='utf-8', errors='replace')
    tokenizer, model = load(args, recorder)
    import torch
    ids = tokenizer(text, add_special_tokens=False)['input_ids']
    prompts = cut_prompts(ids, tokenizer('')['input_ids'], args.tokens, args.prompts, args.skip)
    for i, prompt in enumerate(prompts):
        if sys.stderr.isatty():
            print(f'\rprompt {i + 1} of {len(prompts)}', end='', file=sys.stderr, flush=True)
        with torch.inference_mode():  # the body without the head: nobody needs the logits
            model.base_model(input_ids=torch.tensor([prompt], device=args.device), use_cache=False)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    tensors = recorder.tensors()
    meta = metadata(tensors, args.name or pathlib.Path(args.model).name, pathlib.Path(args.corpus).name, [len(p) for p in prompts],
                    rope_theta(model.config.get_text_config()), recorder.scale)
    write_safetensors(args.output, tensors, meta)
    print(f'{args.output}: {meta["layers"]} layers, {meta["tokens"]} tokens, {meta["kv_heads"]} KV heads and {meta["query_heads"]} query heads '
          f'x {meta["head_dim"]}, {os.path.getsize(args.output) / 2**20:.1f} MiB')


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_arguments(argv=None):
    p = argparse.ArgumentParser('kvmix-dump', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model', help='name or folder of a causal language model')
    p.add_argument('corpus', help='text file (UTF-8)')
    p.add_argument('-o', '--output', required=True, help='the safetensors file to write')
    p.add_argument('--tokens', type=positive, default=512, help='length of a prompt (default: %(default)s)')
    p.add_argument('--prompts', type=positive, default=8, help='number of prompts (default: %(default)s)')
    p.add_argument('--skip', type=int, default=0, help='tokens of the text to leave out at its start')
    p.add_argument('--gguf-file', help='name of a GGUF file in the folder MODEL')
    p.add_argument('--name', help='model name for the metadata (default: the last part of MODEL)')
    p.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16', 'float16'], help='that the model runs in (default: %(default)s)')
    p.add_argument('--device', default='cpu', help='torch device (default: %(default)s)')
    args = p.parse_args(argv)
    if args.skip < 0:
        p.error(f'--skip {args.skip}: 0 or more')
    folder = pathlib.Path(args.output).parent
    if not folder.is_dir():  # said now, not after the model has run
        p.error(f'-o {args.output}: no folder {folder}')
    return args


def main():
    args = parse_arguments()
    try:
        dump(args)
    except (DumpError, OSError, ValueError) as error:
        print(f'kvmix-dump: error: {error}', file=sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    main()
