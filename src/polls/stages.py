"""The stages of `DecoderOnlyTransformer` as `polls/structured.py` evaluates them, and how candidates enter them.

The model is a chain of stages: embedding, attention (`polls/attention.py`) and feed-forward of every
block, head. In the last block only the scored positions are computed. The residual stream is kept
centred: a LayerNorm subtracts its mean anyway, so it becomes an RMS norm, and its gain and bias are
folded into the matrix behind it.

Shapes: B rows of the batch, K candidates, T tokens, S scored positions, H heads, F = d_ff, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from polls.rows import Rows, State
from polls.shared import version
from transformer import Block, DecoderOnlyTransformer

EPS = 1e-5  # of every LayerNorm, torch's default


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

    def scale(self, x: Tensor) -> Tensor:
        """What the norm multiplies the candidates' streams with, (B, K, T): |x + s v|^2 needs no candidate's stream."""
        s, v = self.scalar, self.direction
        along, square = v @ x.mT, x.square().mean(-1)[:, None]  # (B, K, T), (B, 1, T)
        variance = square + s * (2 / x.shape[-1] * along + s * v.square().mean(1)[:, None])
        return variance.clamp_(min=0).add_(EPS).rsqrt_()


Entry = Rank1 | Tensor  # what candidates do behind the stage they enter: a rank-1 change of the stream, or their stream


class Moves(NamedTuple):
    """k candidates of one tensor: weight[i, j] + step, each (k,); j is 0 in a vector."""

    i: Tensor
    j: Tensor
    step: Tensor

    def of(self, some: slice) -> "Moves":
        return Moves(self.i[some], self.j[some], self.step[some])


W = TypeVar("W")  # the weights of a stage, folded
S = TypeVar("S", bound=State)  # what the incumbent computes at a stage


@dataclass(frozen=True, slots=True)
class WayIn(Generic[S]):
    """How the candidates of some tensors of a stage enter it; they are evaluated together.

    Attributes:
        names: of the tensors.
        enter: (rows, state of the incumbent, moves by the name of the tensor) -> what they do.
        rank1: whether that is a `Rank1`, which spares the next stage most of its work.
    """

    names: tuple[str, ...]
    enter: Callable[[Rows, S, dict[str, Moves]], Entry]
    rank1: bool = True


class Stage(ABC, Generic[W, S]):
    """A part of the model that reads the residual stream and writes to it.

    Args:
        tensors: its parameters by their names within the stage.

    Attributes:
        ways_in: how candidates enter.
        w: the parameters as the computations read them; `refresh` keeps them up to date.
        serial: grows when `w` changes.
    """

    ways_in: tuple[WayIn[S], ...]

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors
        self.serial, self._versions = 0, self._newest_versions()
        self.w: W = self.fold(tensors)

    def refresh(self) -> None:
        """Fold anew if a tensor was changed in place, or its memory exchanged."""
        versions = self._newest_versions()
        if versions != self._versions:
            self._versions, self.serial, self.w = versions, self.serial + 1, self.fold(self.tensors)

    def _newest_versions(self) -> list[tuple[int, int, torch.dtype]]:
        return [version(p) for p in self.tensors.values()]

    @abstractmethod
    def fold(self, t: dict[str, Tensor]) -> W:
        """The parameters t, by name, as the computations read them."""

    @abstractmethod
    def forward(self, w: W, rows: Rows, x: Tensor) -> Tensor:
        """What the stage writes for K candidates, with weights w (`trial` moves them): x and result (B, K, T, d).

        The embedding reads the tokens (B, T) as x. The head gives the losses of the tokens, (B, K, S).
        """

    @abstractmethod
    def incumbent(self, rows: Rows, x: Tensor) -> S:
        """All that candidates read which enter here, or next: x (B, T, d) is what the stage in front writes."""

    def forward_rank1(self, rows: Rows, state: S, entry: Rank1) -> Tensor:
        """The same as `forward` for candidates whose stream differs from the incumbent's by a rank-1 term.

        `state` is the incumbent's at this stage.
        """
        raise NotImplementedError(f"nothing enters in front of {type(self).__name__}")


@dataclass(frozen=True, slots=True)
class EmbeddingWeights:
    token: Tensor  # (V, d), centred
    position: Tensor | None  # (max_len, d), centred
    directions: Tensor  # (d, d) of the unit vectors


@dataclass(frozen=True, slots=True)
class EmbeddingState(State):
    where: Tensor  # (B, V + T + 1, T) whether a token (position) is read; the last one stands for positions behind T


class Embedding(Stage[EmbeddingWeights, EmbeddingState]):
    """Token and position embeddings; writes the first stream."""

    def __init__(self, model: DecoderOnlyTransformer):
        self.n_tokens = model.token_embedding.num_embeddings
        self.sinusoids = model.get_buffer("sinusoids") if model.positions == "sinusoidal" else None
        tensors: dict[str, Tensor] = {"token": model.token_embedding.weight}
        if model.positions == "learned":
            tensors["position"] = model.position_embedding.weight
        super().__init__(tensors)
        self.ways_in = (WayIn(("token", "position"), self.enter),)

    def fold(self, t: dict[str, Tensor]) -> EmbeddingWeights:
        token, position = centred(t["token"], 1), t.get("position", self.sinusoids)
        if position is not None:
            position = centred(position.to(token), 1)
        return EmbeddingWeights(token=token, position=position, directions=unit_vectors(token[0]))

    def forward(self, w: EmbeddingWeights, rows: Rows, x: Tensor) -> Tensor:
        """Tokens (B, T) -> (B, 1, T, d)."""
        stream = w.token[x]
        if w.position is not None:
            stream = stream + w.position[: x.shape[1]]
        return stream[:, None]

    def incumbent(self, rows: Rows, x: Tensor) -> EmbeddingState:
        length, device = x.shape[1], x.device
        is_token = x[:, None] == torch.arange(self.n_tokens, device=device)[:, None]  # (B, V, T)
        is_position = torch.eye(length, dtype=torch.bool, device=device).expand(len(x), -1, -1)
        nowhere = torch.zeros_like(is_position[:, :1])  # positions behind the last scored token
        out = self.forward(self.w, rows, x)[:, 0]
        return EmbeddingState(out=out, where=torch.cat([is_token, is_position, nowhere], 1))

    def enter(self, rows: Rows, state: EmbeddingState, moves: dict[str, Moves]) -> Rank1:
        length, parts = rows.x.shape[1], []
        for name, m in moves.items():
            parts.append((m.i if name == "token" else self.n_tokens + m.i.clamp(max=length), m.j, m.step))
        return rank1(state.where, self.w.directions, parts)


@dataclass(frozen=True, slots=True)
class FeedForwardWeights:
    gain: Tensor  # (d,)
    bias: Tensor  # (d,)
    inner: Tensor  # (F, d), behind the gain
    inner_bias: Tensor  # (F,), with what the norm's bias adds
    outer: Tensor  # (d, F), centred
    outer_bias: Tensor  # (d,), centred
    columns: Tensor  # (d, F): what a component of the norm's output does to the hidden nodes
    directions: Tensor  # (d + F, d) of the unit vectors, of the columns of outer


@dataclass(frozen=True, slots=True)
class FeedForwardState(State):
    x: Tensor  # (B, T, d)
    n: Tensor  # (B, T, d), normed
    u: Tensor  # (B, T, F), before the activation
    raw: Tensor  # (B, T, F), before the norm divides
    before: Tensor  # (B, F, T), u by column
    hidden: Tensor  # (B, 1 + F, T) what a row of outer reads: one, hidden nodes
    inputs: Tensor  # (B, 1 + d, T) what a row of inner reads: one, normed stream with gain and bias


class FeedForward(Stage[FeedForwardWeights, FeedForwardState]):
    """Feed-forward of one block, with its norm."""

    def __init__(self, block: Block):
        ff, norm = block.ff, block.ff_norm
        inner = {"gain": norm.weight, "bias": norm.bias, "inner": ff.inner.weight, "inner_bias": ff.inner.bias}
        super().__init__({**inner, "outer": ff.outer.weight, "outer_bias": ff.outer.bias})
        self.ways_in = (
            WayIn(("outer", "outer_bias", "inner", "inner_bias"), self.enter),
            WayIn(("gain", "bias"), self.enter_norm, rank1=False),
        )

    def fold(self, t: dict[str, Tensor]) -> FeedForwardWeights:
        outer = centred(t["outer"], 0)
        return FeedForwardWeights(
            gain=t["gain"], bias=t["bias"], inner=t["inner"] * t["gain"], outer=outer,
            inner_bias=t["inner"] @ t["bias"] + t["inner_bias"], outer_bias=centred(t["outer_bias"], 0),
            columns=t["inner"].T, directions=torch.cat([unit_vectors(outer[:, 0]), outer.T]),
        )  # fmt: skip

    def forward(self, w: FeedForwardWeights, rows: Rows, x: Tensor) -> Tensor:
        hidden = F.linear(norm(x), w.inner, w.inner_bias).relu_()
        return F.linear(hidden, w.outer, w.outer_bias).add_(x)

    def forward_rank1(self, rows: Rows, state: FeedForwardState, entry: Rank1) -> Tensor:
        """The inner matrix is linear, so it acts on the incumbent and on the direction, once each."""
        w, s, v = self.w, entry.scalar[..., None], entry.direction[:, None]  # (B, K, T, 1), (K, 1, d)
        u = torch.addcmul(state.raw[:, None], s, v @ w.inner.T)  # (B, K, T, F)
        hidden = u.mul_(entry.scale(state.x)[..., None]).add_(w.inner_bias).relu_()
        return F.linear(hidden, w.outer, w.outer_bias).add_(state.x[:, None]).addcmul_(s, v)

    def incumbent(self, rows: Rows, x: Tensor) -> FeedForwardState:
        w, n = self.w, norm(x)
        u = F.linear(n, w.inner, w.inner_bias)
        hidden = u.relu()
        return FeedForwardState(
            x=x, n=n, u=u, raw=x @ w.inner.T, out=F.linear(hidden, w.outer, w.outer_bias) + x,
            before=by_column(u), hidden=by_column(torch.cat([one_for(u), hidden], -1)),
            inputs=by_column(torch.cat([one_for(n), n * w.gain + w.bias], -1)),
        )  # fmt: skip

    def enter(self, rows: Rows, state: FeedForwardState, moves: dict[str, Moves]) -> Rank1:
        d, scalars, direction = self.w.outer.shape[0], [], []
        for name, m in moves.items():
            column = torch.zeros_like(m.j) if name.endswith("bias") else m.j + 1
            if name.startswith("outer"):
                scalars.append(state.hidden[:, column] * m.step[:, None])
                direction.append(m.i)
            else:
                scalars.append(self.hidden_change(state, m.i, state.inputs[:, column] * m.step[:, None]))
                direction.append(m.i + d)
        return Rank1(torch.cat(scalars, 1), self.w.directions[torch.cat(direction)])

    def hidden_change(self, state: FeedForwardState, i: Tensor, change: Tensor) -> Tensor:
        """By how much hidden nodes i (k,) change if what they read changes by (B, k, T)."""
        return (state.before[:, i] + change).relu_() - state.hidden[:, i + 1]

    def enter_norm(self, rows: Rows, state: FeedForwardState, moves: dict[str, Moves]) -> Tensor:
        return self.change_norm(rows, state, *norm_change(state.n, moves))

    def change_norm(self, rows: Rows, state: FeedForwardState, scalar: Tensor, j: Tensor) -> Tensor:
        """The stream if component j (K,) of the norm's output changes by a scalar (B, K, T)."""
        hidden = Rank1(scalar, self.w.columns[j]).added_to(state.u).relu_()  # (B, K, T, F)
        return F.linear(hidden, self.w.outer, self.w.outer_bias).add_(state.x[:, None])


