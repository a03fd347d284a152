"""Show runs: what they came to, how they went, and what each part of the search is worth.

python src/report.py tables runs             a table of finished runs, in Markdown
python src/report.py figures runs            loss and exact match against evaluations and seconds
python src/report.py ablation runs/sweep_A   evaluations and seconds of each variant of the search
python src/report.py diagnosis model=tiny    train, and look at every step of the search from outside
python src/report.py figures --help          the options of one of them
"""

import importlib
import sys

COMMANDS = ("tables", "figures", "ablation", "diagnosis")


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    name, *rest = arguments
    if name not in COMMANDS:
        sys.exit(f"report: {name} is not known. Known: {', '.join(COMMANDS)}")
    importlib.import_module(f"results.{name}").main(rest)  # only what is asked for is imported


if __name__ == "__main__":
    main(sys.argv[1:])
