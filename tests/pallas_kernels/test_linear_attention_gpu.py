"""The Hopper kernels of linear attention, without a GPU: against float64 in the interpreter, and through ptxas.

Tolerances: operands are rounded to bfloat16 (2^-9 relative) once before each product and once at the output, so
relative errors of 2 to 4 in a thousand are what exact arithmetic on these operands gives; 5e-3 is fla's bound too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.linear_attention import cost, gates, gpu, gpu_backward
from pallas_kernels.linear_attention import plan as planning

BOUND = 5e-3
needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))


def draw(batch, time, key_heads, heads, key, value, decay=0.1):
    keys = jax.random.split(jax.random.key(time), 7)
    normal = jax.random.normal
    q = normal(keys[0], (batch, time, key_heads, key), jnp.bfloat16) * key**-0.5
    k = normal(keys[1], q.shape, jnp.bfloat16)
    v = normal(keys[2], (batch, time, heads, value), jnp.bfloat16)
    log_decay = -jax.nn.softplus(normal(keys[3], (batch, time, heads))) * decay
    state = normal(keys[4], (batch, heads, key, value))
    return q, k, v, log_decay, state, normal(keys[5], v.shape, jnp.bfloat16), normal(keys[6], state.shape)


def reference(q, k, v, log_decay, state, run_ids, scale):
    """The recurrence, token by token."""
    heads = v.shape[2]
    q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))

    def step(carry, now):
        state, current = carry
        q, k, v, log_decay, run = now
        real, opens = run != 0, (run != 0) & (run != current)
        written = jnp.where(opens[:, None, None, None], 0, state) * jnp.exp(log_decay)[..., None, None]
        written = written + k[..., :, None] * v[..., None, :]
        state = jnp.where(real[:, None, None, None], written, state)
        y = scale * jnp.einsum("bhk,bhkv->bhv", q, state)
        return (state, jnp.where(real, run, current)), jnp.where(real[:, None, None], y, 0)

    run_ids = jnp.ones(q.shape[:2], jnp.int32) if run_ids is None else run_ids
    log_decay = jnp.broadcast_to(log_decay, v.shape[:3])
    over = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, log_decay, run_ids))
    (state, _), y = jax.lax.scan(step, (state, jnp.ones(q.shape[0], jnp.int32)), over)
    return jnp.moveaxis(y, 0, 1), state


def exact(inputs, run_ids, scale, cotangents=None):
    """Results of the reference in float64, or its gradients; a sixth input is the logarithm of the writes' weights."""
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.asarray(x, np.float64))

        def run(q, k, v, log_decay, state, log_write=None):
            v = v if log_write is None else v * jnp.exp(log_write)[..., None]
            return reference(q, k, v, log_decay, state, run_ids, scale)

        if cotangents is None:
            results = jax.jit(run)(*map(wide, inputs))
        else:
            pull = jax.jit(lambda args, cts: jax.vjp(run, *args)[1](cts))
            results = pull(tuple(map(wide, inputs)), tuple(map(wide, cotangents)))
        return [np.asarray(x) for x in results]


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


