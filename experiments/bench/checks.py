"""Every kernel that runs on this device, against float64 and against itself: no times.

Each case (`check_cases`) is a call of an op at a small shape that one feature makes hard: a ragged length, packed rows,
decays of 0 and -100 side by side, few key heads. Every implementation that takes it here runs forward and backward.
Errors are root mean squares of the difference to the float64 reference of the same rounded inputs, over those of
float64; `worst` names the result with the largest share of its bound, BOUND, or GATE_BOUND for the gradients of decays
and write weights. Then the same program runs REPEATS times, and every bit must be as at first. A case beyond a bound,
or with other bits, fails, so that the command ends with 1; other bits of a library that is not ours (LIBRARIES) are
only counted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import check_cases, timing
from experiments.bench.check_cases import DEFAULT
from experiments.bench.suites import Case, taking
from seqmix.ops import softmax_library

NAME = "checks"
SMALL = True  # runs on a CPU too, in minutes
COLUMNS = (
    ("op", "op", ""),
    ("case", "case", ""),
    ("implementation", "implementation", ""),
    ("share", "largest error over its bound", ".0%"),
    ("worst", "of", ""),
    ("error", "error", ".1e"),
    ("repeats", "repeats", ","),
    ("same_bits", "with the same bits", ","),
)
BOUND, GATE_BOUND = 5e-3, 2e-2
NEGLIGIBLE = 1e-6  # a largest difference that is no error, whatever its share of a result that is nearly 0
REPEATS = 200
IMPLEMENTATIONS = ("gpu", "triton", "tpu", "cudnn", "tokamax", "splash", "chunked")
LIBRARIES = softmax_library.NAMES
GATES = ("log_decay", "log_a", "write")
normal = jax.random.normal


def cases(args):
    """The cases by op."""
    return [
        Case(make.__name__, f"{make.__name__} {name}", functools.partial(_case, make, name))
        for make, name in check_cases.every()
    ]


def _case(make, name, args):
    """A row of each implementation that runs; raises ArithmeticError after the last where one is out of bounds."""
    check = make(name)
    inputs = tuple(check.inputs.values())
    results = jax.eval_shape(functools.partial(check.run, implementation="reference"), *inputs)
    keys = jax.random.split(jax.random.key(9), len(results))
    cotangents = tuple(normal(key, x.shape, x.dtype) for key, x in zip(keys, results, strict=True))
    exact, failed = _exact(check, cotangents, inputs), []
    for label in taking(check.run, inputs, (*IMPLEMENTATIONS, DEFAULT)):
        run = functools.partial(check.run, implementation=label)
        both = jax.jit(timing.with_gradients(run))
        row = {"op": check.op, "case": name, "implementation": label}
        row |= compared(check, both(cotangents, *inputs), exact) | repeated(both, (cotangents, *inputs))
        yield row
        if not row["share"] <= 1:
            failed.append(f"{label}: {row['worst']} is off by {row['error']:.1e}")
        if row["same_bits"] < row["repeats"] and label not in LIBRARIES:
            failed.append(f"{label}: {row['repeats'] - row['same_bits']} of {row['repeats']} repeats have other bits")
    if failed:
        raise ArithmeticError("; ".join(failed))


def _exact(check, cotangents, inputs):
    """Results and gradients of the reference in float64, as numpy."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (cotangents, *inputs))
    with jax.enable_x64(True):
        both = timing.with_gradients(functools.partial(check.run, implementation="reference"))
        return jax.tree.map(np.asarray, jax.jit(both)(*wide))


def compared(check, found, exact):
    """{"share", "worst", "error", "errors"}: all errors by name, and that with the largest share of its bound."""
    names = [*check.results, *(f"d{name}" for name in check.inputs)]
    errors, shares = {}, {}
    for name, a, b in zip(names, jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        a = np.asarray(a, np.float64)
        with np.errstate(invalid="ignore"):  # the lse of a row that sees nothing is -inf in both
            difference = np.where(a == b, 0, a - b)
        scale = np.sqrt(np.mean(np.where(np.isfinite(b), b, 0) ** 2))
        small = np.abs(difference).max() <= NEGLIGIBLE
        errors[name] = 0.0 if small else float(np.sqrt(np.mean(difference**2)) / scale)
        shares[name] = errors[name] / (GATE_BOUND if name.removeprefix("d") in GATES else BOUND)
    worst = max(shares, key=lambda name: (not shares[name] <= 1, shares[name]))  # NaN is the worst of all
    return {"share": shares[worst], "worst": worst, "error": errors[worst], "errors": errors}


def repeated(both, arguments):
    """{"repeats", "same_bits"}: how many further runs of a program gave the bits of its first."""
    bits = lambda tree: [x.view(f"uint{8 * x.dtype.itemsize}") for x in jax.tree.leaves(tree)]
    same = jax.jit(lambda a, b: jnp.stack([jnp.array_equal(x, y) for x, y in zip(bits(a), bits(b), strict=True)]).all())
    first = both(*arguments)
    return {"repeats": REPEATS, "same_bits": int(sum(same(first, both(*arguments)) for _ in range(REPEATS)))}
