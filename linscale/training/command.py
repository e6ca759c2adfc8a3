"""`linscale train`."""

import argparse

from linscale.config import ConfigError
from linscale.training import recipes

HELP = """\
Train one run of a recipe. The same command again continues it from its last checkpoint, or says that it is finished.

  linscale train --config=configs/demo.py:tnl-155k
  linscale train --config=configs/ladder.py:tnl-70m --config.data.source=text --config.data.path='books/*.txt'

Exit codes: 0 done; 1 stopped as it diverged; 2 wrong input or a full disk; 75 ended early (SIGTERM, a hang, a lost
worker or host): the same command continues; 130 interrupted.

Every field of linscale/config.py can be set as --config.section.field=value.
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "linscale train", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", metavar="FILE.py:RUNG", help="the recipe and its rung")
    parser.add_argument("--config.FIELD", dest="unused", metavar="VALUE", help="override a field, as often as needed")
    parser.add_argument("--replay", metavar="FOLDER", help="compute again the step that stopped a run, from its dump")
    args, rest = parser.parse_known_args(argv)
    overrides = recipes.split(rest, "train")
    if args.replay is not None:
        if args.config or rest:
            raise ConfigError("--replay takes its config from the dump; give nothing beside it.")
        from pathlib import Path

        from linscale.training import diagnosis

        text, same = diagnosis.replay(Path(args.replay))
        print(text)
        return 0 if same else 1
    if args.config is None:
        raise ConfigError("linscale train needs --config=FILE.py:RUNG, as --config=configs/demo.py:tnl-155k.")
    config = recipes.load_run(args.config, overrides)

    from linscale.training import (
        hosts,
        loop,
        run_folder,
    )  # jax starts here, after the command line is known to be right

    hosts.start()
    done = loop.train(config)
    if not hosts.is_first():
        return 0
    print(f"held-out loss {done['heldout_loss']:.4f} nats/token, {done['heldout_bpb']:.4f} bits/byte")
    print(run_folder.of(config))
    return 0
