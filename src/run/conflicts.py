"""What cannot run though each option is right by itself: with this machine, the data, a search, or another option."""

import json
from collections.abc import Iterator

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from config.compose import shown
from config.did_you_mean import unknown
from data.sequences import SequenceDataModule
from pattern_search_task import PatternSearchTask
from run import wandb_account
from search.base import LossOnlyOptimizer

READERS = {"task.pattern_search_radius": "optimizer", "wandb.entity": "logger", "wandb.project": "logger"}  # as ${key}


def of_machine(cfg: DictConfig) -> Iterator[str]:
    """What the config asks of the machine and cannot get."""
    accelerator = cfg.trainer.get("accelerator")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        yield f"trainer.accelerator={accelerator}: this machine has no CUDA GPU; use trainer.accelerator=cpu"
    if cfg.logger.get("offline") is False and (problem := wandb_account.problem()):
        yield f"logger.offline=false: {problem}, or use logger.offline=true and upload later"


def of_trainer(cfg: DictConfig, data: SequenceDataModule, task: PatternSearchTask, trainer: L.Trainer) -> Iterator[str]:
    """What the trainer accepts, and what cannot run with these data, or with a search."""

    def given(name: str) -> str:
        return f"trainer.{name}={shown(cfg.trainer.get(name))}"

    for name in ("check_val_every_n_epoch", "val_check_interval", "log_every_n_steps"):
        if isinstance(value := cfg.trainer.get(name), int | float) and value <= 0:
            yield f"{given(name)} must be above 0"
    if cfg.trainer.get("fast_dev_run"):
        instead = "use trainer.max_steps=1 trainer.limit_val_batches=1"
        yield f"{given('fast_dev_run')}: Lightning would take loggers and checkpoints away; {instead}"
    for name, neutral in {"gradient_clip_val": (None, 0), "accumulate_grad_batches": (None, 1)}.items():
        if not task.automatic_optimization and cfg.trainer.get(name) not in neutral:
            yield f"{given(name)} is for gradients, and a search has none"
    if not task.automatic_optimization and "mixed" in str(trainer.precision):
        yield f"{given('precision')} hides the closure from a search; use 32-true or 64-true"
    n_test = min(len(loader) for loader in data.test_dataloader())
    batches = {"train": len(data.train_dataloader()), "val": len(data.val_dataloader()), "test": n_test}
    for split, n in batches.items():
        limit = getattr(trainer, f"limit_{split}_batches")
        if isinstance(limit, float) and 0 < n * limit < 1:
            name = "overfit_batches" if cfg.trainer.get("overfit_batches") else f"limit_{split}_batches"
            yield f"{given(name)} of {n} batches is none; use a number, or 1.0 for all"
    limit, every = trainer.limit_train_batches, trainer.val_check_interval
    n_train = int(batches["train"] * limit) if isinstance(limit, float) else min(batches["train"], limit)
    if isinstance(every, int) and every > n_train > 0 and trainer.check_val_every_n_epoch is not None:
        across = "set trainer.check_val_every_n_epoch=null to count across epochs"
        yield f"trainer.val_check_interval={every} is more than the {n_train} batches of an epoch; {across}"
    if trainer.world_size != 1:
        name = "num_nodes" if trainer.num_nodes > 1 else "devices"
        yield f"{given(name)}: a run uses one process; use trainer.{name}=1"


def of_monitors(
    cfg: DictConfig, data: SequenceDataModule, task: PatternSearchTask, optimizer: torch.optim.Optimizer
) -> Iterator[str]:
    """Callbacks that wait for a metric which is never logged, or for the wrong direction of one."""
    if {"training_step", "validation_step"} & vars(type(task)).keys():
        return  # it may log what it likes
    scores, y = task.scores_class(), data.splits["val"].y[:100]
    scores.update(torch.zeros(*y.shape, data.n_classes), y)
    known = [f"val/{name}" for name in scores.compute()] + ["train/loss", "evaluations", "seconds", "epoch", "step"]
    if isinstance(optimizer, LossOnlyOptimizer):
        known += [f"train/{name}" for name in optimizer.metrics()]
    for name, callback in cfg.callbacks.items():
        key, kind = f"callbacks.{name}", callback._target_.rpartition(".")[2]
        if kind == "LearningRateMonitor" and not task.automatic_optimization:
            yield f"{key}: a search has no learning rate to log; leave it out"
        if callback.get("monitor") is None:
            continue
        monitor, mode, late = (
            str(callback.monitor),
            callback.get("mode", "min"),
            callback.get("check_on_train_epoch_end"),
        )
        if monitor not in known:
            yield unknown(f"{key}.monitor={monitor}", monitor, known)
        if mode == "min" and monitor.endswith(("accuracy", "exact_match")):
            yield f"{key}.mode=min: of {monitor}, higher is better; use {key}.mode=max"
        if mode == "max" and monitor.endswith("loss"):
            yield f"{key}.mode=max: of {monitor}, lower is better; use {key}.mode=min"
        if kind == "EarlyStopping" and monitor.startswith("val/") and late is not False:
            key = f"{key}.check_on_train_epoch_end"
            yield f"{key}={shown(late)} looks before the validation has run; use {key}=false"


def without_effect(cfg: DictConfig, data: SequenceDataModule, task: PatternSearchTask) -> Iterator[tuple[str, str]]:
    """The keys that nothing reads beside the choices that were made, each with a line that says why."""
    text = json.dumps(OmegaConf.to_container(cfg), default=str)
    unread = {key: f"the {reader} does not read it" for key, reader in READERS.items() if f"${{{key}}}" not in text}
    unread |= {f"datamodule.{name}": "the other options of the data leave it out" for name in data.unread}
    if task.automatic_optimization:
        unread["task.fast_polls"] = "only a search reads it"
    elif cfg.model.get("dropout"):
        unread["model.dropout"] = "it is off while a search polls"
    for key, why in unread.items():
        yield key, f"{key}={shown(OmegaConf.select(cfg, key))} has no effect: {why}; leave it out"
