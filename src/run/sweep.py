"""What a sweep does beside its jobs, as a Hydra callback (`hydra.callbacks` in configs/hydra/default.yaml).

A job that fails leaves its traceback as `error.txt` in its directory, and the others go on. At the end, which may be
Ctrl-C, stands a table of all jobs begun, saved as `sweep.csv` in the directory of the sweep, and what to type next. The
exit code is 1 if a job failed, and 130 after Ctrl-C.
"""

import atexit
import json
import math
import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

import pandas as pd
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polls.threads import share_cores
from run.checkpoints import write
from run.resume import quoted
from run.summary import shown

REPORT = Path(__file__).parents[1] / "report.py"  # what shows a sweep
STYLES = {"failed": "red", "interrupted": "yellow"}


class Sweep(Callback):
    """Keeps a sweep going, and sums it up.

    Args:
        metric: the held-out metric of the table.
    """

    def __init__(self, metric: str = "test/exact_match"):
        self.metric = metric

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        share_cores(config.hydra.launcher.get("n_jobs", 1))  # of the joblib launcher
        (Path(config.hydra.runtime.output_dir) / "error.txt").unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if job_return.status != JobStatus.FAILED:
            return
        error, directory = job_return._return_value, Path(config.hydra.runtime.output_dir)  # the property raises it
        (directory / "error.txt").write_text("".join(traceback.format_exception(error)))
        if config.hydra.mode == RunMode.MULTIRUN:
            print(f"Failed: {' '.join(job_return.overrides)}: {last_line(error)}", file=sys.stderr, flush=True)
            job_return.status, job_return.return_value = JobStatus.COMPLETED, math.nan  # Hydra would end the sweep

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        atexit.register(self.sum_up, config)  # Hydra calls nothing when an exit, as by Ctrl-C, ends the sweep

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        atexit.unregister(self.sum_up)
        if not self.sum_up(config, ended=True)["status"].isin(["done", "kept"]).all():
            sys.exit(1)

    def sum_up(self, config: DictConfig, ended: bool = False) -> pd.DataFrame:
        """Print and save the table of the jobs that have begun, and say what to type next; `ended`: no job is left."""
        directory, console = Path(config.hydra.sweep.dir).absolute(), Console()
        jobs = read_jobs(directory, self.metric)
        if len(jobs):
            console.print(
                draw(jobs, self.metric, f"sweep of {len(jobs)} jobs" if ended else "stopped sweep: the jobs begun")
            )
        for line in closing_lines(directory, jobs, config, ended):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        if len(jobs):
            write(directory / "sweep.csv", jobs.to_csv(index=False))
        return jobs


def last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def read_jobs(directory: Path, metric: str) -> pd.DataFrame:
    """One row a job below the directory of a sweep: job, override, status, the metric, seconds, error.

    The status is done, kept (it was finished before), failed or interrupted.
    """
    rows = []
    for overrides in sorted(directory.glob("*/.hydra/overrides.yaml"), key=lambda path: natural(path.parents[1].name)):
        job = overrides.parents[1]
        row = {"job": job.name, "override": " ".join(OmegaConf.load(overrides)), "status": "interrupted"}
        if (job / "error.txt").exists():
            row |= {"status": "failed", "error": (job / "error.txt").read_text().strip().splitlines()[-1]}
        elif (job / "summary.json").exists():
            summary = json.loads((job / "summary.json").read_text())
            if summary["stopped_by"] != "interrupted":
                # Hydra writes the overrides when a job starts
                kept = (job / "summary.json").stat().st_mtime < overrides.stat().st_mtime
                row["status"] = "kept" if kept else "done"
            row |= {metric: summary["test"].get(metric), "seconds": summary["seconds"]}
        rows.append(row)
    return pd.DataFrame(rows, columns=["job", "override", "status", metric, "seconds", "error"])


def natural(name: str) -> tuple[int, str]:
    return (int(name), "") if name.isdigit() else (sys.maxsize, name)


def draw(jobs: pd.DataFrame, metric: str, title: str) -> Table:
    """The table as it is printed; the title ends with what all jobs share."""
    words = [override.split() for override in jobs["override"]]
    shared = [word for word in words[0] if all(word in other for other in words)] if len(words) > 1 else []
    table = Table("job", "override", "status", title=escape(" ".join([title, *shared])))
    for column in (metric, "seconds"):
        table.add_column(column, justify="right")
    for job in jobs.itertuples(index=False):
        value, seconds = job[3], job[4]
        numbers = ("" if pd.isna(value) else f"{value:.4f}", "" if pd.isna(seconds) else f"{seconds:.1f}")
        own = " ".join(word for word in job.override.split() if word not in shared)
        table.add_row(job.job, escape(own), job.status, *numbers, style=STYLES.get(job.status))
    return table


def closing_lines(directory: Path, jobs: pd.DataFrame, config: DictConfig, ended: bool) -> list[str]:
    """What to type next."""
    here, report = (shlex.quote(shown(p)) for p in (directory, REPORT))
    lines = [f"Sweep: {here} (sweep.csv holds the table)"] if len(jobs) else []
    if jobs["status"].isin(["done", "kept"]).any():
        lines += [f"Table: python {report} tables {here}", f"Plot:  python {report} figures {here}"]
    failed = int((jobs["status"] == "failed").sum())
    if failed:
        lines.append(f"{failed} of {len(jobs)} jobs failed; the reasons are in {here}/<job>/error.txt")
    if failed or not ended:
        lines.append(f"{'Again' if ended else 'Go on with'}: {command(config, directory)}")
    return lines


def command(config: DictConfig, directory: Path) -> str:
    """The command that runs what is missing of a sweep."""
    own = ("hydra.sweep.dir=", "resume=")
    given = [*config.hydra.overrides.hydra, *config.hydra.overrides.task]
    given = [o for o in given if not o.startswith(own) and o != "hydra.mode=MULTIRUN"]
    name = [f"--config-name={config.hydra.job.config_name}"]
    resume = ["resume=auto"] * ("resume" in config)
    place = f"hydra.sweep.dir={quoted(shown(directory))}"
    return shlex.join(["python", sys.argv[0], "-m", *name, *given, place, *resume])
