"""Does a config fit, and if not, which setting nearest to it does: a bounded search whose every step is a compile.

Settings are ordered by what they change: micro-batches first (nearly free), then what the backward pass recomputes, then
the mesh. What is likely not to fit is passed over: the estimate of linscale.launch.estimate is scaled by the compiler's
own figure at the tries so far, and the nearest setting that it leaves is compiled next. Nothing is called fitting that was
not compiled.
"""

import dataclasses

from linscale.config import Config

REMAT = ("none", "dots", "full")


def settings(config: Config, mesh: dict[str, int]) -> list[tuple[Config, dict[str, int]]]:
    """The config itself and others, nearest first, each with its mesh. Micro-batches hold at least one sequence for
    each member of data x fsdp; the tensor axis stays a divisor of the heads."""
    found = []
    for sizes in _meshes(config, mesh):
        rows = sizes["data"] * sizes["fsdp"]
        for remat in REMAT[REMAT.index(config.model.remat) :]:
            accumulation = config.train.accumulation
            while config.train.batch % (accumulation * rows) == 0:
                changed = dataclasses.replace(
                    config,
                    model=dataclasses.replace(config.model, remat=remat),
                    train=dataclasses.replace(config.train, accumulation=accumulation),
                    mesh=dataclasses.replace(config.mesh, **sizes),
                )
                found.append((changed, sizes))
                accumulation *= 2
    return found


def _meshes(config: Config, mesh: dict[str, int]):
    """The mesh, then tensor and sequence doubled and doubled again, taken from fsdp, then from data."""
    yield mesh
    for factor in (2, 4, 8, 16):
        for axis in ("tensor", "sequence"):
            sizes = mesh | {axis: mesh[axis] * factor}
            for giver in ("fsdp", "data"):
                if mesh[giver] % factor == 0:
                    sizes[giver] = mesh[giver] // factor
                    break
            else:
                continue
            if axis == "tensor" and config.model.heads % sizes["tensor"]:
                continue
            if axis == "sequence" and config.train.sequence % sizes["sequence"]:
                continue
            yield sizes


def nearest(config: Config, mesh: dict[str, int], attempt, estimate, available: int, tries: int):
    """Tries the config and, while none fits, others.

    attempt: (config, mesh) -> a plan with .fits and .peak, bytes. estimate: (config, mesh) -> bytes. Returns the plans in
    the order of the tries; the last one fits, or none does.
    """
    waiting = settings(config, mesh)
    plans, ratio = [], 0.0
    while waiting and len(plans) < tries:
        hopeful = [one for one in waiting if estimate(*one) * ratio <= available] if plans else waiting
        chosen = hopeful[0] if hopeful else min(waiting, key=lambda one: estimate(*one))
        waiting.remove(chosen)
        plans.append(attempt(*chosen))
        if plans[-1].fits:
            break
        ratio = max(ratio, plans[-1].peak / estimate(*chosen))
    return plans


def changes(before: Config, mesh: dict[str, int], after: Config, sizes: dict[str, int]) -> dict[str, object]:
    """'section.field' -> value, of what a setting changes: the options that give it."""
    out = {}
    for section, fields in (("model", ("remat",)), ("train", ("accumulation",))):
        for field in fields:
            old, new = (getattr(getattr(c, section), field) for c in (before, after))
            if old != new:
                out[f"{section}.{field}"] = new
    return out | {f"mesh.{axis}": n for axis, n in sizes.items() if n != mesh[axis]}
