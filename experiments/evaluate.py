"""Scores a run: `python -m experiments.evaluate --workdir=RUN [--data=PATH] [--lengths=256,512,1024]`.

Loss and bits per byte on the run's validation text, or on all of a prepared folder or of a text, by how much
context a token had, with rows of any length that the mixers can take. Writes JSON, and a figure (PNG and SVG)
where matplotlib is installed. A mistake prints one line `error: ...` and exits with 2.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from absl import logging

from experiments import checkpoint, cli, config, data, files, generate, progress, scoring, sources
from experiments import tokenizer as tokenizers

FINE = 4  # points for each doubling of the context, in the JSON and the figure
MOST = 2**24


def evaluate(args):
    """Scores and writes; returns the report."""
    workdir, step = _checkpoint(args)
    cfg, params, step = generate.restore(workdir, progress.say, step)
    if not isinstance(cfg.data, config.Data):
        raise ValueError(f"--workdir: expected a run on text, {workdir} holds one on a task")
    packs = all(mixer.packable for mixer in cfg.model.period)
    rows = args.rows or cfg.data.rows
    packed = packs if rows == "auto" else rows == "packed"
    if packed and not packs:
        raise ValueError("--rows: a mixer of this model cannot pack, expected windows, got packed")
    lengths = args.lengths or [cfg.data.seq_len]
    scorer = scoring.Scorer(cfg.model, params, packed)
    align = math.lcm(*(mixer.align for mixer in cfg.model.period))
    for length in lengths:
        if length % align:
            raise ValueError(f"--lengths: expected multiples of {align}, as the mixers need, got {length}")
        scorer.check(length)
    tokenizer = tokenizers.load(cfg.data.tokenizer)
    with progress.phase("reading the data"):
        parts = _parts(args, cfg, tokenizer)
    data.check_vocab(parts, tokenizer, cfg.model.vocab, cfg.data.tokenizer)
    if not args.data:
        _warn_changed(workdir, parts)
    results = []
    for part in parts:
        which = part.val if not args.data else np.ones(len(part.counts), bool)
        stream = part.stream(which, tokenizer.eos, align if packed else 1)
        per_token = part.sizes[which].sum() / stream.lengths.sum()
        for length in lengths:
            batch = args.batch_size or max(1, cfg.data.batch_size * cfg.data.seq_len // length)
            sums, counts = scorer.score(stream, length, batch, args.batches)
            results.append(_result(part, length, sums, counts, per_token))
    return {
        "workdir": str(workdir),
        "name": cfg.name,
        "step": step,
        "data": args.data or "validation",
        "trained_length": cfg.data.seq_len,
        "rows": "packed" if packed else "windows",
        "results": results,
    }


def _result(part, length, sums, counts, per_token):
    if not counts.sum():
        raise ValueError(f"--data: no text in {part.label}")
    loss = float(sums.sum() / counts.sum())
    return {
        "source": part.label,
        "digest": part.digest,
        "length": length,
        "loss": loss,
        "bits_per_byte": loss / math.log(2) / float(per_token),
        "tokens": int(counts.sum()),
        "by_context": scoring.by_context(sums, counts, FINE),
        "table": scoring.by_context(sums, counts),
    }


def _checkpoint(args):
    """(workdir, step or None): of a run, or of one of its checkpoints/STEP folders."""
    path = Path(args.workdir)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parents[1], int(path.name)
    return path, args.step


def _parts(args, cfg, tokenizer):
    """The sources to score: what --data names, in whole, or those of the run."""
    if args.data:
        return [sources.load(args.data, tokenizer, cfg.data.tokenizer, None, flag="--data")]
    return data.load_sources(cfg.data, tokenizer)[0]


def _warn_changed(workdir, parts):
    """Says when the run's own data is no longer what it was trained on."""
    path = Path(workdir) / "data.json"
    held = json.loads(path.read_text()).get("sources") if path.exists() else None
    if held and [source[1] for source in held] != [part.digest for part in parts]:
        progress.say("warning: the data is not what the run was trained on, so it may have seen this text")


def show(report):
    """Prints the tables."""
    results = report["results"]
    title = f"{report['name']}, step {report['step']}, on {report['data']}, {report['rows']}"
    rows = [
        (r["source"], f"{r['length']}", f"{r['loss']:.4f}", f"{r['bits_per_byte']:.4f}", f"{r['tokens']:,}")
        for r in results
    ]
    progress.table(title, ("source", "length", "loss", "bits/byte", "tokens"), rows)
    for source in dict.fromkeys(r["source"] for r in results):
        here = [r for r in results if r["source"] == source]
        _show_contexts(source, here)


