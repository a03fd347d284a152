"""Evolution strategies: mirrored Gaussian perturbations, weighed by the ranks of their losses.

Salimans et al. 2017, "Evolution strategies as a scalable alternative to reinforcement learning", algorithm 1 with the
mirrored sampling and the fitness shaping of section 2.
"""

from typing import Any

import torch
from torch import Tensor

from search import moments
from search.random_directions import SlopeEstimator


class ES(SlopeEstimator):
    """Ranks of the losses, from -1/2 for the lowest to 1/2 for the highest, in the place of the losses.

    theta <- theta - lr v,  v = momentum v + g,  g = mean over all 2 samples candidates of rank_i z_i / sigma.

    Args:
        momentum: decay in [0, 1) of the velocity.

    Other arguments and errors: see `SlopeEstimator`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        sigma: float = 2e-2,
        samples: int = 64,
        momentum: float = 0.9,
        **limits: Any,
    ):
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must lie in [0, 1)")
        super().__init__(params, lr, sigma, samples, **limits)
        self.momentum = momentum
        self.saved["moments"] = {}

    def worth(self, losses: Tensor) -> Tensor:
        ranks = centred_ranks(losses)
        return (ranks[:, 0] - ranks[:, 1]) / (2 * self.samples * self.sigma)

    def uphill(self, slopes: Tensor) -> Tensor:
        return moments.momentum(self.saved["moments"], slopes, self.momentum)


def centred_ranks(losses: Tensor) -> Tensor:
    """Ranks of losses of any shape, spread evenly from -1/2 to 1/2; equal ones share a rank, and nan is the highest.

    Example:
        >>> centred_ranks(torch.tensor([3.0, 1.0, torch.nan, 1.0, 2.0])).tolist()
        [0.25, -0.375, 0.5, -0.375, 0.0]
    """
    flat = losses.where(losses.isfinite(), torch.inf)
    ordered = flat.flatten().sort().values
    below, above = (torch.searchsorted(ordered, flat, right=right) for right in (False, True))
    return (below + above - 1).to(losses.dtype) / (2 * max(1, losses.numel() - 1)) - 0.5
