"""SEARCH: one step of all weights along the remembered slopes, at several lengths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from search.budget import Evaluator
from search.losses import improves, lowest, tolerated
from search.poll import Move


def search_step(
    evaluate: Evaluator,
    direction: Tensor,
    joined: Sequence[tuple[Tensor, Tensor]],
    lengths: Sequence[float],
    shortened: float,
    loss: float,
    tolerance: float | None = None,
) -> Move | None:
    """The best of the lengths, if it improves on a loss; or the longest that a tolerance allows.

    The best length on a batch may be too short in the long run: a step that raises the loss along the few steep
    directions may still make way along the many flat ones, which no single batch shows (Wu et al. 2018, short-horizon
    bias). So a tolerance accepts what does not improve, within bounds (nonmonotone: Grippo, Lampariello and Lucidi
    1986, whose bound is the highest of the losses so far; across batches these do not compare).

    Args:
        evaluate: answers `trial`.
        direction: (n,) downhill, over all coordinates; a step length is in units of the weights for a 1 in it.
        joined: moves of a poll that are made too, by how much which coordinates: as they are at the first length, in
            proportion at the others.
        lengths: to try.
        shortened: factor of the joined moves.
        loss: to improve on: of the incumbent, or of the best move that is known.
        tolerance: accept the longest length at which the loss is higher by no more than this part of it; None: the
            best that improves.
    """
    if evaluate.limit() is not None:
        return None
    change = lengths[0] * direction
    for moves, coordinates in joined:
        change.index_add_(0, coordinates.to(change.device), moves.to(change), alpha=shortened)
    scales = torch.tensor(lengths[: evaluate.affordable(len(lengths))], dtype=change.dtype, device="cpu") / lengths[0]
    losses = evaluate.trial(change, scales)
    if tolerance is None:
        k = lowest(losses)
        accepted = improves(losses, loss).tolist()[k]
    else:
        allowed = tolerated(losses, loss, tolerance).tolist()
        k = max(range(len(allowed)), key=lambda i: (allowed[i], lengths[i]))
        accepted = allowed[k]
    return Move(losses.tolist()[k], scales.tolist()[k] * change) if accepted else None
