"""Progress that also moves during a long poll: live on a terminal, plain lines in the log file.

The display reads the optimizer's report from a thread of its own, a few times a second: the
optimizer knows nothing of it and is never slowed down by it.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from statistics import correlation, linear_regression
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Timer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pattern_search_task import PatternSearchTask
from run.hints import Recent, hints
from search.budget import StepReport

log = logging.getLogger("progress")
TREND = 12  # validations that the time to the target is estimated from


class SearchProgress(Callback):
    """Shows loss, the times left, evaluations and evaluations/s, accuracy, accepted moves, share of polls, radius.

    After each validation it looks for signs of stagnation, and says each once, and again at twice the evaluations.

    Args:
        refresh_per_second: of the live display.
        log_every_seconds: seconds between two lines in the log file, and on an output that is no terminal.
    """

    def __init__(self, refresh_per_second: float = 4, log_every_seconds: float = 10):
        self.refresh_seconds, self.log_every_seconds = 1 / refresh_per_second, log_every_seconds
        self.console = Console()
        self.status: Status | None = None  # until training starts
        self._restored: dict[str, Any] = {}
        self._thread: threading.Thread | None = None  # while it trains
        self._ended = threading.Event()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.status is None else self.status.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict  # training has not started yet

    # Lightning's hooks name any LightningModule; this one is of runs of a PatternSearchTask only
    def on_train_start(self, trainer: L.Trainer, task: PatternSearchTask) -> None:  # type: ignore[override]
        self.status = Status(trainer, task, self._restored)
        self._ended.clear()
        self._thread = threading.Thread(target=self._show, args=[self.status], name="progress", daemon=True)
        self._thread.start()

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, *_: Any) -> None:
        if self.status is not None:
            self.status.step_ended(outputs)

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if self.status is None or trainer.sanity_checking:
            return
        for text in self.status.validated():
            log.info("hint: %s", text)
            self.console.print(f"hint: {text}", soft_wrap=True, highlight=False, markup=False)

    def on_train_end(self, *_: Any) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            self._thread = None

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()

    def _show(self, status: "Status") -> None:
        live, width = self.console.is_terminal, 16 if self.console.width >= 120 else 8
        columns = TextColumn("step {task.fields[step]}"), BarColumn(bar_width=width), TextColumn("{task.description}")
        bar = Progress(*columns, console=self.console, auto_refresh=False, transient=True, disable=not live)
        next_line = time.monotonic() + self.log_every_seconds
        with bar:
            row = bar.add_task("starting", total=None, step="0")
            while not self._ended.wait(self.refresh_seconds):
                total = None if math.isinf(status.total) else status.total
                description = fitting(status.parts(), self.console.width - width - len(f"step {status.step()}  "))
                looks: dict[str, Any] = dict(completed=status.steps(), total=total, description=description)
                bar.update(row, **looks, step=status.step(), refresh=True)
                if time.monotonic() >= next_line:
                    next_line += self.log_every_seconds
                    self._log(status, show=not live)
        self._log(status, show=True)

    def _log(self, status: "Status", show: bool) -> None:
        line = f"step {status.step()} {' · '.join(status.parts())}"
        log.info(line)
        if show:
            print(line, flush=True)


class Status:
    """What is known of a training that runs.

    The hooks leave it here and the display's thread reads it: asking Lightning for metrics while it updates them would
    be a race.

    Args:
        restored: the `state_dict` of the run that goes on; empty for a new one.
    """

    def __init__(self, trainer: L.Trainer, task: PatternSearchTask, restored: dict[str, Any]):
        self.trainer, self.task, self.search = trainer, task, task.search
        self.total = trainer.estimated_stepping_batches  # steps; inf without a limit
        self.monitor, self.target = target_of(trainer, task)
        self.trend: deque[tuple[float, float]] = deque(maxlen=TREND)  # seconds since the start, loss with a target
        self.loss: float | None = None
        self.exact_match: float | None = None
        self.seconds_to_target: float | None = None
        self.accepted: int = restored.get("accepted", 0)
        self.next_hint: dict[str, int] = dict(restored.get("next_hint", {}))  # evaluations before which it is not said
        self.recent = Recent(trainer.datamodule.chance_loss)  # type: ignore[attr-defined]
        self.recent.load_state_dict(restored.get("recent", {}))
        self.started, self.spent_before = time.monotonic(), self.spent()  # not 0 in a run that goes on

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent.state_dict(), "next_hint": self.next_hint, "accepted": self.accepted}

    def step_ended(self, outputs: Any) -> None:
        if self.search is None:
            self.loss = float(outputs["loss"])
            self.recent.train_losses.append(self.loss)
            return
        report = self.search.report
        self.loss = report.loss_after
        self.accepted += report.accepted
        self.recent.train_losses.append(report.loss_before)
        self.recent.accepted.append(report.accepted > 0)
        if report.search_accepted is not None:
            self.recent.search_accepted.append(report.search_accepted)

    def validated(self) -> Iterator[str]:
        """Take in the newest validation; returns hints to say."""
        metrics = self.trainer.callback_metrics
        if (exact_match := metrics.get("val/exact_match")) is not None:
            self.exact_match = float(exact_match)
        if (loss := metrics.get("val/loss")) is not None:
            self.recent.val_losses.append(float(loss))
        monitored = self.loss if self.monitor == "train/loss" else metrics.get(self.monitor)
        if self.target is not None and monitored is not None:
            self.trend.append((time.monotonic() - self.started, float(monitored)))
            self.seconds_to_target = time_to(self.target, *zip(*self.trend, strict=True))
        self.recent.evaluations = self.task.evaluations
        return due(self.recent, self.next_hint)

    def steps(self) -> float:
        """Steps done, with the share of the one that runs."""
        report = self.search.report if self.search is not None else StepReport()
        return self.trainer.global_step + (report.done / report.planned if report.done < report.planned else 0)

    def step(self) -> str:
        return f"{int(self.steps())}/{'?' if math.isinf(self.total) else int(self.total)}"

    def spent(self) -> dict[str, float]:
        """What the run has taken so far, by the limit that it counts for."""
        seconds = 0.0 if self.search is None else self.search.saved["seconds"]
        return {"max_steps": self.steps(), "max_evaluations": self.task.evaluations, "max_seconds": seconds}

    def seconds_left(self) -> float:
        """Seconds until the first limit ends the run, at the speed so far; inf while nothing is known."""
        elapsed, left = time.monotonic() - self.started, [time_left(self.trainer)]
        limits = {"max_steps": self.total} | ({} if self.search is None else vars(self.search.limits))
        for name, spent in self.spent().items():
            limit, spent_here = limits.get(name), spent - self.spent_before[name]
            if limit is not None and spent_here > 0:
                left.append(elapsed * (limit - spent) / spent_here)
        return max(min(left), 0.0)

    def parts(self) -> list[str]:
        """What to say, the most important first."""
        elapsed, left = max(time.monotonic() - self.started, 1e-9), self.seconds_left()
        per_second = {name: (spent - self.spent_before[name]) / elapsed for name, spent in self.spent().items()}
        loss, accepted = self.loss, self.accepted
        if self.search is not None and (report := self.search.report).done < report.planned:  # within a step
            loss, accepted = report.loss_after, accepted + report.accepted
        parts = [f"loss {loss:.4f}" if loss is not None else "loss -"]
        if math.isfinite(left):
            parts.append(f"left at most {clock(left)}")
        if self.target is not None:
            near = self.seconds_to_target is not None and self.seconds_to_target <= left
            parts.append(f"target in about {clock(self.seconds_to_target or 0)}" if near else "target not in sight")
        parts.append(f"evaluations {self.task.evaluations:,} ({per_second['max_evaluations']:,.0f}/s)")
        if self.exact_match is not None:
            parts.append(f"val exact match {self.exact_match:.3f}")
        if self.search is not None:
            polling = f"polls {min(per_second['max_seconds'], 1):.0%} of time"
            parts += [f"accepted {accepted:,}", polling, *self.search.status()]
        return parts


def due(recent: Recent, next_hint: dict[str, int]) -> Iterator[str]:
    """Hints that apply and were not said at more than half of the evaluations; notes in `next_hint` when to repeat."""
    for name, text in hints(recent):
        if recent.evaluations >= next_hint.get(name, 0):
            next_hint[name] = 2 * recent.evaluations
            yield text


def time_left(trainer: L.Trainer) -> float:
    """Seconds until `trainer.max_time`; inf without it."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return min((left for timer in timers if (left := timer.time_remaining()) is not None), default=math.inf)


