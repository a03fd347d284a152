"""Show runs: what they came to, how they went, and what each part of the search is worth.

python src/report.py tables runs             a table of finished runs, in Markdown
python src/report.py figures runs            loss and exact match against evaluations and seconds
python src/report.py collect runs --output x.csv    the same as rows of a CSV, with command, commit and machine
python src/report.py ablation runs/sweep_A   evaluations and seconds of each variant of the search
python src/report.py diagnosis model=tiny    train, and look at every step of the search from outside
python src/report.py landscape model=tiny    train, and draw the loss around the way that the weights took
python src/report.py spectrum experiment=z5  train, and draw singular values of slopes and gradient
python src/report.py compare report/quick.yaml       every contender on every task, by one protocol, with figures
python src/report.py figures --help          the options of one of them
"""

import argparse
import importlib
import sys

from config.refusal import ConfigError, refuse
from results.runs import RunError
from run.directory import printing

COMMANDS = {
    name: f"results.{name}"
    for name in ("tables", "figures", "collect", "ablation", "diagnosis", "landscape", "spectrum")
}
COMMANDS["compare"] = "comparison.command"


def main(arguments: list[str]) -> None:
    """Run one of COMMANDS; exit code 2, after one line, if what is asked for is not there."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise RunError(f"not known. Known: {', '.join(COMMANDS)}")
        module = importlib.import_module(COMMANDS[name])  # only what is asked for is imported
        look = argparse.RawDescriptionHelpFormatter
        module.main(
            argparse.ArgumentParser(f"report.py {name}", description=module.__doc__, formatter_class=look), rest
        )
    except ConfigError as error:
        refuse(error.problems)
    except RunError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    with printing():
        main(sys.argv[1:])
