"""Coherent coordinate descent: differences of a few coordinates per step, and a step along all remembered ones.

Liang, Sun, Wang et al. 2026, "Turning stale gradients into stable gradients: coherent coordinate descent with implicit
landscape smoothing for lightweight zeroth-order optimization" (CoCD, ICML), arXiv 2605.14373.
"""

from typing import Any

import torch

from search.base import LossOnlyOptimizer, seeded
from search.budget import Evaluator
from search.moments import measured


class CoherentDescent(LossOnlyOptimizer):
    """Refresh the slopes of the next B of n coordinates, let older ones decay, and descend along all of them.

    With a vector g of n slopes, 0 at first, and L the loss of the batch, a step is:

        g <- gamma g                                                  (the older, the less it counts)
        g_i <- (L(w + radius e_i) - L(w - radius e_i)) / (2 radius)   (for the next B coordinates i in cyclic order)
        w <- w - lr g

    gamma = 1 keeps a slope until it is refreshed; gamma = 0 is block-cyclic coordinate descent. A large radius smooths
    the landscape. The order is that of the weights, and the seed says with which one it begins. A slope that is not
    finite counts as 0.

    A step costs 2 B + 1 evaluations. No loss speaks for its move, and none is spent on it: `report.loss_after` stays
    the loss before the step. A step that the budget does not allow is not begun.

    Args:
        params: parameters or parameter groups; every group may set lr and radius for itself.
        lr: step size, per unit of slope.
        radius: of the differences, in units of the weights; eps of the paper.
        coordinates_per_step: B, refreshed per step; all of them where there are fewer.
        gamma: decay of older slopes per step, in [0, 1].
        seed, max_evaluations, max_seconds, target_loss: see `LossOnlyOptimizer`.

    Raises:
        ValueError: an option out of range.
    """

    tests_moves = False

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        radius: float = 0.1,
        coordinates_per_step: int = 128,
        gamma: float = 0.95,
        **limits: Any,
    ):
        if not (lr > 0 and radius > 0 and coordinates_per_step >= 1 and 0 <= gamma <= 1):
            raise ValueError(
                f"lr={lr} and radius={radius} must be above 0, coordinates_per_step={coordinates_per_step} at least 1, "
                f"and gamma={gamma} between 0 and 1"
            )
        super().__init__(params, dict(lr=lr, radius=radius), **limits)
        self.coordinates_per_step, self.gamma = coordinates_per_step, gamma
        n, like = len(self.coordinates), self.coordinates.parameters[0]
        self.saved["cursor"] = int(torch.rand((), generator=seeded(self.seed, 0), device="cpu") * n)
        self.saved["slopes"] = torch.zeros(n, dtype=like.dtype, device=like.device)

    def take_step(self, evaluate: Evaluator) -> None:
        n, slopes = len(self.coordinates), self.saved["slopes"]
        if len(slopes) != n:  # weights were added since
            slopes = self.saved["slopes"] = slopes.new_zeros(n)
        block = min(self.coordinates_per_step, n)
        self.report.planned = 2 * block
        coordinates = (self.saved["cursor"] + torch.arange(block, device="cpu")) % n  # (B,)
        radius = self.by_group(self.coordinates.owner(coordinates), "radius")  # (B,)
        forward, backward = evaluate.poll(coordinates.repeat(2), torch.cat([radius, -radius])).chunk(2)
        self.report.done = 2 * block
        slopes *= self.gamma
        slopes[coordinates.to(slopes.device)] = measured(((forward - backward) / (2 * radius)).to(slopes))
        self.saved["cursor"] = (self.saved["cursor"] + block) % n
        self.descend(slopes)
