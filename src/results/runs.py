"""The one reader of runs: what lies in a run's directory, and which runs lie below a path.

A run is a directory with `config.yaml`. Its `metrics.csv` grows while it trains (`run/metrics_table.py` writes it), and
its `summary.json` is written when it ends. Reading needs neither torch nor Lightning; pandas only for tables.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

if TYPE_CHECKING:
    import pandas as pd

AXES = ["step", "evaluations", "seconds"]
COLUMNS = [*AXES, "metric", "value"]  # of metrics.csv
OUTCOME = ("steps", "evaluations", "seconds", "stopped_by", "test")  # of summary.json; the last are the metrics
RESUMABLE = ("last.ckpt", "previous.ckpt")  # what a run goes on from, in checkpoints/, newest first
KIND = ["task", "model", "optimizer", "variant"]  # runs that have these in common are of a kind
# nodes of the config that decide a result
SETTINGS = ("datamodule.", "model.", "task.", "optimizer.", "trainer.", "callbacks.averaging.")
# keys by their last name that say where a run ends, not where it goes: a curve needs no name for them
LIMITS = ("max_epochs", "max_steps", "max_time", "max_evaluations", "max_seconds", "target_loss", "stopping_threshold")
PER_RUN = ("seed", "_target_", "task.pattern_search_radius")  # no settings: the last stands at the optimizer too

T = TypeVar("T")


class RunError(ValueError):
    """A run, or what is asked of it, is not there or cannot be read; the message is one line with the place and why."""


@dataclass
class Run:
    """A run as it lies on the disk."""

    directory: Path
    config: DictConfig
    description: dict[str, Any]  # see `describe`

    @cached_property
    def summary(self) -> dict[str, Any] | None:
        """The content of summary.json; None for a run that has not ended; RunError if it is damaged."""
        path = self.directory / "summary.json"
        try:
            summary = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{path} is empty or cut off: {error}") from error
        if missing := [name for name in OUTCOME if not isinstance(summary, dict) or name not in summary]:
            raise RunError(f"{path} is not the summary of a run: it has no {', '.join(missing)}")
        return summary

    @property
    def finished(self) -> bool:
        """Whether the run ended, and was not interrupted."""
        return self.summary is not None and self.summary["stopped_by"] != "interrupted"

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that was tested, where it lies now, else the newest one; RunError if there is none."""
        kept = [self.directory / "checkpoints" / name for name in ("end.ckpt", *RESUMABLE)]
        if tested := (self.summary or {}).get("checkpoint"):
            kept = [self.directory / "checkpoints" / Path(tested).name]
        for path in kept:
            if path.exists():
                return path
        raise RunError(f"{self.directory} has no checkpoint ({', '.join(path.name for path in kept)})")

    def metrics(self) -> pd.DataFrame:
        """The metrics table, columns COLUMNS, without a last row that is being written; RunError if it is damaged."""
        import pandas as pd

        path = self.directory / "metrics.csv"
        try:
            text = path.read_text()
            table = pd.read_csv(io.StringIO(text[: text.rfind("\n") + 1]))
            return table[COLUMNS].astype({name: float for name in COLUMNS if name != "metric"})
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{path} is missing, empty or damaged: {error}".splitlines()[0]) from error


