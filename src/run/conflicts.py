"""What cannot run though each option is right by itself: with this machine, the data, a search, or another option."""

import json
from collections.abc import Iterator

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ProgressBar
from omegaconf import DictConfig, OmegaConf

from config.compose import CONFIGS, by_key, shown
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
    search, set_to = not task.automatic_optimization, cfg.trainer.get
    wrong: dict[str, str] = {}  # why, by option
    for name in ("check_val_every_n_epoch", "val_check_interval", "log_every_n_steps"):
        if isinstance(set_to(name), int | float) and set_to(name) <= 0:
            wrong[name] = " must be above 0"
    if set_to("fast_dev_run"):
        instead = "use trainer.max_steps=1 trainer.limit_val_batches=1"
        wrong["fast_dev_run"] = f": Lightning would take loggers and checkpoints away; {instead}"
    if set_to("enable_checkpointing") is False:
        wrong["enable_checkpointing"] = ": the best and the last weights are checkpoints; leave it out"
    for name in ("min_steps", "min_epochs"):
        if search and set_to(name):
            wrong[name] = ": a search that has stopped takes no further step; leave it out"
    for name, neutral in {"gradient_clip_val": 0, "accumulate_grad_batches": 1}.items():
        if search and set_to(name) not in (None, neutral):
            wrong[name] = " is for gradients, and a search has none"
    if search and "mixed" in str(trainer.precision):
        wrong["precision"] = " hides the closure from a search; use 32-true or 64-true"
    if trainer.world_size != 1:
        name = "num_nodes" if trainer.num_nodes > 1 else "devices"
        wrong[name] = f": a run uses one process; use trainer.{name}=1"
    n_test = min(len(loader) for loader in data.test_dataloader())
    batches = {"train": len(data.train_dataloader()), "val": len(data.val_dataloader()), "test": n_test}
    for split, n in batches.items():
        limit = getattr(trainer, f"limit_{split}_batches")
        if isinstance(limit, float) and 0 < n * limit < 1:
            name = "overfit_batches" if set_to("overfit_batches") else f"limit_{split}_batches"
            wrong[name] = f" of {n} batches is none; use a number, or 1.0 for all"
    for name in ("max_epochs", "max_steps"):
        if set_to(name) == 0:
            wrong[name] = " trains nothing; -1 is no limit"
    if trainer.limit_train_batches == 0:
        wrong["limit_train_batches"] = " trains nothing; use 1.0 for all batches"
    limit, every = trainer.limit_train_batches, trainer.val_check_interval
    n_train = int(batches["train"] * limit) if isinstance(limit, float) else min(batches["train"], limit)
    if isinstance(every, int) and every > n_train > 0 and trainer.check_val_every_n_epoch is not None:
        across = "set trainer.check_val_every_n_epoch=null to count across epochs"
        wrong["val_check_interval"] = f" is more than the {n_train} batches of an epoch; {across}"
    for name, why in wrong.items():
        yield f"trainer.{name}={shown(set_to(name))}{why}"


def of_callbacks(
    cfg: DictConfig, callbacks: dict[str, L.Callback], task: PatternSearchTask, known: list[str]
) -> Iterator[str]:
    """Callbacks that show too much, or wait for what never comes: a metric that is not `known`, or its other end."""
    for name, callback in callbacks.items():
        key, node = f"callbacks.{name}", cfg.callbacks[name]
        if isinstance(callback, ProgressBar) and not cfg.trainer.get("enable_progress_bar", True):
            instead = "'~callbacks.progress' trainer.enable_progress_bar=true"
            yield f"{key}: the run shows its own progress, callbacks.progress; for this one instead add {instead}"
        if isinstance(callback, LearningRateMonitor) and not task.automatic_optimization:
            yield f"{key}: a search has no learning rate to log; leave it out"
        monitor, mode = str(node.get("monitor") or ""), node.get("mode", "min")
        if monitor and known and monitor not in known:
            yield unknown(f"{key}.monitor={monitor}", monitor, known)
        better = {"accuracy": "max", "exact_match": "max", "loss": "min"}
        right = next((right for end, right in better.items() if monitor.endswith(end)), mode)
        if mode != right:
            best = "higher" if right == "max" else "lower"
            yield f"{key}.mode={mode}: of {monitor}, {best} is better; use {key}.mode={right}"
        late = node.get("check_on_train_epoch_end")
        if isinstance(callback, EarlyStopping) and monitor.startswith("val/") and late is not False:
            key = f"{key}.check_on_train_epoch_end"
            yield f"{key}={shown(late)} looks before the validation has run; use {key}=false"


def metrics_of(data: SequenceDataModule, task: PatternSearchTask, optimizer: torch.optim.Optimizer) -> list[str]:
    """The metrics that a callback may wait for; none if the task has steps of its own, which may log what they like."""
    if {"training_step", "validation_step"} & vars(type(task)).keys():
        return []
    scores, y = task.scores_class(), data.splits["val"].y[:100]
    scores.update(torch.zeros(*y.shape, data.n_classes), y)
    steps = [f"train/{name}" for name in optimizer.metrics()] if isinstance(optimizer, LossOnlyOptimizer) else []
    return [
        *(f"val/{name}" for name in scores.compute()),
        "train/loss",
        "evaluations",
        "seconds",
        "epoch",
        "step",
        *steps,
    ]


def without_effect(
    cfg: DictConfig, data: SequenceDataModule, task: PatternSearchTask, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, str]]:
    """The keys that nothing reads beside the choices that were made, each with a line that says why."""
    text = json.dumps(OmegaConf.to_container(cfg), default=str)
    unread = {key: f"the {reader} does not read it" for key, reader in READERS.items() if f"${{{key}}}" not in text}
    unread |= {f"datamodule.{name}": "the other options of the data leave it out" for name in data.unread}
    if task.automatic_optimization:
        unread["task.fast_polls"] = "only a search reads it"
    elif cfg.model.get("dropout"):
        unread["model.dropout"] = "it is off while a search polls"
    if isinstance(optimizer, LossOnlyOptimizer):
        of_search = optimizer.unread()
        unread |= {f"optimizer.{name}": why for name, why in of_search.items()}
        if (cfg.optimizer.get("rows_per_step") or 0) >= data.batch_size:
            unread["optimizer.rows_per_step"] = f"batches have {data.batch_size} rows (datamodule.batch_size)"
        if variant := cfg.choices.variant:
            option = OmegaConf.to_container(OmegaConf.load(CONFIGS / "variant" / f"{variant}.yaml"))
            changed = by_key(option).get("optimizer", {}).keys() - {"max_seconds"}  # beside its own budget
            if changed and of_search.keys() >= changed:
                unread["variant"] = of_search[min(changed)]
    for key, why in unread.items():
        value = cfg.choices.variant if key == "variant" else OmegaConf.select(cfg, key)
        yield key, f"{key}={shown(value)} has no effect: {why}; leave it out"
