"""Memory of a train step by counting, in the time of a multiplication: to order the settings that a search tries, and for
chips whose compiler is not at hand.

Letters: t tokens of a micro-batch on one device, d width, g inner width of the gated linear unit, V vocabulary.

Counted per device: the state and gradients as they are sharded; what the forward pass leaves for the backward in each
layer (by remat policy); the working set of the layer that is being differentiated; the weights of one layer gathered
over fsdp in bfloat16 and their gradient in float32; the slice of logits. Arrays whose channels the tensor axis splits
are divided by it. The TPU compiler's own figures
were 0.70 to 1.21 of these at the three 7B plans of experiments/plan/reports/2026-11-26_7b_pods.md.
"""

import math

from linscale.config import Config

KEPT = {"full": (1, 0, 0), "dots": (2, 6, 3), "none": (6, 14, 5)}  # arrays of [t,d] whole, [t,d] and [t,g] split
GATES = {"llama": 2, "hgrn2": 6, "tnl": 2, "cosformer2": 2, "hybrid": 2}  # more [t,d] split: float32 gates count twice
LOGITS = 2**27  # elements of a slice of logits, see linscale.kernels.cross_entropy


def temporary_bytes(config: Config, mesh: dict[str, int], parameters: int) -> float:
    """Bytes on a device beyond the state. parameters: bytes of float32 parameters on a device."""
    m, t = config.model, config.train
    split, rows = mesh["tensor"], mesh["data"] * mesh["fsdp"]
    tokens = t.batch / t.accumulation * t.sequence / (rows * mesh["sequence"])
    whole, narrow, wide = KEPT[m.remat]
    layer = 4 * m.width**2 + 3 * m.width * m.ffn
    per_layer = 2 * tokens * (whole * m.width + (narrow * m.width + wide * m.ffn) / split)
    if m.remat == "none":
        per_layer += 2 * tokens * GATES[m.arch] * m.width / split
    working = 2 * tokens * (8 * m.width + ((20 + GATES[m.arch]) * m.width + 8 * m.ffn) / split)
    gathered = 2 * (2 + 4) * layer / split + (2 + 4 + 4) * m.vocab_size * m.width / split
    logits = 3 * 4 * min(LOGITS, tokens * m.vocab_size) / split
    gradients = parameters * (2 if t.accumulation > 1 else 1)
    return m.layers * per_layer + working + gathered + logits + gradients


def memory_traffic(config: Config, mesh: dict[str, int], parameters: int) -> float:
    """Bytes that a device moves at least in a step: weights for every pass, activations written and read, the update."""
    m, t = config.model, config.train
    devices = math.prod(mesh.values())
    tokens = t.batch * t.sequence * mesh["tensor"] / devices
    passes = 3 if m.remat == "none" else 4
    layers = m.layers * (4 * m.width**2 + 3 * m.width * m.ffn) / mesh["tensor"]
    weights = t.accumulation * passes * 2 * (layers + m.vocab_size * m.width / mesh["tensor"])
    _, narrow, wide = KEPT["none"]
    activations = (
        passes * 2 * 2 * tokens * m.layers * (2 * m.width + (narrow * m.width + wide * m.ffn) / mesh["tensor"])
    )
    update = 8 * parameters  # gradient, both moments and parameters read, moments and parameters written, clip's norm
    return weights + activations + update
