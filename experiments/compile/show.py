"""Tables of a report and of estimated layouts."""

from experiments import progress
from experiments.compile import fit

SHOWN = 8  # layouts of the search


def report(found):
    """Prints what was compiled, memory by kind, costs, collectives and times."""
    mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    print(f"{found['config']} for {found['topology']}: {found['chips']} chips, mesh {mesh}, remat={found['remat']}")
    rows = f"{found['batch_size']} x {found['seq_len']:,} tokens a step in {found['accumulate']} microbatches"
    print(f"{rows}; compiled in {found['compile_seconds']} s ({found['compile_cpu_seconds']} s of CPU), not run")
    memory = found["memory"]
    kinds = [(kind, _gib(size)) for kind, size in memory["kinds"].items()]
    total = [("all", _gib(memory["total"])), ("the chip has", _gib(memory["chip"]))]
    progress.table(f"Memory of a chip: {memory['free']:.1%} stays free", ("what", "GiB"), [*kinds, *total])
    columns = ("collective", "over", "chips", "times", "GiB sent by a chip", "ms")
    moved = [
        (c["kind"], c["axes"], c["devices"], f"{c['count']:.0f}", _gib(c["bytes"]), f"{1e3 * c['seconds']:.2f}")
        for c in found["collectives"]
    ]
    progress.table("Collectives of a step", columns, moved, left=2)
    _times(found)
    for name, count in found["kernels"].items():
        print(f"kernel {name}: {count:.0f} times a step")
    for where, length in found["loops_of_unknown_length"].items():
        print(f"loop {where}: counted {length} times; its length depends on the data")
    if found["involuntary_resharding"]:
        print(f"warning: the compiler reshards against the layout {found['involuntary_resharding']} times")


def _times(found):
    seconds = found["seconds"]
    rows = [
        ("matrix products", f"{found['flops']:.3g} FLOPs", _ms(seconds["compute"])),
        ("memory", f"{_gib(found['bytes'])} GiB", _ms(seconds["memory"])),
        ("links", f"{_gib(sum(c['bytes'] for c in found['collectives']))} GiB", _ms(seconds["links"])),
        ("step, all overlapped", "", _ms(found["step_seconds"][0])),
        ("step, nothing overlapped", "", _ms(found["step_seconds"][1])),
    ]
    progress.table(f"Estimated times: MFU at most {found['mfu_bound']:.1%}", ("of a chip", "amount", "ms"), rows)


def layouts(found):
    """Prints the best of the estimated layouts."""
    rows = [
        (fit.describe(one), _ms(one["step_seconds"][0]), _ms(one["step_seconds"][1]), f"{one['memory']['free']:.0%}")
        for one in found[:SHOWN]
    ]
    columns = ("layout", "ms overlapped", "ms in turn", "memory free")
    progress.table(f"{len(found)} layouts fit on paper, the best:", columns, rows)


def _gib(size):
    return f"{size / 2**30:.3f}"


def _ms(seconds):
    return f"{1e3 * seconds:.1f}"
