"""The command line: one table of subcommands, and what an error looks like to the person who typed it.

Only the module of the chosen subcommand is imported, so that `linscale --help` needs neither jax nor a second.
Exit codes: 0 done, 1 training diverged, 2 something the user gave cannot work, 75 training ended early and the same
command continues it (schedulers should run it again), 130 interrupted from the keyboard.
"""

import contextlib
import errno
import importlib
import logging
import os
import sys

import linscale
from linscale.config import ConfigError, Restart

# subcommand: (module with main(argv) -> int, one line of help)
COMMANDS = {
    "train": ("linscale.training.command", "train one run; the same command again continues it"),
    "ladder": ("linscale.scaling.ladder", "train every run of a recipe, then fit and report (default: a small demo)"),
    "eval": ("linscale.evaluation.command", "judge checkpoints: the paper's tasks, SCROLLS, needles, loss by position"),
    "generate": ("linscale.evaluation.generate_command", "continue prompts with a checkpoint, streamed"),
    "export": ("linscale.interop.exporting", "write a checkpoint for transformers or flash-linear-attention"),
    "import": ("linscale.interop.importing", "make a run of a folder in transformers' layout"),
    "fit": ("linscale.scaling.fit", "fit L(C) = a C^b for each architecture of a ladder"),
    "report": ("linscale.scaling.report", "write the report of a ladder as one HTML page and PNG files"),
    "count": ("linscale.scaling.count", "parameters and FLOPs of the paper's models"),
    "paper": (
        "linscale.scaling.paper_command",
        "the paper's laws: who is best at which compute, where lines cross; its tables",
    ),
    "plan": (
        "linscale.launch.plan_command",
        "compile a config for a pod that is not here: does it fit, how fast at most",
    ),
    "launch": ("linscale.launch.command", "scripts and manifests for TPU VMs, GKE and SLURM"),
    "doctor": ("linscale.doctor", "versions, devices, memory, disk, and which attention kernels run here"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items())
    return (
        f"linscale {linscale.__version__}: scaling laws for linear-complexity language models\n\n"
        f"usage: linscale COMMAND [options]      linscale COMMAND --help\n\n{rows}"
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(linscale.__version__)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise ConfigError(f"{argv[0]!r} is not a command; it must be one of {', '.join(COMMANDS)}.")
        # A command has a GPU to itself: left alone, JAX would take three quarters of its memory and run out at that.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
        with _log_on_stderr():
            return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])
    except (ConfigError, OSError, FloatingPointError) as error:
        if os.environ.get("LINSCALE_TRACEBACK"):
            raise
        print(f"linscale: error: {_sentence(error)}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except Restart as end:
        print(f"linscale: {_sentence(end)}", file=sys.stderr)
        return Restart.code
    except KeyboardInterrupt:
        print("\nlinscale: interrupted; the same command again continues from the last checkpoint.", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _log_on_stderr():
    """Shows what the package logs, as which kernel runs, without the prefixes and copies of absl's root handler."""
    logger, handler = logging.getLogger("linscale"), logging.StreamHandler()
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _sentence(error: Exception) -> str:
    """On one line, and without what a terminal would obey: names of files and fields may hold anything."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in _told(error))


def _told(error: Exception) -> str:
    if not isinstance(error, OSError):
        return " ".join(str(error).split())
    if isinstance(error, BrokenPipeError):
        return "the reader of the output closed it."
    where = error.filename or "the output folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space is left on the disk of {where}; free some, then the same command continues."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where} cannot be written or read ({error.strerror}); choose another folder with --config.output=DIR."
    text = " ".join(str(error).split())
    # a failed background write arrives wrapped, its number lost
    if "No space left on device" in text or "RESOURCE_EXHAUSTED" in text:
        return "no space is left on the disk of the output folder; free some, then the same command continues."
    return text
