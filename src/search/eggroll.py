"""EGGROLL: evolution strategies whose perturbations of a matrix have rank 1.

Sarkar et al. 2025, "Evolution strategies at the hyperscale" (arXiv 2511.16652).
"""

from typing import Any

import torch
from torch import Tensor

from search.moments import adam
from search.random_directions import SlopeEstimator


class Eggroll(SlopeEstimator):
    """Mirrored perturbations E: a b^T of every matrix, with Gaussian a and b; Gaussian numbers of everything else.

    g = sqrt(N) mean over N = 2 samples candidates of f_i sigma E_i, with f_i the standardised loss; then SGD or Adam.
    What is drawn follows from the seed, the step and the candidate alone.

    Args:
        update: "sgd" moves by lr g; "adam" as Kingma and Ba 2015.

    Other arguments and errors: see `SlopeEstimator`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        sigma: float = 2e-2,
        samples: int = 32,
        update: str = "adam",
        **limits: Any,
    ):
        if update not in ("sgd", "adam"):
            raise ValueError(f"update={update} must be sgd or adam")
        super().__init__(params, lr, sigma, samples, **limits)
        self.update = update
        self.saved["moments"] = {}

    def draw(self, direction: Tensor, generator: torch.Generator) -> None:
        for p, part in self.coordinates.with_parts(direction):
            if p.ndim == 2:
                a, b = (part.new_empty(size).normal_(generator=generator) for size in p.shape)
                torch.mul(a[:, None], b, out=part)
            else:
                part.normal_(generator=generator)

    def worth(self, losses: Tensor) -> Tensor:
        finite, n = losses[losses.isfinite()], losses.numel()
        spread = finite.std(correction=0) if len(finite) else finite.new_zeros(())
        if not spread > 0:
            return torch.zeros_like(losses[:, 0])
        return self.sigma * (losses[:, 0] - losses[:, 1]) / (spread * n**0.5)  # means cancel within a pair

    def uphill(self, slopes: Tensor) -> Tensor:
        return slopes if self.update == "sgd" else adam(self.saved["moments"], slopes)
