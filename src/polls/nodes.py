"""Slopes of whole rows of weights from the losses of single tokens, for `DecoderOnlyTransformer`.

A *node* is one component of what a layer puts out (`polls/node_kinds.py`). Move it by a step whose sign is drawn anew
for every token of every sequence, and look at the loss of every scored token. A token's own sign is independent of all
others, so the change of the losses that it can reach, times its sign, is an unbiased sample of what the node is worth
at that token: its credit. Times what a weight of the node reads there, summed over the tokens, it is a sample of the
slope of that weight, and of all weights of the node at once: one evaluation, and no backward pass. It is node
perturbation (Williams 1992; Flower and Jabri 1993).

Two things make a sample say more. Behind the last attention a token reaches its own loss only, so there slopes are
exact but for the step's curvature. Before it, what the other tokens do to a loss is noise in a token's credit: a loss
counts for a token by how much its own token looks at it through the attention of all blocks behind (attention rollout,
Abnar and Zuidema 2020), which trades a little bias for most of the noise.
"""

from copy import copy
from functools import cached_property, partial
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from polls.attention import Attention
from polls.node_kinds import Credit, Entry, Nodes, shares
from polls.rows import Rows, draw_rows
from polls.shared import Incumbent
from polls.structured import NodeGroup, StructuredClosure, StructuredPolls
from polls.threads import one_thread

Found = tuple[NodeGroup, int, Tensor, Tensor]  # slopes of nodes of a group in a tensor: its number, nodes, slopes


class NodePolls(StructuredPolls):
    """`StructuredPolls` whose closures also tell the slopes of whole nodes: `nodes`.

    Nodes are numbered from 0 over the kinds of all stages, in the order of the model; the weights
    of node u belong to parameter number `node_parameter[u]`.
    """

    @cached_property
    def node_parameter(self) -> Tensor:
        owners = [next(iter(g.parameters.values())) for g in self.groups for _ in range(g.kind.n)]
        return torch.tensor(owners, device="cpu")

    @cached_property
    def owners(self) -> Tensor:
        """(n,) of each coordinate, the first node that samples its slope."""
        of_parameter = [np.empty(0)] * len(self.coordinates.parameters)
        for group in self.groups:
            for number in group.parameters.values():
                shape = self.coordinates.parameters[number].shape
                of_parameter[number] = group.first + group.kind.owners(shape).reshape(-1)
        return torch.as_tensor(np.concatenate(of_parameter), device=self.model.head.weight.device)

    def on(self, batch: dict[str, Tensor]) -> "NodeClosure":
        """The closure that answers about this batch, {"x": (B, T) tokens, "y": (B, T) classes or IGNORE}."""
        return NodeClosure(self, batch)


