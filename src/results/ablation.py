"""What each part of the search is worth: evaluations and seconds that each variant needs to solve its task.

python src/train.py -m experiment=ablation_parity     every variant, seeds 0-4 (hours)
python src/report.py ablation runs/sweep_A runs/sweep_B      the figure, and the table in Markdown
python src/report.py ablation runs/sweep_C --by model.embedding_std    the same over the values of a key

A run that ended without solving its task is censored: it would have needed more than it had.
"""

import math
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from omegaconf import OmegaConf

from results.runs import Run, RunError, read_all
from results.tables import markdown

LOOKS: dict[bool, dict[str, Any]] = {  # of a run that solved its task, and of one that did not
    True: dict(marker="o", markersize=6, alpha=0.8),
    False: dict(marker=">", markersize=7, markerfacecolor="none"),
}
VARIANT = "choices.variant"  # the key that is compared unless another one is given
COSTS = {"evaluations": "function evaluations to solve", "seconds": "training seconds to solve"}


def read_costs(*paths: str | Path, by: str = VARIANT) -> pd.DataFrame:
    """One row per finished run below the paths: task, label, seed, evaluations, seconds, solved.

    Args:
        paths: directories of sweeps.
        by: the key of the config whose values are compared; the optimizer is added where it differs.

    Raises:
        RunError: no finished run lies below the paths, or the config of one has no such key or leaves it null.
    """

    def costs(run: Run) -> dict[str, Any]:
        own = {"directory": run.directory, "label": OmegaConf.select(run.config, by)}
        return own | run.description | run.of_summary(*COSTS, "stopped_by")

    rows = read_all(*paths, read=costs, finished_only=True)
    for row in rows:
        if row["label"] is None:
            raise RunError(f"{row['directory']} has no {by}; give directories of sweeps over it only")
    rows.sort(key=lambda row: (row["task"], *rank(row["label"]), row["seed"]))
    runs = pd.DataFrame(rows)
    runs["task"] = runs.task.str.removeprefix("ablation_")
    runs["solved"] = runs.stopped_by == "solved"
    runs["label"] = runs.label.astype(str)
    if by != VARIANT and runs.optimizer.nunique() > 1:  # a variant says which optimizer it is of
        runs["label"] += " · " + runs.optimizer
    return runs


def rank(label: Any) -> tuple[bool, float, str]:
    """A key that sorts the whole search first, numbers by size, and words behind them."""
    return label != "full", label if isinstance(label, int | float) else math.inf, str(label)


def median(runs: pd.DataFrame, cost: str) -> str:
    """The median of a cost, or a lower bound of it, marked ">", where the run in the middle is censored.

    A censored run needs more than it had, so it counts as dearer than every solved one.
    """
    solved = runs.solved.sum() > len(runs) // 2
    return f"{'' if solved else '> '}{runs[cost].median():,.{1 if cost == 'seconds' else 0}f}"


def ablation_table(runs: pd.DataFrame, by: str = VARIANT) -> str:
    """A row for each task and label, as a Markdown table."""
    return markdown(
        [
            {"task": task, by.removeprefix("choices."): label, "solved / seeds": f"{of.solved.sum()} / {len(of)}"}
            | {f"{cost}: median": median(of, cost) for cost in COSTS}
            for (task, label), of in runs.groupby(["task", "label"], sort=False)
        ]
    )


def draw_ablation(runs: pd.DataFrame, by: str = VARIANT) -> Figure:
    """A row of panels per task, a column per cost: a dot per seed, a hollow arrow to the right for a censored run."""
    sns.set_theme(style="whitegrid", context="notebook")
    tasks, colour = list(dict.fromkeys(runs.task)), sns.color_palette()[0]
    sizes = [runs[runs.task == task].label.nunique() for task in tasks]
    figure = Figure(figsize=(12, 0.42 * sum(sizes) + 1.1 * len(tasks) + 0.6), layout="constrained")
    panels = figure.subplots(len(tasks), len(COSTS), squeeze=False, sharey="row", height_ratios=sizes)
    for row, task in zip(panels, tasks, strict=True):
        of_task = runs[runs.task == task]
        labels = list(dict.fromkeys(of_task.label))
        height = of_task.label.map(labels.index) + 0.1 * (of_task.groupby("label").cumcount() - 2)  # seeds side by side
        for panel, (cost, title) in zip(row, COSTS.items(), strict=True):
            for solved, look in LOOKS.items():
                chosen = of_task.solved == solved
                panel.plot(of_task[cost][chosen], height[chosen], color=colour, linestyle="", **look)
            spread = of_task[cost].max() / of_task[cost].min()
            if spread > 10:
                panel.set_xscale("log")
                panel.xaxis.set_minor_locator(LogLocator(subs=(3,) if spread > 100 else (2, 5)))  # labels need room
                panel.xaxis.set_major_formatter("{x:,g}")
                panel.xaxis.set_minor_formatter("{x:,g}")
            else:
                panel.margins(x=0.08)  # room for half an arrow
                panel.set_xlim(0)
            panel.set(xlabel=title, title=task, yticks=range(len(labels)), yticklabels=labels)
        row[0].set(ylim=(len(labels) - 0.5, -0.5), ylabel=by.removeprefix("choices."))
    marks = [Line2D([], [], color=colour, linestyle="", **look) for look in LOOKS.values()]
    names = ["solved, a dot per seed", "not solved: it needs more than this"]
    figure.legend(marks, names, loc="outside upper center", ncols=2, frameon=False)
    return figure


def main(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("paths", nargs="+", type=Path, help="directories of sweeps")
    parser.add_argument("--by", default=VARIANT, metavar="KEY", help="the key that was swept")
    parser.add_argument("--output", type=Path, help="the picture to write (default: ablation.png in the first path)")
    args = parser.parse_args(arguments)
    runs = read_costs(*args.paths, by=args.by)
    output = args.output or args.paths[0] / "ablation.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_ablation(runs, args.by).savefig(output, dpi=100)
    print(ablation_table(runs, args.by))
    print(f"\nDrew {len(runs)} run(s): {output}")
