"""Errors that list what is known, nearest first."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, if any: the same key of another node, or a similar word."""
    known = list(dict.fromkeys(known))
    same_key = [k for k in known if k.rpartition(".")[2] == word]
    near = same_key or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return near[0] if near else None


def unknown(what: str, word: str, known: Iterable[str], list_known: bool = True) -> str:
    """A message such as "model=medim is not known; did you mean medium? Known: large, medium"."""
    known = list(known)
    near = nearest(word, known)
    hint = f"; did you mean {near}?" if near else "."
    return f"{what} is not known{hint}" + (f" Known: {', '.join(known)}" if list_known else "")


def one_of(key: str, value: str, known: Iterable[str]) -> None:
    """Raise a ValueError that says what is known, unless `value` is."""
    known = list(known)
    if value not in known:
        raise ValueError(unknown(f"{key}={value}", str(value), known))
