"""One HTML file on any number of runs: `python -m experiments.report DIR... [--out=FILE.html] [--figures=DIR]`."""
