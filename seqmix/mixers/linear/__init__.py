"""Feature maps in place of the softmax, without decay."""
