"""seqmix: every sequence mixer of the JAX world, in one protocol (see WORKSPACE.md)."""

__version__ = "0.1.0"
