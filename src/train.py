"""Train a transformer on a task with any optimizer, test it, and leave a summary.

python src/train.py                                  pattern search on parity, the default
python src/train.py --config-name=train              the same by gradients
python src/train.py task=scan model=tiny seed=1      anything in configs/ can be set
python src/train.py --help                           all options
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path

import hydra
import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from build import build_datamodule, build_task
from config_check import DEFAULT_CONFIG, check_command_line
from machine import prepare_machine
from metrics_table import MetricsTable
from report import draw_progress, print_header, print_summary, summarise

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("PATTERN_SEARCH_ROOT", str(ROOT))  # configs/hydra puts runs below it
os.environ.setdefault("WANDB_SILENT", "true")  # the summary says where the run lies and how to upload it


def train(cfg: DictConfig) -> dict:
    """Build, fit, test and summarise one run; returns the summary that is saved as summary.json."""
    run_dir, console = Path(cfg.output_dir), Console()
    run_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)

    prepare_machine()
    L.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    task = build_task(cfg, datamodule)
    loggers = [MetricsTable(run_dir)]
    if "_target_" in cfg.logger:
        loggers.append(instantiate(cfg.logger))
        getattr(loggers[-1], "_wandb_init", {}).pop("anonymous", None)  # Lightning passes it, and wandb warns of it
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    trainer = instantiate(cfg.trainer, logger=loggers, callbacks=callbacks, default_root_dir=str(run_dir))
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))

    print_header(console, cfg, task, datamodule)
    interrupted = fit(trainer, task, datamodule)
    checkpoint = newest_weights(run_dir) if interrupted else selected_weights(trainer)
    metrics = {} if interrupted else test(trainer, task, datamodule, checkpoint)
    summary = summarise(cfg, trainer, task, datamodule, metrics, checkpoint)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    draw_progress(run_dir)
    print_summary(console, cfg, summary, datamodule)
    for logger in loggers:
        logger.finalize("aborted" if interrupted else "success")
    if interrupted:
        sys.exit(130)
    return summary


def fit(trainer: L.Trainer, task: L.LightningModule, datamodule: L.LightningDataModule) -> bool:
    """Train; returns whether the user interrupted it. Lightning turns Ctrl-C into an exit with code 1."""
    try:
        trainer.fit(task, datamodule=datamodule)
    except SystemExit:
        if not trainer.interrupted:
            raise
    return trainer.interrupted


def selected_weights(trainer: L.Trainer) -> str | None:
    """The checkpoint that the first checkpoint callback kept: the best on validation. None if none is kept."""
    return next((c.best_model_path for c in trainer.checkpoint_callbacks if c.best_model_path), None)


def newest_weights(run_dir: Path) -> str | None:
    checkpoints = sorted(run_dir.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    return str(checkpoints[-1]) if checkpoints else None


def test(
    trainer: L.Trainer, task: L.LightningModule, datamodule: L.LightningDataModule, checkpoint: str | None
) -> dict:
    """Look at the test split once, with the weights of the checkpoint."""
    trainer.test(task, datamodule=datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}


@hydra.main(version_base="1.3", config_path="../configs", config_name=DEFAULT_CONFIG)
def main(cfg: DictConfig) -> float:
    silence_libraries()  # here too: a job of the joblib launcher runs in a process of its own
    mode, exit_code = os.environ.get("WANDB_MODE"), 1
    try:
        summary = train(cfg)
        exit_code = 0
    finally:
        finish_wandb(mode, exit_code)
    return summary["test"].get("test/loss", float("nan"))


def finish_wandb(mode: str | None, exit_code: int) -> None:
    """End the W&B run of this job, so that the next job of a sweep gets its own, and its own mode."""
    if wandb := sys.modules.get("wandb"):
        wandb.finish(exit_code=exit_code)
    os.environ.pop("WANDB_MODE", None)  # WandbLogger(offline=True) sets it for the whole process
    if mode is not None:
        os.environ["WANDB_MODE"] = mode


def silence_libraries() -> None:
    """What the header and the summary say better, and warnings that are not for the user."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning 2.6 uses a name torch 2.13 renames


if __name__ == "__main__":
    silence_libraries()
    try:
        check_command_line(sys.argv[1:])
        main()
    except KeyboardInterrupt:  # before training began: nothing to save
        sys.exit(130)
