"""Elementwise linear recurrences h_t = exp(log_a_t) h_{t-1} + x_t: kernels and their costs.

`gpu.supports(...)` says why a call cannot run (None: it can); `gpu.forward` and `gpu.backward` are the Hopper kernels,
`tpu` has the same for TPUs and `triton` for other NVIDIA GPUs, `cost` the bytes any implementation must move. None of
them has a differentiation rule: an op hangs them on one custom_vjp.
"""
