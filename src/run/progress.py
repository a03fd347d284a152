"""Progress that also moves during a long poll: live on a terminal, plain lines in the log file.

The display reads the optimizer's counters from a thread of its own, a few times a second: the
optimizer knows nothing of it and is never slowed down by it.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from statistics import correlation, linear_regression
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from run.hints import Recent, hints

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
        self._stop = threading.Event()
        self._recent: Recent | None = None  # until training starts
        self._next_hint: dict[str, int] = {}  # evaluations before which a hint is not repeated
        self._restored: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        if self._recent is None:
            return {}
        return {"recent": self._recent.state_dict(), "next_hint": self._next_hint, "accepted": self._accepted}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict  # training has not started yet

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self._trainer, self._task = trainer, task
        self._started, self._evaluations = time.monotonic(), task.evaluations
        self._accepted = self._restored.get("accepted", 0)
        self._loss = self._exact_match = self._eta = None
        self._first_step = trainer.global_step  # not 0 in a run that goes on
        self._polling = 0.0  # seconds in the steps of a search
        self._trend: deque[tuple[float, float]] = deque(maxlen=TREND)  # seconds since the start, loss with a target
        self._monitor, self._target = target_of(trainer, task)
        self._recent = Recent(trainer.datamodule.chance_loss)
        self._recent.load_state_dict(self._restored.get("recent", {}))
        self._next_hint = dict(self._restored.get("next_hint", {}))
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    # the thread reads only what these hooks leave: asking Lightning for metrics while it updates them would be a race

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, outputs: Any, *_: Any) -> None:
        report = getattr(task.search, "report", None)
        self._accepted += getattr(report, "accepted", 0)
        self._loss = float(outputs["loss"]) if report is None else report.loss_after
        self._recent.train_losses.append(self._loss if report is None else report.loss_before)
        if report is not None:
            self._polling += report.seconds
            self._recent.accepted.append(report.accepted > 0)
            if report.search_accepted is not None:
                self._recent.search_accepted.append(report.search_accepted)

    def on_validation_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        if trainer.sanity_checking:  # before the start of training
            return
        self._exact_match = trainer.callback_metrics.get("val/exact_match")
        if (loss := trainer.callback_metrics.get("val/loss")) is not None:
            self._recent.val_losses.append(float(loss))
        if self._target is not None:
            loss = self._loss if self._monitor == "train/loss" else trainer.callback_metrics.get(self._monitor)
            if loss is not None:
                self._trend.append((time.monotonic() - self._started, float(loss)))
                self._eta = time_to(self._target, *zip(*self._trend, strict=True))
        self._recent.evaluations = task.evaluations
        for name, text in hints(self._recent):
            if task.evaluations >= self._next_hint.get(name, 0):
                self._next_hint[name] = 2 * task.evaluations
                log.info("hint: %s", text)
                self.console.print(f"hint: {text}", soft_wrap=True, highlight=False, markup=False)

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
            BarColumn(bar_width=16 if self.console.width >= 120 else 8),
            TextColumn("{task.description}"),
            console=self.console,
            auto_refresh=False,
            transient=True,
        )
        next_line = time.monotonic() + self.log_every_seconds
        room = self.console.width - bar.columns[1].bar_width - len("step   ")
        with bar if self.console.is_terminal else threading.Lock():
            row = bar.add_task("starting", total=None, step="0")
            while not self._stop.wait(self.refresh_seconds):
                done, total, parts = self._status()
                step = f"{int(done)}/{total}"
                if self.console.is_terminal:
                    bar.update(
                        row,
                        completed=done,
                        step=step,
                        total=total if total != "?" else None,
                        description=fitting(parts, room - len(step)),
                        refresh=True,
                    )
                if time.monotonic() >= next_line:
                    next_line += self.log_every_seconds
                    self._log(f"step {step} {' · '.join(parts)}", show=not self.console.is_terminal)
        done, total, parts = self._status()
        self._log(f"step {int(done)}/{total} {' · '.join(parts)}", show=True)

    def _log(self, line: str, show: bool) -> None:
        log.info(line)
        if show:
            print(line, flush=True)

    def _status(self) -> tuple[float, int | str, list[str]]:
        """Steps done (with the share of the current one), steps in all, and what to say, the most important first."""
        trainer, task = self._trainer, self._task
        optimizer = task.search
        report = getattr(optimizer, "report", None)
        total = trainer.estimated_stepping_batches
        total = "?" if total == float("inf") else int(total)
        done, accepted = float(trainer.global_step), self._accepted
        loss = self._loss
        if report is not None and report.done < report.planned:  # within a step
            loss = report.loss_after
            done, accepted = done + report.done / report.planned, accepted + report.accepted
        elapsed = time.monotonic() - self._started
        parts, left = [f"loss {loss:.4f}" if loss is not None else "loss -"], math.inf
        if isinstance(total, int) and done > self._first_step:
            left = elapsed * max(total - done, 0) / (done - self._first_step)
            parts.append(f"left at most {clock(left)}")
        if self._target is not None:
            far = self._eta is None or self._eta > left
            parts.append("target not in sight" if far else f"target in about {clock(self._eta)}")
        rate = (task.evaluations - self._evaluations) / max(elapsed, 1e-9)
        parts += [f"evaluations {task.evaluations:,} ({rate:,.0f}/s)"]
        if self._exact_match is not None:
            parts.append(f"val exact match {float(self._exact_match):.3f}")
        if report is not None:
            polling = self._polling + (report.seconds if report.done < report.planned else 0)
            radii = dict.fromkeys(f"{group['radius']:.3g}" for group in optimizer.param_groups)  # equal ones once
            parts += [
                f"accepted {accepted:,}",
                f"polls {min(polling / max(elapsed, 1e-9), 1):.0%} of time",
                f"radius {'/'.join(radii)}",
            ]
        return done, total, parts


def fitting(parts: Sequence[str], width: int) -> str:
    """As many of the parts, from the first on, as fit into a line of so many columns."""
    lines = [" · ".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((line for line in lines if len(line) <= width), lines[-1])


def target_of(trainer: L.Trainer, task: L.LightningModule) -> tuple[str, float | None]:
    """The loss that ends training, by name, and the value at which it does: of early stopping, else of the search."""
    for callback in trainer.early_stopping_callbacks:
        if callback.stopping_threshold and callback.mode == "min":
            return callback.monitor, callback.stopping_threshold
    return "train/loss", task.search and task.search.limits.target_loss


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
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
