"""Gradients of linear attention with a decay per channel, on TPUs.

As by `tpu_backward`: a first kernel walks time and writes the state S before each chunk, in bf16; a second walks time
from the right with D, the gradient of the state after a chunk. With the letters of `tpu_channel`, the scale within q,
and P = dy v^T for j <= i, the gradient of the scores:

    dq = b (dy S^T) + sum over levels ;   dk = a (v D^T) + sum over levels ;   dv = A^T dy + (k a) D
    D <- b_last D + (q b)^T dy

At a level, X holds decayed queries (of later rows) and keys (of earlier ones), and W is P + P^T where blocks meet:
W X is what dq takes in a later row and dk in an earlier one, but for the factor that the row of X has of q or k.

That times q or k is the gradient of the factor's logarithm, a sum of log decays that grows from level to level: going
back through the levels makes the decays' gradients by additions alone, with no two large sums subtracted.
"""

import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_attention.tpu import CHUNK, SUBLANES, Tokens, dot, start_walk
from pallas_kernels.linear_attention.tpu_backward import (
    Sums,
    add_turns,
    by_token,
    by_width,
    second,
    sums_by_head,
    walked_gradients,
    walked_states,
)
from pallas_kernels.linear_attention.tpu_channel import (
    ChannelBlocks,
    Head,
    Tree,
    apart,
    blocks_of,
    exchanged,
    flat,
    gather,
    halves,
    own,
    registers,
)

STEP_COLUMNS = 512  # value columns of a grid step; 1024 take 3 to 5% fewer bundles a token, but twice as many