@dataclass(frozen=True, slots=True)
class HeadWeights:
    gain: Tensor  # (d,)
    bias: Tensor  # (d,)
    head: Tensor  # (C, d), behind the gain
    head_bias: Tensor  # (C,), with what the norm's bias adds
    directions: Tensor  # (C + d, C) of the logits: of the classes, of the columns of the matrix


@dataclass(frozen=True, slots=True)
class HeadState(State):
    x: Tensor  # (B, S, d)
    n: Tensor  # (B, S, d), normed
    logits: Tensor  # (C, B, S)
    raw: Tensor  # (C, B, S), logits before the norm divides
    sources: Tensor  # (B, 1 + 2d, S): one, normed stream with gain and bias, normed stream


class Head(Stage[HeadWeights, HeadState]):
    """Final norm, output classes and losses, at the scored positions. Candidates enter into the logits."""

    def __init__(self, model: DecoderOnlyTransformer):
        norm, head = model.norm, model.head
        super().__init__({"gain": norm.weight, "bias": norm.bias, "head": head.weight, "head_bias": head.bias})
        self.ways_in = (WayIn(("gain", "bias", "head", "head_bias"), self.enter),)

    def fold(self, t: dict[str, Tensor]) -> HeadWeights:
        head = t["head"]
        classes = torch.eye(len(head), dtype=head.dtype, device=head.device)
        return HeadWeights(
            gain=t["gain"], bias=t["bias"], head=head * t["gain"], head_bias=head @ t["bias"] + t["head_bias"],
            directions=torch.cat([classes, head.T]),
        )  # fmt: skip

    def forward(self, w: HeadWeights, rows: Rows, x: Tensor) -> Tensor:
        """Streams (B, K, S, d) -> losses of the tokens (B, K, S)."""
        logits = w.head @ norm(x).flatten(0, -2).T  # (C, B K S)
        return rows.token_losses(logits.add_(w.head_bias[:, None]).unflatten(1, x.shape[:-1]))

    def incumbent(self, rows: Rows, x: Tensor) -> HeadState:
        w, n = self.w, norm(x)
        logits = (w.head @ n.flatten(0, -2).T + w.head_bias[:, None]).unflatten(1, x.shape[:-1])
        return HeadState(
            x=x, n=n, logits=logits, out=rows.token_losses(logits[:, :, None]),
            sources=by_column(torch.cat([one_for(n), n * w.gain + w.bias, n], -1)),
            raw=(w.head @ x.flatten(0, -2).T).unflatten(1, x.shape[:-1]),
        )  # fmt: skip

    def enter(self, rows: Rows, state: HeadState, moves: dict[str, Moves]) -> Rank1:
        """A change of the logits."""
        (n_classes, d), parts = self.w.head.shape, []
        for name, m in moves.items():
            source = {"head": 1 + m.j, "gain": 1 + d + m.i}  # a bias reads the first source, a one
            row = m.i if name.startswith("head") else n_classes + m.i
            parts.append((source.get(name, torch.zeros_like(m.i)), row, m.step))
        return rank1(state.sources, self.w.directions, parts)

    def changed_losses(self, rows: Rows, state: HeadState, change: Rank1) -> Tensor:
        """Losses of the tokens (B, K, S) for candidates that enter into the logits."""
        logits = state.logits[:, :, None] + change.scalar * change.direction.T[:, None, :, None]  # (C, B, K, S)
        return rows.token_losses(logits)

    def forward_rank1(self, rows: Rows, state: HeadState, entry: Rank1) -> Tensor:
        """Losses of the tokens (B, K, S) from C numbers per token instead of d."""
        w, s = self.w, entry.scalar
        logits = state.raw[:, :, None] + s * (w.head @ entry.direction.T)[:, None, :, None]  # (C, B, K, S)
        return rows.token_losses(logits.mul_(entry.scale(state.x)).add_(w.head_bias[:, None, None, None]))


