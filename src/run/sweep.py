"""What a sweep does beside its jobs, as a Hydra callback (`hydra.callbacks` in configs/hydra/default.yaml).

A job that fails leaves its traceback as `error.txt` in its directory, and the others go on. At the end, which may be
Ctrl-C, stands a table of all jobs begun, saved as `sweep.csv` in the directory of the sweep, and what to type next. The
exit code is 1 if a job failed, and 130 after Ctrl-C.
"""

import atexit
import csv
import io
import json
import math
import shlex
import sys
import time
import traceback
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from config.compose import given
from results.runs import RunError, read_run
from run.files import quoted, typed, write

REPORT = Path(__file__).parents[1] / "report.py"  # what shows a sweep
ENDED = ("done", "kept")
STYLES = {"failed": "red", "interrupted": "yellow"}
BEGUN = ".jobs"  # in the directory of the sweep: a file per job that has begun, wherever its own directory lies


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
        directory = Path(config.hydra.runtime.output_dir)
        (directory / "error.txt").unlink(missing_ok=True)
        if config.hydra.mode == RunMode.MULTIRUN:
            begun = {"directory": str(directory), "override": given(config.hydra), "at": time.time()}
            write(Path(config.hydra.sweep.dir, BEGUN, f"{config.hydra.job.num}.json"), json.dumps(begun))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if job_return.status != JobStatus.FAILED:
            return
        error = failure(job_return)
        write(Path(config.hydra.runtime.output_dir, "error.txt"), "".join(traceback.format_exception(error)))
        if config.hydra.mode == RunMode.MULTIRUN:
            reason = traceback.format_exception_only(error)[-1].strip()
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
        if any(job["status"] not in ENDED for job in jobs):
            sys.exit(1)

    def sum_up(self, config: DictConfig, ended: bool = False) -> list[dict[str, Any]]:
        """Print and save the table of the jobs that have begun, and say what to type next; `ended`: no job is left."""
        directory, console = Path(config.hydra.sweep.dir).absolute(), Console()
        jobs = read_jobs(directory, self.metric)
        if not jobs:  # an exit before the first of them, as when the command is refused
            return []
        title = f"sweep of {len(jobs)} jobs" if ended else "stopped sweep: the jobs begun"
        console.print(jobs_table(jobs, self.metric, title))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([jobs[0], *(job.values() for job in jobs)])
        write(directory / "sweep.csv", text.getvalue())
        for line in closing_lines(directory, jobs, config, ended):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        return jobs


def failure(job_return: JobReturn) -> BaseException:
    """The exception that ended a failed job."""
    try:
        with redirect_stderr(io.StringIO()):  # where Hydra announces what it raises
            _ = job_return.return_value
    except BaseException as error:
        return error
    raise ValueError("the job has not failed")


def read_jobs(directory: Path, metric: str) -> list[dict[str, Any]]:
    """The jobs of a sweep that have begun, by number: job, override, status, the metric, seconds, error.

    The status is done, kept (it was finished before), failed or interrupted.
    """
    jobs = []
    for file in sorted((directory / BEGUN).glob("*.json"), key=lambda file: int(file.stem)):
        begun = json.loads(file.read_text())
        place = Path(begun["directory"])
        job = dict.fromkeys(["job", "override", "status", metric, "seconds", "error"])
        job["job"] = str(place.relative_to(directory) if place.is_relative_to(directory) else place)
        job |= {"override": " ".join(begun["override"]), "status": "interrupted"}
        error, summary = place / "error.txt", place / "summary.json"
        if error.exists():
            job |= {"status": "failed", "error": error.read_text().strip().splitlines()[-1]}
        elif summary.exists():
            with suppress(RunError):  # it was stopped while it wrote
                run = read_run(place)
                values = run.of_summary("test", "seconds")
                job |= {metric: values["test"].get(metric), "seconds": values["seconds"]}
                if run.finished:
                    job["status"] = "kept" if summary.stat().st_mtime < begun["at"] else "done"
        jobs.append(job)
    return jobs


def jobs_table(jobs: list[dict[str, Any]], metric: str, title: str) -> Table:
    """The table as it is printed; the title ends with what all jobs share."""
    words = [job["override"].split() for job in jobs]
    shared = [word for word in words[0] if all(word in other for other in words)] if len(words) > 1 else []
    table = Table("job", "override", "status", title=escape(" ".join([title, *shared])))
    for column in (metric, "seconds"):
        table.add_column(column, justify="right")
    for job, own in zip(jobs, words, strict=True):
        value = "" if job[metric] is None else f"{job[metric]:.4f}"
        seconds = "" if job["seconds"] is None else f"{job['seconds']:.1f}"
        override = escape(" ".join(word for word in own if word not in shared))
        table.add_row(job["job"], override, job["status"], value, seconds, style=STYLES.get(job["status"]))
    return table


def closing_lines(directory: Path, jobs: list[dict[str, Any]], config: DictConfig, ended: bool) -> list[str]:
    """What to type next."""
    here, report = (shlex.quote(typed(path)) for path in (directory, REPORT))
    lines = [f"Sweep: {here} (sweep.csv holds the table)"]
    if any(job["status"] in ENDED for job in jobs):
        lines += [f"Table: python {report} tables {here}", f"Plot:  python {report} figures {here}"]
    failed = sum(job["status"] == "failed" for job in jobs)
    if failed:
        lines.append(f"{failed} of {len(jobs)} jobs failed; the reasons are in {here}/<job>/error.txt")
    if failed or not ended:
        own = ("hydra.sweep.dir=", "hydra.mode=", "resume=")
        words = [word for word in [*given(config.hydra, "hydra"), *given(config.hydra)] if not word.startswith(own)]
        words += [f"hydra.sweep.dir={quoted(typed(directory))}", *(["resume=auto"] if "resume" in config else [])]
        again = shlex.join(["python", sys.argv[0], "-m", f"--config-name={config.hydra.job.config_name}", *words])
        lines.append(f"{'Again' if ended else 'Go on with'}: {again}")
    return lines
