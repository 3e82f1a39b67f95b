"""Softmax attention in which the pattern of visible pairs is fixed beforehand."""
