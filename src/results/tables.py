"""A table of finished runs, in Markdown: a row for the runs of the same task, model, optimizer, variant and settings.

python src/report.py tables runs
python src/report.py tables runs --metric test/balanced_accuracy
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from results.runs import KIND, Run, RunError, find_runs, name_settings, readable

SOLVED = 0.99  # a run with at least this value of the metric counts as solved


def read_summaries(*paths: str | Path) -> pd.DataFrame:
    """One row per finished run below the paths: what it was, its settings, its summary and its test metrics.

    Raises:
        RunError: no finished run that can be read lies below the paths.
    """

    def values(run: Run) -> tuple[Run, dict[str, Any]]:
        summary = run.of_summary("test", "steps", "evaluations", "seconds", "stopped_by")
        return run, summary.pop("test") | summary

    found = readable(find_runs(*paths, finished_only=True), values)
    if not found:
        raise RunError(f"no run with a whole summary lies below {', '.join(map(str, paths))}")
    settings = name_settings([run.config for run, _ in found])
    return pd.DataFrame(
        asdict(run.description) | {"settings": of_run} | row for (run, row), of_run in zip(found, settings, strict=True)
    )


def summary_table(runs: pd.DataFrame, metric: str = "test/exact_match") -> str:
    """Mean and spread over the seeds of every task, model, optimizer and variant, as a Markdown table.

    Args:
        runs: as `read_summaries` returns them.
        metric: the held-out metric that is reported.

    Raises:
        RunError: no run has the metric.
    """
    if metric not in runs:
        known = ", ".join(sorted(column for column in runs if column.startswith("test/")))
        raise RunError(f"no run has {metric}; known: {known}")
    lines = [
        "| task | model | optimizer | solved / runs | mean (worst) "
        f"{metric.removeprefix('test/')} | steps | seconds (worst) | evaluations | stopped by |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, model, optimizer, variant, settings), of in runs.groupby([*KIND, "settings"], sort=False):
        value, seconds = of[metric], of["seconds"]
        cells = [
            ", ".join(filter(None, [task, settings])),
            model,
            f"{optimizer} {variant}".strip(),
            f"{(value >= SOLVED).sum()} / {len(of)}",
            f"{value.mean():.3f} ({value.min():.3f})",
            f"{of['steps'].median():,.0f}",
            f"{seconds.median():.1f} ({seconds.max():.1f})",
            f"{of['evaluations'].median():,.0f}",
            ", ".join(f"{reason} {count}" for reason, count in of["stopped_by"].value_counts().items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("report.py tables", description=__doc__, formatter_class=look)
    parser.add_argument("paths", nargs="+", type=Path, help="run directories, or directories of runs")
    parser.add_argument("--metric", default="test/exact_match", help="the held-out metric to report")
    args = parser.parse_args(arguments)
    print(summary_table(read_summaries(*args.paths), args.metric))
