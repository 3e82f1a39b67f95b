"""What touches Pallas Mosaic GPU, whose interface changes from one jax to the next, and Pallas TPU.

The GPU part is written for jax 0.11.1 and later (so Python 3.12), the TPU part, at the end, for any supported jax.
Everything is imported when first used, so that this module loads anywhere; `unavailable()` says why GPU kernels cannot
be built here, if so.

A "warpgroup" (128 threads) is what Pallas calls a thread; what it holds in registers is in `registers`. Tiles in shared
memory are bf16, [rows, columns] with columns a multiple of 64, stored in the 128-byte swizzle that wgmma and TMA share.
"""

import contextlib
import contextvars
import functools
import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

MIN_JAX = (0, 11, 1)
TPU_VMEM_BYTES = 48 * 2**20  # of a kernel; v5e and v6e have 128 MiB, v5p 64
_interpret = contextvars.ContextVar("pallas_kernels_interpret", default=False)


def unavailable() -> str | None:
    """Why Mosaic GPU kernels cannot be built with this Python and jax; None if they can."""
    if sys.version_info < (3, 12):
        return f"Mosaic GPU kernels need Python >= 3.12, this is {sys.version_info.major}.{sys.version_info.minor}"
    version = tuple(int(part) for part in re.findall(r"\d+", jax.__version__)[:3])
    if version < MIN_JAX:
        return f"Mosaic GPU kernels need jax >= {'.'.join(map(str, MIN_JAX))}, this is {jax.__version__}"
    if importlib.util.find_spec("jax.experimental.pallas.mosaic_gpu") is None:
        return "this jax has no Pallas Mosaic GPU"
    return None


@contextlib.contextmanager
def interpret():
    """Kernels traced inside run in the CPU interpreter, with race detection. Slow: for tests of tiny shapes."""
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)


def interpreting() -> bool:
    return _interpret.get()


@functools.cache
def gpu():
    """The module jax.experimental.pallas.mosaic_gpu."""
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    import jax.experimental.pallas.mosaic_gpu as module

    return module


def tiling():
    mgpu = gpu()
    return (mgpu.TilingTransform((8, 64)), mgpu.SwizzleTransform(128))


def tile(*shape):
    """Shared memory for bf16 tiles, the last two axes being the tile."""
    return gpu().SMEM(shape, jnp.bfloat16, transforms=tiling())


def wide_tile(*shape):
    """`tile` for float32; columns are a multiple of 32."""
    mgpu = gpu()
    transforms = (mgpu.TilingTransform((8, 32)), mgpu.SwizzleTransform(128))
    return mgpu.SMEM(shape, jnp.float32, transforms=transforms)


def vector(*shape, dtype=jnp.float32):
    """Shared memory for plain vectors."""
    return gpu().SMEM(shape, dtype)


def unhoisted(ref, step):
    """ref[0] of a buffer [1, ...], at an address that the compiler cannot compute before the loop over step >= 0.

    Before the loop it computes every address and descriptor that a buffer's tiles need, and keeps them in registers.
    """
    return ref.at[jnp.minimum(step, 0)]


def barrier(arrivals):
    return gpu().Barrier(num_arrivals=arrivals)


def barriers(count, arrivals=1):
    """`count` barriers, one after the other under one name."""
    return gpu().Barrier(num_arrivals=arrivals, num_barriers=count)


def fetch(source, target, barrier_ref):
    """Starts the copy, by TMA, of global memory to shared memory; it arrives at the barrier."""
    gpu().copy_gmem_to_smem(source, target, barrier_ref)


def prefetch(source):
    """Starts the copy of global memory to L2, for a `fetch` to come."""
    if not interpreting():
        gpu().async_prefetch(source)


def registers(count, more):
    """What a thread of this warpgroup may hold: `more` than at the kernel's start, or less."""
    gpu().set_max_registers(count, action="increase" if more else "decrease")


def tile_spec(shape, index_map):
    """How a pipeline cuts tiles out of a global array."""
    return gpu().BlockSpec(shape, index_map, transforms=tiling())


