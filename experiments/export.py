"""Weights of a run as one safetensors file: `python -m experiments.export --workdir=RUN --out=FILE.safetensors
[--step=N] [--weights=params|ema]`.

Names are paths ("layers/0/mixer/out"), dtypes are kept; the file's metadata holds "step", "weights" and "config"
(JSON). The newest checkpoint that verifies is taken, or that of --step. Needs `pip install safetensors`. A mistake
prints one line `error: ...` and exits with 2.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import jax
from absl import logging

from experiments import checkpoint, serialize
from seqmix.core import param


def read(workdir, step=None, weights="params"):
    """(Train config, step, tree of weights) of a run's checkpoint, on one device; raises Refused in one line."""
    cfg = checkpoint.load_config(workdir)
    if weights == "ema" and not cfg.optim.ema:
        raise checkpoint.Refused(f"--weights: the run in {workdir} keeps no average (optim.ema is 0)")
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    abstract = jax.tree.map(like, param.abstract(cfg.model.params()))
    saved = checkpoint.Checkpoints(workdir, warn=lambda text: print(text, file=sys.stderr))
    restored = saved.restore(abstract, weights=weights, step=step)
    if restored is None:
        raise checkpoint.Refused(f"workdir {workdir} has no checkpoint yet")
    return cfg, restored[0], restored[1]


def write(out, tree, metadata):
    """The file, written under a temporary name first; `metadata` maps text to text."""
    try:
        from safetensors.flax import save_file
    except ImportError:
        raise checkpoint.Refused("expected the package safetensors, not installed: pip install safetensors") from None
    out = Path(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    try:
        save_file({param.path_name(path): leaf for path, leaf in leaves}, str(temporary), metadata=metadata)
        os.replace(temporary, out)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError) and "SafetensorError" not in type(error).__name__:
            raise
        raise checkpoint.Refused(f"--out: {out} cannot be written: {error}") from None


def main(argv=None):
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m experiments.export", description=__doc__, allow_abbrev=False)
    parser.error = _usage
    parser.add_argument("--workdir", required=True, help="the directory of a run")
    parser.add_argument("--out", required=True, help="the file to write")
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the newest that verifies")
    parser.add_argument("--weights", choices=("params", "ema"), default="params", help="as trained, or their average")
    logging.set_verbosity(logging.FATAL)
    try:
        args = parser.parse_args(argv)
        cfg, step, tree = read(args.workdir, args.step, args.weights)
        about = {"step": str(step), "weights": args.weights, "config": json.dumps(serialize.to_json(cfg))}
        write(args.out, tree, about)
    except (ValueError, checkpoint.Refused) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    size = Path(args.out).stat().st_size
    print(f"{args.out}: {len(jax.tree.leaves(tree))} arrays, {size} bytes, step {step}")
    return 0


def _usage(message):
    raise ValueError(message.removeprefix("argument "))


if __name__ == "__main__":
    sys.exit(main())
