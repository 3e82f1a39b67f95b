"""Checkpoints that are whole or absent, and that notice damage.

`<workdir>/checkpoints/00000100/` holds Orbax trees `params/` and `rest/` (optimiser state, step, rng) and
`manifest.json`: the size and sha256 of every file beside it, the data position and fingerprint, the config.
All of it is written under a temporary name and renamed, so a killed save leaves nothing that could be taken
for a checkpoint. Restoring verifies the digests first and falls back, loudly, to the previous step.
"""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import serialize

# Fields that may change between two starts of a run: none of them alters what is learned.
FREE_FIELDS = ("log_every", "checkpoint", "eval", "mesh", "sample_prompt", "sample_tokens")


class Refused(Exception):
    """The user asked for something that cannot be done; the message is one line."""


class NotSaved(Exception):
    """A checkpoint could not be written; the message is one line."""


class Damaged(Exception):
    """A checkpoint is not what its manifest says."""


class Checkpoints:
    """The checkpoints of a working directory, newest last; keeps the last `keep` of them."""

    def __init__(self, workdir, keep=2, warn=print):
        self.root = Path(workdir).absolute() / "checkpoints"
        self.keep, self.warn = max(1, keep), warn

    def steps(self):
        """Steps of the complete-looking checkpoints, ascending."""
        if not self.root.is_dir():
            return []
        return sorted(int(p.name) for p in self.root.iterdir() if p.name.isdigit() and p.is_dir())

    def save(self, step, params, rest, meta):
        """Writes a checkpoint atomically and drops the oldest beyond `keep`; raises NotSaved when the disk is
        full or fails, and then those before it are still there.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        final, temporary = self.root / f"{step:08d}", self.root / f"tmp.{step:08d}"
        self.clean()
        need = sum(leaf.nbytes for leaf in jax.tree.leaves((params, rest)))
        try:
            temporary.mkdir()
            for name, tree in (("params", params), ("rest", rest)):
                with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                    checkpointer.save(temporary / name, args=ocp.args.PyTreeSave(tree))
            manifest = {"step": step, **meta, "files": _digests(temporary)}
            write_json(temporary / "manifest.json", manifest)
        except (OSError, ValueError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = "no space left on the disk" if "No space left" in str(error) else _first_line(error)
            raise NotSaved(
                f"checkpoint of step {step} ({need} bytes) could not be written to {self.root}: {reason}"
            ) from error
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        _sync(self.root)
        for old in [s for s in self.steps() if s <= step][: -self.keep]:
            shutil.rmtree(self.root / f"{old:08d}", ignore_errors=True)

    def clean(self):
        """Removes what a killed save left behind."""
        for leftover in self.root.glob("tmp.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def restore(self, params, rest=None):
        """(step, params, rest, manifest) of the newest checkpoint that verifies, or None when there is none.

        `params` and `rest` are trees of ShapeDtypeStruct with shardings; rest=None skips the optimiser's
        state. Raises Refused when checkpoints exist and none verifies: a run never starts afresh in silence.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.root / f"{step:08d}"
            try:
                manifest = verify(path)
                restored = _load(path / "params", params)
                return step, restored, None if rest is None else _load(path / "rest", rest), manifest
            except Damaged as error:
                then = "" if step == steps[0] else "; trying the one before it"
                self.warn(f"warning: checkpoint {path} is damaged ({error}){then}")
                last = error
        if steps:
            raise Refused(f"no checkpoint in {self.root} verifies (last reason: {last}); not starting afresh")
        return None


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
        if _sha256(file) != digest:
            raise Damaged(f"sha256 of {name} does not match")
    return manifest


def write_json(path, value):
    """Writes JSON atomically and durably."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def lock(workdir):
    """Takes the working directory's lock; keep the returned file open. Raises Refused when another run holds
    it.
    """
    if Path(workdir).exists() and not Path(workdir).is_dir():
        raise Refused(f"workdir {workdir}: expected a directory, got a file")
    try:
        Path(workdir).mkdir(parents=True, exist_ok=True)
        file = open(Path(workdir) / "lock", "a")  # noqa: SIM115
    except OSError as error:
        raise Refused(f"workdir {workdir}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Refused(f"workdir {workdir} is in use by another run") from None
    return file


def check_config(workdir, config):
    """Refuses a working directory that holds another config (fields in FREE_FIELDS may differ; `data` is compared by
    what it holds, see `identity`).
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        return
    try:
        held = json.loads(path.read_text())
    except ValueError:
        raise Refused(f"{path} is not JSON") from None
    found = serialize.difference(held, config, ignore=(*FREE_FIELDS, "data"))
    if found:
        field, old, new = found
        raise Refused(
            f"workdir {workdir} holds another config: {field} is {old!r} there and {new!r} here; give another --workdir"
        )


def load_config(workdir):
    """The Train config saved in a working directory."""
    path = Path(workdir) / "config.json"
    if not path.is_file():
        raise Refused(f"--workdir: expected the directory of a run, found no config.json in {workdir}")
    try:
        config = serialize.from_json(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise Refused(f"{path}: {error}") from None
    if not hasattr(config, "model"):
        raise Refused(f"{path}: expected the config of a run, got {type(config).__name__}")
    return config


def _load(path, abstract):
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(path, args=ocp.args.PyTreeRestore(abstract, restore_args=arguments))
    except (ValueError, KeyError, OSError) as error:
        raise Damaged(_first_line(error)) from error
    for leaf, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        if leaf.shape != expected.shape or np.dtype(leaf.dtype) != np.dtype(expected.dtype):
            raise Damaged(f"a leaf is {leaf.dtype}{leaf.shape}, expected {expected.dtype}{expected.shape}")
    return restored


def _first_line(error):
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _digests(root):
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): [p.stat().st_size, _sha256(p)] for p in files}


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(directory):
    descriptor = os.open(directory, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
