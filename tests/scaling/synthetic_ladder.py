"""A ladder of run directories with made-up but plausible curves: what the trainer writes, without training."""

import dataclasses
import json
import math

import numpy as np

from linscale.config import Config, Model, Optimizer, Train
from linscale.scaling import flops

SHAPES = ((2, 48, 3, 128), (2, 80, 5, 224), (3, 112, 7, 304), (4, 144, 9, 384), (4, 192, 6, 512))
ARCHS = ("llama", "tnl", "hgrn2", "cosformer2")
# E, A, alpha, B, beta of L(N, D) = E + A N^-alpha + B D^-beta; bytes, so the losses are those of characters
SURFACES = {
    "llama": (0.45, 7.0, 0.20, 38.0, 0.29),
    "tnl": (0.45, 6.8, 0.20, 36.0, 0.29),
    "hgrn2": (0.45, 6.6, 0.20, 33.0, 0.29),
    "cosformer2": (0.45, 7.4, 0.20, 37.0, 0.29),
}


def write_run(folder, config, loss_of_tokens, *, finished=True, noise=0.0, seed=0, data=None):
    """One run directory. loss_of_tokens: held-out loss at an array of token counts; training loss gets more noise."""
    path = folder / config.name
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    counted = flops.count_parameters(config.model)
    per_token = flops.flops_per_token(config.model, config.train.sequence)
    description = {
        "linscale": "0.1.0",
        "name": config.name,
        "config": dataclasses.asdict(config),
        "parameters": dataclasses.asdict(counted),
        "data": data or {"fingerprint": "5b1c", "bytes_per_token": 1.0, "tokenizer": "bytes", "vocab_size": 264},
        "flops_per_token": per_token,
        "accounting": "exact",
    }
    (path / "config.json").write_text(json.dumps(description))
    steps, per_step = config.steps, config.tokens_per_step
    speed = 4e10 / per_token
    shift = rng.normal(0, noise)  # of the whole run: its seed
    heldout_steps = sorted({max(1, round(steps ** (k / 8))) for k in range(1, 9)})
    lines = []
    for step in range(1, steps + 1):
        tokens = step * per_step
        totals = {"step": step, "tokens": tokens, "flops": tokens * per_token}
        loss = float(loss_of_tokens(np.array(float(tokens)))) * math.exp(shift)
        if step % config.train.log_every == 0 or step == steps:
            lines.append(
                totals
                | {"loss": loss * math.exp(rng.normal(0, 5 * noise)), "grad_norm": 0.8, "lr": 3e-4}
                | {"tokens_per_s": speed * rng.uniform(0.9, 1.1), "mfu": None, "seconds": tokens / speed}
            )
        if step in heldout_steps:
            lines.append(totals | {"heldout_loss": loss, "heldout_bpb": loss / math.log(2)})
    if not finished:
        lines = lines[: len(lines) // 2]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text if finished else text[:-20])  # killed while it wrote a line
    if finished:
        last = [line for line in lines if "heldout_loss" in line][-1]
        (path / "DONE.json").write_text(json.dumps(last | {"seconds": last["tokens"] / speed}))
    return path


def rung(arch, shape, name=None, tokens_per_parameter=6.0, floor=400_000):
    layers, width, heads, ffn = shape
    model = Model(arch=arch, layers=layers, width=width, heads=heads, ffn=ffn)
    parameters = flops.count_parameters(model).nonembedding
    tokens = max(floor, int(tokens_per_parameter * parameters))
    return Config(
        name=name or f"{arch}-{parameters // 1000}k",
        model=model,
        train=Train(tokens=tokens, batch=16, sequence=256),
        optimizer=Optimizer(warmup_tokens=20_000),
    )


def write_ladder(folder, archs=ARCHS, shapes=SHAPES, noise=0.004, seed=0):
    """The whole ladder: architectures x shapes. Returns the folder."""
    names = []
    for i, arch in enumerate(archs):
        e, a, alpha, b, beta = SURFACES[arch]
        for j, shape in enumerate(shapes):
            config = rung(arch, shape)
            n = flops.count_parameters(config.model).nonembedding

            def loss(tokens, n=n, e=e, a=a, alpha=alpha, b=b, beta=beta):
                late = e + a * n**-alpha + b * tokens**-beta
                return math.log(264) - np.logaddexp(0, 3 * (math.log(264) - late)) / 3  # begins at ln(vocabulary)

            write_run(folder, config, loss, noise=noise, seed=seed + 100 * i + j)
            names.append(config.name)
    (folder / "ladder.json").write_text(json.dumps({"recipe": "configs/demo.py", "runs": names}))
    return folder
