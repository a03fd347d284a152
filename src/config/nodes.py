"""The text of a config: the keys that no callable takes, and every `_target_` node against its callable."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from pydantic import BaseModel, ConfigDict, Field, create_model

from config.did_you_mean import moved, nearest
from config.draft import Draft
from config.keys import CONFIGS, dig, leaves, shown
from config.signatures import INSTRUCTIONS, arguments_model, find, validate
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
STRICT = ConfigDict(extra="forbid", strict=True)
CHOICES = ("task", "model", "optimizer", "experiment", "variant")


class Root(BaseModel, **STRICT):
    """The keys of the config that are passed to no callable."""

    seed: int = Field(ge=0, lt=2**32)
    task: dict
    datamodule: dict
    model: dict
    optimizer: dict
    trainer: dict
    logger: dict
    callbacks: dict
    wandb: dict
    resume: str | None
    checkpoint: dict
    choices: dict
    output_dir: str
    allowed_packages: list[str]


class Wandb(BaseModel, **STRICT):
    entity: str | None
    project: str


class Checkpoint(BaseModel, **STRICT):
    every_seconds: float | None = Field(ge=0)
    every_steps: int | None = Field(ge=1)


Choices = create_model("Choices", __config__=STRICT, **dict.fromkeys(CHOICES, (str | None, ...)))
PLAIN: dict[str, type[BaseModel]] = {"": Root, "wandb": Wandb, "choices": Choices, "checkpoint": Checkpoint}


def check_text(draft: Draft) -> None:
    """All that can be said about keys and types without building anything."""
    found = {key: unresolved(draft, key, error) for key, error in draft.unresolved.items()}
    for path, model in PLAIN.items():
        if isinstance(node := dig(draft.values, path), dict):
            found = dict(validate(model, node, path)) | found
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
        draft.note(path, f"{path}={shown(node)}: expected a _target_")
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
        draft.note(f"{path}._partial_", f"{path}._partial_={shown(partial)}: {rule}")
    arguments = {name: value for name, value in node.items() if name not in INSTRUCTIONS}
    for name in arguments.keys() & set(FILLED_IN.get(path, ())):
        draft.note(f"{path}.{name}", f"{path}.{name} is filled in by the program and cannot be set")
    model = arguments_model(target, arguments, FILLED_IN.get(path, ()))
    draft.report(dict(validate(model, arguments, path)))


def find_target(draft: Draft, path: str, name: Any) -> Callable | None:
    """The class that a node names; None, with a problem noted, if it is not allowed, not there or of another kind."""
    key, text, package = f"{path}._target_", f"{path}._target_={shown(name)}", str(name).partition(".")[0]
    allowed = BUILT_IN_PACKAGES | set(draft.get("allowed_packages") or [])
    if package not in allowed:
        near = moved(str(name)) or nearest(package, allowed)
        hint = f"did you mean {near}?" if near else "add it to allowed_packages"
        draft.note(key, f"{text}: package {package} is not allowed; {hint}")
        return None
    try:
        target = find(str(name))
    except (ImportError, AttributeError, ValueError) as error:
        draft.note(key, f"{text} cannot be imported: {error}")
        return None
    group, _, callback = path.partition(".")
    kind = KINDS.get(group) if "." not in callback and bool(callback) == (group == "callbacks") else None
    if not callable(target) or (isinstance(target, type) and kind and not issubclass(target, kind)):
        draft.note(key, f"{text} is not a {kind.__name__ if kind else 'callable'}")
        return None
    return target
