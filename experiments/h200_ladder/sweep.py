"""Recipe: which learning rate and batch the ladder of configs/books.py should have. Eight million tokens a run.

    python experiments/h200_ladder/several.py --config experiments/h200_ladder/sweep.py --jobs 3 --config.data.path='books/*.txt'

Rungs: ARCH-SIZE-RATE-BATCH, as tnl-6m-2e-3-b32.
"""

from linscale.configs import books

RATES = {"6m": ("5e-4", "1e-3", "2e-3", "4e-3"), "38m": ("5e-4", "1e-3", "2e-3", "4e-3")}
RUNGS = tuple(
    f"{arch}-{size}-{rate}-b32" for size, rates in RATES.items() for rate in rates for arch in books.ARCHITECTURES
) + tuple(
    f"{arch}-6m-{rate}-b{batch}" for arch in ("llama", "tnl") for batch in (16, 64) for rate in ("1e-3", "2e-3", "4e-3")
)


def get_config(rung: str):
    arch, size, rest = rung.split("-", 2)
    rate, _, batch = rest.rpartition("-b")
    config = books.get_config(f"{arch}-{size}")
    config.name = rung
    config.output = "runs/books_sweep"
    config.optimizer.learning_rate = float(rate)
    config.train.batch = int(batch)
    config.train.tokens = 8_000_000
    config.train.eval_count = 2
    config.train.checkpoint_every = 10_000
    return config
