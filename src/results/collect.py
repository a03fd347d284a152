"""Keep finished runs as rows of a CSV: what each was, how it was made, and what it came to.

python src/report.py collect runs/sweep_A --output report/results/solved.csv    rows of the same command are replaced
python src/report.py tables report/results/solved.csv                           the table of the rows
"""

import shlex
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from config.compose import DEFAULT_CONFIG
from results.runs import Run, by_position, name_settings, read_all
from run.directory import starts
from run.files import write

OUTCOME = ("steps", "evaluations", "seconds", "stopped_by")


def command_of(run: Run) -> str:
    """What to type for this run alone, also if it was a job of a sweep."""
    hydra = run.directory / ".hydra"
    words = list(OmegaConf.load(hydra / "overrides.yaml")) if (hydra / "overrides.yaml").exists() else []
    name = OmegaConf.load(hydra / "hydra.yaml").hydra.job.config_name if (hydra / "hydra.yaml").exists() else ""
    flag = [] if name in ("", DEFAULT_CONFIG) else [f"--config-name={name}"]
    return shlex.join(["python", "src/train.py", *flag, *words])


def row_of(run: Run) -> dict[str, Any]:
    """What a run was, its command, code, machine and day, and its outcome with the metrics of the test."""
    outcome, started = run.of_summary("test", *OUTCOME), starts(run.directory)[-1]
    made = {
        "command": command_of(run),
        "commit": (started["git_commit"] or "")[:10] + ("+" if started["git_dirty"] else ""),
        "machine": f"{started['cores']} cores, {started['platform']}",
        "date": started["started"][:10],
    }
    return run.description | made | {name: outcome[name] for name in OUTCOME} | outcome["test"]


def collect(*paths: str | Path) -> pd.DataFrame:
    """One row per finished run below the paths; RunError if there is none."""
    found = read_all(*paths, read=lambda run: (run, row_of(run)), finished_only=True)
    table = pd.DataFrame(row for _, row in found)
    table.insert(5, "settings", name_settings([run.config for run, _ in found]))
    return table.drop(columns=[name for name in table if by_position(name)])


def main(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("paths", nargs="+", type=Path, help="run directories, or directories of runs")
    parser.add_argument("--output", type=Path, required=True, help="the CSV to write, or to add to")
    args = parser.parse_args(arguments)
    rows = collect(*args.paths)
    if args.output.exists():
        kept = pd.read_csv(args.output, dtype={"commit": str})
        rows = pd.concat([kept, rows]).drop_duplicates("command", keep="last")
    write(args.output, rows.to_csv(index=False))
    print(f"{len(rows)} runs: {args.output}")
