"""POLL: the next directions of a pass, at the incumbent or from one success to the next.

A pass takes every direction once. A step takes the whole pass or a part of it, and the next step goes on from there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search.budget import Evaluator, StepReport
from search.directions import Directions
from search.losses import improves, lowest, within_rounding
from search.slopes import SlopeMemory

MAX_BLOCK = 1024  # directions drawn up at a time: memory stays bounded, budgets are looked at in between


@dataclass(frozen=True)
class Move:
    """A step to other weights, and the loss there.

    Attributes:
        loss: there.
        changes: by how much the weights move: all (n,), or some (M,).
        coordinates: (M,) which; None for all.
    """

    loss: float
    changes: Tensor
    coordinates: Tensor | None = None


class Poll:
    """The part of a pass that one step takes.

    Args:
        directions: of the pass.
        slopes: what is remembered; every poll adds to it. None remembers nothing.
        radius_of: (K,) coordinates -> (K,) poll radii.
        saved: of the search; here its `passes` begun and the `cursor` in the current one.
        report: of the step.
        at_most: directions that a step takes; None for the rest of the pass.
    """

    def __init__(
        self,
        directions: Directions,
        slopes: SlopeMemory | None,
        radius_of: Callable[[Tensor], Tensor],
        saved: dict[str, Any],
        report: StepReport,
        at_most: int | None,
    ):
        self.directions, self.slopes, self.radius_of = directions, slopes, radius_of
        self.saved, self.report = saved, report
        if saved["cursor"] == 0:
            saved["passes"] += 1
        self.end = len(directions) if at_most is None else min(len(directions), saved["cursor"] + at_most)
        report.planned = self.end - saved["cursor"]

    def complete(self, evaluate: Evaluator) -> tuple[Move | None, list[tuple[Tensor, Tensor]]]:
        """Poll all at the same incumbent; the best move that improves on it, and all that do.

        The latter block by block: by how much they move which coordinates, (M,) each.
        """
        best: Move | None = None
        improving, incumbent = [], self.report.loss_after
        while self.left and evaluate.limit() is None:
            n = evaluate.affordable(min(evaluate.block, MAX_BLOCK, self.left))
            coordinates, steps = self.take(n)
            losses = evaluate.poll(coordinates, steps)
            self.advance(n)
            self.learn(coordinates, steps, losses)
            better = np.flatnonzero(improves(losses, incumbent).numpy())
            if len(better):
                k, values = lowest(losses), losses.tolist()
                if best is None or values[k] < best.loss:
                    best = Move(values[k], steps[k : k + 1], coordinates[k : k + 1])
                improving.append((steps[better], coordinates[better]))
        return best, improving

    def opportunistic(self, evaluate: Evaluator, accept: Callable[[Move], None]) -> None:
        """Move to each that improves, go on from there, and skip the way back (Hooke and Jeeves 1961)."""
        while self.left and evaluate.limit() is None:
            start, ahead = self.saved["cursor"], 1
            coordinates, steps = self.take(min(self.left, MAX_BLOCK))
            while (done := self.saved["cursor"] - start) < len(coordinates) and evaluate.limit() is None:
                asked = slice(done, done + evaluate.affordable(min(ahead, evaluate.block)))
                losses = evaluate.poll_until(self.report.loss_after, coordinates[asked], steps[asked])
                polled = slice(done, done + len(losses))
                success = improves(losses, self.report.loss_after).tolist()[-1]
                ahead = 1 if success else 2 * ahead  # so ask for few where successes are frequent
                self.advance(len(losses))
                self.learn(coordinates[polled], steps[polled], losses)
                if success:
                    last = slice(polled.stop - 1, polled.stop)
                    accept(Move(losses.tolist()[-1], steps[last], coordinates[last]))
                    way_back_is_next = not self.directions.one_sided and self.saved["cursor"] % 2 == 1
                    if way_back_is_next:
                        self.advance(1)

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """The next n directions: coordinates (n,) and signed steps (n,)."""
        start = (self.saved["passes"] - 1) * len(self.directions) + self.saved["cursor"]
        coordinates, signs = self.directions.take(start, start + n, self.slopes)
        return coordinates, signs * self.radius_of(coordinates)

    def advance(self, n: int) -> None:
        """Count n directions as done."""
        n = min(n, self.left)
        self.saved["cursor"] += n
        self.report.done += n

    @property
    def left(self) -> int:
        """Directions still to poll in this step."""
        return self.end - self.saved["cursor"]

    def learn(self, coordinates: Tensor, steps: Tensor, losses: Tensor) -> None:
        """Remember the slopes that polls (K,) at the present incumbent gave."""
        if self.slopes is None:
            return
        changes = losses - self.report.loss_after
        if self.report.accepted:  # that loss was a candidate's, computed in another order: a weight may change nothing
            incumbent = torch.tensor(self.report.loss_after, dtype=self.slopes.direction.dtype, device="cpu")
            changes = changes.masked_fill(within_rounding(losses, incumbent), 0)
        self.slopes.learn_polls(coordinates, changes / steps)
