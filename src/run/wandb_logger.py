"""The loggers of a run, and W&B for runs that are stopped and go on, and that do not depend on it."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from run.directory import starts
from run.interrupts import Interrupts
from run.metrics_table import MetricsTable
from run.resume import in_sweep

os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds; without a network wandb would wait for ever
os.environ.setdefault("WANDB_FINISH_TIMEOUT_RAISES", "true")


class WandbRun(WandbLogger):
    """Lightning's logger; if W&B fails on the way, training goes on."""

    lost = False  # whether W&B failed on the way

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of wandb; the first look at it begins it."""
        self._wandb_init.pop("anonymous", None)  # Lightning passes it, and wandb warns of it
        return super().experiment

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self.lost:
            return
        try:
            super().log_metrics(metrics, step)
        except Exception as error:  # of many kinds: wandb's own, those of its connection and of its process
            self.lost = True
            say_lost(error)


@contextmanager
def opened_loggers(cfg: DictConfig, interrupts: Interrupts) -> Iterator[list[Logger]]:
    """The loggers of a run, the metrics table and the one of the config; they are closed when the run ends.

    All starts of a run have one W&B run, whose id its environment.json keeps. The next job of a sweep gets its own.
    """
    mode, status = os.environ.get("WANDB_MODE"), "failed"
    loggers: list[Logger] = [MetricsTable(cfg.output_dir)]
    try:
        if "_target_" in cfg.logger:
            target, own, chosen = get_object(cfg.logger["_target_"]), {}, cfg.logger
            of_wandb = isinstance(target, type) and issubclass(target, WandbLogger)
            if of_wandb:
                own["id"] = chosen.get("id") or chosen.get("version") or starts(Path(cfg.output_dir))[-1]["wandb_id"]
                own["group"] = chosen.get("group") or sweep_name()
                own["tags"] = chosen.get("tags") or [cfg.choices[axis] for axis in ("task", "model", "optimizer")]
            if not (of_wandb and mode == "disabled"):  # which WandbLogger(offline=True) would overrule
                loggers.append(instantiate(cfg.logger, **own))
        for logger in loggers:
            logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
        yield loggers
        status = "aborted" if interrupts.received else "success"
        for logger in loggers:
            logger.finalize(status)
    finally:
        finish_wandb(loggers, exit_code=int(status != "success"))


def sweep_name() -> str | None:
    """The directory of the sweep that this process runs a job of, if it does."""
    return Path(HydraConfig.get().sweep.dir).name if in_sweep() else None


def finish_wandb(loggers: Sequence[Logger], exit_code: int) -> None:
    """End the W&B run of this process, if it has one."""
    if (wandb := sys.modules.get("wandb")) is None:
        return
    try:
        wandb.finish(exit_code=exit_code)
    except Exception as error:
        if not any(isinstance(logger, WandbRun) and logger.lost for logger in loggers):
            say_lost(error)
        wandb.run = None  # type: ignore[attr-defined]  # else the next job goes on with it and its dead process
        with suppress(Exception):
            wandb.teardown()


def say_lost(error: Exception) -> None:
    """Say that W&B is left behind."""
    line = f"W&B failed ({type(error).__name__}: {error}); the run does not need it: metrics.csv has everything"
    logging.getLogger(__name__).info(line)  # in train.log
    print(line, file=sys.stderr, flush=True)
