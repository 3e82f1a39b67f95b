"""Time cut over a mesh changes nothing: values and every gradient of the state-passing ops, packed rows included."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix import ops
from seqmix.core import sharding
from seqmix.ops import delta_context, linear_chunked
from seqmix.ops.mesh import layout
from tests.quick import QUICK

B, T, H, HK, K, V = 2, 16, 4, 2, 3, 5
# A segment over two stretches of four, one that fills three, padding over a border, a row that begins with padding,
# a stretch of padding alone.
PACKED = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 3, 3], [0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 5, 5, 0, 0, 5, 5]])
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape)


def uniform(*shape):
    return RNG.random(shape)


def unit(*shape):
    x = normal(*shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def linear(kind):
    decay = {"none": None, "head": -uniform(H), "token": -5 * uniform(B, T, H), "channel": -5 * uniform(B, T, H, K)}[
        kind
    ]
    args = (normal(B, T, HK, K), normal(B, T, HK, K), normal(B, T, H, V), decay, normal(B, H, K, V))
    return lambda q, k, v, d, s, ids: ops.linear_attention(q, k, v, d, state=s, segment_ids=ids, chunk=2), args


def normalised():
    args = (uniform(B, T, 1, K), uniform(B, T, 1, K), normal(B, T, H, V), (normal(B, H, K, V), uniform(B, H, K)))
    return lambda q, k, v, s, ids: ops.linear_attention(
        q, k, v, state=s, segment_ids=ids, normalize=True, eps=1e-3, chunk=2
    ), args


def delta(steps, keys=HK):
    n = (steps,) if steps > 1 else ()
    decay = None if steps > 1 else -uniform(B, T, H, K)
    args = (normal(B, T, keys, K), unit(B, T, *n, keys, K), normal(B, T, *n, H, V), uniform(B, T, *n, H), decay)
    args += (unit(B, T, *n, H, K), normal(B, H, K, V))
    return lambda q, k, v, b, d, e, s, ids: ops.delta_rule(
        q, k, v, b, d, erase=e, steps=steps, state=s, segment_ids=ids, chunk=2
    ), args


def delta_of_all_decays():
    """Heads that keep all, lose 1e-9 a token, half and all."""
    function, (q, k, v, b, *_, s) = delta(1)
    return function, (q, k, v, b, np.broadcast_to([0, -1e-9, -0.7, -50.0], (B, T, H)).copy(), None, s)


def rank_one():
    args = (normal(B, T, HK, K), normal(B, T, HK, K), normal(B, T, H, V), -unit(B, T, H, K) / 2, unit(B, T, HK, K))
    args += (-uniform(B, T, H, K), normal(B, H, K, V))
    return lambda q, k, v, left, right, d, s, ids: ops.diagonal_plus_rank_one(
        q, k, v, left, right, d, state=s, segment_ids=ids, chunk=2
    ), args


def scan(reverse, chunk=2):
    args = (normal(B, T, H) + 1j * normal(B, T, H), -uniform(H) + 1j * normal(H), normal(B, H) + 0j)
    if not reverse:
        args = (normal(B, T, H, V), -5 * uniform(B, T, H, 1), normal(B, H, V))
    return lambda x, a, s, ids: ops.linear_scan(x, a, state=s, segment_ids=ids, reverse=reverse, chunk=chunk), args


def scan_of_all_decays():
    """Of channels that keep all, lose 1e-9 a token, half and all, by chunks that do not divide a stretch."""
    logs = np.stack([np.zeros((B, T)), np.full((B, T), -1e-9), -uniform(B, T), np.full((B, T), -50.0)], -1)
    function, (x, _, s) = scan(False, chunk=3)
    return function, (x[..., 0], logs, s[..., 0])


def selective():
    args = (normal(B, T, H), uniform(B, T, H), -uniform(H, 3), normal(B, T, 2, 3), normal(B, T, 2, 3), normal(H))
    args += (normal(B, H, 3),)
    return lambda u, dt, a, b, c, d, s, ids: ops.selective_scan(
        u, dt, a, b, c, d, state=s, segment_ids=ids, chunk=2
    ), args


def conv(width, state):
    args = (normal(B, T, H, 2), normal(width, H, 2), normal(H, 2), normal(B, width - 1, H, 2) if state else None)
    return lambda x, w, b, s, ids: ops.short_conv(x, w, b, state=s, segment_ids=ids), args


def convs(second):
    """Of two arrays, of which the mesh cuts the heads of one; `second`: the width of the other's weights."""
    args = (normal(B, T, H, 2), normal(B, T, 1, 3), normal(3, H, 2), normal(second, 1, 3))
    return lambda x, z, w, v, ids: ops.short_conv({"x": x, "z": z}, {"x": w, "z": v}, segment_ids=ids), args


