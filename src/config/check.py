"""Everything that can be wrong with a command is found before anything starts.

`check_command_line` checks every job of a command, a sweep's too: every key
against the signature it will be passed to, every value against its type, and then, by building the
data, the model, the optimizer and the trainer, every value against its range and against the others.
What is wrong is put back to its default, so that one mistake hides no other. All problems are printed,
each with the key and what to do, and the program exits with code 2. No directory has been made, no W&B run begun.
"""

import importlib
import inspect
import json
import netrc
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model

from config.build_check import check_by_building
from config.composition import CONFIGS, Command, Job, compose_possible, leaves
from config.did_you_mean import nearest, unknown
from config.draft import INSTRUCTIONS, Draft, dig, shown
from config.refusal import refuse
from data.sequences import SequenceDataModule
from pattern_search_task import PatternSearchTask
from run.resume import hydra_arguments, plan

BUILT_IN_PACKAGES = {
    "torch",
    "lightning",
    "torchmetrics",
    "wandb",
    *(p.stem for p in (CONFIGS.parent / "src").iterdir()),
}
FILLED_IN = {  # arguments that the program gives itself
    "model": ("vocab_size", "n_classes"),
    "task": ("model", "optimizer"),
    "optimizer": ("params",),
    "trainer": ("logger", "callbacks", "default_root_dir"),
}
PASSED_ON = {  # where a callable takes further arguments, what it passes them to
    "run.wandb_logger.WandbRun": "wandb.init",
    "lightning.pytorch.loggers.WandbLogger": "wandb.init",
    "lightning.pytorch.loggers.TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter",
}
KINDS = {
    "task": PatternSearchTask,
    "datamodule": SequenceDataModule,
    "model": torch.nn.Module,
    "optimizer": torch.optim.Optimizer,
    "trainer": L.Trainer,
    "logger": Logger,
    "callbacks": L.Callback,
}


