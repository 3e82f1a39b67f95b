"""Synthetic data with scorers: each task is a frozen dataclass whose batches are functions of a key."""

from seqmix.tasks.mqar import MQAR

__all__ = ["MQAR"]