def log_linear(kind, length=False):
    decay = {"none": None, "head": -uniform(H), "channel": -5 * uniform(B, T, H, K)}[kind]
    args = (normal(B, T, HK, K), normal(B, T, HK, K), normal(B, T, H, V), normal(B, T, H, 7), decay)
    args += (normal(B, H, 6, K, V),)
    # Rows that go on from positions 5 and 11: blocks of all levels end in a stretch, and others go on.
    places = np.array([5, 11])
    return lambda q, k, v, scales, d, s, ids: ops.log_linear_attention(
        q, k, v, scales, d, state=(s, places) if length else None, segment_ids=ids, chunk=2
    ), args if length else (*args[:-1], None)


def log_linear_delta():
    args = (normal(B, T, HK, K), unit(B, T, HK, K), normal(B, T, H, V), uniform(B, T, H), normal(B, T, H, 7))
    args += (-uniform(B, T, H), normal(B, H, 6, K, V))
    places = np.array([5, 11])
    return lambda q, k, v, b, scales, d, s, ids: ops.log_linear_delta_rule(
        q, k, v, b, scales, d, state=(s, places), segment_ids=ids, chunk=2
    ), args


def running_softmax():
    args = (normal(B, T, H), normal(B, T, H, V))
    return lambda scores, v, ids: ops.logsumexp_scan(scores, v, segment_ids=ids, chunk=2), args


def long(two_sided, channels=8):
    args = normal(B, T, channels), normal(channels, 9), normal(channels, 5) if two_sided else None, normal(channels)
    return lambda x, kernel, ahead, skip, ids: ops.long_conv(x, kernel, ahead=ahead, skip=skip), args


UNPACKED = {
    "long convolution": long(False),
    "long convolution, two-sided": long(True),
    "long convolution, channels that are not divided": long(True, channels=6),
}
CASES = {
    "linear attention": linear("none"),
    "linear attention, a decay per head": linear("head"),
    "linear attention, a decay per token": linear("token"),
    "linear attention, a decay per channel": linear("channel"),
    "normalised linear attention": normalised(),
    "delta rule": delta(1),
    "delta rule, one key head, two steps": delta(2, keys=1),
    "delta rule, all decays": delta_of_all_decays(),
    "diagonal plus rank one": rank_one(),
    "log-linear attention": log_linear("none"),
    "log-linear attention, a decay per head": log_linear("head", length=True),
    "log-linear attention, a decay per channel": log_linear("channel", length=True),
    "log-linear delta rule": log_linear_delta(),
    "linear scan": scan(False),
    "linear scan, all decays": scan_of_all_decays(),
    "complex linear scan in reverse": scan(True),
    "complex linear scan in reverse, a chunk a stretch": scan(True, chunk=4),
    "selective scan": selective(),
    "short convolution": conv(3, True),
    "short convolution, of two arrays": convs(3),
    "short convolution, of two arrays and widths": convs(2),
    "short convolution, wider than a stretch": conv(7, False),
    "running softmax": running_softmax(),
}


def pull(function, args, ids):
    """(values, gradients) of weighted results, compiled under the rules in force."""
    weights = {}

    def loss(*given):
        out = function(*given, ids)
        leaves = jax.tree.leaves(out)
        if not weights:
            draw = np.random.default_rng(1)
            weights["w"] = [
                draw.normal(size=x.shape) + (1j * draw.normal(size=x.shape) if x.dtype.kind == "c" else 0)
                for x in leaves
            ]
        return sum(jnp.sum(x * w).real for x, w in zip(leaves, weights["w"], strict=True)), out

    wanted = tuple(i for i, x in enumerate(args) if x is not None)
    return jax.jit(jax.value_and_grad(loss, wanted, has_aux=True), compiler_options=QUICK)(*args)


