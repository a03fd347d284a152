"""A table of finished runs, in Markdown: a row for the runs of the same task, model, optimizer, variant and settings.

python src/report.py tables runs
python src/report.py tables runs --metric test/balanced_accuracy
python src/report.py tables report/results/solved.csv    from rows that were kept, see report.py collect
"""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from results.runs import KIND, OUTCOME, Run, RunError, kept_and_directories, name_settings, read_all, read_kept

LOWER_IS_BETTER = ("loss", "bits_per_character")  # ends of the names of metrics
SOLVED = 0.99  # a run with at least this value of the metric counts as solved


def read_summaries(*paths: str | Path, more: Callable[[Run], dict[str, Any]] = lambda run: {}) -> pd.DataFrame:
    """One row per finished run below the paths, or kept in a CSV: what it was, its settings, outcome and metrics.

    Args:
        paths: directories, or CSVs that `report.py collect` wrote.
        more: what else is told of a run.
    """
    kept, directories = kept_and_directories(paths)
    tables = [read_kept(path, na_values=["nan"]) for path in kept]
    for table in tables:  # of tasks that measure different things
        measured = [name for name in table if name.startswith("test/")]
        table[measured] = table[measured].apply(pd.to_numeric)
    if kept and not directories:
        return pd.concat(tables, ignore_index=True)

    def row_of(run: Run) -> dict[str, Any]:
        outcome = {name: (run.summary or {})[name] for name in OUTCOME}
        metrics = outcome.pop("test")
        return run.description | {"settings": ""} | more(run) | outcome | metrics

    found = read_all(*directories, read=lambda run: (row_of(run), run.config), finished_only=True)
    settings = name_settings([config for _, config in found])
    tables.append(pd.DataFrame(row for row, _ in found).assign(settings=settings))
    return pd.concat(tables, ignore_index=True)


def summary_table(runs: pd.DataFrame, metric: str = "test/exact_match") -> str:
    """Mean and spread of a held-out metric over the seeds of every kind of run, as a Markdown table.

    Args:
        runs: as `read_summaries` returns them.
        metric: its name; RunError if no run has it.
    """
    if metric not in runs:
        known = ", ".join(sorted(column for column in runs if column.startswith("test/")))
        raise RunError(f"no run has {metric}; known: {known}")
    lower = metric.endswith(LOWER_IS_BETTER)
    worst = max if lower else min
    rows = [
        {
            "task": ", ".join(filter(None, [task, settings])),
            "model": model,
            "optimizer": f"{optimizer} {variant}".strip(),
            **({"runs": f"{len(of)}"} if lower else {"solved / runs": f"{(of[metric] >= SOLVED).sum()} / {len(of)}"}),
            f"mean (worst) {metric.removeprefix('test/')}": f"{of[metric].mean():.3f} ({worst(of[metric]):.3f})",
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
    parser.add_argument("paths", nargs="+", type=Path, help="run directories, directories of runs, or CSVs")
    parser.add_argument("--metric", default="test/exact_match", help="the held-out metric to report")
    args = parser.parse_args(arguments)
    print(summary_table(read_summaries(*args.paths), args.metric))
