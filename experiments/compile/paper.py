"""The same figures on paper: what a step of a config costs on a mesh, by formulas and without compiling.

For a share of t tokens of a device, weights N of which it holds N / (fsdp model), r = 1 where remat repeats the
forward pass and else 0, and a microbatches:

    compute  (3 + r) forward FLOPs / devices; mixers that pass states go over each stretch twice
    memory   (3 + r) (SPREAD 2 (in + out) t of each matrix + what an op moves) + weights, moments and gradients
    links    fsdp: weights gathered twice a microbatch, gradients scattered; data and context: gradients summed;
             model: 2 sums of [t, D] a block and pass; context: states gathered, or keys and values sent around

What an op moves is its FLOPs over an intensity. SPREAD, the intensities and WORK were chosen once so that the programs
compiled for v5p in docs/compile.md come out; on other chips they are a guess.
"""

import dataclasses
import functools
import math

import jax
import numpy as np

from experiments import loop
from experiments.compile import step
from seqmix.core import param, sharding

SPREAD = 4.0  # bytes moved around a matrix product over those of its operands: norms, gates, convolutions
INTENSITY = {"state": 10.0, "other": 50.0}  # FLOPs of an op's XLA form for each byte that it moves
WORK = {"state": 8.0, "other": 2.2}  # bytes of one layer at work over those of its products' operands
UPDATE = 36.0  # bytes moved to update a weight: float32 weight, moments, gradient, and the gradient's norm


@dataclasses.dataclass(frozen=True)
class Layer:
    """A mixer with its MLP, per token where not said otherwise."""

    whole: int  # sum of its matrices' inputs and outputs that every device of the model axis has
    split: int  # and of those that are divided over it
    outputs: int  # sum of the outputs
    op: float  # forward FLOPs that are not those of matrices
    blocks: int  # residual branches
    form: str  # how it goes over a context axis
    handed: int  # elements that a sequence hands over: of a state, or of all keys and values


def estimate(cfg, topology, sizes) -> dict:
    """As `step.compiled` on a mesh of these sizes, without `kernels`; memory has "total", "chip" and "free" alone.

    Raises ValueError for what a run would refuse of the mesh.
    """
    chip, count = topology.chip, math.prod(sizes.values())
    held, whole = _weights(cfg.model, sizes["fsdp"], sizes["model"])
    layers, logits = _layers(cfg.model, cfg.data.seq_len)
    tokens = cfg.data.batch_size * cfg.data.seq_len / (sizes["data"] * sizes["fsdp"] * sizes["context"])
    passes = 4 if cfg.model.remat == "full" else 3
    split = 1 / sizes["model"]
    ops = {form: sum(layer.op for layer in layers if layer.form == form) for form in {x.form for x in layers}}
    again = ops.get("state", 0) * passes * tokens * split if sizes["context"] > 1 else 0
    compute = passes / 3 * _flops(cfg) / count + again
    edges = sum(layer.whole + layer.split * split for layer in layers)
    moved = passes * tokens * (SPREAD * 2 * edges + 6 * logits * split)
    moved += sum(passes * tokens * split * flops / _of(INTENSITY, form) for form, flops in ops.items())
    moved += again / INTENSITY["state"] + UPDATE * held + 6 * whole * passes * cfg.optim.accumulate
    exchanges = _exchanges(cfg, topology, sizes, layers, (held, whole, tokens, passes))
    terms = {
        "compute": compute / chip.peak,
        "memory": moved / chip.bandwidth,
        "links": sum(one["seconds"] for one in exchanges),
    }
    total = _memory(cfg, layers, logits, held, whole, tokens / cfg.optim.accumulate, split)
    return {
        **step.describe(cfg, topology, sizes),
        "memory": {"total": total, "chip": chip.memory, "free": 1 - total / chip.memory},
        "model_flops": _flops(cfg),
        "flops": compute,
        "bytes": moved,
        "collectives": step.merged(exchanges),
        "seconds": terms,
        **step.bounds(terms, _flops(cfg), count, chip),
    }


def _exchanges(cfg, topology, sizes, layers, figures):
    held, whole, tokens, passes = figures
    forward = passes - 2  # passes of the forward kind: their products of activations are summed again
    rows = cfg.data.batch_size / (sizes["data"] * sizes["fsdp"])
    micro = cfg.optim.accumulate
    ring = lambda n: (n - 1) / n
    found = []

    def add(kind, axes, count, size):
        n = math.prod(sizes[axis] for axis in axes)
        if n > 1 and size:
            rate = _rate(topology, tuple(sizes.items()), axes)
            entry = {"kind": kind, "axes": "+".join(axes), "devices": n, "count": count, "bytes": size}
            found.append(entry | {"seconds": size / rate})

    add("all-gather", ("fsdp",), 2 * micro * len(layers), 2 * micro * 2 * whole * ring(sizes["fsdp"]))
    add("reduce-scatter", ("fsdp",), micro * len(layers), 2 * whole * micro * ring(sizes["fsdp"]))
    spread = tuple(axis for axis in ("data", "context") if sizes[axis] > 1)
    if spread:
        add("all-reduce", spread, micro * len(layers), 4 * held * micro * ring(math.prod(sizes[x] for x in spread)))
    blocks = sum(layer.blocks for layer in layers)
    width = cfg.model.d_model
    sums = blocks * (forward + 1)
    add("all-reduce", ("model",), sums * micro, sums * 2 * ring(sizes["model"]) * tokens * width * 2)
    for layer in layers:
        share = layer.handed * rows / sizes["model"]
        if layer.form == "state":  # states in float32, forward and back
            add("all-gather", ("context",), passes - 1, (passes - 1) * 4 * share * (sizes["context"] - 1))
        else:  # bfloat16 keys and values around, in the backward pass beside their float32 gradients
            size = 2 * share * ring(sizes["context"]) * (forward + 3)
            add("collective-permute", ("context",), (forward + 2) * (sizes["context"] - 1), size)
    return found


