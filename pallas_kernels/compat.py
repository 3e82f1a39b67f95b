"""The one place that touches Pallas Mosaic GPU, whose interface changes from one jax to the next, and Pallas TPU.

The GPU part is written for jax 0.11.1 and later (so Python 3.12), the TPU part, at the end, for any supported jax.
Everything is imported when first used, so that this module loads anywhere; `unavailable()` says why GPU kernels cannot
be built here, if so.

A "warpgroup" (128 threads) is what Pallas calls a thread. Tiles in shared memory are bf16, [rows, columns] with
columns a multiple of 64, stored in the 128-byte swizzle that wgmma and TMA share.
"""

import contextlib
import contextvars
import functools
import importlib.util
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
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


# Registers. A [64 n, 8 m] accumulator is spread over the warpgroup in wgmma's own layout; a vector over its rows or
# its columns lives in the same layout with the other axis reduced away.


def tile_layout():
    return gpu().Layout.WGMMA


def rows_layout():
    return gpu().Layout.WGMMA.reduce(1)


def columns_layout():
    return gpu().Layout.WGMMA.reduce(0)


def load_tile(ref, shared=True):
    """[rows, columns] from shared (or global) memory into registers."""
    return gpu().load(ref, layout=tile_layout(), optimized=shared)


def load_rows(ref):
    """A vector [rows], to scale the rows of a tile with."""
    return gpu().load(ref, layout=rows_layout())


def load_rows_of(ref):
    """A vector [rows] from global memory."""
    return gpu().load(ref, layout=rows_layout(), optimized=False)


def load_columns(ref):
    """A vector [columns], to scale the columns of a tile with."""
    # The unoptimized load keeps layout inference from searching for minutes.
    return gpu().load(ref, layout=columns_layout(), optimized=False)


