"""`linscale ladder`: trains every run of a recipe in one process, then fits the laws and writes the report.

All runs are checked before the first is trained. Finished runs are skipped and unfinished ones continued, so the same
command may be given again at any time.
"""

import argparse
import gc
import os
import time
from pathlib import Path

from linscale.config import Config, ConfigError
from linscale.training import recipes

DEFAULT = "configs/demo.py"
HELP = f"""\
Train every run of a recipe, then fit and report; the path of the report is the last line. The same command again
skips finished runs and continues the others.

  linscale ladder                                          the demo: {DEFAULT}
  linscale ladder --config=configs/ladder.py --only='tnl-*' --config.data.source=text --config.data.path='*.txt'

Every field of linscale/config.py can be set for all runs as --config.section.field=value.
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "linscale ladder", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE.py", default=DEFAULT, help=f"the recipe (default {DEFAULT})")
    parser.add_argument("--only", metavar="GLOB", default="*", help="train only the rungs whose name matches")
    parser.add_argument("--config.FIELD", dest="unused", metavar="VALUE", help="override a field, as often as needed")
    args, rest = parser.parse_known_args(argv)
    configs = recipes.load_ladder(args.config, recipes.split(rest, "ladder"), args.only)

    from linscale.training import hosts

    if hosts.asked(os.environ) is not None:  # each would train the whole ladder, into the same folders
        raise ConfigError(
            "linscale ladder is one process, but this environment starts several (SLURM tasks, TPU workers or "
            f"JAX_NUM_PROCESSES); there run linscale train --config={args.config}:RUNG for each rung, then linscale "
            f"report {configs[0].output} in one process."
        )
    run(configs, args.config)
    from linscale.scaling import report

    print(report.write(Path(configs[0].output), say=print))
    return 0


def run(configs: list[Config], recipe: str) -> None:
    """Trains the runs, in order."""
    import jax

    from linscale import data
    from linscale.training import loop, run_folder
    from linscale.training.metrics import duration, say

    for config in configs:
        loop.check(config)
    todo = [config for config in configs if not run_folder.read_done(config)]
    run_folder.check_space(todo)
    corpora = {}
    for config in todo:  # usually one corpus for all
        if config.data not in corpora:
            corpora[config.data] = data.prepare(config.data, config.model.vocab_size, log=say)
            say(corpora[config.data].summary)
        data.check_batch(corpora[config.data], config.train.batch, config.train.sequence)
    output = Path(configs[0].output)
    run_folder.write_json(output / "ladder.json", {"recipe": recipe, "runs": _names(output, configs)})

    outlook = Outlook(todo)
    for number, config in enumerate(configs, 1):
        label = f"[{number}/{len(configs)}] {config.name}"
        if config not in todo:
            say(f"{label}: finished before")
            continue
        outlook.begin(config)
        done = loop.train(config, corpora[config.data], label, lambda n: f"ladder {duration(outlook.left(n))} left")
        outlook.end()
        say(f"{label}: held-out loss {done['heldout_loss']:.4f} nats/token, {done['heldout_bpb']:.4f} bits/byte")
        jax.clear_caches()  # no run shares compiled programs with another, and they add up
        gc.collect()


class Outlook:
    """Guesses the time left of a ladder: so many FLOPs at the speed so far, and so many starts of a run.

    Small runs are mostly start (compile), so one rate alone would mislead.
    """

    def __init__(self, configs: list[Config]):
        from linscale.scaling import flops

        self._flops = {
            config.name: config.steps
            * config.tokens_per_step
            * flops.flops_per_token(config.model, config.train.sequence)
            for config in configs
        }
        self._waiting = dict(self._flops)
        self._trained = self._training = self._starting = 0.0  # FLOPs, seconds, seconds
        self._starts = 0

    def begin(self, config: Config) -> None:
        self._config, self._began, self._first = config, time.perf_counter(), None
        self._waiting.pop(config.name)

    def left(self, step: int) -> float:
        """Seconds left for this run and those after it, at a finished step of this run."""
        now = time.perf_counter()
        if self._first is None:  # the first step heard of: what came before was the start
            self._first = (step, now)
            self._starting += now - self._began
            self._starts += 1
        done = self._flops[self._config.name] * (step - self._first[0]) / self._config.steps
        here = self._flops[self._config.name] * (1 - step / self._config.steps)
        trained, training = self._trained + done, self._training + now - self._first[1]
        rate = trained / training if trained and training else float("inf")
        return (here + sum(self._waiting.values())) / rate + len(self._waiting) * self._starting / self._starts

    def end(self) -> None:
        if self._first is not None:
            self._trained += self._flops[self._config.name] * (1 - self._first[0] / self._config.steps)
            self._training += time.perf_counter() - self._first[1]


def _names(output: Path, configs: list[Config]) -> list[str]:
    """The runs of the ladder in order; with --only, those trained by an earlier command stay."""
    import json

    path, names = output / "ladder.json", [config.name for config in configs]
    old = json.loads(path.read_text())["runs"] if path.exists() else []
    return [name for name in old if name not in names and (output / name / "config.json").exists()] + names
