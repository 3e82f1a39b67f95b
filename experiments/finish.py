"""The end of a run: evaluation, a table beside what simple compressors reach, a sample, the closing line."""

import io
import sys

from experiments import distributed, files, generate, progress
from experiments import tokenizer as tokenizers


def finish(run, weights, starts):
    """Evaluates, prints the report on stdout, keeps it in report.json and closes the curves; the last line is
    `val_bits_per_byte=x.xx`, or `accuracy=x.xxx` of a task's hardest rows. That report.json is there says that the
    run is finished.

    `run` is the `experiments.train.Run`; `starts`: (how often it was started, how many steps were made twice).
    """
    cfg, clock = run.cfg, run.clock
    with progress.phase("evaluating"), clock.on("eval"):
        result = run.trainer.evaluate(weights, run.dataset, cfg.eval.final_batches, run.watchdog.beat)
    run.watchdog.close()
    kept = {**result, "goodput": clock.goodput(), "starts": starts[0]}
    run.curves.write({"kind": "final", "step": cfg.steps, **kept})
    run.curves.close()
    if not distributed.first():
        return
    kept |= _answers(run, result) if run.dataset.pairs else _text(run, result)
    progress.table(f"Time of this start; goodput {clock.goodput():.1%}", ("part", "seconds", "share"), clock.rows())
    print(f"starts: {starts[0]}, steps made again after a stop: {starts[1]}")
    if cfg.sample_tokens > 0 and not run.dataset.pairs:
        kept |= {"prompt": cfg.sample_prompt, "sample": _sample(cfg, weights)}
    devices = run.trainer.mesh.devices
    kept = {"step": cfg.steps, **kept, "device": devices.flat[0].device_kind, "devices": devices.size}
    files.write_json(run.workdir / "report.json", kept)
    print(f"curves: {run.workdir / 'metrics.jsonl'}, tensorboard --logdir {run.workdir / 'tensorboard'}")
    if run.dataset.pairs:
        print(f"accuracy={result[f'accuracy/{max(run.dataset.pairs)}']:.3f}", flush=True)
    else:
        print(f"val_bits_per_byte={result['bits_per_byte']:.2f}", flush=True)


def _text(run, result):
    """Prints the bits per byte beside what simple compressors reach, and returns those."""
    with progress.phase("measuring the text"):
        stats = run.dataset.stats()
    rows = [
        (
            f"{run.cfg.name}: {run.cfg.model.count():,} parameters, {run.cfg.steps} steps",
            f"{result['bits_per_byte']:.2f}",
        ),
        ("unigram entropy of the whole corpus", f"{stats['unigram_entropy']:.2f}"),
        ("gzip -9 of the validation text", f"{stats['gzip_bits']:.2f}"),
        ("xz -9 of the validation text", f"{stats['xz_bits']:.2f}"),
    ]
    tokens = f"{result['tokens']:,.0f} validation tokens"
    progress.table(f"Bits per byte, {tokens}", ("model", "bits/byte"), rows)
    return stats


def _answers(run, result):
    """Prints a task's accuracies."""
    rows = [(f"{n} pairs", f"{result[f'accuracy/{n}']:.3f}") for n in run.dataset.pairs]
    columns = (f"{run.cfg.model.count():,} parameters, {run.cfg.steps} steps", "right answers")
    progress.table(f"{run.cfg.name}, {result['tokens']:,.0f} questions", columns, rows)
    return {}


def _sample(cfg, params):
    """Prints a sample and returns what follows the prompt; None where there is none."""
    if distributed.several():
        print("sample: none with several processes; python -m experiments.generate reads the checkpoint")
        return None
    if not all(mixer.causal and mixer.decodes for mixer in cfg.model.mixers):
        print("sample: none, a mixer of this model does not decode")
        return None
    tokenizer = tokenizers.load(cfg.data.tokenizer)
    prompt = generate.prompt_ids(tokenizer, cfg.sample_prompt)
    print(f"sample after {cfg.sample_prompt!r}:", flush=True)
    made = io.BytesIO()
    stream = generate.TextStream(tokenizer, sys.stdout.buffer, made)
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
    return made.getvalue().decode()
