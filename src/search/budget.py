"""What a search has done and spent: all in all, in its newest step, and whether a limit ends it."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass
class StepReport:
    """What one step did. Filled while the step runs, so that a display can follow a long poll."""

    loss_before: float = math.nan  # on the batch at hand, before any move
    loss_after: float = math.nan  # on the same batch, at the incumbent the step ends with
    polled: int = 0  # directions polled
    to_poll: int = 0  # directions the step may poll at the most
    accepted: int = 0  # moves accepted
    search_accepted: bool = False  # whether one of them was the search step
    shortened: float = 1.0  # length of the search step's moves by now, as a part of what it was at first
    evaluations: int = 0  # function evaluations, the one at the incumbent included
    seconds: float = 0.0


def initial_state() -> dict[str, Any]:
    """All that changes from step to step beside weights and radii; plain values, so it can be saved."""
    return {
        "evaluations": 0,  # function evaluations so far
        "seconds": 0.0,  # spent in steps so far
        "polls": 0,  # passes over all directions begun so far, the current one included
        "cursor": 0,  # directions of the current pass that are done
        "nodes": 0,  # nodes polled so far
        "improved": [],  # per group: any success in this pass?
        "stopped_by": None,  # which limit ended the search
    }


class Budget:
    """Counts the evaluations and seconds of a step, and knows the limits.

    Args:
        options: of the search: max_evaluations, max_seconds and target_loss, None for no limit.
        state: of the search, see `initial_state`.
        report: of the step, which begins now.
    """

    def __init__(self, options: dict[str, Any], state: dict[str, Any], report: StepReport):
        self.options, self.state, self.report = options, state, report
        self._counted = time.perf_counter()

    def spend(self, evaluations: int) -> None:
        """Count evaluations, and the seconds since they were counted last; the one place where either is counted."""
        now = time.perf_counter()
        for counts in (self.state, vars(self.report)):
            counts["evaluations"] += evaluations
            counts["seconds"] += now - self._counted
        self._counted = now

    def affordable(self, evaluations: int) -> int:
        """So many evaluations, or what is left of the budget."""
        limit = self.options["max_evaluations"]
        return evaluations if limit is None else min(evaluations, limit - self.state["evaluations"])

    def exhausted_by(self, groups: Iterable[dict[str, Any]]) -> str | None:
        """The limit that ends the search by now, or None; `groups` are the parameter groups, for their radii."""
        target, evaluations, seconds = (self.options[k] for k in ("target_loss", "max_evaluations", "max_seconds"))
        if target is not None and -math.inf < self.report.loss_after <= target:
            return "target_loss"
        if evaluations is not None and self.state["evaluations"] >= evaluations:
            return "max_evaluations"
        if seconds is not None and self.state["seconds"] >= seconds:
            return "max_seconds"
        if all(group["radius"] < group["min_radius"] for group in groups):
            return "min_radius"
        return None
