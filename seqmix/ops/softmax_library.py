"""`attention` through kernels of other libraries, each of which takes a part of its calls.

| `implementation` | library | runs on | calls that it takes |
|---|---|---|---|
| "cudnn" | cuDNN, by `jax.nn.dot_product_attention` | NVIDIA GPUs from Ampere on | dense; causal; causal window |
| "tokamax" | `tokamax.dot_product_attention` (extra `tokamax`) | Hopper GPUs | dense; causal; window; soft cap |
| "splash" | `jax.experimental.pallas.ops.tpu.splash_attention` | TPUs | dense; causal; window; soft cap; segment ids |

None of them takes given positions, `kv_segment_ids`, `sinks`, sink logits, or a call that wants lse: what they give of
it is rounded to bfloat16 or has no gradient. Public names of the libraries only: those of tokamax know no segments.
Key heads may be fewer than query heads everywhere, value heads that are not as many as key heads are repeated with
them (`heads.alike`), and float32 stays with the chunked form. With implementation None a call goes to the first of
them, in this order, that takes it here, any other one to our own kernels or the chunked form, but where
`softmax_choice` knows better; docs/attention.md says why, and what was measured.
"""

import functools

import jax
import jax.numpy as jnp

from seqmix.core import sharding
from seqmix.ops import targets
from seqmix.ops.dispatch import pick
from seqmix.ops.heads import alike
from seqmix.ops.mesh import on_shares

NAMES = ("cudnn", "tokamax", "splash")
TILE = 128  # of splash: numbers of queries and keys are multiples of it
BLOCKS = 512, 256, 128  # queries and keys that splash works on at once, the largest that fits
WASTEFUL = 8  # times the window: from there on chunks are reckoned faster than tokamax, forward and backward
WIDEST = {"cudnn": 256, "tokamax": 128, "splash": 256}  # K and V
DTYPES = dict.fromkeys(NAMES, (jnp.bfloat16, jnp.float16)) | {"splash": (jnp.bfloat16,)}
TAKES = {
    "soft_cap": ("tokamax", "splash"),
    "a window that looks ahead": ("tokamax", "splash"),
    "segment_ids": ("splash",),
    "sinks": (),
    "sink_logits": (),
    "positions and kv_segment_ids": (),
    "return_lse": (),
}


def reasons(implementation, lay, form, rules, q, k, v, sink_logits, order, return_lse) -> dict:
    """For each library why it cannot run this call here, in a few words, or None if it can.

    With an implementation named, no other is looked at. lay: of the mesh, or None; form: of the context
    (`softmax_context`), or None; order: as of `block_pairs`.
    """
    call = sink_logits, order, return_lse
    if lay is None:
        return _each(implementation, rules, q, k, v, *call)
    if lay.time and form != "heads":
        why = f"has no form for time cut over a mesh by {form!r}" if form else "needs keys that are cut as queries are"
        return dict.fromkeys(NAMES, f"{why}; context='heads' leaves time whole")
    dims = ("batch", None, "heads", None), *(("batch", None, "key_heads", None),) * 2
    local = [lay.share(x, *dim) for x, dim in zip((q, k, v), dims, strict=True)]
    with sharding.shares(lay.mesh):
        return _each(implementation, rules, *local, *call)


def _each(implementation, rules, q, k, v, *call):
    """`reasons` on one device."""
    found = dict.fromkeys(NAMES, "was not asked for")
    found |= {name: unsupported(name, rules, q, k, v, *call) for name in NAMES if implementation in (None, name)}
    window = window_of(rules, q.shape[1], k.shape[1])
    if implementation is None and window is not None and q.shape[1] > WASTEFUL * window:
        found["tokamax"] = "is slow where a window is short: its gradient goes through all keys"
    return found


def unsupported(name, rules, q, k, v, sink_logits, order, return_lse) -> str | None:
    (_, time, _, key_dim), keys, value_dim = q.shape, k.shape[1], v.shape[3]
    reason = _absent(name, time)
    if reason is not None:
        return reason
    window = window_of(rules, time, keys)
    wants = {
        "soft_cap": rules.soft_cap is not None,
        "a window that looks ahead": window is not None and not rules.causal,
        "segment_ids": order == "runs",
        "sinks": rules.sinks and window is not None,
        "sink_logits": sink_logits is not None,
        "positions and kv_segment_ids": order == "given",
        "return_lse": return_lse,
    }
    for what, wanted in wants.items():
        if wanted and name not in TAKES[what]:
            return f"has no form for {what}"
    if order == "runs" and window is not None:
        return "counts a window in indices, and padding within a segment is no token of it"
    if time != keys and (rules.causal or window is not None):
        return f"needs as many keys as queries where a key's place counts, got T={time}, S={keys}"
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(x) for x in DTYPES[name]}:
        wanted = " or ".join(jnp.dtype(x).name for x in DTYPES[name])
        return f"needs q, k and v in {wanted}, got {', '.join(x.dtype.name for x in (q, k, v))}"
    if max(key_dim, value_dim) > WIDEST[name]:
        return f"needs heads of at most {WIDEST[name]} channels, got K={key_dim}, V={value_dim}"
    if name == "splash" and (time % TILE or keys % TILE):
        return f"needs multiples of {TILE} queries and keys, got T={time}, S={keys}"
    return _refused(rules, q, k, v) if name == "cudnn" else None


