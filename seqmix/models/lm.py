"""A causal language model: a pre-norm residual stack over a period of mixers, scanned over the periods.

    x_0     = table[tokens]
    x'_l    = x_l  + mixer_l(rmsnorm(x_l))
    x_{l+1} = x'_l + W_out (silu(W_gate n) * W_up n),  n = rmsnorm(x'_l)      (where the period has an MLP)
    hidden  = rmsnorm(x_L),  logits = hidden @ table^T

Parameters: {"embedding": {"table"}, "layers": {"0": {...}, "1": {...}, ...}, "final_norm": {"scale"}},
and "head": {"table"} where the embedding is not tied; layers/i holds position i of the period, each weight
stacked over the n_layers / period repeats.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from seqmix.core import param
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.core.sharding import constrain, gathered
from seqmix.models import checks, stack
from seqmix.models.blocks import gated_mlp, merged_aux, mlp_params, scale_out
from seqmix.models.embedding import TABLE, lookup
from seqmix.models.loss import chunked_cross_entropy, unembed
from seqmix.parts.norms import norm_params, rms_norm

CAPTURES = ("block_outputs", "mixer_outputs")


@dataclass(frozen=True, kw_only=True)
class LM:
    """Language model over tokens [B, T]. Raises ValueError when built from what is no causal stack."""

    vocab: int  # token ids are in [0, vocab)
    d_model: int  # width of the residual stream
    n_layers: int  # number of mixers, a multiple of len(mixers)
    mixers: tuple[Mixer, ...]  # the period, repeated; their d_model is filled in
    mlp_hidden: tuple[int, ...] | int = 0  # hidden width of the gated MLP after each mixer; 0: none
    tie_embeddings: bool = True  # read out with the embedding table
    norm_eps: float = 1e-5  # added to the mean square in every norm
    unroll: bool = False  # periods one after another instead of a loop: faster, but the deeper the longer to compile
    remat: str = "none"  # what the backward pass recomputes: none, full (each layer), dots (all but matmul outputs)
    compute_dtype: str = "bfloat16"  # of the residual stream and matmuls; weights are stored in float32
    z_loss: float = 1e-4  # weight of the mean squared log-normaliser
    loss_chunk: int = 512  # tokens of each row whose logits exist at once
    vocab_pad_to: int = 1  # the table's rows are padded to a multiple of it
    scale_residual_init: bool = True  # divide the init of projections named "out" by sqrt(residual branches)

    def __post_init__(self):
        checks.fields(self)

    # Shape of the stack

    @property
    def period(self) -> tuple[Mixer, ...]:
        """The mixers with their width filled in."""
        return tuple(dataclasses.replace(m, d_model=self.d_model) for m in self.mixers)

    @property
    def n_periods(self) -> int:
        return self.n_layers // len(self.mixers)

    @property
    def mlp_widths(self) -> tuple[int, ...]:
        """Hidden width of the MLP at each position of the period."""
        hidden = self.mlp_hidden
        return hidden if isinstance(hidden, tuple) else (hidden,) * len(self.mixers)

    @property
    def table_rows(self) -> int:
        return -(-self.vocab // self.vocab_pad_to) * self.vocab_pad_to

    def params(self) -> dict:
        """Tree of `Param`. Embedding normal(0, 0.02); output projections scaled as in GPT-2 (section 2.3)."""
        table = Param((self.table_rows, self.d_model), ("vocab", "table"), param.normal(0.02))
        layers = {str(i): param.stack(self._layer_params(i), self.n_periods) for i in range(len(self.mixers))}
        tree = {"embedding": {"table": table}, "layers": layers, "final_norm": self._norm_params()}
        return tree if self.tie_embeddings else tree | {"head": {"table": table}}

    def _norm_params(self) -> dict:
        return norm_params((self.d_model,), ("embed",))

    def _norm(self, p, x):
        with jax.named_scope("norm"):
            return rms_norm(x, p["scale"], eps=self.norm_eps)

    def _layer_params(self, i: int) -> dict:
        branches = self.n_periods * (len(self.mixers) + sum(h > 0 for h in self.mlp_widths))
        factor = branches**-0.5 if self.scale_residual_init else 1.0
        width, hidden = self.d_model, self.mlp_widths[i]
        tree = {"mixer_norm": self._norm_params(), "mixer": scale_out(self.period[i].params(), factor)}
        if hidden:
            mlp = mlp_params(width, hidden)
            tree |= {"mlp_norm": self._norm_params(), "mlp": scale_out(mlp, factor)}
        return tree

    # Training and scoring

    def forward(self, params, tokens, *, segment_ids=None, positions=None, rng=None, capture=()):
        """Final normed hidden states [B, T, D] in compute_dtype, and aux, a dict.

        aux holds the mixers' own entries: "loss/..." and logged scalars averaged over the layers giving them,
        "update/layers/<position>/mixer/..." stacked over periods, and "capture/NAME" [n_layers, B, T, D] for
        each NAME in `capture` (block_outputs: the residual stream after a layer; mixer_outputs: what its
        mixer added).
        Raises ValueError for shapes that disagree, weights that are missing and unknown names.
        """
        checks.weights(self, params)
        checks.tokens(tokens, segment_ids, positions)
        for name in capture:
            if name not in CAPTURES:
                raise ValueError(f"capture: expected names among {', '.join(CAPTURES)}, got {name!r}")
        x = self._embed(params, tokens)
        keys = None if rng is None else jax.random.split(rng, self.n_periods)

        def body(carry, xs):
            return self._period_forward(carry, xs, segment_ids, positions, tuple(capture))

        xs = (params["layers"], keys)
        carry = (x, self._initial_shared(body, x, xs))
        unroll = self.n_periods if self.unroll else 1
        wrapped = stack.period(self.remat, body, len(self.mixers), looped=not self.unroll)
        (x, _), (aux, captured) = jax.lax.scan(wrapped, carry, xs, unroll=unroll)
        aux = merged_aux(aux)
        for name, value in captured.items():
            aux[f"capture/{name}"] = value.reshape(self.n_layers, *x.shape)
        return self._norm(params["final_norm"], x), aux

    def _period_forward(self, carry, xs, segment_ids, positions, capture):
        (x, shared), (layers, key) = carry, xs

        def layer(i, carry, xs):
            (x, shared), (p, index) = carry, xs
            mixer, rng = self.period[i], None if key is None else jax.random.fold_in(key, index)
            inputs = {"shared": shared} if "shared" in mixer.takes else {}
            h = self._norm(p["mixer_norm"], x)
            with jax.named_scope("mixer"):
                y, aux = mixer.forward(p["mixer"], h, segment_ids=segment_ids, positions=positions, rng=rng, **inputs)
            aux = dict(aux)
            shared = shared | aux.pop("shared", {})
            x = self._add_mlp(p, x + y.astype(x.dtype))
            values = {"block_outputs": x, "mixer_outputs": y.astype(x.dtype)}
            return (x, shared), (aux, {name: values[name] for name in capture})

        carry, found = (x, shared), []
        for run in self._runs():
            weights = [layers[str(i)] for i in run]
            # What enters the first layer is kept as what enters the period.
            looped = not self.unroll or len(run) > 1
            one = stack.layer(self.remat, partial(layer, run[0]), len(self.mixers), run != [0], looped)
            if len(run) == 1:
                carry, some = one(carry, (weights[0], run[0]))
                found.append(some)
                continue
            stacked = jax.tree.map(lambda *w: jnp.stack(w), *weights)
            carry, some = jax.lax.scan(one, carry, (stacked, jnp.array(run, jnp.int32)))
            found += [jax.tree.map(lambda a, n=n: a[n], some) for n in range(len(run))]
        auxes, seen = zip(*found, strict=True)
        return carry, (auxes, {name: jnp.stack([values[name] for values in seen]) for name in capture})

    def _runs(self) -> list[list[int]]:
        kinds = zip(self.period, self.mlp_widths, strict=True)
        return stack.runs(self.remat, kinds, any("shared" in m.takes for m in self.mixers))

    def _add_mlp(self, p, x):
        if "mlp" in p:
            h = self._norm(p["mlp_norm"], x)
            with jax.named_scope("mlp"):
                x = x + gated_mlp(p["mlp"], h)
        return constrain(x, "batch", "time", None)

    def _initial_shared(self, body, x, xs):
        """Zeros of the shapes that one period writes: within a period, writers come before readers."""
        if not any("shared" in m.takes for m in self.mixers):
            return {}
        first = jax.tree.map(lambda a: a[0], xs)
        (_, shared), _ = jax.eval_shape(body, (x, {}), first)
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shared)

    def logits(self, params, hidden):
        """Float32 logits [..., table rows] of hidden [..., D]; those of padding rows are -1e30."""
        return unembed(hidden, self._readout(params), self.vocab)

    def loss(self, params, tokens, targets, mask, *, segment_ids=None, positions=None, rng=None):
        """Mean over tokens (weights mask [B, T]) of nll + z_loss * lse^2, plus the mixers' "loss/..." terms.

        Returns the scalar and metrics: loss, nll_sum, tokens, z_loss (the weighted term), and aux.
        """
        hidden, aux = self.forward(params, tokens, segment_ids=segment_ids, positions=positions, rng=rng)
        options = {"vocab": self.vocab, "chunk": self.loss_chunk, "z_loss": self.z_loss}
        with jax.named_scope("loss"):
            total, nll_sum, z_sum = chunked_cross_entropy(hidden, self._readout(params), targets, mask, **options)
            count = jnp.sum(mask.astype(nll_sum.dtype))
            mean = 1 / jnp.maximum(count, 1)
            loss = total * mean + sum(v for key, v in aux.items() if key.startswith("loss/"))
        metrics = {"loss": loss, "nll_sum": nll_sum, "tokens": count, "z_loss": self.z_loss * z_sum * mean}
        return loss, aux | metrics

    def _embed(self, params, tokens):
        with jax.named_scope("embedding"):
            return lookup(params["embedding"]["table"], tokens, self.compute_dtype)

    def _readout(self, params):
        table = params["embedding" if self.tie_embeddings else "head"]["table"]
        return gathered(table, TABLE, ("vocab", None))

    # Decoding

    def init_state(self, params, batch: int, max_len: int, dtype=None) -> dict:
        """{"layers": a state per period position, stacked over periods}; dtype None: compute_dtype."""
        checks.weights(self, params)
        dtype = jnp.dtype(self.compute_dtype if dtype is None else dtype)
        for m in self.mixers:
            if not m.decodes:
                raise ValueError(f"mixers: expected mixers that decode, got {type(m).__name__}")
        states = []
        for i, mixer in enumerate(self.period):
            weights = params["layers"][str(i)]["mixer"]
            states.append(jax.vmap(lambda p, m=mixer: m.init_state(p, batch, max_len, dtype))(weights))
        return {"layers": tuple(states)}

    def prefill(self, params, tokens, state, *, segment_ids=None, positions=None):
        """Hidden [B, T, D] of tokens [B, T] after those in `state`, and the new state; segment id 0 pads."""
        checks.weights(self, params)
        checks.tokens(tokens, segment_ids, positions)
        kwargs = {"segment_ids": segment_ids, "positions": positions}
        return self._decode(params, tokens, state, lambda m, *args, **kw: m.prefill(*args, **kwargs, **kw))

    def step(self, params, tokens, state):
        """Hidden [B, 1, D] of one token a row, tokens [B, 1], and the state after it."""
        checks.weights(self, params)
        checks.tokens(tokens)
        if tokens.shape[1] != 1:
            raise ValueError(f"tokens: expected shape (B, 1), got {tokens.shape}")
        return self._decode(params, tokens, state, lambda m, *args, **kw: m.step(*args, **kw))

    def _decode(self, params, tokens, state, advance):
        checks.state(self, state)

        def body(carry, xs):
            (x, shared), (layers, states) = carry, xs
            new = []
            for i, mixer in enumerate(self.period):
                p = layers[str(i)]
                inputs = {"shared": shared} if "shared" in mixer.takes else {}
                y, s = advance(mixer, p["mixer"], self._norm(p["mixer_norm"], x), states[i], **inputs)
                if inputs:
                    shared = shared | s.get("shared", {})
                    s = {key: value for key, value in s.items() if key != "shared"}
                new.append(s)
                x = self._add_mlp(p, x + y.astype(x.dtype))
            return (x, shared), tuple(new)

        x, xs = self._embed(params, tokens), (params["layers"], state["layers"])
        (x, _), states = jax.lax.scan(body, (x, self._initial_shared(body, x, xs)), xs)
        return self._norm(params["final_norm"], x), {"layers": states}

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        """Of a forward pass with logits: mixers, 6 B T D hidden for an MLP, 2 B T D rows for logits."""
        return self._flops(batch, seq, [m.flops(batch, seq) for m in self.period])

    def chunkless_flops(self, batch: int, seq: int) -> float:
        """As `flops`, with the mixers' `chunkless_flops`: what utilisation (MFU) counts, whatever the chunks."""
        return self._flops(batch, seq, [m.chunkless_flops(batch, seq) for m in self.period])

    def _flops(self, batch, seq, mixers):
        layers = sum(mixers) * self.n_periods
        mlps = 6 * batch * seq * self.d_model * sum(self.mlp_widths) * self.n_periods
        return layers + mlps + 2 * batch * seq * self.d_model * self.table_rows

    def count(self) -> int:
        """Number of weights."""
        return param.count(self.params())

    def parts(self) -> dict[str, int]:
        """Number of weights of each kind of part; they sum to `count()`."""
        tree = self.params()
        out = {"embedding": param.count(tree["embedding"])}
        for i, mixer in enumerate(self.mixers):
            name, layer = type(mixer).__name__, tree["layers"][str(i)]
            out[name] = out.get(name, 0) + param.count(layer["mixer"])
            if "mlp" in layer:
                out["mlp"] = out.get("mlp", 0) + param.count(layer["mlp"])
        if "head" in tree:
            out["head"] = param.count(tree["head"])
        return out | {"norms": self.count() - sum(out.values())}
