"""Random search: random directions, kept where the loss falls.

Rastrigin 1963; Matyas 1965; Solis and Wets 1981, algorithm 1 with a fixed length.
"""

from typing import Any

import torch
from torch import Tensor

from search.base import LossOnlyOptimizer
from search.budget import Evaluator
from search.losses import improves


class RandomSearch(LossOnlyOptimizer):
    """Try random directions of one length, forward and backward, and move to each that lowers the loss of the batch.

    Args:
        params: parameters or parameter groups; every group may set a radius for itself.
        radius: standard deviation of the move of each weight, in units of the weights.
        samples: directions per step; the batch stays the same.
        seed, max_evaluations, max_seconds, target_loss: see `LossOnlyOptimizer`.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(self, params: Any, radius: float = 0.01, samples: int = 32, **limits: Any):
        if not radius > 0 or samples < 1:
            raise ValueError(f"radius={radius} must be above 0, and samples={samples} at least 1")
        super().__init__(params, dict(radius=radius), **limits)
        self.samples = samples

    def take_step(self, evaluate: Evaluator) -> None:
        n = len(self.coordinates)
        radius = self.by_group(self.coordinates.owner(torch.arange(n, device="cpu")), "radius").float()  # (n,)
        self.report.planned = 2 * self.samples
        for _ in range(self.samples):
            forward_or_backward(self, evaluate, radius * torch.randn(n, generator=self.generator, device="cpu"))


def forward_or_backward(search: LossOnlyOptimizer, evaluate: Evaluator, change: Tensor) -> None:
    """Move a search by a change (n,) if that lowers the loss of the batch, else by its opposite if that does."""
    for way in torch.tensor([1.0, -1.0], device="cpu"):
        losses = evaluate.trial(change, way[None])
        search.report.done += 1
        if improves(losses[0], search.report.loss_after):
            search.accept(losses[0], way * change)
            break
