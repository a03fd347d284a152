"""A table of finished runs, in Markdown: a row for the runs of the same task, model, optimizer, variant and settings.

python src/report.py tables runs
python src/report.py tables runs --metric test/balanced_accuracy
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from results.runs import KIND, Run, RunError, name_settings, read_all

SOLVED = 0.99  # a run with at least this value of the metric counts as solved


def read_summaries(*paths: str | Path) -> pd.DataFrame:
    """One row per finished run below the paths: what it was, its settings, its summary and its test metrics."""

    def values(run: Run) -> tuple[Run, dict[str, Any]]:
        summary = run.of_summary("test", "steps", "evaluations", "seconds", "stopped_by")
        return run, summary.pop("test") | summary

    found = read_all(*paths, read=values, finished_only=True)
    settings = name_settings([run.config for run, _ in found])
    return pd.DataFrame(
        run.description | {"settings": of_run} | row for (run, row), of_run in zip(found, settings, strict=True)
    )


def summary_table(runs: pd.DataFrame, metric: str = "test/exact_match") -> str:
    """Mean and spread of a held-out metric over the seeds of every kind of run, as a Markdown table.

    Args:
        runs: as `read_summaries` returns them.
        metric: its name; RunError if no run has it.
    """
    if metric not in runs:
        known = ", ".join(sorted(column for column in runs if column.startswith("test/")))
        raise RunError(f"no run has {metric}; known: {known}")
    rows = [
        {
            "task": ", ".join(filter(None, [task, settings])),
            "model": model,
            "optimizer": f"{optimizer} {variant}".strip(),
            "solved / runs": f"{(of[metric] >= SOLVED).sum()} / {len(of)}",
            f"mean (worst) {metric.removeprefix('test/')}": f"{of[metric].mean():.3f} ({of[metric].min():.3f})",
            "steps": f"{of.steps.median():,.0f}",
            "seconds (worst)": f"{of.seconds.median():.1f} ({of.seconds.max():.1f})",
            "evaluations": f"{of.evaluations.median():,.0f}",
            "stopped by": ", ".join(f"{reason} {count}" for reason, count in of.stopped_by.value_counts().items()),
        }
        for (task, model, optimizer, variant, settings), of in runs.groupby([*KIND, "settings"], sort=False)
    ]
    return markdown(rows)


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table of rows with the same columns."""
    lines = [[*rows[0]], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("paths", nargs="+", type=Path, help="run directories, or directories of runs")
    parser.add_argument("--metric", default="test/exact_match", help="the held-out metric to report")
    args = parser.parse_args(arguments)
    print(summary_table(read_summaries(*args.paths), args.metric))
