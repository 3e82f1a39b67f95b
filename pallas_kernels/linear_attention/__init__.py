"""Linear attention with one decay per token and head, or per channel too: kernels and their costs.

`gpu.supports(...)` says why a call cannot run (None: it can), `gpu.forward` and `gpu_backward.backward` are the Hopper
kernels, `gpu_channel` and `gpu_channel_backward` those for a decay per channel, `tpu` and `tpu_backward` the same for
TPUs, with `tpu_channel` and `tpu_channel_backward`, `triton` and `triton_backward` for other NVIDIA GPUs, `cost` the
bytes and operations any implementation must spend. Those for TPUs have been compiled and interpreted, not run on a
chip. None of them has a differentiation rule: an op hangs them on one custom_vjp, whose residuals are forward's own
arguments, so either half can be swapped for another implementation.
Import them where they are dispatched; they build nothing before they are called.
"""