def lanes_layout(width):
    """A vector of `width` values, a multiple of 128: for elementwise work on rows of plain memory.

    As many neighbours lie in one thread as make up to 16 bytes of bf16.
    """
    return gpu().Layout.WG_STRIDED((width,), vec_size=math.gcd(width // 128, 8))


def load_raw_lanes(ref):
    """A row of plain memory."""
    return gpu().load(ref, layout=lanes_layout(ref.shape[-1]))


def load_lanes(ref):
    """A row of plain memory, float32."""
    return load_raw_lanes(ref).astype(jnp.float32)


def lanes(width, value):
    """A row of one value."""
    return gpu().layout_cast(lax.broadcast_in_dim(value, (width,), ()), lanes_layout(width))


@functools.cache
def streamed_layout():
    """A [16 n, 32 m] tile in registers: a thread has 4 neighbours of a row, a warp 4 rows by 32 columns.

    For tiles that go from global memory to registers and back, once, and whose sums go over rows.
    """
    from jax.experimental.mosaic.gpu.fragmented_array import Tiling

    tiling = Tiling(((16, 32), (4, 32), (4,)))
    return gpu().Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def load_streamed(ref, axis=None):
    """A tile in `streamed_layout` from global memory, or a vector along its rows (axis 1 is reduced) or columns (0)."""
    layout = streamed_layout() if axis is None else streamed_layout().reduce(axis)
    return gpu().load(ref, layout=layout, optimized=False)


def zeros(shape):
    return gpu().layout_cast(jnp.zeros(shape, jnp.float32), tile_layout())


def laid(value, axis=None):
    """A tile, or a vector along an axis of one, told to lie in registers as tiles do."""
    layout = tile_layout() if axis is None else (rows_layout, columns_layout)[axis]()
    return gpu().layout_cast(value, layout)


def rows(count, value):
    """A vector of one value, to scale rows of a tile with."""
    return gpu().layout_cast(jnp.full((count,), value, jnp.float32), rows_layout())


def together(*values):
    """The values, none of which is made later than any other is used."""
    return values if interpreting() else lax.optimization_barrier(values)


def iota(shape, axis):
    return gpu().broadcasted_iota(jnp.int32, shape, axis, layout=tile_layout())


def load_float32(ref):
    """`load_tile` of bf16 as float32, in one instruction a number: a shift or a mask."""
    tile = load_tile(ref)
    if interpreting():
        return tile.astype(jnp.float32)
    mgpu = gpu()
    from jax.experimental.mosaic.gpu import FragmentedArray, c, utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    layout = tile_layout()

    @mgpu.inline_mgpu(arg_types=(layout,), return_type=mgpu.ShapeDtypeStruct(tile.shape, jnp.float32, layout=layout))
    def widened(_, values):
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        found = np.empty_like(values.registers)
        for index, pair in np.ndenumerate(values.registers):
            pair = utils.bitcast(pair, i32)
            halves = arith.shli(pair, c(16, i32)), arith.andi(pair, c(0xFFFF0000 - 2**32, i32))
            halves = [arith.bitcast(f32, half) for half in halves]
            found[index] = vector.from_elements(ir.VectorType.get((2,), f32), halves)
        return FragmentedArray(_registers=found, _layout=values.layout, _is_signed=None)

    return widened(tile)


def below(tile, step, otherwise, upper=False, diagonal=True):
    """A square tile where rows >= columns (upper: <=; without the diagonal > and <), elsewhere a number.

    Each comparison is one of a thread's own number with a constant. step: a scalar >= 0 of the loop around; without it
    the compiler would compare before the loop and keep what it finds in registers.
    """
    size, compares = tile.shape[0], ("sle" if diagonal else "slt") if upper else ("sge" if diagonal else "sgt")
    rows = row_places(size) + jnp.minimum(step, 0)
    if interpreting():
        difference = spread_rows(rows, tile.shape) - iota(tile.shape, 1)
        kept = {"sle": difference <= 0, "slt": difference < 0, "sge": difference >= 0, "sgt": difference > 0}
        return jnp.where(kept[compares], tile, otherwise)
    mgpu = gpu()
    from jax.experimental.mosaic.gpu import FragmentedArray, c, utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    @mgpu.inline_mgpu(
        arg_types=(tile_layout(), rows_layout()),
        return_type=mgpu.ShapeDtypeStruct(tile.shape, tile.dtype, layout=tile_layout()),
    )
    def select(_, values, rows):
        # A thread holds two columns in a row of every eight, in rows 0 and 8 of every sixteen.
        i32 = ir.IntegerType.get_signless(32)
        first = arith.muli(arith.andi(utils.thread_idx(), c(3, i32)), c(2, i32))
        element = lambda register, n: vector.extract(register, dynamic_position=[], static_position=[n])
        starts = [arith.subi(element(register, 0), first) for register in rows.registers.flat]
        kept = values.registers.reshape(size // 8, len(starts))
        found = np.empty_like(kept)
        compare = getattr(arith.CmpIPredicate, compares)
        number = c(float(otherwise), values.mlir_dtype)
        for (eight, row), pair in np.ndenumerate(kept):
            for n in range(2):
                visible = arith.cmpi(compare, starts[row], c(8 * eight + n, i32))
                value = arith.select(visible, element(pair, n), number)
                pair = vector.insert(value, pair, dynamic_position=[], static_position=[n])
            found[eight, row] = pair
        registers = found.reshape(values.registers.shape)
        return FragmentedArray(_registers=registers, _layout=values.layout, _is_signed=None)

    return select(tile, rows)


def row_places(count):
    """0, 1, ... for the rows of a tile."""
    return gpu().broadcasted_iota(jnp.int32, (count,), 0, layout=rows_layout())


def column_places(count):
    """0, 1, ... for the columns of a tile."""
    return gpu().broadcasted_iota(jnp.int32, (count,), 0, layout=columns_layout())


def thread_columns(shape):
    """The columns of a tile as a sum, or the exclusive or, of two tiles: column & 6 and the rest.

    All columns of a thread share the first, and the second is a constant for each value that it holds: what compares
    the two needs no register for a column.
    """
    if interpreting():
        column = spread_columns(column_places(shape[1]), shape)
        return column & 6, column & ~6
    from jax.experimental.mosaic import gpu as mosaic
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import arith

    array = gpu().ShapeDtypeStruct(shape[1:], jnp.int32, layout=columns_layout())

    # An operation on `column_places` would give 16 equal values of the first, in 16 registers.
    @gpu().inline_mgpu(return_type=(array, array))
    def parts(_):
        number, own = ir.IntegerType.get_signless(32), []

        def first(_, index):
            own.append(own[0] if own else index[0])
            return arith.index_cast(number, own[0])

        layout = columns_layout().to_mgpu()
        blank = mosaic.FragmentedArray.splat(mosaic.c(0, number), shape[1:], layout, is_signed=True)
        own_columns = blank.foreach(first, create_array=True, is_signed=True)
        rest = lambda _, index: arith.index_cast(number, arith.subi(index[0], own[0]))
        return own_columns, blank.foreach(rest, create_array=True, is_signed=True)

    return tuple(laid(spread_columns(part, shape)) for part in parts())


def spread_rows(vector, shape):
    """vector[i] at [i, j]."""
    return lax.broadcast_in_dim(vector, shape, [0])


def spread_columns(vector, shape):
    """vector[j] at [i, j]."""
    return lax.broadcast_in_dim(vector, shape, [1])


def transposed(ref):
    return ref.transpose((1, 0))


def store_transposed(value, ref):
    """Writes a tile to global memory [columns, rows]."""
    transposed(ref)[...] = gpu().layout_cast(value, gpu().Layout.WGMMA_TRANSPOSED)


def matmul(*pairs, start=None, issued=lambda: None):
    """Sum of a @ b over `pairs` of tiles (+ start), in float32 on the tensor cores.

    a: in registers or shared memory; b: in shared memory. issued() is called when all products have been handed to
    the tensor cores, before the wait.
    """
    mgpu = gpu()

    def multiply(acc):
        for a, b in pairs:
            mgpu.wgmma(acc, a, b)
        issued()

    if start is None or interpreting():  # the interpreter cannot start an accumulator from a value

        def product(acc):
            multiply(acc)
            return acc[...]

        a, b = pairs[0]
        result = pl.run_scoped(product, mgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
        return result if start is None else start + result
    return pl.run_state(multiply)(mgpu.ACC.init(start))


def matmuls(*jobs, issued=lambda: None):
    """Several `matmul`s that do not need each other, under one wait. jobs: (list of pairs, start or None) each."""
    if interpreting():
        results = [matmul(*pairs, start=start) for pairs, start in jobs]
        issued()
        return results
    mgpu = gpu()

    def multiply(accs):
        for acc, (pairs, _) in zip(accs, jobs):
            for a, b in pairs:
                mgpu.wgmma(acc, a, b)
        issued()

    starts = [zeros((pairs[0][0].shape[0], pairs[0][1].shape[1])) if start is None else start for pairs, start in jobs]
    return list(pl.run_state(multiply)([mgpu.ACC.init(start) for start in starts]))


def accumulate(body, *starts):
    """Final values of accumulators that begin with `starts`, float32 tiles in registers.

    body(add, read): add(n, a, b) starts accumulator n += a @ b, the operands as in `matmul`; read(n, pending) is its
    value once all products but the last `pending` are done.
    """
    if interpreting():
        values = list(starts)

        def add(n, a, b):
            values[n] = matmul((a, b), start=values[n])

        body(add, lambda n, pending: values[n])
        return values
    mgpu = gpu()

    def run(accs):
        def read(n, pending):
            # Without the barrier the compiler may move uses of the value above the wait.
            return lax.optimization_barrier(mgpu.wgmma_accumulator_load(accs[n], wait_n=pending))

        body(lambda n, a, b: mgpu.wgmma(accs[n], a, b), read)

    return list(pl.run_state(run)([mgpu.ACC.init(start) for start in starts]))


def as_operand(value, spare=None):
    """A float32 tile rounded to bf16, as the left operand of `matmul`.

    The interpreter takes that operand from shared memory only: there it goes through `spare`, a tile of its shape or
    of more columns.
    """
    value = value.astype(jnp.bfloat16)
    if not interpreting():
        return value
    spare = spare.at[:, pl.ds(0, value.shape[1])]
    spare[...] = value
    gpu().commit_smem()
    return spare


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
