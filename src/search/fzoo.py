"""FZOO: one-sided differences along random signs, with a step that the spread of their losses scales.

Dang et al. 2025, "FZOO: Fast zeroth-order optimizer for fine-tuning large language models towards Adam-scale speed"
(arXiv 2506.09034), algorithm 1.
"""

import math
from typing import Any

import torch
from torch import Tensor

from search.random_directions import SlopeEstimator


class FZOO(SlopeEstimator):
    """Differences to the incumbent's loss along Rademacher directions u, over the standard deviation of the losses.

    theta <- theta - lr g / std(l),  g = mean of u_i (l_i - l_0) / sigma,  l_i = L(theta + sigma u_i).

    Arguments and errors: see `SlopeEstimator`; sigma is the paper's epsilon, and samples, its N, must be at least 2.
    Where the incumbent's loss is not finite, the weights stay.
    """

    mirrored = False

    def __init__(self, params: Any, lr: float = 3e-4, sigma: float = 1e-2, samples: int = 32, **limits: Any):
        if samples < 2:
            raise ValueError(f"samples={samples} must be at least 2: one loss has no spread")
        super().__init__(params, lr, sigma, samples, **limits)

    def draw(self, direction: Tensor, generator: torch.Generator) -> None:
        direction.random_(0, 2, generator=generator).mul_(2).sub_(1)

    def worth(self, losses: Tensor) -> Tensor:
        finite, incumbent = losses[losses.isfinite()], self.report.loss_before
        spread = finite.std() if len(finite) > 1 else finite.new_zeros(())
        if not (spread > 0 and math.isfinite(incumbent)):
            return torch.zeros_like(losses)
        return (losses - incumbent) / (self.sigma * self.samples * spread)
