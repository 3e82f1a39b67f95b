"""Small corpora for the tests of the runner: written in several formats, prepared, read back."""

import json
import random

import numpy as np

from experiments import prepare, shards, tokenizer
from experiments.config import Data

WORDS = ["the", "state", "of", "a", "mixer", "that", "forgets", "and", "remembers", "w\u00f6rld", "\u65e5\u672c"]


def texts(count=40, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(1, 30))) for _ in range(count)]


def write_jsonl(path, documents, pack=lambda content: content):
    path.write_bytes(pack("".join(json.dumps({"text": text, "id": 7}) + "\n" for text in documents).encode()))
    return path


def write_texts(folder, documents):
    folder.mkdir(parents=True)
    for index, text in enumerate(documents):
        (folder / f"{index:04d}.txt").write_text(text)
    return folder


def made(out, *sources, flags=(), workers=1):
    """The documents of a folder prepared from these sources."""
    code = prepare.main([*map(str, sources), f"--out={out}", f"--workers={workers}", *flags])
    assert code == 0
    return read(out)


def read(out):
    held = shards.Prepared(out)
    file = held.manifest["tokenizer"]["file"]
    ids = tokenizer.load(str(out / file) if file else "bytes")
    places = (np.arange(start, start + count) for start, count in zip(held.starts, held.lengths, strict=True))
    found = [ids.decode_bytes(held.read(place)) for place in places]
    assert [len(text) for text in found] == held.sizes.tolist()
    return [text.decode() for text in found]


def refused(capsys, code, *args):
    """The one line of a command that ends with `code`."""
    assert prepare.main(list(map(str, args))) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def documents(count=60, length=200, seed=0, letters="abcdefgh \n"):
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=draw.randrange(1, length))) for _ in range(count)]


def prepared(folder, texts, *flags):
    folder.mkdir(parents=True)
    source = folder / "x.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert prepare.main([str(source), f"--out={folder / 'out'}", "--workers=1", *flags]) == 0
    return folder / "out"


def small(path=None, **changes):
    return Data(path=str(path) if path else None, **{"seq_len": 16, "batch_size": 4, "val_fraction": 0.2} | changes)
