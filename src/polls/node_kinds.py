"""The nodes of a `DecoderOnlyTransformer`: how each kind is moved, and which slopes its weights then have.

`polls/nodes.py` moves them and gives the credit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polls.attention import Attention, AttentionState
from polls.rows import Rows
from polls.stages import (
    Embedding,
    EmbeddingState,
    Entry,
    FeedForward,
    FeedForwardState,
    Head,
    HeadState,
    Rank1,
    Stage,
)

Slopes = tuple[Tensor, Tensor]  # places in a tensor, flattened, and the slopes there, (m,) each

FAINT = 0.05  # a tie whose square is this part of the strongest one's counts half


def shares(squares: Tensor) -> Tensor:
    """How much ties count, from 0 to 1, by the squares of their strengths (..., ties)."""
    return squares / (squares + FAINT * squares.amax(-1, keepdim=True)).clamp_(min=1e-30)


@dataclass(frozen=True, slots=True)
class Nodes:
    """Some nodes of one kind, moved by steps with signs of their own.

    Attributes:
        stage, rows, state: where they are, some rows of the batch, what the incumbent computes there.
        i: (k,) which of the kind.
        step: (k,) by how much each is moved.
        sign: (B, k, tokens) of them at each token; behind the last attention, at each scored token.
        key_sign: (B, k, T) of the keys, for kinds that need them too.
    """

    stage: Any
    rows: Rows
    state: Any
    i: Tensor
    step: Tensor
    sign: Tensor
    key_sign: Tensor | None = None

    @property
    def change(self) -> Tensor:
        """(B, k, tokens)."""
        return self.sign * self.step[:, None]


class Kind(ABC):
    """Nodes of one kind.

    Attributes:
        tensors: names of the tensors that hold their weights.
        rank1: whether they enter the stream by a `Rank1`, which spares the next stage most of its work.
        at_queries: they sit where queries are needed, behind the mixing of the attention.
        moves_keys: whether a node has a second sign for each token, as a key.
    """

    tensors: tuple[str, ...]
    rank1 = True
    at_queries = False
    moves_keys = False

    def count(self, tensor: Tensor) -> int:
        """How many nodes have weights in one of their tensors."""
        return len(tensor)

    @abstractmethod
    def enter(self, u: Nodes) -> Entry:
        """What the moved nodes do behind their stage."""

    @abstractmethod
    def slopes(self, u: Nodes, name: str, credit: Tensor) -> Slopes:
        """Of all weights of the nodes in a tensor, from the credit (B, k, tokens): what a node is worth at a token."""

    def samples(self, stage: Any, i: Tensor) -> Tensor:
        """(k,) nodes -> (k,) numbers, equal for nodes that sample the slopes of the same weights."""
        return i


class Writers(Kind):
    """Nodes whose value is a linear map of what they read, and which change the stream by a direction of their own.

    Args:
        reads: by the name of a matrix: (stage, state, nodes (k,)) -> what the weights of a node in it read, (B, tokens,
            fan_in), or (B, k, tokens, fan_in) if nodes differ.
        bias: the name of a tensor that reads ones; none if "".
        first_direction: stage -> the first row of its directions that belongs to them; 0 if None.
        at_queries: see `Kind`.
        columns: whether a node is a column of its matrix, and not a row.
    """

    def __init__(
        self,
        reads: dict[str, Callable[[Any, Any, Tensor], Tensor]],
        bias: str = "",
        first_direction: Callable[[Any], int] | None = None,
        at_queries: bool = False,
        columns: bool = False,
    ):
        self.reads, self.bias, self.first_direction, self.columns = reads, bias, first_direction, columns
        self.tensors = (*reads, bias) if bias else tuple(reads)
        self.at_queries = at_queries

    def count(self, tensor: Tensor) -> int:
        return tensor.shape[1] if self.columns else len(tensor)

    def enter(self, u: Nodes) -> Rank1:
        first = self.first_direction(u.stage) if self.first_direction else 0
        return Rank1(self.scalar(u), u.stage.w.directions[u.i + first])

    def scalar(self, u: Nodes) -> Tensor:
        """(B, k, tokens): how much of its direction each node adds."""
        return u.change

    def slopes(self, u: Nodes, name: str, credit: Tensor) -> Slopes:
        if name == self.bias:
            return u.i, credit.sum((0, 2))
        read = self.reads[name](u.stage, u.state, u.i).to(credit)
        slopes = torch.einsum("bkt,bktf->kf" if read.ndim == 4 else "bkt,btf->kf", credit, read)
        # rows of an embedding behind the longest sequence of the batch are not read
        width, j = u.stage.tensors[name].shape[1], torch.arange(read.shape[-1], device=u.i.device)
        places = j * width + u.i[:, None] if self.columns else u.i[:, None] * width + j
        return places.flatten(), slopes.flatten()


class Hidden(Writers):
    """Nodes in front of the activation of a feed-forward."""

    def scalar(self, u: Nodes) -> Tensor:
        return u.stage.hidden_change(u.state, u.i, u.change)


class Normed(Kind):
    """Components of the output of a norm, which change what a layer reads."""

    tensors = ("gain", "bias")
    rank1 = False

    def enter(self, u: Nodes) -> Entry:
        return u.stage.change_norm(u.rows, u.state, u.change, u.i)

    def slopes(self, u: Nodes, name: str, credit: Tensor) -> Slopes:
        if name == "bias":
            return u.i, credit.sum((0, 2))
        return u.i, (credit * u.state.n.to(credit)[..., u.i].mT).sum((0, 2))


class FinalNormed(Normed):
    """Components of the output of the final norm, which change the logits."""

    rank1 = True

    def enter(self, u: Nodes) -> Rank1:
        return Rank1(u.change, u.stage.w.directions[u.i + len(u.stage.w.head)])


class Scores(Kind):
    """All scores of a head at once: as many nodes as it has components, which sample the same weights.

    A score is linear in the weights of its query, which read the query's input times the key, and in those of its key.
    It is moved by a sign of the query times one of the key, which is as good as a sign of its own: the products of
    different pairs are uncorrelated.
    """

    tensors = ("key", "query", "query_bias")
    rank1 = False
    at_queries = True
    moves_keys = True

    def enter(self, u: Nodes) -> Tensor:
        assert u.key_sign is not None
        query, key = u.change[..., None], u.key_sign[..., None]
        return u.stage.add_to_scores(u.rows, u.state, u.stage.head_of(u.i), query, key)

    def samples(self, stage: Any, i: Tensor) -> Tensor:
        return stage.head_of(i)

    def slopes(self, u: Nodes, name: str, credit: Tensor) -> Slopes:
        assert u.key_sign is not None
        stage, state, (queries, keys) = u.stage, u.state, u.stage.positions(u.rows)
        heads, of = stage.head_of(u.i).unique(return_inverse=True)  # (h,)
        weights = state.weights[:, heads]  # (B, h, queries, T)
        pairs = torch.zeros_like(weights).index_add_(1, of, credit[..., None] * u.key_sign[:, :, None])
        pairs *= shares(weights.square())
        pairs -= weights * pairs.sum(-1, keepdim=True)  # softmax sees no shift: a query's slopes sum to 0
        if name == "key":
            inputs, at, other = state.inputs, keys, pairs.mT @ stage.heads(state.turned_query.mT)[:, heads]
        else:
            inputs, at = stage.queries(u.rows, state.inputs), queries
            other = pairs @ stage.heads(state.turned_key.mT)[:, heads] * stage.w.scale
        other = stage.turn(other, -at)  # (B, h, tokens, d/H), as it was before the query or key was turned
        i = (heads[:, None] * other.shape[-1] + torch.arange(other.shape[-1], device=heads.device)).flatten()
        if name == "query_bias":
            return i, other.sum((0, 2)).flatten()
        width = inputs.shape[-1]
        places = i[:, None] * width + torch.arange(width, device=i.device)
        return places.flatten(), torch.einsum("bhti,btf->hif", other, inputs).flatten()


def tokens(stage: Embedding, state: EmbeddingState, i: Tensor) -> Tensor:
    return state.where[:, : stage.n_tokens].mT


def positions(stage: Embedding, state: EmbeddingState, i: Tensor) -> Tensor:
    return state.where[:, stage.n_tokens : -1].mT


def mixed_inputs(stage: Attention, state: AttentionState, i: Tensor) -> Tensor:
    """(B, k, queries, d): what the head of each node mixes from the inputs of its values."""
    by_head = stage.heads(state.sources[:, 1 + len(stage.w.out) :].mT)
    return by_head[:, stage.head_of(i)]


def mixed_values(stage: Attention, state: AttentionState, i: Tensor) -> Tensor:
    return state.sources[:, 1 : 1 + len(stage.w.out)].mT


def normed_inputs(stage: FeedForward, state: FeedForwardState, i: Tensor) -> Tensor:
    return state.inputs[:, 1:].mT


def hidden_nodes(stage: FeedForward, state: FeedForwardState, i: Tensor) -> Tensor:
    return state.hidden[:, 1:].mT


def head_inputs(stage: Head, state: HeadState, i: Tensor) -> Tensor:
    return state.n * stage.w.gain + stage.w.bias


def behind_unit_vectors(stage: Attention | FeedForward) -> int:
    """The first of the directions that are columns of the stage's last matrix: there are d unit vectors before."""
    return len(stage.w.columns)


KINDS: dict[type[Stage], tuple[Kind, ...]] = {
    Embedding: (Writers({"token": tokens, "position": positions}, columns=True),),
    Attention: (
        Normed(),
        Scores(),
        Writers({"value": mixed_inputs}, "value_bias", behind_unit_vectors, at_queries=True),
        Writers({"out": mixed_values}, "out_bias", at_queries=True),
    ),
    FeedForward: (
        Normed(),
        Hidden({"inner": normed_inputs}, "inner_bias", behind_unit_vectors),
        Writers({"outer": hidden_nodes}, "outer_bias"),
    ),
    Head: (FinalNormed(), Writers({"head": head_inputs}, "head_bias")),
}
