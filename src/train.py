"""Train a transformer on a task with any optimizer, test it, and leave a summary.

python src/train.py                                  pattern search on parity, the default
python src/train.py --config-name=train              the same by gradients
python src/train.py task=scan model=tiny seed=1      anything in configs/ can be set
python src/train.py resume=auto                      go on with the run that was stopped
python src/train.py --help                           all options
"""

import os
import signal
import sys

if __name__ == "__main__":  # nothing has begun: Ctrl-C during the slow imports and the check of the command
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from config.composition import DEFAULT_CONFIG, read_command
from config.refusal import refuse, tell

if __name__ == "__main__":
    command = read_command(sys.argv[1:])
    tell(command.problems if command else [])  # now: the imports that follow take seconds

import json
import logging
import warnings
from pathlib import Path

import hydra
import lightning as L
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from config.check import check_command_line
from run.build import build_datamodule, build_task
from run.checkpoints import AtomicCheckpointIO, Checkpoints, selected_weights
from run.cpu import prepare_machine
from run.directory import RunDirectoryError, locked, record_start
from run.files import print_any_character, typed, write
from run.interrupts import Interrupts, undisguised
from run.resume import begin, finished, in_sweep, limits, resumable
from run.summary import leave_picture, print_header, print_summary, summarise
from run.wandb_logger import opened_loggers

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("PATTERN_SEARCH_ROOT", str(ROOT))  # configs/hydra puts runs below it
os.environ.setdefault("WANDB_SILENT", "true")  # the summary says where the run lies and how to upload it


def train(cfg: DictConfig) -> dict:
    """One run, new or resumed; returns the summary that is saved as summary.json.

    Raises:
        RunDirectoryError: the directory is in use, or holds a run that this config does not go on with.
        SystemExit: the run was interrupted (130, or 143 for SIGTERM), or could not write (1).
    """
    run_dir, console, interrupts = Path(cfg.output_dir), Console(), Interrupts()
    with locked(run_dir), resumable(run_dir, interrupts):
        if summary := finished(cfg):
            console.print(f"{typed(run_dir)} is finished already.", soft_wrap=True, highlight=False)
            print_summary(console, cfg, summary, build_datamodule(cfg))
            return summary
        checkpoint = begin(cfg, console)
        write(run_dir / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        prepare_machine()
        record_start(run_dir)
        with opened_loggers(cfg, interrupts) as loggers:
            return run(cfg, console, interrupts, checkpoint, loggers)


def run(
    cfg: DictConfig, console: Console, interrupts: Interrupts, checkpoint: Path | None, loggers: list[Logger]
) -> dict:
    """Build, fit, test and summarise, from a checkpoint if there is one."""
    run_dir = Path(cfg.output_dir)
    L.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
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


@hydra.main(version_base="1.3", config_path="../configs", config_name=DEFAULT_CONFIG)
def main(cfg: DictConfig) -> float:
    silence_libraries()  # here too: a job of the joblib launcher runs in a process of its own
    print_any_character()
    try:
        summary = train(cfg)
    except RunDirectoryError as problem:
        if in_sweep():
            raise  # one job of a sweep: the others go on
        refuse([str(problem)])
    return summary["test"].get("test/loss", float("nan"))


def silence_libraries() -> None:
    """What the header and the summary say better, and warnings that are not for the user."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning 2.6 uses a name torch 2.13 renames
    warnings.filterwarnings("ignore", message=".ModelCheckpoint.* could not find the monitored key")  # `run` says so
    warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")  # that of a resumed run never is


if __name__ == "__main__":
    silence_libraries()
    print_any_character()
    if command:
        sys.argv[1:] = check_command_line(command)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:  # before or after training: nothing to save
        sys.exit(130)
