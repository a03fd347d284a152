"""What optimizers share that move all weights along random directions: how these are drawn, and how the weights move.

Candidates are the incumbent plus or minus sigma times a direction. Their losses tell the slope along each direction, so
the directions, weighed by these, add up to an estimate of the slope. Every step follows it: no loss is asked for again
behind it, and no move is refused. The incumbent's loss, one more evaluation per step, is what the log shows.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from search.base import LossOnlyOptimizer
from search.budget import Evaluator
from search.closure import Changes
from search.moments import measured

KEPT_BYTES = 2**28  # directions beyond this are drawn again when they are needed again


class RandomDirections:
    """Directions (n,) that are drawn from a seed of their own each: the same ones whoever asks, and in what order.

    Args:
        draw: fills a tensor (n,) with a direction, from a generator.
        seeds: (K,) of the directions, on the host.
        like: (n,) a tensor of the size, type and device of a direction.
    """

    def __init__(self, draw: Callable[[Tensor, torch.Generator], Any], seeds: Tensor, like: Tensor):
        self.draw, self.seeds, self.like = draw, seeds.tolist(), like
        self.kept: dict[int, Tensor] = {}

    def direction(self, k: int) -> Tensor:
        """(n,) direction number k."""
        if k in self.kept:
            return self.kept[k]
        direction = torch.empty_like(self.like)
        self.draw(direction, torch.Generator(direction.device).manual_seed(self.seeds[k]))
        if (len(self.kept) + 1) * direction.nbytes <= KEPT_BYTES:
            self.kept[k] = direction
        return direction

    def changes(self, sigma: float, mirrored: bool) -> Changes:
        """Of candidate k: sigma times direction k; mirrored: forward along direction k / 2, or backward for odd k."""

        def changes(first: int, last: int) -> Tensor:
            rows = self.like.new_empty(last - first, len(self.like))
            for k, row in zip(range(first, last), rows, strict=True):
                way, number = (1 - 2 * (k % 2), k // 2) if mirrored else (1, k)
                torch.mul(self.direction(number), way * sigma, out=row)
            return rows

        return changes

    def combined(self, weights: Tensor) -> Tensor:
        """(n,) the sum of weights[k] times direction k; weights (K,) on the host."""
        total = torch.zeros_like(self.like)
        for k, weight in enumerate(weights.tolist()):
            total.add_(self.direction(k), alpha=weight)
        return total


class SlopeEstimator(LossOnlyOptimizer):
    """Base of optimizers that estimate the slope from random directions and follow it. A subclass writes `worth`.

    Args:
        params: parameters or parameter groups; every group may set a lr for itself.
        lr: step size, times the estimate.
        sigma: length of the perturbations: the standard deviation of each weight's, in units of the weights.
        samples: directions per step; mirrored ones are two evaluations each.
        seed, max_evaluations, max_seconds, target_loss: see `LossOnlyOptimizer`. A step whose candidates the budget
            does not allow is not taken.

    Raises:
        ValueError: an option out of range.
    """

    tests_moves = False
    mirrored = True  # whether each direction is evaluated forward and backward

    def __init__(self, params: Any, lr: float, sigma: float, samples: int, **limits: Any):
        if not (lr > 0 and sigma > 0 and samples >= 1):
            raise ValueError(f"lr={lr} and sigma={sigma} must be above 0, and samples={samples} at least 1")
        super().__init__(params, dict(lr=lr), **limits)
        self.sigma, self.samples = sigma, samples

    def draw(self, direction: Tensor, generator: torch.Generator) -> None:
        """Fill (n,) with a random direction: standard normal numbers."""
        direction.normal_(generator=generator)

    @abstractmethod
    def worth(self, losses: Tensor) -> Tensor:
        """Losses of the candidates, in float64 -> (samples,) how much each direction counts in the slope.

        Mirrored: losses (samples, 2), forward and backward; else (samples,). A direction whose losses are not finite
        does not count, whatever comes out for it.
        """

    def uphill(self, slopes: Tensor) -> Tensor:
        """The direction (n,) against which the weights move by lr, from the slopes (n,) of this step."""
        return slopes

    def take_step(self, evaluate: Evaluator) -> None:
        like = self.coordinates.empty_like_weights()
        seeds = torch.randint(2**63 - 1, (self.samples,), generator=self.generator, device="cpu")
        directions = RandomDirections(self.draw, seeds, like)
        self.report.planned = self.samples * (1 + self.mirrored)
        losses = evaluate.perturbed(self.report.planned, directions.changes(self.sigma, self.mirrored))
        losses = losses.view(self.samples, 2) if self.mirrored else losses
        known = losses.isfinite().view(self.samples, -1).all(1)
        self.descend(self.uphill(measured(directions.combined(self.worth(losses).where(known, 0)))))
