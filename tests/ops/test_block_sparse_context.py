"""Block-sparse attention with time cut over a mesh gives what one device gives, and moves only what it must."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import sharding
from seqmix.ops import attention, block_sparse_attention, masks
from seqmix.ops.block_sparse_context import block_sizes, block_sparse_bytes, choose
from seqmix.ops.mesh import layout
from tests.collectives import both_ways, sent
from tests.quick import QUICK

B, T, H, HK, K, V = 2, 32, 4, 2, 3, 5
PACKED = np.repeat([[1, 1, 0, 2, 2, 2, 0, 0], [0, 0, 5, 5, 5, 5, 7, 7]], 4, axis=1)
PLACES = np.random.default_rng(0).permuted(np.tile(np.arange(T), (B, 1)), axis=1)
LISTS = np.argsort(np.random.default_rng(1).random((B, HK, 8, 16)), axis=-1)[..., :5].astype(np.int32)
FIXED = masks.Causal() & (masks.Window(5) | masks.Strided(4))
NEAR = masks.Causal() & masks.Window(5)
CASES = {
    "a fixed pattern": dict(mask=FIXED, sizes=(512, 2), soft_cap=1.5, return_lse=True),
    "packed": dict(mask=FIXED, segment_ids=PACKED, sizes=(3, 2)),
    "positions": dict(
        mask=masks.Positions(FIXED), data=dict(q_positions=PLACES, kv_positions=PLACES[:1]), sizes=(4, 4)
    ),
    "lists": dict(blocks=LISTS, mask=masks.Causal(), sizes=(4, 2)),
    "lists of one row": dict(blocks=jnp.asarray(LISTS[:1, :1]), sizes=(4, 2)),
    "lists that do not fit": dict(blocks=LISTS[:, :, :3], sizes=(12, 2)),
    "ring, by itself": dict(mask=NEAR, segment_ids=PACKED, sizes=(4, 3), soft_cap=1.5, return_lse=True),
    "ring, lists": dict(blocks=jnp.asarray(LISTS), sizes=(4, 2), context="ring"),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def pull(op, key_heads=(HK, HK), **options):
    """(results, gradients of q, k, v, the slopes and a bias), compiled under the rules in force."""
    of_keys, of_values = key_heads
    args = draw(0, B, T, H, K), draw(1, B, T, of_keys, K), draw(2, B, T, of_values, V), draw(3, H) ** 2
    bias = options.pop("bias", None)

    def f(q, k, v, slopes, bias):
        more = {} if bias is None else {"bias": bias}
        out = op(q, k, v, slopes=slopes, **more, **options)
        leaves = [jnp.where(jnp.isfinite(x), x, 0) for x in jax.tree.leaves(out)]
        return sum(jnp.sum(x * draw(9 + i, *x.shape)) for i, x in enumerate(leaves)), out

    wrt = (0, 1, 2, 3) if bias is None else (0, 1, 2, 3, 4)
    (_, out), grads = jax.jit(jax.value_and_grad(f, wrt, has_aux=True), compiler_options=QUICK)(*args, bias)
    return jax.tree.map(np.asarray, (out, grads))


def check(op, **options):
    """On four stretches of time, heads over two devices, as on one device."""
    want = pull(op, **{name: x for name, x in options.items() if name != "context"})
    with sharding.use_mesh(sharding.make_mesh(context=4, model=2)):
        got = pull(op, **options)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.any(b)
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)  # sums in another order, in float64


@pytest.mark.parametrize("name", CASES)
def test_four_stretches_of_time_give_what_one_gives(name, x64):
    check(block_sparse_attention, **CASES[name])


SCORED = {
    "a mask": dict(mask=masks.Causal() & (masks.Window(5) | masks.Sinks(2)), segment_ids=PACKED, context="ring"),
    "a bias": dict(mask=FIXED, bias=draw(4, B, H, T, T), key_heads=(1, 2), return_lse=True, context="gather"),
    "signed": dict(segment_ids=PACKED, bias=draw(4, 1, H, 1, T), normalizer="signed", key_heads=(4, 2)),
}


@pytest.mark.parametrize("name", SCORED)
def test_masks_biases_and_normalisers_hold_in_stretches(name, x64):
    check(attention, block=4, **SCORED[name])


BYTES = {
    "gather": (FIXED, ("all-gather", "reduce-scatter")),
    "ring": (masks.Causal(), ("collective-permute",) * 2),
    None: (masks.Window(40, causal=False) & masks.Segments(), ("collective-permute",) * 2),  # both neighbours
}


@pytest.mark.parametrize("form", BYTES)
def test_bytes_sent_are_what_the_program_says(form):
    mask, kinds = BYTES[form]
    mesh = sharding.make_mesh(context=4, devices=jax.devices()[:4])
    cut = jax.NamedSharding(mesh, jax.P(None, "context"))
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype, sharding=cut)

    def op(q, k, v, ids):
        data = dict.fromkeys(mask.inputs, ids)
        return block_sparse_attention(q, k, v, mask=mask, data=data, sizes=(16, 16), context=form)

    with sharding.use_mesh(mesh):
        given = tuple(shape(1, 256, *size) for size in ((H, K), (HK, K), (HK, V)))
        programs = both_ways(op, given, (shape(1, 256, dtype=jnp.int32),), shape)
    want = block_sparse_bytes(form or "ring", 4, 1, 256, HK, K, V, mask=mask, itemsize=4)
    for program, kind, count in zip(programs, kinds, want, strict=True):
        found = sent(program.as_text())
        if form is None:
            found.pop("all-gather", None)  # XLA's, of the ends of the ids of blocks, for the lists
        assert found == {kind: count}


def test_stretches_hold_whole_blocks_and_the_form_follows_from_the_mask():
    with sharding.use_mesh(sharding.make_mesh(context=8)):
        lay = layout(1, 8000)
        found = [block_sizes(lay, "ring", 8000, 4000, (n, n)) for n in (512, 128, 1000, 4096)]
        assert found == [(500, 500), (125, 125), (1000, 500), (1000, 500)]
        form = lambda mask, **options: choose(lay, mask, 8000, 8000, (100, 100), False, options.get("context"))
        assert form(NEAR) == "ring" and form(masks.Causal()) == "gather" == form(NEAR, context="gather")
        assert form(NEAR & masks.Segments()) == "ring" and form(masks.Positions(NEAR)) == "gather"
        assert choose(lay, NEAR, 8000, 7999, (100, 100), False, None) is None
        wrong = {
            (8000, 7999, (100, 100)): "ring': S=7999 keys are",
            (8000, 8000, (100, 300)): "ring': stretches of 1000 keys",
        }
        for call, reason in wrong.items():
            with pytest.raises(ValueError, match=f"^context: block-sparse attention cannot run '{reason}"):
                choose(lay, NEAR, *call, True, "ring")


def test_forms_that_a_call_does_not_have_are_refused():
    x = np.ones((1, 4, 2, 2), np.float32)
    with pytest.raises(ValueError, match="^context: expected None or ring or gather beside a mask, got 'heads'$"):
        attention(x, x, x, mask=NEAR, context="heads")
    with pytest.raises(ValueError, match="^context: expected None or gather beside bias, got 'ring'$"):
        attention(x, x, x, bias=np.ones((1, 1, 4, 4), np.float32), context="ring")
    with pytest.raises(ValueError, match="^context: expected None or one of ring, gather, got 'zigzag'$"):
        block_sparse_attention(x, x, x, mask=NEAR, context="zigzag")
