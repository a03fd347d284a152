"""How the weights of a model are parted into parameter groups, for options that concern some of them."""

import fnmatch
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from torch import nn

from search.options import ALL, RECOMMENDED

BLOCKS = ("blocks.*",)  # names of what is orthogonalised if nothing else is asked for


def polls_for(groups: Any) -> int:
    """Recommended polls per step of parameters, or of groups of them: no weight of a small model twice in a step."""
    sizes = [sum(p.numel() for p in group["params"]) - 2 for group in groups if isinstance(group, dict)]
    return min([RECOMMENDED["polls_per_step"], *(sizes or [sum(p.numel() for p in groups)])])


def split_matrices(model: nn.Module, parameters: Sequence[nn.Parameter], asked: Mapping[str, Sequence[str]]) -> Any:
    """Parameter groups, for options that concern the matrices whose names match a pattern such as "blocks.*".

    An option is 0 in the groups of all other parameters. `ALL` parts nothing, nor does `BLOCKS` in a model without
    blocks: without an option that does, these are the parameters as they are.

    Args:
        model: knows the names.
        parameters: to part.
        asked: patterns, by the option; where the user sets them, `_in` follows its name.

    Raises:
        ValueError: a pattern that no matrix of the model matches, or no pattern at all, or one that matches no matrix
            among the parameters.
    """
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    inside: dict[str, set[int]] = {}
    for option, patterns in asked.items():
        if tuple(patterns) == ALL or (tuple(patterns) == BLOCKS and not hasattr(model, "blocks")):
            continue
        if wrong := [pattern for pattern in patterns or [""] if not fnmatch.filter(matrices, pattern)]:
            raise ValueError(
                f"{option}_in={list(patterns)}: no matrix of the model has a name like {wrong[0]!r}; there are "
                + ", ".join(matrices)
            )
        inside[option] = {id(matrices[name]) for pattern in patterns for name in fnmatch.filter(matrices, pattern)}
        if not inside[option] & set(map(id, parameters)):
            raise ValueError(
                f"{option}_in={list(patterns)}: none of these matrices is among the parameters that are searched; use "
                f"{option}=0, or names of matrices that are"
            )
    if not inside:
        return parameters
    parts: dict[tuple[str, ...], list[nn.Parameter]] = {}
    for p in parameters:
        parts.setdefault(tuple(option for option, chosen in inside.items() if id(p) not in chosen), []).append(p)
    return [
        {"params": part} | dict.fromkeys(off, 0) for off, part in sorted(parts.items(), key=lambda one: len(one[0]))
    ]


def split_at_last_block(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Any:
    """Parameter groups: what comes before the last of `model.blocks`, and the rest; one group if either is empty.

    And one for a model with fewer than two blocks: there all polls cost about the same.
    """
    blocks = list(getattr(model, "blocks", ()))
    if len(blocks) < 2:
        return parameters
    first = id(next(blocks[-1].parameters()))
    before = set(takewhile(lambda number: number != first, map(id, model.parameters())))
    groups = [p for p in parameters if id(p) in before], [p for p in parameters if id(p) not in before]
    return [{"params": group} for group in groups if group]
