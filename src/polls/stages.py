"""The stages of `DecoderOnlyTransformer` as `polls/structured.py` evaluates them, and how candidates enter them.

The model is a chain of stages, each a class below: embedding, attention and feed-forward of every
block, head. In the last block only the scored positions are computed. The residual stream is kept
centred: a LayerNorm subtracts its mean anyway, so it becomes an RMS norm, and its gain and bias are
folded into the matrix behind it.

Shapes: B rows of the batch, K candidates, T tokens, S scored positions, H heads, F = d_ff, C classes.
"""

import copy
import math
from collections.abc import Callable
from types import SimpleNamespace as Values
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.sequences import IGNORE
from polls.generic import version
from transformer import DecoderOnlyTransformer, frequencies

EPS = 1e-5  # of every LayerNorm, torch's default


class Rank1(NamedTuple):
    """What candidates add to the residual stream: scalar (B, K, T) times direction (K, d)."""

    scalar: Tensor
    direction: Tensor

    def added_to(self, x: Tensor) -> Tensor:
        """Stream of the incumbent (B, T, d) -> streams of the candidates (B, K, T, d)."""
        return torch.addcmul(x[:, None], self.scalar[..., None], self.direction[:, None])

    def scale(self, x: Tensor) -> Tensor:
        """What the norm multiplies the candidates' streams with, (B, K, T): |x + s v|^2 needs no candidate's stream."""
        s, v = self
        along, square = v @ x.mT, x.square().mean(-1)[:, None]  # (B, K, T), (B, 1, T)
        variance = square + s * (2 / x.shape[-1] * along + s * v.square().mean(1)[:, None])
        return variance.clamp_(min=0).add_(EPS).rsqrt_()


class Moves(NamedTuple):
    """k candidates of one tensor: weight[i, j] + step, each (k,); j is 0 in a vector."""

    i: Tensor
    j: Tensor
    step: Tensor

    def of(self, some: slice) -> "Moves":
        return Moves(*(x[some] for x in self))


class Rows:
    """Some rows of a batch, and what the incumbent computes on them, stage by stage.

    Args:
        x: (B, T) tokens.
        y: (B, T) classes or IGNORE.
        weight: (B,) of each scored token of a row in the mean loss.
    """

    def __init__(self, x: Tensor, y: Tensor, weight: Tensor, dtype: torch.dtype):
        scored = y != IGNORE
        length = max(1, int(scored.any(0).nonzero().max()) + 1)  # nothing behind the last scored token matters
        self.x, y, scored = x[:, :length], y[:, :length], scored[:, :length]
        n_scored = int(scored.sum(1).max())
        # the scored positions of each row in order; a row with fewer repeats one of its own with weight 0
        order = torch.where(scored, torch.arange(length), length).sort(1).values[:, :n_scored]
        real = order < length
        self.at = order.where(real, order[:, :1])  # (B, S)
        self.target = y.gather(1, self.at)  # (B, S)
        self.weight = (weight[:, None] * real).to(dtype)  # (B, S)
        steps = torch.arange(length)
        self.seen = (steps <= steps[:, None]).to(dtype)[None]  # (1, T, T): query t sees the keys 0..t
        self.seen_by_scored = (steps <= self.at[..., None]).to(dtype)  # (B, S, T)
        first = int(self.at[0, 0])
        self.slice = slice(first, first + n_scored) if bool((self.at == first + steps[:n_scored]).all()) else None
        self.states: list[tuple[int, Values]] = []  # (serial of the stage's weights, values of the incumbent)
        self.by_token = False  # whether `loss` leaves the losses of the tokens apart

    def scored(self, x: Tensor) -> Tensor:
        """Tokens (B, T, ...) or (B, K, T, d) -> only the scored ones, (B, S, ...) or (B, K, S, d)."""
        if self.slice is not None:
            return x[..., self.slice, :]
        at = self.at.view(len(self.at), *[1] * (x.ndim - 3), -1, 1)
        return torch.take_along_dim(x, at, dim=-2)

    def each_token(self) -> "Rows":
        """The same rows, whose `loss` leaves the losses of the tokens apart."""
        rows = copy.copy(self)
        rows.by_token = True
        return rows

    def bytes(self) -> int:
        """Memory taken by what is remembered of the incumbent."""
        values = [v for _, state in self.states for v in vars(state).values()]
        values += [v for state in values if isinstance(state, Values) for v in vars(state).values()]
        return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))

    def loss(self, logits: Tensor) -> Tensor:
        """Part of these rows in the mean cross-entropy: logits (C, B, K, S) -> (K,), or (B, K, S) by token."""
        target = self.target[None, :, None].expand(1, *logits.shape[1:])
        # relative to the target's logit: nothing is lost to rounding when a token is all but certain
        losses = (logits - logits.gather(0, target)).exp_().sum(0).log_()  # (B, K, S)
        return losses * self.weight[:, None] if self.by_token else torch.einsum("bks,bs->k", losses, self.weight)


