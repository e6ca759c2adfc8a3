"""Trains the rungs of a recipe several at a time on each GPU, the dearest first, each by `linscale train`.

    python experiments/h200_ladder/several.py --config configs/books.py --gpus 4 --jobs 2 --limit 560 --config.data.path='books/*.txt'

After --limit seconds the runs still going get SIGTERM, save and end; the same command continues them. Small models leave
most of a large GPU idle, so several share it. What a run prints is in OUTPUT/NAME.log. Exit code 0: all rungs are
finished; 75: the limit came first; 1: a run failed, its last lines are printed.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def start(config, recipe: str, overrides: list[tuple[str, str]], gpu: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "linscale", "train", f"--config={recipe}:{config.name}"]
    command += [f"--config.{field}={value}" for field, value in overrides]
    with open(Path(config.output) / f"{config.name}.log", "a") as log:
        env = os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


def tail(config, lines: int) -> str:
    return "\n".join((Path(config.output) / f"{config.name}.log").read_text(errors="replace").splitlines()[-lines:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/books.py")
    parser.add_argument("--only", default="*", help="pattern of rungs")
    parser.add_argument(
        "--gpus", type=int, default=1, help="the first so many of this machine, or of CUDA_VISIBLE_DEVICES"
    )
    parser.add_argument("--jobs", type=int, default=5, help="runs at a time on each")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds until the runs are told to stop")
    args, rest = parser.parse_known_args()
    began = time.perf_counter()

    from linscale import data
    from linscale.scaling import flops
    from linscale.training import recipes, run_folder

    overrides = recipes.split(rest, "train")
    configs = recipes.load_ladder(args.config, overrides, args.only)
    Path(configs[0].output).mkdir(parents=True, exist_ok=True)
    data.prepare(configs[0].data, configs[0].model.vocab_size, log=lambda text: print(text, flush=True))

    def price(config):
        return config.steps * config.tokens_per_step * flops.flops_per_token(config.model, config.train.sequence)

    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.gpus)))
    gpus = visible.split(",")[: args.gpus]
    waiting = sorted((one for one in configs if not run_folder.read_done(one)), key=price)
    running, failed, told = {}, [], False
    while running or (waiting and not told):
        while waiting and len(running) < len(gpus) * args.jobs and not told:
            config, taken = waiting.pop(), [gpu for *_, gpu in running.values()]
            gpu = min(gpus, key=taken.count)
            running[config.name] = (config, start(config, args.config, overrides, gpu), time.perf_counter(), gpu)
        time.sleep(0.2)
        for config, process, since, _ in list(running.values()):
            if process.poll() is None:
                continue
            del running[config.name]
            now = time.perf_counter()
            print(
                f"{now - began:6.0f} s  {config.name}: exit code {process.returncode} after {now - since:.0f} s",
                flush=True,
            )
            if process.returncode not in (0, 75):
                failed.append(config)
                print(tail(config, 6), flush=True)
            elif process.returncode == 0:
                print(tail(config, 2).splitlines()[0], flush=True)
        if not told and time.perf_counter() - began > args.limit:
            told = True
            for _, process, *_ in running.values():
                process.send_signal(signal.SIGTERM)
    if failed:
        return 1
    return 75 if any(not run_folder.read_done(one) for one in configs) else 0


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the memory
    sys.exit(main())
