"""Draw runs: loss and exact match against function evaluations and against seconds.

python src/report.py figures runs                          every run below a directory
python src/report.py figures runs/A runs/B --output ab.png
python src/report.py figures --wandb my_team/my_project    runs on W&B, from anywhere
"""

import itertools
import math
from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from results.runs import RunError, read_runs, read_wandb

PANELS = {"loss": "loss, nats a token", "exact_match": "exact match"}
SPLITS: dict[str, dict[str, Any]] = {
    "train": dict(alpha=0.5, linewidth=0.8),
    "val": dict(marker="o", markersize=4, markeredgewidth=0),
}
AXES = {"evaluations": "evaluations (a gradient step: one)", "seconds": "training seconds"}
LABELS = ["model", "optimizer", "variant", "settings"]  # what colours and line styles tell apart
STYLES = ["-", "--", ":", "-."]  # one for each round of the colours
WIDE = 30  # a range of values whose ends differ by more than this factor gets a logarithmic axis
BESIDE = 12  # labels; a legend of more of them stands beside the panels, in small letters


def draw_runs(table: pd.DataFrame) -> Figure:
    """Loss and exact match, training (thin) and validation (dots), against evaluations and seconds.

    A line per run and split. Colour and style tell what differs between the runs; if nothing does, the split. Tasks do
    not share a panel: one row of four for each, with its chance loss; a single task gets two rows of two.

    Args:
        table: as `results.runs.read_runs` returns it; RunError if there is nothing to draw yet.
    """
    split = table.metric.map(lambda name: name.partition("/")[0])
    panel = table.metric.map(lambda name: name.partition("/")[2])
    table = table.assign(split=split, panel=panel)
    table = table[table.split.isin(SPLITS) & table.panel.isin(PANELS)]
    if table.empty:
        raise RunError("no metrics yet in these runs")
    table = table.assign(label=label_runs(table, LABELS) if table[LABELS].nunique().max() > 1 else table.split)
    sns.set_theme(style="whitegrid", context="notebook")
    styles = itertools.product(STYLES, sns.color_palette())  # they begin anew only when all have been taken
    pairs = zip(table.label.unique(), itertools.cycle(styles))
    looks = {label: dict(linestyle=line, color=colour) for label, (line, colour) in pairs}
    tasks = table.task.unique()
    shape = (2, 2) if len(tasks) == 1 else (len(tasks), 4)
    width = 5.5 if shape[1] == 2 else 4  # four stand beside each other on a page: narrower, or their letters get small
    figure = Figure(figsize=(width * shape[1], 3.2 * shape[0] + 0.8), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False).reshape(len(tasks), 4)
    for row, task in zip(panels, tasks, strict=True):
        row[2].sharex(row[0])
        row[3].sharex(row[1])
        for place, (panel, axis) in zip(row, itertools.product(PANELS, AXES), strict=True):
            draw_panel(place, table[(table.task == task) & (table.panel == panel)], axis, looks)
            place.set(xlabel=AXES[axis], ylabel=PANELS[panel], title=task if len(tasks) > 1 else "")
            if panel == "exact_match":
                place.set_ylim(-0.03, 1.03)
    add_legend(figure, table, looks)
    return figure


def label_runs(table: pd.DataFrame, columns: list[str]) -> pd.Series:
    """For each row, those of the columns that differ between the runs, joined; the optimizer if none does."""
    differing = [column for column in columns if table[column].nunique() > 1] or ["optimizer"]
    return table[differing].agg(lambda names: " · ".join(filter(None, names)), axis=1)


def draw_panel(place: Axes, rows: pd.DataFrame, axis: str, looks: Mapping[str, dict]) -> None:
    """A line per run and split, of one metric of one task; and the loss at chance where it is known."""
    for (label, split, _), of in rows.groupby(["label", "split", "run"], sort=False):
        of = of[np.isfinite(of.value)].sort_values(axis, kind="stable")
        place.plot(of[axis], of.value, **looks[label], **SPLITS[split])
    if is_wide(rows.groupby("run")[axis].max()):  # a linear axis would hide the shorter runs
        place.set_xscale("log")
    if (rows.panel == "loss").all():
        if is_wide(rows.value):  # and the losses near zero
            place.set_yscale("log")
        if rows.chance_loss.notna().any():
            place.axhline(rows.chance_loss.max(), color="0.4", linestyle="--", linewidth=1)


