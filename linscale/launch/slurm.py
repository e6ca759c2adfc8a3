"""sbatch scripts. All nodes must see the working folder and config.output (a shared file system).

A job that loses a node, is preempted or reaches its time limit is put back in the queue and continues from its last
checkpoint; `--signal` gives the tasks time to save one before the limit.
"""

import argparse
import os
import re
import sys

from linscale.config import ConfigError
from linscale.launch import job as jobs

TEMPLATE = """\
#!/bin/bash
# {recipe}
# sbatch {file}
{header}

cd {folder} || exit 2
{setup}
srun --kill-on-bad-exit=1 {command}
code=$?

# {final} are final; anything else is started again, unless the job was cancelled or has used up its restarts.
case $code in {pattern}) exit $code ;; esac
if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
  echo "linscale: exit code $code, back into the queue (restart $((${{SLURM_RESTART_COUNT:-0}} + 1)) of {restarts})"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--tasks-per-node", type=int, default=0, help="processes a node; 0: one for each GPU, else one")
    parser.add_argument("--gpus-per-node", type=int, default=0)
    parser.add_argument("--cpus-per-task", type=int, default=0)
    parser.add_argument("--time", default="", help="limit, as 24:00:00 or 2-00:00:00")
    for name in ("partition", "account", "qos", "constraint", "reservation"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--folder", default=".", help="working folder, seen by every node")
    parser.add_argument("--setup", default="", help="shell lines before the run, as 'module load cuda'")
    parser.add_argument("--python", default=sys.executable, help="python of the environment that has linscale")


def render(job: jobs.Job, options) -> dict[str, str]:
    """File name -> text."""
    for field in ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task"):
        low = 1 if field == "nodes" else 0
        if getattr(options, field) < low:
            raise ConfigError(f"--{field.replace('_', '-')} is {getattr(options, field)}; it must be at least {low}.")
    if options.time and not re.fullmatch(r"(\d+-)?\d+(:\d{1,2}){0,2}", options.time):
        raise ConfigError(f"--time is {options.time!r}; it must be like 24:00:00 or 2-00:00:00.")
    if options.gpus_per_node:  # else how many devices a task will see is not known here
        jobs.check_mesh(job, options.nodes * options.gpus_per_node)
    folder = os.path.abspath(options.folder)
    header = {
        "job-name": job.name,
        "nodes": options.nodes,
        "ntasks-per-node": options.tasks_per_node or options.gpus_per_node or 1,
        "gpus-per-node": options.gpus_per_node,
        "cpus-per-task": options.cpus_per_task,
        "time": options.time,
    }
    for name in ("partition", "account", "qos", "constraint", "reservation"):
        header[name] = getattr(options, name) and jobs.word(f"--{name}", getattr(options, name), r"[A-Za-z0-9_.,&|+-]+")
    header |= {
        "output": "slurm-%x-%j.log",
        "open-mode": "append",
        "requeue": None,
        "signal": f"TERM@{jobs.GRACE}",
    }
    lines = [
        f"#SBATCH --{name}" if value is None else f"#SBATCH --{name}={value}"
        for name, value in header.items()
        if value or value is None
    ]
    recipe = os.path.relpath(os.path.abspath(job.recipe.partition(".py:")[0] + ".py"), folder)
    argv = [options.python, "-m", "linscale", *job.train(None if job.shipped else recipe)]
    file = f"{job.name}.sbatch"
    text = TEMPLATE.format(
        recipe=" ".join(" ".join(["linscale", *map(jobs.quote, job.train())]).split()),
        file=file,
        header="\n".join(lines),
        folder=jobs.quote(folder),
        setup="\n".join(
            ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"] * bool(options.cpus_per_task) + [options.setup]
        ),
        command=jobs.shell(argv),
        final=", ".join(map(str, jobs.FINAL)),
        pattern=" | ".join(map(str, jobs.FINAL)),
        restarts=job.restarts,
    )
    return {file: text}


def submission(job: jobs.Job, options) -> list[str]:
    """What --submit runs in the folder of the rendered files."""
    return ["sbatch", f"{job.name}.sbatch"]
