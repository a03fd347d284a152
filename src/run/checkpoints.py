"""Checkpoints that a killed run goes on from, as if nothing had happened.

`Checkpoints` is part of every run. It saves at one kind of moment only, just before a step, where everything the
steps so far have caused is done: validation, rows of the metrics table, best weights. What a step needs is in the
file, so the continued run takes the same decisions; `run/resume.py` chooses the file. Steps behind the newest file are
done again, also when a run that ended is prolonged.
"""

import io
import math
import time
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from results.runs import RESUMABLE
from run.directory import move, replacing
from run.interrupts import Interrupted, Interrupts
from run.metrics_table import MetricsTable


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
        interrupts: Interrupts,
        every_seconds: float | None = 15,
        every_steps: int | None = None,
    ):
        self.run_dir, self.interrupts = Path(run_dir), interrupts
        self.every_seconds = math.inf if every_seconds is None else every_seconds
        self.every_steps = math.inf if every_steps is None else every_steps
        self._saved_at, self._saved_step = time.monotonic(), 0
        self._to_add: dict[str, Any] | None = None  # to the checkpoint that is being written
        self._restored: dict[str, Any] | None = None  # until the first step that follows

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
            self._save(trainer)
        if self.interrupts.received:
            raise Interrupted

    def _save(self, trainer: L.Trainer) -> None:
        table = next(logger for logger in trainer.loggers if isinstance(logger, MetricsTable))
        self._to_add = {
            "fit_loop": trainer.fit_loop.state_dict(),
            "cpu_generator": torch.get_rng_state(),  # dropout draws from them
            "cuda_generators": torch.cuda.get_rng_state_all(),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "table_bytes": table.sync(),
            "run_dir": str(self.run_dir),
        }
        last, previous, newest = (self.run_dir / "checkpoints" / name for name in (*RESUMABLE, "newest.ckpt"))
        trainer.save_checkpoint(newest)
        self._to_add = None
        if last.exists():
            move(last, previous)
        move(newest, last)
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def on_save_checkpoint(self, trainer: L.Trainer, task: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._to_add is not None:  # it is none of best.ckpt, which is written amid the loops: nothing goes on there
            checkpoint["resume"] = self._to_add

    def on_load_checkpoint(self, trainer: L.Trainer, task: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":  # a test wants the weights; what the callbacks know of the run stays
            checkpoint["callbacks"] = {}
            return
        self._restored = checkpoint["resume"]
        MetricsTable(self.run_dir).cut(self._restored["table_bytes"])
        checkpoint["loops"]["fit_loop"] = as_lightning_restarts(self._restored["fit_loop"])
        checkpoint["callbacks"] = moved(checkpoint["callbacks"], self._restored["run_dir"], str(self.run_dir))


def restore(trainer: L.Trainer, state: dict[str, Any]) -> None:
    """Lightning guesses its counters from what was saved; here they are what they were at this very place."""
    trainer.fit_loop.load_state_dict(state["fit_loop"])
    trainer.fit_loop.restarting = False
    trainer.callback_metrics.update({name: torch.tensor(x) for name, x in state["metrics"].items()})
    torch.set_rng_state(state["cpu_generator"])
    torch.cuda.set_rng_state_all(state["cuda_generators"])


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
