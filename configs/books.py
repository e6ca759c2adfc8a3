"""A ladder on real text: five architectures, seven sizes of 0.2M to 85M parameters without the embedding (two and a half
decades), on about a hundred megabytes of books cut into 16,384 kinds of tokens by a BPE trained on them. The largest
runs see them nearly four times.

  linscale ladder --config=configs/books.py --config.data.path='books/*.txt' --config.data.heldout_path='heldout/*.txt'
  linscale train --config=configs/books.py:tnl-38m --config.data.path='books/*.txt'

Rungs: {llama,tnl,hgrn2,cosformer2,hybrid}-{200k,1m,3m,6m,14m,38m,85m}. Heads of 64 channels, of 32 where the width is 128 or
less: with the paper's 128 the small ones would have one or two heads, and TNL as many decays. Files are text, documents
in them separated by a NUL byte (config.data.separator says otherwise).

Expected time and result: experiments/h200_ladder/reports.
"""

from linscale.config import base

# name: layers, width, ffn, millions of training tokens
SIZES = {
    "200k": (4, 64, 192, 12),
    "1m": (4, 128, 384, 20),
    "3m": (4, 256, 704, 32),
    "6m": (8, 256, 704, 48),
    "14m": (8, 384, 1024, 64),
    "38m": (12, 512, 1408, 80),
    "85m": (12, 768, 2048, 100),
}
ARCHITECTURES = ("llama", "tnl", "hgrn2", "cosformer2", "hybrid")
RUNGS = tuple(f"{arch}-{size}" for size in SIZES for arch in ARCHITECTURES)


def get_config(rung: str):
    arch, size = rung.split("-")
    layers, width, ffn, millions = SIZES[size]
    config = base()
    config.name = rung
    config.output = "runs/books"

    config.model.arch = arch
    config.model.layers, config.model.width, config.model.ffn = layers, width, ffn
    config.model.heads = width // (32 if width <= 128 else 64)
    config.model.vocab_size = 16_384
    config.model.softmax_every = 4  # of the hybrid: one layer in four, as the smallest has four

    config.data.source = "text"
    config.data.separator = "\\0"
    config.data.tokenizer = "bpe:16384"
    config.data.heldout_tokens = 2**18

    config.train.batch = 8
    config.train.sequence = 1024
    config.train.tokens = millions * 1_000_000
    config.train.eval_count = 20
    config.train.log_every = 50
    config.train.checkpoint_every = 1000
    config.train.spike_sigma = 0.0  # norms jump early in runs this short, which is no spike: only non-finite ones count

    # Constant after the warm-up, as in the paper, one rule for all five: experiments/h200_ladder/sweep.py.
    config.optimizer.learning_rate = 0.256 / width
    config.optimizer.warmup_tokens = config.train.tokens // 25
    return config
