"""What ends a search: limits of evaluations, seconds and loss. And what is charged for what it asks."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from search.closure import AnswersNodes, Candidates, Changes, part_of
from search.losses import improves


@dataclass(frozen=True)
class Limits:
    """What ends a search; None for no limit.

    Attributes:
        max_evaluations: function evaluations, never exceeded.
        max_seconds: seconds spent in steps, looked at before every question to the closure.
        target_loss: the search ends when the incumbent's loss is at or below it.

    Raises:
        ValueError: a limit that would be reached before anything has begun.
    """

    max_evaluations: int | None = None
    max_seconds: float | None = None
    target_loss: float | None = None

    def __post_init__(self) -> None:
        if self.max_evaluations is not None and self.max_evaluations < 1:
            raise ValueError(
                f"max_evaluations={self.max_evaluations} must be at least 1, or None (null in YAML) for no limit"
            )
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds={self.max_seconds} must be above 0, or None (null in YAML) for no limit")

    def reached(self, evaluations: int, seconds: float, loss: float) -> str | None:
        """The limit that ends a search which has come so far, or None."""
        if self.target_loss is not None and -math.inf < loss <= self.target_loss:
            return "target_loss"
        if self.max_evaluations is not None and evaluations >= self.max_evaluations:
            return "max_evaluations"
        if self.max_seconds is not None and seconds >= self.max_seconds:
            return "max_seconds"
        return None


@dataclass
class StepReport:
    """What one step did. Filled while the step runs, so that a display can follow a long one."""

    loss_before: float = math.nan  # on the batch at hand, before any move
    loss_after: float = math.nan  # on the same batch, at the incumbent the step ends with
    accepted: int = 0  # moves accepted
    search_accepted: bool | None = None  # whether one of them was the search step; None without a search step
    done: int = 0  # candidates of the running step that are done
    planned: int = 0  # candidates that the step will take at the most, if that is known
    evaluations: int = 0  # function evaluations, the one at the incumbent included
    seconds: float = 0.0


class LimitReached(Exception):  # noqa: N818 (it is no error)
    """A question that the budget does not allow: the step ends where it is. Its argument names the limit."""


@dataclass
class Evaluator:
    """Asks the closure, and charges the search for every answer; the one place where evaluations are counted.

    Args:
        closure: returns the loss at the current weights.
        candidates: answers for many candidates.
        limits: of the search.
        saved: of the search; its evaluations and seconds are counted up.
        report: of the step.
        limit: the limit that is reached by now, or None; asked before every question.

    Raises:
        LimitReached: from every question that comes when a limit is reached, or that asks for more than is left.
    """

    closure: Callable[[], Tensor]
    candidates: Candidates
    limits: Limits
    saved: dict[str, Any]
    report: StepReport
    limit: Callable[[], str | None]

    def __post_init__(self) -> None:
        self._counted = time.perf_counter()  # when evaluations were counted last

    @property
    def block(self) -> int:
        """Candidates that the closure likes to get in a question."""
        return self.candidates.block

    def affordable(self, evaluations: int) -> int:
        """So many evaluations, or what is left of the budget."""
        limit = self.limits.max_evaluations
        return evaluations if limit is None else min(evaluations, limit - self.saved["evaluations"])

    def loss(self) -> float:
        """The loss at the current weights."""
        self._allow(1)
        loss = float(self.closure())
        self.charge(1)
        return loss

    def poll(self, coordinates: Tensor, steps: Tensor) -> Tensor:
        """Losses (K,) of the candidates weight[coordinates[k]] + steps[k]; both (K,)."""
        self._allow(len(coordinates))
        losses = self.candidates.poll(coordinates, steps)
        self.charge(len(coordinates))
        return losses

    def poll_until(self, loss: float, coordinates: Tensor, steps: Tensor) -> Tensor:
        """The same up to the first that improves on a loss: (k,), k <= K.

        What lies behind it may have been evaluated too. It is not charged, since it will be asked for again.
        """
        self._allow(len(coordinates))
        return self._until(loss, self.candidates.poll(coordinates, steps))

    def trial(self, changes: Tensor, scales: Tensor) -> Tensor:
        """Losses (S,) of the weights with scales[s] * changes added; changes (n,) of all coordinates, scales (S,)."""
        self._allow(len(scales))
        losses = self.candidates.trial(changes, scales)
        self.charge(len(scales))
        return losses

    def perturbed(self, count: int, changes: Changes) -> Tensor:
        """Losses (count,) of candidates that move all weights, by changes(first, last) (last - first, n) of some.

        They are asked for block by block, each counted as done: limits are looked at in between.
        """
        self._allow(count)
        losses: list[Tensor] = []
        for first in range(0, count, self.block):
            size = min(self.block, count - first)
            self._allow(size)
            losses.append(self.candidates.perturbed(size, part_of(changes, first)))
            self.charge(size)
            self.report.done += size
        return torch.cat(losses)

    def perturbed_until(self, loss: float, count: int, changes: Changes) -> Tensor:
        """The same up to the first that improves on a loss, as `poll_until`; none of them is counted as done."""
        self._allow(count)
        return self._until(loss, self.candidates.perturbed(count, changes))

    def nodes(
        self, nodes: Tensor, steps: Tensor, signs: torch.Generator, rows: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples (n,) of the slopes of all weights of K nodes, and which these are, (n,); nodes and steps are (K,).

        On rows of the batch that are drawn first, or on all for None.
        """
        candidates = self.candidates
        assert isinstance(candidates, AnswersNodes)
        self._allow(len(nodes))
        if rows is not None:
            candidates = candidates.drawn(rows, signs)
        found = candidates.nodes(nodes, steps, signs)
        self.charge(len(nodes))
        return found

    def _until(self, loss: float, losses: Tensor) -> Tensor:
        better = improves(losses, loss).nonzero().flatten()
        losses = losses[: int(better[0]) + 1] if len(better) else losses
        self.charge(len(losses))
        return losses

    def _allow(self, evaluations: int) -> None:
        if self.report.evaluations and (limit := self.limit()):  # the first question of a step is always allowed
            raise LimitReached(limit)
        if self.affordable(evaluations) < evaluations:
            raise LimitReached("max_evaluations")

    def charge(self, evaluations: int) -> None:
        """Count evaluations, and the seconds since they were counted last."""
        now = time.perf_counter()
        for counts in (self.saved, vars(self.report)):
            counts["evaluations"] += evaluations
            counts["seconds"] += now - self._counted
        self._counted = now
