"""Decoding on one GPU: tokens a second and memory, beside transformers' generate and flash-linear-attention's.

  python experiments/evaluation/decode_benchmark.py --out DIR          about 5 minutes on an H100 or H200

Models of the paper's 1B size, random weights in bfloat16, greedy; batches 1 and 64; contexts 1k to 64k. --tokens new
tokens are timed on the wall after a warm-up of the same shapes; reading the prompt is not timed.

ours          linscale.evaluation.generation as `linscale generate` runs it: blocks of 16 tokens in one jitted program.
              Linear models read a real prompt of the context's length (one row, its state copied to all rows); LLaMA's
              keys and values are random numbers.
transformers  LlamaForCausalLM.generate, SDPA, DynamicCache that holds random numbers of the context's length
fla           HGRN2ForCausalLM.generate; the difference between --tokens + 1 and 1 new tokens, so that the prompt drops
              out. Prompts that would not fit (more than 2^18 tokens in all) are cut; its state has the same size.

Memory is what the decoding step needs: for ours the compiled program's arguments, outputs and temporaries, for PyTorch
the peak of its allocator while decoding. Every piece runs in a process of its own, with a limit of time; results are
appended to DIR/decode.jsonl as they come.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PIECES = ("ours:hgrn2", "fla:hgrn2", "ours:llama", "transformers:llama", "ours:tnl")


def main():
    args = _parser().parse_args()
    if args.piece:
        return run_piece(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "decode.jsonl").write_text("")
    for piece in args.pieces.split(","):
        begin = time.perf_counter()
        environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--piece", piece],
                env=environment,
                timeout=args.seconds,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                _append(args, {"piece": piece, "error": (done.stderr or "").strip()[-600:]})
        except subprocess.TimeoutExpired:
            _append(args, {"piece": piece, "error": f"stopped after {args.seconds} s"})
        print(f"{piece}: {time.perf_counter() - begin:.0f} s", flush=True)
    print(table(out / "decode.jsonl"))


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", required=True)
    add("--pieces", default=",".join(PIECES))
    add("--batches", default="1,64")
    add("--contexts", default="1024,4096,16384,65536")
    add("--tokens", type=int, default=64)
    add("--size", default="1b", help="of linscale/models/sizes.py, or tiny")
    add("--unroll", type=int, default=0, help="layers a step of our loop over layers, 0: as config.model.unroll")
    add("--seconds", type=int, default=100, help="limit of a piece")
    add("--piece", help=argparse.SUPPRESS)
    return parser


def _append(args, row):
    with open(Path(args.out) / "decode.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def model_of(arch, args):
    import dataclasses

    from linscale.config import Model
    from linscale.models.sizes import paper_model

    if args.size == "tiny":
        return Model(
            arch=arch, layers=2, width=64, heads=2, ffn=96, vocab_size=264, dtype="bfloat16", unroll=args.unroll
        )
    return dataclasses.replace(paper_model(arch, args.size), dtype="bfloat16", unroll=args.unroll)


def run_piece(args):
    library, arch = args.piece.split(":")
    points = {"ours": ours, "transformers": transformers_llama, "fla": fla_hgrn2}[library](arch, args)
    free = next(points)  # bytes of the device
    model = model_of(arch, args)
    for batch in map(int, args.batches.split(",")):
        for context in map(int, args.contexts.split(",")):
            row = {"piece": args.piece, "batch": batch, "context": context}
            cached = 2 * 2 * model.layers * model.width * batch * (context + args.tokens)
            if arch == "llama" and free and cached > 0.9 * free:
                text = f"does not fit: keys and values alone take {cached / 1e9:.0f} GB of {free / 1e9:.0f} GB"
                _append(args, row | {"skipped": text})
                continue
            try:
                _append(args, row | points.send((batch, context)))
            except Exception as error:  # out of memory has a name of its own in every library
                _append(args, row | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
                points = {"ours": ours, "transformers": transformers_llama, "fla": fla_hgrn2}[library](arch, args)
                next(points)


def ours(arch, args):
    """A generator: gives the device's bytes, then for every (batch, context) sent its figures."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from linscale import models
    from linscale.evaluation import generation, scoring

    model = model_of(arch, args)
    params = jax.jit(lambda: generation.for_decoding(model, models.init(model, 0)))()
    device = jax.devices()[0]
    point = yield (device.memory_stats() or {}).get("bytes_limit", 0)
    sampling, programs, prefilled = generation.Sampling(), {}, {}

    @functools.partial(jax.jit, donate_argnums=0)  # in place: the largest caches fit once
    def noise(x):
        return jax.random.normal(jax.random.key(0), x.shape[2:], x.dtype) + jnp.zeros_like(x)

    blocks = -(-args.tokens // generation.BLOCK)
    while True:
        batch, context = point
        slots = context + (blocks + 1) * generation.BLOCK
        if arch == "llama":
            cache = models.init_cache(model, batch, slots)
            cache["layers"] = jax.tree.map(noise, cache["layers"])
        else:
            if context not in prefilled:
                prefilled[context] = _prefill_one_row(model, params, context)
            cache = scoring.fan_out(prefilled[context], batch)
        cache["position"] = jnp.int32(context)
        last, ended = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(0), row))(jnp.arange(batch))
        shape = (batch, slots if arch == "llama" else 0)
        begin = time.perf_counter()
        if shape not in programs:
            lowered = generation._decode.lower(model, params, cache, last, ended, keys, -1, 0, sampling)
            programs[shape] = lowered.compile()
        program = programs[shape]
        compiled = time.perf_counter() - begin
        used = program.memory_analysis()
        for n in range(blocks + 1):
            if n == 1:
                jax.block_until_ready(cache)
                begin = time.perf_counter()
            cache, last, ended, block = program(params, cache, last, ended, keys, -1, n * generation.BLOCK)
            block = np.asarray(block)
        seconds = time.perf_counter() - begin
        size = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
        state = sum(x.nbytes for x in jax.tree.leaves(cache["layers"]))
        del cache, block
        point = yield _figures(batch, blocks * generation.BLOCK, seconds, size - used.alias_size_in_bytes) | {
            "cache_bytes": state,
            "compile_seconds": round(compiled, 1),
            "device": str(device.device_kind),
        }


