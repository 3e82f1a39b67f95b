"""RMS normalisation of gated rows, with a skip: y = norm((x + weight * skip) * silu(gate)) * scale."""
