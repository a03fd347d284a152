"""Slopes of whole rows of weights from the losses of single tokens, for `DecoderOnlyTransformer`.

A *node* is one component of what a layer puts out: of a linear map, an embedding or a norm. Move it by a step whose
sign is drawn anew for every token of every sequence, and look at the loss of every scored token. A token's own sign
is independent of all others, so the change of the losses that it can reach (its own and the later ones of its
sequence), times its sign, is an unbiased sample of what the node is worth at that token: its credit. Times what a
weight of the node reads there, summed over the tokens, it is a sample of the slope of that weight, and of all weights
of the node at once: one evaluation, where polls of single weights need one each. It is node perturbation (Williams
1992; Flower and Jabri 1993); losses alone, no backward pass. Three things make a sample say more:

- Behind the last attention a token reaches its own loss only, so there slopes are exact but for the step's curvature.
  Values are moved there, as their head has mixed them, and not before.
- Queries and keys are moved where they meet, in the scores of a head: one evaluation tells the slopes of all weights
  of both. A score far off the others of its query, softmax hardly sees: it counts as `polls.node_kinds.shares` says.
- Before the last attention, what the other tokens of the sequence do to a loss is noise in a token's credit. A loss
  counts for a token by how much its own token looks at it through the attention of all blocks behind (attention
  rollout, Abnar and Zuidema 2020), which trades a little bias for most of the noise.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from polls.node_kinds import KINDS, RANK1, Nodes, shares
from polls.stages import Attention, Embedding, Head, Rows
from polls.structured import StructuredPolls
from polls.threads import one_thread
from search.coordinates import Coordinates


class NodePolls(StructuredPolls):
    """`StructuredPolls` that also tell the slopes of whole nodes: `nodes`.

    Nodes are numbered from 0 over the kinds of all stages, in the order of the model. There are `n_nodes`; the
    weights of node u belong to parameter number `node_parameter[u]`.
    """

    def __init__(self, model: Any, coordinates: Coordinates, loss: Callable[[Any, Any], Tensor], threads: int = 1):
        super().__init__(model, coordinates, loss, threads)
        number = {id(p): i for i, p in enumerate(coordinates.parameters)}
        self.kinds, owners = [], []  # stage, kind, the numbers of its tensors by their names, its first node
        for s, stage in enumerate(self.stages):
            for kind in KINDS[type(stage)]:
                held = {name: number.get(id(stage.tensors.get(name))) for name in (*kind.reads, kind.bias)}
                held = {name: n for name, n in held.items() if n is not None}
                if held:
                    size = stage.tensors[next(iter(held))].shape[-1 if isinstance(stage, Embedding) else 0]
                    self.kinds.append((s, kind, held, sum(map(len, owners))))
                    owners.append(torch.full((size,), next(iter(held.values()))))
        self.node_parameter = torch.cat(owners)
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
        firsts = [first for *_, first in self.kinds] + [self.n_nodes]
        bounds = torch.searchsorted(nodes, torch.tensor(firsts)).tolist()
        slopes = torch.zeros(len(self.coordinates), dtype=torch.float64)
        polled = torch.zeros(len(slopes), dtype=torch.bool)
        self()  # brings the caches up to date
        for rows in self.rows:
            state, by_token, tasks = self._state(rows, len(self.stages) - 1), rows.each_token(), []
            loss, reach = by_token.loss(state.logits[:, :, None])[:, 0], self._reach(rows)
            for (s, kind, held, first), begin, end in zip(self.kinds, bounds, bounds[1:], strict=False):
                stage, i, reached = self.stages[s], nodes[begin:end] - first, reach[s + kind.at_queries]
                sign = torch.randint(2, (kind.draws, len(rows.x), len(i), rows.x.shape[1]), generator=signs)
                sign = sign.to(loss) * 2 - 1
                _, group, samples = kind.samples(stage, i).unique(return_inverse=True, return_counts=True)
                size = self._chunk(rows, s + (kind.enter in RANK1))
                for at in range(0, len(i), size):
                    k = slice(at, at + size)
                    moved = Nodes(stage, by_token, self._state(rows, s), i[k], steps[begin:end][k], sign[:, :, k])
                    tasks.append((s, kind, held, moved, loss, reached, samples[group[k]]))
            for where, found in (pair for pairs in self.map(self._slopes, tasks) for pair in pairs):
                slopes.index_add_(0, where, found)
                polled[where] = True
        coordinates = polled.nonzero().flatten()
        return coordinates, slopes[coordinates]

    def _reach(self, rows: Rows) -> list[Tensor | None]:
        """How much scored tokens count for each token, (B, S, T), if it is moved before stage 0, 1, ...

        None behind the last attention, where a token reaches nothing but its own loss.
        """
        own, ties, reach = torch.eye(rows.x.shape[1]), None, [None] * (len(self.stages) + 1)
        for s in range(len(self.stages) - 3, -1, -1):
            if isinstance(self.stages[s], Attention):
                weights = self._state(rows, s).weights  # (B, H, queries, T)
                step = weights.square().sum(1) + (own[rows.at] if ties is None else own).to(weights)
                ties = step if ties is None else ties @ step
            reach[s] = shares(ties)
        return reach

    @torch.no_grad()
    def _slopes(self, task: tuple) -> list[tuple[Tensor, Tensor]]:
        """Coordinates and slopes of the weights of some nodes of one kind, tensor by tensor."""
        s, kind, held, nodes, loss, reach, samples = task
        rows, first = nodes.rows, nodes.signs[0]
        if reach is None:
            first = rows.scored(first[..., None])[..., 0]  # (B, k, S)
        nodes = replace(nodes, signs=(first, *nodes.signs[1:]))
        entry = kind.enter(nodes)
        losses = entry[0] if isinstance(nodes.stage, Head) else self._behind(rows, s, entry)
        change = losses - loss[:, None]  # (B, k, S)
        if reach is not None:
            change = change @ reach  # (B, k, T)
        credit = change * first / (nodes.step * samples)[:, None]
        found = []
        for name, number in held.items():
            places, slopes = kind.slopes(nodes, name, credit)
            start = self.coordinates.ends[number] - self.coordinates.parameters[number].numel()
            found.append((start + places, slopes.double()))
        return found
