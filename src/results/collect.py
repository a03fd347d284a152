"""Keep finished runs as rows of a CSV: what each was, how it was made, and what it came to.

python src/report.py collect runs/sweep_A --output report/results/solved.csv    rows of the same command are replaced
python src/report.py tables report/results/solved.csv                           the table of the rows
"""

from argparse import ArgumentParser
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from results.runs import Run, RunError, by_position
from results.tables import read_summaries
from run.directory import starts, to_type, write


def origin(run: Run) -> dict[str, str]:
    """What to type for this run alone, also if it was a job of a sweep; its code, machine and day."""
    hydra, recorded = run.directory / ".hydra" / "hydra.yaml", starts(run.directory)
    if not recorded:
        raise RunError(f"{run.directory}/environment.json is missing or damaged: it says with what code a run was made")
    started = recorded[-1]
    return {
        "command": to_type(["src/train.py"], OmegaConf.load(hydra).hydra) if hydra.exists() else "",
        "commit": (started["git_commit"] or "")[:10] + ("+" if started["git_dirty"] else ""),
        "machine": f"{started['cores']} cores, {started['platform']}",
        "date": started["started"][:10],
    }


def main(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("paths", nargs="+", type=Path, help="run directories, or directories of runs")
    parser.add_argument("--output", type=Path, required=True, help="the CSV to write, or to add to")
    args = parser.parse_args(arguments)
    rows = read_summaries(*args.paths, more=origin)
    rows = rows[[name for name in rows if not by_position(name)]]
    if args.output.exists():
        kept = pd.read_csv(args.output, dtype={"commit": str})
        rows = pd.concat([kept, rows]).drop_duplicates("command", keep="last")
    write(args.output, rows.to_csv(index=False))
    print(f"{len(rows)} runs: {args.output}")
