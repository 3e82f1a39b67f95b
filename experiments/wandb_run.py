"""Weights & Biases beside metrics.jsonl: optional, `pip install wandb`."""

import hashlib
from pathlib import Path

from experiments import checkpoint


class WandbRun:
    """The run of a working directory: started again, it goes on under the same id."""

    def __init__(self, project, name, workdir, config):
        try:
            import wandb
        except ImportError:
            raise checkpoint.Refused("--wandb: expected the package wandb, not installed: pip install wandb") from None
        where = str(Path(workdir).absolute())
        same = hashlib.sha256(where.encode()).hexdigest()[:16]
        self.run = wandb.init(project=project, name=name, id=same, resume="allow", dir=where, config=config)

    def write(self, record):
        """Logs the numbers of a record of metrics.jsonl as kind/key."""
        kept = {k: v for k, v in record.items() if k not in ("kind", "step") and isinstance(v, (int, float))}
        self.run.log({f"{record['kind']}/{key}": value for key, value in kept.items()}, step=record["step"])

    def close(self):
        """Ends the run."""
        self.run.finish()
