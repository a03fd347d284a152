"""What only building shows: constructors refuse what is out of range, and parts that do not fit together."""

import json
import os
import re
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from config.did_you_mean import unknown
from config.draft import Draft
from config.keys import leaves, shown
from data.sequences import SequenceDataModule
from pattern_search_task import PatternSearchTask
from run import wandb_account
from run.build import build_datamodule, build_model

READ_BY_OTHERS = ("task.pattern_search_radius", "wandb.entity", "wandb.project")  # only as ${key}


def data_of(cfg: DictConfig) -> SequenceDataModule:
    """The data of a config. The newest are kept: the check of a run and the run itself share them."""
    return made(json.dumps(OmegaConf.to_container(cfg.datamodule, resolve=True), sort_keys=True))


@lru_cache(maxsize=1)
def made(datamodule: str) -> SequenceDataModule:
    return build_datamodule(OmegaConf.create({"datamodule": json.loads(datamodule)}))


def check_builds(draft: Draft) -> None:
    """Build the data, the model, the task with its optimizer, and the trainer with its callbacks."""
    check_machine(draft)
    cfg = draft.cfg
    data = build(draft, ["datamodule"], lambda: data_of(cfg))
    model = build(draft, ["model", "datamodule"], lambda: model_of(cfg)) if data else None
    if model is not None:
        check_memory(draft, model)
    task = build(draft, ["optimizer", "task"], lambda: task_of(cfg, model)) if model else None
    callbacks = {
        name: build(draft, [f"callbacks.{name}"], partial(instantiate, cfg.callbacks[name]))
        for name in (draft.get("callbacks") or {})
    }
    usable = [callback for callback in callbacks.values() if callback is not None]
    trainer = build(draft, ["trainer"], lambda: instantiate(cfg.trainer, logger=False, callbacks=usable))
    if task is not None:
        searches = not task.automatic_optimization
        check_read(draft, data, searches)
        check_monitors(draft, data, task)
        if trainer is not None:
            check_trainer(draft, data, trainer, searches)


def build(draft: Draft, nodes: list[str], make: Callable[[], Any]) -> Any:
    """What `make` builds from the nodes; None if there is a problem with them, or a constructor refuses them."""
    if not draft.sound(*nodes):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Lightning says about a trainer is said once it is used
            return make()
    except Exception as error:  # whatever a constructor refuses, the user gets the reason and not a traceback
        draft.note(*attribute(draft, nodes, reason(error)))
        return None


def reason(error: BaseException) -> str:
    """Why something cannot be built, in one line: Hydra wraps what a constructor raised."""
    while error.__cause__ is not None and type(error).__module__.startswith("hydra"):
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 400 else f"{text[:400]} ..."


def attribute(draft: Draft, nodes: list[str], message: str) -> tuple[str, str]:
    """The key that the message of a constructor is about, and the message with this key in it.

    It is the key that the message names, or whose value it cites; of several, one that the command line sets.
    """

    def named(key: str) -> bool:
        return re.search(rf"(?<![\w.]){key.rpartition('.')[2]}\b", message) is not None

    def cited(key: str) -> bool:
        values = draft.get(key) if isinstance(draft.get(key), list) else [draft.get(key)]
        words = [str(v) for v in values if v is not None and not isinstance(v, bool)]
        return any(re.search(rf"(?<![\w.]){re.escape(word)}(?![\w.]*\w)", message) for word in words if word)

    below = [key for key in leaves(draft.raw) if key.startswith(tuple(f"{node}." for node in nodes))]
    below = [key for key in below if not isinstance(draft.get(key), dict) and not key.endswith("_")]
    below.sort(key=lambda key: draft.written(key) not in draft.given)
    for fits in (message.__contains__, lambda key: f"{key.rpartition('.')[2]}=" in message, named, cited):
        if key := next(filter(fits, below), None):
            break
    else:
        given = [key for key in below if key in draft.given]
        if given:
            return given[0], f"{', '.join(f'{key}={shown(draft.get(key))}' for key in given)}: {message}"
        return nodes[0], f"{nodes[0]}={draft.get(f'choices.{nodes[0]}')}: {message}"
    key = draft.written(key)
    path, _, name = key.rpartition(".")
    if key in message:
        return key, message
    return key, f"{path}.{message}" if message.startswith(f"{name}=") else f"{key}={shown(draft.get(key))}: {message}"


def model_of(cfg: DictConfig) -> torch.nn.Module:
    """The model without memory for its weights, or if it cannot be built so, with."""
    try:
        with torch.device("meta"):
            return build_model(cfg, data_of(cfg))
    except NotImplementedError:
        return build_model(cfg, data_of(cfg))


def task_of(cfg: DictConfig, model: torch.nn.Module) -> PatternSearchTask:
    task = instantiate(cfg.task, model=model, optimizer=instantiate(cfg.optimizer))
    if not isinstance(task.configure_optimizers(), torch.optim.Optimizer):
        raise TypeError(f"optimizer._target_={cfg.optimizer._target_} makes no torch.optim.Optimizer")
    return task


def check_machine(draft: Draft) -> None:
    """What the config asks of the machine and cannot get."""
    accelerator = draft.get("trainer.accelerator")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        text = f"trainer.accelerator={accelerator}: this machine has no CUDA GPU; use trainer.accelerator=cpu"
        draft.note("trainer.accelerator", text)
    if steps := draft.get("trainer.fast_dev_run"):
        text = "Lightning would take loggers and checkpoints away; use trainer.max_steps=1 trainer.limit_val_batches=1"
        draft.note("trainer.fast_dev_run", f"trainer.fast_dev_run={shown(steps)}: {text}")
    if draft.get("logger.offline") is False:
        later = "or use logger.offline=True and upload later"
        if not wandb_account.wandb_key():
            account = "no W&B account is set up on this machine; run `wandb login`, or set WANDB_API_KEY"
            draft.note("logger.offline", f"logger.offline=False: {account}, {later}")
        elif problem := wandb_account.out_of_reach():
            draft.note("logger.offline", f"logger.offline=False: {problem}; connect this machine, {later}")


