"""A kernel over time that does not depend on the tokens."""
