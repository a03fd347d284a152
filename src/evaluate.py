"""Test the weights of a run again, or on other data, and show what it writes.

python src/evaluate.py run=runs/2026-11-26_00-33-10-441156            its test split, beside summary.json
python src/evaluate.py run=<directory> --show 10                      and 10 predictions of each test split
python src/evaluate.py run=<directory> --wrong                        wrong ones only
python src/evaluate.py run=<directory> datamodule.test_lengths=[16]   other data: any key of its datamodule
python src/evaluate.py run=<directory> --json                         the metrics as one line of JSON

run= takes the directory that the run printed, a job of a sweep, or a checkpoint in one of these.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from results.runs import Run, RunError, by_position, find_run
from run.directory import print_any_character, typed

if TYPE_CHECKING:  # torch takes seconds, and a run that is not there is refused at once
    from omegaconf import DictConfig
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from data.decoding import Prediction
    from data.sequences import SequenceDataModule
    from pattern_search_task import PatternSearchTask

SHOWN = 10  # predictions of each split, if --wrong gives no number
LABELS = 14  # characters in front of a line of tokens


def main(arguments: Sequence[str]) -> None:
    """Evaluate as the arguments say; exit code 2, after one line, if they name nothing that can be evaluated."""
    options = parse(arguments)
    try:
        if options.run is None:
            raise RunError("give a run, such as run=runs/2026-11-26_00-33-10-441156")
        run, checkpoint = find_run(options.run)
        stored = (run.summary or {}).get("test") or {}
        evaluate(run, checkpoint, stored, options)
    except RunError as error:
        refuse(error)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags, `run`, and `changes`, which are the other key=value words."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="run=<directory>, and options of its data")
    parser.add_argument("--show", type=int, metavar="N", help="show N predictions of each test split beside the truth")
    parser.add_argument("--wrong", action="store_true", help=f"show wrong ones only, {SHOWN} without --show")
    parser.add_argument("--json", action="store_true", help="print the metrics as one line of JSON, and nothing else")
    options = parser.parse_intermixed_args(arguments)
    if options.show is None:
        options.show = SHOWN if options.wrong else 0
    if options.show < 0:
        parser.error(f"--show {options.show}: give a number from 1 on")
    if options.json and options.show:
        parser.error("--json prints the metrics only; leave out --show and --wrong")
    named = [word.removeprefix("run=") for word in options.words if word.startswith("run=")]
    if len(named) > 1:
        parser.error("several run=; give one")
    options.run = named[0] if named and named[0] else None
    options.changes = [word for word in options.words if not word.startswith("run=")]
    return options


def refuse(error: RunError) -> NoReturn:
    print(f"evaluate: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def evaluate(run: Run, checkpoint: Path, stored: Mapping[str, float], options: argparse.Namespace) -> None:
    """Test and print.

    Raises:
        RunError: the run cannot be loaded, or not with these data.
    """
    from rich.console import Console

    from run.build import load_run, told
    from run.cpu import prepare_machine

    prepare_machine()
    task, data, cfg = load_run(options.run, options.changes)
    with told(f"{typed(checkpoint)} cannot be tested"):
        metrics = tested(task, data, cfg)
    if options.json:
        print(json.dumps({name: value if math.isfinite(value) else None for name, value in metrics.items()}))
        return
    console = Console(highlight=False)
    console.print(table(metrics, stored))
    for note in notes(run, checkpoint, metrics, stored, data, cfg, options.changes):
        console.print(note, soft_wrap=True, markup=False)
    if options.show:
        for split in data.test_names:
            show(console, task, data, split, options.show, options.wrong)


def tested(task: PatternSearchTask, data: SequenceDataModule, cfg: DictConfig) -> dict[str, float]:
    """The metrics of the test splits, by name."""
    import lightning as L
    import torch
    from omegaconf import OmegaConf

    from run.start import silence_libraries

    silence_libraries()
    of_run = {name: OmegaConf.select(cfg, f"trainer.{name}") for name in ("precision", "limit_test_batches")}
    on_cpu = OmegaConf.select(cfg, "trainer.accelerator") == "cpu" or not torch.cuda.is_available()
    trainer = L.Trainer(
        accelerator="cpu" if on_cpu else "gpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{name: value for name, value in of_run.items() if value is not None},
    )
    trainer.test(task, datamodule=data, verbose=False)
    task.eval()
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}


def table(metrics: Mapping[str, float], stored: Mapping[str, float]) -> Table:
    """The metrics beside those that the run wrote into its summary.json."""
    from rich.table import Table

    rows = Table("held-out test")
    rows.add_column("now", justify="right")
    if stored:
        rows.add_column("summary.json", justify="right")
    for name, value in metrics.items():
        if by_position(name):
            continue
        before = [f"{stored[name]:.4f}" if name in stored else ""] if stored else []
        rows.add_row(name, f"{value:.4f}", *before)
    return rows


def notes(
    run: Run,
    checkpoint: Path,
    metrics: Mapping[str, float],
    stored: Mapping[str, float],
    data: SequenceDataModule,
    cfg: DictConfig,
    changes: Sequence[str],
) -> Iterator[str]:
    """What one has to know to read the table."""
    from omegaconf import OmegaConf

    yield f"Weights: {typed(checkpoint)}" + ("" if stored else ", the run was not tested")
    limit = OmegaConf.select(cfg, "trainer.limit_test_batches")
    if limit is not None and (isinstance(limit, int) or limit < 1):
        yield f"Only trainer.limit_test_batches={limit} of each split, as in the run; use 1.0 for all of it"
    if changes:
        for split, n in trained_on(run, data).items():
            yield f"{split}: {n:,} of {len(data.splits[split]):,} sequences are among those that the run was trained on"
        return
    same = [math.isclose(metrics[name], stored[name], rel_tol=1e-3, abs_tol=1e-5) for name in metrics if name in stored]
    if not all(same):
        yield "The metrics differ from those in summary.json: these are other weights, or the code has changed."


def trained_on(run: Run, data: SequenceDataModule) -> dict[str, int]:
    """How many sequences of each test split the run was trained on, where there are any."""
    from run.build import data_of_run

    def rows(of: SequenceDataModule, split: str) -> list[tuple[int, ...]]:
        sequences = of.splits[split]
        ends = sequences.prompt_lengths.tolist()
        return [tuple(row[:end]) for row, end in zip(sequences.x.tolist(), ends, strict=True)]

    seen = set(rows(data_of_run(run.config), "train"))
    counts = {split: sum(row in seen for row in rows(data, split)) for split in data.test_names}
    return {split: n for split, n in counts.items() if n}


def show(
    console: Console, task: PatternSearchTask, data: SequenceDataModule, split: str, n: int, wrong_only: bool
) -> None:
    """Predictions of a split beside the truth."""
    from data.decoding import decode_rows, wrong_rows

    sequences = data.splits[split]
    rows = wrong_rows(task.model, sequences) if wrong_only else list(range(len(sequences)))
    what = f"{len(rows):,} wrong of {len(sequences):,}" if wrong_only else f"{len(sequences):,} sequences"
    console.print(f"\n[bold]{split}[/]: {what}" + (f", the first {n}" if n < len(rows) else ""))
    for prediction in decode_rows(task.model, data, split, rows[:n]):
        for line in lines(prediction, console.width):
            console.print(line, no_wrap=True, overflow="ellipsis")


def lines(prediction: Prediction, width: int) -> Iterator[Text]:
    """A prediction as lines of at most `width` characters: the input, and below it the output above the truth."""
    from rich.text import Text

    mark, colour = ("right  ", "green") if prediction.right else ("wrong  ", "red")
    compared = {"output": prediction.output, "truth": prediction.truth}
    for rows in ({"input": prediction.input}, compared):
        columns = list(zip_longest(*rows.values(), fillvalue=""))
        for block in fitting(columns, width - LABELS):
            for k, name in enumerate(rows):
                line = Text.assemble((mark, colour), f"{name:<{LABELS - len(mark)}}")
                for column in block:
                    style = "red" if len(set(column)) > 1 else ""
                    line.append(column[k].ljust(max(map(len, column))), style=style).append(" ")
                line.rstrip()
                yield line
                mark = " " * len(mark)


def fitting(columns: Sequence[tuple[str, ...]], width: int) -> Iterator[list[tuple[str, ...]]]:
    """The columns in as few blocks of at most `width` characters as they fit in."""
    block: list[tuple[str, ...]] = []
    used = 0
    for column in columns:
        cell = 1 + max(map(len, column))
        if block and used + cell > width:
            yield block
            block, used = [], 0
        block.append(column)
        used += cell
    if block:
        yield block


if __name__ == "__main__":
    print_any_character()
    main(sys.argv[1:])
