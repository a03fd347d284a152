"""Random search optimization: one random weight at a time, kept if the loss of the batch falls.

Tripathi and Singh 2020, "RSO: a gradient free sampling based approach for training deep neural networks",
arXiv 2005.05955.
"""

import math
from typing import Any

import torch
from torch import Tensor

from config.did_you_mean import one_of
from search.base import LossOnlyOptimizer
from search.both_ways import ask_ahead, try_both_ways
from search.budget import Evaluator

VECTOR_STD = 0.167  # of moves of biases and gains, from the authors' program


class RSO(LossOnlyOptimizer):
    """Move a random weight by a Gaussian step, or else by its opposite, and keep what lowers the loss of the batch.

    Of a weight w of a tensor with I inputs, with N(0, 1) drawn anew for each move, sigma its standard deviation:

        sigma = scale * sqrt(2 / I), or scale * .167 in a vector      (that of the initial weights, He et al. 2015)
        sigma <- sigma * (1 - (1 - final_scale) * min(1, evaluations / anneal_evaluations))
        w <- w + sigma N if that lowers the loss, else w - sigma N if that does, else w

    The paper takes the better of both sides, on a new batch for every weight, from the last layer to the first. Here
    the first side that lowers the loss is taken, which spares the other one, `moves_per_step` moves share a batch,
    and the weights are drawn at random. Candidates are evaluated many at a time, and the moves are those of one
    at a time. `report.loss_after` is the loss that was found for the last move kept.

    Args:
        params: parameters or parameter groups; every group may set a scale for itself.
        unit: "weight", or "row": all weights of a row of a matrix, or all of a vector, move together.
        scale: of sigma.
        final_scale: factor of sigma at the end of the annealing.
        anneal_evaluations: function evaluations over which it gets there; None: it stays.
        moves_per_step: moves on a batch, of at most two evaluations each.
        seed, max_evaluations, max_seconds, target_loss: see `LossOnlyOptimizer`.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        params: Any,
        unit: str = "weight",
        scale: float = 1.0,
        final_scale: float = 0.1,
        anneal_evaluations: int | None = None,
        moves_per_step: int = 64,
        **limits: Any,
    ):
        one_of("unit", unit, ("weight", "row"))
        anneals = anneal_evaluations is None or anneal_evaluations >= 1
        if not (scale > 0 and 0 < final_scale <= 1 and anneals and moves_per_step >= 1):
            raise ValueError(
                f"scale={scale} must be above 0, final_scale={final_scale} in (0, 1], moves_per_step={moves_per_step} "
                f"and anneal_evaluations={anneal_evaluations} at least 1, the latter None (null in YAML) for never"
            )
        super().__init__(params, dict(scale=scale), **limits)
        self.unit, self.final_scale, self.anneal_evaluations = unit, final_scale, anneal_evaluations
        self.moves_per_step = moves_per_step

    def take_step(self, evaluate: Evaluator) -> None:
        (self._move_weights if self.unit == "weight" else self._move_rows)(evaluate, self._sigma())

    def _sigma(self) -> Tensor:
        """(P,) standard deviation of the moves of the weights of each tensor."""
        before = self.evaluations - self.report.evaluations  # this step
        annealed = 0.0 if self.anneal_evaluations is None else min(1.0, before / self.anneal_evaluations)
        std = [math.sqrt(2 / inputs(p)) if p.ndim > 1 else VECTOR_STD for p in self.coordinates.parameters]
        scale = self.by_group(torch.arange(len(std), device="cpu"), "scale") * (1 - (1 - self.final_scale) * annealed)
        return scale * torch.tensor(std, dtype=torch.float64, device="cpu")

    def _move_weights(self, evaluate: Evaluator, sigma: Tensor) -> None:
        m, ways = self.moves_per_step, torch.tensor([1.0, -1.0], dtype=torch.float64, device="cpu")
        drawn = torch.randint(len(self.coordinates), (m,), generator=self.generator, device="cpu")
        normal = torch.randn(m, generator=self.generator, dtype=torch.float64, device="cpu")
        steps = ((sigma[self.coordinates.owner(drawn)] * normal)[:, None] * ways).flatten()  # (2 m,)
        coordinates = drawn.repeat_interleave(2)

        def ask(begin: int, end: int) -> Tensor:
            return evaluate.poll_until(self.report.loss_after, coordinates[begin:end], steps[begin:end])

        ask_ahead(self, evaluate, m, ask, lambda k, loss: self.accept(loss, steps[k : k + 1], coordinates[k : k + 1]))

    def _move_rows(self, evaluate: Evaluator, sigma: Tensor) -> None:
        rows = [
            (number, range(start, start + width))
            for number, (p, end) in enumerate(zip(self.coordinates.parameters, self.coordinates.ends, strict=True))
            for width in [inputs(p) if p.ndim > 1 else max(1, p.numel())]
            for start in range(end - p.numel(), end, width)
        ]
        drawn = torch.randint(len(rows), (self.moves_per_step,), generator=self.generator, device="cpu").tolist()
        widest = max(len(row) for _, row in rows)
        normal = torch.randn(self.moves_per_step, widest, generator=self.generator, dtype=torch.float64, device="cpu")
        like = self.coordinates.empty_like_weights()

        def changes(first: int, last: int) -> Tensor:
            moved = like.new_zeros(last - first, len(like))
            for k, change in zip(range(first, last), moved, strict=True):
                number, row = rows[drawn[k // 2]]
                step = (1 - 2 * (k % 2)) * sigma[number] * normal[k // 2, : len(row)]
                change[row.start : row.stop] = step.to(like)
            return moved

        try_both_ways(self, evaluate, self.moves_per_step, changes)


def inputs(p: Tensor) -> int:
    """How many inputs a row of a tensor has: the fan-in of a linear map."""
    return max(1, math.prod(p.shape[1:]))
