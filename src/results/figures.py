"""Draw runs: loss and exact match against function evaluations and against seconds.

python src/report.py figures runs                          every run below a directory
python src/report.py figures runs/A runs/B --output ab.png
python src/report.py figures runs --keep curves.csv.gz     keep what is drawn; `figures curves.csv.gz` draws it again
python src/report.py figures --wandb my_team/my_project    runs on W&B, from anywhere
"""

import math
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from results.runs import RunError, read_runs, read_wandb

PANELS = {"loss": "loss, nats per token", "exact_match": "exact match"}
SPLITS = {"train": "training", "val": "validation"}
WIDTHS = {"training": 0.7, "validation": 2.0}  # of the lines
AXES = {"evaluations": "evaluations (a gradient step: one)", "seconds": "training seconds"}
LABELS = ["model", "optimizer", "variant", "settings"]  # what colours tell apart
FEW = 4  # seeds get dashes of their own; the lines of more are a bundle
WIDE = 30  # a range of values whose ends differ by more than this factor gets a logarithmic axis


def draw_runs(table: pd.DataFrame) -> Figure:
    """Loss and exact match, training (thin) and validation (thick), against evaluations and seconds.

    A line per run and split; colours tell what differs between the runs, and dashes tell a FEW seeds. Each task has two
    rows of two panels, with its loss at chance where that is known.

    Args:
        table: as `results.runs.read_runs` returns it; RunError if there is nothing to draw yet.
    """
    parts = table.metric.map(lambda name: name.partition("/"))
    table = table.assign(split=parts.str[0], panel=parts.str[2]).replace(math.inf, math.nan).dropna(subset="value")
    table = table[table.split.isin(SPLITS) & table.panel.isin(PANELS)]
    if table.empty:
        raise RunError("no metrics yet in these runs")
    table = table.assign(row=table.task + ": " + table.panel.map(PANELS), **{"measured on": table.split.map(SPLITS)})
    label = label_runs(table, LABELS)
    n_labels, title = label.nunique(), str(label.name)  # the legend has the names of columns as titles
    rows = table.assign(**{title: label}).sort_values(["task", "panel"], ascending=[True, False])
    kept = ["row", "panel", title, "measured on", "seed", "run", "value", "chance_loss"]
    rows = rows.melt(kept, [*AXES], "axis", "cost")
    looks: dict[str, Any] = dict(hue=title, size="measured on", sizes=WIDTHS, units="run", estimator=None)
    looks |= dict(palette="husl" if n_labels > 10 else None, style="seed" if 1 < rows.seed.nunique() <= FEW else None)
    places: dict[str, Any] = dict(row="row", col="axis", facet_kws=dict(sharex=False, sharey=False))
    sns.set_theme(style="whitegrid", context="notebook")
    grid = sns.relplot(rows, kind="line", x="cost", y="value", height=3.2, aspect=1.6, **looks, **places)
    grid.set_titles("{row_name}").set_axis_labels("", "")
    for (row, axis), place in grid.axes_dict.items():
        here = rows[(rows.row == row) & (rows.axis == axis)]
        of_loss = (here.panel == "loss").all()
        longest = here.groupby("run").cost.max()
        place.set(xlabel=AXES[axis], xscale="log" if is_wide(longest) else "linear")
        if axis == "evaluations" and place.get_xscale() == "linear":
            place.xaxis.set_major_formatter(EngFormatter(sep=""))  # 25k for 25000
        place.set(yscale="log" if of_loss and is_wide(here.value) else "linear")
        if of_loss and here.chance_loss.notna().any():
            place.axhline(here.chance_loss.max(), color="0.4", linestyle="--", linewidth=1)
    if n_labels <= 12:  # below the panels; more of them are a column beside
        grid.tight_layout()
        sns.move_legend(grid, "upper center", bbox_to_anchor=(0.5, 0), ncols=min(4, n_labels + 4))
    return closed(grid)


def label_runs(table: pd.DataFrame, columns: list[str]) -> pd.Series:
    """For each row, those of the columns that differ between the runs, joined; the optimizer if none does.

    The name of the series is that of these columns, joined too.
    """
    differing = [column for column in columns if table[column].nunique() > 1] or ["optimizer"]
    labels = table[differing].agg(lambda names: " · ".join(filter(None, names)) or "as configured", axis=1)
    return labels.rename(" · ".join(differing))


def is_wide(values: pd.Series) -> bool:
    """Whether values, all above 0, have ends so far apart that a logarithmic axis shows them better."""
    return values.max() > WIDE * values.min() > 0


def closed(grid: sns.FacetGrid) -> Figure:
    """The figure of a grid, which pyplot forgets: a notebook would show it twice."""
    grid.tight_layout()
    plt.close(grid.figure)
    return grid.figure


def save(figure: Figure, output: Path, what: str) -> None:
    """Write a picture, and say what is in it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100, bbox_inches="tight")
    print(f"Drew {what}: {output}")


def draw_progress(run_dir: str | Path) -> None:
    """Draw a run as `progress.png` in its own directory, as every run does when it ends."""
    table = read_runs(run_dir)
    run, figure = table.iloc[0], draw_runs(table)
    title = " · ".join(filter(None, [run.optimizer, run.variant, run.task, run.model, f"seed {run.seed}"]))
    figure.suptitle(title, y=1.03)
    figure.savefig(Path(run_dir) / "progress.png", dpi=80, bbox_inches="tight")


def draw_accuracy(table: pd.DataFrame) -> Figure:
    """Held-out exact match and token accuracy, a point per run, a row per kind; RunError if none was tested yet."""
    metrics = {"test/exact_match": "exact match", "test/token_accuracy": "token accuracy"}
    rows = table[table.metric.isin(metrics)].assign(metric=lambda t: t.metric.map(metrics))
    if rows.empty:
        raise RunError("none of these runs has been tested yet")
    rows = rows.assign(label=label_runs(rows, ["task", *LABELS]))
    sns.set_theme(style="whitegrid", context="notebook")
    size: dict[str, Any] = dict(height=1.2 + 0.36 * rows.label.nunique(), aspect=4)
    grid = sns.catplot(rows, kind="strip", y="label", x="value", hue="metric", dodge=True, **size)
    grid.set(ylabel="", xlabel="held-out test", xlim=(-0.02, 1.02))
    return closed(grid)


def main(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("paths", nargs="*", type=Path, help="run directories, or directories of runs")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="read the runs of a W&B project instead")
    parser.add_argument("--output", type=Path, help="the picture to write (default: runs.png in the first path)")
    parser.add_argument("--keep", type=Path, help="a CSV to write with what is drawn, from which it can be drawn again")
    args = parser.parse_args(arguments)
    if bool(args.paths) == bool(args.wandb):
        parser.error("give run directories, or --wandb ENTITY/PROJECT")
    entity, _, project = (args.wandb or "").rpartition("/")
    table = read_wandb(entity or None, project) if args.wandb else read_runs(*args.paths)
    first = Path(*args.paths[:1])
    output = args.output or (first if first.is_dir() else first.parent) / "runs.png"
    if args.keep:
        drawn = table[table.metric.isin(f"{split}/{panel}" for split in SPLITS for panel in PANELS)]
        drawn.assign(run=drawn.run.factorize()[0]).to_csv(args.keep, index=False)
    save(draw_runs(table), output, f"{table.run.nunique()} run(s)")
