"""Errors that list what is known, nearest first."""

import difflib
from collections.abc import Iterable

RENAMED = {  # names that had another name before, or that another optimizer's habit suggests
    "pattern_search_credit": "pattern_search_nodes",
    "pattern_search_credit_long": "pattern_search_nodes_long",
    "units_per_step": "optimizer.nodes_per_step",
    "max_seconds": "trainer.max_time",  # the budgets of a search, given to a gradient optimizer
    "max_evaluations": "trainer.max_steps",
    "target_loss": "callbacks.early_stopping.stopping_threshold",
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, if any: its new name, the same key elsewhere, or one that is alike."""
    name = word.rpartition(".")[2]
    if name in RENAMED:
        return RENAMED[name]
    names = {k: k.rpartition(".")[2] for k in known}
    same_key = [k for k in names if names[k] == word] or [k for k in names if names[k].endswith(f"_{word}")]
    alike = [k for k in names if difflib.get_close_matches(name, [names[k]])]  # whatever they lie in
    near = same_key or difflib.get_close_matches(word, alike, n=1)
    return near[0] if near else None


def unknown(what: str, word: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """A message such as "model=medim is not known; did you mean medium? Known: large, medium".

    `listed` are the known words that are worth listing; all of them if None.
    """
    known = list(known)
    near = nearest(word, known)
    hint = f"; did you mean {near}?" if near else "."
    return f"{what} is not known{hint} Known: {', '.join(known if listed is None else listed)}"


def one_of(key: str, value: str, known: Iterable[str]) -> None:
    """Raise a ValueError that says what is known, unless `value` is."""
    known = list(known)
    if value not in known:
        raise ValueError(unknown(f"{key}={value}", str(value), known))
