"""Draw runs: loss and exact match against function evaluations and against seconds.

python src/report.py figures runs                          every run below a directory
python src/report.py figures runs/A runs/B --output ab.png
python src/report.py figures runs --keep curves.csv.gz     keep what is drawn; `figures curves.csv.gz` draws it again
python src/report.py figures --wandb my_team/my_project    runs on W&B, from anywhere
"""

import itertools
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
BELOW = 150  # characters of a legend that fit below the panels
WIDE = 30  # a range of values whose ends differ by more than this factor gets a logarithmic axis


def draw_runs(table: pd.DataFrame) -> Figure:
    """Loss and exact match, training (thin) and validation (thick), against evaluations and seconds.

    A line per run and split; colours tell what differs between the runs, and dashes tell a FEW seeds. Each task has two
    rows of two panels, with its loss at chance where that is known; one if nothing was matched in any run.

    Args:
        table: as `results.runs.read_runs` returns it; RunError if there is nothing to draw yet.
    """
    parts = table.metric.map(lambda name: name.partition("/"))
    table = table.assign(split=parts.str[0], panel=parts.str[2]).replace(math.inf, math.nan).dropna(subset="value")
    table = table[table.split.isin(SPLITS) & table.panel.isin(PANELS)]
    table = with_some_match(table)
    if table.empty:
        raise RunError("no metrics yet in these runs")
    table = table.assign(row=table.task + ": " + table.panel.map(PANELS), **{"measured on": table.split.map(SPLITS)})
    label = label_runs(table, LABELS)
    title = str(label.name)  # the legend has the names of columns as titles
    rows = table.assign(**{title: label}).sort_values(["task", "panel"], ascending=[True, False])
    kept = ["row", "panel", title, "measured on", "seed", "run", "value", "chance_loss"]
    rows = rows.melt(kept, [*AXES], "axis", "cost")
    labels, places = list(rows[title].unique()), list(itertools.product(rows.row.unique(), AXES))
    looks: dict[str, Any] = dict(hue=title, hue_order=labels, palette="husl" if len(labels) > 10 else None)
    looks |= dict(size="measured on", size_order=[*WIDTHS], sizes=WIDTHS, units="run", estimator=None)
    if 1 < rows.seed.nunique() <= FEW:
        looks |= dict(style="seed", style_order=sorted(rows.seed.unique()))
    sns.set_theme(style="whitegrid", context="notebook")
    figure = Figure(figsize=(10.2, 0.8 + 1.6 * len(places)), layout="constrained")
    for (row, axis), place in zip(places, figure.subplots(len(places) // 2, 2).flat, strict=True):
        here = rows[(rows.row == row) & (rows.axis == axis)]
        sns.lineplot(here, x="cost", y="value", ax=place, legend="auto" if place is figure.axes[0] else False, **looks)
        of_loss = (here.panel == "loss").all()
        longest = here.groupby("run").cost.max()
        place.set(title=row, xlabel=AXES[axis], ylabel="", xscale="log" if is_wide(longest) else "linear")
        if axis == "evaluations" and place.get_xscale() == "linear":
            place.xaxis.set_major_formatter(EngFormatter(sep=""))  # 25k for 25000
        place.set(yscale="log" if of_loss and is_wide(here.value) else "linear")
        if of_loss and here.chance_loss.notna().any():
            place.axhline(here.chance_loss.max(), color="0.4", linestyle="-.", linewidth=1, label="loss of chance")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.axes[0].legend().remove()
    if len(labels) > 12:  # more than fit below the panels
        figure.legend(handles, names, loc="outside right upper", frameon=False)
    else:
        columns = max(1, min(4, len(labels) + 4, BELOW // max(map(len, names))))
        lines = math.ceil(len(names) / columns)
        figure.set_figheight(figure.get_figheight() + 0.25 * max(0, lines - 4))  # inches
        figure.legend(handles, names, loc="outside lower center", frameon=False, ncols=columns)
    return figure


def with_some_match(table: pd.DataFrame) -> pd.DataFrame:
    """Without the exact match of tasks where it is 0 throughout, as that of whole windows of text is.

    All rows, if nothing else would be left.
    """
    match = table.metric.str.endswith("exact_match")
    some = table[~match | (table.value.groupby([table.task, match]).transform("max") > 0)]
    return table if some.empty else some


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
    figure.suptitle(title)
    figure.savefig(Path(run_dir) / "progress.png", dpi=80)


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