def _memory(cfg, layers, logits, held, whole, tokens, split):
    """Bytes on one device; `tokens` are those of a microbatch, `split` is 1 / model."""
    operands = [2 * (layer.whole + layer.split * split) for layer in layers]
    worked = [_of(WORK, layer.form) * size for layer, size in zip(layers, operands, strict=True)]
    kept = {"full": 0, "dots": 2 * split * sum(layer.outputs for layer in layers), "none": sum(worked) / 2}
    # Full remat keeps what enters each layer, else a period's is kept among the rest.
    carried = 2 * cfg.model.d_model * (len(layers) if cfg.model.remat == "full" else cfg.model.n_periods)
    chunk = min(cfg.model.loss_chunk / cfg.data.seq_len, 1) * logits * split * 8
    state = 12 + 4 + 2 + 4 * bool(cfg.optim.ema) + 4 * (cfg.optim.accumulate > 1)
    return state * held + 4 * whole / len(layers) + tokens * (carried + kept[cfg.model.remat] + max(worked) + chunk)


def _of(table, form):
    return table.get(form, table["other"])


@functools.lru_cache(512)
def _weights(model, fsdp, ways):
    """(weights that a device holds, weights that it has once fsdp has gathered them)."""
    mesh = lambda f: jax.sharding.AbstractMesh((1, f, 1, ways), sharding.MESH_AXES)
    tree = model.params()
    held, gathered = (param.shardings(tree, mesh(f)) for f in (fsdp, 1))
    pairs = lambda laid: zip(param.entries(tree), jax.tree.leaves(laid), strict=True)
    size = lambda laid: sum(math.prod(where.shard_shape(p.shape)) for (_, p), where in pairs(laid))
    return size(held), size(gathered)


@functools.lru_cache(64)
def _layers(model, seq):
    """(a `Layer` for each layer, rows of the logits' table)."""
    made = []
    for mixer, hidden in zip(model.period, model.mlp_widths, strict=True):
        divided, all_edges, outputs, products = _matrices(mixer.params())
        op = max(mixer.flops(1, seq) / seq - 2 * products, 0)
        if hidden:
            divided, all_edges = divided + 3 * hidden, all_edges + 3 * (hidden + model.d_model)
            outputs += 2 * hidden + model.d_model
        parts = {"whole": all_edges - divided, "split": divided, "outputs": outputs, "op": op}
        form, handed = mixer.context_form, mixer.state_size(seq)
        made.append(Layer(**parts, blocks=1 + bool(hidden), form=form, handed=handed))
    return tuple(made) * model.n_periods, model.table_rows


def _matrices(tree):
    """Of the weights that have inputs and outputs: the sum of both over what the model axis divides, over all of
    them, the sum of the outputs, and the number of weights.
    """
    divided = edges = outputs = products = 0
    for _, p in param.entries(tree):
        if len(p.shape) < 2 or not p.decay:
            continue
        size, fan_in = math.prod(p.shape), p.fan_in or p.shape[0]
        over_inputs = sharding.RULES.get(p.axes[0]) == "model"
        over_any = any(sharding.RULES.get(axis) == "model" for axis in p.axes)
        divided += (fan_in if over_inputs else size // fan_in) if over_any else 0
        edges, outputs, products = edges + fan_in + size // fan_in, outputs + size // fan_in, products + size
    return divided, edges, outputs, products


@functools.lru_cache(64)
def _forward(model, batch, seq):
    return model.flops(1, seq) * batch


def _flops(cfg):
    return 3 * _forward(cfg.model, cfg.data.batch_size, cfg.data.seq_len)


@functools.lru_cache(4096)
def _rate(topology, sizes, axes):
    sizes = dict(sizes)
    places = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
    index = tuple(slice(None) if name in axes else 0 for name in sizes)
    return topology.rate([topology.place(int(i)) for i in places[index].ravel()])


def layouts(cfg, count):
    """Every mesh of `count` devices on which a run of `cfg` would not be refused, as {axis: size}."""
    for data in _divisors(count):
        for fsdp in _divisors(count // data):
            for context in _divisors(count // data // fsdp):
                mesh = dict(zip(sharding.MESH_AXES, (data, fsdp, context, count // data // fsdp // context)))
                tried = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **mesh))
                try:
                    loop.mesh_sizes(tried, count)
                    _weights(cfg.model, mesh["fsdp"], mesh["model"])
                except ValueError:
                    continue
                yield mesh


def _divisors(count):
    return [n for n in range(1, count + 1) if count % n == 0]
