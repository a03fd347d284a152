"""A config under check (`config/check.py`): what is wrong with it is noted and put back to its default."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from config.composition import Job, leaves

INSTRUCTIONS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")  # Hydra's own keys of a node


class Draft:
    """A config under check. What is wrong is noted once and put back to its default, so that the rest can be checked.

    `problems` maps a key to what is wrong with it, `unread` a key to why nothing would read it.
    """

    def __init__(self, job: Job):
        self.raw: dict = OmegaConf.to_container(job.cfg)  # interpolations are not resolved
        self.defaults: dict = OmegaConf.to_container(job.defaults)
        self.text = json.dumps(self.raw, default=str)  # as it was given
        self.problems: dict[str, str] = {}
        self._left_out: set[str] = set()
        self.unread: dict[str, str] = {}

    @property
    def cfg(self) -> DictConfig:
        return OmegaConf.create(self.raw)

    def get(self, path: str) -> Any:
        """The resolved value of a key, None if there is no such key."""
        value = OmegaConf.select(self.cfg, path)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    def note(self, key: str, problem: str) -> None:
        self.problems.setdefault(key, problem)
        self.reset(key)

    def reset(self, key: str) -> bool:
        """Put a key back to its default, or leave it out so that the callable's default holds; whether it changed."""
        path, _, name = key.rpartition(".")
        node, default = dig(self.raw, path), dig(self.defaults, path)
        if not isinstance(node, dict) or key in self._left_out:
            return False
        if isinstance(default, dict) and name in default and repr(node.get(name, ...)) != repr(default[name]):
            node[name] = copy.deepcopy(default[name])
            return True
        self._left_out.add(key)
        node.pop(name, None)
        for other in list(leaves(self.raw)):
            value = dig(self.raw, other)
            if not isinstance(value, dict) and f"${{{key}}}" in str(value):
                self.reset(other)
        return True

    def changed(self, nodes: Sequence[str]) -> list[str]:
        """The keys below the nodes that differ from their defaults."""
        return [
            key
            for key in leaves(self.raw)
            if key.startswith(tuple(f"{node}." for node in nodes))
            and not isinstance(dig(self.raw, key), dict)
            and repr(dig(self.raw, key)) != repr(dig(self.defaults, key, ...))  # 1 is not True, and NaN is NaN
        ]

    def build(self, nodes: Sequence[str], make: Callable[[DictConfig], Any]) -> Any:
        """What `make` builds from the nodes; None if it cannot be built whatever is put back to its default."""
        while all("_target_" in self.raw[node] for node in nodes if node != "callbacks"):  # else it was noted
            try:
                return make(self.cfg)
            except Exception as error:  # whatever a constructor refuses, the user gets the reason and not a traceback
                message = reason(error)
            guilty = self._guilty(nodes, make, message)
            if any(names(message, key) for key in self.problems if key.startswith(tuple(nodes))):
                break  # it comes of putting a value back
            self.problems.setdefault((guilty or nodes)[0], self._with_key(message, guilty, nodes[0]))
            done = [self.reset(key) for key in guilty]
            if not any(done):
                break
        return None

    def _with_key(self, message: str, guilty: list[str], node: str) -> str:
        """The message with the whole path of the key and its value in it."""
        if any(key in message for key in guilty):
            return message
        if not guilty:
            return message if f"{node}." in message else f"{node}: {message}"
        path, _, name = guilty[0].rpartition(".")
        if message.startswith(f"{name}="):
            return f"{path}.{message}"
        return f"{guilty[0]}={shown(dig(self.raw, guilty[0]))}: {message}"

    def _guilty(self, nodes: Sequence[str], make: Callable[[DictConfig], Any], message: str) -> list[str]:
        """The keys to which an error is due: those it names, or one without which it does not happen."""
        below = [k for k in leaves(self.raw) if k.startswith(tuple(f"{n}." for n in nodes))]
        below = [k for k in below if k.rpartition(".")[2] not in INSTRUCTIONS]
        for keys in (self.changed(nodes), below):
            if named := [key for key in self._named(message, nodes) if key in keys]:
                return [self.written(key) for key in named]
            for key in keys:
                trial = copy.deepcopy(self)
                trial.reset(key)
                try:
                    make(trial.cfg)
                except Exception as error:
                    if keys is below or reason(error) == message:
                        continue
                return [self.written(key)]
        return []

    def _named(self, message: str, nodes: Sequence[str]) -> list[str]:
        """The keys below the nodes that a message names, or whose value, such as a path, it cites."""
        named = []
        for key in leaves(self.raw):
            value = dig(self.raw, key)
            by_value = isinstance(value, str) and "/" in value and value in message
            if key.startswith(tuple(f"{node}." for node in nodes)) and (names(message, key) or by_value):
                named.append(key)
        return named

    def written(self, key: str) -> str:
        """Where the value of a key was given: there, or at the key that its default takes it from."""
        value = dig(self.raw, key)
        source = re.fullmatch(r"\$\{([\w.]+)\}", str(value))
        return source[1] if source and value == dig(self.defaults, key) else key


def names(message: str, key: str) -> bool:
    """Whether a message names a key, by the last part of its path."""
    return re.search(rf"(?<!\w){re.escape(key.rpartition('.')[2])}\b", message) is not None


def dig(node: Any, path: str, missing: Any = None) -> Any:
    """The value at a dotted path of nested dicts."""
    for name in path.split(".") if path else ():
        if not isinstance(node, dict) or name not in node:
            return missing
        node = node[name]
    return node


def shown(value: Any) -> str:
    """A value as it is written on a command line."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def reason(error: BaseException) -> str:
    """Why something cannot be built, in one line: Hydra wraps what a constructor raised."""
    while error.__cause__ is not None and type(error).__module__.startswith("hydra"):
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 400 else f"{text[:400]} ..."
