"""The rows of a batch as the structured polls evaluate them: without doubles, parted by length.

Shapes: B rows, K candidates, T tokens, S scored positions, C classes.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from data.sequences import IGNORE

ROW_TOKENS = 4096  # tokens of the incumbent at a time, so that a chunk of candidates never holds more
PART_COST = 2**20  # tokens x weights of the blocks: measured, about what it costs to call the operators for more rows


@dataclass(frozen=True, slots=True)
class State:
    """What the incumbent computes at a stage.

    Attributes:
        out: what the stage writes: the stream (B, T, d), from the last attention on (B, S, d), and behind the head
            the losses of the scored tokens (B, 1, S).
        reads: (B, columns, tokens) what the weights of a tensor read, by its name, column by column of a matrix; a
            vector is one column, but for the gain of a norm, of which each number reads a row of its own.
    """

    out: Tensor
    reads: dict[str, Tensor]

    def bytes(self) -> int:
        """The memory that all tensors of the state take."""
        values = [getattr(self, field.name) for field in fields(self)]
        parts = [list(value.values()) if isinstance(value, dict) else [value] for value in values]
        return sum(tensor.nbytes for tensors in parts for tensor in tensors)


class Rows:
    """Some rows of a batch, and what the incumbent computes on them, stage by stage.

    Args:
        x: (B, T) tokens.
        y: (B, T) classes or IGNORE.
        weight: (B,) of each scored token of a row in the mean loss.
        dtype: of the weights of the model.
    """

    def __init__(self, x: Tensor, y: Tensor, weight: Tensor, dtype: torch.dtype):
        scored = y != IGNORE
        length = max(1, int(scored.any(0).nonzero().max()) + 1)  # nothing behind the last scored token matters
        self.x, y, scored = x[:, :length], y[:, :length], scored[:, :length]
        n_scored = int(scored.sum(1).max())
        steps = torch.arange(length, device=x.device)
        # the scored positions of each row in order; a row with fewer repeats one of its own with weight 0
        order = torch.where(scored, steps, length).sort(1).values[:, :n_scored]
        real = order < length
        self.at = order.where(real, order[:, :1])  # (B, S)
        self.target = y.gather(1, self.at)  # (B, S)
        self.weight = (weight[:, None] * real).to(dtype)  # (B, S)
        self.seen = (steps <= steps[:, None]).to(dtype)[None]  # (1, T, T): query t sees the keys 0..t
        self.seen_by_scored = (steps <= self.at[..., None]).to(dtype)  # (B, S, T)
        first = int(self.at[0, 0])
        adjacent = bool((self.at == first + steps[:n_scored]).all())
        self.slice = slice(first, first + n_scored) if adjacent else None  # the scored positions, if alike in all rows
        self.states: list[tuple[object, State]] = []  # of each stage: its weights, what the incumbent computes

    def scored(self, x: Tensor) -> Tensor:
        """Tokens (B, T, ...) or (B, K, T, d) -> only the scored ones, (B, S, ...) or (B, K, S, d)."""
        if self.slice is not None:
            return x[..., self.slice, :]
        at = self.at.view(len(self.at), *[1] * (x.ndim - 3), -1, 1)
        return torch.take_along_dim(x, at, dim=-2)

    def token_losses(self, logits: Tensor) -> Tensor:
        """Cross-entropy of every scored token: logits (C, B, K, S) -> (B, K, S)."""
        target = self.target[None, :, None].expand(1, *logits.shape[1:])
        # relative to the target's logit: nothing is lost to rounding when a token is all but certain
        return (logits - logits.gather(0, target)).exp_().sum(0).log_()

    def total(self, losses: Tensor) -> Tensor:
        """Losses of tokens (B, K, S) -> the part of these rows in the mean loss (K,)."""
        return torch.einsum("bks,bs->k", losses, self.weight)

    def bytes(self) -> int:
        """Memory taken by what is remembered of the incumbent."""
        return sum(state.bytes() for _, state in self.states)


def rows_of(batch: dict[str, Tensor], block_weights: int, dtype: torch.dtype) -> list[Rows]:
    """A batch in parts that are evaluated one after the other; none if no token is scored.

    Equal rows become one that weighs more. What stands behind the last scored token of a row is dropped.

    Args:
        batch: {"x": (B, T) tokens, "y": (B, T) classes or IGNORE}.
        block_weights: of all blocks of the model: a part with so many pays for its overhead the sooner.
        dtype: of the weights of the model.
    """
    x, y = batch["x"], batch["y"]
    width, positions = x.shape[1], torch.arange(x.shape[1], device=x.device)
    scored = y != IGNORE
    last = (scored * (positions + 1)).amax(1)  # (B,) tokens up to the last scored one
    x = x.masked_fill(positions >= last[:, None], 0)  # the others cannot change a scored one
    pairs, count = torch.cat([x, y], 1)[last > 0].unique(dim=0, return_counts=True)
    weight = count.double() / scored.sum()
    lengths, order = ((pairs[:, width:] != IGNORE) * (positions + 1)).amax(1).sort(stable=True)
    parts = []
    for some in order.split(part_sizes(lengths, PART_COST // block_weights + 24)):
        for chunk in some.chunk(math.ceil(len(some) * width / ROW_TOKENS)):
            parts.append(Rows(pairs[chunk, :width], pairs[chunk, width:], weight[chunk], dtype))
    return parts


def part_sizes(lengths: Tensor, overhead: float) -> list[int]:
    """How to part rows by length, so that short ones are not filled up to the longest: the cheapest way there is.

    A part costs its rows times the longest of them, and an overhead. Rows of one length stay together.

    Args:
        lengths: (B,) of the rows in tokens, in ascending order.
        overhead: of a part, in tokens.
    """
    values, counts = lengths.unique_consecutive(return_counts=True)
    ends = [0, *counts.cumsum(0).tolist()]
    # of the best way to part the rows of the first j lengths: what it costs, and with which length its last part begins
    cost, begin = [0.0], [0]
    for j, length in enumerate(values.tolist(), start=1):
        costs = [cost[i] + overhead + (ends[j] - ends[i]) * length for i in range(j)]
        begin.append(min(range(j), key=costs.__getitem__))
        cost.append(costs[begin[j]])
    sizes, j = [], len(values)
    while j:
        sizes.append(ends[j] - ends[begin[j]])
        j = begin[j]
    return sizes[::-1]
