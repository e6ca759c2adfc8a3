"""Scripts for TPU VMs: a queued resource of gcloud, and the same command on every worker.

`launch.sh` creates the slice, waits for it, and runs `worker.sh` on all workers. A slice that is taken away (spot) is
deleted and asked for again, and the run continues from its last checkpoint, so config.output must be a folder that
outlives the slice and that every worker sees: a mounted bucket or a network file system (mount it in --setup).
"""

import argparse

from linscale.config import ConfigError
from linscale.launch import hardware
from linscale.launch import job as jobs

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

WORKER = """\
#!/bin/bash
# On every worker of the slice: install, then train until an exit code that is final.
python3 -m venv "$HOME/linscale-env" && . "$HOME/linscale-env/bin/activate" || exit 2
{distributed}{setup}
{install} || exit 2
{recipe}
for restart in $(seq 0 {restarts}); do
  {command}
  code=$?
  case $code in {pattern}) exit $code ;; esac
  echo "linscale: exit code $code, restart $((restart + 1)) of {restarts}" >&2
  sleep 10
done
exit $code
"""

LAUNCH = """\
#!/bin/bash
# Creates the slice, runs worker.sh on all its workers, and asks for a new slice when this one is taken away.
cd "$(dirname "$0")" || exit 2
name={name}
where=({where})
state() {{ gcloud compute tpus queued-resources describe "$name" "${{where[@]}}" --format='value(state.state)' 2>/dev/null; }}

for attempt in $(seq 0 {restarts}); do
  case $(state) in
    ACTIVE | ACCEPTED | PROVISIONING | WAITING_FOR_RESOURCES | CREATING) ;;
    "") {create} || exit 2 ;;
    *) gcloud compute tpus queued-resources delete "$name" "${{where[@]}}" --force --quiet
       {create} || exit 2 ;;
  esac
  until [ "$(state)" = ACTIVE ]; do
    case $(state) in FAILED | SUSPENDED | "") continue 2 ;; esac
    sleep 30
  done
  gcloud compute tpus tpu-vm scp worker.sh "$name:linscale-worker.sh" "${{where[@]}}" --worker=all || continue
  gcloud compute tpus tpu-vm ssh "$name" "${{where[@]}}" --worker=all --command='bash linscale-worker.sh' && exit 0
  # worker.sh restarts by itself what can be restarted, so with the slice still there its ending is final
  [ "$(state)" = ACTIVE ] && exit 1
done
exit 1
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="the slice, as v5p:4x4x8")
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", default="", help="empty: gcloud's own setting")
    parser.add_argument(
        "--runtime", default="", help="software version of the TPU VM; empty: the usual one of the chip"
    )
    parser.add_argument("--spot", action="store_true", help="cheaper, and may be taken away at any time")
    parser.add_argument("--network", default="")
    parser.add_argument("--setup", default="", help="shell lines on every worker before the run, as a mount")
    parser.add_argument("--install", default="pip install 'linscale[tpu]'", help="shell command that installs linscale")


def render(job: jobs.Job, options) -> dict[str, str]:
    """File name -> text."""
    topology = hardware.parse(options.topology)
    if not topology.chip.gcloud:
        offered = ", ".join(chip.name for chip in hardware.CHIPS.values() if chip.gcloud)
        raise ConfigError(
            f"--topology {options.topology!r} is not offered as a TPU VM (those are {offered}); "
            "linscale launch gke or slurm can run on it."
        )
    for option in ("zone", "project", "runtime", "network"):
        if value := getattr(options, option):
            jobs.word(f"--{option}", value)
    if topology.hosts > 1 and not job.config.output.startswith("/"):
        raise ConfigError(
            f"config.output is {job.config.output!r}; on {topology.hosts} hosts it must be an absolute path of a "
            "folder that all of them see, as --config.output=/mnt/bucket/runs."
        )
    jobs.check_mesh(job, topology.devices)
    where = [f"--zone={options.zone}"] + [f"--project={options.project}"] * bool(options.project)
    create = [
        "gcloud", "compute", "tpus", "queued-resources", "create", job.name, *where, f"--node-id={job.name}",
        f"--accelerator-type={topology.accelerator_type}",
        f"--runtime-version={options.runtime or RUNTIMES[topology.chip.name]}",
    ]  # fmt: skip
    create += ["--spot"] * options.spot + [f"--network={options.network}"] * bool(options.network)
    recipe = None if job.shipped else "linscale_recipe.py"
    shared = {"restarts": job.restarts, "pattern": " | ".join(map(str, jobs.FINAL))}
    worker = WORKER.format(
        distributed="export LINSCALE_DISTRIBUTED=auto\n" if topology.hosts > 1 else "",
        setup=options.setup,
        install=options.install,
        recipe=jobs.unpack(job.recipe_text, recipe) if recipe else "",
        command=jobs.shell(["linscale", *job.train(recipe)], indent="  "),
        **shared,
    )
    launch = LAUNCH.format(
        name=jobs.quote(job.name),
        where=" ".join(map(jobs.quote, where)),
        create=" ".join(map(jobs.quote, create)),
        **shared,
    )
    return {"worker.sh": worker, "launch.sh": launch}


def submission(job: jobs.Job, options) -> list[str]:
    """What --submit runs in the folder of the rendered files."""
    return ["bash", "launch.sh"]
