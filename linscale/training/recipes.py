"""Recipes: `--config=configs/FILE.py:RUNG --config.section.field=value` -> a checked `linscale.config.Config`.

A recipe is a Python file (it is run, so use only files you trust) with `RUNGS: tuple[str, ...]` and
`get_config(rung) -> ConfigDict` made from `linscale.config.base()`. Values are typed and fields are locked by
ml-collections; every mistake becomes one ConfigError sentence.
"""

import difflib
import fnmatch
import importlib.util
import os
from pathlib import Path

import linscale
from linscale.config import Config, ConfigError, build, resolve


def split(argv: list[str], command: str) -> list[tuple[str, str]]:
    """['--config.a.b=1', '--config.c', '2'] -> [('a.b', '1'), ('c', '2')]. ConfigError for anything else."""
    overrides, rest = [], list(argv)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--config."):
            raise ConfigError(f"{token!r} is not an option of linscale {command}; see linscale {command} --help.")
        field, equals, value = token.removeprefix("--config.").partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{token} has no value; write {token}=VALUE.")
            value = rest.pop(0)
        overrides.append((field, value))
    return overrides


def load_run(recipe: str, overrides: list[tuple[str, str]]) -> Config:
    """recipe 'FILE.py:RUNG' and overrides -> Config."""
    path, _, rung = recipe.partition(".py:")
    if not rung:
        rungs = _import(recipe.removesuffix(":")).RUNGS
        raise ConfigError(f"--config={recipe} names no rung; write {recipe}:RUNG with one of {_few(rungs)}.")
    return _rung(_import(f"{path}.py"), rung, overrides)


def load_ladder(recipe: str, overrides: list[tuple[str, str]], only: str = "*") -> list[Config]:
    """recipe 'FILE.py' -> the Config of every rung whose name matches the pattern `only`, in the recipe's order."""
    if ".py:" in recipe:
        path, _, rung = recipe.partition(".py:")
        raise ConfigError(
            f"--config={recipe} names one rung; write --config={path}.py --only={rung}, or linscale train."
        )
    module = _import(recipe)
    rungs = [rung for rung in module.RUNGS if fnmatch.fnmatchcase(rung, only)]
    if not rungs:
        raise ConfigError(f"--only={only} matches no rung; {recipe} has {_few(module.RUNGS)}.")
    configs = [_rung(module, rung, overrides) for rung in rungs]
    if len({config.output for config in configs}) > 1:
        raise ConfigError(f"the rungs of {recipe} have different config.output; a ladder needs one folder.")
    if len({config.name for config in configs}) < len(configs):
        raise ConfigError(f"rungs of {recipe} share a config.name; each needs its own.")
    return configs


def find(recipe: str) -> Path:
    """The recipe's file: as given, or the one installed with the package when it starts with configs/."""
    package = Path(linscale.__file__).parent
    if Path(recipe).is_file():
        return Path(recipe)
    if recipe.startswith("configs/") and (package / recipe).is_file():
        return package / recipe
    shipped = ", ".join(sorted(f"configs/{file.name}" for file in (package / "configs").glob("*.py")))
    raise ConfigError(f"the recipe {recipe!r} does not exist; shipped recipes are {shipped or 'missing'}.")


def _import(recipe: str):
    path = find(recipe)
    spec = importlib.util.spec_from_file_location(f"linscale_recipe_{path.stem}", path)
    if spec is None:
        raise ConfigError(f"the recipe {recipe!r} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    _run(recipe, spec.loader.exec_module, module)
    for name in ("RUNGS", "get_config"):
        if not hasattr(module, name):
            raise ConfigError(f"the recipe {recipe!r} does not define {name}.")
    rungs = module.RUNGS
    if not isinstance(rungs, tuple | list) or not all(isinstance(rung, str) for rung in rungs):
        raise ConfigError(f"the recipe {recipe!r} has RUNGS = {rungs!r}; it must be a tuple of names.")
    if not rungs:
        raise ConfigError(f"the recipe {recipe!r} has RUNGS that are empty; it must name a rung.")
    if not callable(module.get_config):
        raise ConfigError(f"the recipe {recipe!r} has get_config = {module.get_config!r}; it must be a function.")
    return module


def _rung(module, rung: str, overrides: list[tuple[str, str]]) -> Config:
    if rung not in module.RUNGS:
        near = difflib.get_close_matches(rung, module.RUNGS, 1, 0)
        raise ConfigError(f"{rung!r} is not a rung of the recipe; nearest is {near[0]}, all are {_few(module.RUNGS)}.")
    from ml_collections import ConfigDict

    config = _run(f"{module.__file__}:{rung}", module.get_config, rung)
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"get_config of {module.__file__} gives {config!r:.200} for {rung}, a {type(config).__name__}; it must be "
            "the ConfigDict of linscale.config.base()."
        )
    build(config)  # overrides need every section to be one
    return resolve(_override(config, overrides))


def _run(recipe: str, function, argument):
    """Runs recipe code: a mistake in it is the user's, and is told in one sentence unless a traceback is wanted."""
    try:
        return function(argument)
    except ConfigError:
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # a recipe has no business to end the program
        if os.environ.get("LINSCALE_TRACEBACK"):
            raise
        raise ConfigError(f"the recipe {recipe} fails with {type(error).__name__}: {error}") from error


def _override(config, overrides: list[tuple[str, str]]):
    from absl import flags
    from ml_collections import config_flags

    kinds = dict(_leaves(config))
    for field, _ in overrides:
        if field not in kinds:
            near = difflib.get_close_matches(field, kinds, 1, 0)
            raise ConfigError(f"config.{field} is not a field; the nearest is config.{near[0]}.")
    for field, value in overrides:
        wanted, fits = _KINDS[kinds[field]]
        if not fits(value):
            raise ConfigError(f"config.{field} is {value!r}; it must be {wanted}.")
    values = flags.FlagValues()  # private: absl's global flags belong to whoever runs us
    argv = ["linscale", *(f"--config.{field}={value}" for field, value in overrides)]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def _is(kind: type):
    def fits(text: str) -> bool:
        try:
            kind(text)
        except ValueError:
            return False
        return True

    return fits


# type of a field: what its text must be, and whether a text is
_KINDS = {
    int: ("a whole number", _is(int)),
    float: ("a number", _is(float)),
    bool: ("true or false", lambda text: text.lower() in ("true", "false", "0", "1")),
    str: ("text", lambda text: True),
}


def _few(names) -> str:
    """For messages: all of a short list, the start of a long one."""
    names = list(names)
    return ", ".join(names) if len(names) <= 24 else f"{', '.join(names[:20])}, ... ({len(names)} in all)"


def _leaves(config, prefix: str = ""):
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", type(value)
