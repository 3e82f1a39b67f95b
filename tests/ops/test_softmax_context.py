"""Attention with time cut over a mesh: every form gives what one device gives, and moves only what it must."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import sharding
from seqmix.ops.mesh import layout
from seqmix.ops.softmax import attention
from seqmix.ops.softmax_context import FORMS, attention_bytes, choose
from seqmix.ops.softmax_reference import Rules
from tests.collectives import both_ways, sent
from tests.quick import QUICK

B, T, H, K, V = 2, 16, 8, 3, 5
# A segment over two stretches of four, one that fills three, padding over a border, an id that comes back, a stretch
# of padding alone.
PACKED = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 5, 5, 0, 0, 5, 5]])
PLACES = np.random.default_rng(0).permuted(np.tile(np.arange(T), (B, 1)), axis=1)
# name: (keys, heads of keys or (of keys, of values), sink logits, options)
CASES = {
    "causal": (T, (2, 4), True, {}),
    "window and sinks": (T, 8, True, {"window": 3, "sinks": 1, "soft_cap": 1.5, "return_lse": True}),
    "window": (T, 4, False, {"window": 3}),
    "both sides": (T, 1, False, {"window": 3, "causal": False}),
    "packed": (T, 8, True, {"segment_ids": PACKED, "window": 5, "return_lse": True}),
    "all of a segment": (T, (1, 4), False, {"segment_ids": PACKED, "causal": False}),
    "positions": (T, 2, False, {"q_positions": PLACES, "kv_positions": PLACES[:, ::-1]}),
    "other keys": (8, 2, False, {"causal": False, "segment_ids": PACKED, "kv_segment_ids": PACKED[:, 4:12]}),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def pull(name, **options):
    """(results, gradients of q, k, v and the sink), compiled under the rules in force."""
    keys, key_heads, sink, more = CASES[name]
    of_keys, of_values = key_heads if isinstance(key_heads, tuple) else (key_heads, key_heads)
    shapes = (B, T, H, K), (B, keys, of_keys, K), (B, keys, of_values, V), (H,)
    args = [draw(i, *shape) for i, shape in enumerate(shapes)]

    def f(q, k, v, logits):
        out = attention(q, k, v, sink_logits=logits if sink else None, block=2, **more, **options)
        weights = [draw(9 + i, *x.shape) for i, x in enumerate(jax.tree.leaves(out))]
        finite = [jnp.where(jnp.isfinite(x), x, 0) for x in jax.tree.leaves(out)]
        return sum(jnp.sum(x * w) for x, w in zip(finite, weights, strict=True)), out

    run = jax.jit(jax.value_and_grad(f, tuple(range(4)), has_aux=True), compiler_options=QUICK)
    (_, out), grads = run(*args)
    return jax.tree.map(np.asarray, (out, grads))


@functools.cache
def wanted(name):
    return pull(name, implementation="reference")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_one_device_gives(name, form, x64):
    """Heads over two devices and time over four, or heads whole where all-to-all needs them."""
    if form == "zigzag" and name == "other keys":
        pytest.skip("queries and keys are not cut alike")
    want = wanted(name)
    model = 1 if form == "heads" else 2
    with sharding.use_mesh(sharding.make_mesh(data=2 // model, context=4, model=model)):
        got = pull(name, context=form)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.any(b) or b.shape == (H,)
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)  # sums in another order, in float64


# form: (key heads, other options); as many devices as there are shares of time
SENT = {
    "ring": (2, {}),
    "ring, packed": (2, {"packed": True}),
    "ring, one neighbour": (2, {"window": 9, "value_heads": 4}),
    "ring, both neighbours": (4, {"window": 9, "causal": False}),
    "zigzag": (2, {"need_lse": True}),
    "heads": (4, {"need_lse": True, "value_heads": 2}),
    "heads, packed": (2, {"packed": True}),
    "gather": (2, {"packed": True}),
}


def compiled(form, ways, time, key_heads=2, *, value_heads=None, packed=False, need_lse=False, heads=8, **options):
    """(forward, backward) of the op on this form, B = 2, K = 16 and V = 8."""
    mesh = sharding.make_mesh(context=ways, devices=jax.devices()[:ways])
    cut = jax.NamedSharding(mesh, jax.P(None, "context"))
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype, sharding=cut)
    ids = shape(2, time, dtype=jnp.int32)

    def op(q, k, v, ids):
        more = dict(q_positions=ids, kv_positions=ids, segment_ids=ids, kv_segment_ids=ids) if packed else {}
        return attention(q, k, v, context=form, block=32, return_lse=need_lse, **options, **more)

    with sharding.use_mesh(mesh):
        args = tuple(shape(2, time, *size) for size in ((heads, 16), (key_heads, 16), (value_heads or key_heads, 8)))
        return both_ways(op, args, (ids,), shape)


@pytest.mark.parametrize("name", SENT)
def test_bytes_sent_are_what_the_program_says(name):
    form, (key_heads, options) = name.split(",")[0], SENT[name]
    kind = {"heads": "all-to-all", "gather": "all-gather"}.get(form, "collective-permute")
    count = attention_bytes(form, 4, 2, 64, 8, key_heads, 16, 8, itemsize=4, **options)
    for program, want in zip(compiled(form, 4, 64, key_heads, **options), count, strict=True):
        got = sent(program.as_text())
        assert sum(got.values()) == want and kind in got, got


def temporaries(form, ways):
    """Bytes of temporaries on a device, forward and backward, with 64 tokens for each of so many devices."""
    return [p.memory_analysis().temp_size_in_bytes for p in compiled(form, ways, 64 * ways, 16, heads=16)]


@pytest.mark.parametrize("form, flat", [("ring", True), ("zigzag", True), ("gather", False)])
def test_memory_is_flat_as_time_and_devices_grow_together(form, flat):
    """But where keys are gathered: that the probe sees what it looks for."""
    for few, many in zip(temporaries(form, 4), temporaries(form, 8), strict=True):
        assert many <= 1.01 * few if flat else many > 1.5 * few


def test_stretches_that_nobody_sees_are_not_computed():
    """Poisoned values, NaN * 0 would show: one block a stretch, so that a stretch is skipped whole."""
    time = 32
    q, k, v = (draw(i, 1, time, 1, 4).astype(np.float32) for i in range(3))
    ids = np.repeat([[1, 2, 3, 4]], time // 4, axis=1)
    calls = [({}, slice(0, 8), slice(8, 32)), ({"window": 3}, slice(24, 32), slice(0, 16))]
    calls += [({"segment_ids": ids, "causal": False}, slice(8, 16), np.r_[0:8, 16:32])]
    for options, rows, hidden in calls:
        bad = v.copy()
        bad[:, hidden] = np.nan
        with sharding.use_mesh(sharding.make_mesh(context=4, devices=jax.devices()[:4])):
            run = jax.jit(lambda q, k, v, o=options: attention(q, k, v, context="ring", **o), compiler_options=QUICK)
            want, got = run(q, k, v)[:, rows], run(q, k, bad)[:, rows]
        assert np.all(np.isfinite(got))
        np.testing.assert_array_equal(got, want)


def form_of(time, heads, key_heads, ways=4, context=None, keys=None, order="index", causal=True, window=None, **axes):
    shapes = dict(B=2, T=time, S=keys or time, H=heads, Hk=key_heads, Hv=key_heads)
    with sharding.use_mesh(
        sharding.make_mesh(context=ways, devices=jax.devices()[: ways * axes.get("model", 1)], **axes)
    ):
        lay = layout(2, time, heads, key_heads)
        return choose(lay, Rules(1.0, causal, window, 0, None), SimpleNamespace(**shapes), order, context)


def test_the_form_follows_from_the_call():
    assert form_of(2048, 8, 8) == "gather"
    assert form_of(4096, 8, 8) == "heads"
    assert form_of(4096, 8, 2) == "zigzag"
    assert form_of(4096, 8, 4, model=2) == "zigzag"
    assert form_of(4096, 8, 2, causal=False) == "ring"
    assert form_of(4096, 8, 8, window=1024) == "ring"
    assert form_of(4096, 8, 8, window=1024, order="runs") == "heads"  # positions say more than indices
    assert form_of(4096, 8, 8, keys=4097) is None


@pytest.mark.parametrize(
    "context, call, reason",
    [
        ("round", {}, "context: expected None or one of ring, zigzag, heads, gather, got 'round'"),
        ("heads", {}, "context: attention cannot run 'heads': 6 heads and 3 key heads of a device"),
        ("zigzag", {"time": 12}, "context: attention cannot run 'zigzag': expected T = S a multiple of twice the 4"),
        ("ring", {"keys": 15}, "context: attention cannot run 'ring': S=15 keys are no multiple of the 4 ways"),
    ],
)
def test_a_form_that_does_not_fit_is_refused(context, call, reason):
    time, keys = call.get("time", 16), call.get("keys", call.get("time", 16))
    q, k = np.ones((1, time, 6, 4), np.float32), np.ones((1, keys, 3, 4), np.float32)
    mesh = sharding.make_mesh(context=4, devices=jax.devices()[:4])
    with sharding.use_mesh(mesh), pytest.raises(ValueError, match=reason):
        attention(q, k, k, context=context)
