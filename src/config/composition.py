"""From a command line to the config of each of its jobs, whatever is wrong with it.

`compose_jobs` composes as Hydra will. `compose_possible` does the same for a command with mistakes: it leaves
out the overrides that Hydra refuses, says why for each, and so lets the rest be checked (`config/check.py`).
Nothing here imports torch, so a misspelt name is told before the seconds that this takes.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from config.did_you_mean import unknown

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEFAULT_CONFIG = "pattern_search_train"


@dataclass
class Job:
    """One job of a command: its config, the same without values from the command line, and the keys of these values."""

    cfg: DictConfig
    defaults: DictConfig
    given: list[str]


@dataclass
class Command:
    """A command line, the jobs that it composes to as far as it can be composed, and what cannot be composed."""

    arguments: list[str]
    overrides: list[str]
    multirun: bool
    jobs: list[Job]
    problems: list[str]


def read_command(arguments: Sequence[str]) -> Command | None:
    """Compose a command line, without the program's name; None if it asks for help or to show the config."""
    args = get_args_parser().parse_intermixed_args(arguments)
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        return None
    jobs, problems = compose_possible(args.config_name or DEFAULT_CONFIG, args.overrides, args.multirun)
    flags, overrides = list(arguments), list(args.overrides)
    for override in overrides:
        flags.remove(override)
    return Command([*flags, *overrides], overrides, args.multirun, jobs, problems)  # Hydra wants flags on one side


def compose_jobs(config_name: str, overrides: list[str], multirun: bool = False) -> list[DictConfig]:
    """The config of each job of a command, with the keys that Hydra fills in at run time set.

    Raises:
        HydraException, OmegaConfBaseException, yaml.YAMLError: what is wrong with an override or a file.
    """
    with _hydra():
        jobs = _split(config_name, overrides, multirun)
        return [_compose(config_name, job, number if multirun else None) for number, job in enumerate(jobs)]


def compose_possible(config_name: str, overrides: list[str], multirun: bool = False) -> tuple[list[Job], list[str]]:
    """The jobs of a command without the overrides that cannot be composed, and what is wrong with these."""
    jobs, problems = [], {}  # an ordered set: the jobs of a sweep share most of their problems
    with _hydra():
        overrides = [o for o in overrides if not _failure(problems, config_name, o, lambda o=o: _parse([o]))]
        for number, job in enumerate(_split(config_name, overrides, multirun)):
            composed = _compose_possible(config_name, job, number if multirun else None, problems)
            if composed is None:
                break
            jobs.append(composed)
    return jobs, [*problems, *(_unknown_groups(config_name) if jobs else [])]


