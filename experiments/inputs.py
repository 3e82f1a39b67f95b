"""Documents of text from inputs: files of text, JSONL or Parquet, folders of them, data sets of the hub.

`plan` cuts inputs into tasks without reading them through; `documents` reads one task. The tasks depend on the
inputs alone, so whoever reads them, in whatever number of processes, gets the same documents in the same order.
"""

import os
from pathlib import Path

from experiments import tables, textfiles

TASK_FILES = 4096


def walk(root, skip=()):
    """The files under a folder, without hidden ones and without the folders named in `skip`."""
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if name not in skip and not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # no pipes, sockets or dangling links


def plan(inputs, field="text", split="train"):
    """The tasks of inputs: files, folders (all files below, by name), or `hf:NAME[:CONFIG]`.

    By their suffixes .jsonl and .ndjson hold a JSON object a line and .parquet holds rows, with the text in
    `field`; any other file is a document. .gz and .zst are unpacked. Raises ValueError in one line for an
    input that does not exist or that cannot be opened.
    """
    tasks, texts = [], []
    for name in inputs:
        if name.startswith("hf:"):
            tasks += [*_texts(texts), *tables.dataset_tasks(name, field, split)]
            continue
        for path in _files(name):
            kind = _kind(path)
            if kind == "text":
                texts.append(path)
            else:
                tasks += [*_texts(texts), *CUT[kind](path, field)]
    return tasks + _texts(texts)


def documents(task, field="text"):
    """(document, position) of a task: the bytes of each document in UTF-8, and how much of `task.size` is
    done. In place of one that holds no text comes a `Bad` error, not raised.
    """
    return READ[task.kind](task, field)


def _files(name):
    path = Path(name)
    if path.is_dir():
        return sorted(walk(path), key=lambda file: file.relative_to(path).as_posix())
    if path.is_file():
        return [path]
    if path.exists():
        raise ValueError(f"{name}: expected a file or a folder")
    hint = f" (a data set of the Hugging Face hub is written hf:{name})" if name.count("/") < 2 else ""
    raise ValueError(f"{name}: no such file or directory{hint}")


def _kind(path):
    suffixes = [suffix for suffix in path.suffixes if suffix not in textfiles.PACKED]
    last = suffixes[-1].lower() if suffixes else ""
    return "jsonl" if last in (".jsonl", ".ndjson") else "parquet" if last == ".parquet" else "text"


def _texts(paths):
    """Tasks of the files of text gathered so far, which are then forgotten."""
    tasks, group, size = [], [], 0
    for stamp in map(textfiles.stamp, paths):
        if group and (size + stamp[1] > textfiles.TASK_BYTES or len(group) == TASK_FILES):
            tasks.append(textfiles.Task("text", tuple(group), size=size))
            group, size = [], 0
        group.append(stamp)
        size += stamp[1]
    paths.clear()
    return tasks + ([textfiles.Task("text", tuple(group), size=size)] if group else [])


READ = {
    "text": textfiles.read_texts,
    "jsonl": textfiles.read_jsonl,
    "parquet": tables.read_parquet,
    "hf": tables.read_dataset,
}
CUT = {"jsonl": textfiles.jsonl_tasks, "parquet": tables.parquet_tasks}
