"""The loss of a language model token by token, gathered by how much context each token had."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from experiments import progress, sources
from experiments.rows import Rows


@functools.partial(jax.jit, static_argnames=("model", "packs"))
def token_nll(model, params, batch, packs):
    """-log p of each target, [B, T] float32, of a batch as `rows` describes; logits exist for `model.loss_chunk`
    tokens of each row at a time. Segments and positions are passed on if the model `packs`.
    """
    where = {name: batch[name] for name in ("segment_ids", "positions")} if packs else {}
    hidden, _ = model.forward(params, batch["tokens"], **where)
    rows, time, _ = hidden.shape
    count = -(-time // model.loss_chunk)
    pad = -time % count

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(rows, count, -1, *x.shape[2:]), 1, 0)

    def chunk(given):
        logits = model.logits(params, given[0])
        picked = jnp.take_along_axis(logits, given[1][..., None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked).astype(jnp.float32)

    nll = jax.lax.map(chunk, (split(hidden), split(batch["targets"])))
    return jnp.moveaxis(nll, 0, 1).reshape(rows, -1)[:, :time]


class Scorer:
    """Scores streams with one model; `packed` rows keep documents apart."""

    def __init__(self, model, params, packed):
        self.model, self.params, self.packed = model, params, packed
        self._nll = functools.partial(token_nll, model, packs=all(mixer.packable for mixer in model.period))

    def check(self, length):
        """Raises ValueError for rows of a length that a mixer refuses; nothing is compiled."""
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), ids)
        try:
            jax.eval_shape(self._nll, self.params, batch)
        except ValueError as error:
            raise ValueError(f"--lengths: rows of {length} tokens: {error}") from None

    def score(self, stream, length, rows, batches=0):
        """(sums, counts), float64 [length]: of the nll and of the tokens at each place of a segment, over `batches`
        batches of `rows` rows (0: all), a fixed random sample.
        """
        count = -(-stream.size // (length * rows)) * rows
        data = Rows(stream, length, count, packed=self.packed).shuffle(seed=sources.VAL_SEED).batch(rows)
        total = min(batches, len(data)) if batches else len(data)
        sums, counts = np.zeros(length), np.zeros(length)
        shown = progress.Work(f"rows of {length}", "tokens", total * rows * length)
        for index in range(total):
            batch = data[index]
            nll = np.asarray(self._nll(self.params, batch), np.float64)
            place, mask = batch["positions"].ravel(), batch["mask"].ravel()
            sums += np.bincount(place, weights=nll.ravel() * mask, minlength=length)
            counts += np.bincount(place, weights=mask, minlength=length)
            shown.update((index + 1) * rows * length, last=index == total - 1)
        return sums, counts


def by_context(sums, counts, octave=1):
    """[{"context": [a, b], "loss", "tokens"}]: the mean loss where a to b tokens came before, the end-of-document
    that opens a segment among them; `octave` entries for each doubling, those without a token left out.
    """
    length, found, first = len(sums), [], 1
    for step in range(math.ceil(octave * math.log2(length)) + 1):
        last = min(round(2 ** (step / octave)), length)
        here = slice(first - 1, last)
        tokens = counts[here].sum()
        if tokens:
            loss = float(sums[here].sum() / tokens)
            found.append({"context": [first, last], "loss": loss, "tokens": int(tokens)})
        first = last + 1
    return found
