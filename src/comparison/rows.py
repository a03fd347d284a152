"""What came of the runs of a comparison: a row and a curve per run, and the setting that tuning chose."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import get_class

from comparison.plan import REPORTED, Job, Plan, Target, name_of, pairs, reported_jobs, tuning_jobs
from results.collect import origin
from results.runs import Run, RunError, by_position
from run.directory import replacing, write
from search.base import LossOnlyOptimizer

GRADIENT_STEP = 3  # function evaluations that a step by gradients is charged: a backward costs about two forwards
KEY = ["task", "contender", "setting", "phase", "seed"]  # what tells the runs of a comparison apart
POINTS = 60  # of a curve that are kept, at the most
CURVES = ("val/loss", "val/exact_match")


def row_of(job: Job, run: Run, target: Target) -> dict[str, Any]:
    """What a finished run came to. `solved_at_...` is the cost when validation first met the target, or NaN."""
    curve, summary = curve_of(job, run), run.summary or {}
    best = curve[curve.metric == "val/loss"].value.min()
    met = curve[(curve.metric == target.metric) & target.met(curve.value)]
    solved = {f"solved_at_{cost}": met[cost].min() if len(met) else np.nan for cost in ("evaluations", "seconds")}
    counts = {
        "steps": summary["steps"],
        "evaluations": summary["evaluations"] * charge(run),
        "tokens_per_evaluation": summary.get("tokens_per_batch"),
        "seconds": summary["seconds"],
        "stopped_by": summary["stopped_by"],
        "val/loss": best,
    }
    tested = {name: value for name, value in summary["test"].items() if not by_position(name)}
    return key_of(job) | origin(run) | counts | solved | tested


def key_of(job: Job) -> dict[str, Any]:
    return dict(zip(KEY, (job.task, job.contender, name_of(job.setting), job.phase, job.seed), strict=True))


def charge(run: Run) -> int:
    """Function evaluations that the run's own count of one stands for."""
    return 1 if issubclass(get_class(run.config.optimizer["_target_"]), LossOnlyOptimizer) else GRADIENT_STEP


def curve_of(job: Job, run: Run) -> pd.DataFrame:
    """The validations of a run: KEY, evaluations, seconds, metric, value; a gradient step charged GRADIENT_STEP."""
    table = run.metrics()
    table = table[table.metric.isin(CURVES)].assign(evaluations=lambda t: t.evaluations * charge(run))
    return table.assign(**key_of(job))[[*KEY, "evaluations", "seconds", "metric", "value"]]


def thinned(curve: pd.DataFrame) -> pd.DataFrame:
    """A curve with at most POINTS validations of each metric, evenly spread over the logarithm of their number."""

    def some(of: pd.DataFrame) -> pd.DataFrame:
        chosen = np.unique(np.geomspace(1, len(of), min(POINTS, len(of))).round().astype(int) - 1)
        return of.iloc[chosen]

    return pd.concat([some(of) for _, of in curve.groupby("metric", sort=False)]) if len(curve) else curve


# --- tables on the disk, next to each other: NAME.csv has a row per run, NAME_curves.csv.gz the curves ---


def curves_path(rows: Path) -> Path:
    return rows.with_name(f"{rows.stem}_curves.csv.gz")


def read_table(path: Path) -> pd.DataFrame:
    """The rows kept in a file; none if it does not exist yet."""
    if not path.exists():
        return pd.DataFrame(columns=[*KEY, "command"])
    return pd.read_csv(path, dtype={"commit": str, "setting": str}).fillna({"setting": "", "variant": ""})


def keep(path: Path, jobs: Sequence[Job], runs: Sequence[Run], plan: Plan) -> pd.DataFrame:
    """Add finished runs to the tables, in the place of rows of the same key; returns all rows.

    Each table is written as a whole or not at all, the curves first: no row is without its curve.
    """
    found = list(zip(jobs, runs, strict=True))
    rows = pd.DataFrame([row_of(job, run, plan.tasks[job.task].target) for job, run in found])
    curves = pd.concat([thinned(curve_of(job, run)) for job, run in found])
    rows, curves = replaced(read_table(path), rows), replaced(read_table(curves_path(path)), curves)
    with replacing(curves_path(path)) as file:
        curves.to_csv(file, index=False, float_format="%.6g", compression={"method": "gzip", "mtime": 0})
    write(path, rows.to_csv(index=False))
    return rows


