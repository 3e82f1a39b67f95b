"""Adapters: mixers as Flax NNX or Linen modules."""
