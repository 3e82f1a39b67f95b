"""Many runs of one config at once: a task's runs that differ in learning rate and seed are lanes of a vmap.

For models too small to fill an accelerator. Batches are drawn where they are used, a hundred steps are one call,
and the read-out sees the tokens that are asked for alone.
"""

import dataclasses
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import optim, synthetic
from seqmix.core import param

VAL, TEST = synthetic.VAL_SEED, synthetic.VAL_SEED + 1  # streams that choose a learning rate, and that are reported


class Lanes:
    """Runs of a config with a `Synthetic` task, one for each pair of a learning rate and a seed.

    The optimiser is the config's with another peak: AdamW's whole update is proportional to the learning rate. Seed s
    draws its weights from key(s) and its batches from the stream s, the same ones for every learning rate.
    """

    def __init__(self, cfg, rates, seeds, every):
        if cfg.steps % every:
            raise ValueError(f"steps: expected a multiple of {every}, got {cfg.steps}")
        self.cfg, self.model, self.task, self.every = cfg, cfg.model, cfg.data.task, every
        self.lanes = list(itertools.product(rates, seeds))
        self.seeds = jnp.asarray(seeds, jnp.uint32)
        tree = self.model.params()
        self.mask = param.trainable_mask(tree)
        self.transform = optim.optimizer(dataclasses.replace(cfg.optim, peak_lr=1.0), cfg.steps, tree)
        self._step = jax.vmap(self._lane_step)
        self._many = jax.jit(self._steps, donate_argnums=0)
        self._score = jax.jit(self._scores, static_argnums=(1, 2))

    def run(self, report=lambda step, loss, rate: None):
        """Trains all lanes; returns {"loss": [steps / every, lanes], "val", "test": {pairs: [lanes]}, "seconds",
        "compile_seconds"}.

        report(step, lowest loss, steps a second) is called every `every` steps. A lane whose loss is not finite
        stays so, and scores what its weights give.
        """
        begin = time.perf_counter()
        rates = jnp.asarray([rate for rate, _ in self.lanes], jnp.float32)
        which = jnp.arange(len(self.lanes)) % len(self.seeds)
        state = jax.jit(jax.vmap(self._init))(self.seeds[which])
        many = self._many.lower(state, rates, jnp.int32(0)).compile()
        curve, start = [], time.perf_counter()
        for step in range(0, self.cfg.steps, self.every):
            state, losses = many(state, rates, jnp.int32(step))
            curve.append(np.asarray(losses))
            done = step + self.every
            report(done, float(np.nanmin(curve[-1])), done / (time.perf_counter() - start))
        trained = time.perf_counter() - start
        scores = {name: self._accuracies(state[0], seed) for name, seed in (("val", VAL), ("test", TEST))}
        return {"loss": np.stack(curve), "seconds": trained, "compile_seconds": start - begin, **scores}

    def _init(self, seed):
        params = param.materialise(self.model.params(), jax.random.key(seed))
        return params, self.transform.init(optim.split(params, self.mask)[0])

    def _steps(self, state, rates, first):
        """`every` steps of all lanes, and each lane's mean loss over them."""

        def body(state, step):
            rows = self.cfg.data.batch_size
            drawn = jax.vmap(lambda seed: self.task.batch(synthetic.key(seed, step), rows))(self.seeds)
            which = jnp.arange(len(self.lanes)) % len(self.seeds)
            return self._step(state, jax.tree.map(lambda a: a[which], drawn), rates)

        state, losses = jax.lax.scan(body, state, first + jnp.arange(self.every))
        return state, jnp.mean(losses, 0)

    def _lane_step(self, state, batch, rate):
        params, moments = state
        trainable, frozen = optim.split(params, self.mask)
        loss, grads = jax.value_and_grad(lambda t: self._loss(optim.join(t, frozen), batch))(trainable)
        updates, moments = self.transform.update(grads, moments, trainable)
        updates = jax.tree.map(lambda u: rate * u, updates)
        return (optim.join(optax.apply_updates(trainable, updates), frozen), moments), loss

    def _asked(self, params, batch):
        """(logits [n, vocab], targets [n], row [n], aux) of the n times of a batch that have targets."""
        hidden, aux = self.model.forward(params, batch["tokens"])
        rows, turns = self.cfg.data.batch_size, len(self.task.pairs)
        row, time = jnp.nonzero(batch["mask"], size=rows // turns * sum(self.task.pairs))
        return self.model.logits(params, hidden[row, time]), batch["targets"][row, time], row, aux

    def _loss(self, params, batch):
        logits, targets, _, aux = self._asked(params, batch)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.mean(nll) + sum(value for key, value in aux.items() if key.startswith("loss/"))

    def _scores(self, params, seed, batches):
        """Shares of right answers [lanes, turns] over so many batches of a stream."""
        turns = jnp.arange(len(self.task.pairs))

        def one(params, batch):
            logits, targets, row, _ = self._asked(params, batch)
            turn = row % len(self.task.pairs) == turns[:, None]
            return turn @ (jnp.argmax(logits, -1) == targets).astype(jnp.float32), jnp.sum(turn, 1)

        def body(sums, index):
            batch = self.task.batch(synthetic.key(seed, index), self.cfg.data.batch_size)
            return jax.tree.map(jnp.add, sums, jax.vmap(one, (0, None))(params, batch)), None

        zero = jnp.zeros((len(self.lanes), turns.size))
        (right, asked), _ = jax.lax.scan(body, (zero, zero.astype(jnp.int32)), jnp.arange(batches))
        return right / asked

    def _accuracies(self, params, seed):
        share = np.asarray(self._score(params, seed, self.cfg.eval.final_batches or synthetic.VAL_BATCHES))
        return {str(n): share[:, turn].tolist() for turn, n in enumerate(self.task.pairs)}
