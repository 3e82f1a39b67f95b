"""Ops with time cut over devices, against one device."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from experiments.bench import errors, timing, turns
from experiments.bench.scaling_train import counts
from experiments.bench.suites import Case
from experiments.compile import hlo
from seqmix import ops
from seqmix.core import sharding
from seqmix.ops import softmax_choice
from seqmix.ops.softmax_context import attention_bytes

HEADS, WIDTH, CHANNELS = 16, 128, 4096
FORMS = ("zigzag", "heads", "ring")
CUDNN = "zigzag, gradients by cuDNN"  # which long stretches take: values of short ones
LENGTHS = (2**15, 2**17, 2**18, 2**20)  # of attention's sequence, on all devices
COMPARED = 2**18  # at which fewer devices, and one, are timed too
TOKENS = {"linear_attention": 2**17, "delta_rule": 2**13, "linear_scan": 2**17}  # a device
CHECKED = 256  # a device, where values are compared
LONGER = {"delta_rule": 2**10}  # of those that a GPU cuts in parts
TOKEN_AXES = ("batch", "time", "heads", None)


def cases(args):
    """(cases that stand for all, the others): attention at COMPARED and recurrences; values, and other lengths."""
    every, seen = counts(), set()
    most, several = every[-1], len(every) > 1

    def new(part, label, call, *arguments):
        fresh = label not in seen
        seen.add(label)
        return [Case(part, label, functools.partial(call, *arguments))] * fresh

    over = lambda how, n, t: new("attention", f"attention {how} on {n}, T={t}", attention, how, n, t)
    passed = lambda name, n: new("recurrences", f"{name} on {n}, T={TOKENS[name] * n}", recurrence, name, n)
    first = over("one", 1, COMPARED)
    for n in every[:0:-1]:
        first += [case for form in FORMS[:2] for case in over(form, n, COMPARED)]
    for n in (1, *every[:0:-1]):
        first += [case for name in TOKENS for case in passed(name, n)]
    rest = []
    for name, how in [*(("attention", form) for form in FORMS), *((name, "context") for name in TOKENS)] * several:
        rest += new("equal", f"{name} {how} on {most}, values", equal, name, how)
    if several:
        rest += new("equal", f"attention {CUDNN} on {most}, values", equal, "attention", CUDNN)
    rest += over("one", 1, LENGTHS[0])
    for length in LENGTHS:
        rest += [case for form in FORMS * several for case in over(form, most, length)]
        for n in every[-2:0:-1] if length == COMPARED else ():
            rest += over(FORMS[2], n, length)
    return first, rest


def relate(rows):
    """Shares of one device's rate: of useful FLOPs a device of attention, of tokens a device of a recurrence.

    Where one device has not run attention's length, its longest stands for it.
    """
    one = {(row["what"], row["tokens"]): row for row in rows if row["devices"] == 1}
    for row in rows:
        bases = {tokens: base for (what, tokens), base in one.items() if what == row["what"]}
        if row["devices"] == 1 or not bases:
            continue
        base = bases.get(row["tokens"]) or bases[max(bases)]
        power = 2 if row["what"] == "attention" else 1
        work = row["tokens"] ** power / base["tokens"] ** power / row["devices"]
        row["share"], row["share_both"] = (work * base[key] / row[key] for key in ("fwd_ms", "fwd_bwd_ms"))


def equal(name, how, args):
    """A row of errors to float64 with time cut over all devices, bfloat16, 8 heads."""
    devices = counts()[-1]
    length, heads = LONGER.get(name, CHECKED) * devices, 8
    if name == "attention":
        run = functools.partial(ops.attention, context=how.split(",")[0])
        plain = ops.attention
    else:
        run = plain = OPS[name]
    shapes = _shapes(name, length, heads)
    mesh = sharding.make_mesh(context=devices, devices=jax.devices()[:devices])
    shortest = 0 if how == CUDNN else softmax_choice.STRETCH
    with sharding.use_mesh(mesh), mock.patch.object(softmax_choice, "STRETCH", shortest):
        where = [NamedSharding(mesh, sharding.spec(s[2], s[0], mesh)) for s in (shapes[0], *shapes)]
        structs = [jax.ShapeDtypeStruct(*s[:2], sharding=w) for s, w in zip((shapes[0], *shapes), where, strict=True)]
        program = jax.jit(timing.with_gradients(run)).lower(*structs).compile()
    if how == CUDNN and "fmhaSoftmaxBackward" not in program.as_text():
        raise ValueError("cuDNN makes no gradients of travelling keys here (docs/attention.md)")
    if args.compile_only:
        return
    cotangent, *inputs = (jax.random.normal(jax.random.key(n), s.shape, s.dtype) for n, s in enumerate(structs))
    exact = errors.exact(plain, cotangent, inputs)
    with turns.devices():
        found = jax.block_until_ready(program(*jax.tree.map(jax.device_put, [cotangent, *inputs], where)))
    names = ("x", "log_a") if name == "linear_scan" else ("q", "k", "v", "gate")[: len(inputs)]
    yield {"what": name, "how": how, "devices": devices, "tokens": length, **errors.compared(found, exact, names)}


def attention(how, devices, length, args):
    """A row of causal attention, bfloat16, B1 H16 D128."""

    def call(q, k, v):
        return ops.attention(q, k, v, context=None if devices == 1 else how)

    for times in _timed(call, _shapes("attention", length, HEADS), devices, args):
        row = {"what": "attention", "how": how, "devices": devices, "tokens": length, **times}
        row["tflops"] = 2 * HEADS * WIDTH * length**2 / devices / times["fwd_ms"] / 1e9
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


def recurrence(name, devices, args):
    """A row of a recurrence, the same tokens a device whatever their number."""
    length = TOKENS[name] * devices
    for times in _timed(OPS[name], _shapes(name, length, HEADS), devices, args):
        yield {"what": name, "how": "context", "devices": devices, "tokens": length, **times}


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
    structs = like, *given

    def draw(seed):
        keys = jax.random.split(jax.random.key(seed), len(structs))
        return [jax.random.normal(key, one.shape, one.dtype) for key, one in zip(keys, structs, strict=True)]

    drawn = jax.jit(draw, out_shardings=[one.sharding for one in structs]).lower(0).compile()
    # Fake devices of a CPU share its threads: with exchanges of several calls under way they wait for each other.
    most = 1 if jax.devices()[0].platform == "cpu" and devices > 1 else 100
    with turns.devices():
        sets = [drawn(seed) for seed in range(2 if np.prod(shapes[0][0]) < 2**30 else 1)]
        times = {"fwd_ms": timing.median_ms(forward, [inputs[1:] for inputs in sets], most=most)}
        times["fwd_bwd_ms"] = timing.median_ms(both, sets, most=most)
    if devices > 1:
        times["sent"] = int(sum(one.sent for one in hlo.cost(forward.as_text()).collectives.values()))
    yield times
