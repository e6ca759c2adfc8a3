"""Parameters and floating point operations of a model: the paper's accounting and the exact one.

Letters: l layers, d width, h heads, e = d/h head dim, g inner width of the gated linear unit, V vocabulary,
n sequence length, b sequences a step. A multiply-add is 2 operations; backward is twice the forward, so a training
step is 3 forwards.

**Paper's accounting** (arXiv 2406.16690, tables 1 and 7, appendix A.1). It is what the paper's coefficients were
fitted with: softmax attention counted over the full n x n square, embedding and output head left out.
Two different forms of its formulas print the digits of its table 7, and both are needed:
- parameters: the full forms of the appendix with the actual g, without the embedding (table 1 puts 8/3 d for g, which
  is 8 % short at 70M);
- FLOPs: the short forms of table 1, with g = 8/3 d and without embedding and head. With the actual g LLaMA's figures
  miss at 70M, 410M, 3B and 7B; with the softmax that table 1 drops they miss from 410M on; the head would add 2.4 (70M)
  to 19.4 (7B) PFLOPs. The small terms in 1/d, and the TPE of cosFormer2 that table 1 drops, change no printed digit.

**Exact accounting** counts the matrices that this project multiplies: causal softmax attention over the mean causal
length (n + 1)/2, linear mixers at the minimum of the recurrent form, the output head, no input embedding (a look-up).
Element-wise work (norms, activations, gates, rotary embedding, softmax, loss) is not counted, nor what a chunked kernel
or rematerialisation computes in addition. Rows are counted as one document: packing several into a row makes
softmax attention cheaper than stated.

No jax in this file: the command line imports it.
"""

import dataclasses

from linscale.config import ConfigError, Model

PF_DAY = 1e15 * 86_400  # operations in one PFLOP/s-day, the paper's unit of compute


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. Fitted exponents depend on which of them is called N, so every output names it."""

    total: int  # every entry of the parameter tree
    nonembedding: int  # total without embedding and head
    nonembedding_with_head: int  # nonembedding + V d of the output head; equals total where the embedding is tied
    nonembedding_paper: int  # the paper's formula, see paper_parameters


def count_parameters(model: Model) -> Parameters:
    """Parameters of `linscale.models.init(model)` without making them, and the paper's count of the same sizes."""
    embedding = model.vocab_size * model.width
    nonembedding = sum(_layer_parameters(model, kind) for kind in layer_kinds(model)) + _extra_parameters(model)
    return Parameters(
        total=embedding * (1 if model.tied else 2) + nonembedding,
        nonembedding=nonembedding,
        nonembedding_with_head=nonembedding + embedding,
        nonembedding_paper=paper_parameters(model),
    )


def layer_kinds(model: Model) -> tuple[str, ...]:
    """The token mixer of each layer. In the hybrid, layer i (from 0) is llama if softmax_every divides i + 1."""
    if model.arch == "hybrid":
        return tuple("tnl" if (i + 1) % model.softmax_every else "llama" for i in range(model.layers))
    return (model.arch,) * model.layers


def _layer_parameters(model: Model, kind: str) -> int:
    d, e, g = model.width, model.width // model.heads, model.ffn
    own = {
        "llama": 2 * d,  # RMSNorm before attention and before the feed-forward
        "tnl": 2 * d * e,  # low-rank output gate d -> e -> d; norms have no parameters
        "hgrn2": d,  # logits of the lower bounds
        "cosformer2": 2 * d * e + d,  # output gate, theta
    }
    return 4 * d * d + 3 * d * g + own[kind]


