import errno
import subprocess
import sys
import types

import pytest

import linscale
from linscale import cli
from linscale.config import ConfigError

HEAVY = (
    "jax",
    "flax",
    "optax",
    "orbax",
    "grain",
    "tensorflow_datasets",
    "ml_collections",
    "matplotlib",
    "numpy",
    "absl",
)


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def imported(statement: str, names) -> list[str]:
    out = python(f"import sys; {statement}; print([n for n in {tuple(names)!r} if n in sys.modules])")
    assert out.returncode == 0, out.stderr
    return eval(out.stdout.splitlines()[-1], {"__builtins__": {}})


def test_help_imports_nothing_heavy():
    assert imported("from linscale.cli import main; main(['--help'])", HEAVY) == []


def test_help_of_a_subcommand_and_its_errors_come_before_jax():
    assert imported("from linscale.cli import main; main(['train', '--config=configs/none.py:x'])", ["jax"]) == []


def test_the_train_step_needs_neither_grain_nor_tfds_nor_ml_collections():
    names = ("grain", "tensorflow_datasets", "ml_collections")
    assert imported("import linscale.training.step, linscale.kernels, linscale.models", names) == []


def test_module_and_function_are_the_same_program():
    out = subprocess.run([sys.executable, "-m", "linscale", "--version"], capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == linscale.__version__ and out.returncode == 0


def test_usage_without_command(capsys):
    assert cli.main([]) == 2
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


def test_unknown_command(capsys):
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr().err == (
        f"linscale: error: 'trian' is not a command; it must be one of {', '.join(cli.COMMANDS)}.\n"
    )


@pytest.mark.parametrize(
    "error, code, text",
    [
        (ConfigError("config.x is 1; it must be 2."), 2, "config.x is 1; it must be 2."),
        (ConfigError("two\nlines"), 2, "two lines"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), 2, "no space is left on the disk of /a/b"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "/a/b cannot be written or read"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), 2, "/a/b cannot be written or read"),
        (FloatingPointError("diverged at step 7"), 1, "diverged at step 7"),
        (KeyboardInterrupt(), 130, "interrupted; the same command again continues"),
    ],
)
def test_errors_are_one_sentence(error, code, text, capsys, monkeypatch):
    def fail(argv):
        raise error

    monkeypatch.delenv("LINSCALE_TRACEBACK", raising=False)
    monkeypatch.setitem(sys.modules, "failing", types.SimpleNamespace(main=fail))
    monkeypatch.setitem(cli.COMMANDS, "train", ("failing", ""))
    assert cli.main(["train"]) == code
    said = capsys.readouterr().err.strip()
    assert text in said and "\n" not in said and "Traceback" not in said


def test_a_traceback_on_request(monkeypatch):
    def fail(argv):
        raise ConfigError("x")

    monkeypatch.setenv("LINSCALE_TRACEBACK", "1")
    monkeypatch.setitem(sys.modules, "failing", types.SimpleNamespace(main=fail))
    monkeypatch.setitem(cli.COMMANDS, "train", ("failing", ""))
    with pytest.raises(ConfigError):
        cli.main(["train"])


def test_doctor_names_versions_devices_and_kernels(capsys):
    import jax

    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert jax.__version__ in out and jax.devices()[0].device_kind in out
    assert "attention chunked      runs" in out and "attention scan         runs" in out
