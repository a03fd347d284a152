"""The loggers of a run, and W&B for runs that are stopped and go on, and that do not depend on it."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from run.directory import starts
from run.interrupts import Interrupts, in_sweep
from run.metrics_table import MetricsTable

os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds; without a network wandb would wait for ever
os.environ.setdefault("WANDB_FINISH_TIMEOUT_RAISES", "true")


class WandbRun(WandbLogger):
    """Lightning's logger; if W&B fails on the way, training goes on.

    All starts of a run have one id, and all jobs of a sweep one group.

    Args:
        save_dir: the run's directory.
        offline: whether to log to the disk only; WANDB_MODE=disabled wins.
        log_model: whether to log checkpoints too.
        options: of `wandb.init`.
    """

    lost = False  # whether W&B failed on the way

    def __init__(self, save_dir: str, offline: bool = True, log_model: bool = False, **options: Any):
        disabled = os.environ.get("WANDB_MODE") == "disabled"
        started, chosen = starts(Path(save_dir)), HydraConfig.get().runtime.choices
        own: dict[str, Any] = {
            "mode": "disabled" if disabled else "offline" if offline else "online",
            "id": started[-1]["wandb_id"] if started else None,  # none yet while the config is checked
            "tags": [str(chosen.get(axis)) for axis in ("task", "model", "optimizer")],
            "group": Path(HydraConfig.get().sweep.dir).name if in_sweep() else None,
        }
        super().__init__(save_dir=save_dir, log_model=log_model, **own | options)
        self._wandb_init.pop("anonymous", None)  # Lightning passes it, and wandb warns of it

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.lost:
            return
        try:
            super().log_metrics(metrics, step)
        except Exception as error:  # of many kinds: wandb's own, those of its connection and of its process
            self.lose(error)

    def finish(self, exit_code: int) -> None:
        """End the run of wandb: the next job of a sweep begins its own."""
        import wandb  # only here: it takes a second, and most tests do without it

        try:
            wandb.finish(exit_code=exit_code)
        except Exception as error:
            self.lose(error)
            wandb.run = None  # else the next job goes on with it and its dead process
            with suppress(Exception):
                wandb.teardown()

    def lose(self, error: Exception) -> None:
        """Say once that W&B is left behind."""
        if not self.lost:
            line = f"W&B failed ({type(error).__name__}: {error}); the run does not need it: metrics.csv has everything"
            logging.getLogger(__name__).info(line)  # in train.log
            print(line, file=sys.stderr, flush=True)
        self.lost = True


@contextmanager
def opened_loggers(cfg: DictConfig, interrupts: Interrupts) -> Iterator[list[Logger]]:
    """The loggers of a run, the metrics table and the one of the config; they are closed when the run ends."""
    loggers: list[Logger] = [MetricsTable(cfg.output_dir)]
    status = "failed"
    try:
        if "_target_" in cfg.logger:
            loggers.append(instantiate(cfg.logger))
        for logger in loggers:
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
        yield loggers
        status = "aborted" if interrupts.received else "success"
        for logger in loggers:
            logger.finalize(status)
    finally:
        for logger in loggers:
            if isinstance(logger, WandbRun):
                logger.finish(exit_code=int(status != "success"))
