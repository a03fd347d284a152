"""The attention of a block as a stage; see `polls/stages.py`.

Shapes: B rows of the batch, K candidates, T tokens, S scored positions, H heads. "queries" are the positions whose
queries are needed: all T, in the last block the S scored ones.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polls.rows import Products, Rows, State
from polls.stages import Moves, Rank1, Stage, WayIn, by_column, centred, norm, norm_change, one_for, rank1, unit_vectors
from transformer import Block, frequencies


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    gain: Tensor  # (d,)
    bias: Tensor  # (d,)
    scale: float  # of the scores
    query: Tensor  # (d, d), behind the gain, with the scale
    query_bias: Tensor  # (d,), with the scale and what the norm's bias adds
    key_value: Tensor  # (2d, d), behind the gain
    key_bias: Tensor  # (d,), what the norm's bias adds
    value_bias: Tensor  # (d,), with what the norm's bias adds
    out: Tensor  # (d, d), centred
    out_bias: Tensor  # (d,), centred, with what the values' bias adds
    columns: Tensor  # (d, 3d): what a component of the norm's output does to queries, keys and values
    directions: Tensor  # (2d, d) of the unit vectors, of the columns of out


@dataclass(frozen=True, slots=True)
class StreamProducts(Products):
    """Queries, keys and their products in front of the norm's scale, by head."""

    query: Tensor  # (B, H, queries, d/H)
    key: Tensor  # (B, H, T, d/H)
    scores: Tensor  # (B, H, queries, T)
    bias: Tensor  # (B, H, 1, T)
    written: Tensor  # (B, H, T, d) what a key writes to the stream


@dataclass(frozen=True, slots=True)
class AttentionState(State):
    x: Tensor  # (B, T, d)
    products: StreamProducts | None  # none with rotary positions
    n: Tensor  # (B, T, d), normed
    inputs: Tensor  # (B, T, d), normed, with gain and bias: what the three matrices read
    query: Tensor  # (B, queries, d)
    key: Tensor  # (B, T, d)
    value: Tensor  # (B, T, d)
    scores: Tensor  # (B, H, queries, T)
    weights: Tensor  # (B, H, queries, T)
    turned_query: Tensor  # (B, d, queries), as it meets the keys
    turned_key: Tensor  # (B, d, T), as it meets the queries
    sources: Tensor  # (B, 1 + d + H d, queries): one, mixed values, each head's mix of the inputs
    written: Tensor  # (B, H, T, d) what a key writes to the stream