def packed(time):
    """Two rows: padding left, inside and right, with a segment ending inside a chunk; and one whole segment."""
    first = np.full(time, 1, np.int32)
    first[time // 3 :] = 2
    first[: time // 10] = first[-time // 10 :] = first[time // 2 : time // 2 + 3] = 0
    return jnp.asarray(np.stack([first, np.ones(time, np.int32)]))


@needs_mosaic
def test_forward_of_grouped_heads_matches_float64():
    *inputs, _, _ = draw(1, 136, 1, 2, 128, 64)
    with compat.interpret():
        got = gpu.forward(*inputs, scale=0.5)
        alone, none = gpu.forward(*inputs, scale=0.5, need_last=False)
    for one, want in zip(got, exact(inputs, None, 0.5)):
        assert error(one, want) < BOUND
    assert none is None and np.array_equal(alone, got[0])


@needs_mosaic
def test_forward_with_segments_a_split_over_time_and_an_odd_length_matches_float64():
    *inputs, _, _ = draw(2, 133, 1, 1, 64, 128)
    run_ids = packed(133)
    with compat.interpret():
        y, state = gpu.forward(*inputs, run_ids, scale=0.5, splits=3)
    for one, want in zip((y, state), exact(inputs, run_ids, 0.5)):
        assert error(one, want) < BOUND
    assert not np.any(np.asarray(y)[np.asarray(run_ids) == 0])


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize(("key_heads", "heads", "value"), [(1, 2, 64), (1, 1, 128)], ids=["grouped", "wide"])
def test_values_and_gradients_of_weighted_writes_with_segments_match_float64(key_heads, heads, value):
    *inputs, dy, dstate = draw(2, 133, key_heads, heads, 128, value)
    log_write = jnp.log(jax.random.uniform(jax.random.key(7), (2, 133, heads), minval=1e-4))
    run_ids = packed(133)
    with compat.interpret():
        values = gpu.forward(*inputs, run_ids, log_write, scale=0.5, splits=1)
        got = gpu_backward.backward(*inputs, run_ids, log_write, dy, dstate, scale=0.5, splits=1)
    wants = exact((*inputs, log_write), run_ids, 0.5), exact((*inputs, log_write), run_ids, 0.5, (dy, dstate))
    for one, want in zip((*values, *got), (*wants[0], *wants[1]), strict=True):
        assert error(one, want) < BOUND
        assert np.all(np.isfinite(np.asarray(one, np.float32)))


@needs_mosaic
@pytest.mark.slow
def test_gradients_with_a_split_match_float64():
    *inputs, dy, dstate = draw(1, 261, 1, 2, 64, 64)
    with compat.interpret():
        got = gpu_backward.backward(*inputs, None, None, dy, dstate, scale=0.5, splits=2)
    assert got[-1] is None
    for one, want in zip(got, exact(inputs, None, 0.5, (dy, dstate))):
        assert error(one, want) < BOUND


def test_importing_needs_neither_a_gpu_nor_a_recent_jax():
    reason = compat.unavailable()
    assert reason is None or "need" in reason


@needs_mosaic
def test_calls_that_cannot_run_are_refused_with_the_reason():
    shape = jax.ShapeDtypeStruct
    q, v = shape((2, 64, 1, 128), jnp.bfloat16), shape((2, 64, 2, 64), jnp.bfloat16)
    hopper = {"capability": (9, 0)}
    assert gpu.supports(q, q, v, **hopper) is None
    assert "8.0" in gpu.supports(q, q, v, capability=(8, 0))
    assert "float32" in gpu.supports(q, q, shape(v.shape, jnp.float32), **hopper)
    assert "K=96" in gpu.supports(*[shape((2, 64, 1, 96), jnp.bfloat16)] * 2, v, **hopper)
    assert "decay" in gpu.supports(q, q, v, shape((2, 64, 2, 128), jnp.float32), **hopper)
    assert "scale" in gpu.supports(q, q, v, scale=0.0, **hopper)
    assert "default device" in gpu.supports(q, q, v)


def test_floor_of_mamba2_at_32768_tokens_is_the_bytes_of_its_arrays():
    least = cost.forward(8, 4096, 1, 64, 128, 64)
    assert least.bytes == 32768 * (2 * 2 * 128 + 2 * 2 * 64 * 64 + 4 * 64)
    assert 0.17 < least.floor_ms() < 0.20


def test_decays_are_cumulated_in_chunks_and_stand_still_at_padding_and_past_the_end():
    q, v = np.zeros((2, 133, 1, 64)), np.zeros((2, 133, 3, 64))
    plan = planning.make_plan(q, v, lanes=6, splits=2)
    assert (plan.splits, plan.steps) == (2, 2)
    run_ids = packed(133)
    log_decay = -np.random.default_rng(0).exponential(size=(2, 133, 3)).astype(np.float32)
    want = np.zeros((2, 3, 256))
    want[:, :, :133] = np.where(np.asarray(run_ids)[:, None] != 0, log_decay.swapaxes(1, 2), 0)
    want = np.cumsum(want.reshape(2, 3, 4, 64), axis=-1).reshape(2, 3, 256) / np.log(2)
    got = planning.chunk_decays(jnp.asarray(log_decay), None, run_ids, plan)[:, :, 0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    per_head = planning.chunk_decays(jnp.asarray(log_decay[0, 0]), None, None, plan)
    spread = planning.chunk_decays(jnp.broadcast_to(log_decay[0, 0], v.shape[:3]), None, None, plan)
    assert per_head.shape[0] == 1
    np.testing.assert_array_equal(np.broadcast_to(per_head, spread.shape), spread)
    assert not np.any(planning.chunk_decays(None, None, None, plan))
    multiples = gates.chunk_decays(jnp.asarray(log_decay[0, 0]), None, None, plan)
    want = np.asarray(per_head).reshape(1, 3, 4, 64).swapaxes(1, 2)[:, None]
    np.testing.assert_allclose(multiples, want, rtol=1e-5)


@needs_mosaic
def test_the_kernels_decays_are_those_of_xla_to_the_bits_that_it_keeps():
    """Two bf16 parts keep 16 bits of each logarithm, so sums of one sign are off by less than 2^-16 of themselves."""
    plan = planning.Plan(batch=2, time=133, key_heads=1, heads=3, key=64, value=64, splits=1, steps=3)
    random = np.random.default_rng(0)
    log_decay = -random.exponential(size=(2, 133, 3)).astype(np.float32)
    log_decay[0, 5] = -np.inf
    log_write = jnp.asarray(np.log(random.uniform(1e-6, 2, size=log_decay.shape)), jnp.float32)
    with compat.interpret():
        got = gates.chunk_decays(jnp.asarray(log_decay), log_write, packed(133), plan)[:, :, :3]
    want = planning.chunk_decays(jnp.asarray(log_decay), log_write, packed(133), plan)
    want = np.moveaxis(np.asarray(want).reshape(2, 3, 2, 3, 64), (2, 3), (1, 2))
    assert np.all(np.abs(got - want) <= 2.0**-16 * (np.abs(want[:, :1]) + np.abs(want)))


def test_chunks_of_which_nothing_is_left_at_a_split_end_are_not_counted():
    plan = planning.Plan(batch=1, time=512, key_heads=1, heads=2, key=64, value=64, splits=2, steps=4)
    left = np.zeros((1, 8, 2), np.float32)  # log2 of what is left of a state after each chunk
    left[0, :, 1] = [-60, -60, -60, -60, 0, -200, 0, 0]
    decays = jnp.zeros((1, 1, 8, 2, 64)).at[:, 0, :, :, -1].set(left)
    assert gates.reaching(decays, None, plan, heads=1).tolist() == [[[4, 3], [4, 3]]]
    assert gates.reaching(decays, None, plan, heads=2).tolist() == [[[4], [4]]]
    assert gates.reaching(decays, None, plan, heads=1, reverse=True).tolist() == [[[4, 3], [4, 2]]]
    segments = np.ones((1, 8, planning.SEGMENT_LANES), np.int32)
    segments[0, 2:, planning.CHUNK + 1] = 2  # another run begins in the third chunk
    segments[0, 3:, planning.CHUNK] = 2
    assert gates.reaching(decays, jnp.asarray(segments), plan, heads=1).tolist() == [[[2, 2], [4, 3]]]


def test_what_is_kept_through_chunks_is_the_sum_of_changes_since_all_decayed():
    random = np.random.default_rng(0)
    gained, lost = random.normal(size=(2, 2, 3, 150))
    stays = random.uniform(size=lost.shape) < 0.95
    stays[0], stays[1, 0] = True, np.arange(150) != 149
    start, kept = random.normal(size=(2, 3)), np.zeros(lost.shape)
    value = start
    for chunk in range(150):
        kept[..., chunk] = np.where(stays[..., chunk], value - lost[..., chunk], 0)
        value = kept[..., chunk] + gained[..., chunk]
    found = gpu_backward.kept_through(*(jnp.asarray(x, jnp.float32) for x in (start, lost, gained)), stays)
    np.testing.assert_allclose(found, kept, atol=1e-4)
    assert np.all(np.asarray(found)[~stays] == 0)


@needs_mosaic
def test_gradients_of_decays_of_all_tokens_have_no_errors_that_add_up():
    """Each chunk's tokens share what is kept through it: its error would be theirs 64 times over."""
    q, k, v, _, state, dy, _ = draw(1, 384, 1, 2, 64, 64)
    log_decay = jnp.asarray([-0.07, -0.05])
    with compat.interpret():
        got = gpu_backward.backward(q, k, v, log_decay, state, None, None, dy, None, scale=0.5)[3]
    want = exact((q, k, v, log_decay, state), None, 0.5, (dy, jnp.zeros_like(state)))[3]
    assert error(got, want) < BOUND


# Ahead of time for an H100, through ptxas, on a machine without a GPU.


@pytest.mark.parametrize(
    "shape",
    [(8, 2048, 1, 64, 128, 64), (1, 32768, 16, 16, 128, 128), (1, 1000, 2, 4, 64, 256)],
    ids=["mamba2_without_its_state", "retnet_split", "wide_values"],
)
def test_forward_compiles_for_an_h100_without_spills(spilled, shape):
    batch, time, key_heads, heads, key, value = shape
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    q, v = array(batch, time, key_heads, key), array(batch, time, heads, value)
    run = functools.partial(gpu.forward, need_last=key_heads > 1)
    found = spilled(run, q, q, v, array(batch, time, heads, dtype=jnp.float32))
    assert "linear_attention_forward" in found and set(found.values()) == {0}


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [(8, 2048, 1, 64, 128, 64), (1, 32768, 1, 64, 128, 64), (1, 1000, 2, 4, 64, 256)],
    ids=["mamba2", "mamba2_split", "wide_values"],
)
def test_backward_compiles_for_an_h100_without_spills(spilled, shape):
    batch, time, key_heads, heads, key, value = shape
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    q, v = array(batch, time, key_heads, key), array(batch, time, heads, value)
    decay = array(batch, time, heads, dtype=jnp.float32)
    run = lambda q, k, v, decay, dy: gpu_backward.backward(q, k, v, decay, None, None, decay, dy)
    found = spilled(run, q, q, v, decay, v)
    assert {"linear_attention_dq", "linear_attention_dkv"} <= found.keys() and set(found.values()) == {0}
