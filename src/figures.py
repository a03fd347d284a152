"""Draw runs: loss and exact match against function evaluations and against seconds.

python src/figures.py runs                          every run below a directory
python src/figures.py runs/A runs/B --output ab.png
python src/figures.py --wandb my_team/my_project    runs on W&B, from anywhere
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from metrics_table import read_runs, read_wandb

PANELS = {
    "train/loss": "training loss, nats a token",
    "val/loss": "validation loss, nats a token",
    "val/exact_match": "validation exact match",
}
AXES = {"evaluations": "function evaluations (a gradient step counts as one)", "seconds": "training seconds"}


def draw_runs(table: pd.DataFrame) -> Figure:
    """One panel a metric (rows) and an axis (columns); a line a run, coloured by what differs between the runs.

    Args:
        table: as `metrics_table.read_runs` returns it.
    """
    differing = [c for c in ("task", "model", "optimizer") if table[c].nunique() > 1] or ["optimizer"]
    table = table.assign(label=table[differing].astype(str).agg(" · ".join, axis=1))
    metrics = [name for name in PANELS if (table.metric == name).any()]
    if not metrics:
        raise FileNotFoundError(f"no metrics yet in {', '.join(table.run.unique()) or 'these runs'}")
    sns.set_theme(style="whitegrid", context="notebook")
    ends = table.groupby("run")[list(AXES)].max()
    far_apart = ends.max() > 30 * ends.min()  # then a linear axis would hide the shorter runs
    figure = Figure(figsize=(12, 3.4 * len(metrics)), layout="constrained")
    panels = figure.subplots(len(metrics), len(AXES), squeeze=False, sharex="col", sharey="row")
    for row, metric in zip(panels, metrics, strict=True):
        rows = table[table.metric == metric]
        for panel, (axis, title) in zip(row, AXES.items(), strict=True):
            look = dict(data=rows, x=axis, y="value", hue="label", units="run", estimator=None, ax=panel)
            if metric.startswith("train/"):
                sns.lineplot(**look, alpha=0.6, linewidth=1, legend=False)
            else:
                sns.lineplot(**look, marker="o", markersize=4, markeredgewidth=0, legend=False)
            panel.set(xlabel=title, ylabel=PANELS[metric] if axis == "evaluations" else "")
            if far_apart[axis]:
                panel.set_xscale("log")
            if metric.endswith("exact_match"):
                panel.set_ylim(-0.02, 1.02)
    labels = list(dict.fromkeys(table.label))
    lines = [matplotlib.lines.Line2D([], [], color=colour) for colour in sns.color_palette(n_colors=len(labels))]
    runs = table.groupby("label").run.nunique()
    names = [f"{label} ({runs[label]} run{'s' if runs[label] > 1 else ''})" for label in labels]
    figure.legend(lines, names, loc="outside upper center", ncols=min(len(labels), 3), frameon=False)
    return figure


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="run directories, or directories of runs")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help="read the runs of a W&B project instead")
    parser.add_argument("--output", type=Path, help="the picture to write (default: runs.png in the first path)")
    args = parser.parse_args()
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


if __name__ == "__main__":
    main()
