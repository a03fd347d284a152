"""A table of finished runs, in Markdown: a row for each task, model and optimizer, over their seeds.

python src/tables.py runs
python src/tables.py runs --metric test/balanced_accuracy
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from metrics_table import describe

SOLVED = 0.99  # a run with at least this value of the metric counts as solved


def read_summaries(*paths: str | Path) -> pd.DataFrame:
    """One row a finished run below the paths: what it was (`describe`), its summary and its test metrics.

    Raises:
        FileNotFoundError: no finished run lies below the paths.
    """
    rows = []
    for file in sorted({file for path in paths for file in Path(path).rglob("summary.json")}):
        summary = json.loads(file.read_text())
        config = OmegaConf.load(file.with_name("config.yaml"))
        rows.append(describe(config) | summary.pop("test") | summary)
    if not rows:
        raise FileNotFoundError(f"no run with summary.json below {', '.join(map(str, paths))}")
    return pd.DataFrame(rows)


def tabulate(runs: pd.DataFrame, metric: str = "test/exact_match") -> str:
    """Mean and spread over the seeds of every task, model and optimizer, as a Markdown table.

    Args:
        runs: as `read_summaries` returns them.
        metric: the held-out metric that is reported.

    Raises:
        KeyError: no run has the metric.
    """
    lines = [
        "| task | model | optimizer | solved / seeds | mean (worst) "
        f"{metric.removeprefix('test/')} | steps | seconds (worst) | evaluations |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, model, optimizer), of in runs.groupby(["task", "model", "optimizer"], sort=False):
        value, seconds = of[metric], of["seconds"]
        cells = [
            task,
            model,
            optimizer,
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