def norm(x: Tensor) -> Tensor:
    """LayerNorm without gain and bias, of a stream (..., d) that is centred already."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def rank1(sources: Tensor, directions: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]]) -> Rank1:
    """Step times a column of sources (B, columns, T) as the scalar, a row of directions (rows, d) as the direction.

    `parts` holds the column (k,), the row (k,) and the step (k,) of the candidates of each tensor.
    """
    column, row, step = map(torch.cat, zip(*parts, strict=True))
    return Rank1(sources[:, column] * step[:, None], directions[row])


def norm_change(n: Tensor, moves: dict[str, Moves]) -> tuple[Tensor, Tensor]:
    """Moves of a norm's gain and bias: scalar (B, K, T) by which component j (K,) of its output changes."""
    scalars = [
        m.step[:, None] * (by_column(n)[:, m.i] if name == "gain" else torch.ones_like(n[..., 0])[:, None])
        for name, m in moves.items()
    ]
    return torch.cat(scalars, 1), torch.cat([m.i for m in moves.values()])


def centred(x: Tensor, dim: int) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def unit_vectors(x: Tensor) -> Tensor:
    """The centred unit vectors (d, d) of a stream whose vectors are like x (d,)."""
    return centred(torch.eye(len(x), dtype=x.dtype, device=x.device), 1)


def by_column(x: Tensor) -> Tensor:
    """(B, T, columns) -> (B, columns, T), so that what one weight reads lies together."""
    return x.mT.contiguous()


def one_for(x: Tensor) -> Tensor:
    """A column of ones (..., 1): what a bias reads."""
    return torch.ones_like(x[..., :1])
