"""The chunked cross entropy against the plain one and against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.models.loss import chunked_cross_entropy, plain_cross_entropy, unembed


def _inputs(time=13, vocab=11, rows=12):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (2, time, 8))
    table = jax.random.normal(keys[1], (rows, 8))
    targets = jax.random.randint(keys[2], (2, time), 0, vocab)
    mask = jax.random.bernoulli(keys[3], 0.7, (2, time)).astype(jnp.float32)
    return hidden, table, targets, mask


def test_plain_is_the_definition():
    hidden, table, targets, mask = map(np.asarray, _inputs())
    logits = np.einsum("btd,vd->btv", hidden, table)[..., :11]
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    got = plain_cross_entropy(hidden, table, targets, mask, vocab=11)
    np.testing.assert_allclose(got, [(nll * mask).sum(), (lse**2 * mask).sum()], rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 64])
def test_chunked_equals_plain_with_gradients(chunk):
    hidden, table, targets, mask = _inputs()

    def plain(h, w):
        nll, z = plain_cross_entropy(h, w, targets, mask, vocab=11)
        return 3 * (nll + 0.1 * z), (nll, z)

    def chunked(h, w):
        total, *sums = chunked_cross_entropy(h, w, targets, mask, vocab=11, chunk=chunk, z_loss=0.1)
        return 3 * total, tuple(sums)

    want, got = (jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, table) for f in (plain, chunked))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # float32 sums in another order
    assert not np.any(got[1][1][11:])  # padded rows of the table get no gradient


def test_masked_targets_may_be_anything():
    hidden, table, targets, mask = _inputs()
    other = jnp.where(mask > 0, targets, -1)
    a = chunked_cross_entropy(hidden, table, targets, mask, chunk=4)
    b = chunked_cross_entropy(hidden, table, other, mask, chunk=4)
    np.testing.assert_array_equal(a, b)


def test_full_logits_never_exist():
    hidden, table = jnp.zeros((2, 64, 8)), jnp.zeros((100, 8))
    targets = jnp.zeros((2, 64), jnp.int32)

    def f(h, w):
        return chunked_cross_entropy(h, w, targets, jnp.ones((2, 64)), chunk=8)[0]

    text = str(jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(hidden, table))
    assert "f32[2,8,100]" in text
    assert "2,64,100]" not in text and "8,2,8,100]" not in text


def test_padded_rows_are_never_likely():
    hidden, table, _, _ = _inputs()
    logits = unembed(hidden.astype(jnp.bfloat16), table, 11)
    assert logits.dtype == jnp.float32
    assert np.all(np.asarray(jax.nn.softmax(logits))[..., 11:] == 0)


def test_bad_shapes_are_named():
    hidden, table, targets, mask = _inputs()
    with pytest.raises(ValueError, match="targets"):
        chunked_cross_entropy(hidden, table, targets[:, 1:], mask)
    with pytest.raises(ValueError, match="table"):
        chunked_cross_entropy(hidden, table[:, 1:], targets, mask)
    with pytest.raises(ValueError, match="chunk"):
        chunked_cross_entropy(hidden, table, targets, mask, chunk=0)
