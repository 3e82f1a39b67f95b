"""How a period of layers is walked: which layers are one loop, and what the backward pass keeps of them.

With remat "full" a layer is recomputed from what entered it, one after the other, however long the period is; "dots"
recomputes a period at once from outputs of matmuls. Where periods are no loop, what is recomputed needs barriers, or
XLA finds that everything is computed already, and keeps it.
"""

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name

ENTERED = "layer_input"


def period(remat: str, body, length: int, looped: bool = True):
    """The body of the walk over periods of so many layers, as `remat` wants it; looped: the walk is a loop."""
    if remat == "none":
        return body
    known = jax.checkpoint_policies
    if remat == "dots":
        # Products within kernels' gradients are named, as their operations are none of dots.
        products = known.save_only_these_names("product")
        policy = known.save_from_both_policies(known.dots_with_no_batch_dims_saveable, products)
    else:
        policy = known.save_only_these_names(ENTERED) if length > 1 else None
    return jax.checkpoint(body, policy=policy, prevent_cse=not looped)


def layer(remat: str, body, length: int, keep: bool, looped: bool = True):
    """body(carry, xs) of a layer in such a period; keep: the backward pass keeps `carry`, if it keeps any."""
    if remat != "full" or length == 1:
        return body
    body, named = jax.checkpoint(body, prevent_cse=not looped), partial(checkpoint_name, name=ENTERED)
    return (lambda carry, xs: body(jax.tree.map(named, carry), xs)) if keep else body


def runs(remat: str, kinds, shared: bool) -> list[list[int]]:
    """Positions of the period in groups of neighbours of equal kind, which are one loop: one program to compile.

    With full remat alone: any other would keep the loops' stacks of weights, or of all that a layer makes. And not
    where layers share, whose loop would have to know what is written.
    """
    groups = []
    for position, kind in enumerate(kinds):
        if groups and remat == "full" and not shared and kind == groups[-1][0]:
            groups[-1][1].append(position)
        else:
            groups.append((kind, [position]))
    return [positions for _, positions in groups]
