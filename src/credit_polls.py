"""Slopes of whole rows of weights from the losses of single tokens, for `DecoderOnlyTransformer`.

A *unit* is one component of what a layer puts out: of a linear map, an embedding or a norm. Move it by a step whose
sign is drawn anew for every token of every sequence, and look at the loss of every scored token. A token's own sign
is independent of all others, so the change of the losses that it can reach (its own and the later ones of its
sequence), times its sign, is an unbiased sample of what the unit is worth at that token. Times what a weight
of the unit reads there, summed over the tokens, it is a sample of the slope of that weight, and of all weights of the
unit at once: one evaluation, where polls of single weights need one each. It is node perturbation (Williams 1992;
Flower and Jabri 1993) with credit only for what comes after; losses alone, no backward pass.

Behind the last attention a token reaches its own loss only, so there the slopes are exact but for the step's curvature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace as Values
from typing import Any

import torch
from torch import Tensor

from closure import Coordinates
from machine import one_thread
from structured_polls import StructuredPolls
from structured_stages import Attention, Embedding, FeedForward, Head, Rank1, Rows, Stage

Enter = Callable[[Stage, Rows, Values, Tensor, Tensor], Rank1 | Tensor | tuple[Tensor, Tensor]]
Read = Callable[[Stage, Rows, Values], Tensor]


@dataclass(frozen=True)
class Site:
    """The units of one kind in a stage.

    Attributes:
        enter: (stage, rows, state, units (k,), change of each (B, k, tokens)) -> the same as a way in of `Stage`.
        reads: by the name of a tensor, what the weights of a unit in it read, (B, tokens, fan_in); of a norm's
            gain, what each unit's own reads.
        bias: the name of a tensor that reads ones.
        at_queries: the units sit where queries are needed: in the last block at the scored tokens only.
    """

    enter: Enter
    reads: dict[str, Read]
    bias: str = ""
    at_queries: bool = False


def enter_stream(stage: Stage, rows: Rows, state: Values, i: Tensor, change: Tensor) -> Rank1:
    return Rank1(change, stage.w.directions[i])


def enter_value(stage: Attention, rows: Rows, state: Values, i: Tensor, change: Tensor) -> Rank1:
    d = len(stage.w.out)
    weights = state.weights[:, i // (d // stage.n_heads)]  # (B, k, queries, T)
    return Rank1((weights @ change[..., None])[..., 0], stage.w.directions[i + d])


def enter_inner(stage: FeedForward, rows: Rows, state: Values, i: Tensor, change: Tensor) -> Rank1:
    scalar = (state.before[:, i] + change).relu_() - state.hidden[:, i + 1]
    return Rank1(scalar, stage.w.directions[i + len(stage.w.outer)])


def enter_scores(name: str) -> Enter:
    return lambda stage, rows, state, i, change: stage.change_scores(stage.w, rows, state, [(name, i, change)])


def enter_norm(stage: Attention | FeedForward, rows: Rows, state: Values, i: Tensor, change: Tensor) -> Tensor:
    return stage.change_norm(stage.w, rows, state, change, i)


def enter_logits(stage: Head, rows: Rows, state: Values, i: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    logits = state.logits[:, :, None] + change * stage.w.directions[i].T[:, None, :, None]  # (C, B, k, S)
    return rows.loss(logits), change


def enter_final_norm(stage: Head, rows: Rows, state: Values, i: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    return enter_logits(stage, rows, state, i + len(stage.w.head), change)


RANK1 = (enter_stream, enter_value, enter_inner)  # these spare the next stage most of its work

SITES: dict[type[Stage], tuple[Site, ...]] = {
    Embedding: (
        Site(
            enter_stream,
            {
                "token": lambda stage, rows, state: state.where[:, : stage.n_tokens].mT,
                "position": lambda stage, rows, state: state.where[:, stage.n_tokens : -1].mT,
            },
        ),
    ),
    Attention: (
        Site(enter_norm, {"gain": lambda stage, rows, state: state.n}, "bias"),
        Site(
            enter_scores("query"),
            {"query": lambda stage, rows, state: stage.queries(rows, state.inputs)},
            "query_bias",
            at_queries=True,
        ),
        Site(enter_scores("key"), {"key": lambda stage, rows, state: state.inputs}),
        Site(enter_value, {"value": lambda stage, rows, state: state.inputs}, "value_bias"),
        Site(
            enter_stream,
            {"out": lambda stage, rows, state: state.sources[:, 1 : 1 + len(stage.w.out)].mT},
            "out_bias",
            at_queries=True,
        ),
    ),
    FeedForward: (
        Site(enter_norm, {"gain": lambda stage, rows, state: state.n}, "bias"),
        Site(enter_inner, {"inner": lambda stage, rows, state: state.inputs[:, 1:].mT}, "inner_bias"),
        Site(enter_stream, {"outer": lambda stage, rows, state: state.hidden[:, 1:].mT}, "outer_bias"),
    ),
    Head: (
        Site(enter_final_norm, {"gain": lambda stage, rows, state: state.n}, "bias"),
        Site(enter_logits, {"head": lambda stage, rows, state: state.n * stage.w.gain + stage.w.bias}, "head_bias"),
    ),
}


class CreditPolls(StructuredPolls):
    """`StructuredPolls` that also tell the slopes of whole units: `credit`.

    Units are numbered from 0 over the sites of all stages, in the order of the model. There are `n_units`; the
    weights of unit u belong to parameter number `unit_parameter[u]`.
    """

    def __init__(self, model: Any, coordinates: Coordinates, loss: Callable[[Any, Any], Tensor], threads: int = 1):
        super().__init__(model, coordinates, loss, threads)
        number = {id(p): i for i, p in enumerate(coordinates.parameters)}
        self.sites, owners = [], []  # stage, site, the numbers of its tensors by their names, its first unit
        for s, stage in enumerate(self.stages):
            for site in SITES[type(stage)]:
                held = {name: number.get(id(stage.tensors.get(name))) for name in (*site.reads, site.bias)}
                held = {name: n for name, n in held.items() if n is not None}
                if held:
                    size = stage.tensors[next(iter(held))].shape[-1 if isinstance(stage, Embedding) else 0]
                    self.sites.append((s, site, held, sum(map(len, owners))))
                    owners.append(torch.full((size,), next(iter(held.values()))))
        self.unit_parameter = torch.cat(owners)
        self.n_units = len(self.unit_parameter)

    @torch.no_grad()
    @one_thread()
    def credit(self, units: Tensor, steps: Tensor, signs: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples of the slopes of all weights of some units; each unit is one evaluation.

        Args:
            units: (K,) distinct unit numbers.
            steps: (K,) by how much each is moved, one way or the other at each token.
            signs: draws which.

        Returns:
            Coordinates (M,), all distinct, and slopes (M,) in float64; none if no token of the batch is scored.

        Raises:
            IndexError: a unit out of range.
        """
        low, high = (int(u) for u in units.aminmax())
        if low < 0 or high >= self.n_units:
            raise IndexError(f"unit {low if low < 0 else high} is out of range: there are {self.n_units}, from 0")
        units, order = units.sort()
        steps = steps[order].to(self.model.head.weight.dtype)
        firsts = [first for *_, first in self.sites] + [self.n_units]
        bounds = torch.searchsorted(units, torch.tensor(firsts)).tolist()
        slopes, coordinates = torch.zeros(len(self.coordinates), dtype=torch.float64), []
        self()  # brings the caches up to date
        for rows in self.rows:
            state, by_token, tasks = self._state(rows, len(self.stages) - 1), rows.each_token(), []
            loss = by_token.loss(state.logits[:, :, None])[:, 0]  # (B, S) at the incumbent
            sign = torch.randint(2, (len(rows.x), len(units), rows.x.shape[1]), generator=signs).to(loss) * 2 - 1
            for (s, site, held, first), begin, end in zip(self.sites, bounds, bounds[1:], strict=False):
                size = self._chunk(rows, s + (site.enter in RANK1))
                for at in range(begin, end, size):
                    some = slice(at, min(at + size, end))
                    tasks.append((by_token, loss, s, site, held, units[some] - first, steps[some], sign[:, some]))
            found = [pair for pairs in self.map(self._credit, tasks) for pair in pairs]
            for where, part in found:
                slopes[where] += part
            coordinates = [where for where, _ in found]  # the same for all rows
        coordinates = torch.cat(coordinates) if coordinates else torch.empty(0, dtype=torch.long)
        return coordinates, slopes[coordinates]

    @torch.no_grad()
    def _credit(self, task: tuple) -> list[tuple[Tensor, Tensor]]:
        """Coordinates and slopes, tensor by tensor, of some units i (k,) of one site."""
        rows, loss, s, site, held, i, step, sign = task
        stage, state = self.stages[s], self._state(rows, s)
        own = s + site.at_queries > len(self.stages) - 3  # behind the last attention a token reaches its own loss only
        if own:
            sign = rows.scored(sign[..., None])[..., 0]  # (B, k, S)
        entry = site.enter(stage, rows, state, i, sign * step[:, None])
        losses = entry[0] if isinstance(stage, Head) else self._behind(rows, s, entry)  # (B, k, S)
        change = losses - loss[:, None]
        if not own:
            change = change @ rows.seen_by_scored  # (B, k, T): of all losses that a token reaches
        credit = change * sign / step[:, None]
        return [self._slopes(stage, site, name, n, i, credit, rows, state) for name, n in held.items()]

    def _slopes(
        self, stage: Stage, site: Site, name: str, number: int, i: Tensor, credit: Tensor, rows: Rows, state: Values
    ) -> tuple[Tensor, Tensor]:
        """Of one tensor: the coordinates (m,) of the weights of units i, and their slopes (m,)."""
        p = self.coordinates.parameters[number]
        start = self.coordinates.ends[number] - p.numel()
        if name == site.bias:
            return start + i, credit.sum((0, 2)).double()
        read = site.reads[name](stage, rows, state).to(credit)  # (B, tokens, fan_in)
        if p.ndim == 1:  # a gain
            return start + i, (credit * read[..., i].mT).sum((0, 2)).double()
        slopes = torch.einsum("bkt,btf->kf", credit, read)
        j = torch.arange(read.shape[-1])
        index = j * p.shape[1] + i[:, None] if isinstance(stage, Embedding) else i[:, None] * p.shape[1] + j
        return (start + index).flatten(), slopes.flatten().double()
