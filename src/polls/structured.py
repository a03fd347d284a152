"""Losses of many candidates in one pass for `DecoderOnlyTransformer`, at a multiple of inference speed.

A candidate moves one weight. For a weight that writes the residual stream, or sits one activation
before one that does, the stream behind it changes by a rank-1 term: a scalar for every token, times
one fixed direction. So nothing in front of the weight is computed again, its own layer costs almost
nothing, and the layers behind it run once for all candidates together, with the same weights.

    the weight moved by r        scalar per token                      direction
    ff.outer[i, j]               r hidden_j                            e_i
    ff.inner[i, j]               relu(u_i + r input_j) - relu(u_i)     column i of ff.outer
    attention.out[i, j]          r mixed_j                             e_i
    attention.value[i, j]        r (its head's weights on input_j)     column i of attention.out
    embeddings [v, j]            r where the token (position) is v     e_j

Queries and keys change the scores of one head; gains and biases of a norm change what follows by a
rank-1 term in front of the next activation; final norm and head change the logits by one.

The stages that the model is a chain of stand in `polls/stages.py`.
"""

import copy
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from types import SimpleNamespace as Values
from typing import Any

import torch
from torch import Tensor

from data.sequences import IGNORE
from polls.generic import WILD, GenericPolls, Incumbent, check_block, check_scales
from polls.stages import Attention, Embedding, FeedForward, Head, Moves, Rank1, Rows
from polls.threads import one_thread
from search.coordinates import Coordinates
from transformer import DecoderOnlyTransformer

CHUNK_TOKENS = 4096  # tokens of all candidates at a time: large enough to hide the cost of calling an operator
ROW_TOKENS = 4096  # tokens of the incumbent at a time, so that a chunk never holds more
PART_COST = 2**20  # tokens x weights of the blocks: measured, about what it costs to call the operators for more rows
CACHE_BYTES = 2**28  # what may be remembered of the incumbent; rows beyond are computed anew in every call


