"""The local metrics table of a run, and the reading of many: one row a value, ready for seaborn.

Every run appends to `metrics.csv` in its own directory, whatever `logger` is: columns `step`,
`evaluations`, `seconds`, `metric`, `value`. The header never changes and rows are only appended, so a killed run
leaves a readable table. `read_runs` reads any number of them, `read_wandb` gets the same table from W&B.
"""

import csv
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

AXES = ["step", "evaluations", "seconds"]
COLUMNS = [*AXES, "metric", "value"]
KINDS = ["task", "model", "optimizer", "variant"]  # runs that have these in common are of a kind
SETTINGS = ("datamodule.", "model.", "task.", "optimizer.", "trainer.")  # nodes of the config that decide a result
OF_THE_TASK = ("datamodule.", "trainer.max_", "trainer.limit_")  # and those that hold for other kinds as well
PER_RUN = ("seed", "_target_", "task.pattern_search_radius")  # no settings: the last stands at the optimizer too


class MetricsTable(Logger):
    """A Lightning logger that appends every metric to `<run_dir>/metrics.csv`."""

    name, version = "metrics_table", ""

    def __init__(self, run_dir: str | Path):
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self._axes = {"evaluations": 0.0, "seconds": 0.0}
        if not self.path.exists():
            with self.path.open("w", newline="") as file:
                csv.writer(file).writerow(COLUMNS)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The config is saved beside the table, as config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        metrics = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        self._axes |= {axis: metrics.pop(axis) for axis in self._axes if axis in metrics}
        with self.path.open("a", newline="") as file:
            rows = csv.writer(file)
            for name, value in metrics.items():
                rows.writerow([step, int(self._axes["evaluations"]), f"{self._axes['seconds']:.4f}", name, value])

    def sync(self) -> int:
        """Have all rows survive a crash of the machine; returns the bytes of the table, where a resumed run goes on."""
        with self.path.open("rb") as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def cut(self, size: int) -> None:
        """Drop what lies behind the first `size` bytes: rows of steps that will be done again, or half a row."""
        os.truncate(self.path, min(size, self.path.stat().st_size))


def read_runs(*paths: str | Path) -> pd.DataFrame:
    """The tables of all runs below the paths as one, with columns that say of which run a row is.

    They are run, chance_loss (NaN for a run that has not ended yet), those of `describe`, and settings, as
    `name_settings` gives them.

    Raises:
        FileNotFoundError: no run lies below the paths.
    """
    tables, configs = [], []
    for table in sorted({t for path in paths for t in Path(path).rglob("metrics.csv")}):
        run = table.parent
        if (run / "config.yaml").exists():
            frame = pd.read_csv(table).assign(
                run=run.name if run.parent.name == "runs" else f"{run.parent.name}/{run.name}"
            )
            summary = json.loads(file.read_text()) if (file := run / "summary.json").exists() else {}
            frame["chance_loss"] = summary.get("chance_loss", math.nan)
            tables.append(frame)
            configs.append(OmegaConf.to_container(OmegaConf.load(run / "config.yaml")))
    if not tables:
        raise FileNotFoundError(f"no run with metrics.csv and config.yaml below {', '.join(map(str, paths))}")
    return joined(tables, configs)


def read_wandb(entity: str | None, project: str) -> pd.DataFrame:
    """The same table as `read_runs`, from the runs of a W&B project (needs an account and a network)."""
    import wandb  # only here: reading local runs must not need it

    tables, configs = [], []
    for run in wandb.Api().runs(f"{entity}/{project}" if entity else project):
        history = pd.DataFrame(run.scan_history())
        step = "trainer/global_step" if "trainer/global_step" in history else "global_step"  # renamed in newer releases
        tables.append(tidy(history.rename(columns={step: "step"})).assign(run=run.name, chance_loss=math.nan))
        configs.append(run.config)
    if not tables:
        raise FileNotFoundError(f"the W&B project {project} has no runs")
    return joined(tables, configs)


def joined(tables: list[pd.DataFrame], configs: list[Mapping]) -> pd.DataFrame:
    """The tables of runs as one, with what each run was."""
    settings = name_settings(configs)
    described = [
        table.assign(**describe(config), settings=of_run)
        for table, config, of_run in zip(tables, configs, settings, strict=True)
    ]
    return pd.concat(described, ignore_index=True)


def tidy(history: pd.DataFrame) -> pd.DataFrame:
    """A wide history, one column a metric, as one row a value; rows without axes take the last known ones."""
    history = history.sort_values("step", kind="stable")
    history[AXES] = history[AXES].ffill()
    metrics = [name for name in history if name.startswith(("train/", "val/", "test/"))]
    return history.melt(AXES, metrics, var_name="metric").dropna(subset="value").reset_index(drop=True)


def describe(config: Mapping) -> dict[str, Any]:
    """What figures and tables compare, from a run's config: task, model, optimizer, variant, seed.

    The task is called by its experiment if there is one, else by its family and its group, language or split.
    """
    data, choices = config["datamodule"], config["choices"]
    kind = next((data[key] for key in ("group", "language", "split") if key in data), "")
    return {
        "task": choices.get("experiment") or f"{choices['task']} {kind}".strip(),
        "model": choices["model"],
        "optimizer": choices["optimizer"],
        "variant": choices.get("variant") or "",  # of the optimizer, see configs/variant
        "seed": config["seed"],
    }


def name_settings(configs: list[Mapping]) -> list[str]:
    """What tells each run from the others of its kind, such as "length=16, max_steps=100"; the seed does not.

    Settings of the task's data, and limits, also tell it from runs of the same task with another model or optimizer.
    """

    def tells(key: str, value: Any) -> bool:
        no_limit = key.rpartition(".")[2].startswith("max_") and value in (None, -1)
        return key.startswith(SETTINGS) and not key.endswith(PER_RUN) and not no_limit

    flat = [pd.json_normalize(config).to_dict("records")[0] for config in configs]  # dotted keys
    settings = [{key: value for key, value in of_run.items() if tells(key, value)} for of_run in flat]
    runs, differing = pd.DataFrame(map(describe, configs)), [set() for _ in configs]
    for kind in (KINDS, ["task"]):
        for _, of in runs.groupby(kind):
            for key in {key for i in of.index for key in settings[i]}:
                compared = kind == KINDS or key.startswith(OF_THE_TASK)
                if compared and len({str(settings[i].get(key)) for i in of.index}) > 1:
                    for i in of.index:
                        differing[i] |= {key} & settings[i].keys()
    return [
        ", ".join(f"{key.rpartition('.')[2]}={of_run[key]}" for key in sorted(keys))
        for of_run, keys in zip(settings, differing, strict=True)
    ]