class Wandb(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    entity: str | None
    project: str


class Choices(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    task: str | None
    model: str | None
    optimizer: str | None
    experiment: str | None
    variant: str | None


class Checkpoint(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    every_seconds: float | None = Field(ge=0)
    every_steps: int | None = Field(ge=1)


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
    wandb: Wandb
    resume: str | None
    checkpoint: Checkpoint
    choices: Choices
    output_dir: str
    allowed_packages: list[str]


def check_command_line(command: Command) -> list[str]:
    """Print every problem of a command and exit with code 2, or return the arguments to run with if there is none.

    What is returned are those of the command, but for the directory of a run that resumes another one.
    """
    if problems := [*command.problems, *check_jobs(command.jobs)]:
        refuse(problems)
    run_dirs, problems = plan([job.cfg for job in command.jobs], command.overrides, command.multirun)
    if problems:
        refuse(problems)
    if command.multirun or not command.jobs[0].cfg.resume:
        return command.arguments
    return hydra_arguments(run_dirs[0], command.arguments)


def check_command(config_name: str, overrides: Sequence[str], multirun: bool = False) -> list[str]:
    """All problems of a command, each once: what cannot be composed, what cannot run, what nothing would read."""
    jobs, problems = compose_possible(config_name, list(overrides), multirun)
    return [*problems, *check_jobs(jobs)]


def check_jobs(jobs: Sequence[Job]) -> list[str]:
    """All problems of the jobs of a command, each once: what cannot run, what nothing would read."""
    found: dict[str, None] = {}
    unread: dict[str, list[str | None]] = {}  # for each key that the command gives, by job: why nothing reads it
    for job in jobs:
        draft = check(job)
        found |= dict.fromkeys(draft.problems.values())
        for key in job.given:
            unread.setdefault(key, []).append(draft.unread.get(key))
    return [*found, *(reasons[0] for reasons in unread.values() if all(reasons))]


_checked: dict[str, Draft] = {}  # the jobs of a sweep are often the same but for names


def check(job: Job) -> Draft:
    """Everything that can be said about one job."""
    draft = Draft(job)
    nodes = [{k: v for k, v in raw.items() if k != "output_dir"} for raw in (draft.raw, draft.defaults)]
    key = json.dumps(nodes, sort_keys=True, default=str)
    if key not in _checked:
        check_text(draft)
        check_machine(draft)
        check_by_building(draft)
        _checked[key] = draft
    return _checked[key]


# --- the text of the config: interpolations, keys, types ---


def check_text(draft: Draft) -> None:
    """All that can be said without building anything."""
    check_nodes(draft)
    check_interpolations(draft)
    check_root(draft)
    for path in list(targets(draft.raw)):
        check_node(draft, path)


def check_nodes(draft: Draft) -> None:
    """The nodes that everything else lies in must be there."""
    for name in (*KINDS, "wandb", "choices"):
        node = draft.raw.get(name, ...)
        if not isinstance(node, dict):
            missing = f"{name} is missing, and cannot be left out"
            draft.note(name, missing if node is ... else f"{name}={shown(node)}: expected keys below it, not a value")
            if not isinstance(draft.raw.get(name), dict):
                draft.raw[name] = {}


def check_interpolations(draft: Draft) -> None:
    """Values that point to keys which do not exist, and values that must be given."""
    cfg, known, found = draft.cfg, list(leaves(draft.raw)), {}
    for key in known:
        path, _, name = key.rpartition(".")
        if isinstance(dig(draft.raw, key), dict):
            continue
        try:
            value = (OmegaConf.select(cfg, path) if path else cfg)[name]
            if OmegaConf.is_config(value):
                OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            source = draft.written(key)
            if source.partition(".")[0] in draft.problems or source in Root.model_fields:  # reported as missing itself
                draft.reset(key)
                continue
            found[key] = f"{key}={shown(dig(draft.raw, key))}: {' '.join(str(error).splitlines()[0].split())}"
            if match := re.search(r"Interpolation key '([^']+)' not found", str(error)):
                near = nearest(match[1], known)
                found[key] += f"; did you mean ${{{near}}}?" if near else ""
    report(draft, found)


def report(draft: Draft, found: dict[str, str]) -> None:
    """Note problems; a value taken from another key is reported where it was written, if it is wrong there too."""
    written = {key: draft.written(key) for key in found}
    for key, problem in found.items():
        if written[key] == key or written[key] not in found:
            draft.note(key, problem)


def check_root(draft: Draft) -> None:
    """The keys that are passed to no callable."""
    report(draft, dict(validate(Root, OmegaConf.to_container(draft.cfg, resolve=True), "")))
    for name in KINDS:
        node = draft.raw[name]
        if name == "callbacks":
            for callback, options in list(node.items()):
                if not isinstance(options, dict) or not options:
                    draft.note(f"callbacks.{callback}", f"callbacks.{callback}={shown(options)}: expected a _target_")
                    if not draft.raw["callbacks"].get(callback):
                        draft.raw["callbacks"].pop(callback, None)
                elif "_target_" not in options:
                    missing_target(draft, f"callbacks.{callback}")
                    draft.raw["callbacks"].pop(callback)
        elif "_target_" not in node and (node or name != "logger") and name not in draft.problems:
            missing_target(draft, name)


def missing_target(draft: Draft, path: str) -> None:
    near = nearest("_target_", [key for key in dig(draft.raw, path) if key not in INSTRUCTIONS])
    given = ", ".join(f"{path}.{key}" for key in dig(draft.raw, path))
    hint = f"; did you mean it by {path}.{near}?" if near else f", the class to build (given: {given or 'nothing'})"
    draft.note(f"{path}._target_", f"{path}._target_ is missing{hint}")


def targets(node: Any, path: str = "") -> Iterator[str]:
    """The path of every node that will be instantiated."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else key)


def check_node(draft: Draft, path: str) -> None:
    """One `_target_` node: its target, its keys and the types of its values."""
    target = find_target(draft, path)
    if target is None:
        draft.reset(f"{path}._target_")
        target = find_target(draft, path)
        if target is None:
            if path.startswith("callbacks."):  # the others can be built without it
                draft.raw["callbacks"].pop(path.split(".")[1], None)
            return
    node = draft.get(path)
    partial = node.get("_partial_", False)
    if partial is not (path == "optimizer"):  # only the optimizer waits for something: the weights
        rule = "must be true: the weights are passed later" if path == "optimizer" else "must be false, or left out"
        draft.note(f"{path}._partial_", f"{path}._partial_={shown(partial)}: {rule}")
        if path == "optimizer":
            draft.raw[path]["_partial_"] = True
    filled_in = FILLED_IN.get(path, ())
    for name in node.keys() & set(filled_in):
        draft.note(f"{path}.{name}", f"{path}.{name} is filled in by the program and cannot be set")
    arguments = {key: value for key, value in draft.get(path).items() if key not in INSTRUCTIONS}
    model = arguments_model(target, filled_in, PASSED_ON.get(node["_target_"]) if extra(target, arguments) else None)
    report(draft, dict(validate(model, arguments, path)))


def find_target(draft: Draft, path: str) -> Callable | None:
    """The class that a node names; None, with a problem noted, if it is not allowed, not there or of another kind."""
    name = draft.get(f"{path}._target_")
    if name is None:
        missing_target(draft, path)
        return None
    key, text = f"{path}._target_", f"{path}._target_={name}"
    package = str(name).partition(".")[0]
    allowed = BUILT_IN_PACKAGES | set(draft.get("allowed_packages") or [])
    if package not in allowed:
        near = nearest(package, allowed)
        hint = f"; did you mean {near}?" if near else "; add it to allowed_packages"
        draft.problems.setdefault(key, f"{text}: package {package} is not allowed{hint}")
        return None
    module, _, attribute = str(name).rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        draft.problems.setdefault(key, f"{text} cannot be imported: {error}")
        return None
    kind = KINDS.get(path.partition(".")[0])
    if not callable(target) or (isinstance(target, type) and kind and not issubclass(target, kind) and at_top(path)):
        draft.problems.setdefault(key, f"{text} is not a {kind.__name__ if kind else 'callable'}")
        return None
    return target


def at_top(path: str) -> bool:
    return path.count(".") == path.startswith("callbacks.")


def extra(target: Callable, arguments: dict) -> bool:
    """Whether some arguments are not in the signature of the target."""
    try:
        return bool(arguments.keys() - inspect.signature(target).parameters.keys())
    except ValueError:  # some classes written in C have no signature
        return False


def arguments_model(target: Callable, filled_in: Sequence[str] = (), passed_on: str | None = None) -> type[BaseModel]:
    """A pydantic model of a callable's arguments: names, types, and whether further ones are taken.

    Args:
        target: the callable.
        filled_in: arguments that the config does not give.
        passed_on: a callable to which further arguments are passed on, by its dotted name.
    """
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:
        return create_model("Arguments", __config__=ConfigDict(extra="allow"))
    fields, further = {}, "forbid"
    for name, parameter in parameters.items():
        if parameter.kind == parameter.VAR_KEYWORD and passed_on:
            module, _, attribute = passed_on.rpartition(".")
            accepted = arguments_model(getattr(importlib.import_module(module), attribute)).model_fields
            fields = {n: (field.annotation, None) for n, field in accepted.items()} | fields
        elif parameter.kind == parameter.VAR_KEYWORD:
            further = "allow"
        elif parameter.kind != parameter.VAR_POSITIONAL and not name.startswith("_") and name not in filled_in:
            required = (
                parameter.default is parameter.empty and name != "max_len"
            )  # run/build.py knows the longest input
            hint = type_of(parameter, target)
            fields[name] = (hint if name != "max_len" else hint | None, ... if required else None)
    return create_model("Arguments", __config__=ConfigDict(extra=further, arbitrary_types_allowed=True), **fields)


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
            if name in nested:
                continue
            inner = [str(part) for part in problem["loc"][1:] if isinstance(values.get(name), dict)]
            key = ".".join([*([path] if path else []), name, *inner])
            if problem["type"] == "extra_forbidden":
                fields = (model.model_fields[name].annotation if inner else model).model_fields
                parent = key.rpartition(".")[0]
                known = [f"{parent}.{field}".lstrip(".") for field in fields]
                yield key, unknown(f"key {key}", key, known, list_known=False)
            elif problem["type"] == "missing":
                yield key, f"{key} is missing, and cannot be left out"
            else:
                annotation = model.model_fields[name].annotation
                if inner and isinstance(annotation, type) and issubclass(annotation, BaseModel):
                    annotation = annotation.model_fields[inner[0]].annotation
                wanted = annotation.__name__ if isinstance(annotation, type) else str(annotation)
                wanted = re.sub(r"NoneType|None", "null", re.sub(r"typing\.|[a-z_.]+\.(?=[A-Z])", "", wanted))
                rule = problem["msg"].removeprefix("Input should be ")
                value = shown(dig(values, ".".join([name, *inner])))
                yield key, f"{key}={value}: expected {wanted}" + (f", {rule}" if "than" in rule else "")


# --- the machine ---


def check_machine(draft: Draft) -> None:
    """What the config asks of the machine or of Lightning and cannot get."""
    accelerator = draft.get("trainer.accelerator")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        text = f"trainer.accelerator={accelerator}: this machine has no CUDA GPU; use trainer.accelerator=cpu"
        draft.note("trainer.accelerator", text)
        draft.raw["trainer"]["accelerator"] = "cpu"
    if draft.get("trainer.fast_dev_run"):
        text = "Lightning would take loggers and checkpoints away; use trainer.max_steps=1 trainer.limit_val_batches=1"
        draft.note("trainer.fast_dev_run", f"trainer.fast_dev_run={draft.get('trainer.fast_dev_run')}: {text}")
        draft.raw["trainer"]["fast_dev_run"] = False
    if draft.get("logger.offline") is not False:
        return
    later = "or use logger.offline=True and upload later"
    if not wandb_key():
        account = "no W&B account is set up on this machine; run `wandb login`, or set WANDB_API_KEY, "
        draft.note("logger.offline", f"logger.offline=False: {account}{later}")
    elif problem := wandb_out_of_reach():
        draft.note("logger.offline", f"logger.offline=False: {problem}; connect this machine, {later}")


def wandb_key() -> str | None:
    """The W&B key from WANDB_API_KEY or from the netrc file that `wandb login` writes, without asking for it."""
    try:
        file = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return os.environ.get("WANDB_API_KEY")
    login = file.authenticators("api.wandb.ai")
    return os.environ.get("WANDB_API_KEY") or (login and login[2])


def wandb_out_of_reach(seconds: float = 5) -> str | None:
    """Why the W&B server does not answer; None if it does, whatever it answers."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        urllib.request.urlopen(server, timeout=seconds).close()
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return f"W&B cannot be reached at {server} ({getattr(error, 'reason', error)})"
    return None
