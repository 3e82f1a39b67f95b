"""Linear attention: precision under every gate, memory, costs, dtypes, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from seqmix.core import sharding
from seqmix.ops import dispatch
from seqmix.ops.linear import linear_attention, linear_attention_flops
from seqmix.ops.linear_anchored import contract
from seqmix.ops.scan import linear_scan

T, HK, H, K, V = 70, 1, 2, 8, 8
GATES = (0.0, -1e-4, -5.0, -20.0, -1e4)  # one a row of the batch, and a last row that mixes them
ROWS = len(GATES) + 1


def inputs(kind):
    """float64 inputs that bfloat16 (decays and states: float32) represents, and cotangents of y and the state."""
    rng = np.random.default_rng(3)
    shape = (ROWS, T, H) if kind == "head" else (ROWS, T, H, K)
    decay = np.broadcast_to(np.array((*GATES, 0)).reshape(-1, *[1] * (len(shape) - 1)), shape).copy()
    decay[-1] = rng.choice((*GATES, -0.1, -0.5), shape[1:])
    half = lambda *shape: np.array(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float64)
    single = lambda x: np.asarray(x, np.float32).astype(np.float64)
    arrays = dict(q=half(ROWS, T, HK, K), k=half(ROWS, T, HK, K), v=half(ROWS, T, H, V))
    arrays |= dict(log_decay=single(decay), state=single(rng.normal(size=(ROWS, H, K, V))))
    return arrays, (half(ROWS, T, H, V), single(rng.normal(size=(ROWS, H, K, V))))


def differentiate(arrays, seeds, **options):
    """{y, state, gradients}, float64."""

    # Without LLVM's optimisation: compiling is what this costs.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(arrays, seeds):
        out, pull = jax.vjp(lambda a: linear_attention(**a, **options), arrays)
        seeds = jax.tree.map(lambda y, g: g.astype(y.dtype), out, seeds)
        return dict(y=out[0], last=out[1]) | pull(seeds)[0]

    return {name: np.asarray(x, np.float64) for name, x in both(arrays, seeds).items()}


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_every_gate_is_exact_to_the_precision_of_the_inputs(x64, kind):
    # float64 and float32: rounding of sums of some hundred terms. bfloat16 rounds operands by up to 2^-9, three in a
    # row for y (scaled operand, score, y itself) and more for gradients: about half the bound, independent of gates.
    arrays, seeds = inputs(kind)
    want = differentiate(arrays, seeds, implementation="reference")
    for dtype, values, gradients in ((np.float64, 1e-12, 1e-12), (np.float32, 1e-6, 1e-6), ("bfloat16", 5e-3, 1e-2)):
        low = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
        if dtype == "bfloat16":
            low |= {name: jnp.asarray(arrays[name], np.float32) for name in ("log_decay", "state")}
        got = differentiate(low, seeds, chunk=16, implementation="chunked")
        for name, x in want.items():
            bound = values if name in ("y", "last") else gradients
            for row in range(ROWS):
                size, error = (np.sqrt(np.mean(e**2)) for e in (x[row], x[row] - got[name][row]))
                assert error <= bound * size + 1e-30, (str(dtype), name, (*GATES, "mixed")[row], error, size)


def arrays_of(jaxpr):
    """Shapes of all intermediate results, inside loops and calls too."""
    for eqn in jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from arrays_of(inner)


def shapes(q, decay, heads=8, values=4, time=256, width=16, chunk=32):
    """Of a training step's intermediate results."""
    f = lambda q, k, v, *decay: linear_attention(q, k, v, *decay, chunk=chunk, implementation="chunked")
    s = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    args = [s(1, time, q, width), s(1, time, q, width), s(1, time, heads, values)]
    args += [] if decay is None else [s(1, time, heads, *decay)]
    step = lambda *args: jax.vjp(f, *args)[1](f(*args))
    return set(arrays_of(jax.make_jaxpr(step)(*args).jaxpr))


