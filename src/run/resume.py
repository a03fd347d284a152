"""Going on with a run: which one `resume` means, whether its config fits, and from which checkpoint.

`run/checkpoints.py` writes and restores the state; here it is only found.
"""

import logging
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from config.compose import DEFAULT_CONFIG, given
from config.refusal import refuse
from results.runs import Run, RunError, flat, read_run
from run.checkpoints import read_checkpoint
from run.directory import RunDirectoryError, unusable
from run.files import RESUMABLE, quoted, typed
from run.interrupts import Interrupts

# where a run ends, not where it goes: may be changed when it goes on
LIMITS = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
    "optimizer.max_evaluations",
    "optimizer.max_seconds",
    "optimizer.target_loss",
    "callbacks.early_stopping.stopping_threshold",
)
# no step depends on these, nor on what lies below them
FREE = (
    "resume.",
    "output_dir.",
    "checkpoint.",
    "choices.",
    "logger.",
    "wandb.",
    "allowed_packages.",
    "callbacks.progress.",
    "trainer.enable_progress_bar.",
    "trainer.enable_model_summary.",
)


def plan(cfgs: Sequence[DictConfig], hydra: HydraConf, multirun: bool) -> list[Path]:
    """The directories in which the jobs of a command will run; refuses what speaks against it.

    Args:
        cfgs: of the jobs; `output_dir` is where a job would run if it did not resume.
        hydra: the node of the config of the command.
        multirun: whether the command is a sweep, whose jobs stay in their own directories.
    """
    key = "hydra.sweep.dir=" if multirun else "hydra.run.dir="
    directory_given = any(override.startswith(key) for override in given(hydra, "hydra"))
    if multirun and (problems := list(_sweep_problems(cfgs, directory_given))):
        refuse(problems)
    run_dirs, found = [], list[str]()
    for cfg in cfgs:
        try:
            run_dirs.append(_run_directory(cfg, multirun or directory_given))
            found += _problems(cfg, run_dirs[-1])
        except RunDirectoryError as error:
            found.append(str(error))
    if found:
        refuse(found)
    return run_dirs


def _sweep_problems(cfgs: Sequence[DictConfig], directory_given: bool) -> Iterator[str]:
    resume = cfgs[0].resume
    if resume is not None and not (resume == "auto" and directory_given):
        yield f"resume={resume}: a sweep resumes with resume=auto hydra.sweep.dir=<its own>"
    for run_dir, jobs in Counter(cfg.output_dir for cfg in cfgs).items():
        if jobs > 1:
            advice = "leave output_dir and hydra.sweep.subdir out, and each has its own directory"
            yield f"{jobs} jobs would write to {typed(run_dir)}; {advice}"


def _run_directory(cfg: DictConfig, directory_given: bool) -> Path:
    run_dir = Path(cfg.output_dir)
    if cfg.resume in (None, "auto"):
        searched = cfg.resume == "auto" and not directory_given and not run_in(run_dir)
        return (newest_unfinished(cfg) if searched else None) or run_dir
    path = Path(cfg.resume).absolute()
    found = path.parents[1] if path.is_file() else path
    if not run_in(found):
        raise RunDirectoryError(f"resume={cfg.resume}: no run is there; give the directory that holds its config.yaml")
    return found


def _problems(cfg: DictConfig, run_dir: Path) -> Iterator[str]:
    """What speaks against a run in a directory."""
    if problem := unusable(run_dir):
        yield problem
    elif run := run_in(run_dir):
        yield from _misfits(cfg, run)


def newest_unfinished(cfg: DictConfig) -> Path | None:
    """The newest unfinished run below runs/ that takes the same way as `cfg`."""
    runs = Path(os.environ["PATTERN_SEARCH_ROOT"]) / "runs"
    candidates = [*runs.glob("*/config.yaml"), *runs.glob("*/[!.]*/config.yaml")]  # runs, and the jobs of sweeps
    for path in sorted(candidates, key=lambda path: path.stat().st_mtime, reverse=True):
        run = run_in(path.parent)
        if run and not saved_summary(run) and not differences(run.config, cfg):
            return run.directory
    return None


def run_in(run_dir: Path) -> Run | None:
    """The run in a directory; None without one that can go on."""
    with suppress(RunError):
        run = read_run(run_dir)
        return run if "output_dir" in run.config else None
    return None


def saved_summary(run: Run) -> dict[str, Any] | None:
    """The summary of a finished run; None if the run has not finished."""
    with suppress(RunError):  # a damaged one is written again
        return run.summary if run.finished else None
    return None


def finished(cfg: DictConfig) -> dict[str, Any] | None:
    """The summary of the run in `output_dir`, if it is this run, resumed, and nothing is left to do."""
    run = run_in(Path(cfg.output_dir)) if cfg.resume else None
    if run is None or differences(run.config, cfg) or limits(run.config) != limits(cfg):
        return None
    return saved_summary(run)


def limits(cfg: DictConfig) -> dict[str, Any]:
    return {key: OmegaConf.select(cfg, key) for key in LIMITS}


