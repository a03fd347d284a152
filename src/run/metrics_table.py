"""The local metrics table of a run, `metrics.csv`: one row per value, ready for seaborn.

Every run appends to it, whatever `logger` is. The header never changes and rows are only appended, so a killed run
leaves a readable table. `results/runs.py` reads it.
"""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from results.runs import COLUMNS


class MetricsTable(Logger):
    """A Lightning logger that appends every metric to `<run_dir>/metrics.csv`."""

    name, version = "metrics_table", ""

    def __init__(self, run_dir: str | Path):
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self._axes = {"evaluations": 0.0, "seconds": 0.0}
        if not self.path.exists():
            self._append([COLUMNS])

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The config is saved beside the table, as config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        metrics = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        self._axes |= {axis: metrics.pop(axis) for axis in self._axes if axis in metrics}
        place = [step, int(self._axes["evaluations"]), f"{self._axes['seconds']:.4f}"]
        self._append([[*place, name, value] for name, value in metrics.items()])

    def _append(self, rows: list[list[Any]]) -> None:
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerows(rows)

    def sync(self) -> int:
        """Have all rows survive a crash of the machine; returns the bytes of the table, where a resumed run goes on."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def cut(self, size: int) -> None:
        """Drop what lies behind the first `size` bytes: rows of steps that will be done again, or half a row."""
        os.truncate(self.path, min(size, self.path.stat().st_size))
