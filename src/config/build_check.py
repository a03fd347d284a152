"""The part of `config/check.py` that builds: constructors refuse what is out of range or does not fit together."""

import json
import os
import warnings

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from config.did_you_mean import unknown
from config.draft import Draft, dig, shown
from data.sequences import SequenceDataModule
from pattern_search_task import PatternSearchTask
from run.build import build_datamodule, build_model

READ_THROUGH = ("task.pattern_search_radius", "wandb.entity", "wandb.project")  # read by other keys only, as ${key}
READ_BY_A_SEARCH = ("task.fast_polls",)

_data: tuple[str, SequenceDataModule] | None = None  # the latest: the jobs of a sweep and all parts of a check share it


def data_of(cfg: DictConfig) -> SequenceDataModule:
    """The data of a config; made once."""
    global _data
    key = json.dumps(OmegaConf.to_container(cfg.datamodule, resolve=True), sort_keys=True, default=str)
    if _data is None or _data[0] != key:
        _data = (key, build_datamodule(cfg))
    return _data[1]


def model_of(cfg: DictConfig) -> torch.nn.Module:
    """The model without memory for its weights, or if it cannot be built so, with."""
    try:
        with torch.device("meta"):
            return build_model(cfg, data_of(cfg))
    except NotImplementedError:
        return build_model(cfg, data_of(cfg))


def check_by_building(draft: Draft) -> None:
    """Build the data, the model, the task with its optimizer, and the trainer with its callbacks."""
    data = draft.build(["datamodule"], data_of)
    model = draft.build(["model", "datamodule"], model_of) if data is not None else None
    task = None
    if model is not None:
        check_memory(draft, model)

        def task_of(cfg: DictConfig) -> PatternSearchTask:
            task = instantiate(cfg.task, model=model, optimizer=instantiate(cfg.optimizer))
            if not isinstance(task.configure_optimizers(), torch.optim.Optimizer):
                raise TypeError(f"optimizer._target_={cfg.optimizer._target_} makes no torch.optim.Optimizer")
            return task

        task = draft.build(["optimizer", "task"], task_of)
    trainer = draft.build(["trainer", "callbacks"], trainer_of)
    if task is not None:
        check_read(draft, data, searches=not task.automatic_optimization)
        check_monitors(draft, data, task)
        if trainer is not None:
            check_together(draft, data, trainer, searches=not task.automatic_optimization)


