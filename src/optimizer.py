"""PatternSearch: direct search on signed coordinates, as a torch optimizer.

It knows parameters and losses, and nothing of Lightning, models or tasks. What it may ask of a
closure stands in `search/closure.py`.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from search.budget import Budget, StepReport, initial_state
from search.closure import Candidates, OneByOne
from search.coordinates import Coordinates
from search.directions import Directions, next_nodes, seeded
from search.options import check_group, check_options, check_shares
from search.slopes import SlopeMemory

Move = tuple[Tensor, Tensor, Tensor]  # loss there, coordinates, steps
MAX_BLOCK = 1024  # directions drawn up at a time: memory stays bounded, budgets are looked at in between


class PatternSearch(torch.optim.Optimizer):
    """Pattern search: direct search by polling signed coordinates, with a search step along remembered slopes.

    1. The loss of the incumbent is taken on the batch at hand. Losses of different batches are never
       compared.
    2. POLL the next `polls_per_step` directions: + and - each coordinate in a seeded random order, at the
       radius of the coordinate's parameter group. With `last_group_share`, the last group gets this share of the
       polls. With `one_sided`, each coordinate is polled once, on the side that its remembered slope calls
       downhill. A candidate is better only if its loss is strictly lower; losses that are not finite are worse
       than any.
       `poll="complete"` polls them all at the same incumbent. `poll="opportunistic"` moves to each that
       improves, goes on from there, and skips the way back (exploratory moves, Hooke and Jeeves 1961).
       With `nodes_per_step`, nodes are polled before: one evaluation tells the slopes of all weights of a node
       from the losses of single tokens (`polls/nodes.py`).
    3. SEARCH, if there are `step_lengths`: every poll gives the slope of its coordinate. The remembered
       slopes of all coordinates, each divided by its running root mean square and faded by its age, make
       one direction (`search/slopes.py`; simplex slopes, Custodio and Vicente 2007). With `join_improving`, all moves
       of a complete poll that improved are made at the same time (as exploratory moves add up, Hooke and Jeeves
       1961). The best of the step lengths counts. With `half_after`, moves get shorter with the number of evaluations
       (Robbins and Monro 1951), and slopes fade more slowly in return.
    4. Move to the best of the complete poll and the search, if it is better than the incumbent; else stay.
    5. A pass over all directions without a success of a group is a failed poll of this group: its radius
       is multiplied by `contraction`. Any success multiplies it by `expansion` at the end of the pass
       (Torczon 1997; Audet and Dennis 2003).
    6. The search stops when every radius is below `min_radius` or a budget is used up; from then on
       `stopped_by` says why and steps do nothing.

    Without `step_lengths` and `one_sided` it is the pattern search of the literature. A step is one whole
    pass, or the next `polls_per_step` directions of it: then the pass goes on in the next step, on the
    next batch, where this one left off.

    Args:
        params: parameters or parameter groups; every group may set radius, contraction,
            expansion, min_radius and max_radius for itself. All their weights are searched, whatever
            `requires_grad` says, since no gradient is needed: to keep a weight, leave it out.
        radius: initial poll radius (mesh size), in units of the weights.
        poll: "opportunistic" or "complete".
        polls_per_step: directions polled in a step at the most; None for the whole pass.
        last_group_share: share in (0, 1) of the polls that go to the last of several parameter groups; the others get
            the rest by their numbers of weights. None: all groups by these. Each group is then taken in an order of
            its own, again and again, and a pass is as many polls as there are directions.
        contraction: factor in (0, 1] of the radius after a failed poll; 1 keeps it.
        expansion: factor >= 1 of the radius after a successful one; 1 never expands.
        min_radius: the search ends when the radius of every group has fallen below it.
        max_radius: expansion stops here.
        one_sided: poll each coordinate once a pass, on the side that is remembered as downhill.
        step_lengths: lengths at which the search step is tried, in units of the weights for a coordinate whose
            slopes all agree; none for no search step.
        join_improving: whether the search step makes all moves of a complete poll that improved too: as they were
            polled at the first step length, and shortened in proportion at the others.
        memory, scale_memory, fade: of the remembered slopes, see `search.slopes.SlopeMemory`.
        half_after: function evaluations after which the moves of the search step are half as long, and a third after
            twice as many; `fade` grows as they shrink. None: they stay as they are.
        max_evaluations: budget of function evaluations, never exceeded.
        max_seconds: budget of seconds spent in steps, looked at before every call of the closure.
        target_loss: the search ends when the incumbent's loss is at or below it.
        nodes_per_step: nodes polled in a step at the most, in a seeded random order, all equally often; None for
            none. The closure must answer `nodes`. `polls_per_step` may then be 0.
        seed: seeds the order of the directions and of the nodes.

    Raises:
        ValueError: an option outside its range, a parameter that is not of a floating type, or no weight at all.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> search = PatternSearch([w], radius=1.0, min_radius=1e-3)
        >>> while search.stopped_by is None:
        ...     loss = search.step(lambda: (w**2).sum())
        >>> search.stopped_by, w.tolist()
        ('min_radius', [0.0, 0.0])

    The closure is called without gradients and must return the same loss for the same weights
    throughout a step: evaluate the module in eval mode (`search.closure.forward_only`). If it also
    answers `poll` (see `search/closure.py`), candidates are asked for many at a time, and the search
    takes the same decisions.
    """

    derivative_free = True  # tells a training loop to call step(closure) and to leave backward out

    def __init__(
        self,
        params: Any,
        radius: float = 0.1,
        poll: str = "opportunistic",
        polls_per_step: int | None = None,
        last_group_share: float | None = None,
        contraction: float = 0.5,
        expansion: float = 1.0,
        min_radius: float = 1e-6,
        max_radius: float = math.inf,
        max_evaluations: int | None = None,
        max_seconds: float | None = None,
        target_loss: float | None = None,
        one_sided: bool = False,
        step_lengths: Sequence[float] = (),
        join_improving: bool = False,
        memory: float = 0.5,
        scale_memory: float | None = 0.9,
        fade: float | None = 10.0,
        half_after: float | None = None,
        nodes_per_step: int | None = None,
        seed: int = 0,
    ):
        self.options = dict(poll=poll, polls_per_step=polls_per_step, last_group_share=last_group_share, seed=seed)
        self.options |= dict(one_sided=one_sided, nodes_per_step=nodes_per_step, step_lengths=list(step_lengths))
        self.options |= dict(join_improving=join_improving, half_after=half_after)
        self.options |= dict(memory=memory, scale_memory=scale_memory, fade=fade)
        self.options |= dict(max_evaluations=max_evaluations, max_seconds=max_seconds, target_loss=target_loss)
        check_options(self.options)
        group_defaults = dict(radius=radius, contraction=contraction, expansion=expansion)
        super().__init__(params, group_defaults | dict(min_radius=min_radius, max_radius=max_radius))
        self.state["slopes"] = {}  # filled by the first step that remembers slopes
        self.state["search"] = initial_state()  # torch saves and loads keys that are no parameters as they are
        self.report = StepReport()
        if not len(self.coordinates):
            raise ValueError("there are no weights to search: all parameters given are empty")
        if polls_per_step is not None and polls_per_step > len(self.directions):
            raise ValueError(
                f"polls_per_step={polls_per_step} is more than the {len(self.directions)} directions of "
                f"{len(self.coordinates)} weights; use None (null in YAML) for all of them"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_group(group)
        self._coordinates = self._directions = None  # both follow the groups
        if "search" in self.state:  # it has begun: the pass and the slopes are of the directions there were
            self.state["search"]["cursor"] = 0
            self.state["slopes"].clear()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"options": self.options, "report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._coordinates = self._directions = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(copy.deepcopy(state_dict))  # torch would share what this search changes in place

    @property
    def evaluations(self) -> int:
        """Function evaluations so far: the losses that the search based its decisions on."""
        return self.state["search"]["evaluations"]

    @property
    def stopped_by(self) -> str | None:
        """The limit that ended the search, or None while it goes on."""
        return self.state["search"]["stopped_by"]

    def look_at_limits(self) -> None:
        """Take back that a limit ended the search, if it no longer would: a loaded search has the limits given here."""
        self._budget = Budget(self.options, self.state["search"], self.report)
        self.state["search"]["stopped_by"] = self._limit_reached()

    def _limit_reached(self) -> str | None:
        return self._budget.exhausted_by(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor], candidates: Candidates | None = None) -> float:
        """Poll on the batch behind `closure`; returns the incumbent's loss at the end of the step.

        Args:
            closure: returns the loss at the current weights.
            candidates: answers `poll`; by default the closure itself if it has such a method, else
                `OneByOne`. (Lightning hides the closure's own methods, so it passes them here.)
        """
        search, report = self.state["search"], StepReport()
        self.report = report
        if search["stopped_by"] is not None:
            return report.loss_after
        if candidates is None:
            candidates = closure if hasattr(closure, "poll") else OneByOne(closure, self.coordinates)
        self._budget = Budget(self.options, search, report)
        if (half_after := self.options["half_after"]) is not None:
            report.shortened = 1 / (1 + search["evaluations"] / half_after)
        report.loss_before = report.loss_after = float(closure())
        self._budget.spend(1)

        if search["cursor"] == 0:  # a new pass over all directions begins
            search["polls"] += 1
            search["improved"] = [False] * len(self.param_groups)
        polls = self.options["polls_per_step"]
        end = len(self.directions) if polls is None else min(len(self.directions), search["cursor"] + polls)
        report.to_poll = end - search["cursor"]
        if self.slopes:
            self.slopes.age()
        if self.options["nodes_per_step"] and self._limit_reached() is None:
            self._poll_nodes(candidates)

        if self.options["poll"] == "opportunistic":
            self._poll_opportunistic(candidates, end)
            best, improving = None, []
        else:
            best, improving = self._poll_complete(candidates, end)
        if self.options["step_lengths"]:
            best = self._search(candidates, best, improving if self.options["join_improving"] else [])
        if best is not None:
            self._accept(*best)

        if search["cursor"] == len(self.directions):
            search["cursor"] = 0
            self._update_radii()
        search["stopped_by"] = self._limit_reached()
        return report.loss_after

    def _poll_opportunistic(self, candidates: Candidates, end: int) -> None:
        """Poll the directions up to `end`; move to each that improves, and go on from there."""
        search, report = self.state["search"], self.report
        while search["cursor"] < end and self._limit_reached() is None:
            start, ahead = search["cursor"], 1
            coordinates, steps = self._take(start, min(end, start + MAX_BLOCK))
            while (done := search["cursor"] - start) < len(coordinates) and self._limit_reached() is None:
                asked = slice(done, done + self._budget.affordable(min(ahead, candidates.block)))
                losses = candidates.poll(coordinates[asked], steps[asked])
                better = _improves(losses, report.loss_after).nonzero().flatten().tolist()
                # what lies behind the first success was asked for too early: it is asked for again, and not counted
                used = better[0] + 1 if better else len(losses)
                ahead = 1 if better else 2 * ahead  # so ask for few where successes are frequent
                self._budget.spend(used)
                self._advance(used, end)
                self._learn(coordinates[done : done + used], steps[done : done + used], losses[:used])
                if better:
                    k = done + used - 1
                    self._accept(losses[used - 1], coordinates[k : k + 1], steps[k : k + 1])
                    if search["cursor"] % 2 and not self.options["one_sided"]:  # + succeeded: - would only lead back
                        self._advance(1, end)

    def _poll_complete(self, candidates: Candidates, end: int) -> tuple[Move | None, list[Move]]:
        """Poll the directions up to `end` at the same incumbent; the best move that improves on it, and all of them."""
        search, best_loss, best, improving = self.state["search"], self.report.loss_after, None, []
        while search["cursor"] < end and self._limit_reached() is None:
            size = self._budget.affordable(min(candidates.block, MAX_BLOCK, end - search["cursor"]))
            coordinates, steps = self._take(search["cursor"], search["cursor"] + size)
            losses = candidates.poll(coordinates, steps)
            self._budget.spend(size)
            self._advance(size, end)
            self._learn(coordinates, steps, losses)
            k = _lowest(losses)
            if _improves(losses[k], best_loss):
                best_loss, best = float(losses[k]), (losses[k], coordinates[k : k + 1], steps[k : k + 1])
            better = _improves(losses, self.report.loss_after)
            improving.append((losses[better], coordinates[better], steps[better]))
        return best, improving

    def _poll_nodes(self, candidates: Candidates) -> None:
        """Poll the next nodes of a random order of all: each tells the slopes of all its weights."""
        if not hasattr(candidates, "nodes"):
            raise ValueError(
                "nodes_per_step needs a closure that answers `nodes`; `polls.nodes.NodePolls` does for a "
                "DecoderOnlyTransformer (task.fast_polls=true on a CPU); else use nodes_per_step=None (null in YAML)"
            )
        done, seed = self.state["search"]["nodes"], self.options["seed"]
        nodes = next_nodes(done, candidates.n_nodes, self.options["nodes_per_step"], seed)
        nodes = nodes[: self._budget.affordable(len(nodes))]
        steps = self._radii(candidates.node_parameter[nodes])
        coordinates, slopes = candidates.nodes(nodes, steps, seeded(seed, done))
        self.state["search"]["nodes"] += len(nodes)
        self._budget.spend(len(nodes))
        self.slopes.learn(coordinates, slopes)

    def _search(self, candidates: Candidates, best: Move | None, joined: list[Move]) -> Move | None:
        """Try all remembered slopes and the `joined` moves together, at every step length; the best, or `best`."""
        lengths, coordinates = self.options["step_lengths"], torch.arange(len(self.coordinates))
        move = lengths[0] * self.slopes.direction
        for _, where, steps in joined:
            move.index_add_(0, where, steps.to(move))
        move *= self.report.shortened
        if not move.any() or self._limit_reached() is not None:
            return best
        scales = torch.tensor(lengths[: self._budget.affordable(len(lengths))], dtype=move.dtype) / lengths[0]
        losses = candidates.trial(coordinates, move, scales)
        self._budget.spend(len(scales))
        k = _lowest(losses)
        if not _improves(losses[k], float(best[0]) if best is not None else self.report.loss_after):
            return best
        self.report.search_accepted = True
        return losses[k], coordinates, scales[k] * move

    def _accept(self, loss: Tensor, coordinates: Tensor, steps: Tensor) -> None:
        """Move the weights at the coordinates, and make this the incumbent."""
        if len(coordinates) == 1:
            self.coordinates.move_one(int(coordinates), float(steps))
        else:
            self.coordinates.move(coordinates, steps)
        moved = self.coordinates.owner(coordinates).bincount(minlength=len(self.coordinates.parameters)).tolist()
        for group, weights in zip(self._group_of_parameter, moved, strict=True):
            self.state["search"]["improved"][group] |= weights > 0
        self.report.loss_after = float(loss)
        self.report.accepted += 1

    # --- the slopes that polls give ---

    @property
    def slopes(self) -> SlopeMemory | None:
        """The remembered slopes, if any option needs them."""
        if not (self.options["step_lengths"] or self.options["one_sided"]):
            return None
        p = self.coordinates.parameters[0]
        dtype = p.dtype if p.dtype == torch.float64 else torch.float32
        memory = {name: self.options[name] for name in ("memory", "scale_memory", "fade")}
        if memory["fade"] is not None:
            memory["fade"] /= self.report.shortened  # shorter moves: slopes stay true for longer
        return SlopeMemory(self.state["slopes"], len(self.coordinates), dtype, **memory)

    def _learn(self, coordinates: Tensor, steps: Tensor, losses: Tensor) -> None:
        if self.slopes:
            self.slopes.learn_polls(coordinates, (losses - self.report.loss_after) / steps)

    def _advance(self, directions: int, end: int) -> None:
        cursor = min(self.state["search"]["cursor"] + directions, end)
        self.report.polled += cursor - self.state["search"]["cursor"]
        self.state["search"]["cursor"] = cursor

    def _update_radii(self) -> None:
        for group, improved in zip(self.param_groups, self.state["search"]["improved"], strict=True):
            if not improved:
                group["radius"] *= group["contraction"]
            elif group["radius"] < group["max_radius"]:
                group["radius"] = min(group["radius"] * group["expansion"], group["max_radius"])

    # --- coordinates and directions ---

    @property
    def coordinates(self) -> Coordinates:
        """The numbering of all weights of all groups, in order."""
        if self._coordinates is None:
            self._coordinates = Coordinates(p for group in self.param_groups for p in group["params"])
        return self._coordinates

    @property
    def directions(self) -> Directions:
        """The directions of a pass: two for every weight, or one if it is polled on one side only."""
        if self._directions is None:
            sizes = [len(Coordinates(group["params"])) for group in self.param_groups]
            share, one_sided, seed = (self.options[name] for name in ("last_group_share", "one_sided", "seed"))
            self._directions = Directions(sizes, share, one_sided, seed)
            check_shares(self.options, self._directions.sizes.tolist(), self._directions.shares.tolist())
        return self._directions

    def _take(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Directions start .. end of the pass: coordinates (end - start,) and signed steps (end - start,)."""
        before = (self.state["search"]["polls"] - 1) * len(self.directions)  # polled in earlier passes
        coordinates, signs = self.directions.take(before + start, before + end, self.slopes)
        return coordinates, signs * self._radii(self.coordinates.owner(coordinates))

    def _radii(self, parameters: Tensor) -> Tensor:
        """(K,) numbers of parameters -> (K,) the radius of the group of each."""
        radius = torch.tensor([group["radius"] for group in self.param_groups], dtype=torch.float64)
        return radius[torch.tensor(self._group_of_parameter)[parameters]]

    @property
    def _group_of_parameter(self) -> list[int]:
        return [i for i, group in enumerate(self.param_groups) for _ in group["params"]]


def _improves(losses: Tensor, loss: float) -> Tensor:
    """Strictly lower, and finite. Any finite loss improves on an incumbent whose loss is not finite."""
    incumbent = loss if math.isfinite(loss) else math.inf
    return torch.isfinite(losses) & (losses < incumbent)


def _lowest(losses: Tensor) -> int:
    return int(torch.where(torch.isfinite(losses), losses, math.inf).argmin())
