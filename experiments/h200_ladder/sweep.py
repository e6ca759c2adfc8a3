"""Recipe: which learning rate and batch the ladder of configs/books.py should have. Twelve million tokens a run.

    python experiments/h200_ladder/several.py --config experiments/h200_ladder/sweep.py --jobs 3 --config.data.path='books/*.txt'

Rungs: ARCH-SIZE-RATE-bBATCH, as tnl-6m-2e-3-b8, and some with -thetaSHARE, cosFormer2's angles learned more slowly.
"""

from linscale.configs import books

RATES = ("5e-4", "1e-3", "2e-3")
RUNGS = tuple(
    f"{arch}-{size}-{rate}-b{batch}"
    for size, batch, architectures in (
        ("6m", 8, books.ARCHITECTURES),
        ("6m", 16, ("llama", "tnl", "hgrn2")),
        ("38m", 8, ("llama", "hgrn2")),
    )
    for rate in RATES
    for arch in architectures
) + tuple(f"cosformer2-6m-{rate}-b8-theta{share}" for share in ("0", "0.01") for rate in RATES)


def get_config(rung: str):
    arch, size, rest = rung.split("-", 2)
    rest, _, share = rest.partition("-theta")
    rate, _, batch = rest.rpartition("-b")
    config = books.get_config(f"{arch}-{size}")
    config.name = rung
    config.output = "runs/books_sweep"
    config.optimizer.learning_rate = float(rate)
    config.optimizer.theta_share = float(share or 1)
    config.train.batch = int(batch)
    config.train.tokens = 12_000_000
    config.train.eval_count = 2
    config.train.checkpoint_every = 10_000
    return config
