"""Going on with a run: which one `resume` means, whether its config fits, and from which checkpoint.

`run/checkpoints.py` writes and restores the state; here it is only found.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from config.compose import given, shown
from config.refusal import refuse
from results.runs import LIMITS, RESUMABLE, Run, RunError, flat, newest_runs, read_run, where_runs_are
from run.directory import RunDirectoryError, typed, unusable

# no step depends on these, nor on what lies below them
FREE_NODES = ("resume", "checkpoint", "choices", "logger", "wandb", "allowed_packages", "picture", "callbacks.progress")
FREE = tuple(f"{node}." for node in FREE_NODES)


def plan(cfgs: Sequence[DictConfig], hydra: HydraConf, multirun: bool) -> list[Path]:
    """The directories in which the jobs of a command will run; refuses what speaks against it.

    Args:
        cfgs: of the jobs; `output_dir` is where a job would run if it did not resume.
        hydra: the node of the config of the command.
        multirun: whether the command is a sweep, whose jobs stay in their own directories.
    """
    key, resume, problems = "hydra.sweep.dir=" if multirun else "hydra.run.dir=", cfgs[0].resume, list[str]()
    own = any(override.startswith(key) for override in given(hydra, "hydra"))
    if multirun and resume is not None and not (resume == "auto" and own):
        problems.append(f"resume={resume}: a sweep resumes with resume=auto hydra.sweep.dir=<its own>")
    for run_dir, jobs in Counter(cfg.output_dir for cfg in cfgs).items():
        if jobs > 1:
            advice = "leave output_dir and hydra.sweep.subdir out, and each has its own directory"
            problems.append(f"{jobs} jobs would write to {typed(run_dir)}; {advice}")
    run_dirs = [_run_directory(cfg, multirun or own) for cfg in cfgs]
    if found := problems or [p for cfg, run_dir in zip(cfgs, run_dirs, strict=True) for p in _problems(cfg, run_dir)]:
        refuse(found)
    return run_dirs


def _run_directory(cfg: DictConfig, given: bool) -> Path:
    run_dir = Path(cfg.output_dir)
    if cfg.resume == "auto":
        searched = not given and not run_in(run_dir)
        return (newest_unfinished(cfg) if searched else None) or run_dir
    return Path(cfg.resume or run_dir).absolute()


def newest_unfinished(cfg: DictConfig) -> Path | None:
    """The newest unfinished run below runs/ that takes the same way as `cfg`."""
    for directory in newest_runs():
        run = run_in(directory)
        if run and not saved_summary(run) and not differences(run.config, cfg):
            return run.directory
    return None


def run_in(run_dir: Path) -> Run | None:
    """The run in a directory; None without one that can go on."""
    with suppress(RunError):
        run = read_run(run_dir)
        return run if "output_dir" in run.config else None
    return None


def missing_run(cfg: DictConfig) -> Iterator[str]:
    """What is wrong with `resume` if no run is there; this is known from the file system."""
    if cfg.resume not in (None, "auto") and run_in(Path(cfg.resume)) is None:
        nothing = f"resume={cfg.resume}: no run is there; give the directory that holds its config.yaml"
        yield unusable(Path(cfg.resume).absolute()) or f"{nothing}; {where_runs_are()}"


def saved_summary(run: Run) -> dict[str, Any] | None:
    """The summary of a finished run; None if the run has not finished."""
    with suppress(RunError):  # a damaged one is written again
        return run.summary if run.finished else None
    return None


def finished(cfg: DictConfig) -> dict[str, Any] | None:
    """The summary of the run in `output_dir`, if it is this run, resumed, and nothing is left to do."""
    run = run_in(Path(cfg.output_dir)) if cfg.resume else None
    if run is None or differences(run.config, cfg) or differences(run.config, cfg, limits=True):
        return None
    return saved_summary(run)


def differences(old: DictConfig, new: DictConfig, limits: bool = False) -> dict[str, tuple[Any, Any]]:
    """The keys by which two configs lead to different weights, or those of limits, each with both values.

    A path in the run's directory counts the same wherever that is.
    """

    def values(cfg: DictConfig) -> dict[str, Any]:
        container: Any = OmegaConf.to_container(cfg, resolve=True)
        return {k: v.replace(cfg.output_dir, "") if isinstance(v, str) else v for k, v in flat(container).items()}

    def is_limit(key: str) -> bool:
        scheduled = OmegaConf.select(new, "optimizer.linear_decay") and key == "optimizer.max_evaluations"
        return key.rpartition(".")[2] in LIMITS and not scheduled  # else every step depends on it

    before, after = values(old), values(new)
    pairs = {key: (before.get(key, "(missing)"), after.get(key, "(missing)")) for key in before | after}
    return {
        key: pair
        for key, pair in pairs.items()
        if pair[0] != pair[1] and not f"{key}.".startswith(FREE) and limits == is_limit(key)
    }


def _problems(cfg: DictConfig, run_dir: Path) -> Iterator[str]:
    """What speaks against a run in a directory."""
    run, where = run_in(run_dir), typed(run_dir)
    if problem := unusable(run_dir):
        yield problem
    elif run is None:
        yield from missing_run(cfg)
    elif cfg.resume is None:
        yield f"{where} holds a run already; resume=auto goes on with it, or choose another directory"
    else:
        for key, (old, new) in differences(run.config, cfg).items():
            yield f"{key} is {shown(new)} here and was {shown(old)} in {where}; a run goes on only as it began"


def begin(cfg: DictConfig, console: Console) -> Path | None:
    """Make the run's directory ready, and say in one line where the run goes on; returns its checkpoint.

    None if there is nothing to go on from; then the directory is as good as empty. RunDirectoryError if it holds a run
    that `cfg` does not go on with, or no checkpoint of it can be read.
    """
    run_dir = Path(cfg.output_dir)
    if problems := list(_problems(cfg, run_dir)):
        raise RunDirectoryError("; ".join(problems))
    checkpoint, step = newest_readable(run_dir)
    for outcome in ("summary.json", "checkpoints/end.ckpt", *([] if checkpoint else ["metrics.csv"])):
        (run_dir / outcome).unlink(missing_ok=True)
    if cfg.resume:
        line = "No unfinished run of this config: a new one starts."
        if checkpoint:
            line = f"Goes on from step {step:,}, {typed(checkpoint)}"
        console.print(line, soft_wrap=True, highlight=False)
        logging.getLogger(__name__).info(line)  # in train.log
    return checkpoint


def newest_readable(run_dir: Path) -> tuple[Path | None, int]:
    """The newest checkpoint that is whole, and its step; RunDirectoryError if there are some, and all are damaged."""
    from run.checkpoints import read_checkpoint  # only here: a resume that is refused needs no torch

    damaged: dict[Path, str] = {}
    for path in (run_dir / "checkpoints" / name for name in RESUMABLE):
        try:
            step = read_checkpoint(path)["global_step"]
        except FileNotFoundError:
            continue
        except ValueError as error:
            damaged[path] = str(error)
            continue
        for other, why in damaged.items():
            print(f"{why}; the one before is taken.")
            other.unlink()  # it must not become the spare
        return path, step
    if damaged:
        raise RunDirectoryError("; ".join([*damaged.values(), "nothing of this run can go on: begin a new run"]))
    return None, 0
