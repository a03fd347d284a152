"""Everything that can be wrong with a command is found before anything starts.

`check_command_line` composes every job of a command, a sweep's too, and checks each: every key
against the signature it will be passed to, every value against its type, and then, by building the
data, the model and the optimizer, every size against the others. All problems are printed, each
with the key and what to do, and the program exits with code 2. No directory has been made, no W&B run begun.
"""

import difflib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from build import build_datamodule, build_task
from pattern_search_task import derivative_free

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
    choices: dict[str, str]
    output_dir: str
    allowed_packages: list[str]


class Wandb(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    entity: str | None
    project: str


def check_command_line(arguments: Sequence[str]) -> None:
    """Print every problem of a command and exit with code 2, or return if there is none.

    Args:
        arguments: the command line without the program's name.
    """
    args = get_args_parser().parse_args(arguments)
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        return
    problems: dict[str, None] = {}  # an ordered set: the jobs of a sweep share most of their problems
    try:
        jobs = list(compose_jobs(args.config_name or DEFAULT_CONFIG, args.overrides, args.multirun))
        for cfg in jobs:
            problems |= dict.fromkeys(find_problems(cfg))
    except (HydraException, OmegaConfBaseException) as error:
        problems[explain(error, args.config_name or DEFAULT_CONFIG)] = None
    if problems:
        refuse(list(problems))


def refuse(problems: list[str]) -> None:
    """Print the problems and exit with code 2."""
    print(f"This cannot run, for {len(problems)} reason{'s' * (len(problems) > 1)}:", file=sys.stderr)
    for problem in problems:
        print(f"  - {problem}", file=sys.stderr)
    sys.exit(2)


def compose_jobs(config_name: str, overrides: list[str], multirun: bool = False) -> Iterator[DictConfig]:
    """The config of each job of a command, with the keys that Hydra fills in at run time set."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    jobs = BasicSweeper.split_arguments(parsed, None)[0] if multirun else [overrides]
    os.environ.setdefault("PATTERN_SEARCH_ROOT", str(CONFIGS.parent))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for job in jobs:
            cfg = compose(config_name, job, return_hydra_config=True)
            choices = cfg.hydra.runtime.choices
            cfg.choices = {key: str(choices[key]) for key in cfg.choices}
            OmegaConf.set_struct(cfg, False)
            del cfg["hydra"]
            if "hydra:" in str(OmegaConf.to_container(cfg)["output_dir"]):
                cfg.output_dir = str(CONFIGS.parent / "runs" / "unnamed")
            yield cfg


def explain(error: Exception, config_name: str) -> str:
    """Hydra's message, with the nearest known key where a key is unknown."""
    message = str(error).strip()
    unknown = message.split("'")[1] if message.startswith("Could not override '") else None
    if unknown is None:
        return message
    known = list(leaves(OmegaConf.to_container(next(compose_jobs(config_name, [])))))
    hint = nearest(unknown, [*known, *(p.name for p in CONFIGS.iterdir() if p.is_dir())])
    return f"{unknown} is not a key of the config{hint}"


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """The paths of all keys of a nested dict."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{path}{key}"
            yield from leaves(value, f"{path}{key}.")


def nearest(word: str, known: Sequence[str]) -> str:
    """A hint such as "; did you mean model.d_model?", or nothing if no known word is near."""
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.6)
    if not near:  # perhaps the right key of the wrong node
        near = [k for k in known if k.rpartition(".")[2] == word.rpartition(".")[2]][:2]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def find_problems(cfg: DictConfig) -> list[str]:
    """What is wrong with one job's config: one message each, with the key and what to do."""
    try:
        container = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        return [str(error).splitlines()[0]]
    problems = list(validate(Root, container, "", list(container)))
    for path, node in targets(container):
        problems += check_node(path, node, container["allowed_packages"])
    problems += check_machine(container)
    return problems or check_by_building(cfg, container)


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    """Every node that will be instantiated, with its path."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else key)


def check_node(path: str, node: dict, allowed_packages: list[str]) -> Iterator[str]:
    """Problems of one `_target_` node: its target, its keys and the types of its values."""
    package = str(node["_target_"]).partition(".")[0]
    allowed = BUILT_IN_PACKAGES | set(allowed_packages)
    if package not in allowed:
        yield f"{path}._target_={node['_target_']}: package {package} is not allowed; add it to allowed_packages"
        return
    module, _, name = str(node["_target_"]).rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        yield f"{path}._target_={node['_target_']} cannot be imported: {error}"
        return
    yield from validate(arguments_model(target), {k: v for k, v in node.items() if not is_instruction(k)}, path)


def is_instruction(key: str) -> bool:
    return key in ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


def arguments_model(target: Callable) -> type[BaseModel]:
    """A pydantic model of a callable's arguments: names, types, and whether further ones are taken."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):  # annotations that only a type checker can resolve
        hints = {}
    fields, extra = {}, "forbid"
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind == parameter.VAR_KEYWORD:
            extra = "allow"
        elif parameter.kind != parameter.VAR_POSITIONAL and not name.startswith("_"):
            required = parameter.default is parameter.empty and name not in INJECTED
            hint = hints.get(name, Any)
            fields[name] = (hint, ...) if required else (hint | None if name in INJECTED else hint, None)
    config = ConfigDict(extra=extra, arbitrary_types_allowed=True, protected_namespaces=())
    try:
        return create_model("Arguments", __config__=config, **fields)
    except Exception:  # pydantic knows no schema for some annotation of a library: check the names only
        return create_model(
            "Arguments", __config__=config, **{name: (Any, default) for name, (_, default) in fields.items()}
        )


def validate(model: type[BaseModel], values: dict, path: str, known: list[str] | None = None) -> Iterator[str]:
    """Problems of `values` under a pydantic model; nested `_target_` nodes are checked on their own."""
    plain = {k: v for k, v in values.items() if not (isinstance(v, dict) and "_target_" in v)}
    nested = values.keys() - plain.keys()
    try:
        model.model_validate_json(json.dumps(plain), strict=True)  # as JSON: a list may stand for a tuple, as in YAML
    except ValidationError as error:
        seen = set()
        for problem in error.errors():
            key = str(problem["loc"][0]) if problem["loc"] else ""
            if key in nested or key in seen:
                continue
            seen.add(key)
            full = ".".join([path, *map(str, problem["loc"][:1])]) if path else ".".join(map(str, problem["loc"]))
            known = known or [f"{path}.{name}" if path else name for name in model.model_fields]
            if problem["type"] == "extra_forbidden":
                known = [f"{path}.{name}" if path else name for name in model.model_fields]
                yield f"{full} is not a known key{nearest(full, known)}"
            elif problem["type"] == "missing":
                yield f"{full} is missing"
            else:
                annotation = model.model_fields[key].annotation if key in model.model_fields else None
                wanted = getattr(annotation, "__name__", str(annotation)).replace("NoneType", "null")
                yield f"{full}={problem['input'] if len(problem['loc']) == 1 else values.get(key)}: expected {wanted}"


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
    """The W&B key from WANDB_API_KEY or ~/.netrc, without asking for it."""
    import wandb  # only here: it takes a second to import, and most checks do not need it

    return os.environ.get("WANDB_API_KEY") or (wandb.Api.default_entity and wandb.api.api_key)


_built: dict[str, list[str]] = {}  # the jobs of a sweep often share their data and model


def check_by_building(cfg: DictConfig, container: dict) -> list[str]:
    """Build data, model and optimizer: their constructors refuse what does not fit together."""
    parts = {name: container[name] for name in ("datamodule", "model", "task", "optimizer", "trainer")}
    return _built.setdefault(json.dumps(parts, sort_keys=True, default=str), list(_build(cfg)))


def _build(cfg: DictConfig) -> Iterator[str]:
    try:
        task = build_task(cfg, build_datamodule(cfg))
        task.configure_optimizers()
        if derivative_free(task.make_optimizer) and "mixed" in str(cfg.trainer.get("precision")):
            yield f"trainer.precision={cfg.trainer.precision} hides the closure from a search; use 32-true or 64-true"
    except Exception as error:  # whatever a constructor refuses, the user gets the reason and not a traceback
        cause = error
        while cause.__cause__ is not None and type(cause).__module__.startswith("hydra"):
            cause = cause.__cause__  # Hydra wraps what a constructor raised
        yield str(cause)
