"""A sweep as an array of Slurm jobs, by submitit: each trains one run and is put back into the queue when its time
is up or it is preempted; the run saves first and resumes.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

# What submitit calls by one name on every cluster; all other options are Slurm's own.
SHARED = ("name", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min")
RESUMABLE = 75
POLL = 0.2  # seconds
RETURNS = 1000  # times that a job whose time is up may be put back
SAVING = 60  # seconds that a run has to save when its job is put back


class Job:
    """What a job does: trains by `command`, printing into `log`. submitit calls it, or `checkpoint`."""

    def __init__(self):
        self.process = None

    def __call__(self, command, log, environment):
        from experiments.sweep import local

        wrapper = [sys.executable, "-S", str(local.CHILD), str(os.getpid()), ""]
        with open(log, "a") as file:
            self.process = subprocess.Popen(
                [*wrapper, *command], env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT
            )
            while (code := self.process.poll()) is None:
                time.sleep(POLL)
        if code:
            again = "; it resumes when Slurm starts it again" if code == RESUMABLE else ""
            raise RuntimeError(f"exit code {code}, log {log}{again}")
        return code

    def checkpoint(self, *arguments):
        """Stops the training, which saves, and asks for the same job again."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self._stop(self.process.pid)
        return DelayedSubmission(Job(), *arguments)

    def _stop(self, pid):
        # Runs in a signal handler, perhaps inside a method of the process object, whose lock it may not wait for.
        limit = time.monotonic() + SAVING
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGTERM)
            while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) and time.monotonic() < limit:
                time.sleep(POLL)
            os.kill(pid, signal.SIGKILL)


def submit(runs, root, jobs=None, options=None, cluster="slurm"):
    """Submits the runs that are neither finished nor running, at most `jobs` at once; returns submitit's jobs.

    `options` are submitit's parameters as text, with Slurm's own under their plain names (partition, qos, ...).
    Raises ValueError where submitit or Slurm is missing, or an option is none of theirs.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError("--launcher=slurm needs submitit: pip install 'seqmix[slurm]'") from None
    from experiments.sweep import local, plan

    states = [(run, plan.state(run.workdir, run.cfg.steps).name) for run in runs]
    wanted = [run for run, state in states if state not in ("finished", "running")]
    parameters = {"name": f"sweep-{root.name}", "timeout_min": 60, "slurm_additional_parameters": {"requeue": True}}
    if jobs:
        parameters["slurm_array_parallelism"] = jobs
    for name, text in (options or {}).items():
        name = name.replace("-", "_")
        parameters[name if name in SHARED else f"slurm_{name}"] = int(text) if text.isdecimal() else text
    try:
        executor = submitit.AutoExecutor(root / "slurm", cluster=cluster, slurm_max_num_timeout=RETURNS)
        executor.update_parameters(**parameters)
    except (RuntimeError, NameError, TypeError) as error:
        raise ValueError(f"--launcher=slurm: {error}") from None
    if not wanted:
        return []
    commands = [run.command() for run in wanted]
    logs = [str(run.log) for run in wanted]
    try:
        return executor.map_array(Job(), commands, logs, [local.shared_cache(root)] * len(wanted))
    except submitit.core.utils.FailedJobError as error:
        raise ValueError(f"--launcher=slurm: {error}") from None
