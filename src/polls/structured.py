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
rank-1 term in front of the next activation; final norm and head change the logits by one. The stages of the model
stand in `polls/stages.py` and `polls/attention.py`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from polls.attention import Attention
from polls.generic import GenericPolls
from polls.node_kinds import Entry, Kind, Moves, Rank1, joined
from polls.rows import Rows, rows_of
from polls.shared import WILD, Incumbent, check_block, check_scales
from polls.stages import Embedding, FeedForward, Head, Stage
from polls.threads import one_thread
from search.coordinates import Coordinates
from transformer import Block, DecoderOnlyTransformer

CHUNK_TOKENS = 4096  # tokens of all candidates at a time: large enough to hide the cost of calling an operator
CACHE_BYTES = 2**28  # what may be remembered of the incumbent; rows beyond are computed anew in every call


@dataclass(frozen=True, slots=True)
class Group:
    """Candidates that are evaluated together."""

    stage: int  # its number
    kinds: tuple[Kind, ...]  # of their nodes
    names: list[str]  # of the tensors that are searched
    first: int  # place of the first of them among those of all groups in turn


@dataclass(frozen=True, slots=True)
class Chunk:
    """Candidates of a group that are evaluated at a time."""

    rows: Rows
    group: Group
    moves: dict[str, Moves]  # by the name of the tensor
    some: slice  # of the sorted candidates


