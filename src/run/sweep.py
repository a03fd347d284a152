"""What a sweep does beside its jobs, as a Hydra callback (`hydra.callbacks` in configs/hydra/default.yaml).

A job that fails leaves its traceback as `error.txt` in its directory, and the others go on. At the end, which may be
Ctrl-C, stands a table of all jobs begun, saved as `sweep.csv` in the directory of the sweep, and what to type next. The
exit code is 1 if a job failed, and 130 after Ctrl-C.
"""

import atexit
import io
import math
import shlex
import sys
import traceback
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from config.compose import given
from results.runs import RunError, by_number, read_run
from run.directory import TRAIN, quoted, to_type, typed, write


class Sweep(Callback):
    """Keeps a sweep going, and sums it up.

    Args:
        metric: the held-out metric of the table.
        stop_at_failure: whether the first job that fails ends the sweep.
    """

    def __init__(self, metric: str = "test/exact_match", stop_at_failure: bool = False):
        self.metric, self.stop_at_failure = metric, stop_at_failure

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        from polls.threads import share_cores  # only here: torch would slow down every answer of Hydra

        share_cores(config.hydra.launcher.get("n_jobs", 1))  # of the joblib launcher
        Path(config.hydra.runtime.output_dir, "error.txt").unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if job_return.status != JobStatus.FAILED:
            return
        try:
            with redirect_stderr(io.StringIO()):  # where Hydra announces what it raises
                _ = job_return.return_value
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
        write(Path(config.hydra.runtime.output_dir, "error.txt"), text)
        if config.hydra.mode == RunMode.MULTIRUN:
            reason = text.strip().splitlines()[-1]
            print(f"Failed: {' '.join(job_return.overrides or ())}: {reason}", file=sys.stderr, flush=True)
            if self.stop_at_failure:
                sys.exit(1)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, math.nan  # Hydra would end the sweep

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        atexit.register(self.sum_up, config)  # Hydra calls nothing when an exit, as by Ctrl-C, ends the sweep

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        atexit.unregister(self.sum_up)
        try:
            jobs = self.sum_up(config, ended=True)
        except Exception:  # Hydra would make a warning of it, and end with exit code 0
            traceback.print_exc()
            sys.exit(1)
        if any(job["status"] != "done" for job in jobs):
            sys.exit(1)

    def sum_up(self, config: DictConfig, ended: bool = False) -> list[dict[str, Any]]:
        """Print and save the table of the jobs that have begun, and say what to type next; `ended`: no job is left."""
        import pandas as pd  # only here: it would slow down every answer of Hydra

        directory = Path(config.hydra.sweep.dir).absolute()
        jobs = read_jobs(directory, self.metric)
        if not jobs:  # an exit before the first of them, as when the command is refused
            return []
        table = pd.DataFrame(jobs)
        write(directory / "sweep.csv", table.to_csv(index=False))
        print(f"sweep of {len(jobs)} jobs" if ended else "stopped sweep: the jobs begun")
        print(table.drop(columns="error").to_string(index=False, na_rep=""))
        for line in closing_lines(directory, jobs, config, ended):
            print(line)
        return jobs


def read_jobs(directory: Path, metric: str) -> list[dict[str, Any]]:
    """The jobs of a sweep that have begun, in order: job, override, status, the metric, seconds, error.

    The status is done, failed or interrupted.
    """
    jobs = []
    begun = {file.parents[1] for file in directory.rglob(".hydra/overrides.yaml")}  # Hydra writes it when a job begins
    for place in by_number(begun | {file.parent for file in directory.rglob("error.txt")}):  # or it was told not to
        overrides = place / ".hydra" / "overrides.yaml"
        job: dict[str, Any] = {
            "job": str(place.relative_to(directory)),
            "override": " ".join(yaml.safe_load(overrides.read_text()) if overrides.exists() else []),
            "status": "interrupted",
            **dict.fromkeys([metric, "seconds", "error"]),
        }
        if (place / "error.txt").exists():
            job |= {"status": "failed", "error": (place / "error.txt").read_text().strip().splitlines()[-1]}
        else:
            with suppress(RunError):  # it was stopped before, or while it wrote
                run = read_run(place)
                if run.summary and run.finished:
                    test, seconds = run.summary["test"], run.summary["seconds"]
                    job |= {"status": "done", metric: test.get(metric), "seconds": seconds}
        jobs.append(job)
    return jobs


def closing_lines(directory: Path, jobs: list[dict[str, Any]], config: DictConfig, ended: bool) -> list[str]:
    """What to type next."""
    here, report = (shlex.quote(typed(path)) for path in (directory, TRAIN.with_name("report.py")))
    lines = [f"Sweep: {here} (sweep.csv holds the table)"]
    if any(job["status"] == "done" for job in jobs):
        lines += [f"Table: python {report} tables {here}", f"Plot:  python {report} figures {here}"]
    failed = sum(job["status"] == "failed" for job in jobs)
    if failed:
        lines.append(f"{failed} of {len(jobs)} jobs failed; the reasons are in {here}/<job>/error.txt")
    if failed or not ended:
        own = ("hydra.sweep.dir=", "hydra.mode=")
        kept = [word for word in given(config.hydra, "hydra") if not word.startswith(own)]
        more = [*kept, f"hydra.sweep.dir={quoted(typed(directory))}", "resume=auto"]
        lines.append(f"{'Again' if ended else 'Go on with'}: {to_type([typed(TRAIN), '-m'], config.hydra, *more)}")
    return lines
