"""A run that is looked at from outside while it trains, for the commands that draw what happens in it."""

from collections.abc import Callable
from typing import TypeVar

import lightning as L
from hydra.utils import instantiate

from config.check import checked_config
from data.sequences import SequenceDataModule
from pattern_search_task import PatternSearchTask
from run.build import build_datamodule, build_task
from run.cpu import prepare_machine

Watcher = TypeVar("Watcher", bound=L.Callback)


def train_watched(
    overrides: list[str], watch: Callable[[PatternSearchTask, SequenceDataModule], Watcher]
) -> tuple[PatternSearchTask, SequenceDataModule, Watcher]:
    """Train what a command of src/train.py trains, with nothing written, and one more callback, made by `watch`.

    Raises:
        ConfigError: the command cannot run, or `watch` says that it cannot be looked at.
    """
    cfg = checked_config(overrides)
    prepare_machine()
    datamodule = build_datamodule(cfg)
    L.seed_everything(cfg.seed, verbose=False)
    task = build_task(cfg, datamodule)
    watcher, wanted = watch(task, datamodule), ("averaging", "early_stopping", "progress", "limit")
    callbacks = [instantiate(cfg.callbacks[name]) for name in wanted if name in cfg.callbacks]
    quiet = dict(logger=False, enable_checkpointing=False)
    trainer = instantiate(cfg.trainer, callbacks=[*callbacks, watcher], **quiet)
    trainer.fit(task, datamodule=datamodule)
    return task, datamodule, watcher