def fitting(parts: Sequence[str], width: int) -> str:
    """As many of the parts, from the first on, as fit into a line of so many columns."""
    lines = [" · ".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((line for line in lines if len(line) <= width), lines[-1])


def target_of(trainer: L.Trainer, task: PatternSearchTask) -> tuple[str, float | None]:
    """The loss that ends training, by name, and the value at which it does: of early stopping, else of the search."""
    for callback in trainer.early_stopping_callbacks:
        if callback is not None and callback.stopping_threshold and callback.mode == "min":
            return callback.monitor, callback.stopping_threshold
    return "train/loss", None if task.search is None else task.search.limits.target_loss


def time_to(target: float, seconds: Sequence[float], losses: Sequence[float]) -> float | None:
    """Seconds from the last loss until the target, if losses go on falling exponentially; None without a clear trend.

    Early on the loss falls slower than it will, so this is rather too long than too short.
    """
    if len(losses) < TREND // 2 or not all(0 < loss < math.inf for loss in (target, *losses)):
        return None
    if len({*seconds}) == 1 or len({*losses}) == 1:  # no line through them
        return None
    logs = [math.log(loss) for loss in losses]
    trend = linear_regression(seconds, logs)
    if trend.slope >= 0 or correlation(seconds, logs) > -0.8:
        return None
    left = max((math.log(target) - trend.intercept) / trend.slope - seconds[-1], 0.0)
    return left if left < 50 * (seconds[-1] - seconds[0]) else None


def clock(seconds: float) -> str:
    """Seconds as 1:02:03, or 2:03 below an hour."""
    return str(timedelta(seconds=round(seconds))).removeprefix("0:").removeprefix("0")
