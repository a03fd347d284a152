"""The text of a config: the keys that no callable takes, and every `_target_` node against its callable."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from pydantic import Field

from config.compose import CONFIGS, dig, leaves, shown
from config.did_you_mean import moved, nearest
from config.draft import Draft
from config.signatures import INSTRUCTIONS, arguments_model, find, strict_model, validate
from data.sequences import SequenceDataModule
from pattern_search_task import PatternSearchTask

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
KINDS: dict[str, type] = {
    "task": PatternSearchTask,
    "datamodule": SequenceDataModule,
    "model": torch.nn.Module,
    "optimizer": torch.optim.Optimizer,
    "trainer": L.Trainer,
    "logger": Logger,
    "callbacks": L.Callback,
}
NAMES: dict[str, Any] = dict.fromkeys(("task", "model", "optimizer", "experiment", "variant"), str | None)
PLAIN: dict[str, dict[str, Any]] = {  # the keys that are passed to no callable, by node
    "": {
        "seed": (int, Field(ge=0, lt=2**32)),
        "resume": str | None,
        "output_dir": str,
        "allowed_packages": list[str],
        **dict.fromkeys([*KINDS, "wandb", "checkpoint", "choices"], dict),
    },
    "wandb": {"entity": str | None, "project": str},
    "checkpoint": {"every_seconds": (float | None, Field(ge=0)), "every_steps": (int | None, Field(ge=1))},
    "choices": NAMES,
}


def check_text(draft: Draft) -> None:
    """All that can be said about keys and types without building anything."""
    found = {key: unresolved(draft, key, error) for key, error in draft.unresolved.items()}
    for path, types in PLAIN.items():
        if isinstance(node := dig(draft.values, path), dict):
            fields = {name: hint if isinstance(hint, tuple) else (hint, ...) for name, hint in types.items()}
            found = dict(validate(strict_model(fields), node, path)) | found
    draft.report(found)
    for name in KINDS:
        node = draft.get(name)
        if name == "callbacks" and isinstance(node, dict):
            for callback in node:
                check_target(draft, f"callbacks.{callback}")
        elif isinstance(node, dict) and (node or name != "logger"):
            check_target(draft, name)
    for path, node in targets(draft.values):
        check_node(draft, path, node)


def unresolved(draft: Draft, key: str, error: str) -> str:
    """Why a key has no value."""
    absent = re.search(r"Interpolation key '([^']+)' not found", error)
    near = nearest(absent[1], leaves(draft.raw)) if absent else None
    text = f"{key}={shown(dig(draft.raw, key))}: {' '.join(error.splitlines()[0].split())}"
    return f"{text}; did you mean ${{{near}}}?" if near else text


def check_target(draft: Draft, path: str) -> None:
    """A node that is built must name a class."""
    node = draft.get(path)
    if not isinstance(node, dict) or not node:
        draft.note_value(path, ": expected a _target_")
    elif "_target_" not in node:
        near = nearest("_target_", [key for key in node if key not in INSTRUCTIONS])
        given = ", ".join(f"{path}.{key}" for key in node)
        hint = f"; did you mean it by {path}.{near}?" if near else f", the class to build (given: {given})"
        draft.note(f"{path}._target_", f"{path}._target_ is missing{hint}")


def targets(node: Any, path: str = "") -> Iterator[tuple[str, dict]]:
    """The path of every node that will be instantiated, and the node."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from targets(value, f"{path}.{key}" if path else key)


def check_node(draft: Draft, path: str, node: dict) -> None:
    """One `_target_` node: its target, its keys and the types of its values."""
    if (target := find_target(draft, path, node["_target_"])) is None:
        return
    partial = node.get("_partial_", False)
    if partial is not (path == "optimizer"):  # only the optimizer waits for something: the weights
        rule = "must be true: the weights are passed later" if path == "optimizer" else "must be false, or left out"
        draft.note_value(f"{path}._partial_", f": {rule}")
    arguments, filled_in = {k: v for k, v in node.items() if k not in INSTRUCTIONS}, FILLED_IN.get(path, ())
    for name in arguments.keys() & set(filled_in):
        draft.note(f"{path}.{name}", f"{path}.{name} is filled in by the program and cannot be set")
    draft.report(dict(validate(arguments_model(target, arguments, filled_in), arguments, path)))


def find_target(draft: Draft, path: str, name: Any) -> Callable | None:
    """The class that a node names; None, with a problem noted, if it is not allowed, not there or of another kind."""
    key, package = f"{path}._target_", str(name).partition(".")[0]
    allowed = BUILT_IN_PACKAGES | set(draft.get("allowed_packages") if draft.sound("allowed_packages") else [])
    if package not in allowed:
        near = moved(str(name)) or nearest(package, allowed)
        hint = f"did you mean {near}?" if near else "add it to allowed_packages"
        draft.note_value(key, f": package {package} is not allowed; {hint}")
        return None
    try:
        target = find(str(name))
    except (ImportError, AttributeError, ValueError) as error:
        draft.note_value(key, f" cannot be imported: {error}")
        return None
    group, _, callback = path.partition(".")
    kind = KINDS.get(group) if "." not in callback and bool(callback) == (group == "callbacks") else None
    if not callable(target) or (isinstance(target, type) and kind and not issubclass(target, kind)):
        draft.note_value(key, f" is not a {kind.__name__ if kind else 'callable'}")
        return None
    return target
