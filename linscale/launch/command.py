"""`linscale launch tpu | gke | slurm`: the scripts or manifests that start a run on many hosts."""

import argparse
import shutil
import subprocess
from pathlib import Path

from linscale.config import ConfigError
from linscale.launch import gke, slurm, tpu
from linscale.launch import job as jobs
from linscale.training import recipes

PLACES = {
    "tpu": (tpu, "shell scripts for TPU VMs (gcloud queued resources)"),
    "gke": (gke, "a JobSet manifest for GKE, TPUs or GPUs"),
    "slurm": (slurm, "an sbatch script"),
}

HELP = """\
Render what starts a run on many hosts. Nothing is submitted without --submit.

  linscale launch slurm --config=configs/ladder.py:tnl-1b --nodes 2 --gpus-per-node 8 --time 24:00:00
  linscale launch tpu --config=configs/pods.py:hgrn2-7b-v5p128 --topology v5p:4x4x8 --zone us-east5-a --config.data.path='/runs/corpus/*'
  linscale launch gke --config=configs/pods.py:tnl-7b-v5e256 --topology v5e:16x16 --image IMAGE --volume runs:/runs --config.data.path='/runs/corpus/*'

Every field of linscale/config.py can be set as --config.section.field=value.
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "linscale launch", description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    places = parser.add_subparsers(dest="place", metavar="{tpu,gke,slurm}", required=True)
    for place, (module, text) in PLACES.items():
        one = places.add_parser(place, help=text, description=module.__doc__.split("\n\n")[0], allow_abbrev=False)
        one.add_argument("--config", required=True, metavar="FILE.py:RUNG", help="the recipe and its rung")
        one.add_argument("--config.FIELD", dest="unused", metavar="VALUE", help="override a field")
        one.add_argument("--name", default="", help="of the job; empty: the run's name")
        one.add_argument("--restarts", type=int, default=100, help="times that a lost run is started again")
        one.add_argument("--out", default="", metavar="DIR", help="write the files there instead of printing them")
        one.add_argument("--submit", action="store_true", help="also submit; needs --out")
        module.add_options(one)
    options, rest = parser.parse_known_args(argv)
    module = PLACES[options.place][0]
    job = jobs.make(options.config, recipes.split(rest, f"launch {options.place}"), options.name, options.restarts)
    files = module.render(job, options)
    submission = module.submission(job, options)
    if options.submit and not options.out:
        raise ConfigError("--submit needs --out=DIR, where the submitted files are kept.")
    if not options.out:
        for name, text in files.items():
            print(f"# ---- {name}\n{text}" if len(files) > 1 else text, end="" if text.endswith("\n") else "\n")
        return 0
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
        print(folder / name)
    if not options.submit:
        print(f"not submitted; to submit: cd {jobs.shell([str(folder)])} && {jobs.shell(submission)}")
        return 0
    if shutil.which(submission[0]) is None:
        raise ConfigError(f"{submission[0]!r} is not installed here, so --submit cannot submit {', '.join(files)}.")
    return min(1, subprocess.run(submission, cwd=folder, check=False).returncode)
