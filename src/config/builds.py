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
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from config.compose import leaves, shown
from config.did_you_mean import unknown
from config.draft import Draft
from config.refusal import reason
from data.sequences import SequenceDataModule
from pattern_search_task import PatternSearchTask
from run import wandb_account
from run.build import build_datamodule, build_model
from search.base import LossOnlyOptimizer

READ_BY_OTHERS = ("task.pattern_search_radius", "wandb.entity", "wandb.project")  # only as ${key}


def data_of(cfg: DictConfig) -> SequenceDataModule:
    """The data of a config. The newest are kept: the check of a run and the run itself share them."""
    return made(json.dumps(OmegaConf.to_container(cfg.datamodule, resolve=True), sort_keys=True), cfg.seed)


@lru_cache(maxsize=1)
def made(datamodule: str, seed: int) -> SequenceDataModule:
    L.seed_everything(seed, verbose=False)  # for data that are drawn from a library's own generator
    return build_datamodule(OmegaConf.create({"datamodule": json.loads(datamodule)}))


def check_builds(draft: Draft) -> None:
    """Build the data, the model, the task with its optimizer, and the trainer with its callbacks."""
    check_machine(draft)
    cfg = draft.cfg
    data = build(draft, ["datamodule"], lambda: data_of(cfg))
    model = build(draft, ["model", "datamodule"], lambda: model_of(cfg)) if data else None
    task = build(draft, ["optimizer", "task"], lambda: task_of(cfg, model)) if model else None
    callbacks = [
        build(draft, [f"callbacks.{name}"], partial(instantiate, cfg.callbacks[name]))
        for name in (draft.get("callbacks") or {})
    ]
    if "_target_" in (draft.get("logger") or {}):
        build(draft, ["logger"], lambda: logger_of(cfg))
    usable = [callback for callback in callbacks if callback is not None]
    trainer = build(draft, ["trainer"], lambda: instantiate(cfg.trainer, logger=False, callbacks=usable))
    if task is not None:
        check_read(draft, data, searches=not task.automatic_optimization)
        check_monitors(draft, data, task)
        if trainer is not None:
            check_trainer(draft, data, trainer, searches=not task.automatic_optimization)


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


def attribute(draft: Draft, nodes: list[str], message: str) -> tuple[str, str]:
    """The key that the message of a constructor is about, and the message with this key in it.

    It is the key that the message names, or whose value it cites; of several, one that the command line sets.
    """

    def signs(key: str) -> tuple[str, ...]:  # what may stand for a key in the message, the surest first
        name, value = re.escape(key.rpartition(".")[2]), draft.get(key)
        cited = [v for v in (value if isinstance(value, list) else [value]) if not isinstance(v, bool | dict | None)]
        values = [rf"{re.escape(str(v))}(?!\.?\w)" for v in cited if v != ""]
        return re.escape(key), f"{name}=", rf"{name}\b", "|".join(values) or "(?!)"

    below = [key for key in leaves(draft.raw) if key.startswith(tuple(f"{node}." for node in nodes))]
    given = [key for key in below if draft.written(key) in draft.given]
    keys = given + [key for key in below if not key.endswith("_") and not isinstance(draft.get(key), dict)]
    found = [
        (rank, key)
        for key in keys
        for rank, sign in enumerate(signs(key))
        if re.search(rf"(?<![\w.])(?:{sign})", message)
    ]
    if not found:
        choice = f"{nodes[0]}={draft.get(f'choices.{nodes[0]}')}"
        what = ", ".join(f"{key}={shown(draft.get(key))}" for key in given)
        return (given or nodes)[0], f"{what or choice}: {message}"
    key = draft.written(min(found, key=lambda pair: pair[0])[1])
    path, _, name = key.rpartition(".")
    if key in message:
        return key, message
    return key, f"{path}.{message}" if message.startswith(f"{name}=") else f"{key}={shown(draft.get(key))}: {message}"


