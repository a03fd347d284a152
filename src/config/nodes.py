"""The nodes of a config from which objects are built: their keys and the types of their values, from signatures."""

import importlib
import inspect
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from config.compose import by_key, shown
from config.did_you_mean import nearest
from config.values import NODES, Problems, mismatches
from data.sequences import SequenceDataModule
from pattern_search_task import PatternSearchTask

SRC = Path(__file__).parents[1]
BUILT_IN_PACKAGES = ["torch", "lightning", "torchmetrics", "wandb", *(path.stem for path in SRC.iterdir())]
INSTRUCTIONS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")  # Hydra's own keys of a node
BUILT: dict[str, tuple[type, list[str]]] = {  # what is built from each node, with arguments that the program gives
    "task": (PatternSearchTask, ["model", "optimizer"]),
    "datamodule": (SequenceDataModule, []),
    "model": (torch.nn.Module, ["vocab_size", "n_classes"]),
    "optimizer": (torch.optim.Optimizer, ["params"]),
    "trainer": (L.Trainer, ["logger", "callbacks", "default_root_dir"]),
    "logger": (Logger, []),
    "callbacks": (L.Callback, []),  # from each node in it
}
PASSED_ON = {  # what a class, or one that is derived from it, passes further arguments to
    "LossOnlyOptimizer": "search.base.LossOnlyOptimizer",
    "WandbLogger": "wandb.init",
    "TensorBoardLogger": "torch.utils.tensorboard.SummaryWriter",
}


def text_problems(cfg: DictConfig) -> list[str]:
    """What is wrong with the keys and types of a config whose plain keys are right (`config/values.py`)."""
    raw, values = (by_key(OmegaConf.to_container(cfg, resolve=resolve)) for resolve in (False, True))
    nodes = {name: values[name] for name in NODES if values[name] or name != "logger"}
    nodes |= {f"callbacks.{name}": node for name, node in nodes.pop("callbacks").items()}
    found: list[tuple[str, str]] = []
    for path, node in nodes.items():
        found += node_problems(path, node, *BUILT[path.partition(".")[0]], values["allowed_packages"])
    taken = {f"${{{key}}}" for key, _ in found}  # what is taken from a wrong value is not told again
    return [problem for key, problem in found if str(raw.get(key)) not in taken]


def node_problems(
    path: str, node: Any, kind: type = object, filled_in: Collection[str] = (), allowed: Collection[str] = ()
) -> Problems:
    """What is wrong with a node that is built: its class, its keys, their types, and the nodes in it.

    Args:
        path: of the node.
        node: its values, without interpolations.
        kind: what its class must be derived from.
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


def find(name: str, kind: type = object, allowed: Collection[str] = ()) -> Callable:
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
    if not callable(target) or (isinstance(target, type) and not issubclass(target, kind)):
        raise ValueError(f"it is not a {kind.__name__}")
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
