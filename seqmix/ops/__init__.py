"""Pure functions of arrays, in layout [B, T, H, K]: `from seqmix import ops; ops.linear_attention(...)`."""

from seqmix.ops.conv import short_conv
from seqmix.ops.linear import linear_attention
from seqmix.ops.softmax import attention, merge

__all__ = ["attention", "linear_attention", "merge", "short_conv"]
