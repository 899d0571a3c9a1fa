"""SLURM on this machine: a controller and several nodes on the loopback address, in a folder of its own."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.commands import ROOT

DAEMONS = ("munged", "slurmctld", "slurmd")
UNFINISHED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "UNKNOWN")
"""States of a job that is not through."""
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
SlurmdParameters=config_overrides
ReturnToService=1
MpiDefault=none
KillWait=5
JobRequeue=1
FirstJobId={first}
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def fault() -> str | None:
    """Why SLURM cannot run here; None where it can."""
    missing = [name for name in DAEMONS if not shutil.which(name, path=_path())]
    if missing:
        return f"{', '.join(missing)} is not installed (Debian: slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "it needs root here: its daemons start tasks as other users"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


class Cluster:
    """A running SLURM.

    Args:
        folder: configuration and logs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MASTER"))}
        # The names of the nodes are this cluster's alone; nothing can look them up.
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "MASTER_ADDR": "127.0.0.1", "PATH": _path()}

    def run(self, *words: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
        """A command of SLURM, or any, to its end."""
        with self.begin(*words, **env) as process:
            try:
                out, err = process.communicate(timeout=timeout)
            finally:
                process.kill()
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def begin(self, *words: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            words, env=self.env | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )

    def state(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED``, ``FAILED``...; ``UNKNOWN``: the controller is too busy."""
        told = self.run("scontrol", "show", "job", job).stdout
        words = (word.removeprefix("JobState=") for word in told.split() if word.startswith("JobState="))
        return next(words, "UNKNOWN")

    def idle(self) -> int:
        """Nodes that are ready."""
        return int(self.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() or 0)

    def finish(self, script: Path, log: Path, seconds: float) -> str:
        """Submits a job and waits until it is through, however often it is requeued; returns its state."""
        job = self.run("sbatch", "--parsable", str(script)).stdout.strip()
        end = time.monotonic() + seconds
        while (state := self.state(job)) in UNFINISHED:
            assert time.monotonic() < end, log.read_text() if log.exists() else state
            time.sleep(0.3)
        return state

    def clear(self) -> None:
        """Ends every job: what is left of one would outlive the daemons."""
        last = time.monotonic() + 30
        while self.run("squeue", "-h").stdout.strip() and time.monotonic() < last:
            self.run("scancel", "--signal=KILL", "--full", "--user=root")
            self.run("scancel", "--user=root")
            time.sleep(0.2)


def script_of_docs(fit: str, log: Path) -> str:
    """The job script of docs/cluster.md for two nodes of one task, with another command in the place of its own."""
    (script,) = re.findall(r"```bash\n(#!.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.S)
    for old, new in {
        "--nodes=16": "--nodes=2",
        "--ntasks-per-node=8": "--ntasks-per-node=1",
        "#SBATCH --gpus-per-node=8\n": "",
        "--cpus-per-task=12": "--cpus-per-task=1",
        "%x-%j.log": str(log),
        "lingen fit --recipe t2v_68s --run /shared/runs/t2v_68s": fit,
    }.items():
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


@contextmanager
def slurm(nodes: int) -> Iterator[Cluster]:
    """A cluster of so many nodes of two cores, all on this machine. A requeued job starts again after `cred_expire`
    seconds."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path is short
    folder.chmod(0o755)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        cluster = Cluster(folder)
        _write(folder, nodes)
        commands = [
            ["munged", "--foreground", "--force", f"--key-file={folder}/munge/key", f"--socket={folder}/run/munge",
             f"--pid-file={folder}/run/munged.pid", f"--log-file={folder}/munge/log",
             f"--seed-file={folder}/munge/seed"],
            ["slurmctld", "-D", "-c", "-f", f"{folder}/slurm.conf"],
            *(["slurmd", "-D", "-N", f"n{number}", "-f", f"{folder}/slurm.conf"] for number in range(1, nodes + 1)),
        ]  # fmt: skip
        for command in commands:
            with (folder / "daemons.log").open("ab") as log:
                daemons.append(subprocess.Popen(command, env=cluster.env, stdout=log, stderr=log, cwd=folder))
            if command[0] == "munged":
                _wait(lambda: (folder / "run" / "munge").exists(), daemons, folder)
        _wait(lambda: cluster.idle() == nodes, daemons, folder)
        try:
            yield cluster
        finally:
            cluster.clear()
    finally:
        for one in reversed(daemons):
            one.terminate()
        for one in reversed(daemons):
            try:
                one.wait(15)
            except subprocess.TimeoutExpired:
                one.kill()
                one.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def slurm_for_lingen(nodes: int) -> Iterator[Cluster]:
    """`slurm`, whose jobs run this checkout, one thread a rank, without the user's own settings of `lingen submit`."""
    with slurm(nodes) as one:
        one.env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(one.folder / "config")}
        yield one


def _write(folder: Path, nodes: int) -> None:
    for name in ("munge", "run", "state"):
        (folder / name).mkdir(mode=0o755 if name == "run" else 0o700)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    host, ports = socket.gethostname().split(".")[0], _free_ports(nodes + 1)
    first = 1 + secrets.randbelow(50_000)  # ranks of a job meet at a port that follows from its number
    listed = "\n".join(
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"
        for number, port in enumerate(ports[1:], 1)
    )
    text = CONFIGURATION.format(host=host, port=ports[0], folder=folder, nodes=listed, first=first)
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")


def _free_ports(count: int) -> list[int]:
    from tests.conftest import PORTS, is_free

    return [next(filter(is_free, PORTS)) for _ in range(count)]


def _wait(
    condition: Callable[[], bool], daemons: Sequence[subprocess.Popen[bytes]], folder: Path, seconds: float = 60
) -> None:
    end = time.monotonic() + seconds
    while not condition():
        ended = [one.args for one in daemons if one.poll() is not None]
        late = time.monotonic() > end
        if ended or late:
            logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in folder.glob("*.log"))
            raise RuntimeError(f"SLURM does not come up: {ended or 'nothing ended'}\n{logs}")
        time.sleep(0.1)
