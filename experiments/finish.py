"""The end of a run: evaluation, a table beside what simple compressors reach, a sample, the closing line."""

import io
import sys
from pathlib import Path

from experiments import checkpoint, generate, progress
from experiments import tokenizer as tokenizers


def finish(cfg, workdir, trainer, dataset, params, curves):
    """Evaluates, prints the report on stdout, keeps it in report.json and closes the curves; the last line is
    `val_bits_per_byte=x.xx`, or `accuracy=x.xxx` of a task's hardest rows. That report.json is there says that the
    run is finished.
    """
    with progress.phase("evaluating"):
        result = trainer.evaluate(params, dataset, cfg.eval.final_batches)
    curves.write({"kind": "final", "step": cfg.steps, **result})
    curves.close()
    if dataset.pairs:
        return _answers(cfg, workdir, trainer, dataset, result)
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
    sample = _sample(cfg, params) if cfg.sample_tokens > 0 else None
    _keep(cfg, workdir, trainer, {**result, **stats, "prompt": cfg.sample_prompt, "sample": sample})
    print(f"val_bits_per_byte={bits:.2f}", flush=True)


def _keep(cfg, workdir, trainer, kept):
    """Writes report.json and says where the curves lie."""
    devices = trainer.mesh.devices
    kept = {"step": cfg.steps, **kept, "device": devices.flat[0].device_kind, "devices": devices.size}
    checkpoint.write_json(Path(workdir) / "report.json", kept)
    print(f"curves: {Path(workdir) / 'metrics.jsonl'}, tensorboard --logdir {Path(workdir) / 'tensorboard'}")


def _answers(cfg, workdir, trainer, dataset, result):
    rows = [(f"{n} pairs", f"{result[f'accuracy/{n}']:.3f}") for n in dataset.pairs]
    columns = (f"{cfg.model.count():,} parameters, {cfg.steps} steps", "right answers")
    progress.table(f"{cfg.name}, {result['tokens']:,.0f} questions", columns, rows)
    _keep(cfg, workdir, trainer, result)
    print(f"accuracy={result[f'accuracy/{max(dataset.pairs)}']:.3f}", flush=True)


def _sample(cfg, params):
    """Prints a sample and returns what follows the prompt; None where the model does not decode."""
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
