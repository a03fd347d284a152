"""The text of a config: its keys, and the types of their values, without building anything.

Nothing heavy is imported before the keys that no class gets are right, which takes a second.
"""

import importlib
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError

from config.compose import by_key, shown
from config.did_you_mean import nearest
from run.resume import missing_run

SRC = Path(__file__).parents[1]
BUILT_IN_PACKAGES = ["torch", "lightning", "torchmetrics", "wandb", *(path.stem for path in SRC.iterdir())]
INSTRUCTIONS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")  # Hydra's own keys of a node
BUILT = {  # the kind of what is built from each node, with arguments that the program gives
    "task": ("pattern_search_task.PatternSearchTask", ["model", "optimizer"]),
    "datamodule": ("data.sequences.SequenceDataModule", []),
    "model": ("torch.nn.Module", ["vocab_size", "n_classes"]),
    "optimizer": ("torch.optim.Optimizer", ["params"]),
    "trainer": ("lightning.Trainer", ["logger", "callbacks", "default_root_dir"]),
    "logger": ("lightning.pytorch.loggers.Logger", []),
    "callbacks": ("lightning.Callback", []),  # from each node in it
}
PASSED_ON = {  # what a class, or one that is derived from it, passes further arguments to
    "LossOnlyOptimizer": "search.base.LossOnlyOptimizer",
    "WandbLogger": "wandb.init",
    "TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter",
}
PLAIN: dict[str, dict[str, Any]] = {  # the types of keys that are passed to no class, by node
    "": {
        "seed": Annotated[int, Field(ge=0, lt=2**32)],
        "resume": str | None,
        "picture": bool,
        "output_dir": str,
        "allowed_packages": list[str],
        **dict.fromkeys([*BUILT, "wandb", "checkpoint", "choices"], dict),
    },
    "wandb": {"entity": str | None, "project": str},
    "checkpoint": {
        "every_seconds": Annotated[float, Field(ge=0)] | None,
        "every_steps": Annotated[int, Field(ge=1)] | None,
    },
    "choices": dict.fromkeys(("task", "model", "optimizer", "experiment", "variant"), str | None),
}

Problems = Iterator[tuple[str, str]]  # pairs of a key and what is wrong with it


