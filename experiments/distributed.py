"""Several processes as one run: how they find each other, and what process 0 decides for all.

Batches and randomness are functions of the step alone, so every process knows the whole batch and places its
own rows of it.
"""

import os

import jax
import numpy as np


def start(settings):
    """Joins the other processes, if `settings` (a config.Distributed) or the launcher names any.

    Raises ValueError in one line when they cannot be joined. To be called before jax is used.
    """
    here = {"heartbeat_timeout_seconds": settings.heartbeat}
    if settings.coordinator is not None:
        here |= {"coordinator_address": settings.coordinator}
        here |= {"num_processes": settings.processes, "process_id": settings.process}
    elif not launched(os.environ):
        return
    try:
        jax.distributed.initialize(**here)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"distributed: {str(error).splitlines()[0]}") from error


def launched(environ):
    """Whether srun or mpirun started this process as one of several.

    Raises ValueError for a Slurm job of several tasks whose script runs Python without srun.
    """
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    several = int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_JOB_ID" in environ
    if several and "SLURM_STEP_NODELIST" not in environ:
        raise ValueError(f"distributed: Slurm gave this job {environ['SLURM_NTASKS']} tasks; start it with srun")
    return several


def first():
    """Whether this is process 0, which alone writes logs, tables and manifests."""
    return jax.process_index() == 0


def several():
    """Whether there are other processes."""
    return jax.process_count() > 1


def agree(value):
    """Process 0's integer or truth value, for all; every process must call it."""
    if not several():
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def place(x, sharding):
    """A host array that every process holds, as one array laid over the devices of all."""
    if not several():
        return jax.device_put(x, sharding)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
