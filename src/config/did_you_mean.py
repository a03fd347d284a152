"""Errors that list what is known, nearest first."""

import difflib
from collections.abc import Iterable

# names that had another name before, or that another optimizer's habit suggests
RENAMED = {
    "pattern_search_credit": "pattern_search_nodes",
    "pattern_search_credit_long": "pattern_search_nodes_long",
    "units_per_step": "nodes_per_step",
    "max_seconds": "max_time",  # the budgets of a search, given to a gradient optimizer
    "max_evaluations": "max_steps",
    "target_loss": "stopping_threshold",
}
MOVED = {  # modules
    "progress": "run.progress",
    "averaging": "run.averaging",
    "wandb_run": "run.wandb_logger",
    "sweep": "run.sweep",
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, if any: its new name, the same key elsewhere, or one that is alike."""
    known, last = list(dict.fromkeys(known)), word.rpartition(".")[2]
    names = {k: k.rpartition(".")[2] for k in known}
    renamed = [k for k in known if names[k] == RENAMED.get(last)]
    same_key = [k for k in known if names[k] == word] or [k for k in known if names[k].endswith(f"_{word}")]
    alike = [k for k in known if difflib.get_close_matches(last, [names[k]], cutoff=0.6)]  # whatever they lie in
    near = renamed or same_key or difflib.get_close_matches(word, alike, n=1, cutoff=0.6)
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


def moved(target: str) -> str | None:
    """Where a class lies now, if its module has moved."""
    module, _, name = target.rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else None