def check_memory(draft: Draft, model: torch.nn.Module) -> None:
    """Refuse a model whose weights alone do not fit."""
    weights = sum(p.numel() for p in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * weights > memory:
        sizes = [key for key in draft.given if key.startswith(("model.", "datamodule."))] or ["choices.model"]
        given = ", ".join(f"{key}={draft.get(key)}" for key in sizes).removeprefix("choices.")
        text = f"a model of {weights:,} weights does not fit in {memory / 2**30:.0f} GiB of memory"
        draft.note(sizes[0], f"{given}: {text}")


def check_trainer(draft: Draft, data: SequenceDataModule, trainer: L.Trainer, searches: bool) -> None:
    """What the trainer accepts, and what cannot run with this data, or with a search."""

    def note(name: str, problem: str) -> None:
        draft.note(f"trainer.{name}", f"trainer.{name}={shown(draft.get(f'trainer.{name}'))}{problem}")

    for name in ("check_val_every_n_epoch", "val_check_interval", "log_every_n_steps"):
        if (value := draft.get(f"trainer.{name}")) is not None and value <= 0:
            note(name, " must be above 0")
    if searches:
        if "mixed" in str(draft.get("trainer.precision")):
            note("precision", " hides the closure from a search; use 32-true or 64-true")
        for name, neutral in {"gradient_clip_val": (None, 0), "accumulate_grad_batches": (None, 1)}.items():
            if draft.get(f"trainer.{name}") not in neutral:
                note(name, " is for gradients, and a search has none")
    loaders = {"train": [data.train_dataloader()], "val": [data.val_dataloader()], "test": data.test_dataloader()}
    for split, parts in loaders.items():
        limit, batches = getattr(trainer, f"limit_{split}_batches"), min(map(len, parts))
        if isinstance(limit, float) and limit > 0 and int(batches * limit) == 0:
            note(f"limit_{split}_batches", f" of {batches} batches is none; use a number of batches, or 1.0 for all")
    limit, batches = trainer.limit_train_batches, len(data.train_dataloader())
    n_train = int(batches * limit) if isinstance(limit, float) else min(batches, limit)
    every = draft.get("trainer.val_check_interval")
    if isinstance(every, int) and every > n_train > 0 and trainer.check_val_every_n_epoch is not None:
        across = "set trainer.check_val_every_n_epoch=null to count across epochs"
        note("val_check_interval", f" is more than the {n_train} batches of an epoch; {across}")
    if trainer.world_size != 1:
        name = "num_nodes" if trainer.num_nodes > 1 else "devices"
        note(name, f": a run uses one process; use trainer.{name}=1")


def check_monitors(draft: Draft, data: SequenceDataModule, task: PatternSearchTask) -> None:
    """Callbacks that wait for a metric which is never logged, or for the wrong direction of one."""
    if {"training_step", "validation_step"} & vars(type(task)).keys():
        return  # it may log what it likes
    scores, y = task.scores_class(), data.splits["val"].y[:100]
    scores.update(torch.zeros(*y.shape, data.n_classes), y)
    known = [f"val/{name}" for name in scores.compute()] + ["train/loss", "evaluations", "seconds", "epoch", "step"]
    if not task.automatic_optimization:
        known += [f"train/{name}" for name in ("loss_after", "accepted", "evaluations_per_second", "radius")]
    for callback, options in draft.get("callbacks").items():
        if (monitor := options.get("monitor")) is None:
            continue
        key = f"callbacks.{callback}"
        if monitor not in known:
            draft.note(f"{key}.monitor", unknown(f"{key}.monitor={monitor}", str(monitor), known))
        mode = options.get("mode", "min")
        wrong_way = {"min": ("max", "higher", ("accuracy", "exact_match")), "max": ("min", "lower", ("loss",))}
        if mode in wrong_way and str(monitor).endswith(wrong_way[mode][2]):
            right, better, _ = wrong_way[mode]
            draft.note(f"{key}.mode", f"{key}.mode={mode}: of {monitor}, {better} is better; use {key}.mode={right}")
        at_epoch_end, stops = options.get("check_on_train_epoch_end"), options["_target_"].endswith(".EarlyStopping")
        if stops and str(monitor).startswith("val/") and at_epoch_end is not False:
            key = f"{key}.check_on_train_epoch_end"
            text = f"{key}={shown(at_epoch_end)} looks before the validation has run; use {key}=false"
            draft.note(key, text)


def check_read(draft: Draft, data: SequenceDataModule, searches: bool) -> None:
    """Note the keys that nothing reads beside the choices that were made."""
    text, reader = json.dumps(draft.raw, default=str), f"optimizer={draft.get('choices.optimizer')} does not read it"
    unread = {key: "the logger does not read it" for key in READ_BY_OTHERS if f"${{{key}}}" not in text}
    unread |= {key: reader for key in unread if key.startswith("task.")}
    if searches and draft.get("model.dropout"):
        unread["model.dropout"] = "it is off while a search polls"
    if not searches:
        unread["task.fast_polls"] = "only a search reads it"
    unread |= {f"datamodule.{name}": "the other options of the data leave it out" for name in data.unread}
    draft.unread = {
        key: f"{key}={shown(draft.get(key))} has no effect: {why}; leave it out" for key, why in unread.items()
    }
