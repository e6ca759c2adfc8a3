"""Recipe: one rung of configs/books.py with two further seeds, for the noise of a run.

python experiments/h200_ladder/several.py --config experiments/h200_ladder/seeds.py --jobs 4 --config.data.path='books/*.txt'
"""

from linscale.configs import books

RUNGS = tuple(f"{arch}-6m-seed{seed}" for seed in (1, 2) for arch in books.ARCHITECTURES)


def get_config(rung: str):
    rest, _, seed = rung.rpartition("-seed")
    config = books.get_config(rest)
    config.name = rung
    config.output = "runs/books_seeds"
    config.seed = int(seed)
    return config
