"""Continues a prompt: `python -m experiments.generate --workdir=DIR --prompt=TEXT [--max-tokens=N] [--seed=N]
...`.

Prefills the prompt, then steps with the decoding state inside one jitted function; text goes to stdout as it
comes. The same seed gives the same text. A mistake prints one line `error: ...` and exits with 2.
"""

import codecs
import functools
import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments import cli

MOST_TOKENS = 2**24  # room for more would be a mistake: a state with a cache is allocated for all of them


def check(*, max_tokens, temperature=1.0, top_k=0, top_p=1.0, greedy=False):
    """Raises ValueError in one line for sampling settings out of range."""
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise ValueError(f"max-tokens: expected 1 to {MOST_TOKENS:,}, got {max_tokens:,}")
    if not (math.isfinite(temperature) and temperature > 0) and not greedy:
        raise ValueError(f"temperature: expected a positive number (or --greedy), got {temperature}")
    if top_k < 0:
        raise ValueError(f"top-k: expected 0 (all) or a positive count, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p: expected a number in (0, 1], got {top_p}")


def choose(logits, key, *, temperature=1.0, top_k=0, top_p=1.0, greedy=False):
    """Token ids [B] from logits [B, V]: the argmax, or a draw from the tempered, truncated softmax.

    top_k keeps the k largest (0: all); top_p keeps the smallest set of most likely tokens whose probabilities
    reach p (Holtzman et al., arXiv 1904.09751).
    """
    logits = logits.astype(jnp.float32)
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    kept = jnp.isfinite(ranked)
    if 0 < top_k < logits.shape[-1]:
        kept &= jnp.arange(logits.shape[-1]) < top_k
    if top_p < 1:
        probs = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
        kept &= jnp.cumsum(probs, axis=-1) - probs < top_p
    drawn = jax.random.categorical(key, jnp.where(kept, ranked, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)


@functools.lru_cache(maxsize=8)
def _compiled(model, vocab, options):
    options = dict(options)

    def pick(params, hidden, key, index):
        logits = model.logits(params, hidden[:, -1])
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, -jnp.inf)
        return choose(logits, jax.random.fold_in(key, index), **options)

    def prefill(params, tokens, state, key):
        hidden, state = model.prefill(params, tokens, state)
        return pick(params, hidden, key, 0), state

    def step(params, token, state, key, index):
        hidden, state = model.step(params, token[:, None], state)
        return pick(params, hidden, key, index), state

    return jax.jit(prefill), jax.jit(step, donate_argnums=2)


def sample(model, params, prompt, *, max_tokens, seed=0, vocab=None, stop=None, on_token=None, **options):
    """Ids that follow `prompt` (a non-empty sequence of ids), at most `max_tokens`, ending before an id
    `stop`.

    `options` are temperature, top_k, top_p and greedy; only ids below `vocab` (default: the model's) are
    drawn. `on_token(id)` is called as each comes. The randomness of token i is fold_in(key(seed), i).
    """
    check(max_tokens=max_tokens, **options)
    vocab = min(vocab or model.vocab, model.vocab)
    tokens = np.asarray(prompt, np.int32)[None]
    if tokens.size == 0 or tokens.min() < 0 or tokens.max() >= model.vocab:
        raise ValueError(f"prompt: expected ids in [0, {model.vocab}), at least one, got {list(prompt)[:8]}")
    prefill, step = _compiled(model, vocab, tuple(sorted(options.items())))
    key = jax.random.key(seed)
    dtype = jnp.dtype(model.compute_dtype)
    state = model.init_state(params, 1, tokens.shape[1] + max_tokens, dtype)
    token, state = prefill(params, tokens, state, key)
    made = []
    while True:
        value = int(token[0])
        if value == stop:
            return made
        made.append(value)
        if on_token:
            on_token(value)
        if len(made) == max_tokens:
            return made
        token, state = step(params, token, state, key, len(made))


class TextStream:
    """Writes token ids to binary streams as text, a character as soon as its last byte is there."""

    def __init__(self, tokenizer, *streams):
        self.tokenizer, self.streams = tokenizer, streams
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, token):
        self._write(self.decoder.decode(token_bytes(self.tokenizer, token)))

    def close(self):
        """Flushes an unfinished character as the replacement character."""
        self._write(self.decoder.decode(b"", final=True))

    def _write(self, text):
        for stream in self.streams:
            stream.write(text.encode("utf-8"))
            stream.flush()


def token_bytes(tokenizer, token):
    """The bytes of one token; specials have none."""
    return tokenizer.decode_bytes([token])


def prompt_ids(tokenizer, text):
    """Ids of a prompt, after the end-of-document id, which opens every document."""
    return [tokenizer.eos, *tokenizer.encode(text)]


def load(workdir, warn):
    """(Train config, weights, averaged if the run averages them) of the newest good checkpoint, on one device."""
    return restore(workdir, warn)[:2]


def restore(workdir, warn, step=None):
    """(Train config, weights, step) of a checkpoint in a working directory, on one device, the averaged weights if the
    run averages them; step None: of the newest good one.
    """
    from experiments import checkpoint, config
    from seqmix.core import param

    cfg = checkpoint.load_config(workdir)
    if isinstance(cfg.data, config.Synthetic):
        raise checkpoint.Refused(f"--workdir: expected a run on text, {workdir} holds one on a task")
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        param.abstract(cfg.model.params()),
    )
    saved = checkpoint.Checkpoints(workdir, warn=warn)
    steps = saved.steps()
    if not steps:
        raise checkpoint.Refused(f"workdir {workdir} has no checkpoint yet")
    if step is not None and step not in steps:
        raise checkpoint.Refused(f"workdir {workdir} has no checkpoint {step}, only {', '.join(map(str, steps))}")
    weights = "ema" if cfg.optim.ema else "params"
    step, params, *_ = saved.restore(abstract, weights=weights, step=step)
    return cfg, params, step


def _arguments(argv):
    parser = cli.Parser(prog="python -m experiments.generate", description="Continue a prompt.")
    parser.add_argument("--workdir", required=True, help="the directory of a run")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--max-tokens", type=int, default=256, help="how many tokens at most")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits, > 0")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k most likely; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the most likely that make up p")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text")
    parser.add_argument("--greedy", action="store_true", help="always the most likely token")
    return parser.parse(argv)


def run(args):
    """Loads, generates and streams."""
    from experiments import tokenizer as tokenizers
    from experiments.progress import say

    options = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "greedy": args.greedy,
    }
    try:
        check(max_tokens=args.max_tokens, **options)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed: expected an integer in [0, 2**31), got {args.seed}")
    cfg, params = load(args.workdir, say)
    tokenizer = tokenizers.load(cfg.data.tokenizer)
    stream = TextStream(tokenizer, sys.stdout.buffer)
    sys.stdout.buffer.write(args.prompt.encode("utf-8", "replace"))
    sample(
        cfg.model,
        params,
        prompt_ids(tokenizer, args.prompt),
        max_tokens=args.max_tokens,
        seed=args.seed,
        vocab=tokenizer.vocab,
        stop=tokenizer.eos,
        on_token=stream,
        **options,
    )
    stream.close()
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()


def main(argv=None):
    """Entry point."""
    from experiments.checkpoint import Refused

    logging.set_verbosity(logging.FATAL)
    try:
        run(_arguments(sys.argv[1:] if argv is None else argv))
    except (ValueError, Refused) as error:
        return cli.refuse(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
