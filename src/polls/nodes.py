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

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from polls.attention import Attention
from polls.node_kinds import Kind, Nodes, shares
from polls.rows import Rows
from polls.structured import StructuredClosure, StructuredPolls
from polls.threads import one_thread


@dataclass(frozen=True, slots=True)
class NodeGroup:
    """The nodes of one kind at one stage: its number, the numbers of their tensors by name, their first node."""

    stage: int
    kind: Kind
    parameters: dict[str, int]
    first: int


class NodePolls(StructuredPolls):
    """`StructuredPolls` whose closures also tell the slopes of whole nodes: `nodes`.

    Nodes are numbered from 0 over the kinds of all stages, in the order of the model; the weights
    of node u belong to parameter number `node_parameter[u]`.
    """

    @cached_property
    def node_groups(self) -> list[NodeGroup]:
        groups: list[NodeGroup] = []
        first = 0
        for s, (stage, numbers) in enumerate(zip(self.stages, self.numbers, strict=True)):
            for kind in stage.kinds:
                searched = {name: numbers[name] for name in kind.tensors if name in numbers}
                if searched:
                    groups.append(NodeGroup(s, kind, searched, first))
                    first += kind.n
        return groups

    @cached_property
    def node_parameter(self) -> Tensor:
        owners = [next(iter(group.parameters.values())) for group in self.node_groups for _ in range(group.kind.n)]
        return torch.tensor(owners, device=self.model.head.weight.device)

    def on(self, batch: dict[str, Tensor]) -> "NodeClosure":
        """The closure that answers about this batch, {"x": (B, T) tokens, "y": (B, T) classes or IGNORE}."""
        return NodeClosure(self, batch)


class NodeClosure(StructuredClosure):
    """A `StructuredClosure` that also answers `nodes`."""

    def __init__(self, polls: NodePolls, batch: dict[str, Tensor]):
        super().__init__(polls, batch)
        self.node_groups, self.node_parameter = polls.node_groups, polls.node_parameter
        self.n_nodes = len(self.node_parameter)

    @torch.no_grad()
    @one_thread()
    def nodes(self, nodes: Tensor, steps: Tensor, signs: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples of the slopes of all weights of some nodes; each node is one evaluation.

        Args:
            nodes: (K,) distinct node numbers.
            steps: (K,) by how much each is moved, one way or the other at each token.
            signs: draws which.

        Returns:
            Coordinates (M,), all distinct, and slopes (M,) in float64; none if no token of the batch is scored.

        Raises:
            IndexError: a node out of range.
        """
        low, high = (int(u) for u in nodes.aminmax())
        if low < 0 or high >= self.n_nodes:
            raise IndexError(f"node {low if low < 0 else high} is out of range: there are {self.n_nodes}, from 0")
        nodes, order = nodes.sort()
        steps = steps[order].to(self.model.head.weight.dtype)
        firsts = [group.first for group in self.node_groups] + [self.n_nodes]
        bounds = torch.searchsorted(nodes, torch.tensor(firsts, device=nodes.device)).tolist()
        slopes = torch.zeros(len(self.coordinates), dtype=torch.float64, device=nodes.device)
        polled = torch.zeros_like(slopes, dtype=torch.bool)
        self()  # brings the caches up to date
        for rows in self._known_rows():
            chunks = self._node_chunks(rows, nodes, steps, bounds, signs)
            for where, found in (pair for pairs in self.polls.map(self._slopes, chunks) for pair in pairs):
                slopes.index_add_(0, where, found)
                polled[where] = True
        coordinates = polled.nonzero().flatten()
        return coordinates, slopes[coordinates]

    def _node_chunks(
        self, rows: Rows, nodes: Tensor, steps: Tensor, bounds: list[int], signs: torch.Generator
    ) -> list[tuple[NodeGroup, Nodes]]:
        """Sorted nodes (K,) with their steps (K,) in chunks of a group; the nodes of a group lie between two bounds."""
        reach_before, chunks = self._reach(rows), []
        for group, (begin, end) in zip(self.node_groups, pairwise(bounds), strict=True):
            kind, i, step = group.kind, nodes[begin:end] - group.first, steps[begin:end]
            reach = reach_before[group.stage + 1] if kind.at_queries else reach_before[group.stage]
            drawn = torch.randint(2, (kind.n_signs, len(rows.x), len(i), rows.x.shape[1]), generator=signs)
            own = list(drawn.to(rows.weight) * 2 - 1)  # (B, k, T) each
            if reach is None:
                own[0] = rows.scored(own[0][..., None])[..., 0]
            state, samples = self._state(rows, group.stage), kind.samples(i)
            size = self.polls.chunk_size(rows, group.stage, kind.rank1)
            for k in (slice(at, at + size) for at in range(0, len(i), size)):
                some = Nodes(rows, state, i[k], step[k], tuple(sign[:, k] for sign in own), samples[k], reach)
                chunks.append((group, some))
        return chunks

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
        return reach

    @torch.no_grad()
    def _slopes(self, chunk: tuple[NodeGroup, Nodes]) -> list[tuple[Tensor, Tensor]]:
        """Coordinates and slopes of the weights of some nodes of a group, tensor by tensor."""
        (group, nodes), weight = chunk, chunk[1].rows.weight[:, None]  # (B, 1, S)
        losses = self._behind(nodes.rows, group.stage, group.kind.enter_nodes(nodes))
        incumbent = self._state(nodes.rows, len(self.stages) - 1).out  # (B, 1, S)
        change = losses * weight - incumbent * weight  # (B, k, S)
        if nodes.reach is not None:
            change = change @ nodes.reach  # (B, k, T)
        credit = change * nodes.signs[0] / (nodes.step * nodes.samples)[:, None]
        found = []
        for name, number in group.parameters.items():
            places, slopes = group.kind.slopes(nodes, name, credit)
            start = self.coordinates.ends[number] - self.coordinates.parameters[number].numel()
            found.append((start + places, slopes.double()))
        return found
