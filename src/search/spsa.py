"""Simultaneous perturbation: the slope along random directions by central differences, followed by plain SGD.

Spall 1992 (SPSA); with Gaussian directions from seeds, Malladi et al. 2023, "Fine-tuning language models with just
forward passes" (MeZO), definition 1 and algorithms 1 and 2; over many directions from scratch, Chaubard and
Kochenderfer 2025 (CD-RGE).
"""

from typing import Any

from torch import Tensor

from search.random_directions import SlopeEstimator


class SPSA(SlopeEstimator):
    """Central differences along `samples` Gaussian directions, averaged.

    theta <- theta - lr g,  g = mean of z (L(theta + sigma z) - L(theta - sigma z)) / (2 sigma).

    Arguments and errors: see `SlopeEstimator`; sigma is MeZO's epsilon.
    """

    def __init__(self, params: Any, lr: float = 0.1, sigma: float = 1e-2, samples: int = 64, **limits: Any):
        super().__init__(params, lr, sigma, samples, **limits)

    def worth(self, losses: Tensor) -> Tensor:
        return (losses[:, 0] - losses[:, 1]) / (2 * self.sigma * self.samples)  # definition 1 of MeZO, averaged
