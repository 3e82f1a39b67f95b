"""What the loop of `experiments.train` is made of: the mesh, the state's layout, the jitted train and eval
steps.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from experiments import distributed, gpu_options, optim, spikes
from seqmix.core import flops, param, sharding


def mesh_sizes(cfg, devices):
    """Sizes of the mesh axes of a run on so many devices; an axis of -1 takes what the others leave.

    Raises ValueError when they do not fit, or when the run's batches cannot be divided over them.
    """
    sizes = {name: getattr(cfg.mesh, name) for name in sharding.MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for name in [name for name, size in sizes.items() if size == -1]:
        if devices % fixed:
            raise ValueError(f"mesh.{name}: {devices} devices cannot be divided by the other axes' {fixed}")
        sizes[name] = devices // fixed
    if math.prod(sizes.values()) > devices:
        raise ValueError(f"mesh: expected at most {devices} devices, got {sizes}")
    rows, ways = cfg.data.batch_size // cfg.optim.accumulate, sizes["data"] * sizes["fsdp"]
    if rows % ways:
        raise ValueError(f"data.batch_size: expected a multiple of data x fsdp = {ways} per microbatch, got {rows}")
    if cfg.data.seq_len % sizes["context"]:
        raise ValueError(f"data.seq_len: expected a multiple of context = {sizes['context']}, got {cfg.data.seq_len}")
    for mixer in cfg.model.mixers if sizes["context"] > 1 else ():
        if mixer.context_form == "none":
            name = type(mixer).__name__
            raise ValueError(
                f"mesh.context: expected 1, as {name} has no form for time that is cut, got {sizes['context']}"
            )
    return sizes


def make_mesh(cfg):
    """The device mesh of a run."""
    sizes = mesh_sizes(cfg, jax.device_count())
    return sharding.make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])


class Trainer:
    """The state's abstract form and shardings, and the compiled functions over it.

    State: {"params", "opt_state", "step" int32, "rng" key data}, with optim.ema "ema" (averaged weights), with
    optim.spike_sigma "spikes" {"losses" [spike_window], "seen", "skipped"}. The randomness of a step is
    fold_in(rng, step).
    """

    def __init__(self, cfg, mesh):
        self.cfg, self.mesh, self.model = cfg, mesh, cfg.model
        self.tree = self.model.params()
        self.packs = all(mixer.packable for mixer in self.model.period)
        self.mask = param.trainable_mask(self.tree)
        self.transform = optim.optimizer(cfg.optim, cfg.steps, self.tree)
        self.lr = optim.schedule(cfg.optim, cfg.steps)
        self.shardings = self._shardings()
        abstract = jax.tree.map(_with_sharding, jax.eval_shape(self._init), self.shardings)
        self.params = abstract["params"]
        self.rest = {key: value for key, value in abstract.items() if key != "params"}
        batch, seq = cfg.data.batch_size, cfg.data.seq_len
        self.flops_per_step = 3 * self.model.flops(batch, seq)
        self.chunkless_flops = 3 * self.model.chunkless_flops(batch, seq)  # of which MFU is
        peak = flops.peak_flops(mesh.devices.flat[0].device_kind)
        self.peak = peak * mesh.devices.size if peak else None
        self._eval = None
        self._try_model()

    def _try_model(self):
        """Traces the loss, without compiling: what a mixer or an op refuses comes up before anything is written."""
        batch = self.abstract_batch(self.cfg.data.batch_size // self.cfg.optim.accumulate)
        with sharding.use_mesh(self.mesh):
            jax.eval_shape(self._loss, self.params, batch)

    def abstract_batch(self, rows=None):
        """The abstract form of what `put` gives, of `rows` rows (None: of a step's) in one process."""
        shape = (rows or self.cfg.data.batch_size, self.cfg.data.seq_len)
        where = self._laid(shape)
        kinds = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"mask": jnp.float32}
        return {name: jax.ShapeDtypeStruct(shape, kind, sharding=where) for name, kind in kinds.items()}

    def init(self):
        """The state before step 0, made in place on the mesh."""
        with sharding.use_mesh(self.mesh):
            if self.mesh.devices.size == 1:  # op by op: one program of all weights takes longer to compile
                return jax.device_put(self._init(), self.shardings)
            return self.compile_init()()

    def compile_init(self):
        """() -> the state before step 0, compiled."""
        with sharding.use_mesh(self.mesh):
            return jax.jit(self._init, out_shardings=self.shardings).lower().compile()

    @property
    def share(self):
        """(h, n): of a batch this process reads the h-th of n equal runs of rows."""
        data = self.cfg.data
        return distributed.share(self._laid((data.batch_size, data.seq_len)), (data.batch_size, data.seq_len))

    def _laid(self, shape):
        return NamedSharding(self.mesh, sharding.spec(("batch", "time"), shape, self.mesh))

    def put(self, batch, stopping=False, share=(0, 1)):
        """A batch of the host on the mesh, rows over the data axes, time over the context axis; `share`: the batch is
        the h-th of n runs of rows, this process's own."""

        def place(x):
            return distributed.place(x, self._laid((x.shape[0] * share[1], *x.shape[1:])), share)

        placed = {key: place(value) for key, value in batch.items() if key != "documents"}
        if distributed.several():  # each device says whether its process was asked to stop; the step adds them up
            flags = np.full(self.mesh.devices.size, stopping, np.int32)
            placed["stop"] = distributed.place(flags, NamedSharding(self.mesh, PartitionSpec(sharding.MESH_AXES)))
        return placed

    def compile_step(self, state, batch):
        """(state, batch) -> (state, metrics), compiled; the state is donated."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        step = jax.jit(self._step, donate_argnums=0, out_shardings=(self.shardings, replicated))
        with sharding.use_mesh(self.mesh):
            return gpu_options.compiled(step.lower(state, batch), self.mesh)

    def evaluate(self, params, dataset, batches, beat=lambda: None):
        """Means over so many validation batches (0: all): {"loss", "tokens"} with "bits_per_byte" for text, with
        "accuracy/<pairs>" for each kind of row of a task; `beat` is called after each.
        """
        if self._eval is None:
            sums = self._answers if dataset.pairs else self._nll
            self._eval = jax.jit(sums, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        total = 0
        share = self.share
        for batch in dataset.val_batches(batches, *share):
            with sharding.use_mesh(self.mesh):
                total = total + np.array(self._eval(params, self.put(batch, share=share)), np.float64)
            beat()
        loss = float(total[0] / total[1])
        result = {"loss": loss, "tokens": float(total[1])}
        if not dataset.pairs:
            return result | {"bits_per_byte": loss / math.log(2) / dataset.bytes_per_token}
        shares = total[2:].reshape(2, -1)
        return result | {f"accuracy/{n}": float(a) for n, a in zip(dataset.pairs, shares[0] / shares[1], strict=True)}

    def _init(self):
        key = jax.random.key(self.cfg.seed)
        params = param.materialise(self.tree, key)
        trainable, _ = optim.split(params, self.mask)
        state = {
            "params": params,
            "opt_state": self.transform.init(trainable),
            "step": jnp.zeros((), jnp.int32),
            "rng": jax.random.key_data(jax.random.fold_in(key, 1)),
        }
        if self.cfg.optim.ema:
            state["ema"] = jax.tree.map(jnp.copy, params)
        if self.cfg.optim.spike_sigma:
            state["spikes"] = spikes.init(self.cfg.optim)
        return state

    def _shardings(self):
        replicated = NamedSharding(self.mesh, PartitionSpec())
        params = param.shardings(self.tree, self.mesh)
        trainable, _ = optim.split(param.abstract(self.tree), self.mask)
        laid, _ = optim.split(params, self.mask)
        moments = optim.state_shardings(self.transform, trainable, laid, replicated)
        laid = {"params": params, "opt_state": moments, "step": replicated, "rng": replicated}
        if self.cfg.optim.ema:
            laid["ema"] = params
        if self.cfg.optim.spike_sigma:
            laid["spikes"] = jax.tree.map(lambda _: replicated, spikes.init(self.cfg.optim))
        return laid

    def _step(self, state, batch):
        batch = dict(batch)
        stop = batch.pop("stop", None)
        trainable, frozen = optim.split(state["params"], self.mask)
        rng = jax.random.fold_in(jax.random.wrap_key_data(state["rng"]), state["step"])

        def loss_fn(trainable, batch, rng):
            return self._loss(optim.join(trainable, frozen), batch, rng)

        loss, metrics, grads = optim.accumulated(loss_fn, trainable, batch, rng, self.cfg.optim.accumulate)
        with jax.named_scope("gradient_norm"):
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        scalars = {k: v for k, v in metrics.items() if jnp.ndim(v) == 0 and not k.startswith("update/")}
        scalars |= {"loss": loss, "grad_norm": norm, "lr": self.lr(state["step"])}
        keep = jnp.isfinite(loss) & jnp.isfinite(norm)
        rest = {"step": state["step"] + 1, "rng": state["rng"]}
        if "spikes" in state:
            spiked, rest["spikes"] = spikes.judge(state["spikes"], loss, self.cfg.optim.spike_sigma)
            keep &= ~spiked
            scalars["skipped"] = rest["spikes"]["skipped"]
            scalars["lr"] = self.lr(state["step"] - state["spikes"]["skipped"])
        if stop is not None:
            scalars["stop"] = jnp.sum(stop)
        with jax.named_scope("optimiser"):
            updates, moments = self.transform.update(grads, state["opt_state"], trainable)
            params = _write(optim.join(optax.apply_updates(trainable, updates), frozen), metrics)
            new = {"params": params, "opt_state": moments}
            if "ema" in state:
                new["ema"] = jax.tree.map(self._average, state["ema"], params, self.mask)
            new = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, {key: state[key] for key in new})
        return new | rest, scalars

    def _average(self, mean, weight, trained):
        decay = self.cfg.optim.ema
        return (decay * mean + (1 - decay) * weight).astype(weight.dtype) if trained else weight

    def _loss(self, params, batch, rng=None):
        where = self._where(batch)
        return self.model.loss(params, batch["tokens"], batch["targets"], batch["mask"], rng=rng, **where)

    def _where(self, batch):
        return {key: batch[key] for key in ("segment_ids", "positions")} if self.packs else {}

    def _nll(self, params, batch):
        _, metrics = self._loss(params, batch)
        return metrics["nll_sum"], metrics["tokens"]

    def _answers(self, params, batch):
        """(nll, tokens, right answers and questions for each number of pairs), flat; rows take turns."""
        hidden, _ = self.model.forward(params, batch["tokens"], **self._where(batch))
        right = (jnp.argmax(self.model.logits(params, hidden), -1) == batch["targets"]) * batch["mask"]
        turns = len(self.cfg.data.task.pairs)
        count = lambda x: jnp.sum(x.reshape(-1, turns, x.shape[-1]), (0, 2))
        return (*self._nll(params, batch), *count(right), *count(batch["mask"]))


def _with_sharding(leaf, where):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _write(params, metrics):
    """Writes `update/a/b/c` metrics over the weights at params[a][b][c], not trained by gradient."""
    updates = {key.removeprefix("update/"): value for key, value in metrics.items() if key.startswith("update/")}

    def place(path, leaf):
        name = "/".join(str(getattr(entry, "key", entry)) for entry in path)
        return updates[name].astype(leaf.dtype) if name in updates else leaf

    return jax.tree_util.tree_map_with_path(place, params) if updates else params