def model_of(cfg: DictConfig) -> torch.nn.Module:
    """The model without memory for its weights, or if it cannot be built so, with.

    Raises:
        ValueError: its weights alone do not fit in memory, or what its constructor refuses.
    """
    try:
        with torch.device("meta"):
            model = build_model(cfg, data_of(cfg))
    except NotImplementedError:
        model = build_model(cfg, data_of(cfg))
    weights = sum(p.numel() for p in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * weights > memory:
        raise ValueError(f"a model of {weights:,} weights does not fit in {memory / 2**30:.0f} GiB of memory")
    return model


def task_of(cfg: DictConfig, model: torch.nn.Module) -> PatternSearchTask:
    """The task with its optimizer.

    Raises:
        TypeError: what should be the optimizer is none.
    """
    task = instantiate(cfg.task, model=model, optimizer=instantiate(cfg.optimizer))
    if not isinstance(task.configure_optimizers(), torch.optim.Optimizer):
        raise TypeError(f"optimizer._target_={cfg.optimizer._target_} makes no torch.optim.Optimizer")
    return task


def logger_of(cfg: DictConfig) -> Logger:
    """The logger, which writes nothing yet."""
    mode = os.environ.get("WANDB_MODE", "")
    logger = instantiate(cfg.logger)
    os.environ["WANDB_MODE"] = mode  # WandbLogger(offline=True) sets it for the whole process
    if not mode:
        del os.environ["WANDB_MODE"]
    return logger


def check_machine(draft: Draft) -> None:
    """What the config asks of the machine and cannot get."""
    accelerator, upload = draft.get("trainer.accelerator"), draft.get("logger.offline") is False
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        draft.note_value("trainer.accelerator", ": this machine has no CUDA GPU; use trainer.accelerator=cpu")
    if draft.get("trainer.fast_dev_run"):
        instead = "use trainer.max_steps=1 trainer.limit_val_batches=1"
        draft.note_value("trainer.fast_dev_run", f": Lightning would take loggers and checkpoints away; {instead}")
    if upload and not wandb_account.wandb_key():
        how = "run `wandb login`, or set WANDB_API_KEY, or use logger.offline=True and upload later"
        draft.note_value("logger.offline", f": no W&B account is set up on this machine; {how}")
    elif upload and (problem := wandb_account.out_of_reach()):
        how = "connect this machine, or use logger.offline=True and upload later"
        draft.note_value("logger.offline", f": {problem}; {how}")


def check_trainer(draft: Draft, data: SequenceDataModule, trainer: L.Trainer, searches: bool) -> None:
    """What the trainer accepts, and what cannot run with this data, or with a search."""
    options = draft.values["trainer"]

    def note(name: str, problem: str) -> None:
        draft.note_value(f"trainer.{name}", problem)

    for name in ("check_val_every_n_epoch", "val_check_interval", "log_every_n_steps"):
        if options.get(name) is not None and options[name] <= 0:
            note(name, " must be above 0")
    if searches and "mixed" in str(options.get("precision")):
        note("precision", " hides the closure from a search; use 32-true or 64-true")
    for name, neutral in {"gradient_clip_val": (None, 0), "accumulate_grad_batches": (None, 1)}.items():
        if searches and options.get(name) not in neutral:
            note(name, " is for gradients, and a search has none")
    batches = {"train": len(data.train_dataloader()), "val": len(data.val_dataloader())}
    for split, n in (batches | {"test": min(map(len, data.test_dataloader()))}).items():
        limit = getattr(trainer, f"limit_{split}_batches")
        if isinstance(limit, float) and limit > 0 and int(n * limit) == 0:
            note(f"limit_{split}_batches", f" of {n} batches is none; use a number of batches, or 1.0 for all")
    limit, every = trainer.limit_train_batches, options.get("val_check_interval")
    n_train = int(batches["train"] * limit) if isinstance(limit, float) else min(batches["train"], limit)
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
    optimizer = task.configure_optimizers()
    if searches := isinstance(optimizer, LossOnlyOptimizer):
        known += [f"train/{name}" for name in optimizer.metrics()]
    for callback, options in draft.values["callbacks"].items():
        key = f"callbacks.{callback}"
        if not draft.sound(key):
            continue
        if searches and options["_target_"].endswith(".LearningRateMonitor"):
            draft.note(key, f"{key}: a search has no learning rate to log; leave it out")
        if options.get("monitor") is None:
            continue
        monitor, mode = options["monitor"], options.get("mode", "min")
        if monitor not in known:
            draft.note(f"{key}.monitor", unknown(f"{key}.monitor={monitor}", str(monitor), known))
        if mode == "min" and str(monitor).endswith(("accuracy", "exact_match")):
            draft.note(f"{key}.mode", f"{key}.mode=min: of {monitor}, higher is better; use {key}.mode=max")
        if mode == "max" and str(monitor).endswith("loss"):
            draft.note(f"{key}.mode", f"{key}.mode=max: of {monitor}, lower is better; use {key}.mode=min")
        key = f"{key}.check_on_train_epoch_end"
        early = draft.get(key) is not False and options["_target_"].endswith(".EarlyStopping")
        if early and str(monitor).startswith("val/"):
            draft.note_value(key, f" looks before the validation has run; use {key}=false")


def check_read(draft: Draft, data: SequenceDataModule, searches: bool) -> None:
    """Say of the keys that nothing reads beside the choices that were made why it is so."""
    text, reader = json.dumps(draft.raw, default=str), f"optimizer={draft.get('choices.optimizer')} does not read it"
    unread = {key: "the logger does not read it" for key in READ_BY_OTHERS if f"${{{key}}}" not in text}
    unread |= {key: reader for key in unread if key.startswith("task.")}
    unread |= {f"datamodule.{name}": "the other options of the data leave it out" for name in data.unread}
    unread |= {} if searches else {"task.fast_polls": "only a search reads it"}
    unread |= {"model.dropout": "it is off while a search polls"} if searches and draft.get("model.dropout") else {}
    for key, why in unread.items():
        draft.unread[key] = f"{key}={shown(draft.get(key))} has no effect: {why}; leave it out"
