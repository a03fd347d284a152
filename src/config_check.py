"""Everything that can be wrong with a command is found before anything starts.

`check_command_line` composes every job of a command, a sweep's too, and checks each: every key
against the signature it will be passed to, every value against its type, and then, by building the
data, the model and the optimizer, every size against the others. All problems are printed, each
with the key and what to do, and the program exits with code 2. No directory has been made, no W&B run begun.
"""

import importlib
import inspect
import json
import netrc
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model

from build import build_datamodule, build_task
from did_you_mean import unknown
from pattern_search_task import derivative_free
from resume import hydra_arguments, plan

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULT_CONFIG = "pattern_search_train"
BUILT_IN_PACKAGES = {
    "torch",
    "lightning",
    "torchmetrics",
    "wandb",
    *(p.stem for p in Path(__file__).parent.glob("*.py")),
}
INJECTED = {"vocab_size", "n_classes", "max_len", "model", "optimizer", "params"}  # filled in by build.py


class Root(BaseModel):
    """The keys of the config that are not passed to a callable."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seed: int = Field(ge=0, lt=2**32)
    task: dict
    datamodule: dict
    model: dict
    optimizer: dict
    trainer: dict
    logger: dict
    callbacks: dict
    wandb: "Wandb"
    resume: str | None
    checkpoint: "Checkpoint"
    choices: dict[str, str | None]
    output_dir: str
    allowed_packages: list[str]


class Wandb(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    entity: str | None
    project: str


class Checkpoint(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    every_seconds: float | None = Field(ge=0)
    every_steps: int | None = Field(ge=1)


def check_command_line(arguments: Sequence[str]) -> list[str]:
    """Print every problem of a command and exit with code 2, or return the arguments to run with if there is none.

    Args:
        arguments: the command line without the program's name. What is returned is the same, but for the directory
            of a run that resumes another one.
    """
    args = get_args_parser().parse_args(arguments)
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        return list(arguments)
    problems: dict[str, None] = {}  # an ordered set: the jobs of a sweep share most of their problems
    try:
        for cfg in compose_jobs(args.config_name or DEFAULT_CONFIG, args.overrides, args.multirun):
            found = find_problems(cfg)
            if not found:
                run_dir, found = plan(cfg, args.overrides, args.multirun)
            problems |= dict.fromkeys(found)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        problems[explain(error, args.config_name or DEFAULT_CONFIG, args.overrides)] = None
    if problems:
        refuse(list(problems))
    return hydra_arguments(run_dir, arguments) if cfg.resume and not args.multirun else list(arguments)


def refuse(problems: list[str]) -> None:
    """Print the problems and exit with code 2."""
    print(f"This cannot run, for {len(problems)} reason{'s' * (len(problems) > 1)}:", file=sys.stderr)
    for problem in problems:
        print(f"  - {problem}", file=sys.stderr)
    sys.exit(2)


def compose_jobs(config_name: str, overrides: list[str], multirun: bool = False) -> list[DictConfig]:
    """The config of each job of a command, with the keys that Hydra fills in at run time set."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    jobs = BasicSweeper.split_arguments(parsed, None)[0] if multirun else [overrides]
    os.environ.setdefault("PATTERN_SEARCH_ROOT", str(CONFIGS.parent))
    configs = []
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for number, job in enumerate(jobs):
            cfg = compose(config_name, job, return_hydra_config=True)
            choices = cfg.hydra.runtime.choices
            cfg.choices = {key: choices.get(key) for key in cfg.choices}
            OmegaConf.set_struct(cfg, False)
            if OmegaConf.is_interpolation(cfg, "output_dir"):
                cfg.output_dir = str(job_directory(cfg.hydra, number if multirun else None))
            del cfg["hydra"]
            configs.append(cfg)
    return configs


def job_directory(hydra: DictConfig, number: int | None) -> Path:
    """Where Hydra will run a job; `number` is that of a job of a sweep."""
    if number is None:
        return Path(hydra.run.dir).absolute()
    hydra.job.num = number
    return Path(hydra.sweep.dir, hydra.sweep.subdir).absolute()


