"""All pairs: what a score is, how rows are normalised."""
