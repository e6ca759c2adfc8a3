"""The training loop, to be read from top to bottom: check, restore, iterate, log, evaluate, checkpoint, finish.

Exactness. A run is a function of its config: the same batches, the same steps and the same evaluations, whether or
not it was killed between. That rests on three orders kept here: metrics up to a step are on disk before anything of the
checkpoint of that step is; the evaluation of a step comes before its checkpoint; DONE.json comes after the last
checkpoint.
"""

import functools
import math
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from linscale import data, models, sharding
from linscale.config import Config, Restart
from linscale.scaling import flops
from linscale.training import checkpoint, diagnosis, hosts, metrics, run_folder, start, step, stopping
from linscale.training.metrics import say


def check(config: Config) -> None:
    """Everything about a run that can be wrong before its data are read. ConfigError; nothing is compiled."""
    sharding.check(config, jax.device_count())
    sharding.check_host_memory(config, jax.devices()[0])
    models.validate(config.model)
    metrics.check_wandb(config)
    start.check(config)
    run_folder.check(config)


def train(config: Config, corpus=None, label: str = "", note=None) -> dict:
    """Trains a run to its end, from its last checkpoint if there is one, and returns the content of its DONE.json.

    corpus: of data.prepare, prepared here if None. label: for progress, as "[3/20] tnl-20k". note: see
    metrics.Progress. Raises ConfigError before any compile, OSError when the disk fails, FloatingPointError when the
    loss or gradient is not finite.
    """
    folder, label = run_folder.of(config), label or config.name
    hosts.in_turn(lambda: check(config))
    if done := run_folder.read_done(config):
        say(f"{label}: finished before, held-out loss {done['heldout_loss']:.4f} nats/token; nothing to do in {folder}")
        return done
    run_folder.check_space([config])
    with (
        stopping.on_sigterm(config.train.stop_seconds) as sigterm,
        stopping.watchdog(config.train.hang_seconds, folder) as tick,
    ):
        if corpus is None:  # one process of each host fills its cache, or that of a shared disk
            corpus = hosts.in_turn(lambda: data.prepare(config.data, config.model.vocab_size, log=say))
            say(corpus.summary)
        data.check_batch(corpus, config.train.batch, config.train.sequence)
        start.check(config, corpus.fingerprint)
        run = hosts.in_turn(lambda: run_folder.claim(config, corpus))
        return _train(config, corpus, run, label, note, sigterm, tick)


def _train(config: Config, corpus, run: dict, label: str, note, sigterm, tick) -> dict:
    """The loop itself. run: content of config.json. sigterm, tick: see linscale/training/stopping.py."""
    folder = run_folder.of(config)
    mesh = sharding.make_mesh(config.mesh)
    share, shares = sharding.host_rows(mesh)
    batches = data.train_batches(
        corpus,
        batch=config.train.batch,
        sequence=config.train.sequence,
        seed=config.seed,
        workers=config.data.workers,
        host=share,
        hosts=shares,
    )
    with checkpoint.open_folder(folder / "checkpoints", config) as series, hosts.ended_with_the_others():
        abstract = checkpoint.abstract_state(config, mesh)
        say(f"{label}: compiling, {run['parameters']['total']:,} parameters on {sharding.describe(mesh)}")
        train_step, eval_step, from_nothing = compile_programs(config, abstract, mesh)
        # One may have found its programs in a cache that the other lacks; collectives wait 30 s for their first meeting.
        hosts.wait_for_all(hosts.TURN)
        first, state, position, how = start.first(config, series, abstract, from_nothing)
        if position:
            seek(batches, position, first, config)
        if how:
            say(f"{label}: {how}")

        evaluations, is_saved = eval_steps(config.steps, config.train.eval_count), run_folder.save_steps(config)
        log, progress = metrics.Silent(), metrics.Silent()
        if hosts.is_first():  # the others compute the same numbers
            log = metrics.Log(folder, config, run, first, peak(config))
            progress = metrics.Progress(label, config.steps, first, config.tokens_per_step, note)
        sigterm.saves = True
        try:
            in_flight = None  # (step, its metrics on the device, its batch on the host)
            for n in range(first + 1, config.steps + 1):
                tick(f"step {n}")
                batch = draw(batches, config)
                on_device = sharding.put(batch, mesh)
                with jax.transfer_guard("disallow"):  # a hidden transfer would wait for the device
                    state, measured = train_step(state, on_device)
                if in_flight and record(log, progress, config, *in_flight[:2]):  # read while step n runs
                    diagnosis.stop(config, corpus, series, mesh, state, *in_flight)
                in_flight = (n, measured, batch)

                stops = sigterm.came(n) and n < config.steps
                evaluates, saves = n in evaluations, is_saved(n) or stops
                if evaluates or saves:
                    if record(log, progress, config, *in_flight[:2]):
                        diagnosis.stop(config, corpus, series, mesh, state, *in_flight)
                    in_flight, began = None, time.perf_counter()
                    if evaluates:
                        tick(f"the evaluation of step {n}")
                        log.heldout(n, heldout_loss(config, corpus, eval_step, state.params, mesh))
                    if saves:
                        tick(f"the checkpoint of step {n}")
                        position = {"workers": config.data.workers, "iterator": batches.get_state()}
                        checkpoint.save(series, n, state, position, before=log.sync)
                    log.paused(time.perf_counter() - began)
                if stops:
                    checkpoint.wait(series)
                    raise Restart(f"SIGTERM ended {label} after step {n}, which is saved; the same command continues.")
            checkpoint.wait(series)
            if hosts.is_first():
                done = log.last_heldout | {"seconds": round(log.seconds, 3)}
                run_folder.write_json(folder / "DONE.json", done)
            hosts.wait_for_all()
        finally:
            batches.close()  # ends data workers
            progress.close()
            log.close()
    return run_folder.read_done(config)


