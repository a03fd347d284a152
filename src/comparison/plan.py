"""What a comparison runs, as its YAML says it (report/full.yaml): tasks, contenders with their settings, seeds.

The protocol, which the runner enforces:

1. A task and a seed decide the data, their splits, the first weights and the batches, the same for every contender.
2. A contender is tuned for each task apart: each of its settings runs once, on `tuning_seed`, for `tuning_share` of the
   task's seconds. Validation alone chooses.
3. The setting that was chosen runs on the seeds that are reported. Its best weights on validation are tested once.
4. Every run has one thread, and ends when its validation loss is at the threshold of early stopping, or its seconds of
   training are spent. What a run needs once, such as the first call of an operation, counts as training.
5. A target is met at the first validation that meets it. Validations come after an epoch, or so many steps, as the
   task has it: a contender with long steps is seen less often, and meets its target a little later than it could be
   seen.
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from config.compose import shown
from results.runs import RunError

COMMON = ("logger=none", "trainer.max_epochs=-1", "+callbacks.limit={_target_:run.limits.MaxSeconds,max_seconds:%g}")
TUNING, REPORTED = "tuning", "reported"  # the phases of a comparison


class Target(BaseModel):
    """What counts as solved: a validation metric that is at least, or at most, a value."""

    model_config = ConfigDict(extra="forbid")
    metric: str = "val/exact_match"
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> "Target":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a target needs either at_least or at_most")
        return self

    def met(self, values: Any) -> Any:
        """Whether values (a series of pandas) meet it, one by one."""
        return values >= self.at_least if self.at_least is not None else values <= self.at_most


class Task(BaseModel):
    """A task of the comparison: how it is chosen on the command line, and what a run of it gets."""

    model_config = ConfigDict(extra="forbid")
    overrides: list[str]  # of src/train.py
    seconds: float = Field(gt=0)  # of training, the budget of a run
    seeds: int | None = Field(None, ge=1)  # how many of the seeds are run; None: all
    target: Target = Target(at_least=0.99)
    contenders: list[str] | None = None  # those that run on it; None: all


class Contender(BaseModel):
    """An optimizer, and the settings among which its tuning chooses."""

    model_config = ConfigDict(extra="forbid")
    overrides: list[str]
    settings: list[dict[str, Any]] = Field([{}], min_length=1)  # keys of the config and their values


class Plan(BaseModel):
    """A whole comparison."""

    model_config = ConfigDict(extra="forbid")
    seeds: list[int] = Field(min_length=1)
    tuning_seed: int
    tuning_share: float = Field(gt=0, le=1)
    processes: int = Field(2, ge=1)  # runs at the same time, each on one thread
    baseline: str  # the contender that costs are given as ratios to
    tasks: dict[str, Task]
    contenders: dict[str, Contender]

    @model_validator(mode="after")
    def _names_are_known(self) -> "Plan":
        if self.tuning_seed in self.seeds:
            raise ValueError(f"tuning_seed={self.tuning_seed} is among the seeds that are reported; choose another")
        if self.baseline not in self.contenders:
            raise ValueError(f"baseline={self.baseline} is no contender; known: {', '.join(self.contenders)}")
        for name, task in self.tasks.items():
            if unknown := {*(task.contenders or ())} - self.contenders.keys():
                raise ValueError(f"tasks.{name}.contenders: {', '.join(sorted(unknown))} is no contender")
        return self


@dataclass(frozen=True)
class Job:
    """One run of a comparison."""

    task: str
    contender: str
    setting: tuple[tuple[str, Any], ...]
    phase: str
    seed: int
    seconds: float  # of training
    words: tuple[str, ...]  # of src/train.py

    @property
    def directory(self) -> Path:
        """Where it runs, below the directory of the comparison. Another setting or budget has another one."""
        name = f"{self.phase}_{self.seconds:g}s_seed_{self.seed}"
        return Path(self.task, self.contender, name_of(self.setting) or "defaults", name)

    @property
    def command(self) -> str:
        """What to type for this run alone."""
        return shlex.join(["python", "src/train.py", *self.words])


def name_of(setting: Sequence[tuple[str, Any]]) -> str:
    """A setting as tables show it, such as "lr=0.01, samples=16"."""
    return ", ".join(f"{key.rpartition('.')[2]}={str(value).replace(' ', '')}" for key, value in setting)


def read_plan(path: Path) -> Plan:
    """The comparison that a YAML describes; RunError if it is not one."""
    try:
        return Plan.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise RunError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        found = (f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors())
        raise RunError(f"{path}: {'; '.join(found)}") from error


def pairs(plan: Plan) -> Iterator[tuple[str, str]]:
    """Every task with each contender that runs on it, task after task."""
    for name, task in plan.tasks.items():
        for contender in plan.contenders:
            if task.contenders is None or contender in task.contenders:
                yield name, contender


def tuning_jobs(plan: Plan, task: str, contender: str) -> list[Job]:
    """A run for each setting of a contender; none if there is nothing to choose."""
    settings = plan.contenders[contender].settings
    if len(settings) == 1:
        return []
    return [job_of(plan, task, contender, setting, TUNING, plan.tuning_seed) for setting in settings]


def reported_jobs(plan: Plan, task: str, contender: str, setting: dict[str, Any]) -> list[Job]:
    """A run for each seed, with the setting that was chosen."""
    seeds = plan.seeds[: plan.tasks[task].seeds]
    return [job_of(plan, task, contender, setting, REPORTED, seed) for seed in seeds]


def job_of(plan: Plan, task: str, contender: str, setting: dict[str, Any], phase: str, seed: int) -> Job:
    of = plan.tasks[task]
    seconds = of.seconds * (plan.tuning_share if phase == TUNING else 1)
    common = (*COMMON[:-1], COMMON[-1] % seconds)
    chosen = (f"{key}={shown(value).replace(' ', '')}" for key, value in setting.items())
    words = (*of.overrides, *plan.contenders[contender].overrides, *chosen, *common, f"seed={seed}")
    return Job(task, contender, tuple((k, str(v)) for k, v in setting.items()), phase, seed, seconds, words)
