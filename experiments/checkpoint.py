"""Checkpoints that are whole or absent, and that notice damage.

`<workdir>/checkpoints/00000100/` holds Orbax trees `params/`, `rest/` (optimiser state, step, rng) and, with
an average, `ema/`; and `manifest.json`: the size and sha256 of every file beside it, the data position and
fingerprint, the config. All of it is written under a temporary name and renamed, so a killed save leaves
nothing that could be taken for a checkpoint. Restoring verifies the digests first and falls back, loudly, to
the previous step. With several processes each writes its shards into one shared directory, and process 0 does
the rest.
"""

import contextlib
import json
import os
import shutil
import threading
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from experiments import distributed, files, manifest, serialize
from experiments.manifest import Damaged, verify

# Fields that may change between two starts of a run: none of them alters what is learned.
FREE_FIELDS = (
    "log_every",
    "checkpoint",
    "eval",
    "mesh",
    "distributed",
    "sample_prompt",
    "sample_tokens",
    "watchdog",
    "profile",
    "wandb",
)
# Seconds of Orbax's own limit on a save. It reads the clock, which may jump; the limit here is the watchdog's.
LIMIT = 7 * 24 * 3600


class Refused(Exception):
    """The user asked for something that cannot be done; the message is one line."""


class NotSaved(Exception):
    """A checkpoint could not be written; the message is one line."""


class Checkpoints:
    """The checkpoints of a working directory; `settings` is a config.Checkpoint, needed to save."""

    def __init__(self, workdir, settings=None, warn=print):
        self.root = Path(workdir).absolute() / "checkpoints"
        self.settings, self.warn = settings, warn
        self._thread = self._failure = None

    def steps(self):
        """Steps of the complete-looking checkpoints, ascending."""
        if not self.root.is_dir():
            return []
        return sorted(int(p.name) for p in self.root.iterdir() if p.name.isdigit() and p.is_dir())

    def save(self, step, params, rest, meta, metric=None):
        """Writes a checkpoint, then drops those that the settings do not keep; `metric` (lower is better) is
        what keep_best compares.

        With settings.background it returns once the arrays are copied; the next `save` or `wait` raises
        what went wrong. NotSaved: the disk is full or fails, and the checkpoints before it are still there.
        FloatingPointError: a leaf is not finite, and nothing was written.
        """
        trees = _trees(params, rest)
        self.wait()
        bad = manifest.not_finite(trees)
        if bad:
            raise FloatingPointError(f"{bad} is not finite after step {step}: not saved; older checkpoints stay")
        temporary, need = self.root / f"tmp.{step:08d}", sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
        writers = []
        try:
            self._make(temporary)
            for name, tree in trees.items():
                writers.append(ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), timeout_secs=LIMIT))
                writers[-1].save(temporary / name, args=ocp.args.PyTreeSave(tree))
        except (OSError, ValueError) as error:
            self._failure = error
        about = {"step": step, **meta, "metric": metric}
        self._thread = threading.Thread(target=self._finish, args=(writers, temporary, about), name="save")
        self._about = step, need, temporary
        self._thread.start()
        if self._failure or not self.settings.background:
            self.wait()

    def wait(self):
        """Returns when no save is under way; raises NotSaved when the last one failed."""
        if self._thread is None:
            return
        self._thread.join()
        error, self._thread, self._failure = self._failure, None, None
        if error is None:
            return
        step, need, temporary = self._about
        reason = _reason(error)
        with contextlib.suppress(OSError):
            reason += f"; {shutil.disk_usage(self.root).free} bytes are free"
        if distributed.first():
            shutil.rmtree(temporary, ignore_errors=True)
        raise NotSaved(
            f"checkpoint of step {step} ({need} bytes) could not be written to {self.root}: {reason}"
        ) from error

    def _make(self, temporary):
        """Makes the temporary directory; when process 0 cannot, all processes raise."""
        failure = None
        if distributed.first():
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                self.clean()
                temporary.mkdir()
            except OSError as error:
                failure = error
        if distributed.agree(failure is not None):
            raise failure or OSError("process 0 could not make the directory")

    def _finish(self, writers, temporary, about):
        """What follows once the arrays are copied; runs in a thread, which keeps its error for `wait`."""
        actions = [action for writer in writers for action in (writer.wait_until_finished, writer.close)]
        for action in (*actions, lambda: self._publish(temporary, about)):
            try:
                action()
            except Exception as error:  # whatever stopped it, `wait` reports it, once every writer has ended
                self._failure = self._failure or error

    def _publish(self, temporary, about):
        if self._failure or not distributed.first():
            return
        final = self.root / f"{about['step']:08d}"
        files.write_json(temporary / "manifest.json", {**about, "files": manifest.digests(temporary)})
        if final.exists():
            shutil.rmtree(final)
        os.rename(temporary, final)
        manifest.sync(self.root)
        done = [step for step in self.steps() if step <= about["step"]]
        stay = manifest.kept([(step, _metric(self.root / f"{step:08d}")) for step in done], self.settings)
        for old in set(done) - stay:
            shutil.rmtree(self.root / f"{old:08d}", ignore_errors=True)

    def clean(self):
        """Removes what a killed save left behind."""
        for leftover in self.root.glob("tmp.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def restore(self, params, rest=None, *, weights="params", step=None):
        """(step, params, rest, manifest) of the newest checkpoint that verifies (or of `step`), or None when
        there is none at all.

        `params` and `rest` are trees of ShapeDtypeStruct with shardings; rest=None skips the optimiser's
        state; weights="ema" reads the average instead. Raises Refused when checkpoints exist and none
        verifies: a run never starts afresh in silence.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise Refused(f"no checkpoint of step {step} in {self.root}: it holds {steps or 'none'}")
        for found in reversed(steps if step is None else [step]):
            path = self.root / f"{found:08d}"
            try:
                about = _verify_once(path)
                trees = _trees(params, rest)
                loaded = {name: _load(path / (weights if name == "params" else name), trees[name]) for name in trees}
                if rest is not None and "ema" in loaded:
                    loaded["rest"]["ema"] = loaded["ema"]
                return found, loaded["params"], loaded.get("rest"), about
            except Damaged as error:
                then = "" if step is not None or found == steps[0] else "; trying the one before it"
                self.warn(f"warning: checkpoint {path} is damaged ({error}){then}")
                last = error
        if steps:
            raise Refused(f"no checkpoint in {self.root} verifies (last reason: {last}); not starting afresh")
        return None


def _trees(params, rest):
    """{directory: tree} of a state's two parts."""
    trees = {"params": params}
    if rest is not None:
        trees["rest"] = {key: value for key, value in rest.items() if key != "ema"}
        trees |= {"ema": rest["ema"]} if "ema" in rest else {}
    return trees


def _metric(path):
    try:
        return json.loads((path / "manifest.json").read_text())["metric"]
    except (OSError, ValueError, KeyError):
        return None


def _verify_once(path):
    """The manifest of a checkpoint that process 0 verified, for all of them."""
    damage = None
    if distributed.first():
        try:
            verify(path)
        except Damaged as error:
            damage = error
    if distributed.agree(damage is not None):
        raise damage or Damaged("process 0 found it so")
    return json.loads((path / "manifest.json").read_text())


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


def _reason(error):
    return "no space left on the disk" if "No space left" in str(error) else _first_line(error)
