"""What a Mosaic GPU warpgroup holds in registers: layouts, loads and products. Written for jax as `compat` is.

A [64 n, 8 m] accumulator is spread over the warpgroup in wgmma's own layout; a vector over its rows or its columns
lives in the same layout with the other axis reduced away. Unstable names of Pallas are here and in `compat` alone.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat


def tile_layout():
    return compat.gpu().Layout.WGMMA


def rows_layout():
    return compat.gpu().Layout.WGMMA.reduce(1)


def columns_layout():
    return compat.gpu().Layout.WGMMA.reduce(0)


def load_tile(ref, shared=True):
    """[rows, columns] from shared (or global) memory into registers."""
    return compat.gpu().load(ref, layout=tile_layout(), optimized=shared)


def load_rows(ref):
    """A vector [rows], to scale the rows of a tile with."""
    return compat.gpu().load(ref, layout=rows_layout())


def load_rows_of(ref):
    """A vector [rows] from global memory."""
    return compat.gpu().load(ref, layout=rows_layout(), optimized=False)


def load_columns(ref):
    """A vector [columns], to scale the columns of a tile with."""
    # The unoptimized load keeps layout inference from searching for minutes.
    return compat.gpu().load(ref, layout=columns_layout(), optimized=False)


def lanes_layout(width):
    """A vector of `width` values, a multiple of 128: for elementwise work on rows of plain memory.

    As many neighbours lie in one thread as make up to 16 bytes of bf16.
    """
    return compat.gpu().Layout.WG_STRIDED((width,), vec_size=math.gcd(width // 128, 8))


def load_raw_lanes(ref):
    """A row of plain memory."""
    return compat.gpu().load(ref, layout=lanes_layout(ref.shape[-1]))


def load_lanes(ref):
    """A row of plain memory, float32."""
    return load_raw_lanes(ref).astype(jnp.float32)


def lanes(width, value):
    """A row of one value."""
    return compat.gpu().layout_cast(lax.broadcast_in_dim(value, (width,), ()), lanes_layout(width))


@functools.cache
def streamed_layout():
    """A [16 n, 32 m] tile in registers: a thread has 4 neighbours of a row, a warp 4 rows by 32 columns.

    For tiles that go from global memory to registers and back, once, and whose sums go over rows.
    """
    from jax.experimental.mosaic.gpu.fragmented_array import Tiling

    tiling = Tiling(((16, 32), (4, 32), (4,)))
    return compat.gpu().Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def load_streamed(ref, axis=None):
    """A tile in `streamed_layout` from global memory, or a vector along its rows (axis 1 is reduced) or columns (0)."""
    layout = streamed_layout() if axis is None else streamed_layout().reduce(axis)
    return compat.gpu().load(ref, layout=layout, optimized=False)


def zeros(shape):
    return compat.gpu().layout_cast(jnp.zeros(shape, jnp.float32), tile_layout())


def laid(value, axis=None):
    """A tile, or a vector along an axis of one, told to lie in registers as tiles do."""
    layout = tile_layout() if axis is None else (rows_layout, columns_layout)[axis]()
    return compat.gpu().layout_cast(value, layout)


def rows(count, value):
    """A vector of one value, to scale rows of a tile with."""
    return compat.gpu().layout_cast(jnp.full((count,), value, jnp.float32), rows_layout())


def together(*values):
    """The values, none of which is made later than any other is used."""
    return values if compat.interpreting() else lax.optimization_barrier(values)


def iota(shape, axis):
    return compat.gpu().broadcasted_iota(jnp.int32, shape, axis, layout=tile_layout())


def load_float32(ref):
    """`load_tile` of bf16 as float32, in one instruction a number: a shift or a mask."""
    tile = load_tile(ref)
    if compat.interpreting():
        return tile.astype(jnp.float32)
    mgpu = compat.gpu()
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
    if compat.interpreting():
        difference = spread_rows(rows, tile.shape) - iota(tile.shape, 1)
        kept = {"sle": difference <= 0, "slt": difference < 0, "sge": difference >= 0, "sgt": difference > 0}
        return jnp.where(kept[compares], tile, otherwise)
    mgpu = compat.gpu()
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
    return compat.gpu().broadcasted_iota(jnp.int32, (count,), 0, layout=rows_layout())


def column_places(count):
    """0, 1, ... for the columns of a tile."""
    return compat.gpu().broadcasted_iota(jnp.int32, (count,), 0, layout=columns_layout())


def thread_columns(shape):
    """The columns of a tile as a sum, or the exclusive or, of two tiles: column & 6 and the rest.

    All columns of a thread share the first, and the second is a constant for each value that it holds: what compares
    the two needs no register for a column.
    """
    if compat.interpreting():
        column = spread_columns(column_places(shape[1]), shape)
        return column & 6, column & ~6
    from jax.experimental.mosaic import gpu as mosaic
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import arith

    array = compat.gpu().ShapeDtypeStruct(shape[1:], jnp.int32, layout=columns_layout())

    # An operation on `column_places` would give 16 equal values of the first, in 16 registers.
    @compat.gpu().inline_mgpu(return_type=(array, array))
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
    transposed(ref)[...] = compat.gpu().layout_cast(value, compat.gpu().Layout.WGMMA_TRANSPOSED)


def matmul(*pairs, start=None, issued=lambda: None):
    """Sum of a @ b over `pairs` of tiles (+ start), in float32 on the tensor cores.

    a: in registers or shared memory; b: in shared memory. issued() is called when all products have been handed to
    the tensor cores, before the wait.
    """
    mgpu = compat.gpu()

    def multiply(acc):
        for a, b in pairs:
            mgpu.wgmma(acc, a, b)
        issued()

    if start is None or compat.interpreting():  # the interpreter cannot start an accumulator from a value

        def product(acc):
            multiply(acc)
            return acc[...]

        a, b = pairs[0]
        result = pl.run_scoped(product, mgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
        return result if start is None else start + result
    return pl.run_state(multiply)(mgpu.ACC.init(start))


def matmuls(*jobs, issued=lambda: None):
    """Several `matmul`s that do not need each other, under one wait. jobs: (list of pairs, start or None) each."""
    if compat.interpreting():
        results = [matmul(*pairs, start=start) for pairs, start in jobs]
        issued()
        return results
    mgpu = compat.gpu()

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
    if compat.interpreting():
        values = list(starts)

        def add(n, a, b):
            values[n] = matmul((a, b), start=values[n])

        body(add, lambda n, pending: values[n])
        return values
    mgpu = compat.gpu()

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
    if not compat.interpreting():
        return value
    spare = spare.at[:, pl.ds(0, value.shape[1])]
    spare[...] = value
    compat.gpu().commit_smem()
    return spare