class Stage:
    """A part of the model that reads the residual stream and writes to it.

    `fold` prepares its weights; `forward` runs many candidates, `incumbent` remembers all that
    candidates entering here need. Candidates enter by `groups`: the names of the tensors that are
    evaluated together, and the method that turns their moves into a Rank1, or the stream, or losses.
    """

    groups: dict[tuple[str, ...], Callable]

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors  # by their names within the stage
        self.serial, self._key = 0, None
        self.refresh()

    def refresh(self) -> None:
        """Fold anew if a tensor was changed in place, or its memory exchanged."""
        key = [version(p) for p in self.tensors.values()]
        if key != self._key:
            self._key, self.serial, self.w = key, self.serial + 1, self.fold(self.tensors)

    def forward_rank1(self, w: Values, rows: Rows, state: Values, entry: Rank1) -> Tensor:
        """The same as `forward` for candidates whose stream differs from the incumbent's by a rank-1 term."""
        return self.forward(w, rows, entry.added_to(state.x))


class Embedding(Stage):
    """Token and position embeddings; writes the first stream."""

    def __init__(self, model: DecoderOnlyTransformer):
        self.n_tokens = model.token_embedding.num_embeddings
        self.model = model
        tensors = {"token": model.token_embedding.weight}
        if model.positions == "learned":
            tensors["position"] = model.position_embedding.weight
        super().__init__(tensors)
        self.groups = {("token", "position"): self.enter}

    def fold(self, t: dict[str, Tensor]) -> Values:
        token, position = centred(t["token"], 1), t.get("position", getattr(self.model, "sinusoids", None))
        position = position if position is None else centred(position.to(token), 1)
        return Values(token=token, position=position, directions=unit_vectors(token[0]))

    def forward(self, w: Values, rows: Rows, x: None) -> Tensor:
        x = w.token[rows.x]
        if w.position is not None:
            x = x + w.position[: x.shape[1]]
        return x[:, None]  # (B, 1, T, d)

    def incumbent(self, w: Values, rows: Rows, x: None) -> Values:
        is_token = rows.x[:, None] == torch.arange(self.n_tokens)[:, None]  # (B, V, T)
        length = rows.x.shape[1]
        is_position = torch.eye(length, dtype=torch.bool).expand(len(rows.x), -1, -1)
        nowhere = torch.zeros_like(is_position[:, :1])  # positions behind the last scored token
        return Values(out=self.forward(w, rows, x)[:, 0], where=torch.cat([is_token, is_position, nowhere], 1))

    def enter(self, w: Values, rows: Rows, state: Values, moves: dict[str, Moves]) -> Rank1:
        length, parts = rows.x.shape[1], []
        for name, m in moves.items():
            parts.append((m.i if name == "token" else self.n_tokens + m.i.clamp(max=length), m.j, m.step))
        return rank1(state.where, w.directions, parts)


