"""Linear attention with one decay per token and head: kernels and their costs."""
