"""RMS normalisation of gated rows on Hopper GPUs, forward and backward.

    s = x + weight * skip ;  g = s * silu(gate) ;  r = 1 / sqrt(mean(g^2) + eps) ;  y = g * r * scale

A thread block of one warpgroup holds whole rows in registers, so each array is read once: what XLA makes of it reads
the rows once for the mean and again for the result, and in the backward pass once more for the sums over rows. There,
with u = dy * scale,

    dg = r u - g r^3 mean(u g) ;  dx = dg silu(gate) ;  dskip = weight dx ;  dgate = dg s silu'(gate)

and the gradients of scale and weight, sums over rows of dy g r and of dx skip, are left as one row for each block.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import compat, registers

MOST_WIDTH = 4096  # channels of a row that a warpgroup holds
ROWS = 32  # of a thread block in the backward pass


def supports(x, skip, gate, scale, weight, *, capability=None) -> str | None:
    """Why `forward` and `backward` cannot run this call, in a few words; None if they can.

    Takes arrays or shapes with dtypes. capability: (major, minor) of the GPU that will run it; None asks the default
    device.
    """
    reason = compat.no_hopper(capability)
    if reason is not None:
        return reason
    for name, array in (("x", x), ("skip", skip), ("gate", gate)):
        if array.dtype != jnp.bfloat16 or array.shape != x.shape or x.ndim != 2:
            return f"needs bfloat16 rows [N, D] of one shape, got {name} of {array.dtype} {array.shape}"
    rows, width = x.shape
    if not rows or width % 256 or not 256 <= width <= MOST_WIDTH:
        return f"needs rows of a multiple of 256 channels, at most {MOST_WIDTH}, got {x.shape}"
    for name, array in (("scale", scale), ("weight", weight)):
        if array.dtype != jnp.float32 or array.shape != (width,):
            return f"needs a float32 {name} [{width}], got {array.dtype} {array.shape}"
    return None


def forward(x, skip, gate, scale, weight, *, eps):
    """y [N, D] bfloat16 of x, skip, gate [N, D] bfloat16 and scale, weight [D] float32."""
    rows, width = x.shape

    def body(x_ref, skip_ref, gate_ref, scale_ref, weight_ref, y_ref):
        row = lax.axis_index("row")
        part = _Row(row, width, x_ref, skip_ref, gate_ref, weight_ref)
        y = part.gated * part.inverse(eps) * registers.load_lanes(scale_ref)
        y_ref[row] = y.astype(y_ref.dtype)

    return compat.kernel(
        body,
        grid=(rows,),
        names=("row",),
        out=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch=[],
        warpgroups=1,
        fetching=False,
        name="gated_norm_forward",
    )(x, skip, gate, scale, weight)


def backward(x, skip, gate, scale, weight, dy, *, eps):
    """(y, dx, dskip, dgate [N, D] bfloat16, dscale, dweight [D] float32) from `forward`'s arguments and dy.

    y is made anew on the way, for the gradient of the product that comes after it.
    """
    rows, width = x.shape
    blocks = -(-rows // ROWS)

    def body(x_ref, skip_ref, gate_ref, scale_ref, weight_ref, dy_ref, y_ref, dx_ref, dskip_ref, dgate_ref, *rest):
        *sums, dscale, dweight = rest
        block = lax.axis_index("block")
        dscale[...] = dweight[...] = registers.lanes(width, 0.0)

        def one(index, _):
            row = block * ROWS + index
            part = _Row(row, width, x_ref, skip_ref, gate_ref, weight_ref)
            u = registers.load_lanes(dy_ref.at[row]) * registers.load_lanes(scale_ref)
            inverse = part.inverse(eps)
            inner = jnp.sum(u * part.gated) / width * inverse * inverse
            dg = inverse * (u - part.gated * inner)
            slope = part.sigmoid * (1 + part.gate * (1 - part.sigmoid))
            dgate_ref[row] = (dg * part.summed * slope).astype(dgate_ref.dtype)
            dx = dg * part.opened
            dx_ref[row] = dx.astype(dx_ref.dtype)
            dskip_ref[row] = (dx * registers.load_lanes(weight_ref)).astype(dskip_ref.dtype)
            # Sums and what else they need are not kept in registers, of which rows of 4096 leave none.
            dweight[...] = registers.load_lanes(dweight) + dx * registers.load_lanes(skip_ref.at[row])
            normal = part.gated * inverse
            dscale[...] = registers.load_lanes(dscale) + registers.load_lanes(dy_ref.at[row]) * normal
            y_ref[row] = (normal * registers.load_lanes(scale_ref)).astype(y_ref.dtype)
            return 0

        lax.fori_loop(0, jnp.minimum(ROWS, rows - block * ROWS), one, 0)
        sums[0][block], sums[1][block] = registers.load_lanes(dscale), registers.load_lanes(dweight)

    part = jax.ShapeDtypeStruct((blocks, width), jnp.float32)
    *gradients, dscale, dweight = compat.kernel(
        body,
        grid=(blocks,),
        names=("block",),
        out=(*[jax.ShapeDtypeStruct(x.shape, x.dtype)] * 4, part, part),
        scratch=[compat.vector(width), compat.vector(width)],
        warpgroups=1,
        fetching=False,
        name="gated_norm_backward",
    )(x, skip, gate, scale, weight, dy)
    return *gradients, jnp.sum(dscale, 0), jnp.sum(dweight, 0)


class _Row:
    """A row in registers, float32."""

    def __init__(self, row, width, x_ref, skip_ref, gate_ref, weight_ref):
        self.width = width
        self.skip, self.gate = registers.load_lanes(skip_ref.at[row]), registers.load_lanes(gate_ref.at[row])
        self.summed = registers.load_lanes(x_ref.at[row]) + registers.load_lanes(weight_ref) * self.skip
        self.sigmoid = 1 / (1 + jnp.exp(-self.gate))
        self.opened = self.gate * self.sigmoid
        self.gated = self.summed * self.opened

    def inverse(self, eps):
        """1 / sqrt of the mean square."""
        return lax.rsqrt(jnp.sum(self.gated * self.gated) / self.width + eps)
