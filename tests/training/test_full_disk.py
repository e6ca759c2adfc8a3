"""A disk that fills up during a run: a clean stop, nothing harmed, and with room again the run ends as undisturbed."""

import contextlib
import errno
import subprocess

import pytest

from linscale.cli import _sentence
from linscale.training import checkpoint, loop, run_folder, small_state

SIZE = 24 * 2**20


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize(("most", "leave"), ((small_state._MOST, 0), (small_state._MOST, 70_000), (0, 70_000)))
def test_full_disk(make, exact, disk, tmp_path, monkeypatch, capfd, most, leave):
    """Without a byte left a log line fails; with some left the next save does: of the small form, and of orbax (most 0).

    TensorBoard's files are open in all.
    """
    monkeypatch.setattr(small_state, "_MOST", most)
    shape = {"train.steps": 40, "train.checkpoint_every": 10}
    loop.train(whole := make("tnl", **shape))
    config, ballast = make("tnl", **shape, **{"output": disk, "log.tensorboard": "true"}), disk / "ballast"
    folder, record, whole_before = run_folder.of(config) / "checkpoints", loop.record, []

    def record_and_fill(log, progress, config, n, measured):
        if n == 29:
            whole_before.extend(checkpoint.steps_in(folder))
            with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass
            with open(ballast, "r+b") as file:
                file.truncate(ballast.stat().st_size - leave)
        return record(log, progress, config, n, measured)

    with monkeypatch.context() as patch, pytest.raises(OSError) as raised:
        patch.setattr(loop, "record", record_and_fill)
        loop.train(config)
    assert raised.value.errno == errno.ENOSPC and "no space is left on the disk of" in _sentence(raised.value)
    assert whole_before and checkpoint.steps_in(folder)[-1] >= whole_before[-1]
    said = capfd.readouterr().err
    assert "Traceback" not in said and "Exception" not in said and "ERROR" not in said
    ballast.unlink()
    newest = checkpoint.steps_in(folder)[-1]
    assert (folder / str(newest) / small_state.FILE).exists() == (most > 0)
    loop.train(config)
    assert f"continues after step {newest}" in capfd.readouterr().err
    assert exact(run_folder.of(config)) == exact(run_folder.of(whole))


@pytest.mark.parametrize(
    "text, number",
    [
        ("RESOURCE_EXHAUSTED: Failed writing: x: No space left on device [os_error_code='28']", errno.ENOSPC),
        ("INTERNAL: Failed writing: x: Input/output error [os_error_code='5']", None),
    ],
)
def test_errors_of_background_writes_are_os_errors(tmp_path, text, number):
    with pytest.raises(OSError, match="No space left" if number else "checkpoint cannot be written") as raised:  # noqa: SIM117
        with checkpoint._writing(tmp_path):
            try:
                raise ValueError(text)
            except ValueError as error:
                raise RuntimeError("the save failed") from error
    assert raised.value.errno == number
    with pytest.raises(ZeroDivisionError), checkpoint._writing(tmp_path):
        raise ZeroDivisionError
