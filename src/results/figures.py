"""Draw runs: loss and exact match against function evaluations and against seconds.

python src/report.py figures runs                          every run below a directory
python src/report.py figures runs/A runs/B --output ab.png
python src/report.py figures --wandb my_team/my_project    runs on W&B, from anywhere
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from run.metrics_table import read_runs, read_wandb

PANELS = {"loss": "loss, nats a token", "exact_match": "exact match"}
SPLITS = {"train": dict(alpha=0.5, linewidth=0.8), "val": dict(marker="o", markersize=4, markeredgewidth=0)}
AXES = {"evaluations": "evaluations (a gradient step: one)", "seconds": "training seconds"}
LABELS = ("model", "optimizer", "variant", "settings")  # what colours tell apart


def draw_runs(table: pd.DataFrame) -> Figure:
    """Loss and exact match, training (thin) and validation (dots), against evaluations and seconds.

    A line a run and split, coloured by what differs between the runs; if nothing does, by the split. Tasks
    do not share a panel: one row of four for each, with its chance loss; a single task gets two rows of two.

    Args:
        table: as `run.metrics_table.read_runs` returns it.
    """
    table = table.assign(split=table.metric.str.partition("/")[0], panel=table.metric.str.partition("/")[2])
    table = table[table.split.isin(SPLITS) & table.panel.isin(PANELS)]
    if table.empty:
        raise FileNotFoundError("no metrics yet in these runs")
    differing = [c for c in LABELS if table[c].nunique() > 1] or ["optimizer"]
    table = table.assign(label=table[differing].agg(lambda names: " · ".join(filter(None, names)), axis=1))
    labels, tasks = list(dict.fromkeys(table.label)), list(dict.fromkeys(table.task))
    by_split = len(labels) == 1
    colours = dict(zip(SPLITS if by_split else labels, sns.color_palette(n_colors=20), strict=False))
    sns.set_theme(style="whitegrid", context="notebook")
    shape = (2, 2) if len(tasks) == 1 else (len(tasks), 4)
    width = 5.5 if shape[1] == 2 else 4  # four stand beside each other on a page: narrower, or their letters get small
    figure = Figure(figsize=(width * shape[1], 3.2 * shape[0] + 0.8), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False).reshape(len(tasks), 4)
    for row, task in zip(panels, tasks, strict=True):
        row[2].sharex(row[0])
        row[3].sharex(row[1])
        columns = [(panel, axis) for panel in PANELS for axis in AXES]
        for place, (panel, axis) in zip(row, columns, strict=True):
            of = table[(table.task == task) & (table.panel == panel)]
            draw_panel(place, of, axis, hue="split" if by_split else "label", colours=colours)
            place.set(xlabel=AXES[axis], ylabel=PANELS[panel], title=task if len(tasks) > 1 else "")
            if panel == "exact_match":
                place.set_ylim(-0.03, 1.03)
            elif of.chance_loss.notna().any():
                place.axhline(of.chance_loss.max(), color="0.4", linestyle="--", linewidth=1)
    add_legend(figure, table, colours, by_split)
    return figure


def draw_panel(place: Axes, rows: pd.DataFrame, axis: str, hue: str, colours: dict) -> None:
    """A line a run and split."""
    for split, look in SPLITS.items():
        of = rows[rows.split == split]
        if not of.empty:
            lines = dict(hue=hue, palette={name: colours[name] for name in of[hue].unique()}, legend=False)
            sns.lineplot(of, x=axis, y="value", units="run", estimator=None, ax=place, **lines, **look)
    ends = rows.groupby("run")[axis].max()
    if ends.max() > 30 * ends.min() > 0:  # then a linear axis would hide the shorter runs
        place.set_xscale("log")


def add_legend(figure: Figure, table: pd.DataFrame, colours: dict, by_split: bool) -> None:
    """The splits, chance where it is known, and the labels with their numbers of runs."""
    names = {"train": "training batch", "val": "validation"}
    lines = {names[s]: Line2D([], [], color=colours[s] if by_split else "0.4", **look) for s, look in SPLITS.items()}
    if table.chance_loss.notna().any():
        lines["chance"] = Line2D([], [], color="0.4", linestyle="--", linewidth=1)
    if not by_split:
        runs = table.groupby("label").run.nunique()
        for label, count in runs[list(dict.fromkeys(table.label))].items():
            lines[f"{label} ({count} run{'s' if count > 1 else ''})"] = Line2D([], [], color=colours[label])
    columns = int(9 * figure.get_figwidth() / (max(map(len, lines)) + 8))  # about 9 letters an inch, and 8 for a line
    columns = max(1, min(columns, 4, len(lines)))
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=columns, frameon=False)


def draw_progress(run_dir: str | Path) -> Path:
    """Draw a run as `progress.png` in its own directory, as every run does when it ends; returns the file."""
    table, file = read_runs(run_dir), Path(run_dir) / "progress.png"
    run = table.iloc[0]
    figure = draw_runs(table)
    title = " · ".join(filter(None, [run.optimizer, run.variant, run.task, run.model, f"seed {run.seed}"]))
    figure.legends[0].set_title(title)
    figure.savefig(file, dpi=80)
    return file


def draw_accuracy(table: pd.DataFrame) -> Figure:
    """Held-out test metrics of every run: exact match and token accuracy, a point a run."""
    metrics = {"test/exact_match": "exact match", "test/token_accuracy": "token accuracy"}
    rows = table[table.metric.isin(metrics)].assign(metric=lambda t: t.metric.map(metrics))
    rows = rows.assign(label=rows[["task", "model", "optimizer"]].agg("\n".join, axis=1))
    sns.set_theme(style="whitegrid", context="notebook")
    figure = Figure(figsize=(max(6, 2 + 1.6 * rows.label.nunique()), 4), layout="constrained")
    panel = figure.subplots()
    sns.stripplot(data=rows, x="label", y="value", hue="metric", dodge=True, size=7, ax=panel)
    panel.set(xlabel="", ylabel="held-out test", ylim=(-0.02, 1.02))
    sns.move_legend(panel, "upper center", bbox_to_anchor=(0.5, 1.15), ncols=2, title=None, frameon=False)
    return figure


def main(arguments: list[str]) -> None:
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("report.py figures", description=__doc__, formatter_class=look)
    parser.add_argument("paths", nargs="*", type=Path, help="run directories, or directories of runs")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="read the runs of a W&B project instead")
    parser.add_argument("--output", type=Path, help="the picture to write (default: runs.png in the first path)")
    args = parser.parse_args(arguments)
    if bool(args.paths) == bool(args.wandb):
        parser.error("give run directories, or --wandb ENTITY/PROJECT")
    try:
        if args.wandb:
            entity, _, project = args.wandb.rpartition("/")
            table, default = read_wandb(entity or None, project), Path("runs.png")
        else:
            table, default = read_runs(*args.paths), args.paths[0] / "runs.png"
        output = args.output or default
        figure = draw_runs(table)
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=120)
    except FileNotFoundError as error:
        sys.exit(f"figures: {error}")
    print(f"Drew {table.run.nunique()} run(s): {output}")
