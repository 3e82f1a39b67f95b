"""What XLA is told of a training step whose weights several GPUs share.

By itself XLA (of jax 0.11.2) gathers a layer's weights in three goes at the top of the loop over layers, where nothing
stands beside the first, and scatters all of a layer's gradients at its end, beside nothing.
"""

import os

import jax

FSDP = {
    # A layer's weights are gathered while the layer before is computed: a loop carries one layer's more.
    "xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON",
    # In one go up to so many bytes: a long exchange comes closer to the links' rate.
    "xla_gpu_all_gather_combine_threshold_bytes": 64 * 2**20,
    # Gradients go together up to so many bytes of a device's share: large weights' one by one, each beside the product
    # that makes the next.
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**20,
}


def options(mesh) -> dict:
    """Compiler options of a step on `mesh`, but for those that the environment's XLA_FLAGS set."""
    if mesh.shape.get("fsdp", 1) == 1 or mesh.devices.flat[0].platform != "gpu":
        return {}
    said = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in FSDP.items() if f"--{name}=" not in said}


def compiled(lowered, mesh):
    """`lowered.compile()` with these options, or without them where this jax's XLA has others."""
    chosen = options(mesh)
    try:
        return lowered.compile(chosen or None)
    except jax.errors.JaxRuntimeError as error:
        if not chosen or not any(text in str(error) for text in ("No such compile option", "valid enum value")):
            raise
    return lowered.compile()
