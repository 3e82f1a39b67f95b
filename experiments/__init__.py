"""Entry points (train, generate) and what they share; run from a clone."""
