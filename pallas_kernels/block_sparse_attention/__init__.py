"""Softmax attention over lists of key blocks: kernels and their costs.

`plan.supports(...)` says why a call cannot run (None: it can), `gpu.forward` is the Hopper kernel, `cost` the bytes and
operations any implementation must spend. No differentiation rule: an op hangs forward and backward on one custom_vjp,
whose residuals are (q, k, v, y, lse), so either half can be swapped for another implementation.
"""
