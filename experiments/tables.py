"""Rows of text in Parquet files and in data sets of the `datasets` library, cut into tasks."""

import functools

from experiments import textfiles
from experiments.textfiles import EXTRA, Bad, Task, encoded, first_line, stamp


def _parquet(path, field):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: a Parquet file {EXTRA}") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: {first_line(error)}") from None
    names = file.schema_arrow.names
    if field not in names:
        raise ValueError(f"{path}: no column {field!r}, only {', '.join(names)[:80]} (--field=NAME chooses)")
    return file


def parquet_tasks(path, field):
    """Tasks of whole row groups of a Parquet file."""
    made, meta = stamp(path), _parquet(path, field).metadata
    tasks, first, size = [], 0, 0
    for group in range(meta.num_row_groups):
        size += meta.row_group(group).total_byte_size
        if size >= textfiles.TASK_BYTES or group == meta.num_row_groups - 1:
            tasks.append(Task("parquet", (made,), first, group + 1, size))
            first, size = group + 1, 0
    return tasks


def read_parquet(task, field):
    """`inputs.documents` of some row groups of a Parquet file."""
    import pyarrow

    path = task.sources[0][0]
    file = _parquet(path, field)
    groups = range(task.start, task.end)
    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    row = sum(file.metadata.row_group(group).num_rows for group in range(task.start))
    done = 0
    try:
        for batch in file.iter_batches(1024, row_groups=groups, columns=[field]):
            for value in batch.column(0).to_pylist():
                done += 1
                yield _row_text(value, field, f"{path}: row {row + done - 1}"), task.size * done // rows
    except (pyarrow.ArrowException, OSError) as error:
        yield Bad(f"{path}: {first_line(error)} (after row {row + done})"), task.size


def _row_text(value, field, where):
    try:
        return encoded(value, field)
    except ValueError as error:
        return Bad(f"{where}: {first_line(error)}")


@functools.lru_cache(maxsize=2)
def _dataset(name, config, split):
    try:
        import datasets
    except ImportError:
        raise ValueError(f"hf:{name}: {EXTRA.replace('data', 'hf')}") from None
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library and what it calls raise of all kinds
        raise ValueError(f"hf:{name}: {type(error).__name__}: {first_line(error)}") from None


def dataset_tasks(name, field, split):
    """Tasks of the rows of `hf:NAME[:CONFIG]`, which `datasets.load_dataset` finds on the hub or in a folder."""
    name, _, config = name.removeprefix("hf:").partition(":")
    data = _dataset(name, config or None, split)
    if field not in data.column_names:
        names = ", ".join(data.column_names)[:80]
        raise ValueError(f"hf:{name}: no column {field!r}, only {names} (--field=NAME chooses)")
    source = ((name, config or None, split, data._fingerprint),)
    count, size = len(data), max(data.info.dataset_size or 0, len(data))
    rows = max(1, count * textfiles.TASK_BYTES // max(size, 1))
    bounds = [*range(0, count, rows), count]
    return [Task("hf", source, a, b, size * (b - a) // count) for a, b in zip(bounds, bounds[1:], strict=False)]


def read_dataset(task, field):
    """`inputs.documents` of some rows of a data set."""
    name, config, split, _ = task.sources[0]
    rows = _dataset(name, config, split).select_columns([field]).select(range(task.start, task.end))
    for index, row in enumerate(rows):
        where = f"hf:{name} ({split}): row {task.start + index}"
        yield _row_text(row[field], field, where), task.size * (index + 1) // len(rows)
