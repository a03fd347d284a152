"""The stages of `DecoderOnlyTransformer` as `polls/structured.py` evaluates them, and how candidates enter them.

The model is a chain of stages: embedding, attention (`polls/attention.py`) and feed-forward of every
block, head. In the last block only the scored positions are computed. The residual stream is kept
centred: a LayerNorm subtracts its mean anyway, so it becomes an RMS norm, and its gain and bias are
folded into the matrix behind it.

Shapes: B rows of the batch, K candidates, T tokens, S scored positions, H heads, F = d_ff, C classes.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from polls.node_kinds import EPS, Columns, Kind, Rank1, S
from polls.rows import Rows, State
from polls.shared import version
from transformer import Block, DecoderOnlyTransformer


@dataclass(frozen=True, slots=True)
class Weights:
    """The parameters of a stage as the computations read them.

    Attributes:
        directions: by the name of a matrix, what its nodes add to the stream (n, d), or to the logits (n, C).
    """

    directions: dict[str, Tensor]


W = TypeVar("W", bound=Weights)


class Stage(ABC, Generic[W, S]):
    """A part of the model that reads the residual stream and writes to it.

    Args:
        tensors: its parameters by their names within the stage.

    Attributes:
        kinds: of its nodes, in the order in which nodes are numbered: those of rank 1 last.
        w: the parameters as the computations read them; `refresh` replaces them when a tensor changed.
    """

    kinds: tuple[Kind[S], ...]
    w: W

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self._versions: list[tuple[int, int, torch.dtype]] = []
        self.refresh()

    def refresh(self) -> None:
        """Fold anew if a tensor was changed in place, or its memory exchanged."""
        versions = [version(p) for p in self.tensors.values()]
        if versions != self._versions:
            self._versions, self.w = versions, self.fold(self.tensors)

    def inputs(self, n: Tensor) -> Tensor:
        """The normed stream (..., d) with gain and bias: what the matrices behind the norm read."""
        return torch.addcmul(self.tensors["bias"], n, self.tensors["gain"])

    def write(self, matrix: str, rows: Rows, state: S, i: Tensor, change: Tensor) -> Rank1:
        """Nodes (k,) that change by (B, k, tokens) add as much of their directions."""
        return Rank1(change, self.w.directions[matrix][i])

    @property
    def size(self) -> int:
        """Weights of its matrices."""
        return sum(p.numel() for p in self.tensors.values() if p.ndim == 2)

    @abstractmethod
    def fold(self, t: dict[str, Tensor]) -> W:
        """The parameters t, by name, as the computations read them; K of each, (K, ...), give K of what is read."""

    @abstractmethod
    def forward(self, w: W, rows: Rows, x: Tensor) -> Tensor:
        """What the stage writes for K candidates: x and result (B, K, T, d).

        All have the same weights w, or each has its own (K, ...), as in a trial. The embedding reads the tokens
        (B, T) as x. The head gives the losses of the tokens, (B, K, S).
        """

    @abstractmethod
    def incumbent(self, rows: Rows, x: Tensor) -> S:
        """All that candidates read which enter here, or next: x (B, T, d) is what the stage in front writes."""

    def forward_rank1(self, rows: Rows, state: S, entry: Rank1) -> Tensor:
        """The same as `forward` for candidates whose stream differs by a rank-1 term from the incumbent's."""
        raise NotImplementedError  # nothing enters in front of the embedding


@dataclass(frozen=True, slots=True)
class EmbeddingWeights(Weights):
    token: Tensor  # (V, d), centred
    position: Tensor | None  # (max_len, d), centred


class Embedding(Stage[EmbeddingWeights, State]):
    """Token and position embeddings; writes the first stream."""

    def __init__(self, model: DecoderOnlyTransformer):
        self.sinusoids = model.get_buffer("sinusoids") if model.positions == "sinusoidal" else None
        tensors: dict[str, Tensor] = {"token": model.token_embedding.weight}
        if model.positions == "learned":
            tensors["position"] = model.position_embedding.weight
        super().__init__(tensors)
        d_model = model.token_embedding.embedding_dim
        self.kinds = (Columns(d_model, ("token", "position"), partial(self.write, "token")),)

    def fold(self, t: dict[str, Tensor]) -> EmbeddingWeights:
        token, position = centred(t["token"], -1), t.get("position", self.sinusoids)
        if position is not None:
            position = centred(position.to(token), -1)
        return EmbeddingWeights(token=token, position=position, directions={"token": unit_vectors(token)})

    def forward(self, w: EmbeddingWeights, rows: Rows, x: Tensor) -> Tensor:
        """Tokens (B, T) -> (B, K, T, d)."""
        stream = w.token[..., x, :]  # (B, T, d) or (K, B, T, d)
        if w.position is not None:
            stream = stream + w.position[..., None, : x.shape[1], :]
        return stream.transpose(0, 1) if stream.ndim == 4 else stream[:, None]

    def incumbent(self, rows: Rows, x: Tensor) -> State:
        (n_rows, length), n_tokens = x.shape, len(self.w.token)
        is_token = x[..., None] == torch.arange(n_tokens, device=x.device)  # (B, T, V)
        is_position = torch.eye(length, dtype=torch.bool, device=x.device).expand(n_rows, -1, -1)  # (B, T, T)
        return State(self.forward(self.w, rows, x)[:, 0], {"token": is_token, "position": is_position})


