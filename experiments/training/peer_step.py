"""Throughput of one training step of a peer, PyTorch's way: the other column of step_benchmark.py.

    python experiments/training/peer_step.py --model transformers-llama --layers 24 --width 1024 --ffn 2560 --batch 16

float32 master weights, bfloat16 autocast, clip at 1, fused AdamW, torch.compile where the peer's own documents use it
(transformers' LLaMA with SDPA attention; fla's models hold fused Triton kernels and run as they come). Random tokens,
one document a row: the peers have no document masks here, which is in their favour. Models:
transformers-llama, fla-retnet (fixed decay per head, beside TNL), fla-hgrn2, fla-linear (no decay, beside cosFormer2).
One JSON line: tokens/s of --steps steps after two warm-up steps, peak memory, seconds to the first step (tuning and
compiling included).

fla tunes by compiling hundreds of programs one after the other. --compilers N first compiles them by N processes into
Triton's cache; the tuning itself then runs alone and chooses as it always does. Seconds to the first step include both.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path


def make(args):
    heads = args.width // args.head_dim
    size = {"hidden_size": args.width, "num_hidden_layers": args.layers, "intermediate_size": args.ffn}
    size |= {"vocab_size": args.vocab_size, "tie_word_embeddings": False, "use_cache": False}
    if args.model == "transformers-llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(num_attention_heads=heads, max_position_embeddings=args.sequence, **size)
        config._attn_implementation = "sdpa"
        return LlamaForCausalLM(config)
    if args.model == "fla-retnet":
        from fla.models import RetNetConfig, RetNetForCausalLM

        return RetNetForCausalLM(RetNetConfig(num_heads=heads, expand_k=1.0, expand_v=1.0, **size))
    if args.model == "fla-hgrn2":
        from fla.models import HGRN2Config, HGRN2ForCausalLM

        return HGRN2ForCausalLM(HGRN2Config(expand_ratio=args.head_dim, **size))
    from fla.models import LinearAttentionConfig, LinearAttentionForCausalLM

    return LinearAttentionForCausalLM(LinearAttentionConfig(num_heads=heads, attn_mode="chunk", **size))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["transformers-llama", "fla-retnet", "fla-hgrn2", "fla-linear"]
    parser.add_argument("--model", choices=models, default=models[0])
    for name, default in {"layers": 24, "width": 1024, "ffn": 2560, "head-dim": 128, "vocab-size": 50_304}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"batch": 16, "sequence": 2048, "steps": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--compilers", type=int, default=0, help="processes that compile fla's programs beforehand")
    parser.add_argument("--share", help=argparse.SUPPRESS)  # i/n: of such a process
    args = parser.parse_args()

    began = time.perf_counter()
    if args.compilers:
        command = [sys.executable, __file__, *sys.argv[1:], "--compilers", "0", "--share"]
        compilers = [subprocess.Popen([*command, f"{i}/{args.compilers}"]) for i in range(args.compilers)]
        for process in compilers:
            process.wait()
    if args.share:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
        from gpu_benchmark_peer import compile_instead

        compile_instead(*map(int, args.share.split("/")))
        args.layers, args.sequence = 1, min(args.sequence, 1024)  # programs are the same
    import torch

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    model = make(args).cuda()
    parameters = sum(p.numel() for p in model.parameters())
    compiles = args.compile if args.compile is not None else args.model.startswith("transformers")
    run = torch.compile(model) if compiles else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    frequency = 1 / torch.arange(3, args.vocab_size + 3, device="cuda")  # as step_benchmark.py draws them
    batches = torch.multinomial(frequency, 4 * args.batch * args.sequence, True).view(4, args.batch, args.sequence)

    def step(i):
        tokens = batches[i % 4]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    first_loss = float(step(0))
    if args.share:
        return
    first_step = time.perf_counter() - began
    step(1)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for i in range(args.steps):
        loss = step(i)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / args.steps
    row = {
        "arch": args.model,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "compiled": compiles,
        "parameters": parameters,
        "batch": args.batch,
        "sequence": args.sequence,
        "tokens_per_s": args.batch * args.sequence / seconds,
        "step_ms": 1e3 * seconds,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "first_step_s": first_step,
        "losses": [first_loss, float(loss)],
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
