"""Several processes as one run: how they find each other, and what process 0 decides for all.

Batches and randomness are functions of the step alone. Of a batch each process reads the rows that its devices
hold (`share`).
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
    """Whether this process is one of several, of a launcher from which jax learns how they find each other: srun,
    mpirun, an indexed Kubernetes job (with the package `kubernetes`), a Cloud TPU slice.

    Raises ValueError for a Slurm job of several tasks whose script runs Python without srun.
    """
    if int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return True
    if "," in environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environ or _tpu_vm():
        return True
    several = int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_JOB_ID" in environ
    if several and "SLURM_STEP_NODELIST" not in environ:
        raise ValueError(f"distributed: Slurm gave this job {environ['SLURM_NTASKS']} tasks; start it with srun")
    return several


def _tpu_vm():
    """Whether jax sees a TPU VM of Compute Engine, whose metadata server alone knows of the other hosts."""
    try:
        from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster
    except ImportError:  # jax's own, and free to move
        return False
    return GceTpuCluster.is_env_present()


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


def share(sharding, shape, process=None):
    """(h, n): the rows of an array of this shape that a process (this one) holds are the h-th of n equal runs.

    (0, 1), all rows, where they are not one run that divides the array.
    """
    process = jax.process_index() if process is None else process
    held = [
        index[0] for device, index in sharding.devices_indices_map(shape).items() if device.process_index == process
    ]
    if not held:
        return 0, 1
    begins, ends = zip(*((rows.start or 0, shape[0] if rows.stop is None else rows.stop) for rows in held))
    low, high = min(begins), max(ends)
    whole = len(set(range(low, high)).difference(*(range(*pair) for pair in zip(begins, ends)))) == 0
    each = high - low
    return (low // each, shape[0] // each) if whole and shape[0] % each == 0 and low % each == 0 else (0, 1)


def place(x, sharding, share=(0, 1)):
    """A host array as one array laid over the devices of all processes: x is the h-th of n equal runs of its rows,
    with all that this process's devices hold."""
    host, hosts = share
    if not several():
        return jax.device_put(x, sharding)
    rows = x.shape[0]

    def own(index):
        begin, end, _ = index[0].indices(rows * hosts)
        return x[(slice(begin - host * rows, end - host * rows), *index[1:])]

    return jax.make_array_from_callback((rows * hosts, *x.shape[1:]), sharding, own)
