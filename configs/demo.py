"""The demo, and the default of `linscale ladder`: four architectures, five sizes of 14k to 450k parameters without the
embedding (a factor of 30), on the text of the Python standard library, byte by byte. No download.

  linscale ladder                                          all 20 runs, the laws and the report
  linscale train --config=configs/demo.py:tnl-155k         one of them

Expected time: 6 to 8 minutes and 1.8 GB on two idle cores (experiments/demo/reports has machine and versions).
Expected result: held-out loss falls with size for every architecture, from 2.4 to 2.6 nats a byte at 14k parameters to
1.79 (HGRN2), 1.82 (LLaMA), 1.96 (TNL) and 2.09 (cosFormer2) at 450k, and b of -0.072 (HGRN2), -0.060 (LLaMA), -0.053
(TNL) and -0.043 (cosFormer2), each with an interval below zero. Another Python has another standard library, so digits
may differ.
"""

from linscale.config import base

# name: layers, width, ffn, optimizer steps of 512 tokens. Heads have 16 channels.
SIZES = {
    "14k": (1, 32, 96, 300),
    "28k": (1, 48, 128, 450),
    "57k": (2, 48, 128, 600),
    "155k": (3, 64, 176, 650),
    "450k": (4, 96, 256, 1000),
}
ARCHITECTURES = ("llama", "tnl", "hgrn2", "cosformer2")
RUNGS = tuple(f"{arch}-{size}" for size in SIZES for arch in ARCHITECTURES)


def get_config(rung: str):
    arch, size = rung.split("-")
    layers, width, ffn, steps = SIZES[size]
    config = base()
    config.name = rung
    config.output = "runs/demo"

    config.model.arch = arch
    config.model.layers, config.model.width, config.model.ffn = layers, width, ffn
    config.model.heads = width // 16
    config.model.vocab_size = 264  # 256 bytes and the separator, padded to a multiple of 8
    config.model.init_std = 0.06  # the paper's 0.02 is for widths of 512 and more

    config.data.max_tokens = 4_000_000  # about a third of the standard library
    config.data.heldout_tokens = 16_384

    config.train.batch = 8
    config.train.sequence = 64
    config.train.steps = steps
    config.train.eval_count = 8
    config.train.checkpoint_every = 200

    # Constant after the warm-up, as in the paper; small models bear and need a higher rate.
    config.optimizer.learning_rate = 0.128 / width
    config.optimizer.warmup_tokens = 40 * 512
    return config
