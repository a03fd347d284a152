"""W&B for runs that are stopped and go on, and that do not depend on it: the logger of configs/logger/wandb.yaml."""

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger

from run.directory import starts

os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds; without a network wandb would wait for ever
os.environ.setdefault("WANDB_FINISH_TIMEOUT_RAISES", "true")


class WandbRun(WandbLogger):
    """Lightning's logger, with one W&B run for all starts of a run; if W&B fails on the way, training goes on.

    `save_dir` is the run's directory, whose environment.json keeps the id of the W&B run.
    """

    lost = False  # whether W&B failed since its run began; of the class, since a process has one run of wandb at a time

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of wandb; the first look at it begins it."""
        if self._experiment is None:
            self._wandb_init.pop("anonymous", None)  # Lightning passes it, and wandb warns of it
            self._wandb_init["id"] = self._wandb_init["id"] or starts(Path(self.save_dir))[-1]["wandb_id"]
        return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if WandbRun.lost:
            return
        try:
            super().log_metrics(metrics, step)
        except Exception as error:  # of many kinds: wandb's own, those of its connection and of its process
            leave(error)


def leave(error: Exception) -> None:
    """Say, once a run, that W&B is left behind."""
    if not WandbRun.lost:
        reason = f"{type(error).__name__}: {error}"
        line = f"W&B failed ({reason}); the run does not need it: metrics.csv has everything"
        logging.getLogger(__name__).info(line)  # in train.log
        print(line, file=sys.stderr, flush=True)
    WandbRun.lost = True


def finish(mode: str | None, exit_code: int) -> None:
    """End the W&B run of this job, so that the next job of a sweep gets its own, and its own mode.

    Args:
        mode: WANDB_MODE as it was before the job.
        exit_code: of the job.
    """
    if wandb := sys.modules.get("wandb"):
        try:
            wandb.finish(exit_code=exit_code)
        except Exception as error:
            leave(error)
            wandb.run = None  # else the next job would go on with it, and with the same dead process
            with suppress(Exception):
                wandb.teardown()
        WandbRun.lost = False
    os.environ.pop("WANDB_MODE", None)  # WandbLogger(offline=True) sets it for the whole process
    if mode is not None:
        os.environ["WANDB_MODE"] = mode
