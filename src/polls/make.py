"""Which of the fast ways to evaluate candidates a module gets."""

import warnings
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.sequences import IGNORE
from polls.generic import GenericPolls
from polls.nodes import NodePolls
from polls.threads import available_cores
from search.coordinates import Coordinates
from transformer import DecoderOnlyTransformer

FastPolls = NodePolls | GenericPolls


def make_polls(
    module: nn.Module, coordinates: Coordinates, loss: Callable[[Any, Any], Tensor], threads: int | None = None
) -> FastPolls:
    """The fastest exact evaluator there is for this module: an object whose `on(batch)` is a closure.

    `NodePolls`, which are `StructuredPolls`, for a `DecoderOnlyTransformer` with the masked cross-entropy as its
    loss, on `threads` threads (by default one a core, and one for a GPU); `GenericPolls` for everything else, which
    it says once.
    """
    if has_nodes(module) and is_masked_cross_entropy(loss, module.head.out_features):
        return NodePolls(module, coordinates, loss, threads or (available_cores() if module.head.weight.is_cpu else 1))
    polls, how = GenericPolls(module, coordinates, loss), "go through vmap, at about the speed of batched inference"
    if any(isinstance(part, nn.RNNBase) for part in module.modules()):
        polls.refusal = "vmap has no rule for torch's recurrent layers"
        how = f"are evaluated one by one, which is slower: {polls.refusal}"
    reason = "only DecoderOnlyTransformer with the masked cross-entropy has"
    warnings.warn(
        f"{type(module).__name__} with this loss has no structured polls ({reason}): candidates {how}", stacklevel=2
    )
    return polls


def has_nodes(module: nn.Module) -> TypeGuard[DecoderOnlyTransformer]:
    """Whether the fast polls know the module from the inside, so that they can poll nodes of it."""
    return type(module) is DecoderOnlyTransformer


def is_masked_cross_entropy(loss: Callable[[Any, Any], Tensor], n_classes: int) -> bool:
    """Whether a loss is the mean cross-entropy over the scored tokens, judged by a small example."""
    logits = torch.linspace(-2, 2, 6 * n_classes).sin().mul(3).view(2, 3, n_classes)
    y = torch.tensor([[IGNORE, 0, n_classes - 1], [n_classes // 2, IGNORE, IGNORE]])
    expected = F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE)
    try:
        return torch.allclose(loss(logits, {"x": torch.zeros_like(y), "y": y}), expected)
    except (KeyError, TypeError, ValueError, RuntimeError):  # it needs more of a batch than x and y
        return False
