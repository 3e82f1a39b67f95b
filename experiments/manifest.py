"""What a checkpoint's directory must hold: the digests of its files, which values may be saved, which steps stay."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np

from experiments import files


class Damaged(Exception):
    """A checkpoint is not what its manifest says."""


def verify(path):
    """The manifest of a checkpoint whose files all match it; raises Damaged naming one that does not."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        listed = {name: (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Damaged("manifest.json is missing or unreadable") from None
    for name, (size, digest) in listed.items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{name} is missing")
        if file.stat().st_size != size:
            raise Damaged(f"{name} has {file.stat().st_size} bytes, expected {size}")
        if files.sha256(file) != digest:
            raise Damaged(f"sha256 of {name} does not match")
    return manifest


def digests(root):
    """{file below root: [bytes, sha256]}."""
    held = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): [p.stat().st_size, files.sha256(p)] for p in held}


def kept(saves, settings):
    """Which steps of `saves`, (step, metric or None) in ascending order, the settings keep."""
    steps = [step for step, _ in saves]
    stay = set(steps[-settings.keep :])
    if settings.keep_every:
        stay |= {step for step in steps if step % settings.keep_every == 0}
    if settings.keep_best:
        scored = sorted((metric, step) for step, metric in saves if metric is not None and math.isfinite(metric))
        stay |= {step for _, step in scored[: settings.keep_best]}
    return stay


def not_finite(trees):
    """The name of the first leaf with a value that is not finite, or None."""
    leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trees) if _inexact(leaf)]
    for (path, _), finite in zip(leaves, np.asarray(_all_finite([leaf for _, leaf in leaves])), strict=True):
        if not finite:
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def _inexact(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


@jax.jit
def _all_finite(leaves):
    return jnp.array([jnp.isfinite(leaf).all() for leaf in leaves])


def sync(directory):
    """Makes the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