def explain(error: Exception, config_name: str, overrides: Sequence[str] = ()) -> str:
    """Hydra's message in one line, with the nearest known word where a key or an option is unknown."""
    message = str(error).strip()
    groups = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name != "hydra")
    options = {group: sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")) for group in groups}
    if match := re.search(r"Could not override '([^']+)'", message):
        chosen = [o for o in overrides if o.partition("=")[0] in groups and "," not in o]
        known = leaves(OmegaConf.to_container(compose_jobs(config_name, chosen)[0]))
        return unknown(f"key {match[1]}", match[1], [*known, *groups], list_known=False)
    if (match := re.search(r"Could not find '([^']+)/([^']+)'", message)) and match[1] in options:
        return unknown(f"{match[1]}={match[2]}", match[2], options[match[1]])
    if "Cannot find primary config" in message:
        return unknown(f"--config-name={config_name}", config_name, sorted(p.stem for p in CONFIGS.glob("*.yaml")))
    for override in overrides:  # groups that were set to null, or removed
        group = override.lstrip("~").removesuffix("=null")
        if group in groups and override != group:
            return f"{override}: a group cannot be left out; choose one of {', '.join(options[group])}"
    return message.splitlines()[0] + (": give key=value" if message.startswith("Error parsing override") else "")


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """The paths of all keys of a nested dict."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{path}{key}"
            yield from leaves(value, f"{path}{key}.")


def find_problems(cfg: DictConfig) -> list[str]:
    """What is wrong with one job's config: one message each, with the key and what to do."""
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        return [str(error).splitlines()[0]]
    found = dict(validate(Root, container, ""))
    for path, node in targets(container):
        found |= dict(check_node(path, node, container.get("allowed_packages") or []))
    # a value taken from another key is reported where it was written, unless it only fails where it arrives
    written = {key: text for key, text in found.items() if not is_interpolation(cfg, key)}
    problems = list((written or found).values())
    if not any(text.endswith("cannot be left out") for text in problems):
        problems += check_machine(container)
    return problems or check_by_building(cfg, container)


def is_interpolation(cfg: DictConfig, key: str) -> bool:
    node, _, name = key.rpartition(".")
    parent = OmegaConf.select(cfg, node) if node else cfg
    return OmegaConf.is_dict(parent) and OmegaConf.is_interpolation(parent, name)


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    """Every node that will be instantiated, with its path."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else key)


def check_node(path: str, node: dict, allowed_packages: list[str]) -> Iterator[tuple[str, str]]:
    """Problems of one `_target_` node: its target, its keys and the types of its values."""
    package = str(node["_target_"]).partition(".")[0]
    allowed = BUILT_IN_PACKAGES | set(allowed_packages)
    if package not in allowed:
        text = f"{path}._target_={node['_target_']}: package {package} is not allowed; add it to allowed_packages"
        yield f"{path}._target_", text
        return
    module, _, name = str(node["_target_"]).rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        yield f"{path}._target_", f"{path}._target_={node['_target_']} cannot be imported: {error}"
        return
    yield from validate(arguments_model(target), {k: v for k, v in node.items() if not is_instruction(k)}, path)


def is_instruction(key: str) -> bool:
    return key in ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


def arguments_model(target: Callable) -> type[BaseModel]:
    """A pydantic model of a callable's arguments: names, types, and whether further ones are taken."""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some classes written in C have no signature
        return create_model("Arguments", __config__=ConfigDict(extra="allow"))
    fields, extra = {}, "forbid"
    for name, parameter in parameters.items():
        if parameter.kind == parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.kind != parameter.VAR_POSITIONAL and not name.startswith("_"):
            hint = type_of(parameter, target)
            if name in INJECTED:
                fields[name] = (hint | None, None)
            else:
                fields[name] = (hint, ... if parameter.default is parameter.empty else None)
    return create_model("Arguments", __config__=ConfigDict(extra=extra, arbitrary_types_allowed=True), **fields)


def type_of(parameter: inspect.Parameter, target: Callable) -> Any:
    """The annotation of a parameter, or Any where it is missing or cannot be checked."""
    hint = parameter.annotation
    if hint is parameter.empty:
        return Any
    try:
        if isinstance(hint, str):
            hint = eval(hint, vars(sys.modules[target.__module__]))
        probe = create_model("Probe", __config__=ConfigDict(arbitrary_types_allowed=True), value=(hint, ...))
        probe.model_rebuild(force=True)
    except (NameError, TypeError, PydanticUserError):  # a name that only type checkers import, or no checkable type
        return Any
    return hint


def validate(model: type[BaseModel], values: dict, path: str) -> Iterator[tuple[str, str]]:
    """Problems of `values` under a pydantic model, as (key, message); `_target_` nodes inside are checked apart."""
    plain = {k: v for k, v in values.items() if not (isinstance(v, dict) and "_target_" in v)}
    nested = values.keys() - plain.keys()
    try:
        # as JSON, in which a list may stand for a tuple, as it does in YAML
        model.model_validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0])
            key = f"{path}.{name}" if path else name
            if name in nested:
                continue
            if problem["type"] == "extra_forbidden":
                where = ".".join([path, *map(str, problem["loc"])]).lstrip(".")
                known = [f"{path}.{field}".lstrip(".") for field in model.model_fields]
                yield key, unknown(f"key {where}", where, known, list_known=False)
            elif problem["type"] == "missing" and len(problem["loc"]) == 1:
                yield key, f"{key} is missing, and cannot be left out"
            elif name in model.model_fields:
                annotation = model.model_fields[name].annotation
                if (
                    isinstance(values[name], dict)
                    and isinstance(annotation, type)
                    and issubclass(annotation, BaseModel)
                ):
                    yield from validate(annotation, values[name], key)
                    continue
                wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation)
                wanted = re.sub(r"NoneType|None", "null", re.sub(r"typing\.|[a-z_.]+\.(?=[A-Z])", "", wanted))
                rule = problem["msg"].removeprefix("Input should be ")
                yield key, f"{key}={values[name]}: expected {wanted}" + (f", {rule}" if "than" in rule else "")


