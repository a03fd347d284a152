"""Progress that also moves during a long poll, live on a terminal and as plain lines in the log file; and hints.

The display reads the optimizer's report from a thread of its own, a few times a second: the
optimizer knows nothing of it and is never slowed down by it.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from statistics import fmean
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Timer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from pattern_search_task import PatternSearchTask
from search.budget import StepReport

log = logging.getLogger("progress")

WINDOW = 100  # steps that the hints look back on
PATIENCE = 100_000  # evaluations that a search may spend at chance
AT_CHANCE = 0.97  # a training loss above this share of chance has learned nothing


class SearchProgress(Callback):
    """Shows the time left, steps, loss, evaluations and evaluations/s, accuracy, accepted moves, radius.

    After each validation it looks for signs of stagnation, and says each once.

    Args:
        refresh_per_second: of the live display.
        log_every_seconds: seconds between two lines in the log file, and on an output that is no terminal.
    """

    def __init__(self, refresh_per_second: float = 4, log_every_seconds: float = 10):
        self.refresh_seconds, self.log_every_seconds = 1 / refresh_per_second, log_every_seconds
        self.console = Console()
        self.train_losses, self.val_losses = deque[float](maxlen=WINDOW), list[float]()
        self.said = set[str]()  # hints
        self.exact_match = math.nan
        self.total = math.inf  # steps; inf without a limit
        self._thread: threading.Thread | None = None  # while it trains
        self._ended = threading.Event()

    # Lightning's hooks name any LightningModule; this one is of runs of a PatternSearchTask only
    def on_train_start(self, trainer: L.Trainer, task: PatternSearchTask) -> None:  # type: ignore[override]
        self.total = trainer.estimated_stepping_batches
        self._ended.clear()
        self._thread = threading.Thread(target=self._show, args=[trainer, task], name="progress", daemon=True)
        self._thread.start()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, task: PatternSearchTask, outputs: Any, *_: Any
    ) -> None:
        self.train_losses.append(float(outputs["loss"]) if task.search is None else task.search.report.loss_before)

    def on_validation_end(self, trainer: L.Trainer, task: PatternSearchTask) -> None:  # type: ignore[override]
        metrics = trainer.callback_metrics
        self.exact_match = float(metrics.get("val/exact_match", math.nan))
        self.val_losses.append(float(metrics.get("val/loss", math.nan)))
        chance: float = trainer.datamodule.chance_loss  # type: ignore[attr-defined]
        for name, text in hints(self.train_losses, self.val_losses, chance, task.evaluations).items():
            if name not in self.said:
                self.said.add(name)
                self._say(f"hint: {text}", show=True)

    def on_train_end(self, *_: Any) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def _show(self, trainer: L.Trainer, task: PatternSearchTask) -> None:
        live, started, next_line = self.console.is_terminal, time.monotonic(), time.monotonic()
        ended, evaluations_before = False, task.evaluations  # not 0 in a run that goes on
        text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        columns = BarColumn(bar_width=8), text  # so that the accuracy has room within 80 columns
        quiet: dict[str, Any] = dict(auto_refresh=False, transient=True, expand=True, disable=not live)
        with Progress(*columns, console=self.console, **quiet) as bar:
            row = bar.add_task("starting", total=1)
            while not ended:
                ended, now = self._ended.wait(self.refresh_seconds), time.monotonic()
                per_second = (task.evaluations - evaluations_before) / (now - started)
                share = share_done(trainer, task, self.total)
                bar.update(row, completed=share)
                left = None if ended else bar.tasks[0].time_remaining
                bar.update(row, description=status(trainer, task, self, per_second, None, left), refresh=True)
                if ended or now >= next_line + self.log_every_seconds:
                    next_line = now
                    done = None if ended else share
                    self._say(status(trainer, task, self, per_second, done, left), show=ended or not live)

    def _say(self, line: str, show: bool) -> None:
        log.info(line)
        if show:
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)


def status(
    trainer: L.Trainer,
    task: PatternSearchTask,
    seen: SearchProgress,
    per_second: float,
    share: float | None,
    left: float | None,
) -> str:
    """What to say in one line, the most important first.

    Args:
        per_second: evaluations.
        share: of the training that is done; None to leave it out.
        left: seconds to the nearest limit at the most; None if nobody knows, or there are none.
    """
    losses = [*seen.train_losses, *([task.search.report.loss_after] if task.search else [])]
    loss = next((loss for loss in reversed(losses) if math.isfinite(loss)), math.nan)  # a step begins without one
    parts = [f"loss {loss:.4f}"]
    if math.isfinite(seen.exact_match):
        parts.append(f"val exact match {seen.exact_match:.3f}")
    done = [] if share is None else [f"{share:.0%} done"]
    done += [] if left is None else [f"at most {timedelta(seconds=round(left))} left"]
    parts += [", ".join(done)] if done else []
    parts.append(f"evaluations {task.evaluations:,} ({per_second:,.0f}/s)")
    if task.search is not None:
        parts += task.search.status()
    total = "?" if math.isinf(seen.total) else int(seen.total)
    return f"step {trainer.global_step}/{total} {' · '.join(parts)}"


def share_done(trainer: L.Trainer, task: PatternSearchTask, total: float) -> float:
    """How much of the training is done, from 0 to 1, by the limit that is nearest."""
    report = report_of(task)
    steps = trainer.global_step + (report.done / report.planned if report.done < report.planned else 0)
    shares = [steps / max(total, 1)]
    if task.search is not None:
        limits, saved = task.search.limits, task.search.saved
        shares += [saved["evaluations"] / (limits.max_evaluations or math.inf)]
        shares += [saved["seconds"] / (limits.max_seconds or math.inf)]
    for timer in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(timer, Timer) and (left := timer.time_remaining()) is not None:
            shares.append(timer.time_elapsed() / max(timer.time_elapsed() + left, 1e-9))
    return min(max(shares), 1.0)


def report_of(task: PatternSearchTask) -> StepReport:
    """What the newest step of a search did, also while it runs; an empty report without a search."""
    return StepReport() if task.search is None else task.search.report


def hints(train: Sequence[float], val: Sequence[float], chance: float, evaluations: int) -> dict[str, str]:
    """Signs that training stagnates, by name, each with the setting to change. A run that gets on gets none.

    Args:
        train: of the newest steps, nats; without WINDOW of them it is too early to tell.
        val: of all validations, nats.
        chance: the loss of a uniform guess.
        evaluations: so far.
    """
    found: dict[str, str] = {}
    if len(train) < WINDOW:
        return found
    loss, best = fmean(train), min(val, default=0.0)
    if evaluations >= PATIENCE and loss > AT_CHANCE * chance:
        found["chance"] = (
            f"the training loss {loss:.3f} is still at chance ({chance:.3f}) after {evaluations:,} evaluations; "
            "try another task.pattern_search_radius, model.embedding_std or seed"
        )
    if loss < 0.5 * best and min(val[-3:]) > 1.2 * best:  # for three validations
        found["overfitting"] = (
            f"the training loss is {loss:.3f}, but validation has risen from {best:.3f} to {val[-1]:.3f}: "
            "it learns by heart; try a larger datamodule.n_samples or batch_size"
        )
    return found
