"""The nodes of a `DecoderOnlyTransformer`: how each kind is moved, and which slopes its weights then have.

`polls/nodes.py` moves them and gives the credit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace as Values

import torch
from torch import Tensor

from polls.stages import Attention, Embedding, FeedForward, Head, Rank1, Rows, Stage

Entry = Rank1 | Tensor | tuple[Tensor, Tensor]  # what a way in of `Stage` gives
Slopes = tuple[Tensor, Tensor]  # places in a tensor, flattened, and the slopes there, (m,) each

FAINT = 0.05  # a tie whose square is this part of the strongest one's counts half


def shares(squares: Tensor) -> Tensor:
    """How much ties count, from 0 to 1, by the squares of their strengths (..., ties)."""
    return squares / (squares + FAINT * squares.amax(-1, keepdim=True)).clamp_(min=1e-30)


@dataclass(frozen=True)
class Nodes:
    """Some nodes of one kind, moved by steps with signs of their own.

    Attributes:
        stage, rows, state: where they are, some rows of the batch, what the incumbent computes there.
        i: (k,) which of the kind.
        step: (k,) by how much each is moved.
        signs: of them at each token, (B, k, tokens), and of the keys, (B, k, T), where the kind needs them too.
    """

    stage: Stage
    rows: Rows
    state: Values
    i: Tensor
    step: Tensor
    signs: tuple[Tensor, ...]

    @property
    def change(self) -> Tensor:
        """(B, k, tokens)."""
        return self.signs[0] * self.step[:, None]

    def places(self, name: str, i: Tensor, fan_in: int) -> Tensor:
        """Where the first `fan_in` weights of nodes i (k,) stand in a matrix, (k fan_in,)."""
        width = self.stage.tensors[name].shape[1]
        j = torch.arange(fan_in)
        # of an embedding, a node is a column, and rows behind the longest sequence of the batch are not read
        return (j * width + i[:, None] if isinstance(self.stage, Embedding) else i[:, None] * width + j).flatten()


@dataclass(frozen=True)
class Kind:
    """Nodes of one kind.

    Attributes:
        enter: nodes -> `Entry`.
        reads: by the name of a tensor, what the weights of a node in it read, (B, tokens, fan_in), or (B, k, tokens,
            fan_in) if nodes differ; of a norm's gain, what each node's own reads.
        bias: the name of a tensor that reads ones.
        at_queries: they sit where queries are needed, behind the mixing of the attention.
        draws: of signs for each node and token.
    """

    enter: Callable[[Nodes], Entry]
    reads: dict[str, Callable[[Nodes], Tensor]]
    bias: str = ""
    at_queries: bool = False
    draws: int = 1

    def samples(self, stage: Stage, i: Tensor) -> Tensor:
        """(k,) nodes -> (k,) numbers, equal for nodes that sample the slopes of the same weights."""
        return i

    def slopes(self, u: Nodes, name: str, credit: Tensor) -> Slopes:
        """Of all weights of the nodes in a tensor, from the credit (B, k, tokens): what a node is worth at a token."""
        if name == self.bias:
            return u.i, credit.sum((0, 2))
        read = self.reads[name](u).to(credit)
        if u.stage.tensors[name].ndim == 1:  # a gain
            return u.i, (credit * read[..., u.i].mT).sum((0, 2))
        slopes = torch.einsum("bkt,bktf->kf" if read.ndim == 4 else "bkt,btf->kf", credit, read)
        return u.places(name, u.i, read.shape[-1]), slopes.flatten()


class Scores(Kind):
    """All scores of a head at once: as many nodes as it has components, which sample the same weights.

    A score is linear in the weights of its query, which read the query's input times the key, and in those of its key.
    It is moved by a sign of the query times one of the key, which is as good as a sign of its own: the products of
    different pairs are uncorrelated.
    """

    def __init__(self) -> None:
        super().__init__(enter_scores, dict.fromkeys(("key", "query")), "query_bias", at_queries=True, draws=2)

    def samples(self, stage: Attention, i: Tensor) -> Tensor:
        return stage.head_of(i)

    def slopes(self, u: Nodes, name: str, credit: Tensor) -> Slopes:
        stage, state, (queries, keys) = u.stage, u.state, u.stage.positions(u.rows)
        heads, of = stage.head_of(u.i).unique(return_inverse=True)  # (h,)
        weights = state.weights[:, heads]  # (B, h, queries, T)
        pairs = torch.zeros_like(weights).index_add_(1, of, credit[..., None] * u.signs[1][:, :, None])
        pairs *= shares(weights.square())
        pairs -= weights * pairs.sum(-1, keepdim=True)  # softmax sees no shift: a query's slopes sum to 0
        if name == "key":
            inputs, at, other = state.inputs, keys, pairs.mT @ stage.heads(state.turned_query.mT)[:, heads]
        else:
            inputs, at = stage.queries(u.rows, state.inputs), queries
            other = pairs @ stage.heads(state.turned_key.mT)[:, heads] * stage.w.scale
        other = stage.turn(other, -at)  # (B, h, tokens, d/H), as it was before the query or key was turned
        i = (heads[:, None] * other.shape[-1] + torch.arange(other.shape[-1])).flatten()
        if name == self.bias:
            return i, other.sum((0, 2)).flatten()
        return u.places(name, i, inputs.shape[-1]), torch.einsum("bhti,btf->hif", other, inputs).flatten()


def enter_stream(u: Nodes, first: int = 0) -> Rank1:
    return Rank1(u.change, u.stage.w.directions[u.i + first])


def enter_mixed(u: Nodes) -> Rank1:
    return enter_stream(u, len(u.stage.w.out))


def enter_inner(u: Nodes) -> Rank1:
    scalar = (u.state.before[:, u.i] + u.change).relu_() - u.state.hidden[:, u.i + 1]
    return Rank1(scalar, u.stage.w.directions[u.i + len(u.stage.w.outer)])


def enter_scores(u: Nodes) -> Tensor:
    query, key = u.change[..., None], u.signs[1][..., None]
    return u.stage.add_to_scores(u.rows, u.state, u.stage.head_of(u.i), query, key)


def enter_norm(u: Nodes) -> Tensor:
    return u.stage.change_norm(u.stage.w, u.rows, u.state, u.change, u.i)


def enter_logits(u: Nodes, first: int = 0) -> tuple[Tensor, Tensor]:
    direction = u.stage.w.directions[u.i + first].T[:, None, :, None]
    return u.rows.loss(u.state.logits[:, :, None] + u.change * direction), u.change  # of (C, B, k, S)


def enter_final_norm(u: Nodes) -> tuple[Tensor, Tensor]:
    return enter_logits(u, len(u.stage.w.head))


def mixed_inputs(u: Nodes) -> Tensor:
    """(B, k, queries, d): what the head of each node mixes from the inputs of its values."""
    by_head = u.stage.heads(u.state.sources[:, 1 + len(u.stage.w.out) :].mT)
    return by_head[:, u.stage.head_of(u.i)]


RANK1 = (enter_stream, enter_mixed, enter_inner)  # these spare the next stage most of its work

KINDS: dict[type[Stage], tuple[Kind, ...]] = {
    Embedding: (
        Kind(
            enter_stream,
            {
                "token": lambda u: u.state.where[:, : u.stage.n_tokens].mT,
                "position": lambda u: u.state.where[:, u.stage.n_tokens : -1].mT,
            },
        ),
    ),
    Attention: (
        Kind(enter_norm, {"gain": lambda u: u.state.n}, "bias"),
        Scores(),
        Kind(enter_mixed, {"value": mixed_inputs}, "value_bias", at_queries=True),
        Kind(
            enter_stream,
            {"out": lambda u: u.state.sources[:, 1 : 1 + len(u.stage.w.out)].mT},
            "out_bias",
            at_queries=True,
        ),
    ),
    FeedForward: (
        Kind(enter_norm, {"gain": lambda u: u.state.n}, "bias"),
        Kind(enter_inner, {"inner": lambda u: u.state.inputs[:, 1:].mT}, "inner_bias"),
        Kind(enter_stream, {"outer": lambda u: u.state.hidden[:, 1:].mT}, "outer_bias"),
    ),
    Head: (
        Kind(enter_final_norm, {"gain": lambda u: u.state.n}, "bias"),
        Kind(enter_logits, {"head": lambda u: u.state.n * u.stage.w.gain + u.stage.w.bias}, "head_bias"),
    ),
}
