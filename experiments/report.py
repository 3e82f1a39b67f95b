"""The end of a run: evaluation, a table beside what simple compressors reach, a sample, the closing line."""

import sys
from pathlib import Path

from experiments import distributed, generate, progress
from experiments import tokenizer as tokenizers


def finish(cfg, workdir, trainer, dataset, params, curves, clock, starts, watchdog):
    """Evaluates, prints the report on stdout and closes the curves; the last line is
    `val_bits_per_byte=x.xx`. `starts`: (how often the run was started, how many steps were made twice).
    """
    with progress.phase("evaluating"), clock.on("eval"):
        result = trainer.evaluate(params, dataset, cfg.eval.final_batches, watchdog.beat)
    watchdog.close()
    curves.write({"kind": "final", "step": cfg.steps, **result, "goodput": clock.goodput(), "starts": starts[0]})
    curves.close()
    if not distributed.first():
        return
    with progress.phase("measuring the text"):
        stats = dataset.stats()
    bits = result["bits_per_byte"]
    rows = [
        (f"{cfg.name}: {cfg.model.count():,} parameters, {cfg.steps} steps", f"{bits:.2f}"),
        ("unigram entropy of the whole corpus", f"{stats['unigram_entropy']:.2f}"),
        ("gzip -9 of the validation text", f"{stats['gzip_bits']:.2f}"),
        ("xz -9 of the validation text", f"{stats['xz_bits']:.2f}"),
    ]
    tokens = f"{result['tokens']:,.0f} validation tokens"
    progress.table(f"Bits per byte, {tokens}", ("model", "bits/byte"), rows)
    progress.table(f"Time of this start; goodput {clock.goodput():.1%}", ("part", "seconds", "share"), clock.rows())
    print(f"starts: {starts[0]}, steps made again after a stop: {starts[1]}")
    if cfg.sample_tokens > 0:
        _sample(cfg, params)
    print(f"curves: {Path(workdir) / 'metrics.jsonl'}, tensorboard --logdir {Path(workdir) / 'tensorboard'}")
    print(f"val_bits_per_byte={bits:.2f}", flush=True)


def _sample(cfg, params):
    if distributed.several():
        print("sample: none with several processes; python -m experiments.generate reads the checkpoint")
        return
    if not all(mixer.causal and mixer.decodes for mixer in cfg.model.mixers):
        print("sample: none, a mixer of this model does not decode")
        return
    tokenizer = tokenizers.load(cfg.data.tokenizer)
    prompt = generate.prompt_ids(tokenizer, cfg.sample_prompt)
    print(f"sample after {cfg.sample_prompt!r}:", flush=True)
    stream = generate.TextStream(tokenizer, sys.stdout.buffer)
    sys.stdout.buffer.write(cfg.sample_prompt.encode())
    generate.sample(
        cfg.model,
        params,
        prompt,
        max_tokens=cfg.sample_tokens,
        seed=cfg.seed,
        vocab=tokenizer.vocab,
        stop=tokenizer.eos,
        on_token=stream,
        temperature=0.8,
        top_p=0.95,
    )
    stream.close()
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