def read_run(directory: str | Path) -> Run:
    """The run in a directory; RunError if none is there, or its config.yaml is damaged."""
    directory = Path(directory)
    path = directory / "config.yaml"
    try:
        config = OmegaConf.load(path)
        if not isinstance(config, DictConfig):
            raise TypeError("it is a list")
        return Run(directory, config, describe(config))
    except FileNotFoundError as error:
        raise RunError(f"{directory} holds no run: it has no config.yaml") from error
    except (OSError, ValueError, YAMLError, LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is not the config of a run: {error}".splitlines()[0]) from error


def find_run(path: str | Path) -> tuple[Run, Path]:
    """The run and the checkpoint that a path means, the directory of a run or a checkpoint in it; RunError if none."""
    path = Path(path).expanduser()
    if path.suffix == ".ckpt" and path.is_file():
        return read_run(path.absolute().parents[1]), path
    if jobs := by_number(file.parent for file in path.glob("*/config.yaml") if file.parent.name != ".hydra"):
        raise RunError(f"{path} is the directory of {len(jobs)} run(s); give one of them, such as {jobs[0]}")
    try:
        run = read_run(path)
    except RunError as error:
        raise RunError(f"{error}; {where_runs_are()}") from error
    return run, run.checkpoint


def newest_runs() -> list[Path]:
    """The directories of all runs and jobs of sweeps below runs/ of this project, newest first."""
    runs = Path(os.environ.get("PATTERN_SEARCH_ROOT", Path(__file__).parents[2])) / "runs"
    found = [*runs.glob("*/config.yaml"), *runs.glob("*/[!.]*/config.yaml")]
    return [path.parent for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def where_runs_are() -> str:
    """What to give instead of a run that is not there."""
    newest = [os.path.relpath(path) for path in newest_runs()[:3]]
    return f"the newest are {', '.join(newest)}" if newest else "python src/train.py makes one"


def read_all(*paths: str | Path, read: Callable[[Run], T], finished_only: bool = False) -> list[T]:
    """What `read` makes of each run at or below the paths that has begun, by directory.

    A run that is damaged, or of which `read` raises a RunError, is named on stderr and left out. RunError if none is
    left.
    """
    files = [file for path in paths for name in ("metrics.csv", "summary.json") for file in Path(path).rglob(name)]
    results = []
    for directory in by_number({file.parent for file in files if file.with_name("config.yaml").exists()}):
        try:
            run = read_run(directory)
            if run.finished or not finished_only:
                results.append(read(run))
        except RunError as error:
            print(f"Left out: {error}", file=sys.stderr, flush=True)
    if not results:
        kind = "finished run" if finished_only else "run"
        raise RunError(f"no {kind} that can be read lies below {', '.join(map(str, paths))}")
    return results


def by_number(paths: Iterable[Path]) -> list[Path]:
    """Paths in order: job 2 comes before job 10."""
    return sorted(paths, key=lambda path: re.sub(r"\d+", lambda digits: digits[0].zfill(20), str(path)))


def by_position(metric: str) -> bool:
    """Whether a metric is one of those by position, which are for figures: too many for a table."""
    return metric.rpartition("/")[2].startswith("accuracy_at_")


# --- the metrics of many runs as one table, ready for seaborn ---


def read_runs(*paths: str | Path) -> pd.DataFrame:
    """The metrics tables of all runs below the paths as one, with columns that say of which run a row is.

    They are run (its directory), chance_loss (NaN for a run that has not ended yet), those of `describe`, and settings,
    as `name_settings` gives them. RunError if no run that can be read lies there. A .csv or .csv.gz that
    `report.py figures --keep` wrote stands for its runs.
    """
    import pandas as pd

    kept, directories = kept_and_directories(paths)
    tables = [read_kept(path, na_values={"chance_loss": [""]}) for path in kept]
    tables = [table.assign(run=f"{path}/" + table.run.astype(str)) for path, table in zip(kept, tables, strict=True)]
    if kept and not directories:
        return pd.concat(tables, ignore_index=True)

    def table_of(run: Run) -> pd.DataFrame:
        chance_loss = (run.summary or {}).get("chance_loss", math.nan)
        return run.metrics().assign(run=str(run.directory), chance_loss=chance_loss)

    found = read_all(*directories, read=lambda run: (table_of(run), run.config))
    tables.append(joined([table for table, _ in found], [config for _, config in found]))
    return pd.concat(tables, ignore_index=True)


def kept_and_directories(paths: Sequence[str | Path]) -> tuple[list[str | Path], list[str | Path]]:
    """The CSVs that stand for runs, and the directories of others."""
    kept = [path for path in paths if Path(path).name.endswith((".csv", ".csv.gz"))]
    return kept, [path for path in paths if path not in kept]


def read_kept(path: str | Path, na_values: Any) -> pd.DataFrame:
    """The rows of a CSV; RunError if it is not there, or is no CSV."""
    import pandas as pd

    try:
        return pd.read_csv(path, keep_default_na=False, na_values=na_values)
    except FileNotFoundError as error:
        raise RunError(f"{path} is not there") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is no CSV of runs: {error}".splitlines()[0]) from error


def read_wandb(entity: str | None, project: str) -> pd.DataFrame:
    """The same table as `read_runs`, from the runs of a W&B project (needs an account and a network)."""
    import pandas as pd
    import wandb  # only here: reading local runs must not need it

    tables, configs = [], []
    for run in wandb.Api().runs(f"{entity}/{project}" if entity else project):
        history = pd.DataFrame(run.scan_history())
        step = "trainer/global_step" if "trainer/global_step" in history else "global_step"  # renamed in newer releases
        history = history.rename(columns={step: "step"}).sort_values("step", kind="stable")
        history[AXES] = history[AXES].ffill()  # rows without axes take the last known ones
        metrics = [name for name in history if name.startswith(("train/", "val/", "test/"))]
        table = history.melt(AXES, metrics, var_name="metric").dropna(subset="value")  # a row per value
        tables.append(table.assign(run=run.name, chance_loss=math.nan))
        configs.append(run.config)
    if not tables:
        raise RunError(f"the W&B project {project} has no runs")
    return joined(tables, configs)


def joined(tables: Sequence[pd.DataFrame], configs: Sequence[Mapping]) -> pd.DataFrame:
    """The tables of runs as one, with what each run was."""
    import pandas as pd

    found = zip(tables, configs, name_settings(configs, leave_out=LIMITS), strict=True)
    described = [table.assign(**describe(config), settings=own) for table, config, own in found]
    return pd.concat(described, ignore_index=True)


# --- what a run was, from its config ---


def describe(config: Mapping) -> dict[str, Any]:
    """What figures and tables compare: KIND and the seed; any of several errors if it is not the config of a run."""
    data, choices = config["datamodule"], config["choices"]
    kind = next((data[key] for key in ("group", "language", "split") if key in data), "")
    return {
        "task": choices.get("experiment") or f"{choices['task']} {kind}".strip(),
        "model": choices["model"],
        "optimizer": choices["optimizer"],
        "variant": choices.get("variant") or "",  # of the optimizer, see configs/variant
        "seed": config["seed"],
    }


def name_settings(configs: Sequence[Mapping], leave_out: Sequence[str] = ()) -> list[str]:
    """What tells each run from the others of its kind, such as "length=16, max_steps=100"; the seed does not.

    Args:
        configs: of the runs.
        leave_out: further keys, by their last name, that do not.
    """
    runs = [(tuple(describe(config)[name] for name in KIND), settings_of(config, leave_out)) for config in configs]
    values: defaultdict[tuple, set[str]] = defaultdict(set)  # of a setting among the runs of a kind
    for kind, settings in runs:
        for key, value in settings.items():
            values[kind, key].add(value)
    return [
        ", ".join(f"{key.rpartition('.')[2]}={settings[key]}" for key in sorted(settings) if len(values[kind, key]) > 1)
        for kind, settings in runs
    ]


def settings_of(config: Mapping, leave_out: Sequence[str] = ()) -> dict[str, str]:
    """The settings that may tell runs apart, by dotted key."""
    found, without = flat(config).items(), (*PER_RUN, *(f".{name}" for name in leave_out))
    return {key: str(value) for key, value in found if key.startswith(SETTINGS) and not key.endswith(without)}


def flat(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """A nested config by dotted keys; lists are values."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        found |= flat(value, name) if isinstance(value, Mapping) and value else {name: value}
    return found
