"""What a config would train, without allocating it: parameters, FLOPs, memory, shardings, data."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from experiments import data, loop, progress
from seqmix.core import param


def show(cfg):
    """Prints the tables of a dry run; the last line of stdout is `params=<int>`. Raises ValueError for what a run
    would refuse, but for a mesh of more devices than there are here, which it says.
    """
    model, tree = cfg.model, cfg.model.params()
    sizes, mesh = _mesh(cfg)
    align = math.lcm(*(mixer.align for mixer in model.period))
    dataset = data.load(cfg.data, model.vocab, align, all(mixer.packable for mixer in model.period))
    laid = param.shardings(tree, mesh)  # refuses what cannot be laid out, before anything is printed
    rows = [(name, f"{count:,}") for name, count in model.parts().items()]
    total = param.count(tree)
    progress.table(f"{cfg.name}: parameters", ("part", "count"), [*rows, ("total", f"{total:,}")])
    seq = cfg.data.seq_len
    forward = model.flops(1, seq) / seq
    progress.table(
        f"FLOPs per token at {seq} tokens",
        ("pass", "FLOPs"),
        [
            ("forward", f"{forward:.4g}"),
            ("forward and backward", f"{3 * forward:.4g}"),
            (f"whole run, {cfg.steps} steps", f"{3 * forward * seq * cfg.data.batch_size * cfg.steps:.4g}"),
        ],
    )
    _memory(cfg, tree, sizes, laid)
    columns, where = ("weight", "shape", "axes", "partition"), ", ".join(f"{k}={v}" for k, v in sizes.items())
    progress.table(f"Shardings on mesh {where}", columns, _shardings(tree, laid), left=4)
    print(f"data: {dataset.summary}")
    need, here = math.prod(sizes.values()), jax.device_count()
    short = "" if need <= here else "; a run here would be refused"
    print(f"devices: the mesh takes {need}, this machine has {here}{short}")
    print(f"params={total}", flush=True)


def _mesh(cfg):
    """(sizes, a mesh without devices); a mesh larger than this machine is fine in a dry run."""
    fixed = math.prod(size for size in dataclasses.astuple(cfg.mesh) if size != -1)
    sizes = loop.mesh_sizes(cfg, max(jax.device_count(), fixed))
    return sizes, jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))


def _shardings(tree, laid):
    for (name, leaf), sharding in zip(param.entries(tree), jax.tree.leaves(laid), strict=True):
        axes = " ".join("-" if axis is None else str(axis) for axis in leaf.axes)
        parts = ["+".join(_axes([part])) or "-" for part in sharding.spec]
        shown = " ".join(parts) if any(part != "-" for part in parts) else "replicated"
        yield name, "x".join(map(str, leaf.shape)) or "scalar", axes, shown


def _memory(cfg, tree, sizes, laid):
    """Bytes in all and on one device: weights, gradients, moments exactly; activations from the traced
    residuals.
    """
    weights = grads = adam = here = here_moments = 0
    for (_, leaf), sharding in zip(param.entries(tree), jax.tree.leaves(laid), strict=True):
        size = math.prod(leaf.shape)
        width = jnp.dtype(leaf.dtype).itemsize
        parts = math.prod(sizes[axis] for axis in _axes(sharding.spec))
        weights, here = weights + size * width, here + size * width / parts
        if leaf.trainable:
            grads, adam = grads + size * width, adam + 8 * size
            here_moments += size * (width + 8) / parts
    activations, rows = _residual_bytes(cfg, weights, sizes)
    table = [
        ("weights", weights, None),
        ("gradients", grads, None),
        ("Adam moments", adam, None),
        ("weights, gradients, moments", weights + grads + adam, here + here_moments),
        (f"activations kept for the backward pass (estimate, {rows} rows a device)", None, activations),
        ("sum (estimate)", None, here + here_moments + activations),
    ]
    progress.table("Memory", ("what", "all devices", "one device"), [(a, _size(b), _size(c)) for a, b, c in table])


def _size(count):
    if count is None:
        return ""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def _axes(spec):
    for part in spec:
        yield from () if part is None else part if isinstance(part, tuple) else (part,)


def _residual_bytes(cfg, weights, sizes):
    """(bytes, rows): what one device's microbatch keeps between the passes, by tracing the gradient
    abstractly.
    """
    rows = max(cfg.data.batch_size // cfg.optim.accumulate // (sizes["data"] * sizes["fsdp"]), 1)
    shape = jax.ShapeDtypeStruct((rows, cfg.data.seq_len), jnp.int32)
    params = param.abstract(cfg.model.params())

    def residuals(params, tokens):
        def loss(p):
            mask = jnp.ones(tokens.shape, jnp.float32)
            packs = all(mixer.packable for mixer in cfg.model.period)
            ids = jnp.ones(tokens.shape, jnp.int32) if packs else None
            return cfg.model.loss(p, tokens, tokens, mask, segment_ids=ids)[0]

        return jax.vjp(loss, params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(residuals, params, shape))
    total = sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in leaves if hasattr(leaf, "dtype"))
    return max(total - weights, 0) / sizes["context"], rows