def groups() -> dict[str, list[str]]:
    """The options of each group."""
    folders = sorted(path for path in CONFIGS.iterdir() if path.is_dir() and path.name != "hydra")
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """The paths of all keys of a nested dict."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{path}{key}"
            yield from leaves(value, f"{path}{key}.")


_first: list[DictConfig] = []  # the first config of a command


@contextmanager
def _hydra() -> Iterator[None]:
    os.environ.setdefault("PATTERN_SEARCH_ROOT", str(CONFIGS.parent))
    _first.clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def _parse(overrides: list[str]) -> list[Override]:
    return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(overrides)


def _split(config_name: str, overrides: list[str], multirun: bool) -> list[list[str]]:
    """The overrides of each job of a sweep, or those of the one job.

    A sweep is what the config names in `hydra.sweeper.params`, and the command line, which wins.
    """
    if not multirun:
        return [overrides]
    parsed = _parse(overrides)
    try:
        fixed = [override.input_line for override in parsed if not override.is_sweep_override()]
        params = compose(config_name, fixed, return_hydra_config=True).hydra.sweeper.params or {}
    except Exception:  # something is wrong with an override, and will be found in the jobs
        params = {}
    named = [f"{key}={values}" for key, values in params.items()]
    return BasicSweeper.split_arguments(_parse([*named, *overrides]), None)[0]


def _compose(config_name: str, overrides: list[str], number: int | None = None, with_hydra: bool = False) -> DictConfig:
    """The config of a job; `number` is that of a job of a sweep."""
    cfg = compose(config_name, overrides, return_hydra_config=True)
    _first[:] = _first or [cfg]
    OmegaConf.copy_cache(_first[0], cfg)  # as in Hydra's sweeps: ${now:...} is the same in all jobs
    choices = cfg.hydra.runtime.choices
    OmegaConf.set_struct(cfg, False)
    if OmegaConf.is_dict(cfg.get("choices")):
        cfg.choices = {key: choices.get(key) for key in cfg.choices}
    if OmegaConf.is_interpolation(cfg, "output_dir"):  # Hydra knows it only once the job runs
        cfg.output_dir = str(_job_directory(cfg.hydra, number))
    if not with_hydra:
        del cfg["hydra"]
    return cfg


def _job_directory(hydra: DictConfig, number: int | None) -> Path:
    if number is None:
        return Path(hydra.run.dir).absolute()
    hydra.job.num = number
    return Path(hydra.sweep.dir, hydra.sweep.subdir).absolute()


def _compose_possible(
    config_name: str, overrides: list[str], number: int | None, problems: dict[str, None]
) -> Job | None:
    """Add one override after the other, group choices first, and leave out those that fail; None: nothing composes."""
    chosen = [o for o in overrides if _key(o) in groups() or "/" in _key(o)]
    values = [o for o in overrides if o not in chosen]
    try:
        cfg, defaults = (_compose(config_name, some, number) for some in (overrides, chosen))
        return Job(cfg, defaults, list(map(_key, values)))
    except Exception:  # some of it is wrong: which part?
        if _failure(problems, config_name, "", lambda: _compose(config_name, [])):
            return None
    right: list[str] = []
    for override in [*chosen, *values]:
        if not _failure(problems, config_name, override, lambda o=override: _compose(config_name, [*right, o]), right):
            right.append(override)
    cfg, defaults = (_compose(config_name, some, number) for some in (right, [o for o in right if o in chosen]))
    return Job(cfg, defaults, [_key(o) for o in right if o in values])


def _failure(
    problems: dict[str, None], config_name: str, override: str, attempt: Callable, right: Sequence[str] = ()
) -> bool:
    """Whether an attempt to add an override to those that are `right` fails; the reason is added to the problems."""
    try:
        attempt()
    except Exception as error:  # Hydra, OmegaConf, PyYAML and ANTLR each have exceptions of their own
        problems[_explain(error, config_name, override, right)] = None
        return True
    return False


def _broken_files() -> list[str]:
    """The files of configs/ that cannot be read, with the reason."""
    broken = []
    for path in sorted(CONFIGS.rglob("*.yaml")):
        try:
            OmegaConf.load(path)
        except Exception as error:  # of PyYAML or OmegaConf
            broken.append(f"configs/{path.relative_to(CONFIGS)}: {' '.join(str(error).split())}")
    return broken


def _unknown_groups(config_name: str) -> list[str]:
    """Groups without an option in the defaults list of a config that do not exist: Hydra passes over them."""
    known = [*groups(), "hydra"]
    entries = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{config_name}.yaml")).get("defaults", [])
    named = [group for entry in entries if isinstance(entry, dict) for group in entry]
    return [
        f"configs/{config_name}.yaml: {unknown(f'group {group}', group, known)}"
        for group in named
        if group.rpartition(" ")[2].strip("/").partition("/")[0] not in known
    ]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _explain(error: Exception, config_name: str, override: str, right: Sequence[str]) -> str:
    """Why an override (or, if it is empty, the files) cannot be composed, with the nearest known word."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    message, options = lines[0], groups()
    if match := re.search(r"Could not find '([^']+)/([^']+)'", str(error)):
        group, option = match[1], match[2]
        listed = str(error).partition("Available options")[2].partition("Config search path")[0]
        known = options.get(group, listed.partition(":")[2].split())
        where = re.match(r"In '([^']+)'", message)
        file = CONFIGS / f"{where[1] if where else config_name}.yaml"
        text = unknown(f"{group}={option}", option, known)
        return f"configs/{where[1]}.yaml: {text}" if where and file.exists() and where[1] != config_name else text
    if "Cannot find primary config" in str(error):
        return unknown(f"--config-name={config_name}", config_name, sorted(p.stem for p in CONFIGS.glob("*.yaml")))
    if "Ambiguous value" in message:
        return f"{override}: several values are a sweep, which needs -m; a list is written in brackets"
    if broken := _broken_files():
        return "; ".join(broken)
    if not override:
        return f"configs/{config_name}.yaml cannot be composed: {' '.join(lines)}"
    key, value = _key(override), override.partition("=")[2]
    if key in options and value in ("null", "") and "Error parsing" not in message:
        return f"{override}: a group cannot be left out; choose one of {', '.join(options[key])}"
    if "Could not override" in message or "Key '" in message or "Could not append" in message:
        if key in options or "/" in key:
            return f"{override}: {' '.join(lines)}"
        known = leaves(OmegaConf.to_container(_compose(config_name, list(right), with_hydra=key.startswith("hydra."))))
        return unknown(f"key {key}", key, [*known, *options], list_known=False)
    if message.startswith("Error parsing override"):
        near = difflib.get_close_matches(override, options, n=1)
        return f"{message}: give key=value" + (f", such as {near[0]}={options[near[0]][0]}" if near else "")
    return f"{override}: {' '.join(lines)}"
