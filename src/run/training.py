"""One run from its config to its summary, and the job of a command around it."""

import json
from collections.abc import Callable
from pathlib import Path

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from config.builds import data_of
from config.check import check, problems_of
from config.refusal import ConfigError, refuse
from data.sequences import SequenceDataModule
from pattern_search_task import CountsLostError
from run.build import build_datamodule, build_task
from run.checkpoints import AtomicCheckpointIO, Checkpoints, selected_weights
from run.cpu import prepare_machine
from run.directory import RunDirectoryError, locked, record_start
from run.files import print_any_character, typed, write
from run.interrupts import Interrupts, undisguised
from run.resume import begin, finished, in_sweep, limits, resumable
from run.start import silence_libraries
from run.summary import leave_picture, print_header, print_summary, summarise
from run.wandb_logger import opened_loggers


def job(cfg: DictConfig) -> float:
    """What Hydra runs: one run, or one job of a sweep; returns the test loss.

    Raises:
        ConfigError: the config of a job of a sweep cannot run; the others go on.
    """
    silence_libraries()  # here too: a job of the joblib launcher runs in a process of its own
    print_any_character()
    try:
        # `run/start.py` does not see what a sweeper chooses, nor this process if a launcher began it
        if in_sweep() and (problems := problems_of([check(cfg, HydraConfig.get())])):
            raise ConfigError(problems)
        summary = train(cfg, data_of)  # the data are those of the check
    except (RunDirectoryError, CountsLostError) as problem:
        if in_sweep():
            raise
        refuse([str(problem)])
    return summary["test"].get("test/loss", float("nan"))


def train(cfg: DictConfig, make_data: Callable[[DictConfig], SequenceDataModule] = build_datamodule) -> dict:
    """One run, new or resumed; returns the summary that is saved as summary.json.

    Args:
        cfg: the composed config, without its `hydra` node.
        make_data: gives the data of the config.

    Raises:
        RunDirectoryError: the directory is in use, or holds a run that this config does not go on with.
        SystemExit: the run was interrupted (130, or 143 for SIGTERM), or could not write (1).
    """
    run_dir, console, interrupts = Path(cfg.output_dir), Console(), Interrupts()
    with locked(run_dir), resumable(run_dir, interrupts):
        if summary := finished(cfg):
            console.print(f"{typed(run_dir)} is finished already.", soft_wrap=True, highlight=False)
            print_summary(console, cfg, summary, make_data(cfg))
            return summary
        checkpoint = begin(cfg, console)
        write(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        prepare_machine()
        record_start(run_dir)
        with opened_loggers(cfg, interrupts) as loggers:
            return run(cfg, console, interrupts, checkpoint, make_data, loggers)


def run(
    cfg: DictConfig,
    console: Console,
    interrupts: Interrupts,
    checkpoint: Path | None,
    make_data: Callable[[DictConfig], SequenceDataModule],
    loggers: list[Logger],
) -> dict:
    """Build, fit, test and summarise, from a checkpoint if there is one."""
    run_dir = Path(cfg.output_dir)
    L.seed_everything(cfg.seed, verbose=False)
    datamodule = make_data(cfg)
    L.seed_everything(cfg.seed, verbose=False)  # the first weights are the same whether the data were made before
    task = build_task(cfg, datamodule)
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    callbacks.append(Checkpoints(run_dir, limits(cfg), interrupts, **cfg.checkpoint))
    files = dict(default_root_dir=str(run_dir), plugins=[AtomicCheckpointIO()])
    trainer = instantiate(cfg.trainer, logger=loggers, callbacks=callbacks, **files)

    print_header(console, cfg, task, datamodule)
    with undisguised(trainer):
        trainer.fit(task, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    interrupted = bool(interrupts.received)
    without_best = any(
        isinstance(c, ModelCheckpoint) and c.monitor and not c.best_model_path for c in trainer.checkpoint_callbacks
    )
    if without_best and not interrupted:
        console.print("Nothing was validated, so the newest weights are tested.", highlight=False)
    weights = callbacks[-1].best_model_path if interrupted else selected_weights(trainer)
    metrics = {} if interrupted else test(trainer, task, datamodule, weights)
    summary = summarise(cfg, trainer, task, datamodule, metrics, weights)
    summary |= {"stopped_by": "interrupted"} if interrupted else {}
    write(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    leave_picture(run_dir)
    print_summary(console, cfg, summary, datamodule)
    return summary


def test(
    trainer: L.Trainer, task: L.LightningModule, datamodule: L.LightningDataModule, checkpoint: str | None
) -> dict:
    """Look at the test split once, with the weights of the checkpoint."""
    with undisguised(trainer):
        trainer.test(task, datamodule=datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
