"""What the Hopper kernels do where time is cut over devices, each device's part by itself.

The interpreter cannot run kernels on several devices; the whole ring ran on GPUs (docs/benchmarks).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import compat
from seqmix import ops
from seqmix.core import packing, sharding
from seqmix.ops import linear_context, scan_context, scan_kernels, scored, softmax_ring
from seqmix.ops.softmax_reference import Rules

pytestmark = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))
B, J, R, T, S, K = 1, 1, 2, 64, 128, 64


def relative(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))


def test_a_visit_by_the_kernels_is_one_by_chunks():
    first = 100  # of the queries' positions, beside keys from 64 on
    keys = jax.random.split(jax.random.key(first), 5)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
    q, dy = (draw(key, B, J, R, T, K) for key in keys[:2])
    k, v = draw(keys[2], B, J, S, K), draw(keys[3], B, R * J, S, K)  # a head of values for each query head
    sink = jnp.array([[0.3, -0.2]])
    places = lambda ids, at: jnp.stack([ids, at])[:, None].astype(jnp.int32)
    own = places(jnp.where(jnp.arange(T) < 50, 1, 2), first + jnp.arange(T))
    block = k, v, places(jnp.where(jnp.arange(S) < 120, 1, 0), 64 + jnp.arange(S))
    rules = Rules(K**-0.5, True, 90, 0, None)
    found = []
    for kernel in (None, scored.visibility(rules, None, (own[0], block[2][0], own[1], block[2][1]), "given", None)[0]):
        travel = softmax_ring.Travel(rules, "context", ((1, 1),), 64, kernel)
        with compat.interpret():
            y, lse = softmax_ring._visit(travel, q, own, block, sink)
            total = lse + 0.5  # as if other keys were elsewhere
            grads = softmax_ring._visit_back(travel, q, own, block, (total, dy, jnp.ones_like(lse)))
        found.append((y, jnp.exp(lse), *grads))
    assert [x.dtype for x in found[0]] == [x.dtype for x in found[1]]
    for chunked, kernel in zip(*found, strict=True):
        assert relative(kernel, chunked) < 5e-3


def linear_call(seed, heads=1):
    """q, k, v, log_decay, state and ids of three segments and padding, [1, 128, ...]."""
    keys = jax.random.split(jax.random.key(seed), 5)
    q, k, v = (jax.random.normal(key, (1, 128, heads, K), jnp.bfloat16) for key in keys[:3])
    log_decay = jax.nn.log_sigmoid(jax.random.normal(keys[3], (1, 128, heads)) + 4)
    state = jax.random.normal(keys[4], (1, heads, K, K))
    ids = jnp.asarray(np.repeat([4, 0, 7, 9], [50, 6, 20, 52]))[None]
    return q, k, v, log_decay, state, ids


def test_a_stretch_by_the_kernels_takes_and_gives_states_and_their_gradients():
    """One stretch, as the whole axis: values and every gradient are those of the reference."""
    q, k, v, log_decay, state, ids = linear_call(0)
    mesh, runs = sharding.make_mesh(devices=jax.devices()[:1]), packing.runs(ids)
    whole = PartitionSpec()

    def by_kernel(*call):
        one = lambda *call: linear_context._stretch("context", 0.25, *call, runs, None)
        return jax.shard_map(one, mesh=mesh, in_specs=(whole,) * 5, out_specs=(whole, whole), check_vma=False)(*call)

    def by_reference(*call):
        *arrays, state = call
        options = dict(state=state, segment_ids=ids, scale=0.25, implementation="reference")
        return ops.linear_attention(*arrays, **options)

    found = []
    for run in (by_reference, by_kernel):
        with compat.interpret():
            results, back = jax.vjp(run, q, k, v, log_decay, state)
            dy = jax.random.normal(jax.random.key(8), results[0].shape, results[0].dtype)
            found.append((*results, *back((dy, jnp.ones_like(results[1])))))
    for expected, got in zip(*found, strict=True):
        assert expected.dtype == got.dtype and relative(got, expected) < 5e-3


def test_what_a_stretch_adds_and_leaves_is_known_before_its_state():
    """The end from zeros with what is left of a state, and the same of gradients, are those of the whole kernels."""
    from pallas_kernels.linear_attention import gpu, gpu_backward

    q, k, v, log_decay, state, ids = linear_call(1)
    log_decay, runs = log_decay / 8, (ids != 9).astype(jnp.int32)  # much is left of a state; padding at the end
    dy, options = jax.random.normal(jax.random.key(9), v.shape, v.dtype), dict(scale=0.25, splits=2)
    kept = lambda left: state * jnp.exp2(left)[..., None, None]
    with compat.interpret():
        begun = gpu.begun(q, k, v, log_decay, runs, None, need_end=True, **options)
        back = gpu_backward.begun(q, k, v, log_decay, runs, None, dy, need_start=True, **options)
        assert float(jnp.max(begun.left)) > -16
        assert relative(begun.end + kept(begun.left), begun.finish(state)[1]) < 1e-5
        assert relative(back.start + kept(back.whole), back.finish(None, state)[4]) < 1e-5


def test_a_stretch_of_a_scan_by_the_kernels_takes_and_gives_states_and_their_gradients():
    """One stretch, as the whole axis: its parts' states from zeros are known before the one that enters."""
    keys = jax.random.split(jax.random.key(2), 5)
    x, dh = (jax.random.normal(key, (1, 100, 256), jnp.bfloat16) for key in keys[:2])
    log_a = jax.nn.log_sigmoid(jax.random.normal(keys[2], x.shape) + 3)
    state, dlast = (jax.random.normal(key, (1, 256)) for key in keys[3:])
    ids = jnp.asarray(np.repeat([4, 0, 7], [60, 6, 34]))[None]
    mesh, whole = sharding.make_mesh(devices=jax.devices()[:1]), PartitionSpec()

    def by_kernel(*call):
        real, opened = ids != 0, packing.starts(packing.runs(ids))
        form = scan_kernels.Halves()
        one = lambda *call: scan_context._stretch("context", form, *call, real, opened, packing.runs(ids))
        h, last = jax.shard_map(one, mesh=mesh, in_specs=(whole,) * 3, out_specs=(whole, whole), check_vma=False)(*call)
        return jnp.where(real[..., None], h, 0), last

    def by_reference(x, log_a, state):
        return ops.linear_scan(x, log_a, state=state, segment_ids=ids, implementation="reference")

    found = []
    for run in (by_reference, by_kernel):
        with compat.interpret():
            results, back = jax.vjp(run, x, log_a, state)
            found.append((*results, *back((dh, dlast))))
    for expected, got in zip(*found, strict=True):
        assert expected.dtype == got.dtype and relative(got, expected) < 5e-3


def test_what_pieces_of_time_make_of_a_scan_is_that_of_all():
    """Three pieces, joined: the end from zeros and its factor, and the entering state's gradient."""
    from pallas_kernels.linear_scan import gpu

    draw = lambda seed: jax.random.normal(jax.random.key(seed), (1, 100, 256))
    x, log_a, dh = draw(0), jax.nn.log_sigmoid(draw(1) + 6), draw(2)
    with compat.interpret():
        begun = gpu.begun(x, log_a, splits=3, need_end=True)
        back = gpu.backward_begun(log_a, None, None, dh, splits=3, need_start=True)
        assert begun.given["ends"].shape[1] == 3
        h, last = begun.finish(None)
        assert relative(begun.end, last) < 1e-6 and relative(back.end, back.finish(h, None, None)[2]) < 1e-6
    assert all(relative(walk.left, jnp.exp(jnp.sum(log_a, 1))) < 1e-5 for walk in (begun, back))