def test_no_array_is_larger_than_time_by_channels_or_by_chunk():
    largest = max(int(np.prod(shape)) for shape in shapes(8, (16,)))
    assert largest <= 256 * 8 * max(16, 32)  # not x C x K, nor x 2 x K


def test_shared_keys_are_not_repeated_for_their_heads():
    for decay in (None, ()):
        for shape in shapes(1, decay):
            # Keys for each of 8 heads would be 256 x 16 x 8; only scores and states may have that many heads.
            assert int(np.prod(shape)) < 256 * 16 * 8 or shape[-2:] == (32, 32) or shape[-2:] == (16, 4), shape


def test_the_backward_pass_keeps_inputs_and_one_state_a_block():
    # 32 heads x 8 rows: blocks of the fewest chunks, 16, so 4 states for 64 chunks.
    args = [jax.ShapeDtypeStruct((8, 1024, n, 4), jnp.float32) for n in (32, 32, 32)]
    decay = jax.ShapeDtypeStruct((8, 1024, 32), jnp.float32)
    _, pull = jax.eval_shape(lambda *a: jax.vjp(lambda *a: linear_attention(*a, chunk=16), *a), *args, decay)
    kept = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(pull))
    given = sum(int(np.prod(x.shape)) for x in (*args, decay))
    assert given <= kept <= given + (4 + 2) * 8 * 32 * 4 * 4


def test_one_token_is_the_plain_recurrence():
    args = [jnp.ones((2, 1, n, 4)) for n in (2, 2, 4)]
    text = str(jax.make_jaxpr(linear_attention)(*args, -jnp.ones((2, 1, 4, 4))))
    assert "scan" not in text and "dot_general" not in text and "pad" not in text


