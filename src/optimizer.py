"""PatternSearch: direct search on signed coordinates, as a torch optimizer.

It knows parameters and losses, and nothing of Lightning, models or tasks. What it may ask of a closure stands in
`search/closure.py`, what all of its kind have in `search/base.py`, its parts in `poll.py`, `node_polls.py` and
`search_step.py` there.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from search.base import LossOnlyOptimizer
from search.budget import Evaluator
from search.directions import Directions
from search.groups import BLOCKS, polls_for, split_at_last_block, split_matrices
from search.node_polls import poll_nodes
from search.options import ALL, RECOMMENDED, check_group, check_options, check_shares, unread_options
from search.orthogonal import matrices_of, orthogonalised
from search.poll import Move, Poll
from search.search_step import search_step
from search.slopes import SlopeMemory

if TYPE_CHECKING:
    from polls.make import FastPolls


class PatternSearch(LossOnlyOptimizer):
    """Pattern search: direct search by polling signed coordinates, with a search step along remembered slopes.

    1. Take the loss of the incumbent on the batch at hand. Losses of different batches are never compared.
    2. POLL the next `polls_per_step` directions: + and - each coordinate in a seeded random order, at the radius of the
       coordinate's parameter group (`search/directions.py`, `search/poll.py`). With `last_group_share`, the last group
       gets this share of the polls. With `one_sided`, each coordinate is polled once, on the side that its remembered
       slope calls downhill. A candidate is better only if its loss is strictly lower.
       `poll="complete"` polls them all at the same incumbent. `poll="opportunistic"` moves to each that improves, goes
       on from there, and skips the way back (exploratory moves, Hooke and Jeeves 1961).
       With `nodes_per_step`, nodes are polled before: one evaluation tells the slopes of all weights of a node from
       the losses of single tokens (`search/node_polls.py`, `polls/nodes.py`).
    3. SEARCH, if there are `step_lengths`: every poll gives the slope of its coordinate. The remembered slopes of all
       coordinates, each divided by its running root mean square and faded by its age, make one direction
       (`search/slopes.py`; simplex slopes, Custodio and Vicente 2007), with `orthogonalise` orthogonalised in matrices
       (`search/orthogonal.py`). With `join_improving`, all moves of a complete poll that improved are made too. The
       best of the step lengths counts. With `linear_decay`, moves get shorter with the number of evaluations (Defazio
       et al. 2023), and slopes fade more slowly in return. With `weight_decay`, a move takes a part of every matrix off
       too. With `search_first` this comes before the poll.
    4. Move to the best of the complete poll and the search, if it is better than the incumbent; else stay.
    5. A pass over all directions without a success of a group multiplies its radius by `contraction`, any success by
       `expansion` at the end of the pass (Torczon 1997; Audet and Dennis 2003).
    6. Stop when every radius is below `min_radius` or a budget is used up: `stopped_by` says why, steps do nothing.

    Without `step_lengths` and `one_sided` it is the pattern search of the literature. A step is one whole pass, or the
    next `polls_per_step` directions of it: then the pass goes on in the next step, on the next batch.

    Args:
        params: parameters or parameter groups; every group may set radius, contraction, expansion, min_radius and
            max_radius for itself. Weights with `requires_grad=False` are left alone.
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
        search_first: whether the search step comes before the polls: no batch then judges the slopes that it gave.
        tolerance: accept the longest search step that raises the loss of its batch by no more than this part of it, see
            `search.search_step`. None: the best of the lengths, if it improves. Needs `search_first`.
        join_improving: whether the search step makes all moves of a complete poll that improved too: as they were
            polled at the first step length, and shortened in proportion at the others.
        memory, scale_memory, fade: of the remembered slopes, see `search.slopes.SlopeMemory`.
        linear_decay: whether the moves of the search step get shorter, down to 0 at `max_evaluations`; `fade` grows as
            they shrink.
        weight_decay: part of every matrix of the group that a search step of length 1 takes off too (decoupled,
            Loshchilov and Hutter 2019).
        max_evaluations, max_seconds, target_loss: what ends the search, see `search.budget.Limits`.
        nodes_per_step: nodes polled in a step at the most, in a seeded random order, all equally often; None for
            none. The closure must answer `nodes`. `polls_per_step` may then be 0.
        rows_per_step: rows of a larger batch on which nodes are polled, drawn anew in each step by the errors that are
            left in them (`polls.rows.draw_rows`); the search step is judged by the whole batch. None: all rows.
        orthogonalise: Newton-Schulz iterations on the direction of the search step in every matrix of the group, see
            `search.orthogonal`; 0 leaves it as it is. Needs `nodes_per_step`: slopes of single weights are too few.
        orthogonalise_in, weight_decay_in: names of the matrices that these concern, with wildcards, for
            `parameter_groups`.
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

    A closure that answers `poll` (`search/closure.py`) is asked for many candidates at a time, with the same decisions.
    `PatternSearch.recommended(model, loss)` makes such closures, and the search of the main command.
    """

    _polls: "FastPolls | None" = None  # of a recommended search

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
        search_first: bool = False,
        tolerance: float | None = None,
        join_improving: bool = False,
        memory: float = 0.5,
        scale_memory: float | None = 0.9,
        fade: float | None = 10.0,
        linear_decay: bool = False,
        weight_decay: float = 0.0,
        nodes_per_step: int | None = None,
        rows_per_step: int | None = None,
        orthogonalise: int = 0,
        orthogonalise_in: Sequence[str] = BLOCKS,
        weight_decay_in: Sequence[str] = ALL,
        seed: int = 0,
    ):
        self.options: dict[str, Any] = dict(poll=poll, polls_per_step=polls_per_step, last_group_share=last_group_share)
        self.options |= dict(one_sided=one_sided, nodes_per_step=nodes_per_step, rows_per_step=rows_per_step)
        self.options |= dict(step_lengths=list(step_lengths), tolerance=tolerance)
        self.options |= dict(join_improving=join_improving, search_first=search_first, linear_decay=linear_decay)
        self.options |= dict(memory=memory, scale_memory=scale_memory, fade=fade)
        of_groups = dict(radius=radius, contraction=contraction, expansion=expansion, weight_decay=weight_decay)
        of_groups |= dict(min_radius=min_radius, max_radius=max_radius, orthogonalise=orthogonalise)
        check_options(self.options | of_groups | dict(max_evaluations=max_evaluations, weight_decay_in=weight_decay_in))
        super().__init__(params, of_groups, seed, max_evaluations, max_seconds, target_loss)
        self.saved.update(passes=0, cursor=0, improved=[], nodes=0)  # see `Poll`, `take_step` and `poll_nodes`
        self.state["slopes"] = {}  # type: ignore[index]  # filled by the first step that remembers slopes
        if orthogonalise and not self.matrices:
            raise ValueError(f"orthogonalise={orthogonalise} needs a matrix among the parameters; use 0 for these")
        if polls_per_step is not None and polls_per_step > len(self.directions):
            raise ValueError(
                f"polls_per_step={polls_per_step} is more than the {len(self.directions)} directions of "
                f"{len(self.coordinates)} weights; use None (null in YAML) for all of them"
            )

    def take_step(self, evaluate: Evaluator) -> None:
        """Steps 2 to 5 of the class's description."""
        options, slopes = self.options, self.slopes
        best: Move | None = None
        improving: list[tuple[Tensor, Tensor]] = []
        searched, first = slopes if options["step_lengths"] else None, options["search_first"]
        if self.saved["cursor"] == 0:
            self.saved["improved"] = [False] * len(self.param_groups)
        if searched and first and self.saved["steps"] and (found := self._search(evaluate, searched, None, [])):
            self._accept(found)
        poll = Poll(self.directions, slopes, self._radius_of, self.saved, self.report, options["polls_per_step"])
        if slopes is not None:
            slopes.age()
            if options["nodes_per_step"] and self.limit() is None:
                radius_of = partial(self.by_group, option="radius")
                at_most, rows = options["nodes_per_step"], options["rows_per_step"]
                poll_nodes(evaluate, slopes, radius_of, self.saved, at_most, rows, self.seed)
        if options["poll"] == "opportunistic":
            poll.opportunistic(evaluate, self._accept)
        else:
            best, improving = poll.complete(evaluate)
        if searched and not first:
            best = self._search(evaluate, searched, best, improving) or best
        if best is not None:
            self._accept(best)
        if self.saved["cursor"] == len(self.directions):
            self.saved["cursor"] = 0
            self._update_radii()

    def _search(
        self, evaluate: Evaluator, slopes: SlopeMemory, best: Move | None, improving: list[tuple[Tensor, Tensor]]
    ) -> Move | None:
        """The search step, if it is better than the best of the poll, or than the incumbent."""
        direction = orthogonalised(slopes.direction, slopes.mean, self.matrices)
        for (p, part), group in zip(self.coordinates.with_parts(direction), self.group_of.tolist(), strict=True):
            if p.ndim == 2 and (weight_decay := self.param_groups[group]["weight_decay"]):
                part.sub_(p.detach().to(part), alpha=weight_decay)
        joined = improving if self.options["join_improving"] else []
        lengths = [self.shortened * length for length in self.options["step_lengths"]]
        to_beat = self.report.loss_after if best is None else best.loss
        found = search_step(evaluate, direction, joined, lengths, self.shortened, to_beat, self.options["tolerance"])
        self.report.search_accepted = found is not None
        return found

    def _accept(self, move: Move) -> None:
        before = self.report.loss_after
        self.accept(move.loss, move.changes, move.coordinates)
        if not move.loss < before and math.isfinite(before):  # within the tolerance of the search step
            return
        parameters = slice(None) if move.coordinates is None else self.coordinates.owner(move.coordinates)
        for group in set(self.group_of[parameters].tolist()):
            self.saved["improved"][group] = True

    def _update_radii(self) -> None:
        for group, improved in zip(self.param_groups, self.saved["improved"], strict=True):
            if not improved:
                group["radius"] *= group["contraction"]
            elif group["radius"] < group["max_radius"]:
                group["radius"] = min(group["radius"] * group["expansion"], group["max_radius"])

    def _radius_of(self, coordinates: Tensor) -> Tensor:
        return self.by_group(self.coordinates.owner(coordinates), "radius")

    # --- what it follows from: the slopes so far, the directions of its weights ---

    @property
    def slopes(self) -> SlopeMemory | None:
        """The remembered slopes, if any option needs them."""
        if not (self.options["step_lengths"] or self.options["one_sided"]):
            return None
        memory, scale_memory, fade = (self.options[name] for name in ("memory", "scale_memory", "fade"))
        if fade is not None:  # shorter moves: slopes stay true for longer, and for good when there are none left
            fade = fade / self.shortened if self.shortened else None
        n, like = len(self.coordinates), self.coordinates.parameters[0]
        return SlopeMemory(self.state["slopes"], n, like, memory, scale_memory, fade)  # type: ignore[index]

    @property
    def shortened(self) -> float:
        """Length of the search step's moves in this step, as a part of what it was at first."""
        before, planned = self.evaluations - self.report.evaluations, self.limits.max_evaluations  # before this step
        return 1 - before / planned if self.options["linear_decay"] and planned else 1.0

    def number_weights(self) -> None:
        """Number the weights, and draw up the directions: two for every weight, or one if one side only is polled."""
        super().number_weights()
        sizes: dict[int, int] = {}  # by group; a group without weights that move has none
        for group, p in zip(self.group_of.tolist(), self.coordinates.parameters, strict=True):
            sizes[group] = sizes.get(group, 0) + p.numel()
        share, one_sided = self.options["last_group_share"], self.options["one_sided"]
        self.directions = Directions(list(sizes.values()), share, one_sided, self.seed)
        check_shares(self.options, self.directions.sizes.tolist(), self.directions.shares.tolist())
        iterations = [self.param_groups[group]["orthogonalise"] for group in self.group_of.tolist()]
        self.matrices = matrices_of(self.coordinates, iterations)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        check_group(self.param_groups[-1])
        if "slopes" in self.state:  # it has begun: the pass and the slopes are of the directions there were
            self.saved["cursor"] = 0
            self.state["slopes"].clear()  # type: ignore[index]

    @classmethod
    def recommended(
        cls, model: nn.Module, loss: Callable[[Any, Any], Tensor] | None = None, **options: Any
    ) -> "PatternSearch":
        """The search that does best by default, over all weights of a model: its groups, its constants, fast polls.

        Args:
            model: any module.
            loss: (outputs of the model, batch) -> scalar loss. With it, `polls.on(batch)` is a closure that evaluates
                many candidates in one pass; the model takes batch["x"].
            options: instead of the recommended ones.

        Example:
            >>> import torch
            >>> search = PatternSearch.recommended(nn.Linear(4, 1), lambda out, batch: (out - 1).square().mean())
            >>> losses = [search.step(search.polls.on({"x": torch.randn(64, 4)})) for _ in range(300)]
            >>> losses[-1] < 0.01 * losses[0]
            True
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = cls.parameter_groups(model, parameters, **RECOMMENDED | options)
        search = cls(groups, **RECOMMENDED | dict(polls_per_step=polls_for(groups)) | options)
        if loss is not None:
            from polls.make import make_polls  # here: a search itself knows nothing of models

            search._polls = make_polls(model, search.coordinates, loss)
        return search

    @property
    def polls(self) -> "FastPolls":
        """The fast polls of a search that `recommended` made for a model and its loss."""
        assert self._polls is not None, "only PatternSearch.recommended(model, loss) has fast polls"
        return self._polls

    # --- the contract's questions ---

    def converged(self) -> str | None:
        return "min_radius" if all(group["radius"] < group["min_radius"] for group in self.param_groups) else None

    def metrics(self) -> dict[str, float]:
        return super().metrics() | {"search_accepted": float(self.report.search_accepted or False)}

    def shape(self) -> dict[str, int]:
        return super().shape() | {"directions": len(self.directions)}

    def unread(self) -> dict[str, str]:
        return unread_options(self.defaults | self.options)

    def remarks(self) -> list[str]:
        if self.stopped_by == "max_evaluations" or not self.options["linear_decay"]:
            return []
        ends = f"linear_decay ends at max_evaluations={self.limits.max_evaluations}"
        return [f"the search step still had {self.shortened:.0%} of its length: {ends}"]

    @property
    def needs_nodes(self) -> bool:
        return bool(self.options["nodes_per_step"])

    @classmethod
    def parameter_groups(cls, model: nn.Module, parameters: Sequence[nn.Parameter], **options: Any) -> Any:
        """Groups for the options that concern a part of the weights.

        With `last_group_share` and more than one of `model.blocks`: what comes before the last, and the rest. With
        `orthogonalise` or `weight_decay`: the matrices that `orthogonalise_in` and `weight_decay_in` name, and the
        rest, which is left as it is.
        """
        if options.get("last_group_share") is not None:
            return split_at_last_block(model, parameters)
        named = {"orthogonalise": BLOCKS, "weight_decay": ALL}
        asked = {name: options.get(f"{name}_in", default) for name, default in named.items() if options.get(name)}
        return split_matrices(model, parameters, asked)