def check_machine(container: dict) -> Iterator[str]:
    """What the config asks of the machine or of Lightning, and cannot get."""
    trainer, logger = container["trainer"], container["logger"]
    if trainer.get("accelerator") in ("gpu", "cuda") and not torch.cuda.is_available():
        yield f"trainer.accelerator={trainer['accelerator']}: this machine has no CUDA GPU; use trainer.accelerator=cpu"
    if logger.get("offline") is False and not wandb_key():
        yield (
            "logger.offline=False: no W&B account is set up on this machine; run `wandb login`, or set "
            "WANDB_API_KEY, or use logger.offline=True and upload later"
        )


def wandb_key() -> str | None:
    """The W&B key from WANDB_API_KEY or from the netrc file that `wandb login` writes, without asking for it."""
    try:
        file = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return os.environ.get("WANDB_API_KEY")
    login = file.authenticators("api.wandb.ai")
    return os.environ.get("WANDB_API_KEY") or (login and login[2])


_built: dict[str, list[str]] = {}  # the jobs of a sweep often share their data and model


def check_by_building(cfg: DictConfig, container: dict) -> list[str]:
    """Build data, model and optimizer: their constructors refuse what does not fit together."""
    parts = {name: container[name] for name in ("datamodule", "model", "task", "optimizer", "trainer")}
    key = json.dumps(parts, sort_keys=True, default=str)
    if key not in _built:
        _built[key] = list(_build(cfg))
    return _built[key]


def _build(cfg: DictConfig) -> Iterator[str]:
    part = ""
    try:
        task = build_task(cfg, build_datamodule(cfg))
        part = "optimizer: "  # torch's optimizers do not name the config's key
        task.configure_optimizers()
        if derivative_free(task.make_optimizer) and "mixed" in str(cfg.trainer.get("precision")):
            yield f"trainer.precision={cfg.trainer.precision} hides the closure from a search; use 32-true or 64-true"
    except Exception as error:  # whatever a constructor refuses, the user gets the reason and not a traceback
        cause = error
        while cause.__cause__ is not None and type(cause).__module__.startswith("hydra"):
            cause = cause.__cause__  # Hydra wraps what a constructor raised
        yield f"{part}{cause}"
