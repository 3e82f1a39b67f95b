"""Softmax attention in which the data chooses who sees whom."""