def differences(old: DictConfig, new: DictConfig) -> dict[str, tuple[Any, Any]]:
    """The keys by which two configs lead to different weights, each with both values."""
    before, after = (_values(OmegaConf.to_container(cfg, resolve=True), cfg.output_dir) for cfg in (old, new))
    pairs = {key: (before.get(key, "(missing)"), after.get(key, "(missing)")) for key in before | after}
    counting = {key: pair for key, pair in pairs.items() if key not in LIMITS and not f"{key}.".startswith(FREE)}
    return {key: pair for key, pair in counting.items() if pair[0] != pair[1]}


def _values(config: Any, run_dir: str) -> dict[str, Any]:
    """Every dotted key with its value; a path in the run's directory counts the same wherever that is."""
    return {key: value.replace(run_dir, "") if isinstance(value, str) else value for key, value in flat(config).items()}


def _misfits(cfg: DictConfig, run: Run) -> Iterator[str]:
    """What speaks against going on with a run."""
    where = typed(run.directory)
    if cfg.resume is None:
        yield f"{where} holds a run already; resume=auto goes on with it, or choose another directory"
        return
    container: Any = OmegaConf.to_container(cfg)
    found, written = differences(run.config, cfg), flat(container)
    for key, (old, new) in found.items():
        if any(written.get(key) == f"${{{other}}}" for other in found):
            continue  # it follows from the other one
        old, new = ("null" if value is None else value for value in (old, new))
        yield f"{key} is {new} here and was {old} in {where}; a run goes on only as it began"
    path = Path(cfg.resume)
    if path.is_file() and (path.parent.name, path.name) not in (("checkpoints", name) for name in RESUMABLE):
        yield f"resume={cfg.resume}: only checkpoints/last.ckpt and previous.ckpt hold a place to go on from"


def begin(cfg: DictConfig, console: Console) -> Path | None:
    """Make the run's directory ready, and say in one line where the run goes on; returns its checkpoint.

    None if there is nothing to go on from; then the directory is as good as empty. RunDirectoryError if it holds a run
    that `cfg` does not go on with, or no checkpoint of it can be read.
    """
    run_dir = Path(cfg.output_dir)
    say = partial(console.print, soft_wrap=True, highlight=False)
    if not (run := run_in(run_dir)):
        if cfg.resume:
            say("No unfinished run of this config, so it starts anew.")
        return None
    if problems := list(_misfits(cfg, run)):
        raise RunDirectoryError("; ".join(problems))
    chosen = Path(cfg.resume).absolute()
    paths = [chosen] if chosen.is_file() else [run_dir / "checkpoints" / name for name in RESUMABLE]
    checkpoint, content = _newest_readable(paths, say)
    epochs = OmegaConf.select(cfg, "trainer.max_epochs")
    if checkpoint and epochs is not None and -1 < epochs < content["epoch"]:
        raise RunDirectoryError(f"trainer.max_epochs={epochs}: {content['epoch']} epochs are done already")
    (run_dir / "summary.json").unlink(missing_ok=True)
    if checkpoint is None:
        (run_dir / "metrics.csv").unlink(missing_ok=True)
        say(f"{typed(run_dir)} has no checkpoint yet, so it starts anew.")
        return None
    for newer in RESUMABLE[: RESUMABLE.index(checkpoint.name)]:  # damaged, or not wanted:
        (run_dir / "checkpoints" / newer).unlink(missing_ok=True)  # it must not become the spare
    line = f"Goes on from step {content['global_step']:,}, {typed(checkpoint)}"
    say(line)
    logging.getLogger(__name__).info(line)  # in train.log
    return checkpoint


def _newest_readable(paths: Sequence[Path], say: Callable[[str], None]) -> tuple[Path | None, dict[str, Any]]:
    damaged = []
    for path in filter(Path.exists, paths):
        try:
            content = read_checkpoint(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for line in damaged:
            say(f"{line}; the one before is taken.")
        return path, content
    if damaged:
        raise RunDirectoryError("; ".join([*damaged, "nothing of this run can go on: begin a new run"]))
    return None, {}


@contextmanager
def resumable(run_dir: Path, interrupts: Interrupts) -> Iterator[None]:
    """Whatever stops the run, say how to go on with it, and exit: 130 or 143 after a signal, 1 if it cannot write."""
    try:
        yield
        if not interrupts.received:
            return
        code = interrupts.exit_code
    except KeyboardInterrupt:
        code = interrupts.exit_code
    except OSError as error:  # most often a full disk; the checkpoints on it are whole
        logging.getLogger(__name__).info("stopped", exc_info=True)
        print(f"Stopped: {error}", file=sys.stderr)
        code = 1
    if not in_sweep():  # which says it at its end
        print(f"Go on with: {resume_command(run_dir)}", flush=True)
    sys.exit(code)


def in_sweep() -> bool:
    """Whether this process runs a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def resume_command(run_dir: Path) -> str:
    """What to type to go on with a run of this process."""
    words = ["python", typed(Path(__file__).parents[1] / "train.py")]
    if HydraConfig.initialized():
        hydra = HydraConfig.get()
        if hydra.job.config_name != DEFAULT_CONFIG:
            words.append(f"--config-name={hydra.job.config_name}")
        words += [override for override in given(hydra) if not override.startswith("resume=")]
    return shlex.join([*words, f"resume={quoted(typed(run_dir))}"])
