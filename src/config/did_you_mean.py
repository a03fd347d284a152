"""Errors that list what is known, nearest first."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, if any: the same key of another node, one that ends in it, or alike."""
    known, last = list(dict.fromkeys(known)), word.rpartition(".")[2]
    names = {k: k.rpartition(".")[2] for k in known}
    same_key = [k for k in known if names[k] == word] or [k for k in known if names[k].endswith(f"_{word}")]
    alike = [k for k in known if difflib.get_close_matches(last, [names[k]], cutoff=0.6)]  # whatever they lie in
    near = same_key or difflib.get_close_matches(word, alike, n=1, cutoff=0.6)
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
