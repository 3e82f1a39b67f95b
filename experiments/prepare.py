"""Turns text into shards of tokens: `python -m experiments.prepare INPUT... --out=DIR [--tokenizer=...]`.

An input is a file or a folder (text, .jsonl, .parquet; .gz and .zst are unpacked) or hf:NAME[:CONFIG]. Shards are
made in parallel, each whole or not at all; the folder is complete once it has a manifest. The same command goes
on after a kill, and does nothing when all is done. The shards do not depend on the number of workers.

Exit codes: 0 done; 1 a worker was killed or the disk is full; 2 a mistake in the command or its inputs (one line
`error: ...`); 75 stopped by Ctrl-C. After 1 and 75 the same command goes on.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shlex
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from experiments import bpe, cli, encode, files, inputs, progress, shards
from experiments import tokenizer as tokenizers

STOPPED = 75
SAME = "finished shards are kept, the same command goes on"


def prepare(args, command):
    """Makes the folder or goes on with it; returns the manifest."""
    out = Path(args.out)
    for name in args.inputs:
        if out.resolve().is_relative_to(Path(name).resolve()):
            raise ValueError(f"--out: expected a folder outside of the input {name}, got {out}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {out}")
    if out.is_dir() and not shards.is_prepared(out) and any(path.name != "lock" for path in out.iterdir()):
        raise ValueError(f"--out: expected a new or empty folder, {out} holds other files")
    tasks = inputs.plan(args.inputs, args.field, args.split)
    if not tasks:
        raise ValueError(f"{' '.join(args.inputs)}: no files there")
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out):
        spec = str(out / "tokenizer.json") if args.train_bpe or args.tokenizer != "bytes" else "bytes"
        wanted = ["bpe", args.train_bpe] if args.train_bpe else tokenizers.load(args.tokenizer).fingerprint
        request = files.json_digest([wanted, args.field, [dataclasses.astuple(task) for task in tasks]])
        if (out / shards.MANIFEST).exists():
            return _finished(out, request)
        state = {"command": command, "request": request}
        _tokenizer(args, out, tasks, state)
        made = tokenizers.load(spec)
        job = encode.Job(args.out, spec, made.fingerprint, args.field, args.skip_bad)
        entries = encode.make_all(tasks, job, args.workers)
        return _complete(out, args, job, made, entries, request)


def _finished(out, request):
    manifest = shards.manifest(out)
    if manifest["request"] != request:
        raise ValueError(
            f"--out: {out} holds text that was prepared from other inputs (or they changed) or with other "
            "settings; give another --out, or remove it"
        )
    progress.say(f"{out} is complete already")
    return manifest


def _tokenizer(args, out, tasks, state):
    """Writes DIR/tokenizer.json where there is one, and DIR/prepare.json."""
    held = {}
    with contextlib.suppress(OSError, ValueError):
        held = json.loads((out / shards.UNFINISHED).read_text())
    kept = held.get("request") == state["request"] and (out / "tokenizer.json").exists()
    if not args.train_bpe and args.tokenizer != "bytes":
        content = Path(args.tokenizer).read_bytes()
        files.replace(out / "tokenizer.json", content)
    files.write_json(out / shards.UNFINISHED, state | {"request": None if args.train_bpe else state["request"]})
    if args.train_bpe:
        if not kept:
            with progress.phase(f"training a tokenizer of {args.train_bpe:,} tokens"):
                content = bpe.train(tasks, args.field, args.train_bpe, args.skip_bad)
            files.replace(out / "tokenizer.json", content)
        files.write_json(out / shards.UNFINISHED, state)  # which says that the tokenizer is made


def _complete(out, args, job, tokenizer, entries, request):
    """Writes the manifest, then removes what only a preparation needs."""
    total = {name: sum(e[name] for e in entries) for name in ("documents", "tokens", "bytes", "empty", "bad")}
    if not total["tokens"]:
        raise ValueError(
            f"{' '.join(args.inputs)}: no text there ({total['empty']} empty, {total['bad']} bad documents)"
        )
    dtype = np.dtype(np.uint16 if tokenizer.vocab <= 2**16 else np.uint32).name
    kept = ("key", "empty", "bad", "examples", "byte_counts")
    parts = [{name: value for name, value in entry.items() if name not in kept} for entry in entries]
    manifest = {
        "format": shards.FORMAT,
        **total,
        "digest": shards.digest(tokenizer.fingerprint, dtype, parts),
        "tokenizer": {
            "file": None if job.tokenizer == "bytes" else "tokenizer.json",
            "fingerprint": tokenizer.fingerprint,
            "vocab": tokenizer.vocab,
            "eos": tokenizer.eos,
        },
        "source": {"inputs": args.inputs, "field": args.field, "split": args.split},
        "left_out": [example for entry in entries for example in entry["examples"]][:20],
        "byte_counts": np.sum([entry["byte_counts"] for entry in entries], axis=0).tolist(),
        "dtype": dtype,
        "block": shards.BLOCK,
        "request": request,
        "shards": parts,
    }
    files.write_json(out / shards.MANIFEST, manifest)
    names = {f"shard-{number:05d}" for number in range(len(entries))}
    for path in [*out.glob("shard-*.json"), *out.glob("*.tmp"), out / shards.UNFINISHED]:
        path.unlink(missing_ok=True)
    for path in out.glob("shard-*"):
        if path.stem not in names:  # of an earlier, unfinished preparation from other inputs
            path.unlink()
    return manifest


@contextlib.contextmanager
def _lock(out):
    with open(out / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"--out: {out} is being prepared by another process") from None
        yield


def _arguments(argv):
    parser = cli.Parser(prog="python -m experiments.prepare", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a file, a folder, or hf:NAME[:CONFIG]")
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or a JSON file of the `tokenizers` library")
    vocab = "train a byte-level BPE of so many tokens on the inputs instead, into DIR/tokenizer.json; 0: don't"
    parser.add_argument("--train-bpe", type=int, default=0, metavar="VOCAB", help=vocab)
    parser.add_argument("--field", default="text", help="where JSON lines, Parquet and data sets have the text")
    parser.add_argument("--split", default="train", help="of an hf: data set")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out and count what is no text, instead of refusing"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    args = parser.parse(argv)
    if args.workers < 1:
        raise ValueError(f"--workers: expected at least 1, got {args.workers}")
    if args.train_bpe and not bpe.LEAST <= args.train_bpe <= bpe.MOST:
        raise ValueError(f"--train-bpe: expected {bpe.LEAST} to {bpe.MOST:,}, got {args.train_bpe}")
    if args.train_bpe and args.tokenizer != "bytes":
        raise ValueError("--train-bpe: expected no --tokenizer beside it")
    return args


DESCRIPTION = "\n".join(__doc__.split("\n\n")[:2])
EPILOG = (
    "Train on the folder with --data.path=DIR; if it is not of bytes, with --data.tokenizer=DIR/tokenizer.json and a "
    "--model.vocab that holds its ids."
)


def _report(out, manifest, asked):
    """What was made, on stdout, and a tokenizer smaller than `asked`; the last line is `tokens=<int>`."""
    count = lambda name: f"{manifest[name]:,}"
    print(f"{out}: {count('documents')} documents, {count('bytes')} bytes, {count('tokens')} tokens")
    if manifest["empty"] or manifest["bad"]:
        print(f"left out: {count('empty')} empty, {count('bad')} bad documents")
        for line in manifest["left_out"]:
            print(f"  {line}")
    file, vocab = manifest["tokenizer"]["file"], manifest["tokenizer"]["vocab"]
    if asked and vocab < asked:
        print(f"the tokenizer has {vocab:,} tokens, not the {asked:,} asked for: the text has no more pairs to join")
    own = f" --data.tokenizer={out}/{file} --model.vocab={vocab}" if file else ""
    print(f"train on it: --data.path={out}{own}")
    print(f"tokens={manifest['tokens']}", flush=True)


def main(argv=None):
    """Entry point."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _arguments(argv)
        manifest = prepare(args, shlex.join(["python", "-m", "experiments.prepare", *argv]))
    except ValueError as error:
        return cli.refuse(str(error).replace("data.tokenizer:", "--tokenizer:"))
    except BrokenProcessPool:
        return cli.refuse(f"a worker process was killed (out of memory?); {SAME}", 1)
    except (NotADirectoryError, PermissionError) as error:
        return cli.refuse(str(error))
    except (OSError, RuntimeError) as error:
        return cli.refuse(f"{error}; {SAME}", 1)
    except KeyboardInterrupt:
        print(f"stopped; {SAME}", file=sys.stderr)
        return STOPPED
    _report(args.out, manifest, args.train_bpe)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    sys.exit(main())
