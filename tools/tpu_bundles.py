"""How many instruction bundles a grid step of each TPU kernel takes: a speed figure without the chip.

    python -m tools.tpu_bundles [--chips=v5e,v5p,v6e] [--cases=NAME,...] [--tile=128,4] [--write]

Each case is compiled ahead of time by libtpu, which dumps the bundles of its kernels. A TPU core issues one bundle a
cycle, so their count is the time of a grid step but for waits on memory, which it does not see. `bundles` are those
of the loop over grid steps, each counted once, `inner` those of a loop inside it (the scan's over 16 tokens); then
how often each unit is used, and how often registers are filled and spilled. --write keeps the counts of all cases and
chips in docs/benchmarks/tpu_bundles.json, to which tests/pallas_kernels/test_tpu_compiled.py holds the kernels.

It needs libtpu in its Python. It was written with libtpu 0.0.48.1 and jax 0.11.2; another libtpu counts differently.
"""

import argparse
import glob
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax

from tools import needs, tpu_cases

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# No question to a cloud's metadata, no lock against other processes, no TPU looked for.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
ROOT = pathlib.Path(__file__).parents[1]
KEPT = ROOT / "docs" / "benchmarks" / "tpu_bundles.json"
TABLE = re.compile(r"\d+(?: +\d+){9,}")


def compile_cases(chip, names, tile, folder):
    """Compiles the named cases in this process, which loads libtpu, and prints what it dumps of their kernels."""
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    counts = {}
    for name in names:
        function, arguments = tpu_cases.cases(tile)[name]
        put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        jax.jit(function).lower(*jax.tree.map(put, arguments)).compile()
        counts |= {f"{name} {kernel}": numbers for kernel, numbers in read(folder).items()}
        for path in folder.iterdir():
            path.unlink()
    print(json.dumps(counts))


def count(chip, names, tile="", python=sys.executable):
    """{"case kernel": its numbers} of the named cases on a chip, compiled in a process of their own by `python`."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        env = os.environ | ENVIRONMENT | {"LIBTPU_INIT_ARGS": flags}
        options = [f"--compile={chip}", f"--folder={folder}", f"--cases={','.join(names)}", f"--tile={tile}"]
        command = [python, "-m", "tools.tpu_bundles", *options]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"{chip} {names}: {done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def read(folder):
    """The counts of every Pallas kernel whose dump lies in a folder."""
    found = {}
    for path in sorted(folder.glob("*final_bundles.txt")):
        kernel = re.search(r"((?:linear_attention|linear_scan|block_sparse_attention)_\w+)", path.name)
        if kernel is None or "schedule-analysis" in path.name:
            continue
        stem = path.name.split("-final_bundles")[0]
        prefix = glob.escape(stem.rsplit("-", 1)[0])
        (use,) = folder.glob(f"{prefix}-*final_hlo-static-per-bundle-utilization.txt")
        found[kernel.group(1)] = step_bundles(path.read_text()) | utilization(use.read_text())
    return found


def step_bundles(text):
    """Bundles of the loop over grid steps and of loops inside it, which the dump marks by > and >>."""
    depths = [len(mark) for mark in re.findall(r"^\s*0x[0-9a-f]+\s.*?: (>*) ?\{", text, re.MULTILINE)]
    return {"bundles": sum(depth > 0 for depth in depths), "inner": sum(depth > 1 for depth in depths)}


def utilization(text):
    """How often each unit is used, over the whole kernel."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("MXU"))
    names = [name.strip() for name in lines[at].split(",")]
    rows = [[int(n) for n in line.split()] for line in lines[at + 2 :] if TABLE.fullmatch(line.strip())]
    return dict(zip(names, map(sum, zip(*rows, strict=True)), strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(TOPOLOGIES), help="v5e, v5p, v6e, joined by commas (default: all)")
    parser.add_argument("--cases", default="", help="names joined by commas (default: all)")
    parser.add_argument("--tile", default="", help="tokens of a chunk and heads of a step, or tokens and channels")
    parser.add_argument("--write", action="store_true", help=f"keep the counts in {KEPT.relative_to(ROOT)}")
    for name in ("--compile", "--folder"):  # of the process that compiles
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    needs.libtpu("tools.tpu_bundles")
    names = [name for name in options.cases.split(",") if name] or list(tpu_cases.cases())
    for flag, given, known in (
        ("--cases", names, tpu_cases.cases()),
        ("--chips", options.chips.split(","), TOPOLOGIES),
    ):
        for name in given:
            if name not in known:
                needs.refuse(f"{flag}: expected names among {', '.join(known)}, got {name!r}")
    if not re.fullmatch(r"(\d+(,\d+)*)?", options.tile):
        needs.refuse(f"--tile: expected integers joined by commas, got {options.tile!r}")
    if options.compile:
        tile = tuple(int(part) for part in options.tile.split(",") if part)
        return compile_cases(options.compile, names, tile or None, pathlib.Path(options.folder))
    counts = {}
    for chip in options.chips.split(","):
        counts[chip] = count(chip, names, options.tile)
        for name, numbers in counts[chip].items():
            print(chip, name, numbers, flush=True)
    if options.write:
        versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
        KEPT.write_text(json.dumps({"versions": versions, "counts": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
