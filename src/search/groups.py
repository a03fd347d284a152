"""How the weights of a model are parted into parameter groups, for options that concern some of them."""

import fnmatch
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from torch import nn

from search.options import RECOMMENDED

BLOCKS = ("blocks.*",)  # names of what is orthogonalised if nothing else is asked for


def polls_for(groups: Any) -> int:
    """Recommended polls per step of parameters, or of groups of them: no weight of a small model twice in a step."""
    sizes = [sum(p.numel() for p in group["params"]) - 2 for group in groups if isinstance(group, dict)]
    return min([RECOMMENDED["polls_per_step"], *(sizes or [sum(p.numel() for p in groups)])])


def split_matrices(model: nn.Module, parameters: Sequence[nn.Parameter], patterns: Sequence[str]) -> Any:
    """Parameter groups: the matrices whose names match a pattern such as "blocks.*", and the rest.

    The rest is not to be orthogonalised. One group for a model without blocks, if nothing else is asked for.

    Raises:
        ValueError: a pattern that no matrix of the model matches, or no pattern at all, or one that matches no matrix
            among the parameters.
    """
    if tuple(patterns) == BLOCKS and not hasattr(model, "blocks"):
        return parameters
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    if wrong := [pattern for pattern in patterns or [""] if not fnmatch.filter(matrices, pattern)]:
        raise ValueError(
            f"orthogonalise_in={list(patterns)}: no matrix of the model has a name like {wrong[0]!r}; there are "
            + ", ".join(matrices)
        )
    inside = {id(matrices[name]) for pattern in patterns for name in fnmatch.filter(matrices, pattern)}
    chosen, rest = [p for p in parameters if id(p) in inside], [p for p in parameters if id(p) not in inside]
    if not chosen:
        raise ValueError(
            f"orthogonalise_in={list(patterns)}: none of these matrices is among the parameters that are searched; use "
            "orthogonalise=0, or names of matrices that are"
        )
    groups: list[dict[str, Any]] = [{"params": chosen}, {"params": rest, "orthogonalise": 0}]
    return [group for group in groups if group["params"]]


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
