"""Ops with time cut over devices, against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from experiments.bench import errors, timing
from experiments.bench.scaling_train import counts
from experiments.bench.suites import Case
from experiments.compile import hlo
from seqmix import ops
from seqmix.core import sharding
from seqmix.ops.softmax_context import attention_bytes

HEADS, WIDTH, CHANNELS = 16, 128, 4096
FORMS = ("ring", "zigzag", "heads")
LENGTHS = (2**15, 2**17, 2**18, 2**20)  # of attention's sequence, on all devices
COMPARED = 2**18  # at which fewer devices, and one, are timed too
TOKENS = {"linear_attention": 2**17, "delta_rule": 2**13, "linear_scan": 2**17}  # a device
CHECKED = 256  # a device, where values are compared
TOKEN_AXES = ("batch", "time", "heads", None)


def cases(args):
    """Attention on one device and cut, then the recurrences."""
    every = counts()
    found, rates = [], {}
    for length in (2**15, COMPARED):
        found.append((attention, "one", 1, length))
    for form in FORMS if len(every) > 1 else ():
        found += [(attention, form, n, COMPARED) for n in every[1:-1]]
        found += [(attention, form, every[-1], length) for length in LENGTHS]
    made = [
        Case("attention", f"attention {how} on {n}, T={t}", functools.partial(run, how, n, t, rates))
        for run, how, n, t in found
    ]
    for name, tokens in TOKENS.items():
        rates = {}
        for n in every:
            call = functools.partial(recurrence, name, n, tokens * n, rates)
            made.append(Case("recurrences", f"{name} on {n}, T={tokens * n}", call))
    if len(every) > 1:
        checks = [("attention", form) for form in FORMS] + [(name, "context") for name in TOKENS]
        label = lambda name, how: f"{name} {how} on {every[-1]}, values"
        made = [Case("equal", label(*check), functools.partial(equal, *check)) for check in checks] + made
    return made


def equal(name, how, args):
    """A row of errors to float64 with time cut over all devices: CHECKED tokens each, bfloat16, 8 heads."""
    devices = counts()[-1]
    length, heads = CHECKED * devices, 8
    if name == "attention":
        run = functools.partial(ops.attention, context=how)
        plain = ops.attention
    else:
        run = plain = OPS[name]
    shapes = _shapes(name, length, heads)
    if args.compile_only:
        return
    cotangent, *inputs = (jax.random.normal(jax.random.key(n), *s[:2]) for n, s in enumerate((shapes[0], *shapes)))
    exact = errors.exact(plain, cotangent, inputs)
    mesh = sharding.make_mesh(context=devices, devices=jax.devices()[:devices])
    with sharding.use_mesh(mesh):
        where = [NamedSharding(mesh, sharding.spec(s[2], s[0], mesh)) for s in (shapes[0], *shapes)]
        given = jax.tree.map(jax.device_put, [cotangent, *inputs], where)
        found = jax.jit(timing.with_gradients(run))(*given)
    names = ("x", "log_a") if name == "linear_scan" else ("q", "k", "v", "gate")[: len(inputs)]
    yield {"what": name, "how": how, "devices": devices, "tokens": length, **errors.compared(found, exact, names)}


def attention(how, devices, length, rates, args):
    """A row of causal attention, bfloat16, B1 H16 D128."""

    def call(q, k, v):
        return ops.attention(q, k, v, context=None if devices == 1 else how)

    for times in _timed(call, _shapes("attention", length, HEADS), devices, args):
        flops = 2 * HEADS * WIDTH * length**2 / devices
        rate = {key: flops / times[key] for key in ("fwd_ms", "fwd_bwd_ms")}
        row = {"what": "attention", "how": how, "devices": devices, "tokens": length, **times}
        row["tflops"] = rate["fwd_ms"] / 1e9
        if devices == 1:
            rates[length] = rate
        elif rates:
            whole = rates.get(length) or rates[max(rates)]
            row |= {"share": rate["fwd_ms"] / whole["fwd_ms"], "share_both": rate["fwd_bwd_ms"] / whole["fwd_bwd_ms"]}
        if devices > 1:
            row["sent_formula"] = attention_bytes(how, devices, 1, length, HEADS, HEADS, WIDTH, WIDTH)[0]
        yield row


def _linear_attention(q, k, v, g, **options):
    return ops.linear_attention(q, k, v, jax.nn.log_sigmoid(g), scale=WIDTH**-0.5, **options)[0]


def _delta_rule(q, k, v, beta, **options):
    wide = jnp.promote_types(q.dtype, jnp.float32)
    unit = lambda x: (x / jnp.linalg.norm(x.astype(wide), axis=-1, keepdims=True)).astype(x.dtype)
    return ops.delta_rule(unit(q), unit(k), v, jax.nn.sigmoid(beta), **options)[0]


def _linear_scan(x, g, **options):
    return ops.linear_scan(x, jax.nn.log_sigmoid(g), **options)[0]


OPS = {"linear_attention": _linear_attention, "delta_rule": _delta_rule, "linear_scan": _linear_scan}


def _shapes(name, length, heads):
    """(shape, dtype, axes) of each input."""
    token = ((1, length, heads, WIDTH), jnp.bfloat16, TOKEN_AXES)
    gate = ((1, length, heads), jnp.float32, TOKEN_AXES[:3])
    channels = ((1, length, CHANNELS), jnp.bfloat16, ("batch", "time", None))
    return {"linear_scan": [channels] * 2, "attention": [token] * 3}.get(name, [token, token, token, gate])


def recurrence(name, devices, length, rates, args):
    """A row of a recurrence, the same tokens a device: its rate of tokens over that of one device."""
    for times in _timed(OPS[name], _shapes(name, length, HEADS), devices, args):
        row = {"what": name, "how": "context", "devices": devices, "tokens": length, **times}
        if devices == 1:
            rates.update(times)
        elif rates:
            row |= {"share": rates["fwd_ms"] / times["fwd_ms"], "share_both": rates["fwd_bwd_ms"] / times["fwd_bwd_ms"]}
        yield row


def _timed(call, shapes, devices, args):
    """Times of a function of random arrays (shape, dtype, axes) with time cut over devices: one dict, or none."""
    mesh = sharding.make_mesh(context=devices, devices=jax.devices()[:devices])
    where = [NamedSharding(mesh, sharding.spec(axes, shape, mesh)) for shape, _, axes in shapes]
    given = [jax.ShapeDtypeStruct(s[0], s[1], sharding=w) for s, w in zip(shapes, where, strict=True)]
    with sharding.use_mesh(mesh):
        y = jax.eval_shape(call, *given)
        like = jax.ShapeDtypeStruct(y.shape, y.dtype, sharding=where[0])
        forward = jax.jit(call).lower(*given).compile()
        both = jax.jit(timing.with_gradients(call)).lower(like, *given).compile()
    if args.compile_only:
        return
    cost = hlo.cost(forward.as_text())

    def draw(seed):
        made = []
        for index, struct in enumerate((like, *given)):
            key = jax.random.fold_in(jax.random.key(seed), index)
            random = functools.partial(jax.random.normal, shape=struct.shape, dtype=struct.dtype)
            made.append(jax.jit(random, out_shardings=struct.sharding)(key))
        return made

    sets = [draw(seed) for seed in range(2 if np.prod(shapes[0][0]) < 2**30 else 1)]
    times = {"fwd_ms": timing.median_ms(forward, [inputs[1:] for inputs in sets])}
    times["fwd_bwd_ms"] = timing.median_ms(both, sets)
    if devices > 1:
        times["sent"] = int(sum(one.sent for one in cost.collectives.values()))
    yield times
