"""Runs the jobs of a comparison, some at a time, each as the command that it is. What is complete is not run again."""

import contextlib
import multiprocessing
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import timedelta
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pandas as pd
from rich.console import Console

from comparison.plan import REPORTED, TUNING, Job, Plan, job_of, pairs, reported_jobs, tuning_jobs
from comparison.rows import KEY, best_setting, keep, key_of, read_table
from config.check import checked_config
from config.refusal import ConfigError
from polls.threads import share_cores
from results.collect import origin
from results.runs import RunError, read_run
from run.directory import TRAIN, quoted

OVERHEAD = 1.5  # seconds that a run takes beside its training, for the time that is left


class Comparison:
    """A comparison that runs, task after task: first the tuning of all contenders, then the seeds that are reported.

    Args:
        plan: what is compared.
        directory: of the runs.
        output: the CSV with a row per run.
        missing: leave out what has a row already, also if its directory is gone.
        console: gets a line per run.
    """

    def __init__(self, plan: Plan, directory: Path, output: Path, missing: bool, console: Console):
        self.plan, self.directory, self.output, self.console = plan, directory, output, console
        self.rows = read_table(output)
        self.known = {*self.rows.command} if missing else set()

    def run(self) -> None:
        """Run what is missing. A run that fails is named, and the others go on; RunError at the end if some did.

        ConfigError, before anything has begun, if a command cannot run.
        """
        check(self.plan)
        failed: list[str] = []
        with workers(self.plan.processes) as pool:
            for task in self.plan.tasks:
                contenders = [contender for other, contender in pairs(self.plan) if other == task]
                failed += self._run(pool, [job for c in contenders for job in tuning_jobs(self.plan, task, c)])
                reported: list[Job] = []
                for contender in contenders:
                    with contextlib.suppress(RunError):  # its tuning has failed, which has been said
                        setting = best_setting(self.plan, self.rows, task, contender)
                        reported += reported_jobs(self.plan, task, contender, setting)
                failed += self._run(pool, reported)
        if failed:
            raise RunError(f"{len(failed)} run(s) failed: {'; '.join(failed)}")

    def _run(self, pool: ThreadPoolExecutor, jobs: Sequence[Job]) -> list[str]:
        """Run jobs of which none waits for another; returns the directories of those that failed."""
        jobs = [job for job in jobs if job.command not in self.known]
        done = [job for job in jobs if finished(self.directory / job.directory, job)]
        self._keep(done)
        waiting = {
            pool.submit(run_apart, job.words, self.directory / job.directory): job for job in jobs if job not in done
        }
        failed: list[str] = []
        for future in as_completed(waiting):
            job, code = waiting[future], future.result()
            if code:
                log = self.directory / job.directory / "output.txt"
                failed.append(str(log))
                self.console.print(f"Failed with exit code {code}: {log}", soft_wrap=True, highlight=False)
                continue
            row = self._keep([job]).set_index(KEY).loc[tuple(key_of(job).values())]
            solved = f"solved after {row.solved_at_seconds:.1f} s" if pd.notna(row.solved_at_seconds) else "not solved"
            self.console.print(
                f"{job.directory}: {row.evaluations:,.0f} evaluations, {row.seconds:.1f} s, {solved}, "
                f"validation loss {row['val/loss']:.4f}; at most {self.time_left()} left",
                soft_wrap=True,
                highlight=False,
            )
        return failed

    def _keep(self, jobs: Sequence[Job]) -> pd.DataFrame:
        """Add the rows of finished runs to the tables."""
        if jobs:
            self.rows = keep(self.output, jobs, [read_run(self.directory / job.directory) for job in jobs], self.plan)
        return self.rows

    def time_left(self) -> timedelta:
        """What the runs that are missing take at the most."""
        seconds = 0.0
        for task, contender in pairs(self.plan):
            settings, of = self.plan.contenders[contender].settings, self.plan.tasks[task]
            n_tuning = len(settings) if len(settings) > 1 else 0
            wanted = n_tuning * self.plan.tuning_share * of.seconds + len(self.plan.seeds[: of.seeds]) * of.seconds
            seconds += wanted + OVERHEAD * (n_tuning + len(self.plan.seeds[: of.seeds]))
            ran = self.rows[(self.rows.task == task) & (self.rows.contender == contender)]
            for phase, share in ((TUNING, self.plan.tuning_share), (REPORTED, 1.0)):
                seconds -= (ran.phase == phase).sum() * (share * of.seconds + OVERHEAD)
        return timedelta(seconds=round(max(0.0, seconds) / self.plan.processes))


def check(plan: Plan) -> None:
    """Refuse a comparison of which some command cannot run.

    Every task is checked with the first contender, and every setting with the first task it runs on. ConfigError says
    what is wrong.
    """
    first = next(iter(plan.contenders))
    seen: dict[str, str] = {}
    jobs = [job_of(plan, task, first, plan.contenders[first].settings[0], TUNING, 0) for task in plan.tasks]
    for task, contender in pairs(plan):
        if seen.setdefault(contender, task) == task:
            jobs += [job_of(plan, task, contender, s, TUNING, 0) for s in plan.contenders[contender].settings]
    problems = []
    for job in jobs:
        try:
            checked_config(job.words)
        except ConfigError as error:
            problems += [f"{job.task}, {job.contender}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def finished(directory: Path, job: Job) -> bool:
    """Whether this run has ended here, and not one of other words, in whose place it will be refused to start."""
    with contextlib.suppress(RunError):
        run = read_run(directory)
        return run.finished and origin(run)["command"] == job.command
    return False


@contextlib.contextmanager
def workers(processes: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each wait for one command; the commands have one thread each."""
    share_cores(-1)
    before = os.environ.get("PYTHONPATH", "")
    # the server that forks the runs does not know the path of this process, and passes over what it cannot import
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TRAIN.parent.absolute()), before]))
    pool = ThreadPoolExecutor(processes)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        os.environ["PYTHONPATH"] = before


def run_apart(words: Sequence[str], directory: Path) -> int:
    """The exit code of a command in a process of its own, in which the libraries are imported already."""
    process = preloaded().Process(target=run_command, args=(words, directory))
    process.start()
    process.join()
    return process.exitcode or 0


def preloaded() -> ForkServerContext:
    """Makes processes in which all that a run needs is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["run.training"])
    return context


def run_command(words: Sequence[str], directory: Path) -> None:
    """Run `python src/train.py` with these words in this process, and go on where it was stopped.

    What it prints goes to output.txt in its directory, also the reason why it fails. It draws no picture of its own.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "output.txt").open("a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = [str(TRAIN), *words, f"hydra.run.dir={quoted(str(directory))}", "resume=auto", "picture=false"]
    runpy.run_path(str(TRAIN), run_name="__main__")
