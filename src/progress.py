"""Progress that also moves during a long poll: live on a terminal, plain lines in the log file.

The display reads the optimizer's counters from a thread of its own, a few times a second: the
optimizer knows nothing of it and is never slowed down by it.
"""

import logging
import threading
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

log = logging.getLogger("progress")


class SearchProgress(Callback):
    """Shows loss, accepted moves, radius, evaluations and evaluations/s, accuracy, and the time left.

    Args:
        refresh_per_second: of the live display.
        log_every_seconds: seconds between two lines in the log file, and on an output that is no terminal.
    """

    def __init__(self, refresh_per_second: float = 4, log_every_seconds: float = 10):
        self.refresh_seconds, self.log_every_seconds = 1 / refresh_per_second, log_every_seconds
        self.console = Console()
        self._stop = threading.Event()

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self._trainer, self._task = trainer, task
        self._started, self._evaluations, self._accepted = time.monotonic(), task.evaluations, 0
        self._loss = self._exact_match = None
        self._first_step = trainer.global_step  # not 0 in a run that goes on
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    # the thread reads only what these hooks leave: asking Lightning for metrics while it updates them would be a race

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, *_: Any) -> None:
        report = getattr(task.raw_optimizer, "report", None)
        self._accepted += getattr(report, "accepted", 0)
        self._loss = float(outputs["loss"]) if report is None else report.loss_after

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self._exact_match = trainer.callback_metrics.get("val/exact_match")

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self._finish()

    def on_exception(self, trainer: L.Trainer, task: L.LightningModule, exception: BaseException) -> None:
        self._finish()

    def _finish(self) -> None:
        if not self._stop.is_set() and hasattr(self, "_thread"):
            self._stop.set()
            self._thread.join()

    def _run(self) -> None:
        bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(bar_width=16),
            TextColumn("{task.description}"),
            console=self.console,
            auto_refresh=False,
            transient=True,
        )
        next_line = time.monotonic() + self.log_every_seconds
        with bar if self.console.is_terminal else threading.Lock():
            row = bar.add_task("starting", total=None, step="0")
            while not self._stop.wait(self.refresh_seconds):
                done, total, line = self._status()
                if self.console.is_terminal:
                    bar.update(
                        row,
                        completed=done,
                        step=f"{int(done)}/{total}",
                        total=total if total != "?" else None,
                        description=line,
                        refresh=True,
                    )
                if time.monotonic() >= next_line:
                    next_line += self.log_every_seconds
                    self._log(f"step {int(done)}/{total} {line}")
        done, total, line = self._status()
        self._log(f"step {int(done)}/{total} {line}")

    def _log(self, line: str) -> None:
        log.info(line)
        if not self.console.is_terminal:
            print(line, flush=True)

    def _status(self) -> tuple[float, int | str, str]:
        """Steps done (with the share of the current one), steps in all, and what to say."""
        trainer, task = self._trainer, self._task
        optimizer = task.raw_optimizer
        report = getattr(optimizer, "report", None)
        total = trainer.estimated_stepping_batches
        total = "?" if total == float("inf") else int(total)
        done, accepted = float(trainer.global_step), self._accepted
        loss = self._loss
        if report is not None and report.polled < report.to_poll:  # within a step
            loss = report.loss_after
            done, accepted = done + report.polled / report.to_poll, accepted + report.accepted
        elapsed = time.monotonic() - self._started
        parts = [f"loss {loss:.4f}" if loss is not None else "loss -"]  # what a narrow terminal cuts off comes last
        if isinstance(total, int) and done > self._first_step:
            parts.append(f"left at most {clock(elapsed * max(total - done, 0) / (done - self._first_step))}")
        rate = (task.evaluations - self._evaluations) / max(elapsed, 1e-9)
        parts += [f"evaluations {task.evaluations:,} ({rate:,.0f}/s)"]
        if self._exact_match is not None:
            parts.append(f"val exact match {float(self._exact_match):.3f}")
        if report is not None:
            radii = "/".join(f"{group['radius']:.3g}" for group in optimizer.param_groups)
            parts += [f"accepted {accepted:,}", f"radius {radii}"]
        return done, total, " · ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as 1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
