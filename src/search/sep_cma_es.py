"""Separable CMA-ES: a normal distribution whose mean, length of step and variances adapt to ranks of losses.

Ros and Hansen 2008, "A simple modification in CMA-ES achieving linear time and space complexity". The algorithm is that
of the library `cmaes`; here it is asked and told, and kept.
"""

from typing import Any

import numpy as np
import torch
from cmaes import SepCMA
from torch import Tensor

from search.base import LossOnlyOptimizer
from search.budget import Evaluator


class SepCMAES(LossOnlyOptimizer):
    """A generation on every batch; the weights are the mean of the distribution.

    No move is refused, and `report.loss_after` stays the loss before the step. The library's own rules to stop are
    not asked: they compare losses of different batches.

    Args:
        params: parameters or parameter groups, of at least two weights.
        sigma: standard deviation of the first candidates, in units of the weights.
        population_size: candidates of a generation; None for the library's, 4 + 3 ln n.
        seed, max_evaluations, max_seconds, target_loss: see `LossOnlyOptimizer`. A generation that the budget does not
            allow is not begun.

    Raises:
        ValueError: an option out of range, or a single weight.
    """

    tests_moves = False

    def __init__(self, params: Any, sigma: float = 0.03, population_size: int | None = None, **limits: Any):
        if not sigma > 0 or (population_size is not None and population_size < 2):
            raise ValueError(f"sigma={sigma} must be above 0, and population_size={population_size} at least 2")
        super().__init__(params, {}, **limits)
        if len(self.coordinates) < 2:
            raise ValueError("sep_cma_es needs at least two weights")
        self.sigma, self.population_size = sigma, population_size

    def take_step(self, evaluate: Evaluator) -> None:
        weights = torch.cat([p.detach().flatten() for p in self.coordinates.parameters]).cpu().double()  # (n,)
        cma = self.restored(weights)
        cma.reseed_rng(int(torch.randint(2**32, (1,), generator=self.generator, device="cpu")))
        self.report.planned = cma.population_size
        asked = np.stack([cma.ask() for _ in range(cma.population_size)])  # (K, n)
        changes = torch.from_numpy(asked) - weights
        like = self.coordinates.parameters[0]
        losses = evaluate.perturbed(len(asked), lambda first, last: changes[first:last].to(like))
        if losses.isfinite().any():
            cma.tell(list(zip(asked, losses.where(losses.isfinite(), torch.inf).tolist(), strict=True)))
        if np.isfinite(cma.mean).all():
            self.saved["cma"] = {name: as_tensor(value) for name, value in cma.__getstate__().items()}
            self.move((torch.from_numpy(cma.mean) - weights).to(like))

    def restored(self, weights: Tensor) -> SepCMA:
        """The library's object as the last step left it, by pickle's protocol; at first one around the weights (n,)."""
        state = self.saved.get("cma")
        if state is None or len(state["_mean"]) != len(weights):
            return SepCMA(weights.numpy().copy(), self.sigma, population_size=self.population_size)
        cma = SepCMA.__new__(SepCMA)
        cma.__setstate__(
            {name: value.numpy().copy() if isinstance(value, Tensor) else value for name, value in state.items()}
        )
        return cma


def as_tensor(value: Any) -> Any:
    """An array as a tensor, a number of numpy's as a plain one: what a checkpoint may hold."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.item() if isinstance(value, np.generic) else value
