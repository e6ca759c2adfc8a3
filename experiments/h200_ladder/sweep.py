"""Recipe: which learning rate, warm-up and batch the ladder of configs/books.py should have. 12M to 16M tokens a run.

    python experiments/h200_ladder/several.py --config experiments/h200_ladder/sweep.py --jobs 3 --config.data.path='books/*.txt'

Rungs: ARCH-SIZE-RATE-bBATCH, as tnl-6m-2e-3-b8; some with -wMILLIONS, tokens of warm-up, some with -thetaSHARE,
cosFormer2's angles learned more slowly.
"""

from linscale.configs import books

EVERY = books.ARCHITECTURES
TRIALS = (  # size, tokens a run in millions, rows a step, rates, architectures, what else
    ("6m", 12, 8, ("5e-4", "1e-3", "2e-3"), EVERY, ""),
    ("6m", 12, 16, ("5e-4", "1e-3", "2e-3"), ("llama", "tnl", "hgrn2"), ""),
    ("6m", 12, 8, ("5e-4", "1e-3", "2e-3"), ("cosformer2",), "-theta0"),
    ("6m", 12, 8, ("5e-4", "1e-3", "2e-3"), ("cosformer2",), "-theta0.01"),
    ("14m", 16, 8, ("6e-4", "1.2e-3"), EVERY, ""),
    ("38m", 16, 8, ("2.5e-4", "5e-4", "1e-3"), EVERY, ""),
    ("85m", 16, 8, ("2e-4", "4e-4", "8e-4"), EVERY, ""),
    ("85m", 16, 8, ("8e-4",), EVERY, "-w4"),
    ("85m", 16, 8, ("4e-4",), ("llama", "hybrid"), "-w4"),
)
MILLIONS = {size: millions for size, millions, *_ in TRIALS}
RUNGS = tuple(
    f"{arch}-{size}-{rate}-b{batch}{more}"
    for size, _, batch, rates, architectures, more in TRIALS
    for rate in rates
    for arch in architectures
)


def get_config(rung: str):
    arch, size, rest = rung.split("-", 2)
    rest, _, share = rest.partition("-theta")
    rest, _, warmup = rest.partition("-w")
    rate, _, batch = rest.rpartition("-b")
    config = books.get_config(f"{arch}-{size}")
    config.name = rung
    config.output = "runs/books_sweep"
    config.optimizer.learning_rate = float(rate)
    config.optimizer.theta_share = float(share or 1)
    if warmup:
        config.optimizer.warmup_tokens = int(warmup) * 1_000_000
    config.train.batch = int(batch)
    config.train.tokens = MILLIONS[size] * 1_000_000
    config.train.eval_count = 2
    config.train.checkpoint_every = 10_000
    return config
