"""Damaged checkpoints, retention, and where a run begins."""

import dataclasses
import random
import shutil
import sys

import jax
import numpy as np
import pytest

from linscale.config import ConfigError, Data, Restart
from linscale.evaluation import runs
from linscale.scaling import flops
from linscale.sharding import make_mesh
from linscale.training import checkpoint, loop, run_folder, small_state, start, step

INIT = jax.jit(step.init, static_argnums=0)


def first_state(config):
    """Made by one program for all folders."""
    return INIT(dataclasses.replace(config, name="", output="", data=Data()))


@pytest.fixture(params=("small", "large"))
def saved(make, request, monkeypatch):
    """A config, its state, and a folder with checkpoints 1 (the state itself) and 2 (another), in either format."""
    if request.param == "large":
        monkeypatch.setattr(small_state, "_MOST", 0)
    config = make("hgrn2")
    state = first_state(config)
    folder = run_folder.of(config) / "checkpoints"
    folder.mkdir(parents=True)
    with checkpoint.open_folder(folder, config) as series:
        checkpoint.save(series, 1, state, {"place": 1})
        checkpoint.save(series, 2, jax.tree.map(lambda x: x + 1, state), {"place": 2})
    return config, state, folder


def restored(config, folder):
    abstract = checkpoint.abstract_state(config, make_mesh(config.mesh))
    with checkpoint.open_folder(folder, config) as series:
        return checkpoint.restore(series, abstract)


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_truncated_flipped_or_missing_files_never_restore_wrong_bits(saved, tmp_path, capsys):
    """Every file of the newest checkpoint in turn, each damage at a random place: the newest as it was, or the other."""
    config, state, folder = saved
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    where = random.Random()
    files = sorted(path.relative_to(whole) for path in (whole / "2").rglob("*") if path.is_file())
    large = max(files, key=lambda file: (whole / file).stat().st_size)
    fell_back = 0
    for file in [*files, large, large, large]:
        for damage in ("flip", "truncate", "remove"):
            shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            content = bytearray((folder / file).read_bytes())
            if not content and damage != "remove":
                continue
            place = where.randrange(len(content)) if content else 0
            if damage == "flip":
                content[place] ^= 1 << where.randrange(8)
                (folder / file).write_bytes(content)
            elif damage == "truncate":
                (folder / file).write_bytes(content[:place])
            else:
                (folder / file).unlink()
            n, tree, data = restored(config, folder)
            want = state if n == 1 else jax.tree.map(lambda x: x + 1, state)
            assert data == {"place": n} and same(tree, want), (file, damage, place)
            fell_back += n == 1
            assert (n == 2) == (folder / "2").exists()  # what is damaged is put aside, so that it can be saved again
    assert fell_back >= 10
    said = capsys.readouterr().err
    assert "checkpoint 2 is damaged" in said and "Traceback" not in said


def test_the_formats_are_what_they_are_said_to_be(saved, request):
    _, _, folder = saved
    names = {path.name for path in (folder / "2").iterdir()}
    assert names == {small_state.FILE} if "small" in request.node.name else names > {"state", "commit_success.txt"}


def test_a_folder_may_hold_both_formats_and_one_policy_keeps_both(make, monkeypatch):
    """A run that was begun by an earlier version, or in several processes, and goes on in one; and the other way."""
    config = make("tnl", **{"train.checkpoint_keep": 2, "train.checkpoint_keep_every": 4})
    state = first_state(config)
    folder = run_folder.of(config) / "checkpoints"
    most = small_state._MOST
    with checkpoint.open_folder(folder, config) as series:
        for n in range(1, 9):
            monkeypatch.setattr(small_state, "_MOST", most if n in (1, 2, 5, 6, 8) else 0)
            checkpoint.save(series, n, jax.tree.map(lambda x, n=n: x + n, state), {"place": n})
            checkpoint.wait(series)
            assert restored(config, folder)[0] == n
    assert checkpoint.steps_in(folder) == [4, 7, 8]
    assert [(folder / str(n) / small_state.FILE).exists() for n in (4, 7, 8)] == [False, False, True]
    for n in (8, 7, 4):
        at, tree, data = restored(config, folder)
        assert at == n and data == {"place": n} and same(tree, jax.tree.map(lambda x, n=n: x + n, state))
        shutil.rmtree(folder / str(n))


