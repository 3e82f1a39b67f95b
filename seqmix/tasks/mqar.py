"""Multi-query associative recall: bind keys to values, later say the value of each key that comes again.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927,
section 3 and appendix E; the distribution of gaps and the token ranges are those of the released generator
(HazyResearch/zoology, data/multiquery_ar.py), read and not copied.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from seqmix.core.shapes import dims


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """A row of T tokens with n pairs: k_1 v_1 ... k_n v_n, then slots of two tokens of which n begin with a key.

    Keys are distinct ids of [1, vocab / 2), values distinct ids of [vocab / 2, vocab). Each key comes once more, at
    time 2 n + 2 g for a slot g (0-based); slots are drawn without replacement with weights proportional to
    (g + 1)^(power - 1), so short gaps are likelier. The target at that time is the key's value, all other
    times have mask 0. The remaining times hold random ids of [0, vocab), or 0 without `noise`.

    Raises ValueError when built from sizes that do not fit.
    """

    vocab: int = 8192  # token ids are in [0, vocab), even
    seq_len: int = 128  # T, even
    pairs: tuple[int, ...] = (8, 32)  # n; the rows of a batch take turns through these
    power: float = 0.01  # how fast the weights of later slots fall, > 0; 1: all alike
    noise: bool = True  # random ids where no pair and no query is

    def __post_init__(self):
        for name in ("vocab", "seq_len"):
            value = getattr(self, name)
            if value < 4 or value % 2:
                raise ValueError(f"{name}: expected an even number of at least 4, got {value}")
        most = min(self.seq_len // 4, self.vocab // 2 - 1)
        if not self.pairs or not all(1 <= n <= most for n in self.pairs):
            raise ValueError(f"pairs: expected numbers in [1, {most}] for {self.seq_len} tokens, got {self.pairs}")
        if not self.power > 0:
            raise ValueError(f"power: expected a positive number, got {self.power}")

    @property
    def queries(self) -> int:
        """The most targets that a row has."""
        return max(self.pairs)

    def batch(self, key, rows: int) -> dict:
        """Rows of the task: {"tokens", "targets" int32, "mask" float32}, each [rows, T]; row i has
        pairs[i % len(pairs)] pairs. A function of `key` (a JAX key) alone.
        """
        counts = jnp.asarray(self.pairs, jnp.int32)[jnp.arange(rows) % len(self.pairs)]
        return jax.vmap(self._row)(jax.random.split(key, rows), counts)

    def _row(self, key, n):
        """One row with n (traced) pairs: all are drawn for the most pairs, those beyond n are left out."""
        k_keys, k_values, k_slots, k_noise = jax.random.split(key, 4)
        most, half = self.queries, self.vocab // 2
        keys = 1 + _distinct(k_keys, jnp.zeros(half - 1), most)
        values = half + _distinct(k_values, jnp.zeros(half), most)
        slot = jnp.arange(self.seq_len // 2)
        logits = (self.power - 1) * jnp.log(slot + 1.0)
        slots = _distinct(k_slots, jnp.where(slot < self.seq_len // 2 - n, logits, -jnp.inf), most)
        index = jnp.arange(most)
        drop = lambda place: jnp.where(index < n, place, self.seq_len)  # beyond the row: not written
        query = drop(2 * n + 2 * slots)
        tokens = jnp.zeros(self.seq_len, jnp.int32)
        if self.noise:
            tokens = jax.random.randint(k_noise, (self.seq_len,), 0, self.vocab, jnp.int32)
        for place, ids in ((drop(2 * index), keys), (drop(2 * index + 1), values), (query, keys)):
            tokens = tokens.at[place].set(ids, mode="drop")
        targets = jnp.zeros(self.seq_len, jnp.int32).at[query].set(values, mode="drop")
        mask = jnp.zeros(self.seq_len, jnp.float32).at[query].set(1.0, mode="drop")
        return {"tokens": tokens, "targets": targets, "mask": mask}


def hits(predicted, targets, mask):
    """(number right, number asked) over the times where mask is 1; predicted and targets int [B, T], mask [B, T]."""
    dims({"predicted": "B T", "targets": "B T", "mask": "B T"}, predicted=predicted, targets=targets, mask=mask)
    return jnp.sum((predicted == targets) * mask), jnp.sum(mask)


def _distinct(key, logits, count):
    """`count` indices drawn without replacement with probabilities softmax(logits), by Gumbel noise."""
    return jax.lax.top_k(logits + jax.random.gumbel(key, logits.shape), count)[1].astype(jnp.int32)
