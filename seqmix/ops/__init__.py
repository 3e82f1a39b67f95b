"""Pure functions of arrays, in layout [B, T, H, K]: `from seqmix import ops; ops.linear_attention(...)`."""

from seqmix.ops.block_sparse import block_sparse_attention
from seqmix.ops.conv import short_conv
from seqmix.ops.delta import delta_rule, diagonal_plus_rank_one
from seqmix.ops.fft_conv import long_conv
from seqmix.ops.linear import linear_attention
from seqmix.ops.log_linear import log_linear_attention, log_linear_delta_rule
from seqmix.ops.logsumexp import logsumexp_scan
from seqmix.ops.scan import linear_scan
from seqmix.ops.selective import selective_scan
from seqmix.ops.softmax import attention, merge
from seqmix.ops.summed_weights import block_weights
from seqmix.ops.topk_blocks import topk_block_attention

__all__ = [
    "attention",
    "block_sparse_attention",
    "block_weights",
    "delta_rule",
    "diagonal_plus_rank_one",
    "linear_attention",
    "linear_scan",
    "log_linear_attention",
    "log_linear_delta_rule",
    "logsumexp_scan",
    "long_conv",
    "merge",
    "selective_scan",
    "short_conv",
    "topk_block_attention",
]
