"""The figures of a comparison, each from the rows and curves that are kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from comparison.plan import Plan
from comparison.rows import KEY, reported
from results.figures import closed, with_some_match

COSTS = {"evaluations": "function evaluations (a gradient step: 3)", "seconds": "seconds of training, one thread"}
VALUES = {"val/loss": "validation loss, nats per token", "val/exact_match": "validation exact match"}
FIGURES = ("loss", "exact_match", "solved", "ratios", "costs")
DASHES = ((), (4, 1.5), (1, 1))  # points drawn and left out in turn; of a solid line none. Colours alike differ in them
GRID = 80  # costs at which the curves of the seeds are joined


def figures_of(plan: Plan, rows: pd.DataFrame, curves: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
    """Every figure of a comparison with its name, one of FIGURES, from its rows and curves."""
    rows = reported(plan, rows)
    curves = curves.set_index(KEY).loc[rows.set_index(KEY).index.intersection(pd.MultiIndex.from_frame(curves[KEY]))]
    curves = curves.reset_index()  # of these rows, in their order
    looks = looks_of(plan)
    yield "loss", draw_curves(curves, "val/loss", looks)
    yield "exact_match", draw_curves(curves, "val/exact_match", looks)
    yield "solved", draw_profile(rows, looks)
    yield "ratios", draw_ratios(rows, plan)
    yield "costs", draw_costs(rows, looks)


def draw_all(plan: Plan, rows: pd.DataFrame, curves: pd.DataFrame, stem: Path) -> Iterator[Path]:
    """Draw every figure as STEM_NAME.png and .svg, and tell each as it is written."""
    plt.rcParams["svg.hashsalt"] = "comparison"  # the same picture is the same file
    for name, figure in figures_of(plan, rows, curves):
        for suffix, metadata in {".png": None, ".svg": {"Date": None}}.items():
            path = stem.with_name(f"{stem.name}_{name}{suffix}")
            figure.savefig(path, dpi=100, bbox_inches="tight", metadata=metadata)
            yield path


def looks_of(plan: Plan) -> dict[str, Any]:
    """The colour and the dashes of each contender, the same in every figure."""
    names = [*plan.contenders]
    # by the golden angle, so that any few in a row are far apart, and every other four darker
    colors = [sns.husl_palette(1, h=0.382 * i % 1, s=0.9, l=(0.6, 0.4)[i // 4 % 2])[0] for i in range(len(names))]
    dashes = [DASHES[i % len(DASHES)] for i in range(len(names))]
    looks: dict[str, Any] = dict(hue="contender", hue_order=names, palette=dict(zip(names, colors, strict=True)))
    return looks | dict(style="contender", style_order=names, dashes=dict(zip(names, dashes, strict=True)))


def draw_curves(curves: pd.DataFrame, metric: str, looks: dict[str, Any]) -> Figure:
    """A metric against both costs, a row per task: medians over the seeds, and bands from the lowest to the highest."""
    curves = with_some_match(curves[curves.metric == metric])
    joined = pd.concat([on_a_grid(curves, cost) for cost in COSTS])
    places: dict[str, Any] = dict(row="task", col="cost", facet_kws=dict(sharex=False, sharey="row"))
    sns.set_theme(style="whitegrid", context="notebook")
    grid = sns.relplot(
        joined, kind="line", x="spent", y="value", height=3, aspect=1.7, **looks, **places,
        estimator="median", errorbar=("pi", 100), err_kws=dict(alpha=0.12), drawstyle="steps-post",
    )  # fmt: skip
    grid.set_titles("{row_name}").set_axis_labels("", VALUES[metric]).set(xscale="log")
    if metric == "val/loss":
        grid.set(yscale="log")
    for (_, cost), panel in grid.axes_dict.items():
        panel.set_xlabel(COSTS[cost])
        panel.xaxis.set_minor_formatter(NullFormatter())  # the decades say enough
    return closed(grid)


def on_a_grid(curves: pd.DataFrame, cost: str) -> pd.DataFrame:
    """The curves of the seeds at the same costs: each keeps its newest value, and its last one when it has ended.

    So that a band is of all seeds, it begins where every seed has been validated once.
    """
    parts = []
    for (task, contender), of in curves.groupby(["task", "contender"], sort=False):
        runs = [run.sort_values(cost) for _, run in of.groupby("seed")]
        first, last = max(run[cost].iloc[0] for run in runs), max(run[cost].iloc[-1] for run in runs)
        at = np.geomspace(max(first, 1e-3), max(last, 1e-3), GRID)
        for run in runs:
            newest = np.searchsorted(run[cost].to_numpy(), at * (1 + 1e-9), side="right") - 1
            values = run.value.to_numpy()[newest.clip(0)]
            named = dict(task=task, contender=contender, cost=cost, seed=run.seed.iloc[0])
            parts.append(pd.DataFrame({"spent": at, "value": values}).assign(**named))
    return pd.concat(parts)


def draw_profile(rows: pd.DataFrame, looks: dict[str, Any]) -> Figure:
    """The share of all runs, over tasks and seeds, that are solved with a budget: a performance profile.

    Dolan and More 2002, with absolute budgets in the place of ratios.
    """
    long = rows.melt(
        ["contender", "task", "seed"], [f"solved_at_{cost}" for cost in COSTS], var_name="cost", value_name="spent"
    )
    long["cost"] = long.cost.str.removeprefix("solved_at_")
    long["spent"] = long.spent.fillna(np.inf)  # never: the curve ends below 1
    sns.set_theme(style="whitegrid", context="notebook")
    figure, panels = plt.subplots(1, 2, figsize=(13, 4.5), sharey=True)
    for panel, (cost, label) in zip(panels, COSTS.items(), strict=True):
        here = long[long.cost == cost]
        costs = here.spent[np.isfinite(here.spent)]
        begin, end = (costs.min(), costs.max()) if len(costs) else (1.0, 10.0)
        for name, color in looks["palette"].items():
            spent = np.sort(here[here.contender == name].spent)
            if not len(spent):
                continue
            shares = np.arange(1, len(spent) + 1) / len(spent)
            solved = np.isfinite(spent)
            x, y = [begin, *spent[solved], end], [0.0, *shares[solved], shares[solved][-1] if solved.any() else 0.0]
            panel.step(x, y, where="post", color=color, linestyle=(0, looks["dashes"][name] or None), label=name)
        panel.set(xscale="log", xlabel=label, ylabel="share of runs that are solved", ylim=(-0.02, 1.02))
    panels[1].legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.tight_layout()
    plt.close(figure)
    return figure


def draw_ratios(rows: pd.DataFrame, plan: Plan) -> Figure:
    """Median costs to solve each task, as multiples of the baseline's; empty where most seeds are not solved."""
    sns.set_theme(style="white", context="notebook")
    n_tasks, n_names = rows.task.nunique(), rows.contender.nunique()
    figure, panels = plt.subplots(1, 2, figsize=(5 + 1.5 * n_tasks, 1.5 + 0.42 * n_names), sharey=True)
    for panel, cost in zip(panels, COSTS, strict=True):
        filled = rows.assign(spent=rows[f"solved_at_{cost}"].fillna(np.inf))
        medians = filled.pivot_table(index="contender", columns="task", values="spent", aggfunc="median", sort=False)
        medians = medians.reindex([name for name in plan.contenders if name in medians.index])
        if plan.baseline not in medians.index:
            continue
        ratios = (medians / medians.loc[plan.baseline]).replace([0, np.inf, -np.inf], np.nan)
        texts = ratios.map(lambda ratio: "" if np.isnan(ratio) else f"{ratio:.2g}" if ratio < 99 else f"{ratio:,.0f}")
        looks: dict[str, Any] = dict(cmap="vlag", vmin=-2, vmax=2, cbar=False, linewidths=1, fmt="")
        sns.heatmap(np.log10(ratios), annot=texts, ax=panel, **looks)
        panel.set(title=cost, xlabel="", ylabel="")
        panel.set_facecolor("0.93")
    figure.suptitle(f"median cost to solve, as multiples of {plan.baseline}'s; empty: most seeds were not solved")
    figure.tight_layout()
    plt.close(figure)
    return figure


def draw_costs(rows: pd.DataFrame, looks: dict[str, Any]) -> Figure:
    """What an evaluation and a step cost in seconds, a dot per task."""
    per = {"an evaluation": rows.seconds / rows.evaluations, "a step": rows.seconds / rows.steps}
    long = pd.concat([rows[["task", "contender"]].assign(of=name, seconds=spent) for name, spent in per.items()])
    long = long.groupby(["of", "contender", "task"], sort=False).seconds.median().reset_index()
    sns.set_theme(style="whitegrid", context="notebook")
    order = [name for name in looks["hue_order"] if name in set(long.contender)]
    shape: dict[str, Any] = dict(height=1.5 + 0.4 * len(order), aspect=1.2, sharex=False)
    grid = sns.catplot(long, kind="strip", col="of", x="seconds", y="contender", hue="task", order=order, **shape)
    grid.set(xscale="log", ylabel="").set_titles("seconds of {col_name}")
    return closed(grid)
