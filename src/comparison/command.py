"""Compare contenders on tasks: run what is missing, keep every run as a row, print the table, draw the figures.

python src/report.py compare report/full.yaml           the whole comparison; stopped, the same command goes on
python src/report.py compare report/full.yaml --draw    only the table and the figures, from the rows that are kept

The YAML says what is compared and comparison/plan.py by which protocol. For NAME.yaml in a directory D, the rows are
kept as D/results/NAME.csv and NAME_curves.csv.gz, the whole table as D/NAME_table.md, the figures as D/NAME_*.png
and .svg. What is printed is an overview of the table.
"""

import os
import sys
from argparse import ArgumentParser
from pathlib import Path

from rich.console import Console

from comparison.pictures import draw_all
from comparison.plan import REPORTED, read_plan
from comparison.rows import curves_path, overview_of, read_table, summary_of
from comparison.runner import Comparison
from results.runs import RunError
from results.tables import markdown
from run.directory import RunDirectoryError, locked
from run.quiet import silence_libraries


def main(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("plan", type=Path, help="the YAML of a comparison")
    parser.add_argument("--draw", action="store_true", help="run nothing")
    parser.add_argument("--missing", action="store_true", help="take kept rows for runs that need not be run here")
    args = parser.parse_args(arguments)
    silence_libraries()
    plan, output = read_plan(args.plan), args.plan.parent / "results" / args.plan.with_suffix(".csv").name
    if not args.draw:
        root = os.environ.get("PATTERN_SEARCH_ROOT") or str(Path(__file__).resolve().parents[2])
        directory = Path(root) / "runs" / "comparison" / args.plan.stem
        try:
            with locked(directory):
                Comparison(plan, directory, output, args.missing, Console()).run()
        except RunDirectoryError as error:
            raise RunError(str(error)) from error
        except KeyboardInterrupt:
            print("Stopped. The same command goes on.", file=sys.stderr)
            sys.exit(130)
    rows, curves = read_table(output), read_table(curves_path(output))
    if (rows.phase == REPORTED).sum() == 0:
        raise RunError(f"{output} has no run that is reported yet")
    print(markdown(overview_of(plan, rows)), end="\n\n")
    table = args.plan.with_name(f"{args.plan.stem}_table.md")
    table.write_text(markdown(summary_of(plan, rows)) + "\n", encoding="utf-8")
    print(f"Table: {table}")
    for path in draw_all(plan, rows, curves, args.plan.with_suffix("")):
        print(f"Drew {path}")
