"""The attention of a block as a stage; see `polls/stages.py`.

Shapes: B rows of the batch, K candidates, T tokens, S scored positions, H heads. "queries" are the positions whose
queries are needed: all T, in the last block the S scored ones.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from polls.node_kinds import Credit, Kind, Moves, Nodes, Rank1, shares
from polls.rows import Rows, State
from polls.stages import Stage, Weights, centred, linear, mean_square, norm, times, unit_vectors
from transformer import Block, frequencies

WIDE = 40.0  # scores beyond this, whose exponentials come near the ends of float32's range


@dataclass(frozen=True, slots=True)
class AttentionWeights(Weights):
    query: Tensor  # (d, d), behind the gain, with the scale
    query_bias: Tensor  # (d,), with the scale and what the norm's bias adds
    key_value: Tensor  # (2d, d), behind the gain
    key_bias: Tensor  # (d,), what the norm's bias adds
    value_bias: Tensor  # (d,), with what the norm's bias adds
    out: Tensor  # (d, d), centred
    out_bias: Tensor  # (d,), centred, with what the values' bias adds
    columns: Tensor  # (d, 3d): what a component of the norm's output does to queries, keys and values


@dataclass(frozen=True, slots=True)
class AttentionState(State):
    x: Tensor  # (B, T, d)
    square: Tensor  # (B, T, 1), `mean_square` of x
    products: dict[str, Tensor]  # see `Attention.products`; empty with rotary positions
    query: Tensor  # (B, queries, d)
    key: Tensor  # (B, T, d)
    value: Tensor  # (B, T, d), without their bias
    scores: Tensor  # (B, H, queries, T)
    weights: Tensor  # (B, H, queries, T)
    turned_query: Tensor  # (B, queries, d), as it meets the keys
    turned_key: Tensor  # (B, T, d), as it meets the queries
    written: Tensor  # (B, H, T, d) what a key writes to the stream


class Attention(Stage[AttentionWeights, AttentionState]):
    """Causal self-attention of one block, with its norm. The last block's writes scored positions only."""

    def __init__(self, block: Block, last: bool):
        a, norm = block.attention, block.attention_norm
        d_model = a.out.in_features
        self.n_heads, self.rotary, self.last, self.head_size = a.n_heads, a.rotary, last, d_model // a.n_heads
        self.scale = self.head_size**-0.5  # of the scores
        tensors: dict[str, Tensor] = {"gain": norm.weight, "bias": norm.bias, "key": a.key.weight}
        for name, part in (("query", a.query), ("value", a.value), ("out", a.out)):
            tensors |= {name: part.weight, f"{name}_bias": part.bias}
        super().__init__(tensors)
        out = Kind[AttentionState](d_model, ("out", "out_bias"), partial(self.write, "out"), at_queries=True)
        values = Values(d_model, ("value", "value_bias"), partial(self.write, "value"), at_queries=True, stage=self)
        scores = Scores(
            d_model, ("key", "query", "query_bias"), self.enter_scores, rank1=False, at_queries=True,
            shared=self.head_size, stage=self,
        )  # fmt: skip
        normed = Kind[AttentionState](d_model, ("gain", "bias"), self.enter_norm, rank1=False)
        self.kinds = (normed, scores, values, out)

    def fold(self, t: dict[str, Tensor]) -> AttentionWeights:
        # a bias in front of the values passes through weights that sum to 1: it is a bias of the output
        columns, out = torch.cat([t["query"] * self.scale, t["key"], t["value"]], -2), centred(t["out"], -2)
        behind_gain, of_bias = columns * t["gain"][..., None, :], times(columns, t["bias"])
        (query, key_value), d = behind_gain.tensor_split([out.shape[-2]], -2), out.shape[-2]
        query_bias, key_bias, value_bias = of_bias.split(d, -1)
        value_bias = value_bias + t["value_bias"]
        return AttentionWeights(
            query=query, query_bias=torch.add(query_bias, t["query_bias"], alpha=self.scale), key_value=key_value,
            key_bias=key_bias, value_bias=value_bias, out=out,
            out_bias=times(out, value_bias, centred(t["out_bias"], -1)), columns=columns.mT,
            directions={"out": unit_vectors(out.mT), "value": out.mT},
        )  # fmt: skip

    def queries(self, rows: Rows, x: Tensor) -> Tensor:
        """The tokens of x (..., T, d) whose queries are needed."""
        return rows.scored(x) if self.last else x

    def keys_and_values(self, w: AttentionWeights, n: Tensor) -> tuple[Tensor, Tensor]:
        """Normed streams (..., T, d) -> keys and values (..., T, d) each, the values without their bias."""
        key, value = linear(n, w.key_value).chunk(2, -1)
        # unturned, a bias shifts all scores of a query alike, and softmax does not see it
        return (key + w.key_bias[..., None, :] if self.rotary else key), value

    def heads(self, x: Tensor) -> Tensor:
        """(..., T, d) -> (..., H, T, d/H)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(-2, -3)

    def head_of(self, i: Tensor) -> Tensor:
        """(k,) components of queries, keys or values -> (k,) their heads."""
        return i // self.head_size

    def turn(self, x: Tensor, at: Tensor, back: bool = False) -> Tensor:
        """Rotary positions `at` (T,) or (B, T) for x (B, ..., H, T, d/H); see `transformer.rotate`; back undoes it."""
        if not self.rotary:
            return x
        angles = at[..., None] * frequencies(x.shape[-1], x.device)  # (T, d/2H)
        if at.ndim == 2:
            angles = angles.view(len(at), *[1] * (x.ndim - 3), *angles.shape[1:])
        cos, sin = angles.cos().to(x), (angles.sin() * (-1 if back else 1)).to(x)
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    def positions(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Positions of the queries, (B, S) or (T,), and of the keys (T,)."""
        return (rows.at if self.last else rows.steps), rows.steps

    def attend(self, rows: Rows, scores: Tensor) -> Tensor:
        """Softmax over the keys that a query sees: scores (B, ..., queries, T).

        Without subtracting the maximum, unless the incumbent's scores are wide; where a sum leaves float32's range
        nevertheless, the result is nan. The mask is a factor: exp(-inf) would cost as much as eight exponentials.
        """
        seen = rows.seen_by_scored if self.last else rows.seen
        seen = seen.view(len(seen), *[1] * (scores.ndim - 3), *seen.shape[1:])
        if rows.wide:
            return scores.masked_fill(seen == 0, -math.inf).softmax(-1)
        weights = scores.exp().mul_(seen)
        total = weights.sum(-1, keepdim=True)
        return weights.div_(F.threshold(total, 1e-30, math.nan, inplace=True))

    def forward(self, w: AttentionWeights, rows: Rows, x: Tensor) -> Tensor:
        """Streams (B, K, T, d) -> (B, K, T, d), in the last block (B, K, S, d)."""
        n = norm(x)
        query = linear(self.queries(rows, n), w.query, w.query_bias)
        key, value = self.keys_and_values(w, n)
        return self.mix(w, rows, self.queries(rows, x), query, key, value)

    def mix(self, w: AttentionWeights, rows: Rows, x: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stream and queries (B, K, queries, d), keys and values (B, K, T, d) -> stream (B, K, queries, d)."""
        at, steps = self.positions(rows)
        query, key = self.turn(self.heads(query), at), self.turn(self.heads(key), steps)
        weights = self.attend(rows, query @ key.transpose(-1, -2))  # (B, K, H, queries, T)
        mixed = (weights @ self.heads(value)).transpose(-2, -3).flatten(-2)  # (B, K, queries, d)
        return linear(mixed, w.out, w.out_bias).add_(x)

    def forward_rank1(self, rows: Rows, state: AttentionState, entry: Rank1) -> Tensor:
        """From the incumbent's queries and keys and those of the direction: no projection at all.

        With x + s v as the stream and c as the norm's scale, the score of query t and key u is
        c_u (c_t (q_t + s_t q_v) + b) (k_u + s_u k_v), where q, k and q_v, k_v are x and v behind the
        matrices and b is the query's bias. The values enter as what each key writes to the stream.
        """
        if self.rotary:  # the direction's queries and keys would turn with every position
            return self.forward(self.w, rows, entry.added_to(state.x))
        w, p, scale = self.w, state.products, entry.scale(state.x, state.square)
        s, v = entry.scalar, entry.direction  # (B, K, T), (K, d)
        q_v, (k_v, value_v) = (v @ w.query.T)[:, None], (v @ w.key_value.T)[:, None].chunk(2, -1)
        q_v, k_v, value_v = self.heads(q_v), self.heads(k_v), self.heads(value_v)  # (K, H, 1, d/H)
        scale_q, s_q = (self.queries(rows, t[..., None])[:, :, None] for t in (scale, s))  # (B, K, 1, queries, 1)
        scale, s = scale[:, :, None, None], s[:, :, None, None]  # (B, K, 1, 1, T)
        query = torch.addcmul(p["query"][:, None], s_q, q_v).mul_(scale_q).add_(self.heads(w.query_bias[None]))
        key = torch.addcmul(p["key"][:, None], s.mT, k_v)  # (B, K, H, T, d/H)
        scores = query @ key.mT  # (B, K, H, queries, T)
        weights = self.attend(rows, scores.mul_(scale)).mul_(scale)
        x = weights.transpose(2, 3).flatten(3).flatten(1, 2) @ p["written"].flatten(1, 2)  # (B, K queries, d)
        x = x.unflatten(1, weights.shape[1:4:2]).add_((self.queries(rows, state.x) + w.out_bias)[:, None])
        x.addcmul_(s_q[:, :, 0], v[:, None])
        written, along = self.written(w, value_v), (weights * s).sum(-1, keepdim=True)
        for h in range(self.n_heads):
            x.addcmul_(along[:, :, h], written[:, h])  # (B, K, queries, 1) times (K, 1, d)
        return x

    def written(self, w: AttentionWeights, value: Tensor) -> Tensor:
        """Values (B, H, T, d/H) -> (B, H, T, d): what each head writes to the stream for them."""
        return torch.einsum("bhtc,dhc->bhtd", value, w.out.unflatten(1, (self.n_heads, -1)))

    def products(self, rows: Rows, x: Tensor) -> dict[str, Tensor]:
        """What `forward_rank1` reads of the stream x (B, T, d): queries, keys and values before the norm."""
        w = self.w
        query = self.heads(self.queries(rows, x) @ w.query.T).contiguous()  # (B, H, queries, d/H)
        key, value = (self.heads(t).contiguous() for t in (x @ w.key_value.T).chunk(2, -1))  # (B, H, T, d/H) each
        return {"query": query, "key": key, "written": self.written(w, value)}

    def incumbent(self, rows: Rows, x: Tensor) -> AttentionState:
        w, square = self.w, mean_square(x)
        n = x * square.rsqrt()
        query = F.linear(self.queries(rows, n), w.query, w.query_bias)
        key, value = self.keys_and_values(w, n)
        at, steps = self.positions(rows)
        turned_query, turned_key = self.turn(self.heads(query), at), self.turn(self.heads(key), steps)
        scores = turned_query @ turned_key.mT
        seen = rows.seen_by_scored if self.last else rows.seen  # here with care: whether it is needed is not known yet
        weights = scores.masked_fill(seen[:, None] == 0, -math.inf).softmax(-1)
        mixed = (weights @ self.heads(value)).transpose(-2, -3).flatten(-2)
        inputs, one = self.inputs(n), rows.ones(mixed)
        reads = {"gain": n, "bias": rows.ones(n), "key": inputs, "query": self.queries(rows, inputs), "query_bias": one}
        reads |= {"value": weights @ inputs[:, None], "value_bias": one, "out": mixed + w.value_bias, "out_bias": one}
        return AttentionState(
            out=F.linear(mixed, w.out, w.out_bias).add_(self.queries(rows, x)), reads=reads,
            x=x, square=square, products={} if self.rotary else self.products(rows, x),
            query=query, key=key, value=value, scores=scores, weights=weights,
            turned_query=turned_query.transpose(-2, -3).flatten(-2),
            turned_key=turned_key.transpose(-2, -3).flatten(-2),
            written=self.written(w, self.heads(value)),
        )  # fmt: skip

    def enter_norm(self, rows: Rows, state: AttentionState, i: Tensor, change: Tensor) -> Tensor:
        """Components (k,) of the norm's output that change by (B, k, T) change queries, keys and values."""
        parts = change[..., None] * self.w.columns[i][:, None]  # (B, k, T, 3d)
        query, key, value = parts.chunk(3, -1)
        query = self.queries(rows, query) + state.query[:, None]
        x, key, value = self.queries(rows, state.x)[:, None], key + state.key[:, None], value + state.value[:, None]
        return self.mix(self.w, rows, x, query, key, value)

    def enter_scores(self, rows: Rows, state: AttentionState, i: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Components (k,) that add left (B, k, queries, n) @ right (B, k, T, n)^T to the scores of their head."""
        head = self.head_of(i)
        change = left * right.mT if left.shape[-1] == 1 else left @ right.mT  # (B, k, queries, T)
        change = self.attend(rows, change.add_(state.scores[:, head])).sub_(state.weights[:, head])
        return (change @ state.written[:, head]).add_(state.out[:, None])


@dataclass(frozen=True, eq=False)
class Values(Kind[AttentionState]):
    """Components of the values, moved where their head has mixed them. A row reads what its head mixes."""

    stage: Attention = field(kw_only=True)

    def changes(self, rows: Rows, state: AttentionState, name: str, m: Moves) -> tuple[Tensor, ...]:
        if name != "value":
            return super().changes(rows, state, name, m)
        read = state.reads[name][:, self.stage.head_of(m.i), :, m.j]  # (k, B, queries)
        return m.i, read.transpose(0, 1) * m.step[:, None]

    def slope(self, u: Nodes[AttentionState], credit: Credit, name: str) -> Tensor:
        if name != "value":
            return super().slope(u, credit, name)
        read = u.state.reads[name].transpose(0, 1).flatten(1, 2)[self.stage.head_of(u.i)]  # (k, B queries, d)
        return (credit.flat[:, None] @ read)[:, 0]


@dataclass(frozen=True, eq=False)
class Scores(Kind[AttentionState]):
    """All scores of a head at once: as many nodes as it has components, which sample the same weights.

    A score is linear in the weights of its query, which read the query's input times the key, and in those of its key.
    It is moved by a sign of the query times one of the key, which is as good as a sign of its own: the products of
    different pairs are uncorrelated. A weight changes a component of its query or key, and with it the scores by a
    product of a query's part and a key's.
    """

    stage: Attention = field(kw_only=True)

    def changes(self, rows: Rows, state: AttentionState, name: str, m: Moves) -> tuple[Tensor, ...]:
        """The components (k,), parts of queries (B, k, queries, n) and of keys (B, k, T, n): n is 2 if rotary, or 1."""
        size, (at, steps) = self.stage.head_size, self.stage.positions(rows)
        i, moved = super().changes(rows, state, name, m)  # (k,), (B, k, tokens)
        if name == "key":
            other = state.turned_query
        else:
            moved, other, steps = self.stage.scale * moved, state.turned_key, at
        if self.stage.rotary:  # the moved component turns into itself and its partner in the pair
            frequency = frequencies(size, i.device)[i % size // 2]
            angle = steps[..., None, :] * frequency[:, None]  # (k, tokens) or (B, k, tokens)
            sign = 1 - 2 * (i % 2)[:, None]
            moved = torch.stack([moved * angle.cos(), moved * angle.sin() * sign], -1)
            other = torch.stack([other[..., i].mT, other[..., i ^ 1].mT], -1)
        else:
            moved, other = moved[..., None], other[..., i].mT[..., None]
        moved, other = moved.to(state.out), other.to(state.out)
        return (i, other, moved) if name == "key" else (i, moved, other)

    def enter_nodes(self, u: Nodes[AttentionState]) -> Tensor:
        return self.stage.enter_scores(u.rows, u.state, u.i, u.change[..., None], u.key_signs[..., None])

    def slopes(self, u: Nodes[AttentionState], credit: Credit, names: Iterable[str]) -> dict[str, Tensor]:
        """Of the weights of all heads; those of heads of which no node was moved are 0."""
        stage, weights, (queries, keys) = self.stage, u.state.weights, self.stage.positions(u.rows)
        by_query = credit.flat.unflatten(1, (len(weights), -1)).transpose(0, 1)  # (B, k, queries)
        moved = by_query[..., None] * u.key_signs[:, :, None]  # (B, k, queries, T)
        pairs = torch.zeros_like(weights).index_add_(1, stage.head_of(u.i), moved)  # (B, H, queries, T)
        pairs *= shares(weights.square())
        pairs.addcmul_(weights, pairs.sum(-1, keepdim=True), value=-1)  # softmax sees no shift
        # as queries and keys were before they were turned, (B, H, tokens, d/H) -> (B, tokens, d)
        key = stage.turn(pairs.mT @ stage.heads(u.state.turned_query), keys, back=True).transpose(-2, -3).flatten(-2)
        query = stage.turn(pairs @ stage.heads(u.state.turned_key), queries, back=True).transpose(-2, -3).flatten(-2)
        query *= stage.scale
        found = {
            "key": torch.einsum("bti,btf->if", key, u.state.reads["key"]),
            "query": torch.einsum("bti,btf->if", query, u.state.reads["query"]),
            "query_bias": query.sum((0, 1)),
        }
        return {name: found[name] for name in names}

    def add(self, slopes: Tensor, i: Tensor, found: Tensor) -> None:
        slopes += found
