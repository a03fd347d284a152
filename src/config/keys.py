"""The keys of a config, and the words of a command line."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VALUED_FLAGS = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """The paths of all keys of a nested dict."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{path}{key}"
            yield from leaves(value, f"{path}{key}.")


def dig(node: Any, path: str) -> Any:
    """The value at a dotted path of nested dicts; None if there is none."""
    for name in path.split(".") if path else ():
        node = node.get(name) if isinstance(node, dict) else None
    return node


def key_of(override: str) -> str:
    """The key that an override sets: "a.b" of "+a.b=3"."""
    return override.lstrip("+~").partition("=")[0]


def shown(value: Any) -> str:
    """A value as it is written on a command line."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command with the overrides behind the flags, where Hydra wants them."""
    flags: list[str] = []
    overrides: list[str] = []
    for word in arguments:
        override = word.startswith("~") or ("=" in word and not word.startswith("-"))
        (overrides if override and flags[-1:] not in [[f] for f in VALUED_FLAGS] else flags).append(word)
    return [*flags, *overrides]