def no_scoring(implementation):
    """Raises ValueError where a library is named for a call that `ops.scored` takes."""
    if implementation in NAMES:
        pick("attention", implementation, {implementation: "has no form for mask, bias, slopes and normalizer"})


def _absent(name, time) -> str | None:
    """Why a library has nothing to run on here."""
    if name == "splash":
        return targets.unsupported("tpu", time)
    device, capability = sharding.device(), targets.capability()
    if capability is None or capability < (8, 0):
        return f"needs an NVIDIA GPU from Ampere on, the device is a {device.platform}"
    if time < targets.LEAST:
        return f"needs at least {targets.LEAST} tokens, got T={time}"
    if not sharding.on_one_device():
        return targets.SCATTERED
    if name == "cudnn":
        return None
    if capability[0] != 9:
        return f"needs a Hopper GPU, got compute capability {capability[0]}.{capability[1]}"
    if jax.default_backend() != "gpu":
        return "needs the GPU to be jax's default device"
    return _missing()


@functools.cache
def _missing() -> str | None:
    """Why tokamax cannot be imported."""
    from pallas_kernels.triton_calls import kept_cache

    try:
        with kept_cache():
            import tokamax  # noqa: F401
    except ImportError as error:
        return f"needs the extra tokamax: {error}"
    return None


def window_of(rules, time, keys):
    """The window, or None where it reaches over everything."""
    return None if rules.window is None or rules.window >= max(time, keys) else rules.window


def _refused(rules, q, k, v) -> str | None:
    """What jax.nn says against a call and its gradient: it knows the version of cuDNN and what the GPU can do."""
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    try:
        jax.eval_shape(lambda *arrays: jax.vjp(functools.partial(_cudnn, rules), *arrays)[0], *arrays)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return f"is refused by jax.nn: {str(error).splitlines()[0]}"
    return None


def run(name, lay, rules, q, k, v, ids):
    """y [B, T, H, V] of a call that the library has no reason against, on each device's share.

    ids: runs of the segments [B, T] where segment ids are given, else None.
    """
    if lay is None:
        return on_one(name, rules, q, k, v, ids)
    key_heads = k.shape[2]
    queries, keys = ("batch", None, "heads", None), ("batch", None, "key_heads", None)

    def local(q, k, v, ids):
        k, v = (lay.local_key_heads(x, key_heads) for x in (k, v))
        return on_one(name, rules, q, k, v, ids)

    return on_shares(lay, local, (q, k, v, ids), (queries, keys, keys, ("batch", None)), queries)


def on_one(name, rules, q, k, v, ids):
    """`run` on one device."""
    k, v = alike(k, v)
    if name == "splash":
        return _splash(rules, q, k, v, ids)
    return {"cudnn": _cudnn, "tokamax": _tokamax}[name](rules, q, k, v)


def _wider(x, width):
    """x with channels of zeros up to a width: no score and no value changes."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])


def _places(rules, time, keys):
    """The arguments that say who sees whom, as `jax.nn` and tokamax name them."""
    window = window_of(rules, time, keys)
    span = None if window is None else (window - 1, 0 if rules.causal else window - 1)
    return {"is_causal": rules.causal, "local_window_size": span}


def _cudnn(rules, q, k, v):
    width = max(x.shape[-1] + -x.shape[-1] % 8 for x in (q, v))
    wide = (_wider(x, width) for x in (q, k, v))
    places = _places(rules, q.shape[1], k.shape[1])
    y = jax.nn.dot_product_attention(*wide, scale=rules.scale, **places, implementation="cudnn")
    return y[..., : v.shape[-1]]


def _tokamax(rules, q, k, v):
    import tokamax

    options = {"scale": rules.scale, "logits_soft_cap": rules.soft_cap, "implementation": "mosaic"}
    return tokamax.dot_product_attention(q, k, v, **_places(rules, q.shape[1], k.shape[1]), **options)


def _splash(rules, q, k, v, ids):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    from pallas_kernels import compat

    shape = time, keys = q.shape[1], k.shape[1]
    window = window_of(rules, time, keys)
    if window is not None:
        mask = splash.LocalMask(shape, (window - 1, 0 if rules.causal else window - 1), 0)
    else:
        mask = splash.CausalMask(shape) if rules.causal else splash.FullMask(shape)
    bq, bk = (next(block for block in BLOCKS if length % block == 0) for length in shape)
    blocks = {f"block_q{part}": bq for part in ("", "_dkv", "_dq")}
    blocks |= {f"block_kv{part}": bk for part in ("", "_compute", "_dkv", "_dkv_compute", "_dq")}
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * q.shape[2]),
        block_sizes=splash.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=rules.soft_cap,
        interpret=compat.interpreting(),
    )
    q, k, v = (jnp.moveaxis(x, 1, 2) for x in ((rules.scale * q).astype(q.dtype), k, v))
    if ids is None:
        return jnp.moveaxis(jax.vmap(attend)(q, k, v), 2, 1)
    y = jnp.moveaxis(jax.vmap(attend)(q, k, v, splash.SegmentIds(ids, ids)), 2, 1)
    return jnp.where((ids != 0)[:, :, None, None], y, 0)  # padding sees padding there
