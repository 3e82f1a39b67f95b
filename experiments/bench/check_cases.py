"""The calls of the suite `checks`: small shapes that one feature makes hard, by op."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from seqmix import ops
from seqmix.ops import masks
from seqmix.ops.conv import short_conv_reference

DEFAULT = "default"  # of an op that has no names for its implementations
normal = jax.random.normal


@dataclasses.dataclass(frozen=True)
class Check:
    """A call: inputs by name, (run(*inputs, implementation=...) -> results), and the results' names."""

    op: str
    case: str
    inputs: dict
    run: Callable
    results: tuple[str, ...]


# What a case changes of T, H, K, V and the decay's kind, and whether it has writes, segments, a state.
LINEAR = {
    "plain": {"decay": None},
    "a decay per head": {"decay": "head"},
    "a decay per token, of any size": {},
    "K 64, V 64": {"K": 64, "V": 64},
    "V 256": {"V": 256},
    "one key head, writes": {"H": 4, "V": 64, "writes": True},
    "ragged, packed, from a state": {"T": 333, "segments": True, "state": True, "writes": True},
    "one long row": {"T": 4096, "H": 1, "K": 64, "V": 64},
}
CHANNEL = {
    "decays of any size": {},
    "decays of gates": {"rare": 0.0},
    "gates, then decays of any size": {"T": 333, "segments": True, "state": True, "rare_from": 130},
    "K 64, V 64": {"K": 64, "V": 64},
    "V 256": {"V": 256},
    "ragged, packed, from a state": {"T": 333, "segments": True, "state": True},
    "one long row": {"T": 4096, "H": 1, "K": 64, "V": 64},
}


def decays(key, shape, share=1 / 6):
    """Logarithms of decays: that share is 0, -1e-4, -5, -20 or -100, the rest are log-sigmoids over 16."""
    usual = jax.nn.log_sigmoid(normal(key, shape)) / 16
    rare = jnp.asarray([0.0, -1e-4, -5.0, -20.0, -100.0])[jax.random.randint(jax.random.fold_in(key, 1), shape, 0, 5)]
    return jnp.where(jax.random.uniform(jax.random.fold_in(key, 2), shape) < share, rare, usual)


