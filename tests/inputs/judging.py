"""One malformed input, and what `linscale` must do with it.

A case makes its files in a fresh folder and gives the command line. It passes if the command ends with exit code 2, its
last line on stderr is one sentence that holds the texts of `says` (the field or file, and the value), no traceback is
shown, nothing is compiled, every file that was there has the bytes it had, and no new file lies outside `cache`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

from linscale import cli

ROOMS = ("config_cases", "command_cases", "corpus_cases")
LONGEST = 1200  # characters of a sentence, on one line
RECIPE = """
from linscale.config import base

RUNGS = ("llama", "tnl", "hgrn2", "cosformer2", "hybrid")


def get_config(rung):
    config = base()
    config.name, config.model.arch = rung, rung
    config.model.width, config.model.heads, config.model.ffn = 32, 2, 48
    config.train.batch, config.train.sequence, config.train.steps = 4, 32, 4
    config.train.log_every, config.train.checkpoint_every, config.train.eval_count = 1, 2, 1
    config.data.source, config.data.heldout_tokens, config.data.heldout_share = "text", 200, 0.2
    config.log.tensorboard = False
    return config
"""


@dataclasses.dataclass(frozen=True)
class Case:
    group: str
    name: str
    make: Callable[[Path], list[str]]  # writes files into the folder, returns the arguments of linscale
    says: tuple[str, ...]  # each must occur in the sentence
    compiles: bool = False  # found only by computing, so a compile is allowed


def all_cases() -> list[Case]:
    return [case for room in ROOMS for case in importlib.import_module(room).cases()]


def judge(case: Case, folder: Path) -> tuple[list[str], str]:
    """(what is wrong with the answer, the answer). An empty list is a pass."""
    argv = [str(word) for word in case.make(folder)]
    (folder / "here").mkdir(exist_ok=True)
    before, compiled = snapshot(folder), []
    code, error = None, ""
    with (
        contextlib.chdir(folder / "here"),
        counting_compiles(compiled),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as shown,
    ):
        try:
            code = cli.main(argv)
        except SystemExit as end:  # argparse ends so
            code = end.code
        except BaseException as other:  # what reaches the terminal as a traceback
            error = f"{type(other).__name__}: {other}"
    said = shown.getvalue()
    last = (said.strip().splitlines() or [""])[-1]
    wrong = [f"traceback, {error}"] if error or "Traceback" in said else []
    if not error and code != 2:
        wrong.append(f"exit code {code}")
    if not error and not re.match(r"linscale( \w+)*: error: \S", last):
        wrong.append("no error sentence at the end")
    if len(last) > LONGEST:
        wrong.append(f"a sentence of {len(last)} characters")
    if not all(character.isprintable() for character in last):
        wrong.append("control characters in the sentence")
    wrong += [f"the sentence lacks {text!r}" for text in case.says if text not in last]
    if compiled and not case.compiles:
        wrong.append(f"compiled {len(compiled)} programs")
    after = snapshot(folder)
    wrong += [f"changed {name}" for name, content in before.items() if after.get(name) != content]
    ours = ("cache", "__pycache__")  # the corpora's, and Python's of the recipe
    wrong += [f"left {name}" for name in after if name not in before and not name.startswith(ours)]
    return wrong, last or error


def snapshot(folder: Path) -> dict[str, str]:
    """Path of every file and link below a folder -> digest of its bytes, or where it points."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@functools.cache
def compiles() -> list[float]:
    """Seconds of every XLA compile of this process from the first call on, cached ones included."""
    import jax

    found = []

    def listen(event: str, seconds: float, **_):
        if event.endswith("backend_compile_duration"):
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.clear_caches()
    return found


@contextlib.contextmanager
def counting_compiles(compiled: list):
    """Appends to the list at every XLA compile, cached ones included."""
    import jax

    found = compiles()
    if found:  # what an earlier case compiled counts again
        jax.clear_caches()
        found.clear()
    yield
    compiled += found


def train(folder: Path, *overrides: str, rung: str = "tnl", texts: bool = True) -> list[str]:
    """The command line of a small run whose recipe, corpus, cache and output lie in the folder."""
    recipe = folder / "tiny.py"
    if not recipe.exists():
        recipe.write_text(RECIPE)
    place = [f"--config.data.cache={folder / 'cache'}", f"--config.output={folder / 'runs'}"]
    if texts:
        corpus(folder)
        place.append(f"--config.data.path={folder / 'texts'}/*.txt")
    return ["train", f"--config={recipe}:{rung}", *place, *overrides]


def corpus(folder: Path, documents: int = 40) -> Path:
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for i in range(documents):
        words = " ".join(str((i * 37 + j * j) % 101) for j in range(20 + 7 * (i % 11)))
        (texts / f"{i:02}.txt").write_text(f"document {i}: {words}\n")
    return texts
