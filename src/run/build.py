"""From a composed config to objects: the data, the model that fits them, the task around both."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf

from config.nodes import BUILT, node_problems
from config.refusal import reason
from data.sequences import SequenceDataModule
from pattern_search_task import PatternSearchTask
from results.runs import RunError, find_run
from run.checkpoints import read_checkpoint
from transformer import DecoderOnlyTransformer


def data_of(cfg: DictConfig) -> SequenceDataModule:
    """The data of a config. The newest are kept: the check of a run and the run itself share them."""
    return made(json.dumps(OmegaConf.to_container(cfg.datamodule, resolve=True), sort_keys=True), cfg.seed)


@lru_cache(maxsize=1)
def made(datamodule: str, seed: int) -> SequenceDataModule:
    L.seed_everything(seed, verbose=False)  # for data that are drawn from a library's own generator
    return build_datamodule(OmegaConf.create({"datamodule": json.loads(datamodule)}))


def build_datamodule(cfg: DictConfig) -> SequenceDataModule:
    """The data of the task, made and split; ValueError if the data module refuses its options."""
    datamodule = instantiate(cfg.datamodule)
    datamodule.setup()
    return datamodule


def build_model(cfg: DictConfig, datamodule: SequenceDataModule) -> DecoderOnlyTransformer:
    """The model, with the vocabulary, the classes and the length of the data.

    Raises:
        ValueError: impossible sizes, or positions that the data could not train.
    """
    max_len = cfg.model.get("max_len") or datamodule.max_len  # a model of your own may leave both keys out
    if max_len < datamodule.max_len:
        raise ValueError(
            f"model.max_len={max_len} is shorter than the longest input of the task, {datamodule.max_len} tokens; "
            f"leave model.max_len=null or use {datamodule.max_len}"
        )
    if cfg.model.get("positions") == "learned" and max_len > datamodule.max_train_len:
        raise ValueError(
            f"model.positions=learned has {max_len} positions, but training reaches {datamodule.max_train_len} only, "
            "so the others would never be trained; use model.positions=rotary, sinusoidal or none"
        )
    sizes = dict(vocab_size=datamodule.vocab_size, n_classes=datamodule.n_classes, max_len=max_len)
    return instantiate(cfg.model, **sizes)


def weightless_model(cfg: DictConfig, datamodule: SequenceDataModule) -> torch.nn.Module:
    """The model without memory for its weights, or if it cannot be built so, with.

    Raises:
        ValueError: its weights alone do not fit in memory, or what its constructor refuses.
    """
    try:
        with torch.device("meta"):
            model = build_model(cfg, datamodule)
    except NotImplementedError:
        model = build_model(cfg, datamodule)
    weights = sum(p.numel() for p in model.parameters())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * weights > memory:
        raise ValueError(f"a model of {weights:,} weights does not fit in {memory / 2**30:.0f} GiB of memory")
    return model


def build_task(cfg: DictConfig, datamodule: SequenceDataModule) -> PatternSearchTask:
    """The LightningModule of the task, with a fresh model and a partial of the optimizer."""
    return instantiate(cfg.task, model=build_model(cfg, datamodule), optimizer=instantiate(cfg.optimizer))


# --- a run that was trained ---


def load_run(path: str | Path, changes: Sequence[str] = ()) -> tuple[PatternSearchTask, SequenceDataModule, DictConfig]:
    """A run's task with the weights that were tested, in eval mode, its data, and its config.

    Of a run that was not tested the newest weights are taken. Two lines use a trained model:

        task, data, cfg = load_run("runs/2026-11-26_00-33-10-441156")
        predict(task, data, ["0 1 1 0 1 0 0 1"])  # of data/decoding.py

    Args:
        path: the directory that the run printed, with config.yaml and checkpoints/; or a checkpoint in it.
        changes: other options of the data, such as "datamodule.test_lengths=[16,32]". The model keeps the sizes that it
            was trained with; one without a table of positions reads longer inputs too.

    Raises:
        RunError: no run is there, none with a checkpoint that can be read, or one that these data do not fit.
    """
    run, checkpoint = find_run(path)
    config_file, what = run.directory / "config.yaml", " ".join(changes)
    cfg = with_changes(run.config, changes)
    with told(f"{checkpoint} cannot be read"):
        weights = read_checkpoint(checkpoint)["state_dict"]
    with told(f"{config_file} does not build any more"):
        trained = data_of_run(run.config)
    with told(what):
        data = data_of_run(cfg) if changes else trained
        check_fit(cfg, trained, data, changes)
    max_len = max(cfg.model.get("max_len") or trained.max_len, data.max_len)
    OmegaConf.update(cfg, "model.max_len", max_len, force_add=True)
    with told(f"{config_file} does not build any more"):
        check_nodes(cfg, "model", "task")
        task = build_task(cfg, trained)
    with told(f"{checkpoint} does not fit the model of {config_file}"):
        task.to(next(w.dtype for w in weights.values() if w.is_floating_point()))  # 64 bits if trained with so many
        task.load_state_dict(weights)
    return task.eval(), data, cfg


def with_changes(config: DictConfig, changes: Sequence[str]) -> DictConfig:
    """The config of a run with other options of its data; RunError for a change of anything else."""
    for change in changes:
        if not change.startswith(("datamodule.", "trainer.limit_test_batches=")) or "=" not in change:
            raise RunError(f"{change}: give options of the data only, such as datamodule.test_lengths=[16,32]")
    with told(" ".join(changes)):
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist(list(changes)))
    assert isinstance(merged, DictConfig)
    return merged


def data_of_run(cfg: DictConfig) -> SequenceDataModule:
    """The data as a run of this config makes them, whatever generator they are drawn from; errors as `check_nodes`."""
    check_nodes(cfg, "datamodule")
    with isolate_rng():
        L.seed_everything(cfg.seed, verbose=False)
        return build_datamodule(cfg)


def check_nodes(cfg: DictConfig, *nodes: str) -> None:
    """Check keys and types as before a run.

    Raises:
        RunError: a key is not known any more, or a value has the wrong type.
    """
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    allowed = values.get("allowed_packages", ())
    problems = [text for name in nodes for _, text in node_problems(name, values.get(name), *BUILT[name], allowed)]
    if problems:
        raise RunError("; ".join(problems))


def check_fit(cfg: DictConfig, trained: SequenceDataModule, data: SequenceDataModule, changes: Sequence[str]) -> None:
    """RunError if a model that was trained on some data does not read or write others, or a change has no effect."""
    for name in data.unread:
        if any(change.startswith(f"datamodule.{name}=") for change in changes):
            raise RunError("it has no effect: the other options of the data leave it out")
    for what, old, new in (("read", trained.tokens, data.tokens), ("write", trained.classes, data.classes)):
        if new != old:
            raise RunError(f"these data have {', '.join(new)}, and the model has learned to {what} {', '.join(old)}")
    positions = cfg.model.get("max_len") or trained.max_len
    if data.max_len > positions and cfg.model.get("positions") == "learned":
        raise RunError(
            f"an input of {data.max_len} tokens is longer than the {positions} positions that this model has; "
            "train with model.positions=rotary, sinusoidal or none for inputs of any length"
        )


@contextmanager
def told(what: str) -> Iterator[None]:
    """Whatever is raised becomes a RunError, which tells in one line what cannot be done, and why."""
    try:
        yield
    except Exception as error:  # a class of someone's own may raise anything
        raise RunError(f"{what}: {reason(error)}") from error
