"""A SLURM of one node on the loopback interface: munged, slurmctld and slurmd of the distribution, all files in a folder.

Needs root and the programs of Debian's packages slurmctld, slurmd, slurm-client and munge. Nothing outside the folder is
read or written, so a SLURM that is configured on the machine is left alone. Control groups are off (process tracking by
parentage), as containers mostly have none to give.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo")
CONFIG = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerParameters=sched_interval=1,requeue_delay=1
KillWait=30
SlurmdParameters=config_overrides
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing() -> str | None:
    """Why no cluster can be started here, as a sentence; None if one can."""
    absent = [name for name in PROGRAMS if _find(name) is None]
    if absent:
        return f"{', '.join(absent)} not found; apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "slurmd must be started by root"


@contextlib.contextmanager
def cluster(folder: Path):
    """Starts the three programs and yields the environment in which sbatch and its kin find them; ends them after."""
    for name, mode in (("munge", 0o711), ("state", 0o755), ("spool", 0o755)):
        (folder / name).mkdir(parents=True, mode=mode)
    key = folder / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    controller, daemon = _free_ports(2)
    (folder / "slurm.conf").write_text(
        CONFIG.format(
            host=socket.gethostname().split(".")[0],
            folder=folder,
            controller=controller,
            daemon=daemon,
        )
    )
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    munge = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    commands = (
        ["munged", "--foreground", "--force", f"--socket={folder}/munge/socket", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "localhost"],
    )
    programs = []
    with contextlib.ExitStack() as stack, open(folder / "daemons.log", "w") as log:
        stack.callback(lambda: _end(programs))
        for command in commands:
            command[0] = _find(command[0])
            programs.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            time.sleep(0.5)
        _wait_for_the_node(folder, environment, programs)
        yield environment


def _wait_for_the_node(folder: Path, environment: dict, programs: list) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        state = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True).stdout
        if state.strip() == "idle":
            return
        if any(program.poll() is not None for program in programs):
            break
        time.sleep(0.5)
    logs = "\n".join(f"---- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(folder.glob("*.log")))
    raise RuntimeError(f"SLURM did not start: {state!r}\n{logs}")


def _end(programs: list) -> None:
    for program in reversed(programs):  # slurmd first, while the controller still listens
        program.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(15)
        if program.poll() is None:
            program.kill()
            program.wait()


def _find(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
