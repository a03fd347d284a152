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

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polls.attention import WIDE, Attention, AttentionState
from polls.generic import GenericPolls, settled
from polls.node_kinds import Entry, Kind, Moves, Rank1, joined
from polls.rows import Rows, rows_of
from polls.shared import WILD, Incumbent, check_block, check_trial, checked, wild
from polls.sizes import sizes_on
from polls.stages import Embedding, FeedForward, Head, Stage
from polls.threads import one_thread
from search.closure import Changes
from search.coordinates import Coordinates
from transformer import Block, DecoderOnlyTransformer


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """The nodes of one kind at one stage, and the tensors of their weights that are searched.

    Attributes:
        stage: its number.
        parameters: numbers of the tensors, by their names within the stage.
        first: number of its first node.
    """

    stage: int
    kind: Kind
    parameters: dict[str, int]
    first: int


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
        self.sizes = sizes_on(model.head.weight.device)
        self.generic = GenericPolls(model, coordinates, loss)
        with torch.no_grad():
            self.head, blocks = Head(model), [block for block in model.blocks if isinstance(block, Block)]
            self.stages: list[Stage] = [Embedding(model)]
            for block in blocks:
                self.stages += [Attention(block, last=block is blocks[-1]), FeedForward(block)]
            self.stages.append(self.head)
        self.map: Callable[..., Iterator[Any]] = map
        if threads > 1:
            self.map = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)).map
        number = {id(p): i for i, p in enumerate(coordinates.parameters)}
        self.groups: list[NodeGroup] = []
        self.n_nodes = 0
        for s, stage in enumerate(self.stages):
            for kind in stage.kinds:
                ids = {name: id(stage.tensors[name]) for name in kind.tensors if name in stage.tensors}
                if searched := {name: number[i] for name, i in ids.items() if i in number}:
                    self.groups.append(NodeGroup(s, kind, searched, self.n_nodes))
                    self.n_nodes += kind.n
        rank = {number: r for r, number in enumerate(n for g in self.groups for n in g.parameters.values())}
        self.rank = np.array([rank[n] for n in range(len(rank))])  # of each tensor in the order of the groups

    def on(self, batch: dict[str, Tensor]) -> "StructuredClosure":
        """The closure that answers about this batch, {"x": (B, T) tokens, "y": (B, T) classes or IGNORE}."""
        return StructuredClosure(self, batch)

    def refresh(self) -> None:
        for stage in self.stages:
            stage.refresh()

    def chunks(self, rows: Rows, counts: np.ndarray) -> Iterator[tuple[slice, list[tuple[NodeGroup, slice]]]]:
        """Sorted candidates, so many of each group, in chunks that cost alike: each, and the part of each group in it.

        A candidate costs its tokens, times the part of the model that is computed for it: half of the stage where it
        enters, or, if it does so by a term of rank 1, half of the next, and all that follow. No chunk holds more than
        four times `Sizes.chunk` tokens, or one candidate.
        """
        last = len(self.stages) - 3  # the last attention; behind it only the scored tokens are computed
        tokens = [rows.x.numel() if s <= last else rows.at.numel() for s in range(len(self.stages))]
        sizes = [stage.size for stage in self.stages]
        work = [t * n / sum(sizes) for t, n in zip(tokens, sizes, strict=True)] + [0.0]
        first = [g.stage + g.kind.rank1 for g in self.groups]  # stage of which a half is computed
        own, behind = np.array([tokens[g.stage] for g in self.groups]), np.array([sum(work[s:]) for s in first])
        costs = own / 32 + behind - np.array([work[s] for s in first]) / 2  # a 32nd: what any candidate costs
        done = np.cumsum(np.repeat(costs, counts))
        held = (own / 4 + behind) @ counts  # as many chunks as keep what they hold small, on any number of threads
        n = max(1, math.ceil(held / min(self.sizes.chunk, self.sizes.chunk_work / self.head.w.head.shape[1] ** 2)))
        cuts = np.searchsorted(done, np.arange(1, n) * done[-1] / n).tolist()
        bounds, most = [0, *np.cumsum(counts).tolist()], max(1, 4 * self.sizes.chunk // rows.x.numel())
        for start, stop in pairwise([0, *cuts, len(done)]):
            for begin in range(start, stop, most):
                end = min(begin + most, stop)
                cut = [min(max(bound, begin), end) for bound in bounds]
                yield (
                    slice(begin, end),
                    [(g, slice(a, b)) for g, (a, b) in zip(self.groups, pairwise(cut), strict=True) if a < b],
                )


class StructuredClosure:
    """Answers `poll`, `trial` and `perturbed` (see `search/closure.py`) about one batch.

    It keeps what the incumbent computes on the batch, and after a change in place computes anew only what the change
    reaches. Equal rows of a batch are evaluated once and weighed. A candidate that changes nothing has exactly the
    incumbent's loss; one whose loss is not finite, or that changes the stream beyond reason, gets the loss of the
    plain forward.

    Memory: at most `Sizes.cache` bytes for the incumbent and four times `Sizes.chunk` tokens (or one candidate on
    `Sizes.rows` tokens) for the candidates, whatever K and B.

    Raises:
        ValueError, IndexError: as `GenericClosure`.
    """

    def __init__(self, polls: StructuredPolls, batch: dict[str, Tensor]):
        self.polls, self.model, self.coordinates, self.stages = polls, polls.model, polls.coordinates, polls.stages
        self.incumbent, self.generic = Incumbent(), polls.generic.on(batch)
        weights = sum(p.numel() for p in self.model.blocks.parameters())
        self.rows = rows_of(batch, weights, self.model.head.weight, polls.sizes)

    @property
    def block(self) -> int:
        """Candidates per call that keep the chunks of most groups full."""
        return self.polls.sizes.candidates_per_call(sum(rows.x.numel() for rows in self.rows))

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

        Once `Sizes.cache` bytes are remembered, what further rows hold is forgotten again.
        """
        kept, last = 0, len(self.stages) - 1
        for rows in self.rows:
            known = rows.states[-1:]
            self._state(rows, last)
            if not known or rows.states[last] is not known[0]:
                scores = [state.scores for _, state in rows.states if isinstance(state, AttentionState)]
                rows.wide = bool(torch.stack([torch.linalg.vector_norm(s, math.inf) for s in scores]).amax() > WIDE)
            yield rows
            kept += rows.bytes()
            if kept > self.polls.sizes.cache:
                rows.states.clear()

    @torch.no_grad()
    @one_thread()
    def poll(self, coordinates: Tensor, steps: Tensor) -> Tensor:
        """Losses (K,) of the candidates weight[coordinates[k]] + steps[k]; coordinates and steps are (K,)."""
        check_block(self.coordinates, coordinates, steps)
        if not self.rows:
            return self.generic.poll(coordinates, steps)
        incumbent, (order, bounds, moves) = self(), self._sorted(coordinates, steps)
        cuts = [bounds[self.polls.rank[next(iter(g.parameters.values()))]] for g in self.polls.groups]
        counts = np.diff([*cuts, len(order)])
        found = torch.zeros(2, len(order), dtype=torch.float64, device=self.model.head.weight.device)
        for rows in self._known_rows():
            chunks = list(self.polls.chunks(rows, counts))
            parts = self.polls.map(partial(self._polled, rows, moves, bounds), chunks)
            for (some, _), (losses, reach) in zip(chunks, parts, strict=True):
                found[0, some] += losses
                found[1, some] = found[1, some].maximum(reach)
        losses, reach = found.cpu()[:, order.argsort()]
        losses = torch.where(reach == 0, incumbent.cpu(), losses)
        wild = ~((reach < WILD) & (steps.abs() < WILD))  # true for nan
        wrong = np.flatnonzero((wild | ~losses.isfinite()).numpy())
        if len(wrong):
            losses[wrong] = self.generic.plain_poll(coordinates[wrong], steps[wrong])
        self.incumbent.polled = losses
        return losses

    @torch.no_grad()
    @one_thread()
    def trial(self, changes: Tensor, scales: Tensor) -> Tensor:
        """Losses (S,) of the weights with scales[s] * changes added; changes (n,), of all coordinates, scales (S,)."""
        check_trial(self.coordinates, changes, scales)
        if not self.rows:
            return self.generic.trial(changes, scales)
        like = self.model.head.weight
        scales, changes, flat = scales.to(like), changes.to(like), self._flat()
        tokens = sum(rows.x.numel() for rows in self.rows)
        size = max(1, min(self.polls.sizes.trial // tokens, self.polls.sizes.stacked) // len(flat))
        losses = self._moved(len(scales), size, lambda a, b: torch.addcmul(flat, scales[a:b, None], changes))
        wrong = np.flatnonzero(~np.isfinite(losses.numpy()))
        if len(wrong):
            losses[wrong] = self.generic.trial(changes, scales[wrong])
        return losses

    @torch.no_grad()
    @one_thread()
    def perturbed(self, count: int, changes: Changes) -> Tensor:
        """Losses (count,) of the weights with the changes (last - first, n) of each candidate added."""
        changes = checked(changes, count, len(self.coordinates))
        if not self.rows:
            return self.generic.perturbed(count, changes)
        flat, tokens = self._flat(), sum(rows.x.numel() for rows in self.rows)
        size = max(1, min(self.polls.sizes.perturbed // tokens, self.polls.sizes.stacked // len(flat)))
        beyond = torch.zeros(count, dtype=torch.bool, device=flat.device)

        def weights(first: int, last: int) -> Tensor:
            some = changes(first, last).to(flat)
            beyond[first:last] = wild(some)
            return flat + some

        losses = self._moved(count, size, weights)
        return settled(losses.masked_fill(beyond.cpu(), torch.nan), changes, self(), self.generic)

    def _flat(self) -> Tensor:
        """(n,) the searched weights."""
        return torch.cat([p.flatten() for p in self.coordinates.parameters])

    def _moved(self, count: int, size: int, weights: Changes) -> Tensor:
        """Losses (count,) of candidates whose searched weights are all their own: weights(first, last) (k, n).

        So many as `size` go through the model at a time.
        """
        self.polls.refresh()
        searched = {id(p) for p in self.coordinates.parameters}
        first = min(s for s, stage in enumerate(self.stages) if any(id(p) in searched for p in stage.tensors.values()))
        streams = [self._state(rows, first - 1).out[:, None] if first else rows.x for rows in self.rows]

        @torch.no_grad()  # what a thread does for itself
        def losses(begin: int) -> Tensor:
            return self._losses_of(weights(begin, min(begin + size, count)), first, streams)

        return torch.cat(list(self.polls.map(losses, range(0, count, size)))).double().cpu()

    def _losses_of(self, weights: Tensor, first: int, streams: list[Tensor]) -> Tensor:
        """Losses (K,) of candidates with all searched weights (K, n) of their own.

        Args:
            first: stage that has searched weights.
            streams: what the incumbent computes in front of it, of each of the rows.
        """
        n, total = len(weights), weights.new_zeros(len(weights))
        own = {id(p): t for p, t in self.coordinates.with_parts(weights)}  # (K, *shape) each
        folded = []
        for stage in self.stages[first:]:
            t = {name: own.get(id(p), p.expand(n, *p.shape)) for name, p in stage.tensors.items()}
            folded.append(stage.fold(t) if any(id(p) in own for p in stage.tensors.values()) else stage.w)
        for rows, x in zip(self.rows, streams, strict=True):
            if first:
                x = x.expand(-1, n, -1, -1)  # (B, K, T, d)
            for stage, w in zip(self.stages[first:], folded, strict=True):
                x = stage.forward(w, rows, x)
            total = total + rows.total(x)
        return total

    def _sorted(self, coordinates: Tensor, steps: Tensor) -> tuple[np.ndarray, list[int], Moves]:
        """The order (K,) of candidates by group, tensor and coordinate; the bounds of each tensor's; their moves."""
        parameters, like = self.coordinates.parameters, self.model.head.weight
        flat = coordinates.cpu().numpy()
        owner = np.searchsorted(self.coordinates.ends, flat, side="right")
        order = np.lexsort((flat, self.polls.rank[owner]))
        flat, owner = flat[order], owner[order]
        starts = np.array([e - p.numel() for p, e in zip(parameters, self.coordinates.ends, strict=True)])
        widths = np.array([p.shape[1] if p.ndim == 2 else 1 for p in parameters])
        i, j = np.divmod(flat - starts[owner], widths[owner])
        bounds = np.searchsorted(self.polls.rank[owner], np.arange(len(parameters) + 1)).tolist()
        on = partial(torch.as_tensor, device=like.device)
        return order, bounds, Moves(on(i), on(j), steps.to(like)[on(order)])

    def _polled(
        self, rows: Rows, moves: Moves, bounds: list[int], chunk: tuple[slice, list[tuple[NodeGroup, slice]]]
    ) -> tuple[Tensor, Tensor]:
        """Of the candidates of a chunk: losses (k,), the rows' part, and the largest change (k,) where they enter."""
        entries: dict[int, list[Entry]] = {}
        reach = []
        for group, own in chunk[1]:
            some: dict[str, Moves] = {}
            for name, number in group.parameters.items():
                r = self.polls.rank[number]
                span = slice(max(own.start, bounds[r]), min(own.stop, bounds[r + 1]))
                if span.start < span.stop:
                    some[name] = Moves(*(t[span] for t in moves))
            state = self._state(rows, group.stage)
            entry = group.kind.enter_weights(rows, state, some)
            if isinstance(entry, Rank1):
                reach.append(entry.scalar.abs().amax((0, 2)))
            else:
                reach.append((entry - state.out[:, None]).abs_().amax((0, 2, 3)))
            entries.setdefault(group.stage, []).append(entry)
        return rows.total(self._behind(rows, entries)), torch.cat(reach)

    def _behind(self, rows: Rows, entries: dict[int, list[Entry]]) -> Tensor:
        """Losses of the tokens (B, K, S) for candidates that enter at several stages, in the order in which they enter.

        At each stage those which came from in front, of full streams and of rank 1, take the same way from then on.
        """
        streams: list[Tensor] = []  # behind the stage in front
        moved: list[Rank1] = []  # what entered there
        for s in range(min(entries), len(self.stages)):
            stage, behind = self.stages[s], []
            if streams:
                behind.append(stage.forward(stage.w, rows, streams[0] if len(streams) == 1 else torch.cat(streams, 1)))
            if moved:
                behind.append(stage.forward_rank1(rows, self._state(rows, s), joined(moved)))
            own = entries.get(s, [])
            streams = behind + [entry for entry in own if isinstance(entry, Tensor)]
            moved = [entry for entry in own if isinstance(entry, Rank1)]
        if moved:
            streams.append(self.polls.head.changed_losses(rows, self._state(rows, s), joined(moved)))
        return torch.cat(streams, 1)

    def _state(self, rows: Rows, s: int) -> Any:
        """What the incumbent computes at stage s; computed anew from the first stage whose weights changed."""
        for i, stage in enumerate(self.stages[: s + 1]):
            if i >= len(rows.states) or rows.states[i][0] is not stage.w:
                x = rows.states[i - 1][1].out if i else rows.x
                rows.states[i:] = [(stage.w, stage.incumbent(rows, x))]
        return rows.states[s][1]
