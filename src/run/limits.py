"""Limits that hold for any optimizer, by gradients or by losses."""

from dataclasses import replace
from typing import Any

import lightning as L

from pattern_search_task import PatternSearchTask


class MaxSeconds(L.Callback):
    """Ends a run after so many seconds of training; validations and setup are not counted.

    A search gets it as a limit of its own too, and so ends within a step. A run by gradients ends with the step behind
    the one that reached it.

    Args:
        max_seconds: spent in training steps, those of earlier starts of a resumed run included.

    Raises:
        ValueError: a limit that would be reached before anything has begun.
    """

    def __init__(self, max_seconds: float):
        if not max_seconds > 0:
            raise ValueError(f"max_seconds={max_seconds} must be above 0")
        self.max_seconds, self.reached = max_seconds, False

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        assert isinstance(task, PatternSearchTask)
        if task.search is not None:
            own = task.search.limits.max_seconds or self.max_seconds
            task.search.limits = replace(task.search.limits, max_seconds=min(own, self.max_seconds))
        self._look(trainer, task)  # a run that goes on may have spent them

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        assert isinstance(task, PatternSearchTask)
        self._look(trainer, task)

    def _look(self, trainer: L.Trainer, task: PatternSearchTask) -> None:
        self.reached = task.seconds >= self.max_seconds
        trainer.should_stop |= self.reached
