"""What every way of launching shares: the command that each host runs, which exit codes end a run, and safe names.

`linscale train` ends with 0 (done), 1 (diverged) or 2 (something the user gave cannot work). Those are final. Every
other ending, a preemption, a lost host or a signal among them, is worth the same command again, which continues from
the last checkpoint.
"""

import base64
import dataclasses
import re
import shlex
from pathlib import Path

import linscale
from linscale.config import Config, ConfigError
from linscale.training import recipes

FINAL = (0, 1, 2)  # exit codes of `linscale train` after which nothing is started again
GRACE = 120  # seconds that a host is given to save a checkpoint before it is taken away


@dataclasses.dataclass(frozen=True)
class Job:
    config: Config
    recipe: str  # FILE.py:RUNG as it was given
    overrides: tuple[tuple[str, str], ...]
    name: str  # of the job; letters, digits and '-'
    restarts: int  # times that the job may be started again

    @property
    def shipped(self) -> bool:
        """Whether the recipe is installed with linscale, so that every host has it."""
        path = recipes.find(self.recipe.partition(".py:")[0] + ".py").resolve()
        return path.is_relative_to((Path(linscale.__file__).parent / "configs").resolve())

    @property
    def recipe_text(self) -> str:
        return recipes.find(self.recipe.partition(".py:")[0] + ".py").read_text()

    def train(self, recipe: str | None = None) -> list[str]:
        """The arguments of linscale. recipe: where the file lies on the host, if not where it was given."""
        path, _, rung = self.recipe.partition(".py:")
        path = recipe or ("configs/" + Path(path).name + ".py" if self.shipped else path + ".py")
        return ["train", f"--config={path}:{rung}", *(f"--config.{field}={value}" for field, value in self.overrides)]


def make(recipe: str, overrides: list[tuple[str, str]], name: str, restarts: int) -> Job:
    """Checks the config as training would. name: empty takes the run's. ConfigError for what cannot work."""
    config = recipes.load_run(recipe, overrides)
    if restarts < 0:
        raise ConfigError(f"--restarts is {restarts}; it must be at least 0.")
    return Job(config, recipe, tuple(overrides), host_name("--name", name or derived(config.name)), restarts)


def check_mesh(job: Job, devices: int) -> None:
    """ConfigError where the devices asked for cannot hold the config's mesh, which training would find only there."""
    from linscale import sharding  # which imports jax

    sharding.check(job.config, devices)


def derived(name: str) -> str:
    """A run's name as a job's: lower case, '-' for what is neither letter nor digit, at most 40 characters."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-")


def host_name(option: str, name: str) -> str:
    """Names that clouds and Kubernetes take: RFC 1123 labels, shortened for what is appended to them."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ConfigError(
            f"{option} is {name!r}; it must be 1 to 40 lower case letters, digits and '-', starting with a letter and "
            "not ending with '-'."
        )
    return name


def word(option: str, value: str, characters: str = r"[A-Za-z0-9@%:,._+=/-]+") -> str:
    """A value for a place that knows no quoting, such as a #SBATCH line. ConfigError for anything that could end it."""
    if not re.fullmatch(characters, value):
        raise ConfigError(f"{option} is {value!r}; it must be letters, digits and the signs @ % : , . _ + = / - alone.")
    return value


def quote(word: str) -> str:
    """shlex.quote, with line breaks written as escapes, so that no part of a value begins a line of a script."""
    if not re.search(r"[\r\n]", word):
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"$'{escaped}'"


def shell(argv: list[str], indent: str = "") -> str:
    """A command for a shell, each word quoted; a long one has a line for each option."""
    words = [quote(word) for word in argv]
    if len(" ".join(words)) <= 100:
        return " ".join(words)
    options = [i for i, word in enumerate(argv) if word.startswith("--")]
    first = options[0] if options else len(words)
    return f" \\\n{indent}  ".join([" ".join(words[:first]), *words[first:]])


def unpack(text: str, path: str) -> str:
    """A shell line that writes `text` to `path`, whatever the text holds."""
    return f"base64 -d > {shlex.quote(path)} <<< {base64.b64encode(text.encode()).decode()}"