def segments(batch, length):
    """Packed ids [B, T] with padding left, inside and right."""
    ids = np.zeros((batch, length), np.int32)
    ids[:, 5 : length // 3], ids[:, length // 3 : length // 2], ids[:, length // 2 + 9 : -7] = 3, 7, 3
    return ids


def linear_attention(name, features=None, decay="token"):
    f = {"T": 320, "H": 2, "K": 128, "V": 128, "decay": decay} | (LINEAR[name] if features is None else features)
    batch, time, heads = 2, f["T"], f["H"]
    keys = jax.random.split(jax.random.key(1), 6)
    key_heads = 1 if f.get("writes") else heads
    q, k = (normal(key, (batch, time, key_heads, f["K"]), jnp.bfloat16) for key in keys[:2])
    inputs = {"q": q, "k": k, "v": normal(keys[2], (batch, time, heads, f["V"]), jnp.bfloat16)}
    shapes = {"head": (heads,), "token": (batch, time, heads), "channel": (batch, time, heads, f["K"])}
    if f["decay"] is not None:
        share = f.get("rare", 1 / 6)
        if "rare_from" in f:
            share = jnp.where(jnp.arange(time) < f["rare_from"], 0.0, share)[:, None, None]
        inputs["log_decay"] = decays(keys[3], shapes[f["decay"]], share)
    if f.get("state"):
        inputs["state"] = normal(keys[4], (batch, heads, f["K"], f["V"]))
    if f.get("writes"):
        inputs["write"] = jax.random.uniform(keys[5], (batch, time, heads))
    ids = segments(batch, time) if f.get("segments") else None

    def run(q, k, v, *others, implementation):
        given = dict(zip(list(inputs)[3:], others, strict=True))
        options = {"scale": f["K"] ** -0.5, "segment_ids": ids, "implementation": implementation}
        return ops.linear_attention(q, k, v, **given, **options)

    return Check("linear_attention", name, inputs, run, ("y", "state"))


def per_channel(name):
    return dataclasses.replace(linear_attention(name, CHANNEL[name], "channel"), op="linear_attention per channel")


TOKEN = {  # the op, what it takes beside q, k, v and a state, its log decays' shape, and K and V
    "linear attention, writes, one key head": (ops.linear_attention, ("write",), "bth", 128, 64),
    "linear attention, decays per channel": (ops.linear_attention, (), "bthk", 128, 128),
    "delta rule": (ops.delta_rule, ("beta",), None, 128, 128),
    "delta rule, decays per token": (ops.delta_rule, ("beta",), "bth", 64, 64),
    "delta rule, decays per channel, erase": (ops.delta_rule, ("beta", "erase"), "bthk", 128, 128),
    "diagonal plus rank one": (ops.diagonal_plus_rank_one, ("left", "right"), "bthk", 128, 128),
}


def one_token(name):
    op, more, decay, key, value = TOKEN[name]
    batch, heads = 20, 16
    keys = jax.random.split(jax.random.key(5), 8)
    key_heads = 1 if "one key head" in name else heads
    vector = lambda index, *shape: normal(keys[index], (batch, 1, *shape), jnp.bfloat16)
    inputs = {"q": vector(0, key_heads, key), "k": vector(1, key_heads, key) / 8, "v": vector(2, heads, value)}
    for index, other in enumerate(more, 3):
        if other in ("write", "beta"):
            inputs[other] = jax.random.uniform(keys[index], (batch, 1, heads))
        else:
            inputs[other] = vector(index, heads, key) / 8
    if decay is not None:
        inputs["log_decay"] = decays(keys[6], (batch, 1, heads, key)[: len(decay)])
    inputs["state"] = normal(keys[7], (batch, heads, key, value))

    def run(*arrays, implementation):
        return op(**dict(zip(inputs, arrays, strict=True)), scale=0.5, implementation=implementation)

    return Check("one token", name, inputs, run, ("y", "state"))


SCAN = {
    "decays of any size": {},
    "float32": {"dtype": jnp.float32},
    "ragged, packed, from a state": {"T": 333, "segments": True, "state": True},
    "one long row": {"B": 1, "T": 8192, "D": 128},
    "right to left": {"reverse": True},
}


def linear_scan(name):
    f = {"B": 2, "T": 512, "D": 512, "dtype": jnp.bfloat16} | SCAN[name]
    keys = jax.random.split(jax.random.key(2), 3)
    shape = f["B"], f["T"], f["D"]
    inputs = {"x": normal(keys[0], shape, f["dtype"]), "log_a": decays(keys[1], shape).astype(f["dtype"])}
    if f.get("state"):
        inputs["state"] = normal(keys[2], (f["B"], f["D"]))
    options = {"reverse": f.get("reverse", False), "segment_ids": segments(*shape[:2]) if f.get("segments") else None}

    def run(x, log_a, state=None, *, implementation):
        return ops.linear_scan(x, log_a, state=state, **options, implementation=implementation)

    return Check("linear_scan", name, inputs, run, ("h", "state"))


IDS = segments(2, 384)
TABLE = np.random.default_rng(0).random((4, 4)) < 0.4
ATTENTION = {
    "causal": {},
    "every key": {"causal": False},
    "a window": {"window": 100},
    "packed": {"segment_ids": IDS},
    "packed, a window": {"segment_ids": IDS, "window": 70},
    "few key heads, soft cap": {"soft_cap": 5.0, "Hk": 1},
    "K 64": {"K": 64},
    "with lse": {"return_lse": True},
    "sinks and a window": {"sinks": 8, "window": 70},
}
NEAR = masks.Boxed(masks.Neighbourhood((16, 32), (5, 7)), (8, 8))
LISTS = np.random.default_rng(2).permuted(np.tile(np.arange(-1, 6), (2, 1, 384, 1)), axis=-1)[..., :3]
SPARSE = {
    "a window and sinks": {"mask": masks.Causal() & (masks.Window(100) | masks.Sinks(40)), "T": 512},
    "a neighbourhood in boxes": {"mask": NEAR, "T": 512, "sizes": (128, 64)},
    "blocks at random": {"mask": masks.BlockTable(TABLE | np.eye(4, dtype=bool), 128), "T": 512},
    "packed, few key heads": {"mask": masks.Causal() & masks.Segments(), "ids": IDS, "Hk": 1},
    "blocks by their scores": {"count": 2},
    "blocks of each token": {"count": 2, "sizes": (1, 128)},
    "blocks of each token, packed, few key heads": {"count": 2, "sizes": (1, 64), "ids": IDS, "Hk": 1},
    "lists of single tokens, 16 heads a key head": {"H": 16, "Hk": 1, "sizes": (1, 64), "lists": LISTS},
    "the same under a causal mask": {"H": 16, "Hk": 1, "sizes": (1, 64), "lists": LISTS, "mask": masks.Causal()},
    "few key heads, long walks": {"H": 16, "Hk": 1, "T": 1024, "mask": masks.Causal()},
}


def attention(name):
    options = {"Hk": 2, "K": 128} | ATTENTION[name]
    inputs = _tokens(384, options.pop("Hk"), options.pop("K"))

    def run(q, k, v, *, implementation):
        found = ops.attention(q, k, v, **options, implementation=implementation)
        return found if options.get("return_lse") else (found,)

    return Check("attention", name, inputs, run, ("y", "lse") if options.get("return_lse") else ("y",))


def block_sparse_attention(name):
    f = {"Hk": 2, "T": 384, "sizes": (128, 128)} | SPARSE[name]
    inputs = _tokens(f["T"], f["Hk"], 128, f.get("H", 2))
    ids = f.get("ids")
    data = None if ids is None else dict.fromkeys(("segment_ids", "kv_segment_ids"), ids)

    def run(q, k, v, *, implementation):
        options = {"sizes": f["sizes"], "return_lse": True, "implementation": implementation}
        if "count" in f:
            blocks = (f["T"] // size for size in f["sizes"])
            scores = jnp.asarray(np.random.default_rng(1).random((2, f["Hk"], *blocks)), jnp.float32)
            options |= {"count": f["count"], "scores": scores, "segment_ids": ids}
            return ops.topk_block_attention(q, k, v, **options)
        given = {"mask": f.get("mask"), "blocks": f.get("lists"), "data": data}
        return ops.block_sparse_attention(q, k, v, **given, **options)

    return Check("block_sparse_attention", name, inputs, run, ("y", "lse"))


def _tokens(time, key_heads, width, heads=2):
    shapes = {"q": (2, time, heads, width), "k": (2, time, key_heads, width), "v": (2, time, key_heads, width)}
    keys = jax.random.split(jax.random.key(3), 3)
    return {name: normal(key, shapes[name], jnp.bfloat16) for name, key in zip("qkv", keys, strict=True)}


WEIGHTS = {"16 heads a key head": {"H": 16, "Hk": 1}, "K 64, ragged": {"T": 333, "H": 8, "Hk": 1, "K": 64}}


def block_weights(name):
    f = {"T": 384, "K": 128} | WEIGHTS[name]
    time, keys = f["T"], 48
    keep = jax.random.split(jax.random.key(5), 2)
    q = normal(keep[0], (2, time, f["H"], f["K"]), jnp.bfloat16)
    k = normal(keep[1], (2, keys, f["Hk"], f["K"]), jnp.bfloat16)
    seen = np.broadcast_to(np.arange(keys) * 8 + 7 <= np.arange(time)[:, None], (2, time, keys))

    def run(q, k, *, implementation):
        name = "chunked" if implementation == "reference" else implementation
        given = {"q_positions": POSITIONS[None, :time], "kv_positions": POSITIONS[None, :keys] * 8 + 7}
        given = {side: np.repeat(x, 2, axis=0) for side, x in given.items()}
        exact = {"return_lse": True, "implementation": "reference"}
        wide = jnp.promote_types(q.dtype, jnp.float32)
        lse = ops.attention(q.astype(wide), k.astype(wide), k.astype(wide), **given, **exact)[1]
        return (ops.block_weights(q, k, lse, seen, scale=f["K"] ** -0.5, implementation=name),)

    return Check("block_weights", name, {"q": q, "k": k}, run, ("weights",))


POSITIONS = np.arange(512, dtype=np.int32)
CONV = {"width 4": {"T": 320}, "ragged, packed": {"T": 333, "segments": True}}


def short_conv(name):
    time, keys = CONV[name]["T"], jax.random.split(jax.random.key(4), 3)
    ids = segments(2, time) if CONV[name].get("segments") else None
    shapes = {"x": (2, time, 256), "weight": (4, 256), "bias": (256,)}
    inputs = {name: normal(key, shapes[name], jnp.bfloat16) for name, key in zip(shapes, keys, strict=True)}

    def run(*inputs, implementation):
        if implementation not in (DEFAULT, "reference"):
            raise ValueError(f"implementation: short_conv has none called {implementation!r}")
        return (short_conv_reference if implementation == "reference" else ops.short_conv)(*inputs, segment_ids=ids)

    return Check("short_conv", name, inputs, run, ("y", "state"))


def every():
    """(function that makes a `Check` of a name, name) of all cases."""
    made = ((linear_attention, LINEAR), (per_channel, CHANNEL), (one_token, TOKEN), (linear_scan, SCAN))
    made += ((attention, ATTENTION), (block_sparse_attention, SPARSE), (block_weights, WEIGHTS), (short_conv, CONV))
    return [(make, name) for make, features in made for name in features]