def test_a_save_that_fails_is_told_by_the_next_one_and_leaves_nothing(saved, monkeypatch):
    config, state, folder = saved
    if small_state._MOST == 0:
        pytest.skip("faults of the small form are made here; orbax meets a real full disk in test_full_disk.py")

    def fails():
        raise OSError(28, "No space left on device")

    with checkpoint.open_folder(folder, config) as series:
        checkpoint.save(series, 3, state, {}, before=fails)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(series, 4, state, {})
        monkeypatch.setattr(small_state.safetensors, "write", lambda *_: fails())
        checkpoint.save(series, 4, state, {})
        with pytest.raises(OSError, match="No space left"):
            checkpoint.wait(series)
        monkeypatch.undo()
        checkpoint.save(series, 5, state, {})  # and it may go on
    assert sorted(path.name for path in folder.iterdir()) == ["2", "5"]


def test_a_copy_is_taken_before_the_state_is_donated(make):
    config = make("tnl")
    state = first_state(config)
    expected = jax.tree.map(np.array, state)
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    folder = run_folder.of(config) / "checkpoints"
    with checkpoint.open_folder(folder, config) as series:
        checkpoint.save(series, 1, state, {})
        for _ in range(5):
            state = change(state)
    assert same(restored(config, folder)[1], expected)


def test_a_signal_that_falls_into_a_callback_is_not_printed_as_a_traceback(make, monkeypatch):
    """Python swallows what a handler raises there; stopping.Sigterm remembers that the signal came."""
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: printed.append(str(found.exc_value)))
    with checkpoint.open_folder(run_folder.of(config := make("tnl")) / "checkpoints", config):
        for error in (Restart("SIGTERM came"), ValueError("another")):

            class Callback:
                def __del__(self, error=error):
                    raise error

            Callback()
    assert printed == ["another"]


def test_when_none_can_be_read_nothing_is_touched(saved):
    config, _, folder = saved
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 10_000:
            path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="has 2 checkpoints, and none can be read"):
        restored(config, folder)
    assert checkpoint.steps_in(folder) == [1, 2]


def test_half_written_checkpoints_are_named_and_removed(saved, capsys):
    config, _, folder = saved
    (folder / "3.orbax-checkpoint-tmp-7" / "state").mkdir(parents=True)
    (folder / "4.linscale-tmp").mkdir()
    (folder / "0.old-tmp").mkdir()
    (folder / "5").mkdir()  # neither of the marks
    assert restored(config, folder)[0] == 2
    said = capsys.readouterr().err
    assert all(f"checkpoint {n} was not finished" in said for n in (3, 4, 5)) and "checkpoint 0" not in said
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    assert (folder.parent / "damaged" / "5").is_dir()


