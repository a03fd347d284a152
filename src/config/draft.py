"""A config under check, and what is wrong with it."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from config.compose import dig, shown


class Draft:
    """A config under check.

    `raw` is the config with its interpolations, `values` without them, and `unresolved` says why the others have none.
    `given` are the keys that the command line sets. `problems` maps a key to what is wrong with it, `unread` a key to
    why nothing would read it.
    """

    def __init__(self, cfg: DictConfig, given: Sequence[str] = ()):
        self.cfg, self.given = cfg, given
        self.problems: dict[str, str] = {}
        self.unread: dict[str, str] = {}
        self.unresolved: dict[str, str] = {}
        self.raw: Any = OmegaConf.to_container(cfg)
        self.values = dict(self._resolve(cfg, ""))

    def get(self, key: str) -> Any:
        return dig(self.values, key)

    def note(self, key: str, problem: str) -> None:
        self.problems.setdefault(key, problem)

    def note_value(self, key: str, problem: str) -> None:
        self.note(key, f"{key}={shown(self.get(key))}{problem}")

    def written(self, key: str) -> str:
        """Where the value of a key was written: there, or at the key that it is taken from."""
        source = re.fullmatch(r"\$\{([\w.]+)\}", str(dig(self.raw, key)))
        return source[1] if source else key

    def report(self, found: dict[str, str]) -> None:
        """Note problems; a value taken from another key is reported where it was written, if it is wrong there too."""
        for key, problem in found.items():
            source = f"{self.written(key)}."
            if source == f"{key}." or not any(source.startswith(f"{k}.") for k in [*found, *self.problems]):
                self.note(key, problem)

    def sound(self, *nodes: str) -> bool:
        """Whether there is no problem below the nodes, nor with a key that they take a value from."""
        text = json.dumps([dig(self.raw, node) for node in nodes], default=str)
        below = tuple(f"{node}." for node in nodes)
        taken = [re.escape(key) for key in self.problems]
        return not any(f"{key}.".startswith(below) for key in self.problems) and not (
            taken and re.search(rf"\$\{{({'|'.join(taken)})[.}}]", text)
        )

    def _resolve(self, node: DictConfig, path: str) -> Iterator[tuple[str, Any]]:
        for name in node:
            key = f"{path}{name!s}"
            try:
                value = node[name]
                if isinstance(value, DictConfig):
                    yield str(name), dict(self._resolve(value, f"{key}."))
                elif OmegaConf.is_config(value):
                    yield str(name), OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
                else:
                    yield str(name), value
            except (OmegaConfBaseException, RecursionError) as error:
                self.unresolved[key] = str(error)
