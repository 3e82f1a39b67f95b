"""Stacks of mixers."""

from seqmix.models.lm import LM

__all__ = ["LM"]
