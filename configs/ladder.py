"""The paper's ladder (arXiv 2406.16690): four architectures, 70M to 7B, 300B tokens each, and the 1B aspect ratios.

  linscale ladder --config=configs/ladder.py --only='tnl-*' --config.data.path='corpus/*.txt'
  linscale train --config=configs/ladder.py:hgrn2-70m --config.data.source=jsonl --config.data.path='corpus/*.jsonl'

Rungs: {llama,tnl,hgrn2,cosformer2,hybrid}-{70m,160m,410m,1b,3b,7b}, and {llama,cosformer2}-1b-d{1536,1792,2048,3072}.
The paper's corpus was never published: config.data.path is yours to give (300B tokens; English to Chinese 2 to 1).
The hybrid (every 8th layer softmax attention, the others lightning attention) is later work of the same authors.

Expected time: 1.3e20 (TNL) to 1.7e20 FLOPs (LLaMA) at 70M, four days of one H100 at 40 % of its peak; 1.3e22 to
1.4e22 FLOPs at 7B, which is work for a pod. `linscale count` prints the FLOPs of every model.
Expected result: the paper's law L(C) = a C^b on its corpus, with b of -0.0798 (LLaMA), -0.0768 (TNL), -0.0753 (HGRN2)
and -0.0756 (cosFormer2); `linscale report` prints them beside yours.
"""

from linscale.config import base
from linscale.models import sizes

ARCHITECTURES = ("llama", "tnl", "hgrn2", "cosformer2", "hybrid")
RUNGS = tuple(f"{arch}-{size}" for arch in ARCHITECTURES for size in sizes.SIZES) + tuple(
    f"{arch}-{aspect}" for arch in ("llama", "cosformer2") for aspect in sizes.ASPECTS
)


def get_config(rung: str):
    arch, size = rung.split("-", 1)
    model = sizes.paper_model(arch, size)
    config = base()
    config.name = rung
    config.output = "runs/ladder"

    for field in ("arch", "layers", "width", "heads", "ffn", "vocab_size"):
        config.model[field] = getattr(model, field)
    config.model.remat = "full" if size.startswith(("1b", "3b", "7b")) else "auto"

    config.data.source = "text"
    config.data.tokenizer = "tiktoken:cl100k_base"  # 100,277 entries; the model's vocabulary is padded to 100,280
    config.data.heldout_tokens = 2**22
    config.data.workers = 4

    config.train.tokens = 300_000_000_000  # 76,294 steps
    config.train.batch = 480  # sequences: 3,932,160 tokens a step
    config.train.sequence = 8192
    config.train.eval_count = 32
    config.train.checkpoint_every = 500  # steps

    config.optimizer.learning_rate = 3e-4  # for every size and architecture, constant after the warm-up
    config.optimizer.warmup_tokens = 375_000_000
    return config