def _show_contexts(source, results):
    """The loss by context, a column for each length."""
    cells, tokens = {}, {}
    for result in results:
        for entry in result["table"]:
            first, last = entry["context"]
            cells.setdefault(first, {})[result["length"]] = f"{entry['loss']:.4f}"
            tokens[first] = max(tokens.get(first, (0, 0, 0)), (result["length"], last, entry["tokens"]))
    rows = []
    for first in sorted(cells):
        _, last, count = tokens[first]
        name = f"{first}" if first == last else f"{first} to {last}"
        rows.append((name, *(cells[first].get(result["length"], "") for result in results), f"{count:,}"))
    columns = ("tokens before", *(f"rows of {result['length']}" for result in results), "tokens, longest rows")
    progress.table(f"Loss by context, {source}", columns, rows)


def draw(report, path):
    """Writes PATH.png and PATH.svg; returns them, or nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        progress.say("no figure: pip install '.[report]'")
        return []
    lengths = sorted({r["length"] for r in report["results"]})
    labels = list(dict.fromkeys(r["source"] for r in report["results"]))
    many = len(lengths) > 1
    figure = Figure(figsize=(9 if many else 5, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if many else 1, squeeze=False)[0]
    for result in report["results"]:
        points = [(math.sqrt(a * b), entry["loss"]) for entry in result["by_context"] for a, b in [entry["context"]]]
        name = f"rows of {result['length']}" + (f", {result['source']}" if len(labels) > 1 else "")
        axes[0].plot(*zip(*points, strict=True), marker=".", label=name)
    axes[0].set(
        xscale="log", xlabel="tokens before", ylabel="loss, nats a token", title=f"{report['name']}: by context"
    )
    axes[0].legend(fontsize="small")
    if many:
        for label in labels:
            here = [r for r in report["results"] if r["source"] == label]
            axes[1].plot([r["length"] for r in here], [r["bits_per_byte"] for r in here], marker="o", label=label)
        axes[1].set(xscale="log", xlabel="tokens of a row", ylabel="bits per byte", title="by length")
        axes[1].set_xticks(lengths, [str(length) for length in lengths], minor=False)
        axes[1].minorticks_off()
    for axis in axes:
        axis.axvline(report["trained_length"], color="gray", linestyle=":", linewidth=1)
        axis.grid(alpha=0.3)
    made = [path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg")]
    for file in made:
        figure.savefig(file, dpi=160)
    return made


def _arguments(argv):
    description = "\n".join(__doc__.split("\n\n")[0:2])
    parser = cli.Parser(prog="python -m experiments.evaluate", description=description)
    parser.add_argument("--workdir", required=True, help="the directory of a run, or of one of its checkpoints")
    parser.add_argument("--step", type=int, help="which checkpoint; without it, the newest")
    help = "a prepared folder, a text file or a folder of them, scored in whole; without it, the run's validation text"
    parser.add_argument("--data", help=help)
    help = "tokens of a row, joined by commas; more than in training extrapolates. Without it, the trained length"
    parser.add_argument("--lengths", metavar="N,N,...", help=help)
    help = "packed: documents are kept apart; windows: those of a row see each other. Without it, as trained"
    parser.add_argument("--rows", choices=("packed", "windows"), help=help)
    parser.add_argument("--batch-size", type=int, help="rows at once; without it, as many tokens as in training")
    parser.add_argument("--batches", type=int, default=0, help="score so many batches, a fixed random sample; 0: all")
    parser.add_argument("--out", help="path of the JSON; without it, RUN/evaluate/STEP-DATA.json")
    args = parser.parse(argv)
    args.lengths = _lengths(args.lengths) if args.lengths else None
    for name, least in (("step", 0), ("batch_size", 1), ("batches", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    return args


def _lengths(text):
    words = text.split(",")
    if not all(word.isdecimal() and 2 <= int(word) <= MOST for word in words):
        raise ValueError(f"--lengths: expected integers from 2 to {MOST:,} joined by commas, got {text!r}")
    return sorted({int(word) for word in words})


def main(argv=None):
    """Entry point; the last line of stdout is `bits_per_byte=x.xxxx`, of the shortest rows of the first source."""
    logging.set_verbosity(logging.FATAL)
    try:
        args = _arguments(sys.argv[1:] if argv is None else argv)
        report = evaluate(args)
        label = Path(args.data).stem if args.data else "validation"
        path = Path(args.out or Path(report["workdir"]) / "evaluate" / f"{report['step']:08d}-{label}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, report)
    except (ValueError, checkpoint.Refused, OSError) as error:
        return cli.refuse(error)
    except KeyboardInterrupt:
        return 130
    show(report)
    made = [path, *draw(report, path.with_suffix(""))]
    print("written: " + ", ".join(map(str, made)))
    print(f"bits_per_byte={report['results'][0]['bits_per_byte']:.4f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