def test_a_mesh_of_batch_and_heads_needs_no_gather():
    mesh = sharding.make_mesh(data=2, model=4)
    place = lambda axes, *shape: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, sharding.spec(axes, shape, mesh))
    )
    tokens = ("batch", None)
    shared, heads = place((*tokens, None, None), 4, 80, 1, 8), place((*tokens, "heads", None), 4, 80, 8, 8)
    args = shared, shared, heads, place((*tokens, "heads"), 4, 80, 8)
    with sharding.use_mesh(mesh):
        step = lambda *args: jax.vjp(lambda *a: linear_attention(*a, chunk=16)[0], *args)[1](args[2])
        text = jax.jit(step).lower(*args).compile().as_text()
    assert "all-reduce" in text  # the gradient of the shared keys
    assert not any(moved in text for moved in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("sizes", [(1, 64, 4, 1, 64, 32), (2, 32, 4, 2, 16, 32)])
def test_flops_are_what_xla_counts(sizes):
    batch, time, heads, key_heads, width, values = sizes
    for decay in ((), (width,)):
        s = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
        keys, state = s(batch, time, key_heads, width), s(batch, heads, width, values)
        args = keys, keys, s(batch, time, heads, values), s(batch, time, heads, *decay), state
        f = lambda q, k, v, g, state: linear_attention(q, k, v, g, state=state, chunk=time, implementation="chunked")
        cost = jax.jit(f).lower(*args).compile().cost_analysis()
        counted = (cost[0] if isinstance(cost, list) else cost)["flops"]
        assert linear_attention_flops(*sizes, time, bool(decay)) == pytest.approx(counted, rel=0.03)


def test_flops_grow_with_whole_chunks_and_shared_keys_are_scored_once():
    count = lambda time, key_heads=4: linear_attention_flops(2, time, 4, key_heads, 16, 16, 64)
    assert count(640) == 10 * count(64) and count(65) == 2 * count(64) and count(1) < count(64) / 64
    assert count(64) - count(64, 1) == 2 * 2 * 3 * 64 * 64 * 16


def test_y_has_the_dtype_of_v_and_the_state_accumulates():
    for dtypes, state in (("bff", "f"), ("ffb", "f"), ("bbb", "f"), ("fff", "f")):
        names = {"b": jnp.bfloat16, "f": jnp.float32}
        q, k, v = (jnp.ones((1, 5, 1, 2), names[letter]) for letter in dtypes)
        for implementation in ("reference", "chunked"):
            f = functools.partial(linear_attention, chunk=4, implementation=implementation)
            out = jax.eval_shape(f, q, k, v, -jnp.ones(1, jnp.bfloat16))
            assert [x.dtype for x in out] == [v.dtype, names[state]]


def test_the_implementation_can_be_named_and_is_recorded():
    q = jnp.ones((1, 2, 1, 2))
    linear_attention(q, q, q, implementation="reference")
    linear_attention(q, q, q)
    assert {"chunked", "reference"} <= set(dispatch.chosen("linear_attention"))
    with pytest.raises(ValueError, match="implementation: expected one of .*chunked, reference for linear_attention"):
        linear_attention(q, q, q, implementation="chunk")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=(2, 5, 2)), r"q: expected shape \(B, T, Hk, K\), got \(2, 5, 2\)"),
        (dict(k=(2, 5, 2, 3)), r"k: expected shape \(B=2, T=5, Hk=2, K=4\)"),
        (dict(v=(2, 5, 3, 6)), "v: expected a number of heads divisible by Hk=2, got H=3"),
        (dict(log_decay=(2, 5)), r"log_decay: expected shape \(H\), \(B, T, H\) or \(B, T, H, K\), got \(2, 5\)"),
        (dict(log_decay=(2,)), r"log_decay: expected shape \(H=4\), got \(2,\)"),
        (dict(log_decay=(2, 5, 2)), r"log_decay: expected shape \(B=2, T=5, H=4\)"),
        (dict(state=(2, 4, 6, 4)), r"state: expected shape \(B=2, H=4, K=4, V=6\)"),
        (dict(state=(2, 4, 4, 6), normalize=True), r"state: expected the pair \(S, z\) with normalize, got"),
        (dict(segment_ids=(2, 6)), r"segment_ids: expected shape \(B=2, T=5\)"),
        (dict(segment_ids=(2, 5)), "segment_ids: expected integers"),
        (dict(chunk=48), "chunk: expected a power of two, got 48"),
        (dict(return_state="no"), "return_state: expected True or False, got 'no'"),
        (dict(eps=0.1), "eps: expected 0 without normalize, got 0.1"),
        (dict(eps=-1.0, normalize=True), "eps: expected a value >= 0, got -1.0"),
        (dict(causal=False, log_decay=(4,)), "log_decay: expected None with causal=False"),
        (dict(causal=False, state=(2, 4, 4, 6)), "state: expected None with causal=False"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, message):
    given = dict(q=(2, 5, 2, 4), k=(2, 5, 2, 4), v=(2, 5, 4, 6)) | change
    given = {name: jnp.zeros(x) if isinstance(x, tuple) else x for name, x in given.items()}
    with pytest.raises(ValueError, match=message):
        linear_attention(**given)


def test_what_is_no_array_or_number_is_refused():
    q = jnp.ones((1, 2, 1, 2))
    with pytest.raises(ValueError, match="segment_ids: expected an array, got list"):
        linear_attention(q, q, q, segment_ids=[[1, 1]])
    with pytest.raises(ValueError, match="scale: expected a finite number, got None"):
        linear_attention(q, q, q, scale=None)
    with pytest.raises(ValueError, match="log_a: expected an array, got float"):
        linear_scan(q, -0.1)


def test_integers_are_refused():
    q = jnp.ones((1, 2, 1, 2))
    with pytest.raises(ValueError, match="v: expected a floating dtype, got int32"):
        linear_attention(q, q, q.astype(jnp.int32))


def test_products_of_16_bits_run_on_cpu():
    """Of the gradient of a state that heads with shared keys read; XLA for CPUs fails at the operands as they are."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((2, 2, 2, 4, 16), (2, 2, 4, 8)))
    spec = "bgrcv,bgck->bgrkv"
    got = jax.jit(lambda a, b: contract(spec, a, b))(a, b)
    want = np.einsum(spec, np.asarray(a, np.float64), np.asarray(b, np.float64))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # 4 products, exact in float32, and their sums