@dataclass(frozen=True, slots=True)
class FeedForwardWeights(Weights):
    inner: Tensor  # (F, d), behind the gain
    inner_bias: Tensor  # (F,), with what the norm's bias adds
    outer: Tensor  # (d, F), centred
    outer_bias: Tensor  # (d,), centred
    columns: Tensor  # (d, F): what a component of the norm's output does to the hidden nodes


@dataclass(frozen=True, slots=True)
class FeedForwardState(State):
    x: Tensor  # (B, T, d)
    square: Tensor  # (B, T, 1), `mean_square` of x
    u: Tensor  # (B, T, F), before the activation
    raw: Tensor  # (B, T, F), u before the norm divides and the bias is added


class FeedForward(Stage[FeedForwardWeights, FeedForwardState]):
    """Feed-forward of one block, with its norm."""

    def __init__(self, block: Block):
        ff, norm = block.ff, block.ff_norm
        inner = {"gain": norm.weight, "bias": norm.bias, "inner": ff.inner.weight, "inner_bias": ff.inner.bias}
        super().__init__({**inner, "outer": ff.outer.weight, "outer_bias": ff.outer.bias})
        d_ff, d_model = ff.inner.weight.shape
        outer = Kind[FeedForwardState](d_model, ("outer", "outer_bias"), partial(self.write, "outer"))
        hidden = Kind[FeedForwardState](d_ff, ("inner", "inner_bias"), self.enter_hidden)
        normed = Kind[FeedForwardState](d_model, ("gain", "bias"), self.enter_norm, rank1=False)
        self.kinds = (normed, hidden, outer)

    def fold(self, t: dict[str, Tensor]) -> FeedForwardWeights:
        inner, outer = t["inner"], centred(t["outer"], -2)
        return FeedForwardWeights(
            inner=inner * t["gain"][..., None, :], inner_bias=times(inner, t["bias"], t["inner_bias"]),
            outer=outer, outer_bias=centred(t["outer_bias"], -1), columns=inner.mT,
            directions={"outer": unit_vectors(outer.mT), "inner": outer.mT},
        )  # fmt: skip

    def forward(self, w: FeedForwardWeights, rows: Rows, x: Tensor) -> Tensor:
        hidden = linear(norm(x), w.inner, w.inner_bias).relu_()
        return linear(hidden, w.outer, w.outer_bias).add_(x)

    def forward_rank1(self, rows: Rows, state: FeedForwardState, entry: Rank1) -> Tensor:
        """The inner matrix is linear, so it acts on the incumbent and on the direction, once each."""
        w, s, v = self.w, entry.scalar[..., None], entry.direction[:, None]  # (B, K, T, 1), (K, 1, d)
        u = torch.addcmul(state.raw[:, None], s, v @ w.inner.T)  # (B, K, T, F)
        hidden = u.mul_(entry.scale(state.x, state.square)[..., None]).add_(w.inner_bias).relu_()
        return F.linear(hidden, w.outer, w.outer_bias).add_(state.x[:, None]).addcmul_(s, v)

    def incumbent(self, rows: Rows, x: Tensor) -> FeedForwardState:
        w, square, raw = self.w, mean_square(x), x @ self.w.inner.mT
        n = x * square.rsqrt()
        u = F.linear(n, w.inner, w.inner_bias)
        hidden, one, inputs = u.relu(), rows.ones(n), self.inputs(n)
        return FeedForwardState(
            out=F.linear(hidden, w.outer, w.outer_bias).add_(x), x=x, square=square, u=u, raw=raw,
            reads={"gain": n, "bias": one, "inner": inputs, "inner_bias": one, "outer": hidden, "outer_bias": one},
        )  # fmt: skip

    def enter_hidden(self, rows: Rows, state: FeedForwardState, i: Tensor, change: Tensor) -> Rank1:
        """Hidden nodes (k,) whose input changes by (B, k, T)."""
        change = (state.u[..., i].mT + change).relu_() - state.reads["outer"][..., i].mT
        return self.write("inner", rows, state, i, change)

    def enter_norm(self, rows: Rows, state: FeedForwardState, i: Tensor, change: Tensor) -> Tensor:
        """Components (k,) of the norm's output that change by (B, k, T)."""
        hidden = Rank1(change, self.w.columns[i]).added_to(state.u).relu_()  # (B, K, T, F)
        return F.linear(hidden, self.w.outer, self.w.outer_bias).add_(state.x[:, None])


@dataclass(frozen=True, slots=True)
class HeadWeights(Weights):
    head: Tensor  # (C, d), behind the gain
    head_bias: Tensor  # (C,), with what the norm's bias adds


