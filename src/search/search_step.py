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
    joined: Sequence[Move],
    lengths: Sequence[float],
    shortened: float,
    loss: float,
) -> Move | None:
    """The best of the lengths, if it improves on a loss.

    Args:
        evaluate: answers `trial`.
        direction: (n,) downhill, over all coordinates; a step length is in units of the weights for a 1 in it.
        joined: moves of a poll that are made too: as they are at the first length, in proportion at the others.
        lengths: to try.
        shortened: factor of all lengths.
        loss: to improve on: of the incumbent, or of the best move that is known.
    """
    coordinates, change = torch.arange(len(direction)), lengths[0] * direction
    for move in joined:
        change.index_add_(0, move.coordinates, move.changes.to(change))
    change *= shortened
    if not change.any() or evaluate.limit() is not None:
        return None
    scales = torch.tensor(lengths[: evaluate.affordable(len(lengths))], dtype=change.dtype) / lengths[0]
    losses = evaluate.trial(coordinates, change, scales)
    k = lowest(losses)
    return Move(losses[k], coordinates, scales[k] * change) if improves(losses[k], loss) else None
