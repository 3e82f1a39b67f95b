"""The optimiser: decoupled AdamW or Muon, driven by what each `Param` says of itself, and the accumulated gradient.

adamw:  update = -lr(step) * lr_scale * (m_hat / (sqrt(v_hat) + eps) + weight_decay * decay * w)
muon:   for matrices m_hat / (sqrt(v_hat) + eps) becomes 0.2 sqrt(max(inputs, outputs)) * orthogonalised(m)

Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101. Liu et al., "Muon is Scalable for
LLM Training", arXiv 2502.16982, whose factor makes AdamW's learning rate and weight decay serve. Weights that are
not trainable have no gradient, no moments and no update. The trees of trainable and of frozen weights have the
shape of the whole one, with None where the other has the leaf.
"""

import math

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from seqmix.core import param


def schedule(optim, steps):
    """The learning rate as a function of the number of updates before (0-based): linear warmup, then a named form.

    cosine, linear: from the peak to end_lr_ratio * peak over the rest of the run. constant: the peak. wsd: constant,
    then linear to end_lr_ratio * peak over the last decay_steps_fraction of the run (Hu et al., arXiv 2404.06395).
    """
    if optim.schedule not in ("cosine", "wsd", "linear", "constant"):
        raise ValueError(f"optim.schedule: expected cosine, wsd, linear or constant, got {optim.schedule!r}")
    peak, low = optim.peak_lr, optim.peak_lr * optim.end_lr_ratio
    warmup = min(optim.warmup, steps)

    def lr(step):
        step = jnp.asarray(step, jnp.float32)
        rising = peak * (step + 1) / max(warmup, 1)
        length = max(steps - warmup, 1) if optim.schedule != "wsd" else max(optim.decay_steps_fraction * steps, 1)
        begin = warmup if optim.schedule != "wsd" else steps - length
        done = jnp.clip((step - begin) / length, 0, 1)
        after = {
            "cosine": low + (peak - low) * 0.5 * (1 + jnp.cos(math.pi * done)),
            "constant": jnp.full_like(done, peak),
        }.get(optim.schedule, peak + (low - peak) * done)
        return jnp.where(step < warmup, rising, after)

    return lr


def split(tree, mask):
    """(trainable, frozen): two trees of the same nesting, None where the leaf belongs to the other."""
    trainable = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree)
    frozen = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree)
    return trainable, frozen


def join(trainable, frozen):
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda x: x is None)


def optimizer(optim, steps, tree):
    """The optax transformation for the trainable part of weights described by `tree` of Params."""
    mask = param.trainable_mask(tree)
    decay, _ = split(param.decay_mask(tree), mask)
    scales, _ = split(param.lr_scales(tree), mask)
    clip = optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity()
    direction = optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps, mu_dtype=jnp.float32)
    return optax.chain(
        clip,
        _muon_or(direction, tree) if optim.kind == "muon" else direction,
        optax.add_decayed_weights(optim.weight_decay, mask=decay),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, scales)),
        optax.scale_by_learning_rate(schedule(optim, steps)),
    )


def matrix(p):
    """The optax MuonDimensionNumbers of a `Param` that is a matrix from inputs to outputs, else None.

    Every dimension of one has a logical name, none of them that of a vocabulary or a table, weight decay applies,
    and its leading dimensions multiply to its fan-in. A leading "layers" counts separate matrices.
    """
    skip = int(p.axes[:1] == ("layers",))
    shape, axes = p.shape[skip:], p.axes[skip:]
    if len(shape) < 2 or not p.decay or None in axes or {"vocab", "table"} & set(axes):
        return None
    for inputs in range(1, len(shape)):
        if math.prod(shape[:inputs]) == (p.fan_in or shape[0]):
            numbers = [tuple(range(skip, skip + inputs)), tuple(range(skip + inputs, skip + len(shape)))]
            return optax.contrib.MuonDimensionNumbers(*numbers)
    return None


def _muon_or(otherwise, tree):
    """Muon's direction for the matrices among trainable weights, `otherwise` for the rest."""
    mask = param.trainable_mask(tree)
    numbers = param.map_params(matrix, tree)
    is_leaf = lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
    label = lambda found: "matrix" if found else "other"
    labels, _ = split(jax.tree.map(label, numbers, is_leaf=is_leaf), mask)
    hide = lambda keep, found: (found or optax.MaskedNode()) if keep else None
    numbers = jax.tree.map(hide, mask, numbers, is_leaf=lambda x: x is None)

    def rms(update, found):
        sides = [math.prod(update.shape[i] for i in axes) for axes in (found.reduction_axis, found.output_axis)]
        return 0.2 * math.sqrt(max(sides)) * update

    muon = optax.chain(
        optax.contrib.scale_by_muon(mu_dtype=jnp.float32, weight_dimension_numbers=lambda _: numbers),
        optax.stateless(lambda updates, _: jax.tree.map(rms, updates, numbers)),
    )
    return optax.partition({"matrix": muon, "other": otherwise}, labels)


def state_shardings(transform, trainable, shardings, replicated):
    """Shardings of the optimiser's state: moments lie as their weights do, counters are replicated.

    `trainable` and `shardings` are the trainable parts of the abstract weights and of their shardings.
    """
    state = jax.eval_shape(transform.init, trainable)
    masked = lambda x: isinstance(x, optax.MaskedNode)  # a weight that this part of the optimiser passes over
    return optax.tree_utils.tree_map_params(
        transform,
        lambda held, sharding: held if masked(held) else sharding,
        state,
        shardings,
        transform_non_params=lambda _: replicated,
        is_leaf=masked,
    )


def accumulated(loss_fn, trainable, batch, rng, count):
    """Gradient of a token-weighted mean over `count` microbatches, by a scan.

    loss_fn(trainable, batch, rng) -> (loss, metrics); metrics hold scalars with "tokens" among them. Returns
    (loss, metrics, gradients in float32); "nll_sum" and "tokens" are summed, other metrics averaged by
    tokens, "update/..." entries come from the last microbatch.
    """
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    if count == 1:
        (loss, metrics), grads = grad_fn(trainable, batch, rng)
        return loss, metrics, grads

    def interleave(x):
        return jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1)

    def body(total, item):
        index, micro = item
        (loss, metrics), grads = grad_fn(trainable, micro, jax.random.fold_in(rng, index))
        weight = metrics["tokens"].astype(jnp.float32)
        updates = {k: v for k, v in metrics.items() if k.startswith("update/")}
        summed = {k: v for k, v in metrics.items() if k not in updates}
        summed = {k: v if k in ("nll_sum", "tokens") else v * weight for k, v in summed.items()}
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * weight, grads)
        total = jax.tree.map(jnp.add, total, (loss * weight, summed, grads))
        return total, updates

    batch = jax.tree.map(interleave, batch)
    first = jax.tree.map(lambda x: x[0], batch)
    shapes = jax.eval_shape(lambda: grad_fn(trainable, first, rng))
    (loss, metrics), grads = shapes
    kept = {k: v for k, v in metrics.items() if not k.startswith("update/")}
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (loss, kept))
    zero = (*zero, jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), grads))
    (loss, metrics, grads), updates = jax.lax.scan(body, zero, (jnp.arange(count), batch))
    tokens = jnp.maximum(metrics["tokens"].astype(jnp.float32), 1.0)
    metrics = {k: v if k in ("nll_sum", "tokens") else v / tokens for k, v in metrics.items()}
    metrics |= {k: v[-1] for k, v in updates.items()}
    return loss / tokens, metrics, jax.tree.map(lambda g: g / tokens, grads)
