"""SEARCH: one step of all weights along the remembered slopes, at several lengths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from search.budget import Evaluator
from search.losses import improves, lowest
from search.poll import Move


def search_step(
    evaluate: Evaluator,
    direction: Tensor,
    joined: Sequence[tuple[Tensor, Tensor]],
    lengths: Sequence[float],
    shortened: float,
    loss: float,
) -> Move | None:
    """The best of the lengths, if it improves on a loss.

    Args:
        evaluate: answers `trial`.
        direction: (n,) downhill, over all coordinates; a step length is in units of the weights for a 1 in it.
        joined: moves of a poll that are made too, by how much which coordinates: as they are at the first length, in
            proportion at the others.
        lengths: to try.
        shortened: factor of the joined moves.
        loss: to improve on: of the incumbent, or of the best move that is known.
    """
    if evaluate.limit() is not None:
        return None
    change = lengths[0] * direction
    for moves, coordinates in joined:
        change.index_add_(0, coordinates.to(change.device), moves.to(change), alpha=shortened)
    scales = torch.tensor(lengths[: evaluate.affordable(len(lengths))], dtype=change.dtype, device="cpu") / lengths[0]
    losses = evaluate.trial(change, scales)
    k = lowest(losses)
    return Move(losses.tolist()[k], scales.tolist()[k] * change) if improves(losses, loss).tolist()[k] else None