def is_wide(values: pd.Series) -> bool:
    """Whether values, all above 0, have ends so far apart that a logarithmic axis shows them better."""
    values = values[np.isfinite(values)]
    return bool(len(values)) and values.max() > WIDE * values.min() > 0


def add_legend(figure: Figure, table: pd.DataFrame, looks: Mapping[str, dict]) -> None:
    """The splits, chance where it is known, and the labels with their numbers of runs."""
    lines = {}
    for name, (split, look) in zip(("training batch", "validation"), SPLITS.items(), strict=True):
        lines[name] = Line2D([], [], **(looks.get(split) or {"color": "0.4"}), **look)
    if table.chance_loss.notna().any():
        lines["chance"] = Line2D([], [], color="0.4", linestyle="--", linewidth=1)
    if not looks.keys() <= SPLITS.keys():
        runs = table.groupby("label").run.nunique()
        for label, look in looks.items():
            lines[f"{label} ({runs[label]} run{'s' if runs[label] > 1 else ''})"] = Line2D([], [], **look)
    longest = max(map(len, lines))
    if len(looks) > BESIDE:
        rows = int(figure.get_figheight() / 0.17)  # lines of small letters, 0.17 inches high
        columns = math.ceil(len(lines) / rows)
        figure.set_figwidth(figure.get_figwidth() + columns * (0.6 + 0.07 * longest))  # the panels keep their size
        place: dict[str, Any] = dict(loc="outside right upper", ncols=columns, fontsize="x-small")
    else:
        columns = int(9 * figure.get_figwidth() / (longest + 8))  # about 9 letters an inch, and 8 for a line
        place = dict(loc="outside upper center", ncols=max(1, min(columns, 4, len(lines))))
    figure.legend(list(lines.values()), list(lines), frameon=False, **place)


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
    """Held-out exact match and token accuracy, a point per run, a row per kind; RunError if none was tested yet."""
    metrics = {"test/exact_match": "exact match", "test/token_accuracy": "token accuracy"}
    rows = table[table.metric.isin(metrics)].assign(metric=lambda t: t.metric.map(metrics))
    if rows.empty:
        raise RunError("none of these runs has been tested yet")
    rows = rows.assign(label=label_runs(rows, ["task", *LABELS]))
    sns.set_theme(style="whitegrid", context="notebook")
    figure = Figure(figsize=(9, 1.2 + 0.36 * rows.label.nunique()), layout="constrained")
    panel = figure.subplots()
    sns.stripplot(data=rows, y="label", x="value", hue="metric", dodge=True, size=6, ax=panel)
    panel.set(ylabel="", xlabel="held-out test", xlim=(-0.02, 1.02))
    sns.move_legend(panel, "lower center", bbox_to_anchor=(0.5, 1), ncols=2, title=None, frameon=False)
    return figure


def main(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("paths", nargs="*", type=Path, help="run directories, or directories of runs")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="read the runs of a W&B project instead")
    parser.add_argument("--output", type=Path, help="the picture to write (default: runs.png in the first path)")
    args = parser.parse_args(arguments)
    if bool(args.paths) == bool(args.wandb):
        parser.error("give run directories, or --wandb ENTITY/PROJECT")
    if args.wandb:
        entity, _, project = args.wandb.rpartition("/")
        table, default = read_wandb(entity or None, project), Path("runs.png")
    else:
        table, default = read_runs(*args.paths), args.paths[0] / "runs.png"
    output = args.output or default
    figure = draw_runs(table)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    print(f"Drew {table.run.nunique()} run(s): {output}")
