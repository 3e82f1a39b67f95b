"""Compiled for eight H100s, the ops keep their kernels, and what they are given stays where it is."""

import re

import jax
import jax.numpy as jnp
import pytest

from experiments import gpu_options
from seqmix import ops
from seqmix.core import sharding
from seqmix.ops import masks

B, T, H, K, V = 8, 1024, 8, 128, 64
CUT = jax.P(None, "context")
MOVES = r"= (.*?) (all-gather|all-to-all|collective-permute)(?:-start)?\("


def hlo(mesh, function, *arguments):
    """The compiled gradient's text, of arguments given as (shape, dtype, *names of dimensions)."""
    with sharding.use_mesh(mesh):
        laid = []
        for shape, dtype, *names in arguments:
            spec = sharding.spec(names, shape, mesh)
            laid.append(jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec)))
        loss = lambda *args: jnp.sum(function(*args).astype(jnp.float32) ** 2)
        return jax.jit(jax.grad(loss, tuple(range(len(laid))))).lower(*laid).compile().as_text()


CALLS = {
    "linear_attention": (
        lambda q, k, v, d: ops.linear_attention(q, k, v, -jnp.exp(d), write=jnp.exp(d))[0],
        ((B, T, 1, K), jnp.bfloat16, "batch", "time", None, None),
        ((B, T, 1, K), jnp.bfloat16, "batch", "time", None, None),
        ((B, T, H, V), jnp.bfloat16, "batch", "time", "heads", None),
        ((B, T, H), jnp.float32, "batch", "time", "heads"),
    ),
    "linear_scan": (
        lambda x, a: ops.linear_scan(x, -jnp.exp(a))[0],
        ((B, T, 8, 384), jnp.bfloat16, "batch", "time", "heads", None),
        ((B, T, 8, 384), jnp.bfloat16, "batch", "time", "heads", None),
    ),
}


def test_attention_keeps_its_kernel_on_each_share(h100s):
    mesh = sharding.make_mesh(data=2, model=2, devices=h100s(4))
    tokens = ((B, T, H, K), jnp.bfloat16, "batch", "time", "heads", None)
    text = hlo(mesh, ops.attention, tokens, tokens, tokens)
    assert "block_sparse_attention_forward" in text
    assert not re.findall(MOVES, text)


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("op", CALLS)
def test_kernels_are_in_the_program_of_eight_gpus_and_no_token_moves(h100s, op, context):
    mesh = sharding.make_mesh(data=2, fsdp=4 // context // 2, context=context, model=2, devices=h100s(8))
    text = hlo(mesh, *CALLS[op])
    kernels = ("forward", "backward") if op == "linear_scan" else ("forward", "dq", "dkv")
    assert all(f"{op}_{kernel}_mosaic_gpu" in text for kernel in kernels)
    moved = re.findall(MOVES, text)
    # A state has K or one number a channel; a share of the tokens has 1024 / context.
    assert bool(moved) == (context > 1)
    assert not any(str(T // context) in shape or str(T) in shape for shape, _ in moved), moved


def _generated(mesh, batch, heads):
    """The compiled text of a loop of tokens through the delta rule's kernel."""
    with sharding.use_mesh(mesh):

        def laid(dtype, shape, *names):
            spec = sharding.spec(names, shape, mesh)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

        tokens = [laid(jnp.bfloat16, (4, batch, 1, heads, K), None, "batch", None, "heads", None)] * 3
        gates = [laid(jnp.float32, (4, batch, 1, heads), None, "batch", None, "heads")] * 2
        state = laid(jnp.float32, (batch, heads, K, K), "batch", "heads", None, None)

        def step(state, token):
            return ops.delta_rule(*token, state=state, implementation="gpu")[::-1]

        return jax.jit(lambda *args: jax.lax.scan(step, *args)).lower(state, (*tokens, *gates)).compile().as_text()


def test_a_token_is_one_kernel_that_changes_the_state_in_place(h100s):
    text = _generated(sharding.make_mesh(devices=h100s(1)), 2, 4)
    body = next(body for body in re.split(r"\n\}\n", text) if "ROOT" in body and "state_step_mosaic_gpu" in body)
    assert "dynamic-slice(" in body  # the tokens are read where they lie, too
    loop = re.search(r"body=(%[\w.]+)", text)[1]
    body = re.search(rf"\n{re.escape(loop)} \(.*?\n\}}\n", text, re.DOTALL)[0]
    assert len(re.findall(r" fusion\(", body)) == 2  # the other counts tokens
    assert "copy" not in body and "custom-call" not in body


def test_a_token_stays_on_its_share(h100s):
    text = _generated(sharding.make_mesh(data=2, model=2, devices=h100s(4)), 2, 4)
    assert "state_step_mosaic_gpu" in text
    assert not re.findall(MOVES, text)


def test_keys_are_on_their_way_while_a_block_is_worked_on(h100s):
    """In the loops of the ring, forward and backward, the work on a block stands between a permute's start and end."""
    mesh = sharding.make_mesh(context=4, devices=h100s(4))
    tokens = ((1, 8192, 2, 128), jnp.bfloat16, "batch", "time", "heads", None)
    text = hlo(mesh, lambda q, k, v: ops.attention(q, k, v, context="ring"), tokens, tokens, tokens)
    bodies = [body for body in re.split(r"\n\}\n", text) if "collective-permute-start(" in body and "ENTRY" not in body]
    assert len(bodies) == 2
    between = [
        re.search(r"collective-permute-start\(.*collective-permute-done\(", body, re.DOTALL)[0] for body in bodies
    ]
    ways = [{way for way in ("forward", "dq", "dkv") if f"block_sparse_attention_{way}" in text} for text in between]
    assert sorted(ways, key=len) == [{"forward"}, {"dq", "dkv"}]


def test_weights_are_on_their_way_while_a_layer_is_worked_on(h100s):
    """The options of steps on several GPUs: both of a layer's weights in one go, before the loop and then in it."""
    mesh = sharding.make_mesh(fsdp=2, devices=h100s(2))
    up = jax.ShapeDtypeStruct((6, 512, 1024), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P(None, "fsdp")))
    down = jax.ShapeDtypeStruct((6, 1024, 512), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))

    def layer(x, weights):
        up, down = (sharding.gathered(w, ("embed", None), (None, None)) for w in weights)
        return jnp.tanh(jnp.tanh(x @ up) @ down), None

    with sharding.use_mesh(mesh):
        lowered = jax.jit(lambda x, *weights: jax.lax.scan(layer, x, weights)[0]).lower(x, up, down)
        texts = [lowered.compile(options).as_text() for options in (None, gpu_options.FSDP)]
    assert gpu_options.options(mesh) == gpu_options.FSDP
    assert [text.count("all-gather-start(") for text in texts] == [1, 2]


def test_a_block_sparse_ring_holds_two_stretches_however_many_there_are(h100s):
    """Bytes of temporaries of a device, forward and backward, with 1024 tokens for each of so many devices."""

    def temporary(ways):
        mesh = sharding.make_mesh(context=ways, devices=h100s(ways))
        x = jax.ShapeDtypeStruct((1, 1024 * ways, 2, 32), jnp.float32, sharding=jax.NamedSharding(mesh, CUT))
        loss = lambda q, k, v: jnp.sum(ops.block_sparse_attention(q, k, v, mask=masks.Causal(), context="ring") ** 2)
        with sharding.use_mesh(mesh):
            program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(5) <= 1.02 * temporary(3)
