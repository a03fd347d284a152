"""Test the weights of a run again, or on other data, and show what it writes.

python src/evaluate.py run=runs/2026-11-26_00-33-10-441156            its test split, beside summary.json
python src/evaluate.py run=<directory> --show 10                      and 10 predictions of each test split
python src/evaluate.py run=<directory> --wrong                        wrong ones only
python src/evaluate.py run=<directory> --prompt "0 1 1 0"             what it writes after this input, and nothing else
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
from typing import TYPE_CHECKING, Any

from results.runs import Run, RunError, by_position, find_run
from run.directory import printing, typed

if TYPE_CHECKING:  # torch takes seconds, and a run that is not there is refused at once
    from omegaconf import DictConfig
    from rich.console import Console
    from rich.table import Table

    from data.sequences import SequenceDataModule
    from pattern_search_task import PatternSearchTask

SHOWN = 10  # predictions of each split for --wrong without a number


def main(arguments: Sequence[str]) -> None:
    """Evaluate as the arguments say; exit code 2, after one line, if they name nothing that can be evaluated."""
    options = parse(arguments)
    try:
        run, checkpoint = find_run(options.run)
        evaluate(run, f"Weights: {typed(checkpoint)}", options)
    except RunError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        sys.exit(2)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags, `run`, and `changes`, which are the other key=value words."""
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__, formatter_class=look)
    parser.add_argument("words", nargs="*", metavar="key=value", help="run=<directory>, and options of its data")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="predictions of each test split to show")
    parser.add_argument("--wrong", action="store_true", help=f"show wrong ones only, {SHOWN} without --show")
    parser.add_argument("--prompt", metavar="INPUT", help="print what the model writes after it, and nothing else")
    parser.add_argument("--json", action="store_true", help="print the metrics as one line of JSON, and nothing else")
    options = parser.parse_intermixed_args(arguments)
    runs = [word.removeprefix("run=") for word in options.words if word.startswith("run=")]
    if len(runs) != 1:
        named = next((word for word in options.words if "=" not in word), "runs/2026-11-26_00-33-10-441156")
        parser.error(f"give one run, such as run={named}")
    if options.show < 0:
        parser.error(f"--show {options.show}: give a number of predictions")
    options.run, options.changes = runs[0], [word for word in options.words if not word.startswith("run=")]
    options.show = options.show or SHOWN * options.wrong
    return options


def evaluate(run: Run, weights: str, options: argparse.Namespace) -> None:
    """Test and print; or print what is written after a prompt.

    Raises:
        RunError: the run cannot be loaded, or not with these data, or the prompt cannot be read.
    """
    from rich.console import Console

    from data.decoding import predict
    from run.build import load_run, told
    from run.cpu import prepare_machine

    prepare_machine()
    task, data, cfg = load_run(options.run, options.changes)
    if options.prompt is not None:
        with told(f"--prompt {options.prompt!r}"):
            print(predict(task.model, data, [options.prompt])[0])
        return
    with told(f"{options.run} cannot be tested"):
        metrics = tested(task, data, cfg)
    known = trained_on(run, data) if options.changes else {}
    if options.json:
        found = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        print(json.dumps(found | {f"{split}/trained_on": n for split, n in known.items()}))
        return
    stored, console = (run.summary or {}).get("test") or {}, Console(highlight=False)
    console.print(table(metrics, stored, "other data" if options.changes else "held-out test"))
    console.print(weights + ("" if stored else ", the run was not tested"), soft_wrap=True, markup=False)
    for split, n in known.items():
        of_all = f"{n:,} of {len(data.splits[split]):,} sequences"
        console.print(f"{split}: {of_all} are among those that the run was trained on")
    if options.show:
        for split in data.test_names:
            show(console, task, data, split, options)


def tested(task: PatternSearchTask, data: SequenceDataModule, cfg: DictConfig) -> dict[str, float]:
    """The metrics of the test splits, by name."""
    import lightning as L

    from run.quiet import silence_libraries

    silence_libraries()
    of_run = {name: cfg.trainer[name] for name in ("precision", "limit_test_batches") if name in cfg.trainer}
    quiet: dict[str, Any] = dict(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    accelerator = "cpu" if cfg.trainer.get("accelerator") == "cpu" else "auto"
    trainer = L.Trainer(accelerator=accelerator, devices=1, **quiet, **of_run)
    trainer.test(task, datamodule=data, verbose=False)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}


def table(metrics: Mapping[str, float], stored: Mapping[str, float], title: str) -> Table:
    """The metrics beside those that the run wrote into its summary.json, if it was tested."""
    from rich.table import Table

    rows = Table(title)
    for column in ("now", "summary.json") if stored else ("now",):
        rows.add_column(column, justify="right")
    for name, value in metrics.items():
        if not by_position(name):
            rows.add_row(name, f"{value:.4f}", *([f"{stored[name]:.4f}"] if name in stored else []))
    return rows


def trained_on(run: Run, data: SequenceDataModule) -> dict[str, int]:
    """How many sequences of each test split the run was trained on, where there are any."""
    from run.build import data_of_run

    seen = {*data_of_run(run.config).splits["train"].inputs()}
    counts = {split: sum(row in seen for row in data.splits[split].inputs()) for split in data.test_names}
    return {split: n for split, n in counts.items() if n}


def show(
    console: Console, task: PatternSearchTask, data: SequenceDataModule, split: str, options: argparse.Namespace
) -> None:
    """Predictions of a split beside the truth."""
    from data.decoding import decode_rows, wrong_rows

    n = len(data.splits[split])
    rows = wrong_rows(task.model, data, split) if options.wrong else range(n)
    what = f"{len(rows):,} wrong of {n:,}" if options.wrong else f"{n:,} sequences"
    what += f", the first {options.show}" if options.show < len(rows) else ""
    console.print(f"\n[bold]{split}[/]: {what}")
    for prediction in decode_rows(task.model, data, split, rows[: options.show]):
        for line in lines(prediction, console.width, data.separator):
            console.print(line, markup=False, no_wrap=True, overflow="ellipsis")


def lines(prediction: dict[str, list[str]], width: int, separator: str = " ") -> Iterator[str]:
    """A prediction as lines of at most `width` characters: the input, then the output above the truth."""
    from data.decoding import in_columns

    mark = "right" if prediction["output"] == prediction["truth"] else "wrong"
    yield from in_columns({f"{mark}  input ": prediction["input"]}, width, separator)
    yield from in_columns({f"{'':5}  {name:<6}": prediction[name] for name in ("output", "truth")}, width, separator)


if __name__ == "__main__":
    with printing():
        main(sys.argv[1:])
