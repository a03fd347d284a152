"""One run from its config to its summary, and the job of a command around it."""

import json
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from config.check import check
from config.refusal import refuse
from pattern_search_task import CountsLostError
from run.build import build_task, data_of
from run.checkpoints import AtomicCheckpointIO, Checkpoints, selected_weights
from run.cpu import prepare_machine
from run.directory import RunDirectoryError, locked, record_start
from run.files import print_any_character, typed, write
from run.interrupts import Interrupts, undisguised
from run.resume import begin, finished, in_sweep, limits, resumable
from run.start import chosen_before, silence_libraries
from run.summary import leave_picture, print_header, print_summary, stopped_by
from run.wandb_account import same_mode
from run.wandb_logger import opened_loggers


def job(cfg: DictConfig) -> float:
    """What Hydra runs; returns the test loss. A job of a sweep that cannot run raises, and the others go on."""
    silence_libraries()  # here too: a job of the joblib launcher runs in a process of its own
    print_any_character()
    try:
        if in_sweep() and not chosen_before(HydraConfig.get()):
            check([cfg])
        summary = train(cfg)
    except (RunDirectoryError, CountsLostError) as problem:
        if in_sweep():
            raise
        refuse([str(problem)])
    return summary["test"].get("test/loss", float("nan"))


def train(cfg: DictConfig) -> dict[str, Any]:
    """One run, new or resumed, of a composed config without its `hydra` node; returns what summary.json holds.

    Raises:
        RunDirectoryError: the directory is in use, or holds a run that this config does not go on with.
        SystemExit: the run was interrupted (130, or 143 for SIGTERM), or could not write (1).
    """
    run_dir, console, interrupts = Path(cfg.output_dir), Console(), Interrupts()
    with locked(run_dir), resumable(run_dir, interrupts):
        if summary := finished(cfg):
            console.print(f"{typed(run_dir)} is finished already.", soft_wrap=True, highlight=False)
            print_summary(console, cfg, summary)
            return summary
        checkpoint = begin(cfg, console)
        write(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        prepare_machine()
        record_start(run_dir)
        with same_mode(), opened_loggers(cfg, interrupts) as loggers:
            return run(cfg, console, interrupts, checkpoint, loggers)


def run(
    cfg: DictConfig, console: Console, interrupts: Interrupts, checkpoint: Path | None, loggers: list[Logger]
) -> dict[str, Any]:
    """Build, fit, test and summarise, from a checkpoint if there is one."""
    run_dir = Path(cfg.output_dir)
    datamodule = data_of(cfg)
    L.seed_everything(cfg.seed, verbose=False)  # the first weights are the same whether the data were made before
    task = build_task(cfg, datamodule)
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    callbacks.append(Checkpoints(run_dir, limits(cfg), interrupts, **cfg.checkpoint))
    files = dict(default_root_dir=str(run_dir), plugins=[AtomicCheckpointIO()])
    trainer = instantiate(cfg.trainer, logger=loggers, callbacks=callbacks, **files)

    print_header(console, cfg, task, datamodule)
    with undisguised(trainer):
        trainer.fit(task, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    if interrupts.received:
        weights, metrics, reason = callbacks[-1].best_model_path, {}, "interrupted"
    else:
        weights, reason = selected_weights(trainer), stopped_by(trainer, task)
        selections = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        if not all(selection.best_model_path for selection in selections):
            console.print("Nothing was validated, so the newest weights are tested.", highlight=False)
        with undisguised(trainer):  # the one look at the test split
            trainer.test(task, datamodule=datamodule, ckpt_path=weights, verbose=False, weights_only=True)
        metrics = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("test/")}
    summary = {
        "test": metrics,
        "chance_loss": datamodule.chance_loss,
        "evaluations": int(task.evaluations),
        "seconds": round(task.seconds, 3),
        "steps": trainer.global_step,
        "stopped_by": reason,
        "checkpoint": weights,
        "config": str(run_dir / "config.yaml"),
    }
    write(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    leave_picture(run_dir)
    print_summary(console, cfg, summary)
    return summary
