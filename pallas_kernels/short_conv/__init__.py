"""Short depthwise causal convolutions over time, with an activation."""