def _prefill_one_row(model, params, context):
    import jax.numpy as jnp
    import numpy as np

    from linscale import models
    from linscale.evaluation import generation

    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, context), np.int32)
    cache = models.init_cache(model, 1)
    step = min(4096, context)
    for at in range(0, context, step):
        cache, _ = generation._prefill(model, params, cache, jnp.asarray(tokens[:, at : at + step]))
    return cache


def _figures(batch, tokens, seconds, memory):
    return {
        "tokens_per_second": batch * tokens / seconds,
        "milliseconds_per_step": 1000 * seconds / tokens,
        "memory_bytes": int(memory),
    }


def _torch_device(torch):
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _timed(torch, device, run):
    """(seconds, peak bytes) of run()."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return time.perf_counter() - begin, peak


def transformers_llama(arch, args):
    import torch
    import transformers
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    model, device = model_of(arch, args), _torch_device(torch)
    config = LlamaConfig(
        hidden_size=model.width,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        vocab_size=model.vocab_size,
        max_position_embeddings=2**17,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    config._attn_implementation = "sdpa"
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        theirs = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    point = yield torch.cuda.mem_get_info()[1] if device.type == "cuda" else 0
    while True:
        batch, context = point

        def once(tokens, batch=batch, context=context):
            cache = DynamicCache()
            shape = (batch, model.heads, context, model.width // model.heads)
            for layer in range(model.layers):
                k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
                cache.update(k, v, layer)
            ids = torch.zeros((batch, context + 1), dtype=torch.long, device=device)
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            mask = torch.ones_like(ids)
            run = lambda: theirs.generate(ids, attention_mask=mask, past_key_values=cache, **options)  # noqa: E731
            with torch.no_grad():
                return _timed(torch, device, run)

        once(4)
        seconds, peak = once(args.tokens)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        version = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
        point = yield _figures(batch, args.tokens, seconds, peak) | version


def fla_hgrn2(arch, args):
    import fla
    import torch
    from fla.models import HGRN2Config, HGRN2ForCausalLM

    model, device = model_of(arch, args), _torch_device(torch)
    config = HGRN2Config(
        hidden_size=model.width,
        intermediate_size=model.ffn,
        num_hidden_layers=model.layers,
        num_heads=model.heads,
        expand_ratio=model.width // model.heads,
        vocab_size=model.vocab_size,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.device(device):
        theirs = HGRN2ForCausalLM(config).to(torch.bfloat16).eval()
    point = yield torch.cuda.mem_get_info()[1] if device.type == "cuda" else 0
    while True:
        batch, context = point
        prompt = max(128, min(context, 2**18 // batch))
        ids = torch.randint(0, model.vocab_size, (batch, prompt), device=device)

        def once(tokens, ids=ids):
            options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            with torch.no_grad():
                return _timed(torch, device, lambda: theirs.generate(ids, use_cache=True, **options))

        once(2)
        one, _ = once(1)
        seconds, peak = once(args.tokens + 1)
        row = _figures(batch, args.tokens, seconds - one, peak) | {"prompt": prompt}
        row["memory_note"] = "the prompt's activations included"
        version = {"versions": {"torch": torch.__version__, "fla": getattr(fla, "__version__", "?")}}
        point = yield row | version


def table(path: Path) -> str:
    """Markdown: a line a batch and context, a column a library and model: tokens/s, ms a step, GB."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    pieces = list(dict.fromkeys(row["piece"] for row in rows))
    points = dict.fromkeys((row["batch"], row["context"]) for row in rows if "batch" in row)
    cells = {(row["piece"], row.get("batch"), row.get("context")): row for row in rows}

    def cell(piece, batch, context):
        row = cells.get((piece, batch, context), {})
        if "tokens_per_second" in row:
            return (
                f"{row['tokens_per_second']:,.0f} tokens/s, {row['milliseconds_per_step']:.2f} ms, "
                f"{row['memory_bytes'] / 1e9:.1f} GB"
            )
        return row.get("skipped") or row.get("error", "")[:80] or "not measured"

    out = [f"| batch | context | {' | '.join(pieces)} |", "|---|---|" + "---|" * len(pieces)]
    for batch, context in points:
        out.append(f"| {batch} | {context:,} | {' | '.join(cell(piece, batch, context) for piece in pieces)} |")
    out += [f"\n{row['piece']}: {row['error']}" for row in rows if "batch" not in row]
    return "\n".join(out)


if __name__ == "__main__":
    main()
