"""A table of finished runs, in Markdown: a row for the runs of the same task, model, optimizer, variant and settings.

python src/report.py tables runs
python src/report.py tables runs --metric test/balanced_accuracy
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from run.metrics_table import KINDS, describe, name_settings

SOLVED = 0.99  # a run with at least this value of the metric counts as solved


def read_summaries(*paths: str | Path) -> pd.DataFrame:
    """One row a finished run below the paths: what it was, its settings, its summary and its test metrics.

    Interrupted runs are left out.

    Raises:
        FileNotFoundError: no finished run lies below the paths.
    """
    summaries, configs = [], []
    for file in sorted({file for path in paths for file in Path(path).rglob("summary.json")}):
        summary = json.loads(file.read_text())
        if summary["stopped_by"] != "interrupted":
            summaries.append(summary.pop("test") | summary)
            configs.append(OmegaConf.to_container(OmegaConf.load(file.with_name("config.yaml"))))
    if not summaries:
        raise FileNotFoundError(f"no finished run below {', '.join(map(str, paths))}")
    kinds = pd.DataFrame(map(describe, configs)).assign(settings=name_settings(configs))
    return kinds.join(pd.DataFrame(summaries))


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
    for (task, model, optimizer, variant, settings), of in runs.groupby([*KINDS, "settings"], sort=False):
        value, seconds = of[metric], of["seconds"]
        cells = [
            ", ".join(filter(None, [task, settings])),
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


def main(arguments: list[str]) -> None:
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("report.py tables", description=__doc__, formatter_class=look)
    parser.add_argument("paths", nargs="+", type=Path, help="run directories, or directories of runs")
    parser.add_argument("--metric", default="test/exact_match", help="the held-out metric to report")
    args = parser.parse_args(arguments)
    try:
        runs = read_summaries(*args.paths)
        print(tabulate(runs, args.metric))
    except FileNotFoundError as error:
        sys.exit(f"tables: {error}")
    except KeyError:
        known = sorted(column for column in runs if column.startswith("test/"))
        sys.exit(f"tables: no run has {args.metric}; known: {', '.join(known)}")
