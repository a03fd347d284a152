"""From a composed config to objects: the data, the model that fits them, the task around both."""

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from data.sequences import SequenceDataModule
from pattern_search_task import PatternSearchTask
from results.runs import Run, RunError, read_run
from run.checkpoints import RESUMABLE, read_checkpoint
from transformer import DecoderOnlyTransformer


def build_datamodule(cfg: DictConfig) -> SequenceDataModule:
    """The data of the task, made and split."""
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


def build_task(cfg: DictConfig, datamodule: SequenceDataModule) -> PatternSearchTask:
    """The LightningModule of the task, with a fresh model and a partial of the optimizer."""
    return instantiate(cfg.task, model=build_model(cfg, datamodule), optimizer=instantiate(cfg.optimizer))


def load_run(run_dir: str | Path) -> tuple[PatternSearchTask, SequenceDataModule, DictConfig]:
    """A run's task with the weights that were tested, its data, and its config.

    Of a run that was not tested the newest weights are taken.

    Args:
        run_dir: the directory that the run printed, with config.yaml and checkpoints/.

    Raises:
        RunError: the directory holds no run, or none with a checkpoint that can be read.
    """
    run = read_run(run_dir)
    try:
        checkpoint = read_checkpoint(tested_checkpoint(run))
    except FileNotFoundError as error:
        raise RunError(f"{run.directory} has no checkpoint") from error
    except (OSError, ValueError) as error:
        raise RunError(str(error)) from error
    datamodule = build_datamodule(run.config)
    task = build_task(run.config, datamodule)
    task.load_state_dict(checkpoint["state_dict"])
    return task, datamodule, run.config


def tested_checkpoint(run: Run) -> Path:
    """The checkpoint that a run was tested with, where it lies now; the newest one of a run that was not tested."""
    newest, spare = (run.directory / "checkpoints" / name for name in RESUMABLE)
    tested, old = (run.summary or {}).get("checkpoint"), run.config.get("output_dir", "")
    if tested:
        return run.directory / Path(tested).relative_to(old) if Path(tested).is_relative_to(old) else Path(tested)
    return newest if newest.exists() else spare