def _extra_parameters(model: Model) -> int:
    """Once a model: the final RMSNorm of llama, the position encoding (TPE) of cosFormer2. Embedding not included."""
    d = model.width
    return {"llama": d, "cosformer2": d * (d // model.heads)}.get(model.arch, 0)


def flops_per_token(model: Model, sequence: int) -> float:
    """Exact accounting, forward + backward, of one token in a row of `sequence` tokens."""
    if sequence < 1:
        raise ConfigError(f"sequence is {sequence}; it must be at least 1.")
    d, e = model.width, model.width // model.heads
    forward = 2.0 * model.vocab_size * d  # output head
    for kind in layer_kinds(model):
        forward += 2 * (4 * d * d + 3 * d * model.ffn) + _mixer_flops(d, e, kind, sequence)
    if model.arch == "cosformer2":
        forward += 5 * d * e  # TPE, e states a channel: decay 1, update 2, read 2
    return 3 * forward


def _mixer_flops(d: int, e: int, kind: str, sequence: int) -> float:
    """One layer's token mixing and gate, one token, forward. The state of a head is e x e (cosFormer2: 2e x e)."""
    gate = 2 * (2 * d * e)  # d -> e -> d
    return {
        "llama": 4 * d * (sequence + 1) / 2,  # q k^T and a v, over the mean causal length
        "tnl": gate + 5 * d * e,  # decay 1, update 2, read 2
        "hgrn2": 5 * d * e,
        "cosformer2": gate + 2 * 4 * d * e,  # cos and sin rows; no decay
    }[kind]


def paper_parameters(model: Model) -> int:
    """The paper's non-embedding count. All digits of its table 7 for LLaMA, TNL, HGRN2; cosFormer2 within 0.13 %.

    Appendix A.1 with the embedding left out: 4ld^2 + 3ldg, and 2ld^2/h (TNL), ld (HGRN2), 2ld^2/h + d^2/h
    (cosFormer2). LLaMA's printed numbers need 4ld more than its printed formula; it is added here. cosFormer2's exceed
    its formula by up to 0.9 M; 7ld more would give five sizes of six, but no text supports it, so it is left out.
    The paper's fits of N_opt use the same with g = 8/3 d (12ld^2 + ...).
    """
    d, g, t = model.width, model.ffn, model.width // model.heads
    own = {"llama": 4 * d, "tnl": 2 * d * t, "hgrn2": d, "cosformer2": 2 * d * t}
    layers = sum(4 * d * d + 3 * d * g + own[kind] for kind in layer_kinds(model))
    return layers + (d * t if model.arch == "cosformer2" else 0)


def paper_flops_per_step(model: Model, batch: int = 480, sequence: int = 8192) -> float:
    """The paper's FLOPs of a step (its table 1), which prints all 24 figures of table 7. The hybrid: layer by layer.

    72 b n l d^2 (1 + x), with x = n/(6d) + 5/(18d) for LLaMA (full n x n), 1/(2h) + 5/(18d) for TNL,
    1/(3h) + 29/(72d) for HGRN2, 3/(4h) + 23/(72d) for cosFormer2.
    """
    if batch < 1 or sequence < 1:
        raise ConfigError(f"--batch is {batch} and --sequence is {sequence}; both must be at least 1.")
    d, h, n = model.width, model.heads, sequence
    extra = {
        "llama": n / (6 * d) + 5 / (18 * d),
        "tnl": 1 / (2 * h) + 5 / (18 * d),
        "hgrn2": 1 / (3 * h) + 29 / (72 * d),
        "cosformer2": 3 / (4 * h) + 23 / (72 * d),
    }
    return 72.0 * batch * n * d * d * sum(1 + extra[kind] for kind in layer_kinds(model))


def paper_flops_per_token(model: Model, sequence: int) -> float:
    """The paper's accounting for one token in a row of `sequence` tokens."""
    return paper_flops_per_step(model, batch=1, sequence=sequence) / sequence


# Dense bfloat16 peak of one jax device, TFLOP/s, from the makers' data sheets; first matching prefix of
# jax.Device.device_kind wins. A TPU7x chip (2,307) shows itself to jax as two devices.
_PEAKS = (
    ("NVIDIA A100", 312.0),
    ("NVIDIA A800", 312.0),
    ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA H100 NVL", 835.0),
    ("NVIDIA H100", 989.4),
    ("NVIDIA H800 PCIe", 756.0),
    ("NVIDIA H800", 989.4),
    ("NVIDIA H200 NVL", 835.0),
    ("NVIDIA H200", 989.4),
    ("NVIDIA GH200", 989.4),
    ("NVIDIA B200", 2250.0),
    ("NVIDIA GB200", 2500.0),
    ("TPU v4 lite", None),  # v4i, inference only: no figure that we trust
    ("TPU v4", 275.0),
    ("TPU v5 lite", 197.0),
    ("TPU v5e", 197.0),
    ("TPU v5p", 459.0),
    ("TPU v5", 459.0),
    ("TPU v6 lite", 918.0),
    ("TPU v6e", 918.0),
    ("TPU7x", 1153.5),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Peak of one device in operations a second, for MFU. None if unknown: a CPU, a new device, another dtype."""
    if dtype not in ("bfloat16", "float16"):
        return None
    for prefix, tera in _PEAKS:
        if device_kind.startswith(prefix):
            return None if tera is None else tera * 1e12
    return None
