"""Runs that Optuna draws: a trial is a run, its value the validation loss at the end.

The study is a journal in the sweep's directory. After a restart, trials that were under way go on with their own
overrides, and their runs resume.
"""

import json

from experiments import progress
from experiments.sweep import plan

STUDY = "sweep"
JOURNAL = "optuna.log"  # in the sweep's directory


class Trials:
    """A source for `local.Local` of `total` trials; space(trial) gives the overrides of one."""

    def __init__(self, space, base, root, fixed, total):
        try:
            import optuna
        except ImportError:
            raise ValueError("--sampler=optuna needs optuna: pip install 'seqmix[sweep]'") from None
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.total = optuna, total
        self.space, self.base, self.root, self.fixed = space, base, root, fixed
        storage = JournalStorage(JournalFileBackend(str(root / JOURNAL)))
        self.study = optuna.create_study(storage=storage, study_name=STUDY, load_if_exists=True)
        # Another seed after each restart: the same one would draw the first trials again.
        self.study.sampler = optuna.samplers.TPESampler(seed=len(self.study.trials), constant_liar=True)
        self.open = {}  # run id: trials that wait for it
        self.waiting = [trial for trial in self.study.trials if trial.state == optuna.trial.TrialState.RUNNING]

    def next(self):
        """The run of a trial that was under way before, or else of a new one; None when there are enough."""
        while self.waiting:
            trial = self.waiting.pop(0)
            run = self._again(trial)
            if run is None:  # killed before it was drawn whole
                self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
            elif self._opened(run, trial.number):
                return run
        while self._counted() < self.total:
            trial = self.study.ask()
            run = plan.resolve(self.space(trial), self.base, self.root, self.fixed)
            trial.set_user_attr("run", run.id)  # from here on it is drawn whole
            if self._opened(run, trial.number):
                return run
        return None

    def done(self, run, ok):
        """Tells the study; a run that failed has no value."""
        for number in self.open.pop(run.id):
            if ok:
                self.study.tell(number, json.loads((run.workdir / "report.json").read_text())["loss"])
            else:
                self.study.tell(number, state=self.optuna.trial.TrialState.FAIL)

    def runs(self):
        """The runs of all trials so far, in order, without repetitions."""
        found = [self._again(trial) for trial in self.study.trials]
        return list({run.id: run for run in found if run is not None}.values())

    def report(self):
        """Prints the best trials."""
        ended = [trial for trial in self.study.trials if trial.value is not None]
        rows = []
        for trial in sorted(ended, key=lambda trial: trial.value)[:10]:
            drawn = " ".join(f"{name}={plan.brief(value)}" for name, value in trial.params.items())
            rows.append((str(trial.number), self._again(trial).id, f"{trial.value:.4f}", drawn))
        progress.table("Best trials", ("trial", "run", "validation loss", "drawn"), rows, left=4)

    def _opened(self, run, number):
        """Notes that a trial waits for a run; False when another one waits for the same run already."""
        first = run.id not in self.open
        self.open.setdefault(run.id, []).append(number)
        return first

    def _counted(self):
        """Trials that count: those that ended with a value or with a failed run, and those under way."""
        return sum("run" in trial.user_attrs for trial in self.study.trials)

    def _again(self, trial):
        """The run of a trial from what was drawn for it; None where it was not drawn whole."""
        if "run" not in trial.user_attrs:
            return None
        overrides = self.space(self.optuna.trial.FixedTrial(trial.params))
        return plan.resolve(overrides, self.base, self.root, self.fixed)