class Attention(Stage):
    """Causal self-attention of one block, with its norm. The last block's writes scored positions only."""

    def __init__(self, block: nn.Module, last: bool):
        a, norm = block.attention, block.attention_norm
        self.n_heads, self.rotary, self.last = a.n_heads, a.rotary, last
        tensors = {"gain": norm.weight, "bias": norm.bias, "key": a.key.weight}
        for name, linear in (("query", a.query), ("value", a.value), ("out", a.out)):
            tensors |= {name: linear.weight, f"{name}_bias": linear.bias}
        super().__init__(tensors)
        self.groups = {
            ("out", "out_bias", "value", "value_bias"): self.enter,
            ("query", "query_bias", "key"): self.enter_scores,
            ("gain", "bias"): self.enter_norm,
        }

    def fold(self, t: dict[str, Tensor]) -> Values:
        scale = (t["key"].shape[0] // self.n_heads) ** -0.5
        # a bias in front of the values passes through weights that sum to 1: it is a bias of the output
        value_bias = t["value"] @ t["bias"] + t["value_bias"]
        query, key, value = t["query"] * scale, t["key"], t["value"]
        query_bias = query @ t["bias"] + t["query_bias"] * scale
        out = centred(t["out"], 0)
        return Values(
            gain=t["gain"], bias=t["bias"], scale=scale, query=query * t["gain"], query_bias=query_bias,
            key_value=torch.cat([key, value]) * t["gain"], key_bias=key @ t["bias"], value_bias=value_bias, out=out,
            out_bias=centred(t["out_bias"], 0) + out @ value_bias, columns=torch.cat([query, key, value]).T,
            directions=torch.cat([unit_vectors(out[:, 0]), out.T]),
        )  # fmt: skip

    def queries(self, rows: Rows, x: Tensor) -> Tensor:
        """The tokens of x (..., T, d) whose queries are needed."""
        return rows.scored(x) if self.last else x

    def keys_and_values(self, w: Values, n: Tensor) -> tuple[Tensor, Tensor]:
        """Normed streams (..., T, d) -> keys and values (..., T, d) each, the values without their bias."""
        key, value = F.linear(n, w.key_value).chunk(2, -1)
        # unturned, a bias shifts all scores of a query alike, and softmax does not see it
        return (key + w.key_bias if self.rotary else key), value

    def heads(self, x: Tensor) -> Tensor:
        """(..., T, d) -> (..., H, T, d/H)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(-2, -3)

    def head_of(self, i: Tensor) -> Tensor:
        """(k,) components of queries, keys or values -> (k,) their heads."""
        return i // (len(self.w.out) // self.n_heads)

    def turn(self, x: Tensor, at: Tensor) -> Tensor:
        """Rotary positions `at` (T,) or (B, T) for x (B, ..., H, T, d/H); see `transformer.rotate`."""
        if not self.rotary:
            return x
        angles = at[..., None] * frequencies(x.shape[-1])  # (T, d/2H)
        if at.ndim == 2:
            angles = angles.view(len(at), *[1] * (x.ndim - 3), *angles.shape[1:])
        cos, sin = angles.cos().to(x), angles.sin().to(x)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def positions(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Positions of the queries, (B, S) or (T,), and of the keys (T,)."""
        steps = torch.arange(rows.x.shape[1])
        return (rows.at if self.last else steps), steps

    def attend(self, rows: Rows, scores: Tensor) -> Tensor:
        """Softmax over the keys that a query sees: scores (B, ..., queries, T).

        Without subtracting the maximum, unless a sum comes near the end of float32's range. The mask is a
        factor: exp(-inf) would cost as much as eight exponentials of other numbers.
        """
        seen = rows.seen_by_scored if self.last else rows.seen
        seen = seen.view(len(seen), *[1] * (scores.ndim - 3), *seen.shape[1:])
        weights = scores.exp().mul_(seen)
        total = weights.sum(-1, keepdim=True)
        low, high = total.aminmax()
        if low > 1e-30 and high < 1e30:  # false for nan
            return weights.div_(total)
        return scores.masked_fill(seen == 0, -math.inf).softmax(-1)

    def forward(self, w: Values, rows: Rows, x: Tensor) -> Tensor:
        """Streams (B, K, T, d) -> (B, K, T, d), in the last block (B, K, S, d)."""
        n = norm(x)
        query = F.linear(self.queries(rows, n), w.query, w.query_bias)
        key, value = self.keys_and_values(w, n)
        return self.mix(w, rows, self.queries(rows, x), query, key, value)

    def mix(self, w: Values, rows: Rows, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        at, steps = self.positions(rows)
        query, key = self.turn(self.heads(query), at), self.turn(self.heads(key), steps)
        weights = self.attend(rows, query @ key.transpose(-1, -2))  # (B, K, H, queries, T)
        mixed = (weights @ self.heads(value)).transpose(-2, -3).flatten(-2)  # (B, K, queries, d)
        return F.linear(mixed, w.out, w.out_bias).add_(x)

    def forward_rank1(self, w: Values, rows: Rows, state: Values, entry: Rank1) -> Tensor:
        """From products of the incumbent's queries and keys, and of both with the direction: no projection at all.

        With x + s v as the stream and c as the norm's scale, the score of query t and key u is
        c_u (c_t (q_t + s_t q_v) + b) (k_u + s_u k_v), where q, k and q_v, k_v are x and v behind the
        matrices and b is the query's bias. The values enter as what each key writes to the stream.
        """
        if self.rotary:  # the direction's queries and keys would turn with every position
            return super().forward_rank1(w, rows, state, entry)
        s, v = entry  # (B, K, T), (K, d)
        p, scale = state.products, entry.scale(state.x)
        q_v, (k_v, value_v) = (v @ w.query.T)[:, None], (v @ w.key_value.T)[:, None].chunk(2, -1)
        q_v, k_v, value_v = self.heads(q_v), self.heads(k_v), self.heads(value_v)  # (K, H, 1, d/H)
        scale_q, s_q = (self.queries(rows, t[..., None])[:, :, None] for t in (scale, s))  # (B, K, 1, queries, 1)
        scale, s = scale[:, :, None, None], s[:, :, None, None]  # (B, K, 1, 1, T)
        by_key, by_query = torch.einsum("khic,bhtc->bkhit", q_v, p.key), torch.einsum("khic,bhtc->bkhti", k_v, p.query)
        scores = p.scores[:, None] * scale_q  # (B, K, H, queries, T)
        scores.addcmul_(s_q * scale_q, by_key)
        scores.addcmul_((by_query + s_q * (q_v * k_v).sum(-1, keepdim=True)) * scale_q, s)
        scores.add_(p.bias[:, None] + s * (k_v * self.heads(w.query_bias[None])).sum(-1, keepdim=True))
        weights = self.attend(rows, scores.mul_(scale)).mul_(scale)
        x = weights.transpose(2, 3).flatten(3).flatten(1, 2) @ p.written.flatten(1, 2)  # (B, K queries, d)
        x = x.unflatten(1, weights.shape[1:4:2]).add_((self.queries(rows, state.x) + w.out_bias)[:, None])
        x.addcmul_(s_q[:, :, 0], v[:, None])
        written, shares = value_v @ self.out_by_head(w), (weights * s).sum(-1, keepdim=True)
        for h in range(self.n_heads):
            x.addcmul_(shares[:, :, h], written[:, h])  # (B, K, queries, 1) times (K, 1, d)
        return x

    def out_by_head(self, w: Values) -> Tensor:
        """(H, d/H, d): what each head writes to the stream for its values."""
        return w.out.unflatten(1, (self.n_heads, -1)).permute(1, 2, 0)

    def products(self, w: Values, rows: Rows, x: Tensor) -> Values:
        """What `forward_rank1` reads: queries, keys and their products in front of the norm's scale, by head."""
        query = self.heads(self.queries(rows, x) @ w.query.T)  # (B, H, queries, d/H)
        key, value = (self.heads(t) for t in (x @ w.key_value.T).chunk(2, -1))  # (B, H, T, d/H)
        bias = self.heads(w.query_bias[None]) @ key.mT  # (B, H, 1, T)
        return Values(query=query, key=key, scores=query @ key.mT, bias=bias, written=value @ self.out_by_head(w))

    def incumbent(self, w: Values, rows: Rows, x: Tensor) -> Values:
        n = norm(x)
        inputs = n * w.gain + w.bias  # what the three matrices read
        query = F.linear(self.queries(rows, n), w.query, w.query_bias)  # (B, queries, d)
        key, value = self.keys_and_values(w, n)
        at, steps = self.positions(rows)
        turned_query, turned_key = self.turn(self.heads(query), at), self.turn(self.heads(key), steps)
        scores = turned_query @ turned_key.transpose(-1, -2)  # (B, H, queries, T)
        weights = self.attend(rows, scores)
        mixed = (weights @ self.heads(value)).transpose(-2, -3).flatten(-2)
        read = weights @ inputs[:, None]  # (B, H, queries, d): each head's weights on its inputs
        sources = [one_for(mixed), mixed + w.value_bias, *read.unbind(1)]
        return Values(
            x=x, products=None if self.rotary else self.products(w, rows, x), n=n, inputs=inputs,
            query=query, key=key, value=value, scores=scores,
            weights=weights, out=F.linear(mixed, w.out, w.out_bias) + self.queries(rows, x),
            turned_query=by_column(turned_query.transpose(-2, -3).flatten(-2)),  # (B, d, queries)
            turned_key=by_column(turned_key.transpose(-2, -3).flatten(-2)),
            sources=by_column(torch.cat(sources, -1)),  # (B, 1 + d + H d, queries)
            written=self.heads(value) @ self.out_by_head(w),  # (B, H, T, d) by each key of a head
        )  # fmt: skip

    def enter(self, w: Values, rows: Rows, state: Values, moves: dict[str, Moves]) -> Rank1:
        d, parts = w.out.shape[0], []
        for name, m in moves.items():
            is_value = name.startswith("value")
            first = 1 + d + self.head_of(m.i) * d if is_value else 1
            column = 0 * m.i if name.endswith("bias") else first + m.j
            parts.append((column, m.i + d if is_value else m.i, m.step))
        return rank1(state.sources, w.directions, parts)

    def enter_norm(self, w: Values, rows: Rows, state: Values, moves: dict[str, Moves]) -> Tensor:
        """Gain and bias change all that queries, keys and values read."""
        return self.change_norm(w, rows, state, *norm_change(state.n, moves))

    def change_norm(self, w: Values, rows: Rows, state: Values, scalar: Tensor, j: Tensor) -> Tensor:
        """The stream if component j (K,) of the norm's output changes by a scalar (B, K, T)."""
        change = Rank1(scalar, w.columns[j])  # in queries, keys and values, (B, K, T, 3d)
        query, key, value = change.added_to(torch.zeros_like(state.n[..., :1])).chunk(3, -1)
        query = self.queries(rows, query) + state.query[:, None]
        return self.mix(
            w, rows, self.queries(rows, state.x)[:, None], query, key + state.key[:, None], value + state.value[:, None]
        )

    def enter_scores(self, w: Values, rows: Rows, state: Values, moves: dict[str, Moves]) -> Tensor:
        """A query or key weight changes a component of its query or key by what it reads.

        It changes the scores of its head by a product of a query's and a key's part.
        """
        inputs, size = by_column(state.inputs), len(w.out) // self.n_heads  # (B, d, T)
        at, steps = self.positions(rows)
        heads, lefts, rights = [], [], []
        for name, m in moves.items():
            is_key, i = name == "key", m.i
            moved = m.step[:, None] * (torch.ones_like(inputs[:, :1]) if name == "query_bias" else inputs[:, m.j])
            if not is_key:
                moved = w.scale * self.queries(rows, moved[..., None])[..., 0]  # (B, k, tokens)
            other = state.turned_query if is_key else state.turned_key
            pairs = [(moved, other[:, i])]  # (B, k, tokens)
            if self.rotary:  # the moved component turns into itself and its partner in the pair
                frequency = frequencies(size)[i % size // 2]
                angle = (steps if is_key else at)[..., None, :] * frequency[:, None]  # (k, tokens) or (B, k, tokens)
                sign = 1 - 2 * (i % 2)[:, None]
                pairs = [(moved * angle.cos(), other[:, i]), (moved * angle.sin() * sign, other[:, i ^ 1])]
            moved, other = torch.stack([a for a, _ in pairs], -1), torch.stack([b for _, b in pairs], -1)
            heads.append(self.head_of(i))
            lefts.append(other if is_key else moved)
            rights.append(moved if is_key else other)
        return self.add_to_scores(rows, state, torch.cat(heads), torch.cat(lefts, 1), torch.cat(rights, 1))

    def add_to_scores(self, rows: Rows, state: Values, head: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The stream if left (B, K, queries, n) @ right (B, K, T, n)^T is added to the scores of a head (K,)."""
        x = torch.empty(*left.shape[:3], state.out.shape[-1], dtype=state.out.dtype)
        for h in head.unique().tolist():
            k = (head == h).nonzero().flatten()
            scores = state.scores[:, h, None] + (left[:, k].to(x) @ right[:, k].to(x).transpose(-1, -2))
            change = self.attend(rows, scores) - state.weights[:, h, None]  # (B, k, queries, T)
            x[:, k] = (change.flatten(1, 2) @ state.written[:, h]).unflatten(1, change.shape[1:3])
        return x.add_(state.out[:, None])


class FeedForward(Stage):
    """Feed-forward of one block, with its norm."""

    def __init__(self, block: nn.Module):
        ff, norm = block.ff, block.ff_norm
        tensors = {"gain": norm.weight, "bias": norm.bias, "inner": ff.inner.weight, "inner_bias": ff.inner.bias}
        super().__init__(tensors | {"outer": ff.outer.weight, "outer_bias": ff.outer.bias})
        self.groups = {("outer", "outer_bias", "inner", "inner_bias"): self.enter, ("gain", "bias"): self.enter_norm}

    def fold(self, t: dict[str, Tensor]) -> Values:
        outer = centred(t["outer"], 0)
        return Values(
            gain=t["gain"], bias=t["bias"], inner=t["inner"] * t["gain"], outer=outer,
            inner_bias=t["inner"] @ t["bias"] + t["inner_bias"], outer_bias=centred(t["outer_bias"], 0),
            columns=t["inner"].T, directions=torch.cat([unit_vectors(outer[:, 0]), outer.T]),
        )  # fmt: skip

    def forward(self, w: Values, rows: Rows, x: Tensor) -> Tensor:
        hidden = F.linear(norm(x), w.inner, w.inner_bias).relu_()
        return F.linear(hidden, w.outer, w.outer_bias).add_(x)

    def forward_rank1(self, w: Values, rows: Rows, state: Values, entry: Rank1) -> Tensor:
        """The inner matrix is linear, so it acts on the incumbent and on the direction, once each."""
        s, v = entry.scalar[..., None], entry.direction[:, None]  # (B, K, T, 1), (K, 1, d)
        u = torch.addcmul(state.raw[:, None], s, v @ w.inner.T)  # (B, K, T, F)
        hidden = u.mul_(entry.scale(state.x)[..., None]).add_(w.inner_bias).relu_()
        return F.linear(hidden, w.outer, w.outer_bias).add_(state.x[:, None]).addcmul_(s, v)

    def incumbent(self, w: Values, rows: Rows, x: Tensor) -> Values:
        n = norm(x)
        u = F.linear(n, w.inner, w.inner_bias)  # (B, T, F), before the activation
        hidden = u.relu()
        return Values(
            x=x, n=n, u=u, raw=x @ w.inner.T, out=F.linear(hidden, w.outer, w.outer_bias) + x,
            before=by_column(u), hidden=by_column(torch.cat([one_for(u), hidden], -1)),  # (B, 1 + F, T)
            inputs=by_column(torch.cat([one_for(n), n * w.gain + w.bias], -1)),  # (B, 1 + d, T)
        )  # fmt: skip

    def enter(self, w: Values, rows: Rows, state: Values, moves: dict[str, Moves]) -> Rank1:
        d, scalars, direction = w.outer.shape[0], [], []
        for name, m in moves.items():
            column = 0 * m.j if name.endswith("bias") else m.j + 1
            if name.startswith("outer"):
                scalars.append(state.hidden[:, column] * m.step[:, None])
                direction.append(m.i)
            else:
                moved = state.before[:, m.i] + state.inputs[:, column] * m.step[:, None]
                scalars.append(moved.relu_() - state.hidden[:, m.i + 1])
                direction.append(m.i + d)
        return Rank1(torch.cat(scalars, 1), w.directions[torch.cat(direction)])

    def enter_norm(self, w: Values, rows: Rows, state: Values, moves: dict[str, Moves]) -> Tensor:
        return self.change_norm(w, rows, state, *norm_change(state.n, moves))

    def change_norm(self, w: Values, rows: Rows, state: Values, scalar: Tensor, j: Tensor) -> Tensor:
        hidden = Rank1(scalar, w.columns[j]).added_to(state.u).relu_()  # (B, K, T, F)
        return F.linear(hidden, w.outer, w.outer_bias).add_(state.x[:, None])


class Head(Stage):
    """Final norm, output classes and loss, at the scored positions."""

    def __init__(self, model: DecoderOnlyTransformer):
        tensors = {"gain": model.norm.weight, "bias": model.norm.bias}
        super().__init__(tensors | {"head": model.head.weight, "head_bias": model.head.bias})
        self.groups = {("gain", "bias", "head", "head_bias"): self.enter}

    def fold(self, t: dict[str, Tensor]) -> Values:
        head, classes = t["head"], torch.eye(len(t["head"])).to(t["head"])
        return Values(
            gain=t["gain"], bias=t["bias"], head=head * t["gain"], head_bias=head @ t["bias"] + t["head_bias"],
            directions=torch.cat([classes, head.T]),  # (C + d, C)
        )  # fmt: skip

    def forward(self, w: Values, rows: Rows, x: Tensor) -> Tensor:
        """Streams (B, K, S, d) -> losses (K,)."""
        logits = w.head @ norm(x).flatten(0, -2).T  # (C, B K S)
        return rows.loss(logits.add_(w.head_bias[:, None]).unflatten(1, x.shape[:-1]))

    def incumbent(self, w: Values, rows: Rows, x: Tensor) -> Values:
        n = norm(x)
        logits = (w.head @ n.flatten(0, -2).T + w.head_bias[:, None]).unflatten(1, x.shape[:-1])  # (C, B, S)
        sources = torch.cat([one_for(n), n * w.gain + w.bias, n], -1)
        return Values(
            x=x, n=n, logits=logits, out=rows.loss(logits[:, :, None])[0], sources=by_column(sources),  # (B, 1 + 2d, S)
            raw=(w.head @ x.flatten(0, -2).T).unflatten(1, x.shape[:-1]),  # (C, B, S) logits before the norm divides
        )  # fmt: skip

    def enter(self, w: Values, rows: Rows, state: Values, moves: dict[str, Moves]) -> tuple[Tensor, Tensor]:
        """Losses (K,), and the change (K,) of the logits."""
        (n_classes, d), parts = w.head.shape, []
        for name, m in moves.items():
            column = 0 * m.i if name.endswith("bias") else 1 + m.j if name == "head" else 1 + d + m.i
            parts.append((column, m.i if name.startswith("head") else n_classes + m.i, m.step))
        change = rank1(state.sources, w.directions, parts)  # of the logits: (B, K, S) times (K, C)
        logits = state.logits[:, :, None] + change.scalar * change.direction.T[:, None, :, None]  # (C, B, K, S)
        return rows.loss(logits), change.scalar.abs().amax((0, 2))

    def forward_rank1(self, w: Values, rows: Rows, state: Values, entry: Rank1) -> Tensor:
        """Losses (K,) from C numbers a token instead of d."""
        s, v = entry
        logits = state.raw[:, :, None] + s * (w.head @ v.T)[:, None, :, None]  # (C, B, K, S)
        return rows.loss(logits.mul_(entry.scale(state.x)).add_(w.head_bias[:, None, None, None]))


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
    return centred(torch.eye(len(x), dtype=x.dtype), 1)


def by_column(x: Tensor) -> Tensor:
    """(B, T, columns) -> (B, columns, T), so that what one weight reads lies together."""
    return x.mT.contiguous()


def one_for(x: Tensor) -> Tensor:
    """A column of ones (..., 1): what a bias reads."""
    return torch.ones_like(x[..., :1])
