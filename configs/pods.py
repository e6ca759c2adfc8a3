"""The paper's 7B models on two pods, 4,194,304 tokens a step, and HGRN2 on sequences of a million tokens.

  linscale plan --config=configs/pods.py:hgrn2-7b-v5p128 --topology v5p:4x4x8
  linscale launch gke --config=configs/pods.py:hgrn2-7b-v5p128 --topology v5p:4x4x8 --image=IMAGE --volume=runs:/runs \\
    --config.data.path='/runs/corpus/*.txt'

Rungs: {llama,tnl,hgrn2,cosformer2}-7b-{v5p128,v5e256}: v5p 4x4x8 and v5e 16x16, sequences of 8192; and
hgrn2-7b-1m-v5p128: sequences of 1,048,576 tokens, each cut over 32 chips. config.data.path is yours to give (300B tokens,
as in configs/ladder.py), a path that all hosts see; so is config.output.

Expected time: for 300B tokens at least 3.1 days on v5p 4x4x8 (TNL; HGRN2 at a million tokens), 3.6 on v5e 16x16 (TNL): the bound that
`linscale plan` prints; experiments/plan/reports has the tables, and says which rungs have been planned. No pod has run them.
Expected result: those of configs/ladder.py at 7B; the batch is 512 sequences for the paper's 480, as 480 does not divide
over 128 or 256 chips.
"""

from linscale.config import base
from linscale.models import sizes

ARCHITECTURES = ("llama", "tnl", "hgrn2", "cosformer2")
# pod: fsdp, sequence, tensor, remat
PODS = {
    "v5p128": (128, 1, 1, "full"),
    "v5e256": (256, 1, 1, "full"),
}
MICRO_BATCHES = {f"{arch}-7b-v5e256": 2 for arch in ("llama", "tnl", "cosformer2")}  # a step; 1 elsewhere
RUNGS = (*(f"{arch}-7b-{pod}" for arch in ARCHITECTURES for pod in PODS), "hgrn2-7b-1m-v5p128")


def get_config(rung: str):
    arch, _, pod = rung.split("-", 2)
    model = sizes.paper_model(arch, "7b")
    config = base()
    config.name = rung
    config.output = "/runs/pods"  # seen by every host

    for field in ("arch", "layers", "width", "heads", "ffn", "vocab_size"):
        config.model[field] = getattr(model, field)
    config.model.dtype = "bfloat16"

    config.data.source = "text"
    config.data.tokenizer = "tiktoken:cl100k_base"
    config.data.heldout_tokens = 2**22
    config.data.workers = 4

    config.train.tokens = 300_000_000_000  # 71,526 steps
    config.train.eval_count = 32
    config.train.checkpoint_every = 250  # steps
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_tokens = 375_000_000

    config.mesh.data = 1
    if pod == "1m-v5p128":
        config.train.batch, config.train.sequence = 4, 1_048_576
        config.mesh.fsdp, config.mesh.sequence = 4, 32
        config.model.remat = "full"
        return config
    config.train.batch, config.train.sequence = 512, 8192
    config.train.accumulation = MICRO_BATCHES.get(rung, 1)
    config.mesh.fsdp, config.mesh.sequence, config.mesh.tensor, config.model.remat = PODS[pod]
    return config
