"""`python -S child.py PARENT CPUS COMMAND...`: runs COMMAND in this process, on those CPUs (joined by commas), such
that the kernel kills it when PARENT dies (Linux).

A program of its own, since what a fork does in a process with threads must not be Python.
"""

import ctypes
import os
import signal
import sys

SET_PARENT_DEATH_SIGNAL = 1  # of prctl(2); it outlives the exec


def main(parent, cpus, *command):
    """Never returns."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # with it Slurm warns every process of a job; submitit acts on it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if cpus:
            os.sched_setaffinity(0, [int(cpu) for cpu in cpus.split(",")])
    if os.getppid() != int(parent):  # it died before the call above
        os._exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