def text_problems(cfg: DictConfig) -> list[str]:
    """What is wrong with the keys and types of a config: what its values refer to, plain keys, or else its nodes."""
    raw = by_key(OmegaConf.to_container(cfg))
    try:
        values = by_key(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        return [f"{key}={shown(raw.get(key))}: {str(error).splitlines()[0]}"]
    found: list[tuple[str, str]] = []
    for path in PLAIN:
        if isinstance(node := values.get(path), dict):
            found += mismatches(path, node, PLAIN[path], needed=PLAIN[path])
    found = found or [("resume", problem) for problem in missing_run(cfg)]
    if not found:  # torch is imported from here on
        nodes = {name: values[name] for name in BUILT if values[name] or name != "logger"}
        nodes |= {f"callbacks.{name}": node for name, node in nodes.pop("callbacks").items()}
        for path, node in nodes.items():
            found += node_problems(path, node, *BUILT[path.partition(".")[0]], values["allowed_packages"])
    taken = {f"${{{key}}}" for key, _ in found}  # what is taken from a wrong value is not told again
    return [problem for key, problem in found if str(raw.get(key)) not in taken]


def mismatches(
    path: str, values: Mapping[str, Any], types: Mapping[str, Any], needed: Collection[str], further: bool = False
) -> Problems:
    """Keys of a node that are missing, or not known unless `further` are taken, and values of another type."""
    for name in dict.fromkeys([*values, *needed]):
        key = f"{path}.{name}".lstrip(".")
        if name not in values:
            yield key, f"{key} is missing, and cannot be left out"
        elif name in types:
            if rule := broken_rule(types[name], values[name]):
                yield key, f"{key}={shown(values[name])} must be {rule}"
        elif not further:
            near = nearest(key, [f"{path}.{name}".lstrip(".") for name in types])
            yield key, f"key {key} is not known" + (f"; did you mean {near}?" if near else ".")


def broken_rule(hint: Any, value: Any) -> str:
    """What a value should be, if its type is another one."""
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
        # as JSON, in which a list may stand for a tuple, as it does in YAML
        adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        problems = [found for found in error.errors() if found["type"] != "needs_python_object"]  # which no YAML has
        rules = [problem["msg"].removeprefix("Input should be ") for problem in problems or error.errors()]
        return " or ".join(dict.fromkeys(rules))
    except (PydanticUserError, NameError):  # an annotation that cannot be checked
        pass
    return ""


def node_problems(
    path: str, node: Any, kind: str = "builtins.object", filled_in: Collection[str] = (), allowed: Collection[str] = ()
) -> Problems:
    """What is wrong with a node that is built: its class, its keys, their types, and the nodes in it.

    Args:
        path: of the node.
        node: its values, without interpolations.
        kind: the name of the class that its own must be derived from.
        filled_in: arguments that the program gives.
        allowed: packages beside the built-in ones.
    """
    key = f"{path}._target_"
    if not isinstance(node, dict) or "_target_" not in node:
        yield key, f"{key} is missing, the class to build (given: {', '.join([*by_key(node, path)][1:])})"
        return
    values = {name: value for name, value in node.items() if name not in INSTRUCTIONS}
    try:
        target = find(str(node["_target_"]), kind, allowed)
        types, needed, further = arguments(target, values)
    except (ImportError, AttributeError, ValueError) as error:
        yield key, f"{key}={node['_target_']} cannot be used: {error}"
        return
    if node.get("_partial_", False) is not (path == "optimizer"):
        key = f"{path}._partial_"
        yield key, f"{key} must be {shown(path == 'optimizer')}: only the optimizer waits, for the weights"
    for name in values.keys() & filled_in:
        yield f"{path}.{name}", f"{path}.{name} is filled in by the program and cannot be set"
    for name, value in values.items():
        if isinstance(value, dict) and "_target_" in value:
            yield from node_problems(f"{path}.{name}", value, allowed=allowed)
            types[name] = Any
    yield from mismatches(path, values, types | dict.fromkeys(filled_in, Any), needed - {*filled_in}, further)


def find(name: str, kind: str = "builtins.object", allowed: Collection[str] = ()) -> Callable:
    """The class of a dotted name.

    Raises:
        ImportError, AttributeError, ValueError: it is not there, not allowed, or of another kind.
    """
    package, (module, _, attribute) = name.partition(".")[0], name.rpartition(".")
    known = [*BUILT_IN_PACKAGES, *allowed]
    if package not in known:
        defined = rf"(?m)^class {re.escape(attribute)}\b"
        homes = [path.relative_to(SRC) for path in SRC.rglob("*.py") if re.search(defined, path.read_text())]
        near = ".".join([*homes[0].with_suffix("").parts, attribute]) if homes else nearest(package, known)
        hint = f"did you mean {near}?" if near else "add it to allowed_packages"
        raise ValueError(f"package {package} is not allowed; {hint}")
    target = getattr(importlib.import_module(module), attribute)
    if not callable(target) or (isinstance(target, type) and not issubclass(target, get_class(kind))):
        raise ValueError(f"it is not a {kind.rpartition('.')[2]}")
    return target


def arguments(target: Callable, given: Collection[str]) -> tuple[dict[str, Any], set[str], bool]:
    """The types of the arguments that a callable takes, the names of those that it needs, and whether it takes others.

    Args:
        target: the callable.
        given: names of the arguments that a config gives.

    Raises:
        ValueError: it has no signature.
    """
    try:
        parameters = inspect.signature(target, eval_str=True).parameters.values()
    except NameError:  # a name that only type checkers import
        parameters = inspect.signature(target).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    types = {p.name: Any if p.annotation is p.empty else p.annotation for p in named}
    needed = {p.name for p in named if p.default is p.empty}
    if "max_len" in needed:  # `run/build.py` fills it in where it is null or left out
        types["max_len"], needed = types["max_len"] | None, needed - {"max_len"}
    further = any(p.kind == p.VAR_KEYWORD for p in parameters)
    bases = [base.__name__ for base in getattr(target, "__mro__", ()) if base.__name__ in PASSED_ON]
    if further and bases and given - types.keys():
        types, further = arguments(find(PASSED_ON[bases[0]]), ())[0] | types, False
    return types, needed, further
