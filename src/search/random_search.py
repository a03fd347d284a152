"""Random search: random directions, kept where the loss falls.

Rastrigin 1963; Matyas 1965; Solis and Wets 1981, algorithm 1 with a fixed length.
"""

from typing import Any

import torch

from search.base import LossOnlyOptimizer
from search.both_ways import try_both_ways
from search.budget import Evaluator
from search.random_directions import RandomDirections


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
        like = self.coordinates.empty_like_weights()
        radius = self.by_group(self.coordinates.owner(torch.arange(len(like), device="cpu")), "radius").to(like)  # (n,)
        seeds = torch.randint(2**63 - 1, (self.samples,), generator=self.generator, device="cpu")
        directions = RandomDirections(lambda row, drawn: row.normal_(generator=drawn).mul_(radius), seeds, like)
        try_both_ways(self, evaluate, self.samples, directions.changes(1.0, mirrored=True))