def wide_tile_spec(shape, index_map):
    """`tile_spec` of a float32 array, whose tiles have columns a multiple of 32."""
    mgpu = gpu()
    return mgpu.BlockSpec(shape, index_map, transforms=(mgpu.TilingTransform((8, 32)), mgpu.SwizzleTransform(128)))


def vector_spec(shape, index_map):
    return gpu().BlockSpec(shape, index_map)


def pipeline(body, *, steps, specs, stages, warpgroups, around, fetching=24):
    """A loop over `steps` whose inputs one extra warpgroup fetches by TMA, `stages` deep.

    steps: a number, or a scalar of the kernel's own, at least 1. body(indices, *tiles, carry) -> carry runs in every
    computing warpgroup; around(run) wraps the loop there: run(carry) -> carry. fetching: registers of a thread that
    fetches. The others of two computing warpgroups get 240 with 24 and 232 with 40; with 32 they would ask for more
    than three warpgroups start with, 168 each, and wait for ever.
    """
    return gpu().emit_pipeline_warp_specialized(
        body,
        grid=(steps,),
        in_specs=specs,
        memory_registers=fetching,
        max_concurrent_steps=min(stages, steps) if isinstance(steps, int) else stages,
        wg_axis="warpgroup",
        num_compute_wgs=warpgroups,
        compute_context=around,
    )


def stream(body, *, steps, specs, stages, carry):
    """A loop over `steps` in a single warpgroup that fetches its own tiles by TMA, `stages` deep: the last carry.

    body(indices, *tiles, carry) -> carry must `publish` after its last read of the tiles.
    """
    return gpu().emit_pipeline(
        body, grid=(steps,), in_specs=specs, max_concurrent_steps=min(stages, steps), init_carry=carry
    )


def kernel(body, *, grid, names, out, scratch, warpgroups, name, fetching=True, sums_columns=True):
    """A Mosaic GPU kernel over `grid`, with `warpgroups` computing warpgroups and, if `fetching`, one that fetches.

    sums_columns: False frees the shared memory that sums over columns would need; sums over rows need none.
    """
    mgpu = gpu()
    extra = {"interpret": mgpu.InterpretGPUParams(detect_races=True)} if interpreting() else {}
    if warpgroups + fetching > 1:
        extra |= {"num_threads": warpgroups + fetching, "thread_name": "warpgroup"}
    return mgpu.kernel(
        body,
        out_type=out,
        grid=grid,
        grid_names=names,
        scratch_types=scratch,
        compiler_params=mgpu.CompilerParams(
            approx_math=True, **({} if sums_columns else {"reduction_scratch_bytes": 0})
        ),
        kernel_name=name,
        **extra,
    )


def updating(body, array, *inputs, grid, names, out, name):
    """(what the kernel makes, the array as it leaves it), of one warpgroup a thread block.

    body(array_ref, *input_refs, out_ref, new_ref) may find the new array where the old one lies, or elsewhere: it must
    write all of it, each number after the thread that writes it has read it. XLA keeps both in one place where it can,
    as in a loop's state, and copies the array before if it is read afterwards. But a kernel that takes slices of
    stacked arrays, which are a loop's inputs and outputs, has them in two, whatever was said of their place: hence no
    reference that is changed in place, of which XLA would write the wrong one.
    """
    mgpu = gpu()
    extra = {"interpret": mgpu.InterpretGPUParams(detect_races=True)} if interpreting() else {}
    try:
        from jax._src.pallas.mpmd import _mpmd_map as build

        extra["input_output_aliases"] = {0: 1}
    except ImportError:  # then XLA copies a loop's state for each token

        def build(mesh_and_body, out_types, **options):
            return pl.kernel(mesh_and_body[0][1], out_types, mesh=mesh_and_body[0][0], **options)

    run = build(
        [(mgpu.Mesh(grid=grid, grid_names=names, kernel_name=name), body)],
        (out, jax.ShapeDtypeStruct(array.shape, array.dtype)),
        compiler_params=mgpu.CompilerParams(approx_math=True),
        name=name,
        **extra,
    )
    return jax.custom_batching.sequential_vmap(run)(array, *inputs)


def warpgroup(count):
    """This warpgroup's index among the `count` computing ones; the fetching one gets a valid index too."""
    return jnp.minimum(lax.axis_index("warpgroup"), count - 1)


