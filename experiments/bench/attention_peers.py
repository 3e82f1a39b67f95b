"""PyTorch's attention kernels under the patterns of the attention suite. Never a dependency."""

import functools

from experiments.bench.timing import torch_ms


def times(name, batch, length):
    """{peer: times} of a pattern: cuDNN and flash where they know it, flex_attention for all."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from experiments.bench import attention

    draw = lambda: torch.randn(batch, attention.HEADS, length, attention.WIDTH, device="cuda", dtype=torch.bfloat16)
    inputs = [draw().requires_grad_() for _ in range(3)]
    found = dense_times(inputs, name == "causal") if name in ("causal", "full") else {}
    torch._dynamo.reset()  # else the recompilation limit silently falls back to the uncompiled operator
    mask = create_block_mask(visible(name, length), None, None, length, length, device="cuda", _compile=True)
    flex = torch.compile(flex_attention)
    found["torch flex_attention"] = _timed(lambda q, k, v: flex(q, k, v, block_mask=mask), inputs)
    torch.cuda.empty_cache()
    return found


def dense_times(inputs, causal):
    """{peer: times} of cuDNN and flash by torch; inputs: q [B, H, T, K], k and v, whose heads may be fewer."""
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    grouped = inputs[0].shape[1] != inputs[1].shape[1]

    def dense(q, k, v, backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return {f"torch {label}": _timed(functools.partial(dense, backend=b), inputs) for label, b in backends.items()}


def heads_times(batch, length, heads, key_heads, width):
    """{peer: times} of causal attention, several query heads to a key head."""
    import torch

    draw = lambda heads: torch.randn(batch, heads, length, width, device="cuda", dtype=torch.bfloat16).requires_grad_()
    found = dense_times([draw(heads), draw(key_heads), draw(key_heads)], True)
    torch.cuda.empty_cache()
    return found


def _timed(call, inputs):
    import torch

    with torch.no_grad():
        fwd = torch_ms(lambda: call(*inputs))
    cotangent = torch.randn_like(call(*inputs))
    both = lambda: torch.autograd.grad(call(*inputs), inputs, cotangent)
    return {"fwd_ms": fwd, "fwd_bwd_ms": torch_ms(both)}


def visible(name, length):
    """The pattern as flex_attention's mask_mod; the neighbourhood's tokens row by row."""
    import torch

    from experiments.bench import attention as a

    if name == "full":
        return lambda b, h, i, j: i >= 0
    if name == "causal":
        return lambda b, h, i, j: i >= j
    if name == "window":
        return lambda b, h, i, j: (i >= j) & (i - j < a.WINDOW)
    if name == "documents":
        ids = torch.tensor(a.documents(length)[0], device="cuda")
        return lambda b, h, i, j: (i >= j) & (ids[i] == ids[j])
    if name == "prefix":
        prefix = min(a.PREFIX, length // 4)
        return lambda b, h, i, j: (i >= j) | (j < prefix)
    if name == "sinks and window":
        return lambda b, h, i, j: (i >= j) & ((i - j < a.WINDOW) | (j < a.SINK_TOKENS))
    if name == "neighbourhood":
        return _neighbourhood(int(length**0.5), a.NEAR)
    density = float(name.split()[-1].rstrip("%")) / 100
    table = torch.tensor(a.random_table(density, length), device="cuda")
    return lambda b, h, i, j: table[i // a.BLOCK, j // a.BLOCK]


def _neighbourhood(side, window):
    import torch

    def start(c):
        return torch.clamp(c - window // 2, 0, side - window)

    def seen(b, h, i, j):
        ri, ci, rj, cj = i // side, i % side, j // side, j % side
        rows = (rj >= start(ri)) & (rj < start(ri) + window)
        return rows & (cj >= start(ci)) & (cj < start(ci) + window)

    return seen


def nsa_times(name, length, index):
    """{peer: times} of fla's parallel_nsa, with the lists index [1, HK, T, c], or with its own choice and branch."""
    import numpy as np
    import torch
    from fla.ops.nsa import parallel_nsa

    from experiments.bench import attention_nsa as a

    draw = lambda heads: torch.randn(1, length, heads, a.WIDTH, device="cuda", dtype=torch.bfloat16)
    inputs = [draw(heads).requires_grad_() for heads in (a.HEADS, a.KEY_HEADS, a.KEY_HEADS)]
    gate = torch.ones(1, length, a.HEADS, device="cuda", dtype=torch.bfloat16)
    options = {"g_slc": gate, "block_counts": a.COUNT, "block_size": a.SIZE}
    if name == a.SELECTED:
        own = np.broadcast_to(np.arange(length) // a.SIZE, (1, a.KEY_HEADS, length))[..., None]
        both = np.concatenate([own, np.asarray(index)], axis=-1).swapaxes(1, 2)
        options["block_indices"] = torch.tensor(both.copy(), device="cuda", dtype=torch.long)
    else:
        options["g_cmp"] = gate
    found = {"fla parallel_nsa": _timed(lambda q, k, v: parallel_nsa(q, k, v, **options), inputs)}
    torch.cuda.empty_cache()
    return found


def chosen_times(table):
    """Times of flex_attention, causal, where token i of a head sees the blocks of table [B, H, T, n]."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from experiments.bench import attention_moba as a

    batch, heads, length = table.shape[:3]
    seen = torch.tensor(table, device="cuda")
    torch._dynamo.reset()
    visible = lambda b, h, i, j: (i >= j) & seen[b, h, i, j // a.SIZE]
    mask = create_block_mask(visible, batch, heads, length, length, device="cuda", _compile=True)
    draw = lambda: torch.randn(batch, heads, length, a.WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
    flex = torch.compile(flex_attention)
    found = _timed(lambda q, k, v: flex(q, k, v, block_mask=mask), [draw() for _ in range(3)])
    torch.cuda.empty_cache()
    return found


def moba_times(length):
    """{peer: times} of fla's parallel_moba, its choice included; {} without flash-attn, which it calls."""
    import torch

    try:
        import flash_attn  # noqa: F401
        from fla.ops.moba import parallel_moba
    except ImportError:
        return {}
    from experiments.bench import attention_moba as a

    draw = lambda: torch.randn(1, length, a.HEADS, a.WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
    ends = torch.tensor([0, length], device="cuda", dtype=torch.int32)
    run = lambda q, k, v: parallel_moba(q, k, v, ends, length, a.SIZE, a.COUNT)
    return {"fla parallel_moba": _timed(run, [draw() for _ in range(3)])}
