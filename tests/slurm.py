"""Slurm on one machine: a controller and two nodes on loopback, for tests; needs root, slurm-wlm and munge."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

CONFIG = """\
ClusterName=loop
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
ReturnToService=2
KillWait=10
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=cpu Nodes=n1,n2 Default=YES State=UP
"""
MUNGE = Path("/run/munge")


@contextlib.contextmanager
def loopback(folder):
    """The path of the slurm.conf of a running cluster of two nodes, n1 and n2; skips where it cannot be."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name)]
    if missing or os.geteuid():
        pytest.skip(f"no {', '.join(missing)}" if missing else "not root")
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    path = folder / "slurm.conf"
    ports, host = _free_ports(3), socket.gethostname().partition(".")[0]
    path.write_text(CONFIG.format(folder=folder, ports=ports, host=host))
    environment = os.environ | {"SLURM_CONF": str(path)}
    with _munge():
        try:
            for command in (["slurmctld", "-c"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"]):
                subprocess.run(command, env=environment, check=True, capture_output=True)
            _wait_for_nodes(environment)
            yield path
        finally:
            _clear(environment)
            subprocess.run(["scontrol", "shutdown"], env=environment, capture_output=True)
            limit = time.monotonic() + 10
            while list(folder.glob("*.pid")) and time.monotonic() < limit:
                time.sleep(0.1)


@contextlib.contextmanager
def _munge():
    """Slurm's authentication; started here unless it runs already."""
    if (MUNGE / "munge.socket.2").exists():
        yield
        return
    subprocess.run(["install", "-d", "-o", "munge", "-g", "munge", str(MUNGE)], check=True)
    subprocess.run(["runuser", "-u", "munge", "--", shutil.which("munged")], check=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((MUNGE / "munged.pid").read_text()), 15)


def _wait_for_nodes(environment):
    limit = time.monotonic() + 30
    while True:
        seen = subprocess.run(["sinfo", "-hN", "-o", "%T"], env=environment, capture_output=True, text=True).stdout
        if seen.split() == ["idle", "idle"]:
            return
        assert time.monotonic() < limit, f"the nodes are {seen.split()}"
        time.sleep(0.2)


def _clear(environment):
    """Ends all jobs: those that outlive the controller would never end."""
    subprocess.run(["scancel", "--partition=cpu"], env=environment, capture_output=True)
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        if not subprocess.run(["squeue", "-h"], env=environment, capture_output=True, text=True).stdout.strip():
            return
        time.sleep(0.2)


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
