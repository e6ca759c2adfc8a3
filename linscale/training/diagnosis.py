"""What stopped a run: the first parameter group with a bad gradient, the documents of the batch, and a dump to replay.

The dump is a folder `stopped/<step>` of the run: report.json, batch.npz (no pickles), and `state`, a checkpoint of the
training state as it was before the first of the skipped steps (skipping changes only counters). `linscale train
--replay FOLDER` computes the step again, on this machine or another, and says whether it comes out the same.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from linscale import data, sharding
from linscale.config import Config, ConfigError, Mesh, resolve
from linscale.training import checkpoint, hosts, run_folder, step


def group_norms(config: Config, mesh, params, batch: dict) -> tuple[float, dict[str, float]]:
    """batch: on the devices of the mesh. (loss, path of every parameter group -> norm of its gradient), in the order of the forward pass where known.

    A group is one array of params: one kind of parameter of all layers of a kind.
    """

    def norms(params, batch):
        loss, grads = step.gradients(config, params, batch)
        return loss, jax.tree.map(jnp.linalg.norm, jax.tree.map(jnp.ravel, grads))

    with jax.set_mesh(mesh):
        loss, tree = jax.device_get(jax.jit(norms, out_shardings=sharding.replicated(mesh))(params, batch))
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    found = {jax.tree_util.keystr(path, simple=True, separator="/"): float(norm) for path, norm in leaves}
    return float(loss), found


def first_bad(norms: dict[str, float]) -> str:
    """The first group whose norm is not finite; where all are, the one with the largest."""
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    return broken[0] if broken else max(norms, key=norms.get)


def stop(
    config: Config, corpus, series: checkpoint.Series, mesh, state: step.TrainState, n: int, measured: dict, batch: dict
) -> None:
    """Writes the dump of step n, the last of too many skipped in a row, and raises FloatingPointError naming it all."""
    folder = run_folder.of(config) / "stopped" / str(n)
    values = {name: float(value) for name, value in jax.device_get(measured).items()}
    rows = data.rows_of(
        corpus, batch=config.train.batch, sequence=config.train.sequence, seed=config.seed, number=n - 1
    )
    documents = data.documents_of(corpus, config.train.sequence, rows)
    on_device = sharding.put(batch, mesh)
    loss, norms = group_norms(config, mesh, state.params, on_device)
    bad = first_bad(norms)
    report = {
        "step": n,
        "config": dataclasses.asdict(config),
        "loss": repr(loss),  # text, as JSON has no NaN
        "grad_norm": repr(values["grad_norm"]),
        "norm_limit": repr(values["norm_limit"]),
        "first_bad_group": bad,
        "group_norms": {name: repr(norm) for name, norm in norms.items()},
        "rows": rows,
        "documents": documents,
    }
    whole = batch if jax.process_count() == 1 else hosts.whole(on_device)
    if hosts.is_first():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        np.savez(folder / "batch.npz", **whole)
    hosts.wait_for_all()
    checkpoint.wait(series)
    saved = series.steps()
    checkpoint.save_alone(folder / "state", state)
    if hosts.is_first():
        run_folder.write_json(folder / "report.json", report)
    few = ", ".join(map(str, documents[:10])) + (", ..." if len(documents) > 10 else "")
    raise FloatingPointError(
        f"{config.name} diverged: steps {n - config.train.skip_limit + 1} to {n} were skipped (gradient norm "
        f"{values['grad_norm']:.4g}, limit {values['norm_limit']:.4g}, loss {values['loss']:.4g}); the first bad "
        f"parameter group is {bad}, the batch of step {n} holds documents {few}; the last checkpoint is "
        f"{saved[-1] if saved else 'none'}; linscale train --replay {folder} computes the step again. Lower "
        f"config.optimizer.learning_rate, now {config.optimizer.learning_rate}, under another config.name."
    )


def replay(folder: Path) -> tuple[str, bool]:
    """(a text that says what the dumped step gives here, whether that is what it gave then). ConfigError: no dump."""
    try:
        report = json.loads((folder / "report.json").read_text())
        config = resolve(report["config"])
        with np.load(folder / "batch.npz", allow_pickle=False) as file:
            batch = {name: file[name] for name in file.files}
        mesh = _mesh_here(config)
        abstract = checkpoint.abstract_state(config, mesh)
        tree, _ = checkpoint.read(folder / "state", {"params": abstract.params})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--replay is {str(folder)!r}, which holds no dump that can be read: {error}.") from error
    loss, norms = group_norms(config, mesh, tree["params"], sharding.put(batch, mesh))
    bad = first_bad(norms)
    same = (repr(loss), bad) == (report["loss"], report["first_bad_group"])
    rows = "\n".join(
        f"  {norm:12.6g}  {name}{'   <- first bad' if name == bad else ''}" for name, norm in norms.items()
    )
    verdict = "as it was" if same else f"it was loss {report['loss']}, first bad group {report['first_bad_group']}"
    return f"step {report['step']} of {config.name}: loss {loss!r}\ngradient norms\n{rows}\n{verdict}", same


def _mesh_here(config: Config) -> jax.sharding.Mesh:
    """The run's own mesh where these devices make it, else one device."""
    try:
        sharding.check(config, jax.device_count())
        return sharding.make_mesh(config.mesh)
    except ConfigError:
        return sharding.make_mesh(Mesh(data=1), jax.devices()[:1])
