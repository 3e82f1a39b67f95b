"""Pure functions of arrays, in layout [B, T, H, K]: `from seqmix import ops; ops.linear_attention(...)`."""
