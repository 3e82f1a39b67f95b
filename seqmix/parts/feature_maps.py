"""Feature maps phi of linear attention: a pair weighs phi(q) . phi(k) where softmax attention has exp(q . k / sqrt(K)).

A map is a frozen dataclass that other mixers may bring as well:

    dim(K)               number of features of a head of K channels
    params(heads, K)     its weights, a dict of `Param`, {} for most
    apply(params, q, k)  (phi(q), phi(k)), [B, T, H, dim(K)] of [B, T, H, K] each, in the dtypes of q and k
    flops(K)             of a token's q and k in one head

Features are computed in float32 (float64 for float64 inputs). All of them give phi(q) . phi(k) >= 0.
"""

import difflib
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from seqmix.core import param
from seqmix.core.param import Param

HEDGEHOG_FORMS = ("halves", "whole", "exp")


def _acc(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@dataclass(frozen=True)
class Elu:
    """phi(x) = elu(x) + 1: x + 1 above 0, e^x below (Katharopoulos et al., arXiv 2006.16236, equation 7)."""

    def dim(self, key_dim: int) -> int:
        return key_dim

    def params(self, heads: int, key_dim: int) -> dict:
        return {}

    def apply(self, params, q, k):
        def phi(x):
            h = _acc(x)
            return jnp.where(h > 0, h + 1, jnp.exp(jnp.minimum(h, 0))).astype(x.dtype)

        return phi(q), phi(k)

    def flops(self, key_dim: int) -> int:
        return 2 * 4 * key_dim


@dataclass(frozen=True)
class Relu:
    """phi(x) = max(x, 0). A query may meet no key at all; its output is then 0."""

    def dim(self, key_dim: int) -> int:
        return key_dim

    def params(self, heads: int, key_dim: int) -> dict:
        return {}

    def apply(self, params, q, k):
        return jax.nn.relu(q), jax.nn.relu(k)

    def flops(self, key_dim: int) -> int:
        return 2 * key_dim


@dataclass(frozen=True)
class Hedgehog:
    """A learned spiky map (Zhang et al., The Hedgehog & the Porcupine, arXiv 2402.04347), u = W x + b per head:

        halves: phi(x) = [softmax(u), softmax(-u)]       over the features of each half (LoLCATs' code)
        whole:  phi(x) = softmax([2 u, -2 u])            over all of them (said to be flash-linear-attention's)
        exp:    phi(x) = [exp(u), exp(-u)]               the equation; keys overflow float32 beyond |u| = 88

    These are different maps: halves and whole scale each key by a number of its own. Queries and keys have weights
    of their own; W starts as the identity and b at 0. In exp a query's features are divided by the largest, which
    cancels in normalised attention.
    """

    form: str = "halves"  # halves, whole or exp

    def __post_init__(self):
        if self.form not in HEDGEHOG_FORMS:
            raise ValueError(f"Hedgehog.form: expected one of {', '.join(HEDGEHOG_FORMS)}, got {self.form!r}")

    def dim(self, key_dim: int) -> int:
        return 2 * key_dim

    def params(self, heads: int, key_dim: int) -> dict:
        def identity(key, shape, dtype):
            return jnp.broadcast_to(jnp.eye(key_dim, dtype=dtype), shape)

        def one():
            return {
                "weight": Param((heads, key_dim, key_dim), ("heads", "head_dim", None), identity),
                "bias": Param((heads, key_dim), ("heads", None), param.zeros, decay=False),
            }

        return {"q": one(), "k": one()}

    def apply(self, params, q, k):
        def phi(p, x, is_query):
            h = _acc(x)
            u = jnp.einsum("bthk,hkf->bthf", h, p["weight"].astype(h.dtype)) + p["bias"].astype(h.dtype)
            if self.form == "halves":
                y = jnp.concatenate([jax.nn.softmax(u), jax.nn.softmax(-u)], axis=-1)
            elif self.form == "whole":
                y = jax.nn.softmax(jnp.concatenate([2 * u, -2 * u], axis=-1))
            else:
                both = jnp.concatenate([u, -u], axis=-1)
                top = jnp.max(jnp.abs(u), axis=-1, keepdims=True) if is_query else 0
                y = jnp.exp(both - jax.lax.stop_gradient(top))
            return y.astype(x.dtype)

        return phi(params["q"], q, True), phi(params["k"], k, False)

    def flops(self, key_dim: int) -> int:
        return 2 * (2 * key_dim * key_dim + 10 * key_dim)


@dataclass(frozen=True)
class Taylor2:
    """phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(K), the series of e^s (Based, arXiv 2402.18668).

        phi(x) = [1, x / K^(1/4), x_i^2 / sqrt(2 K), x_i x_j / sqrt(K) for i < j]

    The products are symmetric, so that each pair stands here once, with weight sqrt(2): 1 + K + K (K + 1) / 2
    features where the published [1, x, vec(x x^T)] has 1 + K + K^2. The sum is at least 1/2.
    """

    def dim(self, key_dim: int) -> int:
        return 1 + key_dim + key_dim * (key_dim + 1) // 2

    def params(self, heads: int, key_dim: int) -> dict:
        return {}

    def apply(self, params, q, k):
        def phi(x):
            h = _acc(x) * x.shape[-1] ** -0.25
            size = h.shape[-1]
            # All pairs at distance r round the circle of channels; at half of it each would come twice.
            count = lambda r: size // 2 if 2 * r == size else size
            pairs = [(h * jnp.roll(h, -r, axis=-1))[..., : count(r)] for r in range(1, size // 2 + 1)]
            one = jnp.ones_like(h[..., :1])
            return jnp.concatenate([one, h, h * h * 0.5**0.5, *pairs], axis=-1).astype(x.dtype)

        return phi(q), phi(k)

    def flops(self, key_dim: int) -> int:
        return 2 * (3 * key_dim + key_dim * (key_dim // 2))


@dataclass(frozen=True)
class RandomFeatures:
    """Positive orthogonal random features: on average phi(q) . phi(k) = exp(q . k / sqrt(K)).

        phi(x) = exp(W h - |h|^2 / 2) / sqrt(features),   h = x / K^(1/4)

    FAVOR+ of Performers (Choromanski et al., arXiv 2009.14794, section 2). The rows of W are those of
    Gaussian matrices, made orthogonal within blocks of K; drawn per head with the weights, stored with them, not
    trained. A query's features are divided by their largest, which cancels in normalised attention; a key's are at
    most e^(|w|^2 / 2), of some e^(K / 2), and are not divided by the largest of all keys, as in the published code,
    where later keys would be seen. Nothing is added to them either.
    """

    features: int | None = None  # rows of W; None: 4 K

    def __post_init__(self):
        if self.features is not None and (not isinstance(self.features, int) or self.features < 1):
            raise ValueError(f"RandomFeatures.features: expected a positive integer, got {self.features!r}")

    def dim(self, key_dim: int) -> int:
        return self.features or 4 * key_dim

    def params(self, heads: int, key_dim: int) -> dict:
        shape, axes = (heads, self.dim(key_dim), key_dim), ("heads", None, "head_dim")
        return {"rows": Param(shape, axes, _orthogonal_rows, decay=False, trainable=False)}

    def apply(self, params, q, k):
        def phi(x, is_query):
            h = _acc(x) * x.shape[-1] ** -0.25
            u = jnp.einsum("bthk,hfk->bthf", h, params["rows"].astype(h.dtype))
            u = u - jnp.sum(h * h, axis=-1, keepdims=True) / 2
            if is_query:
                u = u - jax.lax.stop_gradient(jnp.max(u, axis=-1, keepdims=True))
            return (jnp.exp(u) * u.shape[-1] ** -0.5).astype(x.dtype)

        return phi(q, True), phi(k, False)

    def flops(self, key_dim: int) -> int:
        features = self.dim(key_dim)
        return 2 * (2 * key_dim * features + 3 * key_dim + 2 * features) + 2 * features


def _orthogonal_rows(key, shape, dtype):
    """[H, F, K]: rows with the lengths of Gaussian vectors, orthogonal within each block of K."""
    heads, features, size = shape
    turn, length = jax.random.split(key)
    blocks = jax.random.orthogonal(turn, size, (heads, -(-features // size)), dtype)
    rows = blocks.reshape(heads, -1, size)[:, :features]
    return rows * jnp.linalg.norm(jax.random.normal(length, shape, dtype), axis=-1, keepdims=True)


NAMED = {
    "elu": Elu(),
    "relu": Relu(),
    "hedgehog": Hedgehog(),
    "hedgehog_exp": Hedgehog("exp"),
    "hedgehog_whole": Hedgehog("whole"),
    "taylor2": Taylor2(),
    "random": RandomFeatures(),
}


def named(name: str, features: int | None = None):
    """The map of this name, with `features` where it is "random". Raises ValueError for others, with the nearest."""
    if name not in NAMED:
        near = difflib.get_close_matches(str(name), NAMED, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"feature_map: expected one of {', '.join(NAMED)}, got {name!r}{hint}")
    if features is not None and name != "random":
        raise ValueError(
            f"features: expected None with feature_map {name!r}, which has as many as it has, got {features}"
        )
    return NAMED[name] if features is None else replace(NAMED[name], features=features)