class StructuredPolls:
    """Answers `poll` and `trial` (see `search/closure.py`) for a `DecoderOnlyTransformer`, exact up to rounding.

    Long-lived: it keeps the folded weights from batch to batch, and a closure keeps what the incumbent
    computes on its batch. Both notice by themselves when a weight was changed in place, and compute anew
    only what the change reaches. Equal rows of a batch are evaluated once and weighed. A candidate that
    changes nothing has exactly the incumbent's loss; one whose loss is not finite, or that changes the
    stream beyond reason, gets the loss of the plain forward.

    Memory: at most CACHE_BYTES for the incumbent and CHUNK_TOKENS tokens (or one candidate on one chunk
    of at most ROW_TOKENS tokens) for the candidates, whatever K and B.

    Args:
        model: evaluated in eval mode, without gradients.
        coordinates: numbers the weights that may move, all of them parameters of `model`.
        loss: (logits, batch) -> mean cross-entropy over the scored tokens of batch["y"]. It is called by
            the plain forward; the structured one computes that mean by itself.
        threads: chunks of candidates that are evaluated at the same time. Results do not depend on it: chunks
            have fixed sizes, and every operation runs on one thread.

    Raises:
        ValueError, IndexError: as `GenericPolls`.
    """

    def __init__(
        self,
        model: DecoderOnlyTransformer,
        coordinates: Coordinates,
        loss: Callable[[Any, Any], Tensor],
        threads: int = 1,
    ):
        self.model, self.coordinates = model, coordinates
        self.generic = GenericPolls(model, coordinates, loss)
        with torch.no_grad():
            self.stages: list[Any] = [Embedding(model)]
            for block in model.blocks:
                self.stages += [Attention(block, last=block is model.blocks[-1]), FeedForward(block)]
            self.stages.append(Head(model))
        number = {id(p): i for i, p in enumerate(coordinates.parameters)}
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) if threads > 1 else None
        self.map = pool.map if pool else map
        self.groups, searched = [], []  # stage, way in, and names of the tensors searched; these tensors' numbers
        for s, stage in enumerate(self.stages):
            for names, enter in stage.groups.items():
                held = [name for name in names if id(stage.tensors.get(name)) in number]
                searched += [number[id(stage.tensors[name])] for name in held]
                self.groups.append((s, enter, held))
        self.rank = torch.tensor(searched).argsort()  # of each tensor among the tensors of all groups in turn

    @torch.no_grad()
    def on(self, batch: dict[str, Tensor]) -> "StructuredPolls":
        """The closure that answers about this batch, {"x": (B, T) tokens, "y": (B, T) classes or IGNORE}."""
        closure = copy.copy(self)
        closure.incumbent = Incumbent()
        closure.generic = self.generic.on(batch)
        x, y = batch["x"], batch["y"]
        scored, ordinals = y != IGNORE, torch.arange(1, x.shape[1] + 1)
        last = (scored * ordinals).amax(1)  # (B,) tokens up to the last scored one
        x = x.masked_fill(torch.arange(x.shape[1]) >= last[:, None], 0)  # the others cannot change a scored one
        pairs, count = torch.cat([x, y], 1)[last > 0].unique(dim=0, return_counts=True)
        weight = count.double() / scored.sum()
        lengths, order = ((pairs[:, x.shape[1] :] != IGNORE) * ordinals).amax(1).sort(stable=True)
        closure.rows, dtype = [], self.model.head.weight.dtype
        weights = sum(p.numel() for p in self.model.blocks.parameters())
        for some in order.split(part_sizes(lengths, PART_COST // weights + 24)):
            n_chunks = math.ceil(len(some) * x.shape[1] / ROW_TOKENS)
            closure.rows += [Rows(*pairs[chunk].chunk(2, 1), weight[chunk], dtype) for chunk in some.chunk(n_chunks)]
        return closure

    @property
    def block(self) -> int:
        """Candidates per call that keep the chunks of most groups full."""
        tokens = sum(rows.x.numel() for rows in self.rows)
        return max(16, min(1024, 2**19 // max(1, tokens)))

    @torch.no_grad()
    @one_thread()
    def __call__(self) -> Tensor:
        """The loss at the incumbent, by the same arithmetic as the candidates'; see `polls.generic.Incumbent`."""
        return self.incumbent(self.model.parameters(), self._loss) if self.rows else self.generic()

    def _loss(self) -> Tensor:
        self._refresh()
        return sum(self._state(rows, len(self.stages) - 1).out for rows in self.rows)

    @torch.no_grad()
    @one_thread()
    def poll(self, coordinates: Tensor, steps: Tensor) -> Tensor:
        """Losses (K,) of the candidates weight[coordinates[k]] + steps[k]; coordinates and steps are (K,)."""
        check_block(self.coordinates, coordinates, steps)
        if not self.rows:
            return self.generic.poll(coordinates, steps)
        incumbent, (order, counts, moves) = self(), self._sort(coordinates, steps)
        losses, reach = torch.zeros(len(order), dtype=torch.float64), torch.zeros_like(moves.step)
        kept = 0
        for rows in self.rows:
            self._state(rows, len(self.stages) - 1)  # all threads read it
            tasks = [(rows, *task) for task in self._tasks(rows, counts, moves)]
            for (*_, some), (part, changed) in zip(tasks, self.map(self._losses, tasks), strict=True):
                losses[some] += part
                reach[some] = reach[some].maximum(changed)
            kept += rows.bytes()
            if kept > CACHE_BYTES:
                rows.states.clear()
        losses, reach = (torch.empty_like(x).scatter_(0, order, x) for x in (losses, reach))
        losses = torch.where(reach == 0, incumbent, losses)
        wild = ~((reach < WILD) & (steps.abs() < WILD))  # true for nan
        losses = self._finite(
            losses.masked_fill_(wild, math.nan), lambda k: self.generic.plain_poll(coordinates[k], steps[k])
        )
        self.incumbent.polled = losses
        return losses

    @torch.no_grad()
    @one_thread()
    def trial(self, coordinates: Tensor, changes: Tensor, scales: Tensor) -> Tensor:
        """Losses (S,) of the combinations weight[coordinates] + scales[s] * changes; both (M,), scales (S,)."""
        check_block(self.coordinates, coordinates, changes)
        check_scales(scales)
        if not self.rows:
            return self.generic.trial(coordinates, changes, scales)
        self._refresh()
        change = {id(p): part for p, part in self.coordinates.spread(coordinates, changes)}
        first = min(s for s, stage in enumerate(self.stages) if any(id(p) in change for p in stage.tensors.values()))
        states = [self._state(rows, first - 1).out[:, None] if first else None for rows in self.rows]

        def loss(scale: Tensor) -> Tensor:
            with torch.no_grad():  # a thread has its own
                weights = [stage.w for stage in self.stages]
                for s, stage in enumerate(self.stages):
                    moved = {n: p + (scale * change[id(p)]).to(p) for n, p in stage.tensors.items() if id(p) in change}
                    if moved:
                        weights[s] = stage.fold(stage.tensors | moved)
                losses = []
                for rows, x in zip(self.rows, states, strict=True):
                    for stage, w in zip(self.stages[first:], weights[first:], strict=True):
                        x = stage.forward(w, rows, x)
                    losses.append(x.double())
                return sum(losses)

        losses = torch.cat(list(self.map(loss, scales.split(1))))
        return self._finite(losses, lambda wrong: self.generic.trial(coordinates, changes, scales[wrong]))

    def _tasks(self, rows: Rows, counts: list[int], moves: Moves) -> Iterator[tuple]:
        """The candidates in chunks that enter alike: stage, way in, moves by tensor, and which candidates they are."""
        tensor = end = 0
        for s, enter, names in self.groups:
            ends = list(accumulate(counts[tensor : tensor + len(names)], initial=end))  # of each tensor's candidates
            tensor, end, size = tensor + len(names), ends[-1], self._chunk(rows, s + (enter == self.stages[s].enter))
            for first in range(ends[0], end, size):
                some = slice(first, min(first + size, end))
                cut = [min(max(e, some.start), some.stop) for e in ends]
                spans = zip(names, cut, cut[1:], strict=False)
                yield s, enter, {name: moves.of(slice(a, b)) for name, a, b in spans if a < b}, some

    @torch.no_grad()
    def _losses(self, task: tuple) -> tuple[Tensor, Tensor]:
        """Of candidates that enter at stage s: their losses (k,), some rows' part, and reach (k,) in the stream."""
        rows, s, enter, moves, _ = task
        state = self._state(rows, s)
        entry = enter(self.stages[s].w, rows, state, moves)
        if isinstance(entry, tuple) and not isinstance(entry, Rank1):  # the head: losses and reach
            return entry
        rank1 = isinstance(entry, Rank1)
        reach = entry.scalar.abs().amax((0, 2)) if rank1 else (entry - state.out[:, None]).abs_().amax((0, 2, 3))
        return self._behind(rows, s, entry), reach

    def _behind(self, rows: Rows, s: int, x: Rank1 | Tensor) -> Tensor:
        """Losses of candidates whose stream behind stage s is known."""
        rest = self.stages[s + 1 :]
        if isinstance(x, Rank1):
            x = rest[0].forward_rank1(rest[0].w, rows, self._state(rows, s + 1), x)
            rest = rest[1:]
        for stage in rest:
            x = stage.forward(stage.w, rows, x)
        return x

    def _chunk(self, rows: Rows, full: int) -> int:
        """Candidates at a time if stage `full` is the first computed in full, by the widest activations needed."""
        attention, ff, head = range(len(self.stages) - 3, len(self.stages))  # the last ones
        numbers = self.model.blocks[-1].ff.inner.out_features * CHUNK_TOKENS
        if full >= head:  # a few numbers for each class of a token, instead of d_ff
            return max(1, numbers // (4 + self.model.head.out_features) // rows.at.numel())
        by_scored = full >= ff or (full == attention and self.model.positions != "rotary")
        return max(1, CHUNK_TOKENS // (rows.at if by_scored else rows.x).numel())

    def _sort(self, coordinates: Tensor, steps: Tensor) -> tuple[Tensor, list[int], Moves]:
        """The order (K,) of candidates by group, tensor and coordinate; how many of each tensor; their moves."""
        parameters, ends = self.coordinates.parameters, self.coordinates.ends
        owner = self.coordinates.owner(coordinates)
        rank = self.rank[owner]
        order = (rank * len(self.coordinates) + coordinates).argsort()
        owner, coordinates = owner[order], coordinates[order]
        starts = torch.tensor([end - p.numel() for p, end in zip(parameters, ends, strict=True)])
        widths = torch.tensor([p.shape[1] if p.ndim == 2 else 1 for p in parameters])
        flat, width = coordinates - starts[owner], widths[owner]
        moves = Moves(flat // width, flat % width, steps[order].to(self.model.head.weight.dtype))
        return order, rank.bincount(minlength=len(parameters)).tolist(), moves

    def _state(self, rows: Rows, s: int) -> Values:
        """What the incumbent computes at stage s; computed anew from the first stage whose weights changed."""
        for i, stage in enumerate(self.stages[: s + 1]):
            if i >= len(rows.states) or rows.states[i][0] != stage.serial:
                x = rows.states[i - 1][1].out if i else None
                rows.states[i:] = [(stage.serial, stage.incumbent(stage.w, rows, x))]
        return rows.states[s][1]

    def _refresh(self) -> None:
        for stage in self.stages:
            stage.refresh()

    def _finite(self, losses: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
        """Losses with those that are not finite replaced by what the plain forward gives."""
        wrong = (~losses.isfinite()).nonzero().flatten()
        if len(wrong):
            losses[wrong] = plain(wrong)
        return losses


def part_sizes(lengths: Tensor, overhead: float) -> list[int]:
    """How to part rows by length, so that short ones are not filled up to the longest: the cheapest way there is.

    A part costs its rows times the longest of them, and an overhead. Rows of one length stay together.

    Args:
        lengths: (B,) of the rows in tokens, in ascending order.
        overhead: of a part, in tokens.
    """
    values, counts = lengths.unique_consecutive(return_counts=True)
    ends = [0, *counts.cumsum(0).tolist()]
    # of the best way to part the rows of the first j lengths: what it costs, and with which length its last part begins
    cost, begin = [0.0], [0]
    for j, length in enumerate(values.tolist(), start=1):
        costs = [cost[i] + overhead + (ends[j] - ends[i]) * length for i in range(j)]
        begin.append(min(range(j), key=costs.__getitem__))
        cost.append(costs[begin[j]])
    sizes, j = [], len(values)
    while j:
        sizes.append(ends[j] - ends[begin[j]])
        j = begin[j]
    return sizes[::-1]