@pytest.mark.parametrize(
    "changes, named", [({"model.ffn": 64}, "has the shape"), ({"model.arch": "llama"}, "it has no")]
)
def test_a_checkpoint_of_another_model_is_one_sentence(saved, make, changes, named, capsys):
    """In the folder of a run, whose config.json may well be right; and for evaluation, which reads the parameters."""
    _, _, folder = saved
    other = make("hgrn2", **changes, **{"name": "hgrn2"})
    with pytest.raises(ConfigError, match=f"2 is the checkpoint of another model: .*{named}"):
        restored(other, folder)
    assert checkpoint.steps_in(folder) == [1, 2] and "damaged" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"2 is the checkpoint of another model: .*{named}"):
        runs.Run(folder.parent, {}, other).params()


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "int32", "bool"))
def test_sums_notice_any_flipped_bit_and_any_swap(dtype):
    random = np.random.default_rng()
    array = jax.numpy.asarray(random.integers(0, 2, (5, 7)) if dtype == "bool" else random.normal(0, 99, (5, 7)), dtype)
    before = checkpoint.sums({"a": {"b": array}})
    assert list(before) == ["a/b"] and before == checkpoint.sums({"a": {"b": array + 0 if dtype != "bool" else array}})
    raw = np.array(array)
    for _ in range(20):
        flipped = raw.copy()
        view = flipped.reshape(-1).view(np.uint8)
        view[random.integers(view.size)] ^= 1 if dtype == "bool" else 1 << random.integers(8)
        assert checkpoint.sums({"a": {"b": jax.numpy.asarray(flipped)}}) != before
    i, j = np.argmax(raw.reshape(-1)), np.argmin(raw.reshape(-1))
    raw.reshape(-1)[[i, j]] = raw.reshape(-1)[[j, i]]
    assert checkpoint.sums({"a": {"b": jax.numpy.asarray(raw)}}) != before


def test_policy_keeps_the_last_the_regular_and_the_named(make):
    shape = {"train.checkpoint_every": 3, "train.checkpoint_keep_every": 12}
    one = 20 * flops.count_parameters(make("tnl").model).total / make("tnl").tokens_per_step  # steps
    config = make("tnl", **shape, **{"train.checkpoint_chinchilla": f"{4.5 / one:.9f}, {7.5 / one:.9f},100"})
    loop.train(config)
    assert sorted(run_folder.milestones(config).values()) == [5, 8]
    assert checkpoint.steps_in(run_folder.of(config) / "checkpoints") == [5, 8, 12, 24, 36, 39, 40]


def test_fork_goes_on_exactly_and_weights_begin_again(make, exact, tmp_path):
    """A fork with the parent's own config repeats the parent's last steps bit for bit; a cooldown only its data."""
    shape = {"train.steps": 12, "train.checkpoint_every": 4, "train.eval_count": 1}
    parent = make("tnl", **shape, **{"train.checkpoint_keep_every": 4})
    loop.train(parent)
    lines = exact(run_folder.of(parent))
    base = shape | {"output": tmp_path / "forks", "init.from_run": run_folder.of(parent), "init.step": 8}
    loop.train(fork := make("tnl", **base))
    assert exact(run_folder.of(fork)) == [line for line in lines if line["step"] > 8]

    cooldown = {"optimizer.schedule": "wsd", "optimizer.decay_share": 0.4, "name": "cooldown"}
    loop.train(make("tnl", **base | cooldown))
    ours = exact(run_folder.of(make(**cooldown | base)))
    assert ours[0]["step"] == 10 and ours[0]["tokens"] == 10 * 128 and ours[-2]["lr"] < 0.2 * lines[-2]["lr"]

    weights = {"init.weights_only": "true", "train.batch": 8, "name": "weights"}
    loop.train(make("tnl", **base | weights))
    first = exact(run_folder.of(make(**base | weights)))[0]
    assert first["step"] == 2 and first["loss"] < lines[0]["loss"] - 0.5


def test_a_run_that_cannot_be_forked_is_refused_before_any_compile(make, tmp_path, monkeypatch):
    parent = make("tnl", **{"train.steps": 4})
    loop.train(parent)
    monkeypatch.setattr(loop, "compile_programs", lambda *_: pytest.fail("compiled"))
    base = {"output": tmp_path / "forks", "init.from_run": run_folder.of(parent)}
    for changes, message in [
        ({"init.from_run": tmp_path}, "no run folder"),
        ({"model.width": 64}, "config.model.width is 32; here it is 64"),
        ({"init.step": 3}, "that run has 4"),
        ({"train.batch": 8}, "config.train.batch is 4"),
        ({"train.steps": 4}, "ends at step 4"),
        ({"data.max_tokens": 5000}, "fingerprint"),
    ]:
        with pytest.raises(ConfigError, match=message):
            loop.train(make("tnl", **base | changes))
    start.check(make("tnl", **base))
