"""Pallas kernels, one package a primitive. They take and return arrays and know nothing of layers or parameters.

Importing this package needs neither a GPU nor a recent jax: unstable Pallas interfaces are touched in `compat` alone,
Triton in `triton_calls`, and only when a kernel is built.
"""
