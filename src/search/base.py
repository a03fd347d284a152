"""The contract of optimizers that need losses only.

`LossOnlyOptimizer` owns what they have in common: the numbering of the weights, the report of a step, counts and
limits, why it stopped, and a state that resumes exactly. A subclass writes one method, `take_step`.
docs/extending.md has a worked example.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from search.budget import Evaluator, LimitReached, Limits, StepReport
from search.closure import Candidates, OneByOne
from search.coordinates import Coordinates


class LossOnlyOptimizer(torch.optim.Optimizer, ABC):
    """Base of optimizers that ask for losses and never for gradients.

    A subclass implements `take_step(evaluate)`. In it, it asks `evaluate` for losses (`search.budget.Evaluator`),
    draws random numbers from `generator` only, and changes weights with `accept` or `move` only. What it has to know
    in the next step lies in `saved`: plain values and tensors. Then budgets are kept, a killed run resumes exactly, and
    progress, logs and checkpoints know all they need.

    Weights with `requires_grad=False` are left alone, as gradient optimizers do.

    Args:
        params: parameters or parameter groups.
        defaults: options of a parameter group and their values, such as {"radius": 0.1}; None for none.
        seed: of all random numbers.
        max_evaluations, max_seconds, target_loss: see `search.budget.Limits`.

    Attributes:
        report: what the newest step did, also while it runs.

    Raises:
        ValueError: a limit out of range, a parameter that is not of a floating type, or no weight at all.
    """

    tests_moves = True  # whether it moves only where a loss has fallen, so that moves are worth counting
    _generator: torch.Generator | None = None  # of the running step

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any] | None = None,
        seed: int = 0,
        max_evaluations: int | None = None,
        max_seconds: float | None = None,
        target_loss: float | None = None,
    ):
        self.limits = Limits(max_evaluations, max_seconds, target_loss)
        self.seed, self.report = seed, StepReport()
        super().__init__(params, defaults or {})
        # torch saves and loads keys that are no parameters as they are
        self.state["search"] = {  # type: ignore[index]
            "evaluations": 0, "seconds": 0.0, "steps": 0, "accepted": 0, "stopped_by": None,
        }  # fmt: skip
        self.number_weights()
        self.saved["shape"] = self.shape()

    @abstractmethod
    def take_step(self, evaluate: Evaluator) -> None:
        """Search on the batch at hand; `report.loss_after` is the incumbent's loss there.

        Where a limit is reached, the next question to `evaluate` ends the step.
        """

    def converged(self) -> str | None:
        """A reason of the subclass's own to end, such as "min_radius"; None to go on."""
        return None

    def metrics(self) -> dict[str, float]:
        """What is logged of the newest step, by name."""
        report = self.report
        return {
            "loss": report.loss_before,  # before the step moved: comparable with a gradient run's
            "loss_after": report.loss_after,  # after it, on the same batch
            "accepted": float(report.accepted),
            "evaluations_per_second": report.evaluations / max(report.seconds, 1e-9),
        } | {f"radius_{i}" if i else "radius": radius for i, radius in enumerate(self.radii())}

    def status(self) -> list[str]:
        """What a live display shows beside the counts, such as ["accepted 12", "radius 0.05"]."""
        radii = dict.fromkeys(f"{radius:.3g}" for radius in self.radii())  # equal ones once
        accepted = [f"accepted {self.saved['accepted']:,}"] if self.tests_moves else []
        return [*accepted, *([f"radius {'/'.join(radii)}"] if radii else [])]

    def radii(self) -> list[float]:
        """The radius of each parameter group; none for an optimizer whose groups have no such option."""
        return [group["radius"] for group in self.param_groups if "radius" in group]

    def unread(self) -> dict[str, str]:
        """The options that nothing reads beside the others, each with the reason."""
        return {}

    def remarks(self) -> list[str]:
        """What the user should know of a search that another limit ended, such as how much of a plan was left."""
        return []

    @property
    def needs_nodes(self) -> bool:
        """Whether the closure must answer for nodes too, see `search.closure.AnswersNodes`."""
        return False

    @classmethod
    def parameter_groups(cls, model: nn.Module, parameters: Sequence[nn.Parameter], **options: Any) -> Any:
        """Some parameters of a model, in the groups that the optimizer with these options wants them in."""
        return parameters

    # --- what every subclass has ---

    @property
    def saved(self) -> dict[str, Any]:
        """All that changes from step to step beside the weights and the groups, as plain values and tensors."""
        return self.state["search"]  # type: ignore[index]

    @property
    def evaluations(self) -> int:
        """Function evaluations so far."""
        return self.saved["evaluations"]

    @property
    def stopped_by(self) -> str | None:
        """The limit that ended the search, or None while it goes on."""
        return self.saved["stopped_by"]

    def limit(self) -> str | None:
        """The limit that is reached by now, or None."""
        reached = self.limits.reached(self.evaluations, self.saved["seconds"], self.report.loss_after)
        return reached or self.converged()

    @property
    def generator(self) -> torch.Generator:
        """The random numbers of this step. They follow from the seed and the number of the step: nothing is saved."""
        if self._generator is None:
            self._generator = seeded(self.seed, self.saved["steps"])
        return self._generator

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor], candidates: Candidates | None = None) -> float:  # type: ignore[override]
        """Search on the batch behind `closure`; returns the incumbent's loss at the end of the step.

        The closure is called without gradients. It must return the same loss for the same weights throughout the
        step: evaluate the module in eval mode (`search.closure.forward_only`).

        Args:
            closure: returns the loss at the current weights.
            candidates: answers for many candidates; by default the closure itself if it does, else
                `OneByOne`. (Lightning hides the closure's own methods, so it passes them here.)
        """
        self.report = report = StepReport()
        if self.stopped_by is not None:
            return report.loss_after
        if candidates is None:
            candidates = closure if isinstance(closure, Candidates) else OneByOne(closure, self.coordinates)
        self._generator = None
        evaluate = Evaluator(closure, candidates, self.limits, self.saved, report, self.limit)
        try:
            report.loss_before = report.loss_after = evaluate.loss()
            self.take_step(evaluate)
            evaluate.charge(0)  # the seconds since the last answer
            self.saved["stopped_by"] = self.limit()
        except LimitReached as limit:
            self.saved["stopped_by"] = str(limit)
        self.saved["steps"] += 1
        return report.loss_after

    def accept(self, loss: float | Tensor, changes: Tensor, coordinates: Tensor | None = None) -> None:
        """Move weights as `move` does; this, with its loss, is the new incumbent."""
        self.move(changes, coordinates)
        self.report.loss_after = float(loss)
        self.report.accepted += 1
        self.saved["accepted"] += 1

    def move(self, changes: Tensor, coordinates: Tensor | None = None) -> None:
        """Move all weights by changes (n,), or those at distinct coordinates (M,) by (M,), without a loss for it.

        `report.loss_after` stays as it is.
        """
        self.coordinates.move(changes, coordinates)

    def descend(self, slopes: Tensor) -> None:
        """Move all weights against slopes (n,), by the lr of the group of each, as `move` does."""
        changes = slopes.clone()
        for (_, part), group in zip(self.coordinates.with_parts(changes), self.group_of.tolist(), strict=True):
            part *= -self.param_groups[group]["lr"]
        self.move(changes)

    # --- weights and state ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                raise ValueError(f"a parameter of type {p.dtype} cannot be searched; only floating types can")
        if "search" in self.state:  # else the constructor numbers the weights when it has all groups
            self.number_weights()
            self.saved["shape"] = self.shape()

    def number_weights(self) -> None:
        """Number the weights that may move, over all groups in order; called whenever these have changed."""
        trained = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"] if p.requires_grad]
        self.coordinates = Coordinates(p for _, p in trained)
        self.group_of = torch.tensor([i for i, _ in trained], device="cpu")  # (P,) of each numbered parameter
        if not len(self.coordinates):
            raise ValueError("there are no weights to search: all parameters given are empty or frozen")

    def by_group(self, parameters: Tensor, option: str) -> Tensor:
        """(K,) numbers of parameters -> (K,) an option of the group of each, in float64."""
        values = torch.tensor([group[option] for group in self.param_groups], dtype=torch.float64, device="cpu")
        return values[self.group_of[parameters]]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number_weights()

    def shape(self) -> dict[str, int]:
        """Sizes on which the meaning of `saved` depends: a state of other sizes is refused."""
        return {"weights": len(self.coordinates)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, exactly.

        Raises:
            ValueError: it is of a search of other sizes, or of another kind.
        """
        saved = state_dict["state"].get("search", {}).get("shape")
        if saved != self.shape():
            raise ValueError(f"the state is of another search: its sizes are {saved}, and here {self.shape()}")
        super().load_state_dict(copy.deepcopy(state_dict))  # torch would share what a search changes in place
        self._generator = None


def seeded(seed: int, number: int) -> torch.Generator:
    """A generator of its own for each number of each seed."""
    return torch.Generator("cpu").manual_seed(seed * 1_000_003 + number)
