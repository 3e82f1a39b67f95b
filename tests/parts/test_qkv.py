"""The shell of recurrent mixers: where tokens stand, features of phases, sizes of heads, the way out."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core.mixer import Mixer
from seqmix.parts import qkv


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sized(Mixer):
    """Fields that the helpers ask for."""

    heads: int = 2
    key_dim: int | None = None
    value_dim: int | None = 3
    chunk: int = 4

    @property
    def sizes(self):
        return qkv.head_size(self, "key_dim", 0.5), qkv.head_size(self, "value_dim")


def test_tokens_stand_where_their_segment_has_come_to():
    x = jnp.zeros((3, 5, 1))
    ids = jnp.array([[0, 4, 4, 0, 4], [4, 2, 2, 0, 0], [0, 0, 0, 0, 0]])
    length = jnp.array([7, 7, 7], jnp.int32)
    place, after = qkv.places(x, ids, length=length)
    assert place.tolist() == [[0, 7, 8, 0, 9], [7, 0, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert after.tolist() == [10, 2, 7] and after.dtype == length.dtype
    place, after = qkv.places(x, length=length)
    assert place.tolist() == [[7, 8, 9, 10, 11]] * 3 and after.tolist() == [12] * 3
    assert qkv.places(x)[0].tolist() == [[0, 1, 2, 3, 4]] and qkv.places(x, ids)[1] is None


def test_positions_given_stand_but_do_not_count():
    x, given = jnp.zeros((1, 3, 1)), jnp.array([[5, 9, 2]])
    place, after = qkv.places(x, jnp.array([[1, 1, 0]]), given, length=jnp.array([4]))
    assert place is given and after.tolist() == [6]


def test_products_of_phase_features_turn_with_the_difference_of_the_angles():
    rng = np.random.default_rng(0)
    q, k, a, b = (rng.normal(size=(2, 3, 4)).astype(np.float32) for _ in range(4))
    got = jnp.sum(qkv.phase_features(q, a) * qkv.phase_features(k, b), axis=-1)
    np.testing.assert_allclose(got, np.sum(q * k * np.cos(a - b), axis=-1), atol=1e-5)
    assert qkv.phase_features(jnp.bfloat16(q), a).dtype == jnp.bfloat16


def test_heads_share_the_width_unless_their_size_is_given():
    assert Sized(d_model=8).sizes == (2, 3) and Sized(d_model=8, key_dim=5, value_dim=None).sizes == (5, 4)
    qkv.check_sizes(Sized(d_model=8))
    qkv.check_sizes(Sized(key_dim=5))  # no width yet
    for fields, message in (
        (dict(d_model=6), "Sized.key_dim: expected a value, or a number of heads that divides 0.5 \\* d_model, got"),
        (dict(d_model=5, key_dim=1, value_dim=None), "Sized.value_dim: .* divides d_model, got heads=2 and d_model=5"),
        (dict(chunk=6), "Sized.chunk: expected a power of two, got 6"),
        (dict(key_dim=0), "Sized.key_dim: expected a positive integer, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            qkv.check_sizes(Sized(**fields))


def test_only_what_has_taps_is_convolved():
    tree = qkv.head_params(4, {"q": (2, 3), "v": (2, 5)}, conv_width=3, convolved=("v",))
    assert tree["q"].shape == (4, 2, 3) and list(tree["conv"]) == ["v"] and tree["conv"]["v"].shape == (3, 2, 5)
    v = np.random.default_rng(0).normal(size=(1, 4, 2, 5)).astype(np.float32)
    same, state = qkv.convolve({}, {"v": v}, state="kept")
    assert same["v"] is v and state == "kept"
    last = jnp.zeros((3, 2, 5)).at[2].set(1.0)
    got, state = qkv.convolve({"conv": {"v": last}}, {"v": v}, state=qkv.conv_state(tree["conv"], 1, jnp.float32))
    np.testing.assert_allclose(got["v"], v / (1 + np.exp(-v)), atol=1e-6)
    np.testing.assert_array_equal(state["v"], v[:, 2:])


def test_the_way_out_norms_gates_and_projects():
    rng = np.random.default_rng(0)
    mixed, gate = rng.normal(size=(2, 1, 3, 2, 4)).astype(np.float32)
    out = rng.normal(size=(2, 4, 5)).astype(np.float32)
    want = mixed / np.sqrt(np.mean(mixed**2, (-2, -1), keepdims=True)) * gate
    options = dict(gate=gate, groups=1, activation=lambda g: g, eps=0.0)
    y = qkv.way_out({"out": out}, mixed, **options)
    np.testing.assert_allclose(y, np.einsum("bthv,hvd->btd", want, out), rtol=1e-4, atol=1e-5)
    assert qkv.way_out({"out": out}, mixed, dtype=jnp.bfloat16, **options).dtype == jnp.bfloat16