@pytest.mark.parametrize("name, packed", [*itertools.product(CASES, (False, True)), *((n, False) for n in UNPACKED)])
def test_four_stretches_of_time_give_what_one_gives(name, packed):
    function, args = (CASES | UNPACKED)[name]
    ids = PACKED if packed else None
    with jax.enable_x64(True):
        want = pull(function, args, ids)
        with sharding.use_mesh(sharding.make_mesh(context=4, model=2)):
            got = pull(function, args, ids)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Sums in another order, in float64.
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "name, ids, ways, parts",
    [
        ("delta rule, one key head, two steps", PACKED, {"context": 2}, 2),
        ("diagonal plus rank one", None, {"context": 2}, 4),
        ("diagonal plus rank one", PACKED, {}, 3),
        ("delta rule, all decays", None, {}, 4),
        ("delta rule, one key head, two steps", PACKED, {"model": 2}, 3),
    ],
)
def test_parts_of_a_stretch_give_what_it_gives(monkeypatch, name, ids, ways, parts):
    """As a GPU cuts it, also where parts do not divide it: parts of padding alone, that a segment passes, in which some
    open. A device's stretch, or the whole of time with and without heads cut.
    """
    function, args = CASES[name]
    with jax.enable_x64(True):
        want = pull(function, args, ids)
        monkeypatch.setattr(delta_context, "parts", lambda lay, d, chunk: parts)
        monkeypatch.setattr(delta_context.targets, "capability", lambda: (9, 0))  # steps of several chunks
        with sharding.use_mesh(sharding.make_mesh(**ways, devices=jax.devices()[: 2 if ways else 1])):
            got = pull(function, args, ids)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_a_gpu_cuts_time_in_parts_where_rows_and_heads_are_few_and_chunks_many(monkeypatch):
    def count(b, t, h, k=128, n=1):
        return delta_context.parts(layout(b, t, h), SimpleNamespace(B=b, T=t, H=h, K=k, V=k, n=n), 64)

    with sharding.use_mesh(sharding.make_mesh(context=4, model=2)):
        assert count(1, 32768, 32) == 1  # on a CPU
        monkeypatch.setattr(delta_context.targets, "capability", lambda: (9, 0))
        assert [count(1, 32768, 32), count(1, 8192, 8), count(1, 4096, 8), count(8, 32768, 32)] == [4, 4, 2, 1]
        assert [count(1, 32768, 32, 64), count(1, 4096, 8, n=2), count(1, 32768 + 256, 32)] == [8, 4, 4]
    assert count(1, 8192, 16) == 1  # among several devices, without a mesh
    with sharding.use_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
        assert [count(1, 8192, 16), count(8, 4096, 16), count(16, 2048, 16), count(1, 960, 16)] == [4, 1, 1, 1]


def test_a_stretch_of_several_blocks_of_chunks_is_one(monkeypatch):
    function, args = CASES["delta rule"]
    with jax.enable_x64(True):
        want = pull(function, args, PACKED)
        monkeypatch.setattr(linear_chunked, "_TILES", 8)
        monkeypatch.setattr(linear_chunked, "_FEWEST", 1)
        assert linear_chunked.plan(T // 4, 2, B * H)[0] == 2
        with sharding.use_mesh(sharding.make_mesh(context=4, devices=jax.devices()[:4])):
            got = pull(function, args, PACKED)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_a_layout_cuts_what_the_mesh_divides():
    assert layout(2, 16, 4) is None
    with sharding.use_mesh(sharding.make_mesh(data=2, context=2, model=2)):
        lay = layout(2, 16, 4, 2)
        assert (lay.batch, lay.time, lay.heads, lay.key_heads) == (("data",), ("context",), ("model",), "cut")
        assert layout(1, 15, 3).batch == layout(1, 15, 3).time == layout(1, 15, 3).heads == ()
        assert layout(2, 16, 4, 1).key_heads == "whole"
    with sharding.use_mesh(sharding.make_mesh(model=8)):
        assert layout(1, 8, 8, 2).key_heads == "one" and layout(1, 8, 24, 3).heads == ()
        with sharding.shares(None):
            assert layout(1, 8, 8) is None


def test_an_implementation_that_cannot_run_is_refused_where_time_is_cut():
    """As on one device: what was named may not reach a device's share unasked for its reasons."""
    x = jnp.zeros((2, 64, 2, 64))
    with sharding.use_mesh(sharding.make_mesh(context=4, devices=jax.devices()[:4])):
        for call in (
            lambda name: ops.linear_attention(x, x, x, implementation=name),
            lambda name: ops.linear_attention(x, x, x, normalize=True, implementation=name),
            lambda name: ops.linear_scan(x, x, implementation=name),
            lambda name: ops.linear_scan(x, x, reverse=True, implementation=name),
        ):
            with pytest.raises(ValueError, match="implementation: .* cannot run 'gpu'"):
                call("gpu")
            with pytest.raises(ValueError, match="implementation: expected one of .*, got 'no'"):
                call("no")
