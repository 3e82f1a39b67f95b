"""`attention` through kernels of other libraries, each of which takes a part of its calls.

| `implementation` | library | runs on | calls that it takes |
|---|---|---|---|
| "cudnn" | cuDNN, by `jax.nn.dot_product_attention` | NVIDIA GPUs from Ampere on | dense; causal; causal window |
| "tokamax" | `tokamax.dot_product_attention` (extra `tokamax`) | Hopper GPUs | dense; causal; window; soft cap |
| "splash" | `jax.experimental.pallas.ops.tpu.splash_attention` | TPUs | dense; causal; window; soft cap; segment ids |

None of them takes given positions, `kv_segment_ids`, `sinks`, sink logits, or a call that wants lse: what they give of
it is rounded to bfloat16 or has no gradient. Public names of the libraries only: those of tokamax know no segments.
Key heads may be fewer than query heads everywhere, value heads that are not as many as key heads are repeated with
them (`heads.alike`), and float32 stays with the chunked form. With implementation None a
call goes to the first of them, in this order, that takes it here, any other one to our own kernels or the chunked form;
our kernels come first where `yields` says so, values alone may go elsewhere (`for_values`), and gradients of keys that
travel to cuDNN (`for_ring`); docs/attention.md says why, and what was measured.
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
SHORT, NARROW = (1025, 4096), 4  # tokens, and times the window: where our own kernels were measured to be faster
SHORT_GROUPED = 8192  # the same of the longest row where several query heads share a key head, of 128 channels
STRETCH = 4096  # tokens of a device, beyond which cuDNN makes the gradients of keys that travel
MIDDLE = 16384  # tokens, up to which tokamax's values were the fastest
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
    found |= {name: _unsupported(name, rules, q, k, v, *call) for name in NAMES if implementation in (None, name)}
    window = _window(rules, q.shape[1], k.shape[1])
    if implementation is None and window is not None and q.shape[1] > WASTEFUL * window:
        found["tokamax"] = "is slow where a window is short: its gradient goes through all keys"
    return found


def yields(rules, q, k, v) -> bool:
    """Whether our own kernels come before the libraries: in short rows, and where a window is short beside them.

    As measured on an H100 with gradients, with 64 or 128 channels and no soft cap.
    """
    time, window = q.shape[1], _window(rules, q.shape[1], k.shape[1])
    if not _timed(rules, q, k, v) or time < SHORT[0]:
        return False
    grouped = k.shape[2] < q.shape[2] and q.shape[3] == 128
    return time <= (SHORT_GROUPED if grouped else SHORT[1]) if window is None else time >= NARROW * window


def for_values(forms, rules, q, k, v) -> str | None:
    """What of `forms` makes values alone, where cuDNN makes those that have gradients; None: cuDNN too.

    forms: what can run (None), or why it cannot. As measured on an H100 in long causal rows: there cuDNN has the
    fastest backward kernel, tokamax or we the fastest forward one. Not with fewer key heads or 64 channels, untimed so.
    """
    same = q.shape[2:] == k.shape[2:] and q.shape[3] == 128
    timed = same and _timed(rules, q, k, v) and _window(rules, q.shape[1], k.shape[1]) is None
    if q.shape[1] <= SHORT[1] or not timed:
        return None
    names = ("tokamax", "gpu") if q.shape[1] <= MIDDLE else ("gpu",)
    return next((name for name in names if forms[name] is None), None)


def for_ring(lay, form, rules, q, k, v) -> bool:
    """Whether cuDNN makes the gradients of keys that travel to queries, where our kernels make the values.

    It does where places are indices and stretches so long that it is the fastest on one device too: five products
    are done there where our kernels do seven.
    """
    from pallas_kernels import cudnn

    whole = form == ("zigzag" if rules.causal else "ring") and _window(rules, q.shape[1], k.shape[1]) is None
    if not whole or q.shape[3] != v.shape[3]:
        return False
    dims = ("batch", "time", "heads", None), *(("batch", "time", "key_heads", None),) * 2
    local = [lay.share(x, *dim) for x, dim in zip((q, k, v), dims, strict=True)]
    chunk = local[0].shape[1] // (2 if form == "zigzag" else 1)
    if local[0].shape[1] <= STRETCH or chunk % 2 or q.shape[3] % 8 or cudnn.unavailable() is not None:
        return False
    with sharding.shares(lay.mesh):
        return _unsupported("cudnn", rules, *local, None, "index", False) is None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def either(values, graded, *arrays):
    """values(*arrays); where a gradient is asked for, graded(*arrays) with its own."""
    return values(*arrays)


either.defvjp(lambda values, graded, *arrays: jax.vjp(graded, *arrays), lambda values, graded, pull, dy: pull(dy))


def _timed(rules, q, k, v):
    """Whether our kernels were timed beside the libraries for such heads."""
    width = q.shape[3]
    return rules.causal and rules.soft_cap is None and k.shape[2] == v.shape[2] and width == v.shape[3] in (64, 128)


def _unsupported(name, rules, q, k, v, sink_logits, order, return_lse) -> str | None:
    (_, time, _, key_dim), keys, value_dim = q.shape, k.shape[1], v.shape[3]
    reason = _absent(name, time)
    if reason is not None:
        return reason
    window = _window(rules, time, keys)
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


def _window(rules, time, keys):
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
    window = _window(rules, time, keys)
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
    window = _window(rules, time, keys)
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
