"""Train a transformer on a task with any optimizer, test it, and leave a summary.

python src/train.py                                  pattern search on parity, the default
python src/train.py --config-name=train              the same by gradients
python src/train.py task=scan model=tiny seed=1      anything in configs/ can be set
python src/train.py resume=auto                      go on with the run that was stopped
python src/train.py --help                           all options
"""

import os
import signal

if __name__ == "__main__":  # nothing has begun: Ctrl-C during the slow imports and the check of the command
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import json
import logging
import sys
import warnings
from pathlib import Path

import hydra
import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from build import build_datamodule, build_task
from checkpoints import AtomicCheckpointIO, Checkpoints, replacing
from config_check import DEFAULT_CONFIG, check_command_line, refuse
from interrupts import Interrupted, Interrupts
from machine import prepare_machine
from metrics_table import MetricsTable
from report import print_header, print_summary, shown, summarise
from resume import RESUMABLE, begin, finished, limits, resume_command
from run_directory import RunDirectoryError, locked, record_start

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("PATTERN_SEARCH_ROOT", str(ROOT))  # configs/hydra puts runs below it
os.environ.setdefault("WANDB_SILENT", "true")  # the summary says where the run lies and how to upload it
warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning 2.6 uses a name that torch 2.13 renames
warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")  # that of a resumed run never is


def train(cfg: DictConfig) -> dict:
    """One run, new or resumed: build, fit, test; returns the summary that is saved as summary.json.

    Raises:
        RunDirectoryError: the directory is in use, or holds a run that this config does not go on with.
        SystemExit: the run was interrupted (130, or 143 for SIGTERM), or could not write (1).
    """
    run_dir, console = Path(cfg.output_dir), Console()
    with locked(run_dir):
        if summary := finished(cfg):
            console.print(f"{shown(run_dir)} is finished already.", soft_wrap=True, highlight=False)
            print_summary(console, cfg, summary, build_datamodule(cfg))
            return summary
        return run(cfg, run_dir, console, checkpoint=begin(cfg, console))


def run(cfg: DictConfig, run_dir: Path, console: Console, checkpoint: Path | None) -> dict:
    """The run itself, from a checkpoint if there is one."""
    prepare_machine()
    with replacing(run_dir / "config.yaml") as file:
        file.write(OmegaConf.to_yaml(cfg, resolve=True).encode())
    record_start(run_dir)
    L.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    task = build_task(cfg, datamodule)
    loggers = [MetricsTable(run_dir)]
    if "_target_" in cfg.logger:
        loggers.append(instantiate(cfg.logger))
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    interrupts = Interrupts()
    callbacks.append(Checkpoints(run_dir, limits(cfg), interrupts, **cfg.checkpoint))
    directory = dict(default_root_dir=str(run_dir), plugins=[AtomicCheckpointIO()])
    trainer = instantiate(cfg.trainer, logger=loggers, callbacks=callbacks, **directory)
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))

    print_header(console, cfg, task, datamodule)
    fit(trainer, task, datamodule, checkpoint, run_dir)
    interrupted = bool(interrupts.received)
    weights = None if interrupted else selected_weights(trainer)
    weights = weights or newest_weights(run_dir)
    metrics = {} if interrupted else test(trainer, task, datamodule, weights)
    summary = summarise(cfg, trainer, task, metrics, weights) | ({"stopped_by": "interrupted"} if interrupted else {})
    with replacing(run_dir / "summary.json") as file:
        file.write(json.dumps(summary, indent=2).encode() + b"\n")
    print_summary(console, cfg, summary, datamodule)
    for logger in loggers:
        logger.finalize("aborted" if interrupted else "success")
    if interrupted:
        console.print(f"Go on with: {resume_command(run_dir)}", soft_wrap=True, highlight=False)
        sys.exit(interrupts.exit_code)
    return summary


def fit(
    trainer: L.Trainer,
    task: L.LightningModule,
    datamodule: L.LightningDataModule,
    checkpoint: Path | None,
    run_dir: Path,
) -> None:
    """Train until a limit is reached or a signal comes."""
    try:
        trainer.fit(task, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except Interrupted:
        pass
    except SystemExit:  # Lightning's answer to a second Ctrl-C
        if not trainer.interrupted:
            raise
    except OSError as error:  # most often a full disk; the checkpoints on it are whole
        logging.getLogger(__name__).info("stopped", exc_info=True)
        print(f"Stopped: {error}\nOnce that is mended, go on with: {resume_command(run_dir)}", file=sys.stderr)
        sys.exit(1)


def selected_weights(trainer: L.Trainer) -> str | None:
    """The checkpoint that is best on validation, or None if no callback selects one."""
    best = (getattr(callback, "best_model_path", "") for callback in trainer.checkpoint_callbacks)
    return next(filter(None, best), None)


def newest_weights(run_dir: Path) -> str | None:
    """The newest checkpoint to go on from, which is the end of the run if it ended."""
    paths = (run_dir / "checkpoints" / name for name in RESUMABLE)
    return next((str(path) for path in paths if path.exists()), None)


def test(
    trainer: L.Trainer, task: L.LightningModule, datamodule: L.LightningDataModule, checkpoint: str | None
) -> dict:
    """Look at the test split once, with the weights of the checkpoint."""
    trainer.test(task, datamodule=datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}


@hydra.main(version_base="1.3", config_path="../configs", config_name=DEFAULT_CONFIG)
def main(cfg: DictConfig) -> float:
    mode = os.environ.get("WANDB_MODE")
    try:
        summary = train(cfg)
    except RunDirectoryError as problem:
        refuse([str(problem)])
    finally:
        finish_wandb(mode)
    return summary["test"].get("test/loss", float("nan"))


def finish_wandb(mode: str | None) -> None:
    """End the W&B run of this job, so that the next job of a sweep gets its own, and its own mode."""
    if wandb := sys.modules.get("wandb"):
        wandb.finish()
    os.environ.pop("WANDB_MODE", None)  # WandbLogger(offline=True) sets it for the whole process
    if mode is not None:
        os.environ["WANDB_MODE"] = mode


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # the header and the summary say the rest
    sys.argv[1:] = check_command_line(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:  # before or after training: nothing to save
        sys.exit(130)
