"""Checkpoints that a killed run goes on from, as if nothing had happened.

`Checkpoints` is part of every run. It saves at one kind of moment only, just before a step, where everything the
steps so far have caused is done: validation, rows of the metrics table, best weights. What a step needs is in the
file, so the continued run takes the same decisions; `run/resume.py` chooses the file.
"""

import io
import math
import os
import random
import time
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.plugins.io import TorchCheckpointIO

from run.files import RESUMABLE, replacing, sync_directory
from run.interrupts import Interrupted, Interrupts
from run.metrics_table import MetricsTable
from search.base import LossOnlyOptimizer


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, with tensors on the CPU; ValueError if its own checksums or its end are wrong."""
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch itself does not look at the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise
    except Exception as error:  # of many kinds, according to where the file is cut
        raise ValueError(f"{path} is damaged: {error}") from error


def selected_weights(trainer: L.Trainer) -> str | None:
    """The checkpoint that the first checkpoint callback kept: the best on validation, or the newest if none is."""
    kept = [c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint | Checkpoints)]
    return next((path for path in kept if path), None)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes every checkpoint of Lightning, best.ckpt too, so that no kill leaves half a file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)  # straight to a full disk it would raise a RuntimeError that names no reason
        with replacing(path) as file:
            file.write(content.getbuffer())


class Checkpoints(Checkpoint):
    """Keeps `checkpoints/last.ckpt` and the one before, previous.ckpt, and goes on from either.

    Args:
        run_dir: the run's directory.
        limits: what ends the run. A run that ended goes on only if they have changed.
        interrupts: a signal that came is answered before the next step, once its checkpoint is written.
        every_seconds: between two checkpoints; None not to look at the time.
        every_steps: the same in steps.

    Raises:
        Interrupted: from within `Trainer.fit`, when a signal came.
        OSError: a checkpoint cannot be written; those on the disk are as they were.
    """

    def __init__(
        self,
        run_dir: str | Path,
        limits: dict[str, Any],
        interrupts: Interrupts,
        every_seconds: float | None = 15,
        every_steps: int | None = None,
    ):
        self.run_dir, self.limits, self.interrupts = Path(run_dir), limits, interrupts
        self.every_seconds = math.inf if every_seconds is None else every_seconds
        self.every_steps = math.inf if every_steps is None else every_steps
        self._saved_at, self._saved_step = time.monotonic(), 0
        self._to_add: dict[str, Any] | None = None  # to the checkpoint that is being written
        self._restored: dict[str, Any] | None = None  # until the first step that follows

    @property
    def last(self) -> Path:
        return self.run_dir / "checkpoints" / RESUMABLE[0]

    @property
    def best_model_path(self) -> str | None:
        """The newest checkpoint, the best one if nothing is monitored. (The name is that of Lightning's callback.)"""
        return str(self.last) if self.last.exists() else None

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self.interrupts.listen()
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._restored is not None:
            restore(trainer, self._restored)
            self._restored = None
        if batch_idx % trainer.accumulate_grad_batches != 0:  # there are gradients that no checkpoint holds
            return
        seconds, steps = time.monotonic() - self._saved_at, trainer.global_step - self._saved_step
        if self.interrupts.received or seconds >= self.every_seconds or steps >= self.every_steps:
            self._save(trainer, trainer.fit_loop.state_dict())
        if self.interrupts.received:
            raise Interrupted

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self._save(trainer, as_before_next_step(trainer), ended=self.limits)

    # --- saving ---

    def _save(self, trainer: L.Trainer, fit_loop: dict[str, Any], ended: dict[str, Any] | None = None) -> None:
        table = next(logger for logger in trainer.loggers if isinstance(logger, MetricsTable))
        self._to_add = {
            "fit_loop": fit_loop,
            "ended": ended,
            "generators": generator_states(),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "table_bytes": table.sync(),
            "run_dir": str(self.run_dir),
        }
        newest = self.last.with_name("newest.ckpt")
        trainer.save_checkpoint(newest)
        self._to_add = None
        if self.last.exists():
            os.replace(self.last, self.last.with_name(RESUMABLE[1]))
        os.replace(newest, self.last)
        sync_directory(self.last.parent)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def on_save_checkpoint(self, trainer: L.Trainer, task: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._to_add is not None:  # it is none of best.ckpt, which is written amid the loops: nothing goes on there
            checkpoint["resume"] = self._to_add

    # --- going on ---

    def on_load_checkpoint(self, trainer: L.Trainer, task: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":  # a test wants the weights; what the callbacks know of the run stays
            checkpoint["callbacks"] = {}
            return
        self._restored = checkpoint["resume"]
        MetricsTable(self.run_dir).cut(self._restored["table_bytes"])
        checkpoint["loops"]["fit_loop"] = as_lightning_restarts(self._restored["fit_loop"])
        checkpoint["callbacks"] = moved(checkpoint["callbacks"], self._restored["run_dir"], str(self.run_dir))
        if self._restored["ended"] == self.limits:
            trainer.should_stop = True


def restore(trainer: L.Trainer, state: dict[str, Any]) -> None:
    """Lightning guesses its counters from what was saved; here they are what they were at this very place."""
    trainer.fit_loop.load_state_dict(state["fit_loop"])
    trainer.fit_loop.restarting = False
    trainer.callback_metrics.update({name: torch.tensor(x) for name, x in state["metrics"].items()})
    set_generator_states(state["generators"])
    if state["ended"] is not None:  # and now its limits are larger
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, LossOnlyOptimizer):
                optimizer.look_at_limits()
        for early in trainer.early_stopping_callbacks:
            if early is not None:
                early.stopped_epoch, early.stopping_reason = 0, EarlyStoppingReason.NOT_STOPPED


# --- the counters of Lightning's loops: what was begun is counted as `ready`, what was done as `completed` ---


def as_before_next_step(trainer: L.Trainer) -> dict[str, Any]:
    """The state of the loops after the end, as it will be before the next step if the run is ever prolonged."""
    state = trainer.fit_loop.state_dict()
    batches, epochs = state["epoch_loop.batch_progress"], state["epoch_progress"]
    if batches["current"]["completed"] == trainer.num_training_batches:  # the next step begins an epoch
        batches["current"] = dict.fromkeys(batches["current"], 0)
        begun, done, loader_epochs = 1, 0, 1
    else:  # it goes on with the one that the end cut short, which was counted as done
        begun, done, loader_epochs = 0, -1, 0
    for count in (epochs["total"], epochs["current"]):
        for name, more in dict(ready=begun, started=begun, processed=done, completed=done).items():
            count[name] += more
    for count in (batches["total"], batches["current"]):
        count["ready"] += 1
    batches["is_last_batch"] = batches["current"]["ready"] == trainer.num_training_batches
    for loader in state["state_dict"].get("combined_loader", []):
        loader["epoch"] += loader_epochs
    return state


def as_lightning_restarts(fit_loop: dict[str, Any]) -> dict[str, Any]:
    """The state before a step, such that Lightning comes by itself to the same step with the same batch."""
    batches = fit_loop["epoch_loop.batch_progress"]
    done = batches["current"]["completed"]
    loaders = [loader | {"position": done} for loader in fit_loop["state_dict"].get("combined_loader", [])]
    return fit_loop | {
        "epoch_loop.batch_progress": batches | {"is_last_batch": False},  # of the step to come, not of the one done
        "state_dict": fit_loop["state_dict"] | {"combined_loader": loaders},  # the batch of that step was taken already
    }


def moved(state: Any, old: str, new: str) -> Any:
    """The state of callbacks, with the paths in the run's directory where it lies now."""
    if isinstance(state, dict):
        return {moved(key, old, new): moved(value, old, new) for key, value in state.items()}
    return new + state.removeprefix(old) if isinstance(state, str) and Path(state).is_relative_to(old) else state


# --- the generators that belong to nobody: dropout draws from torch's ---


def generator_states() -> dict[str, Any]:
    state: Any = np.random.get_state()  # a tuple, unless asked otherwise
    kind, keys, *rest = state
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),  # an array would not load with weights_only
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),  # empty without CUDA
    }


def set_generator_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state_all(states["cuda"])