def replaced(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Both tables as one; of a key in both, the rows of the new one."""
    if old.empty:
        return new.sort_values(KEY, kind="stable", ignore_index=True)
    stale = old.set_index(KEY).index.isin(new.set_index(KEY).index)
    return pd.concat([old[~stale], new]).sort_values(KEY, kind="stable", ignore_index=True)


def best_setting(plan: Plan, rows: pd.DataFrame, task: str, contender: str) -> dict[str, Any]:
    """The setting whose run of tuning met the target in the fewest seconds; if none did, that with the lowest loss.

    Raises:
        RunError: no run of the tuning has ended.
    """
    settings = plan.contenders[contender].settings
    jobs = tuning_jobs(plan, task, contender)
    if not jobs:
        return settings[0]
    commands = [job.command for job in jobs]
    tried = rows[rows.command.isin(commands) & (rows.contender == contender)]
    if tried.empty:
        raise RunError(f"no run of the tuning of {contender} on {task} has ended")
    tried = tried.sort_values(["solved_at_seconds", "val/loss"])  # NaN comes last
    return settings[commands.index(tried.command.iloc[0])]


def reported(plan: Plan, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that are reported, in the order of the plan, with whether each run solved its task.

    They are those of the settings that the tuning chooses, as the plan is now: others may be left of an earlier one.
    """
    commands: list[str] = []
    for task, contender in pairs(plan):
        with suppress(RunError):  # not tuned yet
            jobs = reported_jobs(plan, task, contender, best_setting(plan, rows, task, contender))
            commands += [job.command for job in jobs]
    place = {command: number for number, command in enumerate(commands)}
    rows = rows[(rows.phase == REPORTED) & rows.command.isin(commands)]
    rows = rows.loc[rows.command.map(place).sort_values(kind="stable").index]
    return rows.assign(solved=rows.solved_at_evaluations.notna())


def summary_of(plan: Plan, rows: pd.DataFrame) -> list[dict[str, str]]:
    """A row for each task and contender: runs solved, costs to solve, and what was tested; medians and ranges."""
    found = []
    for (task, contender), of in reported(plan, rows).groupby(["task", "contender"], sort=False):
        missing = len(plan.seeds[: plan.tasks[task].seeds]) - len(of)
        found.append(
            {
                "task": task,
                "contender": contender,
                "setting": of.setting.iloc[0],
                "solved / seeds": f"{of.solved.sum()} / {len(of)}" + (f", {missing} missing" if missing else ""),
                "evaluations to solve": spread(of.solved_at_evaluations, of.evaluations, ",.0f"),
                "seconds to solve": spread(of.solved_at_seconds, of.seconds, ",.1f"),
                "test loss": ranged(of["test/loss"], ".4f"),
                "test exact match": ranged(of["test/exact_match"], ".3f"),
            }
        )
    return found


def overview_of(plan: Plan, rows: pd.DataFrame) -> list[dict[str, str]]:
    """A row for each contender and a column for each task: runs solved, and the median seconds where most are."""
    rows = reported(plan, rows)
    tasks = [task for task in plan.tasks if task in set(rows.task)]
    found = []
    for contender in plan.contenders:
        of = rows[rows.contender == contender]
        if len(of):
            cells = {task: solved_in(of[of.task == task]) for task in tasks}
            found.append({"contender": contender, **cells, "all": f"{of.solved.sum()} / {len(of)}"})
    return found


def solved_in(rows: pd.DataFrame) -> str:
    """How many of the runs solved, and in how many seconds, the median, if more than half did."""
    if rows.empty:
        return ""
    seconds = rows.solved_at_seconds.fillna(np.inf).median()
    return f"{rows.solved.sum()} / {len(rows)}" + (f" in {seconds:.1f} s" if rows.solved.mean() > 0.5 else "")


def spread(solved: pd.Series, spent: pd.Series, form: str) -> str:
    """Median and range of a cost to solve; where at most half of the runs solved, more than any of the others spent."""
    if solved.notna().sum() * 2 <= len(solved):
        return f"> {spent[solved.isna()].max():{form}}"
    worst = f"{solved.max():{form}}" if solved.notna().all() else "not solved"
    return f"{solved.fillna(np.inf).median():{form}} ({solved.min():{form}} to {worst})"


def ranged(values: pd.Series, form: str) -> str:
    """Median and range."""
    return f"{values.median():{form}} ({values.min():{form}} to {values.max():{form}})"
