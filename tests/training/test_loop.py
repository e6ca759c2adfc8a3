import json

import jax
import numpy as np
import pytest

from linscale import cli
from linscale.config import ConfigError
from linscale.sharding import make_mesh
from linscale.training import checkpoint, loop, metrics, run_folder


def test_eval_steps_are_even_in_log_and_end_at_the_end():
    assert sorted(loop.eval_steps(10_000, 5)) == [100, 316, 1000, 3162, 10_000]
    assert loop.eval_steps(7, 1) == {7} and max(loop.eval_steps(7, 30)) == 7 and min(loop.eval_steps(7, 30)) == 1


def test_a_run_writes_the_contract_and_two_runs_are_identical(make, exact, tmp_path):
    config = make("hgrn2")
    done = loop.train(config)
    lines = exact(run_folder.of(config))
    training = [line for line in lines if "loss" in line]
    heldout = [line for line in lines if "heldout_loss" in line]
    assert [line["step"] for line in training] == list(range(2, 41, 2))
    assert {line["step"] for line in heldout} == loop.eval_steps(40, 4)
    assert set(training[0]) == {"step", "tokens", "flops", "loss", "grad_norm", "lr"}
    per_token = json.loads((run_folder.of(config) / "config.json").read_text())["flops_per_token"]
    assert training[-1]["tokens"] == 40 * 4 * 32 and training[-1]["flops"] == 40 * 4 * 32 * per_token
    assert heldout[-1]["heldout_loss"] < heldout[0]["heldout_loss"]
    assert heldout[-1]["heldout_bpb"] == pytest.approx(heldout[-1]["heldout_loss"] / np.log(2), rel=0.1)  # bytes
    assert done == json.loads((run_folder.of(config) / "DONE.json").read_text())
    assert {name: done[name] for name in heldout[-1]} == heldout[-1] and done["seconds"] > 0
    kept = sorted(int(folder.name) for folder in (run_folder.of(config) / "checkpoints").iterdir())
    assert kept == [35, 40]

    again = make("hgrn2", output=tmp_path / "again")
    loop.train(again)
    assert exact(run_folder.of(again)) == lines


def test_a_finished_run_returns_at_once(make, monkeypatch, capsys):
    config = make("llama", **{"train.steps": 2})
    done = loop.train(config)
    monkeypatch.setattr(loop, "compile_programs", lambda *_: pytest.fail("compiled"))
    assert loop.train(config) == done
    assert "finished before" in capsys.readouterr().err


def test_an_interrupted_run_continues_exactly(make, exact, tmp_path, monkeypatch):
    """Before the first checkpoint, just after one, and later with another number of data workers."""
    whole, honest = make("llama"), loop.record
    loop.train(whole)
    for at, workers_after in ((3, 0), (7, 0), (25, 2)):

        def interrupt(log, progress, config, n, measured, at=at):
            if n == at:
                raise KeyboardInterrupt
            return honest(log, progress, config, n, measured)

        broken = make("llama", output=tmp_path / f"broken at {at}")
        monkeypatch.setattr(loop, "record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            loop.train(broken)
        monkeypatch.setattr(loop, "record", honest)
        with open(run_folder.of(broken) / "metrics.jsonl", "a") as file:
            file.write('{"step": 39, "loss": 1.0}\n{"step": 4')  # lines after the checkpoint, the last one torn
        loop.train(make("llama", output=broken.output, **{"data.workers": workers_after}))
        assert exact(run_folder.of(broken)) == exact(run_folder.of(whole)), at


def test_resume_restores_every_bit_of_the_state(make):
    config = make("tnl", **{"train.steps": 10, "train.checkpoint_every": 10})
    loop.train(config)
    abstract = checkpoint.abstract_state(config, make_mesh(config.mesh))
    with checkpoint.open_folder(run_folder.of(config) / "checkpoints", config) as series:
        n, state, position = checkpoint.restore(series, abstract)
        assert n == 10 and int(state.step) == 10 and position["workers"] == 0
        checkpoint.save(series, 11, state, position)
        checkpoint.wait(series)
        _, copy, _ = checkpoint.restore(series, abstract)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    assert all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(copy)))


def test_divergence_stops_with_the_step_and_a_dump_that_reproduces_it(make, exact, capsys):
    config = make("llama", **{"optimizer.learning_rate": 1e30, "train.log_every": 1, "train.skip_limit": 5})
    with pytest.raises(FloatingPointError, match=r"llama diverged: steps \d+ to \d+ were skipped") as error:
        loop.train(config)
    assert not (run_folder.of(config) / "DONE.json").exists()
    training = [line for line in exact(run_folder.of(config)) if "loss" in line]
    assert training[-1]["skipped"] == 5 and all(line["loss"] is None or line["loss"] > 0 for line in training)

    (dump,) = (run_folder.of(config) / "stopped").iterdir()
    report = json.loads((dump / "report.json").read_text())
    assert f"first bad parameter group is {report['first_bad_group']}" in str(error.value)
    assert f"holds documents {report['documents'][0]}, " in str(error.value)
    capsys.readouterr()
    assert cli.main(["train", f"--replay={dump}"]) == 0
    out = capsys.readouterr().out
    assert f"{report['first_bad_group']}   <- first bad" in out and out.endswith("as it was\n")
    report["loss"] = "3.0"
    (dump / "report.json").write_text(json.dumps(report))
    assert cli.main(["train", f"--replay={dump}"]) == 1
    assert cli.main(["train", f"--replay={dump.parent}"]) == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data.path": "absent/*.txt"}, "absent"),
        ({"model.vocab_size": 100}, "config.model.vocab_size"),
        ({"train.sequence": 100_000}, "config.train.sequence"),
        ({"log.wandb_project": "p"}, "wandb is not installed"),
        ({"model.attention": "pallas_gpu"}, "config.model.attention"),
    ],
)
def test_bad_input_is_refused_before_any_compile(make, monkeypatch, changes, message):
    monkeypatch.setattr(loop, "compile_programs", lambda *_: pytest.fail("compiled"))
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=message):
        loop.train(make("tnl", **changes))


def test_command_line_trains_and_names_the_folder_last(recipe, options, capsys):
    argv = ["train", f"--config={recipe}:tnl", *options, "--config.train.steps=3", "--config.log.tensorboard=true"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    folder = out.splitlines()[-1]
    assert folder.endswith("runs/tnl") and "compiling" in err and "step 3/3" in err
    assert cli.main([*argv, "--config.seed=1"]) == 2
    assert "config.seed was 0 there and is 1 now" in capsys.readouterr().err

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{folder}/tensorboard").Reload()
    assert events.Scalars("heldout_loss")[-1].step == 3 and "loss" in events.Tags()["scalars"]


def test_timing_fields_are_the_only_ones_that_may_differ():
    assert metrics.TIMING == ("tokens_per_s", "mfu", "seconds")


def test_deterministic_options_are_known_to_this_compiler(make):
    """The names are checked on any backend; what they do, only a GPU shows."""
    options = loop.compiler_options(make("tnl", **{"train.deterministic": "true"}), "gpu")
    assert options and not loop.compiler_options(make("tnl"), "gpu")
    assert not loop.compiler_options(make("tnl", **{"train.deterministic": "true"}), "cpu")
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert lowered.compile(compiler_options=options)(1.0) == 2
    with pytest.raises(Exception, match="xla_gpu_deterministic_opz"):
        lowered.compile(compiler_options={"xla_gpu_deterministic_opz": True})