def publish():
    """Makes this warpgroup's writes to shared memory visible to the tensor cores and to TMA."""
    gpu().commit_smem()


def reads_done():
    """Puts this thread's reads of shared memory before what TMA writes there once the thread has arrived at a barrier.

    The fence of `publish` without its barrier, for which registers may be too few.
    """
    if interpreting():  # which looks for a fence between such reads and writes
        publish()
        return
    from jaxlib.mlir.dialects import nvvm

    @gpu().inline_mgpu()
    def fence(_):
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)

    fence()


def fetching_warpgroup(count):
    """Whether this warpgroup is the one beside the `count` computing ones."""
    return lax.axis_index("warpgroup") == count


def store(source, target, predicate=None):
    """Starts the copy of a published shared tile or vector to global memory."""
    if predicate is None:
        gpu().copy_smem_to_gmem(source, target)
    else:
        pl.when(predicate)(lambda: gpu().copy_smem_to_gmem(source, target))


def stores_read(pending=0):
    """Waits until the copies that this warpgroup started, but the last `pending`, have read their sources."""
    gpu().wait_smem_to_gmem(pending, wait_read_only=True)


def stores_done():
    gpu().wait_smem_to_gmem(0)


def arrive(barrier_ref, predicate=None):
    """Arrives at a barrier, if the predicate says so."""
    gpu().barrier_arrive(barrier_ref, predicate=predicate)


def wait(barrier_ref):
    gpu().barrier_wait(barrier_ref)


def capability(device=None) -> tuple[int, int] | None:
    """(major, minor) compute capability of a device (the default one); None if it is no NVIDIA GPU."""
    device = device or jax.devices()[0]
    text = getattr(device, "compute_capability", None)
    return tuple(int(part) for part in str(text).split(".")) if device.platform == "gpu" and text else None


def no_hopper(given: tuple[int, int] | None = None) -> str | None:
    """Why no Hopper kernel runs on a GPU of that capability (None: the default device), in a few words, or None."""
    reason = unavailable()
    if reason is not None:
        return reason
    if given is None and not interpreting():
        given = capability()
        if given is None:
            return "needs a Hopper GPU, the default device is none"
    if given is not None and given[0] != 9:
        return f"needs a Hopper GPU (compute capability 9.x), this one has {given[0]}.{given[1]}"
    return None


# TPU. These kernels are plain `pallas_call`s and run, or are interpreted, with every jax that this project supports.


@functools.cache
def tpu():
    """The module jax.experimental.pallas.tpu."""
    import jax.experimental.pallas.tpu as module

    return module


def tpu_scratch(*shape, dtype=jnp.float32):
    """Memory on the chip that lives as long as the kernel does."""
    return tpu().VMEM(shape, dtype)


def tpu_roll(rows, by):
    """Rows moved down by `by` >= 0, the last ones coming in at the top."""
    return tpu().roll(rows, by, 0)


def tpu_kernel(body, *, grid, parallel, inputs, outputs, scratch, name, flops, exponentials=0, prefetch=()):
    """The outputs of a Pallas TPU kernel, a list.

    inputs, outputs: lists of (array or its shape and dtype, block shape, index map). The grid's first `parallel` axes
    may go to different cores, the others are walked in order. flops and exponentials: what the kernel counts for in
    XLA's schedule. prefetch: arrays that lie in scalar memory before the first step; `body` takes them first, index
    maps after the grid's indices.
    """
    spec = lambda entry: pl.BlockSpec(entry[1], entry[2])
    arrays = [entry[0] for entry in (*inputs, *outputs)]
    run = pl.pallas_call(
        body,
        grid_spec=tpu().PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=grid,
            in_specs=[spec(entry) for entry in inputs],
            out_specs=[spec(entry) for entry in outputs],
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(entry[0].shape, entry[0].dtype) for entry in outputs],
        compiler_params=tpu().CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel),
            vmem_limit_bytes=TPU_VMEM_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=exponentials,
            bytes_accessed=sum(array.size * array.dtype.itemsize for array in arrays),
        ),
        interpret=tpu().InterpretParams() if interpreting() else False,
        name=name,
    )
    return run(*prefetch, *[entry[0] for entry in inputs])
