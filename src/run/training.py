"""One run from its config to its summary, and the job of a command around it."""

import json
import logging
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Column, Table

from config.check import check
from config.refusal import refuse
from data.sequences import SequenceDataModule
from pattern_search_task import CountsLostError, PatternSearchTask
from polls.threads import available_cores
from results.runs import by_position
from run.build import build_task, data_of
from run.checkpoints import AtomicCheckpointIO, Checkpoints
from run.cpu import prepare_machine
from run.directory import TRAIN, RunDirectoryError, locked, print_any_character, record_start, typed, write
from run.interrupts import Interrupted, Interrupts, in_sweep, resumable
from run.limits import MaxSeconds
from run.quiet import silence_libraries
from run.resume import begin, finished
from run.start import chosen_before
from run.wandb_logger import opened_loggers

EARLY = {  # why early stopping ended a training
    EarlyStoppingReason.STOPPING_THRESHOLD: "solved",
    EarlyStoppingReason.PATIENCE_EXHAUSTED: "no_improvement",
    EarlyStoppingReason.NON_FINITE_METRIC: "not_finite",
    EarlyStoppingReason.DIVERGENCE_THRESHOLD: "diverged",
}


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

    RunDirectoryError if its directory is in use, or holds a run that this config does not go on with.
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
        with opened_loggers(cfg, interrupts) as loggers:
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
    callbacks.append(Checkpoints(run_dir, interrupts, **cfg.checkpoint))
    files = dict(default_root_dir=str(run_dir), plugins=[AtomicCheckpointIO()])
    trainer = instantiate(cfg.trainer, logger=loggers, callbacks=callbacks, **files)

    print_header(console, cfg, task, datamodule)
    with suppress(Interrupted):
        trainer.fit(task, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    weights, metrics, reason = str(run_dir / "checkpoints" / "end.ckpt"), {}, "interrupted"
    trainer.save_checkpoint(weights)
    if not interrupts.received:
        reason = stopped_by(trainer, task)
        if kept := [c.best_model_path for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]:
            weights = next(filter(None, kept), weights)
            if not any(kept):
                console.print("Nothing was validated, so the newest weights are tested.", highlight=False)
        # the one look at the test split
        trainer.test(task, datamodule=datamodule, ckpt_path=weights, verbose=False, weights_only=True)
        metrics = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("test/")}
    summary = {
        "test": metrics,
        "chance_loss": datamodule.chance_loss,
        "data": datamodule.facts(),
        "evaluations": int(task.evaluations),
        "seconds": round(task.seconds, 3),
        "steps": trainer.global_step,
        "tokens_per_batch": datamodule.batch_size * datamodule.max_len,
        "stopped_by": reason,
        "checkpoint": weights,
        "config": str(run_dir / "config.yaml"),
    }
    write(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    if cfg.picture:
        leave_picture(run_dir)
    print_summary(console, cfg, summary)
    if reason != "interrupted" and task.search is not None:
        for remark in task.search.remarks():
            console.print(f"Note: {remark}, and {reason} ended the run before.", soft_wrap=True, highlight=False)
    return summary


def stopped_by(trainer: L.Trainer, task: PatternSearchTask) -> str:
    """Why training ended.

    The key of a limit (max_steps, max_seconds, ...), a value of EARLY, or "callback" for one that asked to stop and
    gave no reason.
    """
    if task.search is not None and task.search.stopped_by is not None:
        return task.search.stopped_by
    for early in trainer.early_stopping_callbacks:
        if early is not None and early.stopping_reason in EARLY:
            return EARLY[early.stopping_reason]
    if trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
        return "max_steps"
    if trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs:
        return "max_epochs"
    if any(isinstance(callback, MaxSeconds) and callback.reached for callback in trainer.callbacks):  # type: ignore[attr-defined]
        return "max_seconds"
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    left = [timer.time_remaining() for timer in timers]
    return "max_time" if any(seconds is not None and seconds <= 0 for seconds in left) else "callback"


# --- what a run says about itself ---


def print_header(console: Console, cfg: DictConfig, task: PatternSearchTask, datamodule: SequenceDataModule) -> None:
    """Two lines: what is trained on what, and where it is written."""
    weights = f"{sum(p.numel() for p in task.model.parameters()):,}"
    trained = f"{sum(p.numel() for p in task.parameters_trained):,}"
    weights = weights if trained == weights else f"{trained} of {weights}"
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in datamodule.splits.items())
    console.print(
        f"[bold]{cfg.choices.optimizer}[/] trains [bold]{cfg.choices.model}[/] ({weights} weights) on "
        f"[bold]{cfg.choices.task}[/]: {sizes} sequences, chance loss {datamodule.chance_loss:.3f}, seed {cfg.seed}",
        soft_wrap=not console.is_terminal,
        highlight=False,
    )
    on_gpu = cfg.trainer.get("accelerator") != "cpu" and torch.cuda.is_available()
    on = "the GPU" if on_gpu else f"{available_cores()} thread(s)"
    where = "" if task.automatic_optimization else f"; candidates on {on}"
    console.print(f"Run directory: {typed(cfg.output_dir)}{where}", soft_wrap=True, highlight=False)


def leave_picture(run_dir: str | Path) -> None:
    """Leave progress.png in the run's directory, or a warning: no run fails for its picture."""
    try:
        from results import figures  # only here: its libraries would slow down the start of every run

        figures.draw_progress(run_dir)
    except Exception as error:
        logging.getLogger(__name__).warning("progress.png was not drawn: %s: %s", type(error).__name__, error)


def print_summary(console: Console, cfg: DictConfig, summary: dict[str, Any]) -> None:
    """A short table, and what to type next."""
    title = f"{cfg.choices.optimizer} · {cfg.choices.task} · {cfg.choices.model} · seed {cfg.seed}"
    rows = {name: f"{value:.4f}" for name, value in summary["test"].items() if not by_position(name)}
    losses = {"chance_loss": summary["chance_loss"], **summary.get("data", {})}
    rows |= {name.replace("_", " "): f"{value:.4f}" for name, value in losses.items() if name.endswith("_loss")}
    rows |= {
        "stopped by": summary["stopped_by"],
        "steps": f"{summary['steps']:,}",
        "function evaluations": f"{summary['evaluations']:,}",
        "training time": f"{timedelta(seconds=round(summary['seconds']))} ({summary['seconds']:.1f} s)",
    }
    table = Table("held-out test", Column("value", justify="right"), title=title, min_width=len(title) + 2)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
    run_dir = Path(cfg.output_dir)
    here, beside, script = typed(run_dir), typed(run_dir.parent), typed(TRAIN.with_name("report.py"))
    lines = [f"Run:  {here}"]
    if summary["stopped_by"] == "interrupted":
        lines.insert(0, f"Interrupted, so not tested. The newest weights: {typed(summary['checkpoint'])}")
    if (run_dir / "progress.png").exists():
        lines.append(f"Plot: {here}/progress.png; all runs beside it: python {script} figures {beside}")
    if (run_dir / "wandb").exists():
        how = "offline, nothing was uploaded; upload with" if cfg.logger.get("offline") else "should it lack anything"
        lines.append(f"W&B:  {how}: wandb sync {here}/wandb/*run-*")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
