"""One file per published mechanism, grouped by its mixing matrix."""
