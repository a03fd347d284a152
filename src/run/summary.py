"""What a run says about itself: the header, why it ended, the picture, the summary table."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from data.sequences import SequenceDataModule
from pattern_search_task import PatternSearchTask
from polls.threads import available_cores
from results.runs import by_position
from run.files import typed
from run.progress import clock, time_left

EARLY = {  # why early stopping ended a training
    EarlyStoppingReason.STOPPING_THRESHOLD: "solved",
    EarlyStoppingReason.PATIENCE_EXHAUSTED: "no_improvement",
    EarlyStoppingReason.NON_FINITE_METRIC: "not_finite",
    EarlyStoppingReason.DIVERGENCE_THRESHOLD: "diverged",
}


def print_header(console: Console, cfg: DictConfig, task: PatternSearchTask, datamodule: SequenceDataModule) -> None:
    """Two lines: what is trained on what, and where it is written."""
    weights = f"{sum(p.numel() for p in task.model.parameters()):,}"
    trained = f"{sum(p.numel() for p in task.parameters_trained):,}"
    weights = weights if trained == weights else f"{trained} of {weights}"
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in datamodule.splits.items())
    console.print(
        f"[bold]{cfg.choices.optimizer}[/] trains [bold]{cfg.choices.model}[/] ({weights} weights) on "
        f"[bold]{cfg.choices.task}[/]: {sizes} sequences, chance loss {datamodule.chance_loss:.3f}, seed {cfg.seed}",
        highlight=False,
    )
    threads = f"; candidates on {available_cores()} thread(s)" if not task.automatic_optimization else ""
    console.print(f"Run directory: {typed(cfg.output_dir)}{threads}", soft_wrap=True, highlight=False)


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
    return "max_time" if time_left(trainer) <= 0 else "callback"


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
    table = Table(title=title, min_width=len(title) + 2)
    table.add_column("held-out test", justify="left")
    table.add_column("value", justify="right")
    for name, value in summary["test"].items():
        if not by_position(name):
            table.add_row(name, f"{value:.4f}")
    table.add_row("chance loss", f"{summary['chance_loss']:.4f}", end_section=True)
    table.add_row("stopped by", summary["stopped_by"])
    table.add_row("steps", f"{summary['steps']:,}")
    table.add_row("function evaluations", f"{summary['evaluations']:,}")
    table.add_row("training time", f"{clock(summary['seconds'])} ({summary['seconds']:.1f} s)")
    console.print(table)
    run_dir = Path(cfg.output_dir)
    here, beside, script = typed(run_dir), typed(run_dir.parent), typed(Path(__file__).parents[1] / "report.py")
    lines = [f"Run:  {here}"]
    if summary["stopped_by"] == "interrupted":
        lines.insert(0, f"Interrupted, so not tested. The newest weights: {typed(summary['checkpoint'] or 'none yet')}")
    if (run_dir / "progress.png").exists():
        lines.append(f"Plot: {here}/progress.png; all runs beside it: python {script} figures {beside}")
    if (run_dir / "wandb").exists() and cfg.logger.get("offline"):
        lines.append(f"W&B:  offline, nothing was uploaded; upload with: wandb sync {here}/wandb/offline-run-*")
    elif (run_dir / "wandb").exists():
        lines.append(f"W&B:  online; should it fail to take everything: wandb sync {here}/wandb/run-*")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
