"""Telling why a command cannot run: every reason as soon as it is known, all before anything has started."""

import sys
from collections.abc import Iterable
from typing import NoReturn

_told: list[str] = []


def tell(reasons: Iterable[str]) -> None:
    """Print the reasons that were not told yet."""
    for reason in reasons:
        if reason not in _told:
            if not _told:
                print("This cannot run:", file=sys.stderr)
            print(f"  - {reason}", file=sys.stderr, flush=True)
            _told.append(reason)


def refuse(reasons: Iterable[str]) -> NoReturn:
    """Print the reasons that were not told yet, and exit with code 2."""
    tell(reasons)
    _told.clear()
    sys.exit(2)
