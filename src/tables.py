"""A table of finished runs, in Markdown: a row for the runs of the same task, model, optimizer, variant and settings.

python src/tables.py runs
python src/tables.py runs --metric test/balanced_accuracy
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from metrics_table import describe

SETTINGS = ("datamodule.", "model.", "task.", "optimizer.", "trainer.")  # nodes of the config that decide a result
PER_RUN = ("seed", "_target_")  # keys in them that are not settings
GROUPED = ["task", "model", "optimizer", "variant"]  # what a row of the table has in common
SOLVED = 0.99  # a run with at least this value of the metric counts as solved


def read_summaries(*paths: str | Path) -> pd.DataFrame:
    """One row a finished run below the paths: what it was (`describe`), its summary and its test metrics.

    Interrupted runs are left out. Runs that `describe` calls the same but that have different settings (the seed
    apart) get these settings behind the name of their task.

    Raises:
        FileNotFoundError: no finished run lies below the paths.
    """
    rows, settings = [], []
    for file in sorted({file for path in paths for file in Path(path).rglob("summary.json")}):
        summary = json.loads(file.read_text())
        if summary["stopped_by"] != "interrupted":
            config = OmegaConf.to_container(OmegaConf.load(file.with_name("config.yaml")))
            rows.append(describe(config) | summary.pop("test") | summary)
            settings.append({k: v for k, v in leaves(config) if k.startswith(SETTINGS) and not k.endswith(PER_RUN)})
    if not rows:
        raise FileNotFoundError(f"no finished run below {', '.join(map(str, paths))}")
    runs = pd.DataFrame(rows)
    for _, of in runs.groupby(GROUPED):
        keys = sorted({key for i in of.index for key in settings[i]})
        differing = [key for key in keys if len({str(settings[i].get(key)) for i in of.index}) > 1]
        for i in of.index:
            words = [f"{key.rpartition('.')[2]}={settings[i][key]}" for key in differing if key in settings[i]]
            runs.loc[i, "task"] = ", ".join([runs.loc[i, "task"], *words])
    return runs


def leaves(node: dict, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a nested dict."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def tabulate(runs: pd.DataFrame, metric: str = "test/exact_match") -> str:
    """Mean and spread over the seeds of every task, model, optimizer and variant, as a Markdown table.

    Args:
        runs: as `read_summaries` returns them.
        metric: the held-out metric that is reported.

    Raises:
        KeyError: no run has the metric.
    """
    lines = [
        "| task | model | optimizer | solved / runs | mean (worst) "
        f"{metric.removeprefix('test/')} | steps | seconds (worst) | evaluations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, model, optimizer, variant), of in runs.groupby(GROUPED, sort=False):
        value, seconds = of[metric], of["seconds"]
        cells = [
            task,
            model,
            f"{optimizer} {variant}".strip(),
            f"{(value >= SOLVED).sum()} / {len(of)}",
            f"{value.mean():.3f} ({value.min():.3f})",
            f"{of['steps'].median():,.0f}",
            f"{seconds.median():.1f} ({seconds.max():.1f})",
            f"{of['evaluations'].median():,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="run directories, or directories of runs")
    parser.add_argument("--metric", default="test/exact_match", help="the held-out metric to report")
    args = parser.parse_args()
    try:
        runs = read_summaries(*args.paths)
        print(tabulate(runs, args.metric))
    except FileNotFoundError as error:
        sys.exit(f"tables: {error}")
    except KeyError:
        known = sorted(column for column in runs if column.startswith("test/"))
        sys.exit(f"tables: no run has {args.metric}; known: {', '.join(known)}")


if __name__ == "__main__":
    main()
