"""One function per experiment, named like its module; each returns an `experiments.config.Train`."""