@dataclass(frozen=True, slots=True)
class HeadState(State):
    x: Tensor  # (B, S, d)
    square: Tensor  # (B, S, 1), `mean_square` of x
    logits: Tensor  # (C, B, S)
    raw: Tensor  # (C, B, S), logits before the norm divides and the bias is added


class Head(Stage[HeadWeights, HeadState]):
    """Final norm, output classes and losses, at the scored positions. Candidates enter into the logits."""

    def __init__(self, model: DecoderOnlyTransformer):
        norm, head = model.norm, model.head
        super().__init__({"gain": norm.weight, "bias": norm.bias, "head": head.weight, "head_bias": head.bias})
        normed = Kind[HeadState](head.in_features, ("gain", "bias"), partial(self.write, "normed"))
        classes = Kind[HeadState](head.out_features, ("head", "head_bias"), partial(self.write, "head"))
        self.kinds = (normed, classes)

    def fold(self, t: dict[str, Tensor]) -> HeadWeights:
        head = t["head"]
        classes = torch.eye(head.shape[-2], dtype=head.dtype, device=head.device)
        return HeadWeights(
            head=head * t["gain"][..., None, :], head_bias=times(head, t["bias"], t["head_bias"]),
            directions={"head": classes, "normed": head.mT},
        )  # fmt: skip

    def forward(self, w: HeadWeights, rows: Rows, x: Tensor) -> Tensor:
        """Streams (B, K, S, d) -> losses of the tokens (B, K, S)."""
        if w.head.ndim == 3:
            return rows.token_losses(linear(norm(x), w.head, w.head_bias).movedim(-1, 0))
        logits = w.head @ norm(x).flatten(0, -2).T  # (C, B K S)
        return rows.token_losses(logits.add_(w.head_bias[:, None]).unflatten(1, x.shape[:-1]))

    def incumbent(self, rows: Rows, x: Tensor) -> HeadState:
        w, square = self.w, mean_square(x)
        n = x * square.rsqrt()
        logits = (w.head @ n.flatten(0, -2).T + w.head_bias[:, None]).unflatten(1, x.shape[:-1])
        raw = (w.head @ x.flatten(0, -2).T).unflatten(1, x.shape[:-1])
        one = rows.ones(n)
        return HeadState(
            out=rows.token_losses(logits[:, :, None]), x=x, square=square, logits=logits, raw=raw,
            reads={"gain": n, "bias": one, "head": self.inputs(n), "head_bias": one},
        )  # fmt: skip

    def changed_losses(self, rows: Rows, state: HeadState, change: Rank1) -> Tensor:
        """Losses of the tokens (B, K, S) for candidates that enter into the logits."""
        logits = torch.addcmul(state.logits[:, :, None], change.scalar, change.direction.T[:, None, :, None])
        return rows.token_losses(logits)  # of (C, B, K, S)

    def forward_rank1(self, rows: Rows, state: HeadState, entry: Rank1) -> Tensor:
        """Losses of the tokens (B, K, S) from C numbers per token instead of d."""
        w, s = self.w, entry.scalar
        logits = torch.addcmul(state.raw[:, :, None], s, (w.head @ entry.direction.T)[:, None, :, None])  # (C, B, K, S)
        return rows.token_losses(logits.mul_(entry.scale(state.x, state.square)).add_(w.head_bias[:, None, None, None]))


def norm(x: Tensor) -> Tensor:
    """LayerNorm without gain and bias, of a stream (..., d) that is centred already."""
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], eps=EPS)  # one kernel there, but slower on a CPU
    return x * mean_square(x).rsqrt_()


def mean_square(x: Tensor) -> Tensor:
    """(..., d) -> (..., 1) by the root of which a norm divides."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(epsilon(x.dtype, x.device), length, length, value=1 / x.shape[-1])


@lru_cache(maxsize=4)
def epsilon(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(EPS, dtype=dtype, device=device)


def centred(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def unit_vectors(x: Tensor) -> Tensor:
    """The centred unit vectors (d, d) of a stream whose vectors are like x (..., d)."""
    return centred_identity(x.shape[-1], x.dtype, x.device)


@lru_cache(maxsize=4)
def centred_identity(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return centred(torch.eye(d, dtype=dtype, device=device), 1)


def times(matrix: Tensor, vector: Tensor, bias: Tensor | None = None) -> Tensor:
    """(m, n) or K of them times (n,) or K of them, plus (m,) or K of them -> (m,) or (K, m)."""
    if bias is None:
        return (matrix @ vector[..., None])[..., 0]
    add = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    return add(bias[..., None], matrix, vector[..., None])[..., 0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B, K, T, n) -> (B, K, T, m) by one weight (m, n) for all K, or (K, m, n)."""
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    n_rows, x, weight = len(x), x.transpose(0, 1).flatten(1, 2), weight.mT
    y = torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[:, None], x, weight)  # (K, B T, m)
    return y.unflatten(1, (n_rows, -1)).transpose(0, 1)
