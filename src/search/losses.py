"""Comparing losses that may not be finite: such a loss is worse than any finite one."""

import math

import torch
from torch import Tensor


def improves(losses: Tensor, loss: float) -> Tensor:
    """Which losses (K,) are finite and strictly lower. Any finite one improves on a loss that is not finite."""
    incumbent = loss if math.isfinite(loss) else math.inf
    return (losses > -math.inf) & (losses < incumbent)  # neither holds for nan


def tolerated(losses: Tensor, loss: float, tolerance: float) -> Tensor:
    """Which losses (K,) are finite and higher by no more than this part of the loss. Any finite one, if it is not."""
    highest = loss + tolerance * abs(loss) if math.isfinite(loss) else math.inf
    return torch.isfinite(losses) & (losses <= highest)


def within_rounding(losses: Tensor, loss: Tensor) -> Tensor:
    """Which losses (K,) differ from `loss`, in the dtype it is computed in, by no more than the order of sums may."""
    return (losses - loss).abs() <= 8 * torch.finfo(loss.dtype).eps * loss.abs()


def lowest(losses: Tensor) -> int:
    """Which of the losses (K,) is the lowest finite one; 0 if none is finite."""
    values = [loss if math.isfinite(loss) else math.inf for loss in losses.tolist()]
    return values.index(min(values))
