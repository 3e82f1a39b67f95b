"""Frozen dataclass configs as JSON and back, and where two of them differ.

A dataclass becomes `{"__class__": "module:Class", field: value, ...}`, a tuple becomes a list (and comes back
as a tuple, since frozen configs hold nothing else), a dtype becomes `{"__dtype__": "bfloat16"}`.
"""

import dataclasses
import importlib
import json

import numpy as np


def to_json(value):
    """The plain JSON form of a config; raises ValueError for a value that has none."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"__class__": f"{cls.__module__}:{cls.__qualname__}", **fields}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    try:
        return {"__dtype__": np.dtype(value).name}
    except TypeError:
        raise ValueError(f"config: expected plain values and dataclasses, got {type(value).__name__}") from None


def essence(value):
    """`to_json` without the fields that are at their defaults: a field that comes later does not change it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        usual = {f.name: _default(f) for f in dataclasses.fields(value)}
        kept = {name: essence(item) for name, item in given.items() if not _same(item, usual[name])}
        return {"__class__": to_json(value)["__class__"], **kept}
    return [essence(item) for item in value] if isinstance(value, (tuple, list)) else to_json(value)


def _default(field):
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _same(a, b):
    return type(a) is type(b) and bool(a == b)


def from_json(value):
    """The inverse of `to_json`; unknown fields and classes raise ValueError naming them."""
    if isinstance(value, list):
        return tuple(from_json(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "__dtype__" in value:
        return np.dtype(value["__dtype__"])
    if "__class__" not in value:
        return {key: from_json(item) for key, item in value.items()}
    cls = _locate(value["__class__"])
    known = {f.name for f in dataclasses.fields(cls)}
    extra = sorted(set(value) - known - {"__class__"})
    if extra:
        raise ValueError(f"config: {value['__class__']} has no field {extra[0]!r}; it was saved by another version")
    return cls(**{key: from_json(item) for key, item in value.items() if key != "__class__"})


def load(path):
    """The `Train` config in a JSON file. Raises ValueError in one line, as for the flag --config."""
    from experiments.config import Train

    try:
        cfg = from_json(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--config: {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(cfg, Train):
        raise ValueError(f"--config: {path}: expected the config of a run, got {type(cfg).__name__}")
    return cfg


def difference(old, new, ignore=()):
    """The first dotted path at which two JSON forms differ, as (path, old, new); None when they agree.

    Paths that start with an entry of `ignore` are not compared.
    """
    left, right = dict(flatten(old)), dict(flatten(new))
    for path in [*left, *(p for p in right if p not in left)]:
        if any(path == entry or path.startswith(entry + ".") for entry in ignore):
            continue
        if left.get(path, "absent") != right.get(path, "absent"):
            return path, left.get(path, "absent"), right.get(path, "absent")
    return None


def flatten(value, path=""):
    """(dotted path, value) of every leaf of a JSON form; `length` of a list and `class` of a dataclass are leaves."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = ((str(index), item) for index, item in enumerate(value))
        yield f"{path}.length".lstrip("."), len(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from flatten(item, f"{path}.{'class' if key == '__class__' else key}".lstrip("."))


def _locate(name):
    module, _, qualname = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        raise ValueError(f"config: class {name!r} cannot be imported") from None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise ValueError(f"config: {name!r} is not a dataclass")
    return found
