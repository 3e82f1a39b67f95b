"""One generator function per sweep, named like its module; it yields the overrides of each run."""
