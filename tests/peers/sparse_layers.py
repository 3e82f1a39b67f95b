"""Native sparse attention beside flash-linear-attention's layer, on the package's own naive functions."""

from seqmix.mixers.dynamic_sparse.native_sparse_attention import NativeSparseAttention
from tests.peers.compare import load_file
from tests.peers.layers import call, layer, linear, linear_out

POOLED = dict(pool="mean", branch_kv=False, compress=4, stride=4, size=4)  # what the package has kernels for
NSA = NativeSparseAttention(d_model=16, heads=4, kv_heads=2, **POOLED, count=5, window=6, block=16)
MISSING = (
    *("fla.layers.utils", "fla.modules", "fla.ops.nsa.parallel", "fla.ops.utils.index", "fla.ops.utils"),
    *("fla.ops.utils.pooling", "flash_attn", "transformers", "transformers.utils"),
)


def _kernel(q, k, v, g_cmp, g_slc, g_swa, block_size, block_counts, window_size, **options):
    """As `naive_nsa`, which needs 16 heads a group, and other kernels for pooling and for the window."""
    import torch
    import torch.nn.functional as F

    naive = load_file("fla-core", "fla/ops/nsa/naive.py", MISSING)
    time, scale = q.shape[1], q.shape[-1] ** -0.5

    def pool(x):
        x = F.pad(x, (0, 0, 0, 0, 0, -time % block_size))
        return x.unflatten(1, (-1, block_size)).mean(2)

    compressed, _ = naive.naive_nsa_compression(q, pool(k), pool(v), block_size, scale)
    index = naive.naive_nsa_topk(q, pool(k), block_counts, block_size, scale)
    wide = [x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v)]
    # Its gather wants as many value heads as there are query heads.
    selected = naive.naive_nsa_selection(q, *wide, index.repeat_interleave(2, dim=2), block_size, scale)
    at = torch.arange(time)
    near = (at[:, None] >= at) & (at[:, None] - at < window_size)
    window = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, *wide)), near).transpose(1, 2)
    return g_cmp[..., None] * compressed + g_slc[..., None] * selected + g_swa[..., None] * window


def _rotary(dim, base):
    """Their module's call, by its formula: pairs of a first and a second half."""
    import torch

    def rotated(q, k, **options):
        angle = torch.arange(q.shape[1])[:, None] * base ** (-torch.arange(0, dim, 2) / dim)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        turn = lambda x: torch.cat([x[..., : dim // 2] * cos - x[..., dim // 2 :] * sin,
                                    x[..., : dim // 2] * sin + x[..., dim // 2 :] * cos], -1)  # fmt: skip
        return turn(q), turn(k)

    return rotated


def _nsa(their_layer, x, p):
    their_layer.forward.__globals__["parallel_nsa"] = _kernel
    m = NSA
    fields = dict(block_size=m.size, block_counts=m.count, window_size=m.window)
    their_layer.__init__.__globals__["RotaryEmbedding"] = lambda dim, base: _rotary(dim, base)
    made = their_layer(m.d_model, m.heads, m.kv_heads, m.d_model // m.heads, **fields)
    weights = {"q_proj.weight": linear(p["q"]), "o_proj.weight": linear_out(p["out"])}
    weights |= {"g_proj.weight": linear(p["gate"])}
    weights |= {f"{name}_proj.weight": linear(p[f"{name}/shared"]) for name in "kv"}
    return call(made, weights, x)[0]


COMPARISONS = (
    layer(NSA, "flash-linear-attention", "fla/layers/nsa.py", "NativeSparseAttention", _nsa, missing=MISSING),
)