class Attention(Stage[AttentionWeights, AttentionState]):
    """Causal self-attention of one block, with its norm. The last block's writes scored positions only."""

    def __init__(self, block: Block, last: bool):
        a, norm = block.attention, block.attention_norm
        self.n_heads, self.rotary, self.last = a.n_heads, a.rotary, last
        tensors: dict[str, Tensor] = {"gain": norm.weight, "bias": norm.bias, "key": a.key.weight}
        for name, linear in (("query", a.query), ("value", a.value), ("out", a.out)):
            tensors |= {name: linear.weight, f"{name}_bias": linear.bias}
        super().__init__(tensors)
        self.ways_in = (
            WayIn(("out", "out_bias", "value", "value_bias"), self.enter),
            WayIn(("query", "query_bias", "key"), self.enter_scores, rank1=False),
            WayIn(("gain", "bias"), self.enter_norm, rank1=False),
        )

    def fold(self, t: dict[str, Tensor]) -> AttentionWeights:
        scale = (t["key"].shape[0] // self.n_heads) ** -0.5
        # a bias in front of the values passes through weights that sum to 1: it is a bias of the output
        value_bias = t["value"] @ t["bias"] + t["value_bias"]
        query, key, value = t["query"] * scale, t["key"], t["value"]
        query_bias = query @ t["bias"] + t["query_bias"] * scale
        out = centred(t["out"], 0)
        return AttentionWeights(
            gain=t["gain"], bias=t["bias"], scale=scale, query=query * t["gain"], query_bias=query_bias,
            key_value=torch.cat([key, value]) * t["gain"], key_bias=key @ t["bias"], value_bias=value_bias, out=out,
            out_bias=centred(t["out_bias"], 0) + out @ value_bias, columns=torch.cat([query, key, value]).T,
            directions=torch.cat([unit_vectors(out[:, 0]), out.T]),
        )  # fmt: skip

    def queries(self, rows: Rows, x: Tensor) -> Tensor:
        """The tokens of x (..., T, d) whose queries are needed."""
        return rows.scored(x) if self.last else x

    def keys_and_values(self, w: AttentionWeights, n: Tensor) -> tuple[Tensor, Tensor]:
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
        steps = torch.arange(rows.x.shape[1], device=rows.x.device)
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

    def forward(self, w: AttentionWeights, rows: Rows, x: Tensor) -> Tensor:
        """Streams (B, K, T, d) -> (B, K, T, d), in the last block (B, K, S, d)."""
        n = norm(x)
        query = F.linear(self.queries(rows, n), w.query, w.query_bias)
        key, value = self.keys_and_values(w, n)
        return self.mix(w, rows, self.queries(rows, x), query, key, value)

    def mix(self, w: AttentionWeights, rows: Rows, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stream and queries (B, K, queries, d), keys and values (B, K, T, d) -> stream (B, K, queries, d)."""
        at, steps = self.positions(rows)
        query, key = self.turn(self.heads(query), at), self.turn(self.heads(key), steps)
        weights = self.attend(rows, query @ key.transpose(-1, -2))  # (B, K, H, queries, T)
        mixed = (weights @ self.heads(value)).transpose(-2, -3).flatten(-2)  # (B, K, queries, d)
        return F.linear(mixed, w.out, w.out_bias).add_(x)

    def forward_rank1(self, rows: Rows, state: AttentionState, entry: Rank1) -> Tensor:
        """From products of the incumbent's queries and keys, and of both with the direction: no projection at all.

        With x + s v as the stream and c as the norm's scale, the score of query t and key u is
        c_u (c_t (q_t + s_t q_v) + b) (k_u + s_u k_v), where q, k and q_v, k_v are x and v behind the
        matrices and b is the query's bias. The values enter as what each key writes to the stream.
        """
        if state.products is None:  # rotary: the direction's queries and keys would turn with every position
            return self.forward(self.w, rows, entry.added_to(state.x))
        w, p, scale = self.w, state.products, entry.scale(state.x)
        s, v = entry.scalar, entry.direction  # (B, K, T), (K, d)
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

    def out_by_head(self, w: AttentionWeights) -> Tensor:
        """(H, d/H, d): what each head writes to the stream for its values."""
        return w.out.unflatten(1, (self.n_heads, -1)).permute(1, 2, 0)

    def products(self, rows: Rows, x: Tensor) -> StreamProducts:
        """What `forward_rank1` reads of the stream x (B, T, d)."""
        w = self.w
        query = self.heads(self.queries(rows, x) @ w.query.T)
        key, value = (self.heads(t) for t in (x @ w.key_value.T).chunk(2, -1))
        bias, written = self.heads(w.query_bias[None]) @ key.mT, value @ self.out_by_head(w)
        return StreamProducts(query=query, key=key, scores=query @ key.mT, bias=bias, written=written)

    def incumbent(self, rows: Rows, x: Tensor) -> AttentionState:
        w, n = self.w, norm(x)
        inputs = n * w.gain + w.bias
        query = F.linear(self.queries(rows, n), w.query, w.query_bias)
        key, value = self.keys_and_values(w, n)
        at, steps = self.positions(rows)
        turned_query, turned_key = self.turn(self.heads(query), at), self.turn(self.heads(key), steps)
        scores = turned_query @ turned_key.transpose(-1, -2)
        weights = self.attend(rows, scores)
        mixed = (weights @ self.heads(value)).transpose(-2, -3).flatten(-2)
        read = weights @ inputs[:, None]  # (B, H, queries, d)
        sources = [one_for(mixed), mixed + w.value_bias, *read.unbind(1)]
        return AttentionState(
            x=x, products=None if self.rotary else self.products(rows, x), n=n, inputs=inputs,
            query=query, key=key, value=value, scores=scores, weights=weights,
            out=F.linear(mixed, w.out, w.out_bias) + self.queries(rows, x),
            turned_query=by_column(turned_query.transpose(-2, -3).flatten(-2)),
            turned_key=by_column(turned_key.transpose(-2, -3).flatten(-2)),
            sources=by_column(torch.cat(sources, -1)), written=self.heads(value) @ self.out_by_head(w),
        )  # fmt: skip

    def enter(self, rows: Rows, state: AttentionState, moves: dict[str, Moves]) -> Rank1:
        d, parts = self.w.out.shape[0], []
        for name, m in moves.items():
            is_value = name.startswith("value")
            first = 1 + d + self.head_of(m.i) * d if is_value else 1
            column = torch.zeros_like(m.i) if name.endswith("bias") else first + m.j
            parts.append((column, m.i + d if is_value else m.i, m.step))
        return rank1(state.sources, self.w.directions, parts)

    def enter_norm(self, rows: Rows, state: AttentionState, moves: dict[str, Moves]) -> Tensor:
        """Gain and bias change all that queries, keys and values read."""
        return self.change_norm(rows, state, *norm_change(state.n, moves))

    def change_norm(self, rows: Rows, state: AttentionState, scalar: Tensor, j: Tensor) -> Tensor:
        """The stream if component j (K,) of the norm's output changes by a scalar (B, K, T)."""
        change = Rank1(scalar, self.w.columns[j])  # in queries, keys and values, (B, K, T, 3d)
        query, key, value = change.added_to(torch.zeros_like(state.n[..., :1])).chunk(3, -1)
        query = self.queries(rows, query) + state.query[:, None]
        x, key, value = self.queries(rows, state.x)[:, None], key + state.key[:, None], value + state.value[:, None]
        return self.mix(self.w, rows, x, query, key, value)

    def enter_scores(self, rows: Rows, state: AttentionState, moves: dict[str, Moves]) -> Tensor:
        """A query or key weight changes a component of its query or key by what it reads.

        It changes the scores of its head by a product of a query's and a key's part.
        """
        inputs, size = by_column(state.inputs), len(self.w.out) // self.n_heads  # (B, d, T)
        at, steps = self.positions(rows)
        heads, lefts, rights = [], [], []
        for name, m in moves.items():
            is_key, i = name == "key", m.i
            moved = m.step[:, None] * (torch.ones_like(inputs[:, :1]) if name == "query_bias" else inputs[:, m.j])
            if not is_key:
                moved = self.w.scale * self.queries(rows, moved[..., None])[..., 0]  # (B, k, tokens)
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

    def add_to_scores(self, rows: Rows, state: AttentionState, head: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """The stream if left (B, K, queries, n) @ right (B, K, T, n)^T is added to the scores of a head (K,)."""
        x = torch.empty(*left.shape[:3], state.out.shape[-1], dtype=state.out.dtype, device=state.out.device)
        for h in head.unique().tolist():
            k = (head == h).nonzero().flatten()
            scores = state.scores[:, h, None] + (left[:, k].to(x) @ right[:, k].to(x).transpose(-1, -2))
            change = self.attend(rows, scores) - state.weights[:, h, None]  # (B, k, queries, T)
            x[:, k] = (change.flatten(1, 2) @ state.written[:, h]).unflatten(1, change.shape[1:3])
        return x.add_(state.out[:, None])