def abstract_batch(config: Config, mesh: jax.sharding.Mesh, rows: int) -> dict:
    """Shapes, dtypes and shardings of a batch of so many rows."""
    shape, of_batch = (rows, config.train.sequence), sharding.of_batch(mesh)
    kinds = {"tokens": jnp.int32, "labels": jnp.int32, "segment_ids": jnp.int32, "weights": jnp.float32}
    return {name: jax.ShapeDtypeStruct(shape, kind, sharding=of_batch) for name, kind in kinds.items()}


def lower_step(config: Config, abstract: step.TrainState, mesh: jax.sharding.Mesh):
    """The train step, lowered. It is given its state, donates it, and leaves the new one where the old one lay."""
    jitted = jax.jit(
        functools.partial(step.train_step, config),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, abstract), sharding.replicated(mesh)),
    )
    with jax.set_mesh(mesh):
        return jitted.lower(abstract, abstract_batch(config, mesh, config.train.batch))


def compile_programs(config: Config, abstract: step.TrainState, mesh: jax.sharding.Mesh):
    """(train step, evaluation step, first state), compiled side by side and ahead, so that no step is a slow one."""
    everywhere = sharding.replicated(mesh)
    evaluate = jax.jit(functools.partial(step.eval_step, config), out_shardings=everywhere)
    init = jax.jit(functools.partial(step.init, config), out_shardings=jax.tree.map(lambda x: x.sharding, abstract))
    with jax.set_mesh(mesh):
        lowered = (
            lower_step(config, abstract, mesh),
            evaluate.lower(abstract.params, abstract_batch(config, mesh, eval_batch(config))),
            init.lower(),
        )
    options = compiler_options(config, jax.default_backend())
    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(lambda program: program.compile(compiler_options=options), lowered))


def compiler_options(config: Config, backend: str) -> dict:
    """config.train.deterministic on GPUs: no atomic additions, and no autotuning, as two processes may find different
    algorithms fastest."""
    if not config.train.deterministic or backend != "gpu":
        return {}
    return {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0}


def record(log: metrics.Log, progress: metrics.Progress, config: Config, n: int, measured: dict) -> bool:
    """Reads the metrics of step n from the device, and writes its line when it is due. True: training must stop."""
    values = {name: float(value) for name, value in jax.device_get(measured).items()}
    if values["in_a_row"]:
        say(
            f"{config.name}: step {n} skipped, its gradient norm {values['grad_norm']:.4g} is not finite or above "
            f"{values['norm_limit']:.4g} (loss {values['loss']:.4g}; {values['skipped']:.0f} skipped so far)"
        )
    if n % config.train.log_every == 0 or n == config.steps:
        log.training(n, values)
    progress.update(n, values["loss"])
    return values["in_a_row"] >= config.train.skip_limit


def heldout_loss(config: Config, corpus, eval_step, params, mesh: jax.sharding.Mesh) -> float:
    """Nats per token over the whole held-out set."""
    share, shares = sharding.host_rows(mesh)
    batches = data.heldout_batches(
        corpus, batch=eval_batch(config), sequence=config.train.sequence, host=share, hosts=shares
    )
    sums = [eval_step(params, sharding.put(batch, mesh)) for batch in batches]
    nats, weights = np.asarray(jax.device_get(sums), np.float64).sum(0)
    if not math.isfinite(nats):
        raise FloatingPointError(f"{config.name} diverged: its held-out loss is {nats}; lower the learning rate.")
    return float(nats / weights)


def eval_batch(config: Config) -> int:
    return config.train.batch // config.train.accumulation


def eval_steps(steps: int, count: int) -> set[int]:
    """`count` steps evenly spaced in log(step) over the last two decades of a run, the last step among them."""
    if count == 1:
        return {steps}
    return {max(1, round(n)) for n in np.geomspace(max(1.0, steps / 100), steps, count)}


def draw(batches, config: Config) -> dict:
    """The next batch. Restart where a data worker has died, as when the system is out of memory."""
    try:
        return next(batches)
    except RuntimeError as error:
        if config.data.workers and "terminated unexpectedly" in str(error):
            reason = str(error).split(".")[0]
            raise Restart(
                f"A data worker died ({reason}); the same command continues from the last checkpoint."
            ) from error
        raise


def seek(batches, position: dict, drawn: int, config: Config) -> None:
    """Puts the iterator where it stood after `drawn` batches."""
    if position["workers"] == config.data.workers:
        batches.set_state(position["iterator"])
    else:  # the iterator's state counts per worker; the batches themselves do not depend on workers
        say(f"config.data.workers was {position['workers']}: stepping over {drawn} batches")
        for _ in range(drawn):
            next(batches)


def peak(config: Config) -> float | None:
    """FLOP/s of all devices together, None if their kind is not known."""
    device = jax.devices()[0]
    dtype = {"auto": "float32" if device.platform == "cpu" else "bfloat16"}.get(config.model.dtype, config.model.dtype)
    one = flops.peak_flops(device.device_kind, dtype)
    return one and one * jax.device_count()
