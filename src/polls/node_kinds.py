"""How candidates enter the model: the kinds of its nodes, and what a moved node does to the residual stream.

A *node* is one component of what a layer puts out: of a linear map, an embedding or a norm. A weight that moves by a
step moves its node by the step times what it reads, so a single weight enters as its node does. The slopes of all
weights of a node follow from what the node is worth (`polls/nodes.py`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from polls.rows import Rows, State

EPS = 1e-5  # of every LayerNorm, torch's default
FAINT = 0.05  # a tie whose square is this part of the strongest one's counts half


@dataclass(frozen=True, slots=True)
class Rank1:
    """What candidates add to the residual stream: scalar (B, K, T) times direction (K, d).

    Candidates that enter at the head add it to the logits: scalar (B, K, S) times direction (K, C).
    """

    scalar: Tensor
    direction: Tensor

    def added_to(self, x: Tensor) -> Tensor:
        """Stream of the incumbent (B, T, d) -> streams of the candidates (B, K, T, d)."""
        return torch.addcmul(x[:, None], self.scalar[..., None], self.direction[:, None])

    def scale(self, x: Tensor, square: Tensor) -> Tensor:
        """What the norm multiplies the candidates' streams with, (B, K, T): |x + s v|^2 needs no candidate's stream.

        Args:
            x: (B, T, d) the incumbent's stream.
            square: (B, T, 1) its `stages.mean_square`.
        """
        s, v = self.scalar, self.direction
        along = torch.baddbmm(s * v.square().mean(1)[:, None], v.expand(len(x), -1, -1), x.mT, alpha=2 / x.shape[-1])
        return torch.addcmul(square.mT, s, along).clamp_(min=EPS).rsqrt_()


Entry = Rank1 | Tensor  # what candidates do behind the stage they enter: a rank-1 change of the stream, or their stream
S = TypeVar("S", bound=State)  # what the incumbent computes at a stage


class Moves(NamedTuple):
    """k candidates of one tensor: weight[i, j] + step, each (k,); j is 0 in a vector."""

    i: Tensor
    j: Tensor
    step: Tensor


@dataclass(frozen=True, slots=True)
class Nodes(Generic[S]):
    """Some nodes of one kind, moved at every token of some rows by a step with a sign of its own.

    Attributes:
        state: what the incumbent computes on the rows at their stage.
        i: (k,) which of the kind.
        change: (B, k, tokens) by how much they move; behind the last attention, the tokens are the scored ones.
        key_signs: (B, k, T) of the keys, where the nodes are scores of pairs of a query and a key.
    """

    rows: Rows
    state: S
    i: Tensor
    change: Tensor
    key_signs: Tensor


class Credit(NamedTuple):
    """What nodes are worth at every token, (k, B tokens), and in all, (k,)."""

    flat: Tensor
    total: Tensor


@dataclass(frozen=True, eq=False)
class Kind(Generic[S]):
    """Nodes of one kind at a stage. The weights of node i are row i of a matrix and number i of a vector.

    Attributes:
        n: how many nodes there are.
        tensors: names of the tensors that hold their weights.
        enter: (rows, state, nodes (k,), changes (B, k, tokens)) -> what the changed nodes do behind their stage.
        rank1: whether that is a `Rank1`, which spares the next stage most of its work.
        at_queries: whether they sit behind the mixing of an attention, where only its queries are needed.
        shared: how many nodes in a row sample the slopes of the same weights.
    """

    n: int
    tensors: tuple[str, ...]
    enter: Callable[..., Entry]
    rank1: bool = True
    at_queries: bool = False
    shared: int = 1

    def enter_weights(self, rows: Rows, state: S, moves: dict[str, Moves]) -> Entry:
        """What candidates do that move single weights, given by the names of their tensors."""
        nodes, *changes = zip(*(self.changes(rows, state, name, m) for name, m in moves.items()), strict=True)
        return self.enter(rows, state, torch.cat(nodes), *(torch.cat(change, 1) for change in changes))

    def changes(self, rows: Rows, state: S, name: str, m: Moves) -> tuple[Tensor, ...]:
        """Of moves of a tensor: the nodes (k,), and by how much they change, (B, k, tokens)."""
        return m.i, state.reads[name][..., m.i if name == "gain" else m.j].mT * m.step[:, None]

    def enter_nodes(self, u: Nodes[S]) -> Entry:
        """What the moved nodes do behind their stage."""
        return self.enter(u.rows, u.state, u.i, u.change)

    def slopes(self, u: Nodes[S], credit: Credit, names: Iterable[str]) -> dict[str, Tensor]:
        """Of the nodes' weights in some tensors, (k,) or (k, columns) each."""
        return {name: self.slope(u, credit, name) for name in names}

    def slope(self, u: Nodes[S], credit: Credit, name: str) -> Tensor:
        if name.endswith("bias"):
            return credit.total
        read = u.state.reads[name].to(credit.flat)
        if name == "gain":
            return torch.einsum("kn,nk->k", credit.flat, read[..., u.i].flatten(0, 1))
        return credit.flat @ read.flatten(0, 1)

    def add(self, slopes: Tensor, i: Tensor, found: Tensor) -> None:
        """Add the slopes that were found for the weights of nodes i (k,) to those of their tensor."""
        slopes.index_add_(0, i, found)

    def owners(self, shape: torch.Size) -> np.ndarray:
        """The first node that samples the slope of each weight of a tensor of this shape."""
        nodes = np.arange(shape[0]) // self.shared * self.shared
        return np.broadcast_to(nodes[:, None] if len(shape) == 2 else nodes, shape)


class Columns(Kind[S]):
    """Nodes whose weights are columns of their matrices: the components of an embedding."""

    def changes(self, rows: Rows, state: S, name: str, m: Moves) -> tuple[Tensor, ...]:
        read = state.reads[name]
        known = m.i < read.shape[-1]  # a position behind the last token is read nowhere
        return m.j, (read[..., m.i.where(known, 0)] * known).mT * m.step[:, None]

    def add(self, slopes: Tensor, i: Tensor, found: Tensor) -> None:
        slopes[: found.shape[1]].index_add_(1, i, found.mT)

    def owners(self, shape: torch.Size) -> np.ndarray:
        return np.broadcast_to(np.arange(shape[1]), shape)


def joined(entries: list[Rank1]) -> Rank1:
    """One entry for the candidates of several."""
    if len(entries) == 1:
        return entries[0]
    return Rank1(torch.cat([entry.scalar for entry in entries], 1), torch.cat([entry.direction for entry in entries]))


def shares(squares: Tensor) -> Tensor:
    """How much ties count, from 0 to 1, by the squares of their strengths (..., ties)."""
    return squares / squares.add(squares.amax(-1, keepdim=True), alpha=FAINT).clamp_(min=1e-30)
