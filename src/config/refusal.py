"""Telling why a command cannot run, before anything has started."""

import sys
from collections.abc import Iterable
from typing import NoReturn

from hydra.errors import HydraException


class ConfigError(ValueError):
    """A config cannot run; `problems` says why, one reason each."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(dict.fromkeys(problems))
        super().__init__("; ".join(self.problems))


def reason(error: BaseException) -> str:
    """Why something cannot be built, in one line."""
    while error.__cause__ is not None and isinstance(error, HydraException):  # Hydra wraps what was raised
        error = error.__cause__
    return " ".join(str(error).split())[:400] or type(error).__name__


def refuse(problems: Iterable[str]) -> NoReturn:
    """Print the problems, each once, and exit with code 2."""
    print("This cannot run:", *(f"  - {p}" for p in dict.fromkeys(problems)), sep="\n", file=sys.stderr, flush=True)
    sys.exit(2)
