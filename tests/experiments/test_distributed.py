"""Which rows of a batch a process reads, and which launchers are recognised."""

import collections

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import distributed

Device = collections.namedtuple("Device", "process_index id")


class Spread:
    """A sharding whose 8 devices belong to processes of `each` devices."""

    def __init__(self, sharding, each):
        self.sharding, self.each = sharding, each

    def devices_indices_map(self, shape):
        found = self.sharding.devices_indices_map(shape)
        return {Device(d.id // self.each, d.id): index for d, index in found.items()}


def shares(mesh, each, spec=("data", "context"), shape=(16, 8)):
    devices = np.asarray(jax.devices()[:8]).reshape(mesh)
    laid = NamedSharding(Mesh(devices, ("data", "context", "model")), PartitionSpec(*spec))
    return [distributed.share(Spread(laid, each), shape, process) for process in range(8 // each)]


@pytest.mark.parametrize(
    "mesh, each, expected",
    [
        ((8, 1, 1), 4, [(0, 2), (1, 2)]),  # rows over everything, two hosts
        ((8, 1, 1), 1, [(h, 8) for h in range(8)]),
        ((2, 2, 2), 4, [(0, 2), (1, 2)]),  # a host has one row of the mesh
        ((2, 2, 2), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # time is cut between hosts: two read the same rows
        ((1, 8, 1), 4, [(0, 1), (0, 1)]),  # all hosts read all rows
        ((1, 1, 8), 4, [(0, 1), (0, 1)]),
    ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(mesh, each, expected):
    assert shares(mesh, each) == expected


def test_rows_that_are_no_one_run_are_all_read():
    devices = np.asarray(jax.devices()[:8])[[0, 4, 1, 5, 2, 6, 3, 7]].reshape(8, 1, 1)  # hosts take turns
    laid = NamedSharding(Mesh(devices, ("data", "context", "model")), PartitionSpec("data"))
    assert [distributed.share(Spread(laid, 4), (16, 8), process) for process in (0, 1)] == [(0, 1), (0, 1)]


def test_placed_rows_of_several_processes_are_those_of_the_batch(monkeypatch):
    """With one process that plays the second of two: it hands over the rows of its own devices alone."""
    batch = np.arange(16 * 4).reshape(16, 4)
    mesh = Mesh(np.asarray(jax.devices()[:4]), ("data",))
    monkeypatch.setattr(distributed, "several", lambda: True)
    whole = distributed.place(batch, NamedSharding(mesh, PartitionSpec("data")))
    np.testing.assert_array_equal(whole, batch)
    asked = []
    monkeypatch.setattr(
        jax, "make_array_from_callback", lambda shape, laid, own: asked.append((shape, own((slice(12, 16), slice(2)))))
    )
    distributed.place(batch[8:], None, (1, 2))
    assert asked[0][0] == (16, 4)
    np.testing.assert_array_equal(asked[0][1], batch[12:16, :2])


@pytest.mark.parametrize(
    "environ, several",
    [
        ({}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a pod that is no part of an indexed job
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "host-0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "host-0"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_launchers_of_several_processes_are_recognised(environ, several):
    assert distributed.launched(environ) is several


def test_a_slurm_job_of_several_tasks_without_srun_is_refused():
    with pytest.raises(ValueError, match="start it with srun"):
        distributed.launched({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"})
