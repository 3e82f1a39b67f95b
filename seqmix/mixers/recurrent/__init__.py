"""A fixed-size state with decay or correction."""
