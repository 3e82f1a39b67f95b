"""The fields of a config as dotted names: which there are, their values read from text, and written into a config."""

import contextlib
import dataclasses
import difflib
import functools
import io
import operator
import types
import typing

import tyro

MARKERS = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)


def leaves(value, path=""):
    """(dotted name, type) of every field of a dataclass, or of one that is yet to be made (a class)."""
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from leaves(item, f"{path}.{index}")
        return
    kind = value if isinstance(value, type) else type(value)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        held = None if value is kind else getattr(value, field.name)
        name = f"{path}.{field.name.replace('_', '-')}".removeprefix(".")
        inner = held if _nested(held) else _structure(hints[field.name])
        if inner is None:
            yield name, hints[field.name]
            continue
        yield from leaves(inner, name)
        if type(None) in _members(hints[field.name]):
            yield name, type(None)


def _structure(annotation):
    """The dataclass among the types that a field allows, if there is one."""
    return next((member for member in _members(annotation) if dataclasses.is_dataclass(member)), None)


def _nested(value):
    return dataclasses.is_dataclass(value) or (
        isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value)
    )


def unknown(flag, known, also=()):
    """What to say of a flag that is none of the `known`, nor of the others, `also`."""
    inside = [name for name in known if name.startswith(f"{flag}.")]
    if inside:
        return f"--{flag}: expected one of its fields, such as --{inside[0]}"
    last = lambda name: name.rsplit(".", 1)[-1]
    alike = lambda a, b: difflib.SequenceMatcher(None, a, b).ratio()
    nearest = max([*known, *also], key=lambda name: alike(flag, name) + alike(last(flag), last(name)))
    return f"--{flag}: unknown field, did you mean --{nearest}?"


def read(flag, text, annotation):
    """The value that tyro reads from `text` for a field of this type."""
    members = sorted(_members(annotation), key=_is_tuple)  # 5 is an int before it is a tuple of one
    word = {"true": bool, "false": bool, "none": type(None)}.get(text.lower())
    words = [text.capitalize() if word in members else text]
    if any(_is_tuple(member) for member in members):
        words = text.strip("()[] ").replace(",", " ").split()
    form = dataclasses.make_dataclass("Flag", [("value", functools.reduce(operator.or_, members))])
    arguments = [f"--value={words[0]}"] if len(words) == 1 else ["--value", *words]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(form, args=arguments, console_outputs=False, config=MARKERS).value
    except SystemExit:
        raise ValueError(f"--{flag}: expected {_describe(annotation)}, got {text!r}") from None


def _members(annotation):
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _is_tuple(member):
    return typing.get_origin(member) is tuple


def _describe(annotation):
    return " or ".join(_describe_one(member) for member in sorted(_members(annotation), key=_is_tuple))


def _describe_one(member):
    words = {int: "an integer", float: "a float", str: "text", bool: "True or False", type(None): "None"}
    if _is_tuple(member):
        return "integers joined by commas" if int in typing.get_args(member) else "values joined by commas"
    if typing.get_origin(member) is typing.Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(member))
    return words.get(member, getattr(member, "__name__", str(member)))


def replace(value, changes, path="", kind=None):
    """The config with {path: value} written into it, all changes of one object at once; where there is no
    object, a new one of class `kind`.
    """
    groups = {}
    for (head, *rest), new in changes.items():
        groups.setdefault(head, {})[tuple(rest)] = new
    below = lambda head, held, kind=None: (
        groups[head][()] if () in groups[head] else replace(held, groups[head], f"{path}{head}.", kind)
    )
    if isinstance(value, tuple):
        items = {str(index): item for index, item in enumerate(value)}
        return tuple(below(index, item) if index in groups else item for index, item in items.items())
    hints = typing.get_type_hints(kind if value is None else type(value))
    new = {head: below(head, getattr(value, head, None), _structure(hints[head])) for head in groups}
    where = path.rstrip(".")
    if value is None:
        needed = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory]
        missing = [name for name in needed if name not in new]
        if missing:
            raise ValueError(f"{where}: expected {' and '.join(missing)} too")
    try:
        return kind(**new) if value is None else dataclasses.replace(value, **new)
    except ValueError as error:
        message = str(error)
        prefix = "" if message.startswith(where) else f"{where}: "
        raise ValueError(prefix + message) from None