class StructuredPolls:
    """Evaluates candidates of a `DecoderOnlyTransformer`, exact up to rounding: `on(batch)` is a closure.

    It keeps the folded weights from batch to batch, and notices by itself when a weight was changed in place.

    Args:
        model: evaluated in eval mode, without gradients.
        coordinates: numbers the weights that may move, all of them parameters of `model`.
        loss: (logits, batch) -> mean cross-entropy over the scored tokens of batch["y"]. It is called by
            the plain forward; the structured one computes that mean by itself.
        threads: chunks of candidates that are evaluated at the same time. Results do not depend on it: chunks
            have fixed sizes, and every operation runs on one thread.

    Raises:
        ValueError: as `GenericPolls`.
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
            self.head, blocks = Head(model), [block for block in model.blocks if isinstance(block, Block)]
            self.stages: list[Stage] = [Embedding(model)]
            for block in blocks:
                self.stages += [Attention(block, last=block is blocks[-1]), FeedForward(block)]
            self.stages.append(self.head)
        self.d_ff = blocks[-1].ff.inner.out_features
        self.map: Callable[..., Iterator[Any]] = map
        if threads > 1:
            self.map = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)).map
        number = {id(p): i for i, p in enumerate(coordinates.parameters)}
        # of each stage: the numbers of the tensors that are searched, by name
        self.numbers = [{n: number[id(p)] for n, p in s.tensors.items() if id(p) in number} for s in self.stages]
        self.groups: list[Group] = []
        searched: list[int] = []  # the numbers of the tensors of all groups in turn
        for s, (stage, numbers) in enumerate(zip(self.stages, self.numbers, strict=True)):
            for kinds in stage.together:
                names = [name for kind in kinds for name in kind.tensors if name in numbers]
                self.groups.append(Group(s, kinds, names, len(searched)))
                searched += [numbers[name] for name in names]
        self.rank = torch.tensor(searched, device=model.head.weight.device).argsort()  # of each tensor among `searched`

    def on(self, batch: dict[str, Tensor]) -> "StructuredClosure":
        """The closure that answers about this batch, {"x": (B, T) tokens, "y": (B, T) classes or IGNORE}."""
        return StructuredClosure(self, batch)

    def refresh(self) -> None:
        for stage in self.stages:
            stage.refresh()

    def chunk_size(self, rows: Rows, s: int, rank1: bool) -> int:
        """Candidates at a time that enter at stage s, by the widest activations needed."""
        first_full = s + 1 if rank1 else s  # the first stage that is computed in full
        attention, ff, head = range(len(self.stages) - 3, len(self.stages))  # the last ones
        numbers = self.d_ff * CHUNK_TOKENS
        if first_full >= head:  # a few numbers for each class of a token, instead of d_ff
            return max(1, numbers // (4 + self.model.head.out_features) // rows.at.numel())
        by_scored = first_full >= ff or (first_full == attention and self.model.positions != "rotary")
        return max(1, CHUNK_TOKENS // (rows.at if by_scored else rows.x).numel())

    def sort(self, coordinates: Tensor, steps: Tensor) -> tuple[Tensor, list[int], Moves]:
        """The order (K,) of candidates by group, tensor and coordinate; the bounds of each tensor's; their moves."""
        parameters, ends = self.coordinates.parameters, self.coordinates.ends
        owner, device = self.coordinates.owner(coordinates), coordinates.device
        rank = self.rank[owner]
        order = (rank * len(self.coordinates) + coordinates).argsort()
        owner, coordinates = owner[order], coordinates[order]
        starts = torch.tensor([end - p.numel() for p, end in zip(parameters, ends, strict=True)], device=device)
        widths = torch.tensor([p.shape[1] if p.ndim == 2 else 1 for p in parameters], device=device)
        flat, width = coordinates - starts[owner], widths[owner]
        moves = Moves(flat // width, flat % width, steps[order].to(self.model.head.weight.dtype))
        return order, [0, *rank.bincount(minlength=len(parameters)).cumsum(0).tolist()], moves


class StructuredClosure:
    """Answers `poll` and `trial` (see `search/closure.py`) about one batch.

    It keeps what the incumbent computes on the batch, and after a change in place computes anew only what the change
    reaches. Equal rows of a batch are evaluated once and weighed. A candidate that changes nothing has exactly the
    incumbent's loss; one whose loss is not finite, or that changes the stream beyond reason, gets the loss of the
    plain forward.

    Memory: at most CACHE_BYTES for the incumbent and CHUNK_TOKENS tokens (or one candidate on one chunk
    of at most `rows.ROW_TOKENS` tokens) for the candidates, whatever K and B.

    Raises:
        ValueError, IndexError: as `GenericClosure`.
    """

    def __init__(self, polls: StructuredPolls, batch: dict[str, Tensor]):
        self.polls, self.model, self.coordinates, self.stages = polls, polls.model, polls.coordinates, polls.stages
        self.incumbent, self.generic = Incumbent(), polls.generic.on(batch)
        weights = sum(p.numel() for p in self.model.blocks.parameters())
        with torch.no_grad():
            self.rows = rows_of(batch, weights, self.model.head.weight.dtype)

    @property
    def block(self) -> int:
        """Candidates per call that keep the chunks of most groups full."""
        tokens = sum(rows.x.numel() for rows in self.rows)
        return max(16, min(1024, 2**19 // max(1, tokens)))

    @torch.no_grad()
    @one_thread()
    def __call__(self) -> Tensor:
        """The loss at the incumbent, by the same arithmetic as the candidates'; see `polls.shared.Incumbent`."""
        return self.incumbent(self.model.parameters(), self._loss) if self.rows else self.generic()

    def _loss(self) -> Tensor:
        self.polls.refresh()
        loss = self.model.head.weight.new_zeros(())
        for rows in self._known_rows():
            loss = loss + rows.total(self._state(rows, len(self.stages) - 1).out)[0]
        return loss

    def _known_rows(self) -> Iterator[Rows]:
        """The rows in turn, with all that the incumbent computes on them, so that threads only read it.

        Once CACHE_BYTES are remembered, what further rows hold is forgotten again.
        """
        kept = 0
        for rows in self.rows:
            self._state(rows, len(self.stages) - 1)
            yield rows
            kept += rows.bytes()
            if kept > CACHE_BYTES:
                rows.states.clear()

    @torch.no_grad()
    @one_thread()
    def poll(self, coordinates: Tensor, steps: Tensor) -> Tensor:
        """Losses (K,) of the candidates weight[coordinates[k]] + steps[k]; coordinates and steps are (K,)."""
        check_block(self.coordinates, coordinates, steps)
        if not self.rows:
            return self.generic.poll(coordinates, steps)
        incumbent, (order, bounds, moves) = self(), self.polls.sort(coordinates, steps)
        losses = torch.zeros(len(order), dtype=torch.float64, device=order.device)
        reach = torch.zeros_like(moves.step)
        for rows in self._known_rows():
            chunks = list(self._chunks(rows, bounds, moves))
            for chunk, (part, changed) in zip(chunks, self.polls.map(self._losses, chunks), strict=True):
                losses[chunk.some] += part
                reach[chunk.some] = reach[chunk.some].maximum(changed)
        losses, reach = (torch.empty_like(x).scatter_(0, order, x) for x in (losses, reach))
        losses = torch.where(reach == 0, incumbent, losses)
        wild = ~((reach < WILD) & (steps.abs() < WILD))  # true for nan
        wrong = (wild | ~losses.isfinite()).nonzero().flatten()
        if len(wrong):
            losses[wrong] = self.generic.plain_poll(coordinates[wrong], steps[wrong])
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
        self.polls.refresh()
        change = {id(p): part for p, part in self.coordinates.spread(coordinates, changes)}
        first = min(s for s, stage in enumerate(self.stages) if any(id(p) in change for p in stage.tensors.values()))
        streams = [self._state(rows, first - 1).out[:, None] if first else rows.x for rows in self.rows]

        def loss(scale: Tensor) -> Tensor:
            with torch.no_grad():  # a thread has its own
                weights = [stage.w for stage in self.stages]
                for s, stage in enumerate(self.stages):
                    moved = {n: p + (scale * change[id(p)]).to(p) for n, p in stage.tensors.items() if id(p) in change}
                    if moved:
                        weights[s] = stage.fold(stage.tensors | moved)
                total = torch.zeros(1, dtype=torch.float64, device=scale.device)
                for rows, x in zip(self.rows, streams, strict=True):
                    for stage, w in zip(self.stages[first:], weights[first:], strict=True):
                        x = stage.forward(w, rows, x)
                    total += rows.total(x)
                return total

        losses = torch.cat(list(self.polls.map(loss, scales.split(1))))
        wrong = (~losses.isfinite()).nonzero().flatten()
        if len(wrong):
            losses[wrong] = self.generic.trial(coordinates, changes, scales[wrong])
        return losses

    def _chunks(self, rows: Rows, bounds: list[int], moves: Moves) -> Iterator[Chunk]:
        """The sorted candidates in chunks of a group; those of a tensor lie between two bounds."""
        for group in self.polls.groups:
            own = bounds[group.first : group.first + len(group.names) + 1]
            size = self.polls.chunk_size(rows, group.stage, group.kinds[0].rank1)
            for first in range(own[0], own[-1], size):
                some = slice(first, min(first + size, own[-1]))
                cut = [min(max(bound, some.start), some.stop) for bound in own]
                spans = zip(group.names, pairwise(cut), strict=True)
                yield Chunk(rows, group, {name: moves.of(slice(a, b)) for name, (a, b) in spans if a < b}, some)

    @torch.no_grad()
    def _losses(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Of the candidates of a chunk: losses (k,), the rows' part, and the largest change (k,) where they enter."""
        rows, s = chunk.rows, chunk.group.stage
        state = self._state(rows, s)
        moves = [({n: m for n, m in chunk.moves.items() if n in kind.tensors}, kind) for kind in chunk.group.kinds]
        entry = joined([kind.enter_weights(rows, state, some) for some, kind in moves if some])
        if isinstance(entry, Rank1):
            reach = entry.scalar.abs().amax((0, 2))
        else:
            reach = (entry - state.out[:, None]).abs_().amax((0, 2, 3))
        return rows.total(self._behind(rows, s, entry)), reach

    def _behind(self, rows: Rows, s: int, entry: Entry) -> Tensor:
        """Losses of the tokens (B, K, S) for candidates that enter at stage s."""
        if isinstance(entry, Rank1):
            if s == len(self.stages) - 1:
                return self.polls.head.changed_losses(rows, self._state(rows, s), entry)
            s += 1
            x = self.stages[s].forward_rank1(rows, self._state(rows, s), entry)
        else:
            x = entry
        for stage in self.stages[s + 1 :]:
            x = stage.forward(stage.w, rows, x)
        return x

    def _state(self, rows: Rows, s: int) -> Any:
        """What the incumbent computes at stage s; computed anew from the first stage whose weights changed."""
        for i, stage in enumerate(self.stages[: s + 1]):
            if i >= len(rows.states) or rows.states[i][0] is not stage.w:
                x = rows.states[i - 1][1].out if i else rows.x
                rows.states[i:] = [(stage.w, stage.incumbent(rows, x))]
        return rows.states[s][1]