def trainer_of(cfg: DictConfig) -> L.Trainer:
    """The trainer with its callbacks; what Lightning says about it is said once it is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
        return instantiate(cfg.trainer, logger=False, callbacks=callbacks)


def check_memory(draft: Draft, model: torch.nn.Module) -> None:
    """Refuse a model whose weights alone do not fit."""
    weights = sum(p.numel() for p in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * weights > memory:
        sizes = [key for key in draft.changed(["model", "datamodule"]) if isinstance(dig(draft.raw, key), int)]
        given = ", ".join(f"{key}={dig(draft.raw, key)}" for key in sizes)
        text = f"{given}: a model of {weights:,} weights does not fit in {memory / 2**30:.0f} GiB of memory"
        draft.problems.setdefault((sizes or ["model"])[0], text)


def check_together(draft: Draft, data: SequenceDataModule, trainer: L.Trainer, searches: bool) -> None:
    """What each part accepts and all together cannot run."""
    if searches and "mixed" in str(draft.get("trainer.precision")):
        precision = draft.get("trainer.precision")
        text = f"trainer.precision={precision} hides the closure from a search; use 32-true or 64-true"
        draft.note("trainer.precision", text)
    for name in ("check_val_every_n_epoch", "val_check_interval", "log_every_n_steps"):
        if (value := draft.get(f"trainer.{name}")) is not None and value <= 0:
            draft.note(f"trainer.{name}", f"trainer.{name}={value} must be above 0")
    if searches:
        for name, neutral in {"gradient_clip_val": (None, 0), "accumulate_grad_batches": (None, 1)}.items():
            if (value := draft.get(f"trainer.{name}")) not in neutral:
                draft.note(f"trainer.{name}", f"trainer.{name}={shown(value)} is for gradients, and a search has none")
    loaders = {"train": [data.train_dataloader()], "val": [data.val_dataloader()], "test": data.test_dataloader()}
    for name, parts in loaders.items():
        key, limit = f"trainer.limit_{name}_batches", getattr(trainer, f"limit_{name}_batches")
        batches = min(map(len, parts))
        if isinstance(limit, float) and limit > 0 and int(batches * limit) == 0:
            draft.note(key, f"{key}={limit} of {batches} batches is none; use a number of batches, or 1.0 for all")
        elif name == "train":
            n_train = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
            every, key = draft.get("trainer.val_check_interval"), "trainer.val_check_interval"
            by_epoch = trainer.check_val_every_n_epoch is not None
            if isinstance(every, int) and every > n_train > 0 and by_epoch:
                text = f"{key}={every} is more than the {n_train} batches of an epoch"
                draft.note(key, f"{text}; set trainer.check_val_every_n_epoch=null to count across epochs")
    if trainer.world_size != 1:
        key = "trainer.num_nodes" if trainer.num_nodes > 1 else "trainer.devices"
        draft.note(key, f"{key}={draft.get(key)}: a run uses one process; use {key}=1")


def check_monitors(draft: Draft, data: SequenceDataModule, task: PatternSearchTask) -> None:
    """Callbacks that wait for a metric which is never logged."""
    if {"training_step", "validation_step"} & vars(type(task)).keys():
        return  # it may log what it likes
    scores, y = task.scores_class(), data.splits["val"].y[:100]
    scores.update(torch.zeros(*y.shape, data.n_classes), y)
    known = [f"val/{name}" for name in scores.compute()] + ["train/loss", "evaluations", "seconds", "epoch", "step"]
    if not task.automatic_optimization:
        known += [f"train/{name}" for name in ("loss_after", "accepted", "evaluations_per_second", "radius")]
    for name, options in draft.raw["callbacks"].items():
        monitor = draft.get(f"callbacks.{name}.monitor")
        if monitor is not None and monitor not in known:
            key = f"callbacks.{name}.monitor"
            draft.note(key, unknown(f"{key}={monitor}", str(monitor), known))
        at_epoch_end, stops = options.get("check_on_train_epoch_end"), options["_target_"].endswith(".EarlyStopping")
        if stops and str(monitor).startswith("val/") and at_epoch_end is not False:
            key = f"callbacks.{name}.check_on_train_epoch_end"
            text = f"{key}={shown(at_epoch_end)} looks before the validation has run; use {key}=false"
            draft.problems.setdefault(key, text)


def check_read(draft: Draft, data: SequenceDataModule, searches: bool) -> None:
    """Note the keys that nothing reads beside the choices that were made."""
    choices = draft.raw.get("choices", {})
    for key in READ_THROUGH:
        if f"${{{key}}}" not in draft.text:
            given = f"{key}={shown(dig(draft.raw, key))}"
            reader = "the logger" if key.startswith("wandb") else f"optimizer={choices.get('optimizer')}"
            draft.unread[key] = f"{given} has no effect: {reader} does not read it; leave it out"
    for name in data.unread:
        given = f"datamodule.{name}={shown(draft.get(f'datamodule.{name}'))}"
        draft.unread[f"datamodule.{name}"] = f"{given} has no effect beside the other options of the data; leave it out"
    if not searches:
        for key in READ_BY_A_SEARCH:
            given = f"{key}={shown(dig(draft.raw, key))}"
            draft.unread[key] = f"{given} has no effect: only a search reads it; leave it out"
    elif draft.get("model.dropout"):
        given = f"model.dropout={draft.get('model.dropout')}"
        draft.unread["model.dropout"] = f"{given} has no effect: it is off while a search polls; leave it out"