class NodeClosure(StructuredClosure):
    """A `StructuredClosure` that also answers `nodes`."""

    polls: NodePolls

    @property
    def n_nodes(self) -> int:
        return self.polls.n_nodes

    @property
    def node_parameter(self) -> Tensor:
        return self.polls.node_parameter

    @torch.no_grad()
    @one_thread()
    def drawn(self, rows: int, generator: torch.Generator) -> "NodeClosure":
        """The same about rows of the batch that are drawn by the errors left in them, see `polls.rows.draw_rows`.

        Its loss and slopes are those of the batch in the mean, with less noise than those of as many rows that are
        taken alike. A batch with no more rows is taken whole.
        """
        sizes = [len(part.x) for part in self.rows]
        if sum(sizes) <= rows:
            return self
        self()  # brings the caches up to date
        losses = [self._state(part, len(self.stages) - 1).out[:, 0] for part in self.rows]  # (B, S) each
        errors = [(-torch.expm1(-loss) * part.weight).sum(1) for part, loss in zip(self.rows, losses, strict=True)]
        shares = [part.weight.sum(1) for part in self.rows]
        left, share = torch.stack([torch.cat(errors), torch.cat(shares)]).double().cpu()
        factors = draw_rows(left, share, rows, generator)
        closure = copy(self)
        parts = zip(self.rows, factors.split(sizes), strict=True)
        closure.incumbent, closure.rows = Incumbent(), [part.some(own) for part, own in parts if own.any()]
        return closure

    @torch.no_grad()
    @one_thread()
    def nodes(self, nodes: Tensor, steps: Tensor, signs: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples of the slopes of all weights of some nodes; each node is one evaluation.

        Args:
            nodes: (K,) distinct node numbers.
            steps: (K,) by how much each is moved, one way or the other at each token.
            signs: draws which.

        Returns:
            Slopes (n,) of all coordinates, and for which of them there is one, (n,): none if no token is scored.

        Raises:
            IndexError: a node out of range.
        """
        chosen, like = nodes.numpy(), self.model.head.weight
        wrong = chosen[(chosen < 0) | (chosen >= self.n_nodes)]
        if len(wrong):
            raise IndexError(f"node {wrong[0]} is out of range: there are {self.n_nodes}, from 0")
        self()  # brings the caches up to date
        groups, order = self.polls.groups, chosen.argsort()
        chosen = chosen[order]
        bounds = np.searchsorted(chosen, [*(group.first for group in groups), self.n_nodes])
        of = np.repeat(np.arange(len(groups)), np.diff(bounds))  # (K,) the group of each
        first, shared = (
            np.array(column)[of] for column in zip(*((g.first, g.kind.shared) for g in groups), strict=True)
        )
        owner = chosen - (chosen - first) % shared
        sampled = np.zeros(self.n_nodes, dtype=np.int64)
        np.add.at(sampled, owner, 1)  # how many of the nodes sample the same weights
        on = partial(torch.as_tensor, device=like.device)
        i, step, samples = on(chosen - first), steps.to(like)[on(order)], on(sampled[owner])
        slopes = torch.zeros_like(self.polls.owners, dtype=like.dtype)
        views = [part for _, part in self.coordinates.with_parts(slopes)]
        for rows in self._known_rows():
            drawn = torch.randint(2, (2, len(rows.x), len(i), rows.x.shape[1]), generator=signs, device=signs.device)
            both = drawn.to(like).mul_(2).sub_(1)  # (2, B, K, T)
            moves, worth = both[0] * step[:, None], both[0] / (step * samples)[:, None]
            slopes_of = partial(self._slopes, rows, self._reach(rows), i, moves, worth, both[1])
            for found in self.polls.map(slopes_of, list(self.polls.chunks(rows, np.diff(bounds)))):
                for group, number, its, slope in found:
                    group.kind.add(views[number], its, slope)
        known = on(sampled > 0)[self.polls.owners] if self.rows else torch.zeros_like(slopes, dtype=torch.bool)
        return slopes, known

    def _reach(self, rows: Rows) -> list[Tensor | None]:
        """How much scored tokens count for each token, (B, S, T), if it is moved before stage 0, 1, ...

        None behind the last attention, where a token reaches nothing but its own loss.
        """
        own = torch.eye(rows.x.shape[1], dtype=rows.weight.dtype, device=rows.x.device)
        reach: list[Tensor | None] = [None] * (len(self.stages) + 1)
        ties = own[rows.at]  # (B, S, T)
        for s in range(len(self.stages) - 3, -1, -1):
            if isinstance(self.stages[s], Attention):
                looks = self._state(rows, s).weights.square().sum(1)  # (B, queries, T)
                ties = looks + ties if s == len(self.stages) - 3 else ties @ (looks + own)
                reach[s] = shares(ties)
            else:
                reach[s] = reach[s + 1]
        return reach

    @torch.no_grad()
    def _slopes(
        self,
        rows: Rows,
        reach_before: list[Tensor | None],
        i: Tensor,
        moves: Tensor,
        worth: Tensor,
        key_signs: Tensor,
        chunk: tuple[slice, list[tuple[NodeGroup, slice]]],
    ) -> list[Found]:
        """The slopes that a chunk of the nodes gives.

        Args:
            reach_before: see `_reach`.
            i: (K,) which of their kinds the nodes are.
            moves: (B, K, T) by how much they move.
            worth: (B, K, T) what a change of a loss by 1 says of the slope of the loss in the node, at each token.
            key_signs: (B, K, T), see `Nodes`.
            chunk: as of `StructuredPolls.chunks`.
        """
        entries: dict[int, list[Entry]] = {}
        moved = []
        for group, some in chunk[1]:
            reach, change = reach_before[group.stage + group.kind.at_queries], moves[:, some]
            if reach is None:
                change = rows.scored(change[..., None])[..., 0]
            nodes = Nodes(rows, self._state(rows, group.stage), i[some], change, key_signs[:, some])
            entries.setdefault(group.stage, []).append(group.kind.enter_nodes(nodes))
            moved.append((group, nodes, reach))
        losses = self._behind(rows, entries)
        gains = (losses - self._state(rows, len(self.stages) - 1).out) * rows.weight[:, None]  # (B, k, S)
        found, done = [], 0
        for _, run in groupby(moved, key=lambda entry: id(entry[2])):
            alike = list(run)
            reach, sizes = alike[0][2], [len(nodes.i) for _, nodes, _ in alike]
            part, factor = gains[:, done : done + sum(sizes)], worth[:, chunk[0]][:, done : done + sum(sizes)]
            credit = part * rows.scored(factor[..., None])[..., 0] if reach is None else part @ reach * factor
            flat = credit.transpose(0, 1).flatten(1)  # (B, k, tokens) -> (k, B tokens)
            parts = map(Credit, flat.split(sizes), flat.sum(1).split(sizes))
            for (group, nodes, _), own in zip(alike, parts, strict=True):
                for name, slopes in group.kind.slopes(nodes, own, group.parameters).items():
                    found.append((group, group.parameters[name], nodes.i, slopes))
            done += sum(sizes)
        return found