def backward(q, k, v, log_decay, state, run_ids, log_write, dy, dstate=None, *, scale=1.0, need_decay=True, tile=None):
    """Gradients (dq, dk, dv, dlog_decay, dstate, dlog_write) of `tpu_channel.forward`, from its arguments alone.

    As `tpu_backward.backward`, but log_decay and its gradient are [B, T, H, K].
    """
    blocks = ChannelBlocks.of(q, v, tile or (CHUNK, max(1, STEP_COLUMNS // v.shape[3])))
    plan = blocks.plan
    arrays = {"q": q, "k": k, "v": v, "state": state, "dy": dy}
    given = gather(blocks, log_decay, run_ids, log_write, arrays)
    given = second(blocks, given, _states(blocks, given), dstate)
    count = 0 if log_write is None else 1
    more = [("value", given["log_decay"][1].shape)] if need_decay else []

    def body(*refs):
        here = dict(zip(given, refs))
        dq_ref, dk_ref, dv_ref, gradients, *rest = refs[len(given) :]
        start_walk(gradients, here.get("state"))
        tokens = Tokens(blocks, here.get("decays"), here.get("segments"), scale, 2)
        sums, outputs = Sums(blocks, count), (dv_ref, gradients, rest[count] if need_decay else None)
        kept = rest[count + need_decay :] or (None, None)
        dq = dk = 0.0
        for head in range(blocks.heads):
            now = Head(blocks, here, tokens, head)
            more_dq, more_dk = _of_head(blocks, here, now, head, outputs, sums)
            dq, dk = dq + more_dq, dk + more_dk
            if head + 1 == blocks.heads or now.key_head != (head + 1) // (blocks.heads // blocks.key_heads):
                for out, value, scratch in zip((dq_ref, dk_ref), (dq * scale, dk), kept):
                    add_turns(blocks, out, value, now.keys, scratch)
                dq = dk = 0.0
        if count:
            rest[0][...] = sums.rows()

    dq, dk, dv, first, *rest = walked_gradients(
        blocks, given, body, "linear_attention_channel_backward", plan.key, count, more
    )
    dlog = dwrite = None
    if need_decay:
        dlog = rest[count].reshape(plan.batch, plan.padded, plan.heads, -1)[:, : plan.time].astype(log_decay.dtype)
    if count:
        dwrite = by_token(plan, sums_by_head(blocks, rest[0], 1)[:, :, 0], run_ids)
    return *by_width(plan, dq, dk, dv), dlog, blocks.unpack(first), dwrite


def _states(blocks: ChannelBlocks, given):
    """The state before each chunk, bfloat16 [B, chunks, H, V, K]."""
    names = [name for name in given if name not in ("q", "dy")]

    def body(*refs):
        here = dict(zip(names, refs))
        out, states = refs[len(names) :]
        start_walk(states, here.get("state"))
        tokens = Tokens(blocks, here.get("decays"), here.get("segments"), 1.0, 2)
        for head in range(blocks.heads):
            now = Head(blocks, here, tokens, head)
            tree = Tree(now.left)
            for level in blocks.levels:
                tree.double(level)
            held = states[blocks.place(head)]
            out[head] = held.astype(jnp.bfloat16)
            states[blocks.place(head)] = now.carried(held, tree, here["v"][:, now.values])

    return walked_states(blocks, given, names, body, "linear_attention_channel_states", blocks.plan.key)


def _of_head(blocks, here, now, head, outputs, sums):
    """A head's dq, but for the scale, and dk [C, K]; writes dv and the gradients of its state and decays."""
    dv_ref, gradients, decays_ref = outputs
    value, dy, state = here["v"][:, now.values], here["dy"][:, now.values], here["states"][head]
    gradient, tokens = gradients[blocks.place(head)], now.tokens
    rounded = gradient.astype(jnp.bfloat16)
    tree = Tree(now.left)
    below, above = dot(dy, value, 1, 1), dot(value, dy, 1, 1)
    rows, across = (lax.broadcasted_iota(jnp.int32, below.shape, axis) for axis in (0, 1))
    slopes = jnp.where(rows > across, below, above)
    slopes = slopes if tokens.same is None else jnp.where(tokens.same, slopes, 0.0)
    slopes = registers(slopes)
    distance = apart(slopes.shape)
    diagonal = jnp.sum(jnp.where(distance == 0, slopes, 0.0), axis=2, keepdims=True)
    dq, dk = diagonal * now.key, diagonal * now.query

    levels, scores = [], own(now.query, now.key, slopes.shape[2])
    for level in blocks.levels:
        scores, tile, left = tree.join(level, now.query, now.key, scores, later=0)
        weights = flat(jnp.where(distance >> level == 1, slopes, 0.0)).astype(jnp.bfloat16)
        change = left * registers(dot(weights, tile, 1, 0))
        dq, dk = halves(level, dq + change, dq), halves(level, dk, dk + change)
        levels.append(halves(level, now.query, now.key) * change)
    seen = rows <= across if tokens.same is None else (rows <= across) & tokens.same
    scores = jnp.where(seen, flat(scores), 0.0).astype(jnp.bfloat16)

    into, out = now.reads(tree), now.leaves(tree)
    query, key = flat(now.query), flat(now.key)
    reads, writes = into * dot(dy, state, 1, 0), out * dot(value, rounded, 1, 0)
    dq, dk = flat(dq) + reads, flat(dk) + writes
    read, written = (query * into).astype(jnp.bfloat16), (key * out).astype(jnp.bfloat16)
    dv = dot(scores, dy, 1, 0) + dot(written, rounded, 1, 1)
    dv_ref[:, now.values] = dv.astype(jnp.bfloat16)
    kept = now.kept
    gradients[blocks.place(head)] = gradient * kept + dot(dy.T, read, 1, 0)
    if decays_ref is not None:
        crossing = kept * jnp.sum(state.astype(jnp.float32) * gradient, axis=0, keepdims=True)
        total = flat(_decays(levels, registers(reads * query), registers(writes * key))) + crossing
        decays_ref[:, now.channels] = now.only(tokens.real, total)
    if now.weight is not None:
        sums.add(head, 0, 0, jnp.sum(dk * key, axis=1, keepdims=True))
        dk = dk * flat(now.weight)
    return dq, dk


def _decays(levels, before, after):
    """Gradients of the log decays from those of what is left, by level and for the chunk: back through `Tree`."""
    whole = jnp.zeros_like(before[:1])
    for level, exponent in reversed(list(enumerate(levels))):
        if 1 << level < SUBLANES:
            whole = whole + exchanged(level, halves(level, before, after) + whole)
        else:
            entered, left = blocks_of(level, before)[1::2], blocks_of(level, after)[::2]
            of_block = [x for pair in zip(entered, left) for x in pair]
            sums = [whole[at // 2 : at // 2 + 1] + jnp.sum(x, 0, keepdims=True) for at, x in enumerate(of_block)]
            whole = jnp.concatenate(sums)
        before, after = halves(level, before + exponent, before), halves(level, after, after + exponent)
    return before + whole
