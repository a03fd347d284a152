"""What each part of the search is worth: evaluations and seconds that each variant needs to solve its task.

python src/train.py -m experiment=ablation_parity     every variant, seeds 0-4 (hours)
python src/report.py ablation runs/sweep_A runs/sweep_B      the figure, and the table in Markdown
python src/report.py ablation runs/sweep_C --by model.embedding_std    the same over the values of a key
python src/report.py ablation report/results/x.csv                     from rows that were kept, see report.py collect

A run that ended without solving its task is censored: it would have needed more than it had.
"""

import math
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from results.figures import closed, save
from results.runs import Run, RunError
from results.tables import markdown, read_summaries

OUTCOMES = {True: "solved", False: "not solved: it needs more than this"}
VARIANT = "choices.variant"  # the key that is compared unless another one is given
ABSENT = object()  # the value of a key that a config does not have
COSTS = {"evaluations": "function evaluations to solve", "seconds": "training seconds to solve"}


def read_costs(*paths: str | Path, by: str = VARIANT) -> pd.DataFrame:
    """One row per finished run below the paths, or kept in a CSV: task, label, seed, evaluations, seconds, solved.

    Args:
        paths: directories of sweeps, or CSVs that `report.py collect` wrote.
        by: the key of the config whose values are compared; the optimizer is added where it differs.

    Raises:
        RunError: no finished run with such a key lies below the paths; CSVs know no key but that of variants.
    """

    def label(run: Run) -> dict[str, Any]:
        value = OmegaConf.select(run.config, by, default=ABSENT)
        if value is ABSENT or (value is None and by == VARIANT):
            return {"label": ABSENT}
        return {"label": "null" if value is None else value}

    runs = read_summaries(*paths, more=label)
    if "label" in runs:
        runs = runs[runs.label.map(lambda value: value is not ABSENT)]
        if runs.empty:
            raise RunError(f"no run has {by}; compare another key with --by, such as --by choices.optimizer")
    if "label" not in runs:  # kept rows
        if by != VARIANT or (runs.variant == "").any():
            raise RunError("kept rows are compared by their variant only, and all need one")
        runs["label"] = runs.variant
    order = sorted(runs.index, key=lambda i: (runs.task[i], *rank(runs.label[i]), runs.seed[i]))
    runs = runs.loc[order].astype({"label": str})
    if by != VARIANT and runs.optimizer.nunique() > 1:  # a variant says which optimizer it is of
        runs["label"] += " · " + runs.optimizer
    return runs.assign(task=runs.task.str.removeprefix("ablation_"), solved=runs.stopped_by == "solved")


def rank(label: Any) -> tuple[bool, float, str]:
    """A key that sorts the whole search first, numbers by size, and words behind them."""
    return label != "full", label if isinstance(label, int | float) else math.inf, str(label)


def median(runs: pd.DataFrame, cost: str) -> str:
    """The median of a cost, or a lower bound of it, marked ">", where the run in the middle is censored.

    A censored run needs more than it had, so it counts as dearer than every solved one.
    """
    solved = runs.solved.sum() > len(runs) // 2
    return f"{'' if solved else '> '}{runs[cost].median():,.{1 if cost == 'seconds' else 0}f}"


def ablation_table(runs: pd.DataFrame, by: str = VARIANT, costs: Sequence[str] = tuple(COSTS)) -> str:
    """A row for each task and label, as a Markdown table."""
    return markdown(
        [
            {"task": task, by.removeprefix("choices."): label, "solved / seeds": f"{of.solved.sum()} / {len(of)}"}
            | {f"{cost}: median": median(of, cost) for cost in costs}
            for (task, label), of in runs.groupby(["task", "label"], sort=False)
        ]
    )


def draw_ablation(runs: pd.DataFrame, by: str = VARIANT, costs: Sequence[str] = tuple(COSTS)) -> Figure:
    """A row of panels per task, a column per cost: a dot per seed, an arrow to the right for a censored run."""
    rows = runs.assign(outcome=runs.solved.map(OUTCOMES)).melt(["task", "label", "outcome"], [*costs], "cost", "spent")
    height = 0.9 + 0.42 * runs.label.nunique()
    looks: dict[str, Any] = dict(
        hue="outcome", style="outcome", markers=dict(zip(OUTCOMES.values(), "o>", strict=True))
    )
    looks |= dict(s=60, height=height, aspect=6 / height, facet_kws=dict(sharex=False))
    sns.set_theme(style="whitegrid", context="notebook")
    grid = sns.relplot(rows, x="spent", y="label", row="task", col="cost", **looks)
    grid.set(xlim=(0, None)).set_titles("{row_name}").set_axis_labels("", by.removeprefix("choices."))
    for (_, cost), panel in grid.axes_dict.items():
        panel.set_xlabel(COSTS[cost])
    return closed(grid)


def main(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("paths", nargs="+", type=Path, help="directories of sweeps, or CSVs")
    parser.add_argument("--by", default=VARIANT, metavar="KEY", help="the key that was swept")
    parser.add_argument("--costs", nargs="+", default=[*COSTS], choices=COSTS, help="those to show; all by default")
    parser.add_argument("--output", type=Path, help="the picture to write (default: ablation.png at the first path)")
    args = parser.parse_args(arguments)
    runs = read_costs(*args.paths, by=args.by)
    print(ablation_table(runs, args.by, args.costs), end="\n\n")
    first = args.paths[0]
    output = args.output or (first if first.is_dir() else first.parent) / "ablation.png"
    save(draw_ablation(runs, args.by, args.costs), output, f"{len(runs)} run(s)")
