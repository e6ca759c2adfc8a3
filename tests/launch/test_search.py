"""Which settings a search tries, with a compiler that is a formula."""

import dataclasses

from linscale.config import Config
from linscale.launch import search

MESH = {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}


@dataclasses.dataclass
class Tried:
    config: Config
    mesh: dict
    peak: float
    fits: bool


def config(**train):
    one = Config(train=dataclasses.replace(Config().train, batch=32, **train))
    return dataclasses.replace(one, model=dataclasses.replace(one.model, heads=4, remat="none"))


def memory(config, mesh):
    kept = {"none": 8, "dots": 4, "full": 1}[config.model.remat]
    return 10 + 64 * kept / (config.train.accumulation * mesh["tensor"] * mesh["sequence"])


def run(available, tries=10, real=lambda c, m: 1.5 * memory(c, m), start=None):
    def attempt(config, mesh):
        return Tried(config, mesh, real(config, mesh), real(config, mesh) <= available)

    return search.nearest(start or config(), MESH, attempt, memory, available, tries)


def test_what_fits_is_compiled_once():
    assert len(run(1e9)) == 1


def test_micro_batches_come_before_remat_and_remat_before_the_mesh():
    asked = config()
    order = [search.changes(asked, MESH, *one) for one in search.settings(asked, MESH)]
    assert order[:4] == [{}, {"train.accumulation": 2}, {"train.accumulation": 4}, {"model.remat": "dots"}]
    assert order.index({"model.remat": "full"}) < order.index({"mesh.fsdp": 4, "mesh.tensor": 2})
    assert all(
        one[0].train.batch % (one[0].train.accumulation * one[1]["fsdp"]) == 0 for one in search.settings(asked, MESH)
    )
    assert all(4 % one[1]["tensor"] == 0 for one in search.settings(asked, MESH))  # heads


def test_the_nearest_that_fits_is_found_and_hopeless_ones_are_passed_over():
    plans = run(1.5 * (10 + 64 * 4 / 4) + 1)  # dots with 4 micro-batches is the first to fit
    assert plans[-1].fits and len(plans) == 2
    assert search.changes(config(), MESH, plans[-1].config, plans[-1].mesh) == {
        "model.remat": "dots",
        "train.accumulation": 4,
    }


def test_an_estimate_that_is_too_low_is_corrected_by_every_try():
    real = lambda c, m: 3 * memory(c, m) + (60 if c.model.remat == "dots" else 0)  # noqa: E731
    plans = run(3 * (10 + 64 / 2) + 1, real=real)
    assert plans[-1].fits and not any(plan.fits for plan in plans[:-1])


def test_the_number_of_compiles_is_bounded():
    plans = run(1.0, tries=3)
    assert len(plans) == 3 and not any(plan.fits for plan in plans)
