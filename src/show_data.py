"""Show the data of a task: examples with tokens above targets, the sizes of the splits, chance, what else is known.

python src/show_data.py                                       the default task
python src/show_data.py task=scan datamodule.split=length     any key of the config can be set
python src/show_data.py task=text                             a text, with the losses of n-grams
"""

import argparse
import sys
from collections.abc import Iterator

import pandas as pd
from rich.console import Console
from rich.table import Table

from config.check import built
from config.compose import compose_config, job_config
from config.nodes import text_problems
from config.refusal import ConfigError, refuse
from data.decoding import VISIBLE, in_columns
from data.sequences import IGNORE, SequenceDataModule
from run.build import data_of
from run.directory import printing

N_EXAMPLES = 2  # of each split, different ones


def load_datamodule(overrides: list[str]) -> SequenceDataModule:
    """The data that a command line selects; prints what is wrong with it and exits with code 2 if it selects none."""
    try:
        config = compose_config(overrides)
        cfg = job_config(config, config.hydra.run.dir)
    except ConfigError as error:
        refuse(error.problems)
    problems = text_problems(cfg)
    if not problems and (datamodule := built(problems, cfg, "datamodule", lambda: data_of(cfg))):
        return datamodule
    refuse(problems)


def align(datamodule: SequenceDataModule, split: str, row: int, width: int) -> Iterator[str]:
    """One example as lines of x above y; y is blank where nothing is scored, and filler is left out."""
    x, y = (rows[row].tolist() for rows in (datamodule.splits[split].x, datamodule.splits[split].y))
    end = max(t for t, target in enumerate(y) if target != IGNORE) + 1
    tokens = [datamodule.tokens[i] for i in x[:end]]
    targets = [datamodule.classes[c] if c != IGNORE else "" for c in y[:end]]
    return in_columns({"x ": tokens, "y ": targets}, width, datamodule.separator)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="as for train.py, e.g. task=membership datamodule.language=dyck1")
    console = Console(highlight=False)
    datamodule = load_datamodule(parser.parse_args(arguments).overrides)
    table = Table("split", "sequences", "longest x (tokens)", "scored positions", box=None, header_style="bold")
    for name, split in datamodule.splits.items():
        table.add_row(name, f"{len(split):,}", str(split.x.shape[1]), f"{int(split.scored.sum()):,}")
    console.print(table, "")
    for name, split in datamodule.splits.items():
        console.print(f"[bold]{name}[/bold]")
        for row in pd.DataFrame(split.x.numpy()).drop_duplicates().index[:N_EXAMPLES]:
            for line in align(datamodule, name, row, console.width):
                style = "bold green" if line.startswith("y") else None
                console.print(line, style=style, markup=False, no_wrap=True, overflow="ellipsis")
            console.print()
    for title, names in {"input tokens": datamodule.tokens, "classes": datamodule.classes}.items():
        console.print(f"{title:<14} {len(names)}: {' '.join(names).translate(VISIBLE)}", markup=False)
    console.print(f"chance         loss {datamodule.chance_loss:.4f} nats, accuracy {1 / datamodule.n_classes:.4f}")
    for name, value in datamodule.facts().items():
        loss = name.endswith("_loss")
        shown = f"loss {value:.4f} nats" if loss else f"{value:,}" if isinstance(value, int) else value
        console.print(f"{name.removesuffix('_loss'):<14} {shown}", markup=False)


if __name__ == "__main__":
    with printing():
        main(sys.argv[1:])
