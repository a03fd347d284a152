"""The rows of a batch as the structured polls evaluate them: without doubles, parted by length.

Shapes: B rows, K candidates, T tokens, S scored positions, C classes.
"""

import math
from copy import copy
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data.sequences import IGNORE
from polls.sizes import Sizes

ALIKE = 0.1  # part of the chances of rows to be drawn that does not depend on what they have learned


@dataclass(frozen=True, slots=True)
class State:
    """What the incumbent computes at a stage.

    Attributes:
        out: what the stage writes: the stream (B, T, d), from the last attention on (B, S, d), and behind the head
            the losses of the scored tokens (B, 1, S).
        reads: (B, tokens, columns) what the weights of a tensor read, by its name, column by column of a matrix; a
            vector is one column, but for the gain of a norm, of which each number reads a column of its own.
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
        like: a weight of the model: its device is that of all tensors, and its dtype.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, weight: np.ndarray, like: Tensor):
        scored = y != IGNORE
        length = int(scored.any(0).nonzero()[0].max()) + 1  # nothing behind the last scored token matters
        x, y, scored = x[:, :length], y[:, :length], scored[:, :length]
        n_scored, steps = int(scored.sum(1).max()), np.arange(length)
        # the scored positions of each row in order; a row with fewer repeats one of its own with weight 0
        order = np.sort(np.where(scored, steps, length), axis=1)[:, :n_scored]
        real = order < length
        at = np.where(real, order, order[:, :1])  # (B, S)
        first = int(at[0, 0])
        adjacent = bool((at == first + steps[:n_scored]).all())
        self.slice = slice(first, first + n_scored) if adjacent else None  # the scored positions, if alike in all rows
        on = partial(torch.as_tensor, device=like.device)
        self.x, self.at, self.steps = on(x), on(at), on(steps)  # (B, T), (B, S), (T,)
        self.target = on(np.take_along_axis(y, at, 1))  # (B, S)
        self.weight = on(weight[:, None] * real).to(like.dtype)  # (B, S)
        self.seen = on(steps <= steps[:, None])[None].to(like.dtype)  # (1, T, T): query t sees the keys 0..t
        self.seen_by_scored = on(steps <= at[..., None]).to(like.dtype)  # (B, S, T)
        self.one = torch.ones((), dtype=like.dtype, device=like.device)
        self.states: list[tuple[object, State]] = []  # of each stage: its weights, what the incumbent computes
        self.wide = False  # whether scores are so large that their softmax needs care

    def scored(self, x: Tensor) -> Tensor:
        """Tokens (B, T, ...) or (B, K, T, d) -> only the scored ones, (B, S, ...) or (B, K, S, d)."""
        if self.slice is not None:
            return x[..., self.slice, :]
        at = self.at.view(len(self.at), *[1] * (x.ndim - 3), -1, 1)
        return torch.take_along_dim(x, at, dim=-2)

    def ones(self, x: Tensor) -> Tensor:
        """What the biases of tokens (B, ..., d) read: (B, ..., 1)."""
        return self.one.expand(*x.shape[:-1], 1)

    def token_losses(self, logits: Tensor) -> Tensor:
        """Cross-entropy of every scored token: logits (C, B, K, S) -> (B, K, S)."""
        target = self.target[None, :, None].expand(1, *logits.shape[1:])
        # relative to the target's logit: nothing is lost to rounding when a token is all but certain
        return (logits - logits.gather(0, target)).exp_().sum(0).log_()

    def total(self, losses: Tensor) -> Tensor:
        """Losses of tokens (B, K, S) -> the part of these rows in the mean loss (K,)."""
        return torch.einsum("bks,bs->k", losses, self.weight)

    def some(self, factor: Tensor) -> "Rows":
        """The rows whose factor (B,) is not 0, each counted by it; nothing is remembered of them yet."""
        part, rows = copy(self), factor.nonzero().flatten().to(self.x.device)
        for name in ("x", "at", "target", "seen_by_scored"):
            setattr(part, name, getattr(self, name)[rows])
        part.weight, part.states = self.weight[rows] * factor.to(self.weight)[rows, None], []
        return part

    def bytes(self) -> int:
        """Memory taken by what is remembered of the incumbent."""
        return sum(state.bytes() for _, state in self.states)


def draw_rows(errors: Tensor, shares: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw n rows of a batch, the likelier the more errors are left in them (Katharopoulos and Fleuret 2018).

    A row asks for the more change the less likely its classes still are. Once most rows are learned, rows that are
    drawn alike hardly tell anything. A row counts the less the likelier it was, and so for what it is in the mean.

    Args:
        errors: (B,) of each row, the sum of 1 - p over its tokens, p the probability of the right class.
        shares: (B,) of each row in the mean loss; a part `ALIKE` of the chances goes by them.
        n: draws, at even distances (systematic sampling), so that a row may be drawn several times.
        generator: draws where they begin.

    Returns:
        (B,) by what factor each row counts, 0 if it was not drawn; in the mean over the draws it is 1.
    """
    errors = errors.nan_to_num(1.0)
    chance = torch.lerp(errors / errors.sum().clamp(min=1e-300), shares / shares.sum(), ALIKE)
    chance /= chance.sum()
    at = (torch.rand(1, generator=generator, dtype=torch.float64, device="cpu") + torch.arange(n, device="cpu")) / n
    row = torch.searchsorted(chance.cumsum(0), at).clamp_(max=len(chance) - 1)
    return row.bincount(minlength=len(chance)) / (n * chance)


def rows_of(batch: dict[str, Tensor], block_weights: int, like: Tensor, sizes: Sizes) -> list[Rows]:
    """A batch in parts that are evaluated one after the other; none if no token is scored.

    Equal rows become one that weighs more. What stands behind the last scored token of a row is dropped.

    Args:
        batch: {"x": (B, T) tokens, "y": (B, T) classes or IGNORE}.
        block_weights: of all blocks of the model: a part with so many pays for its overhead the sooner.
        like: a weight of the model, see `Rows`.
        sizes: of the parts.
    """
    x, y = (batch[name].cpu().numpy() for name in ("x", "y"))
    width, scored = x.shape[1], y != IGNORE
    last = (scored * np.arange(1, width + 1)).max(1)  # (B,) tokens up to the last scored one
    x = np.where(np.arange(width) < last[:, None], x, 0)  # the others cannot change a scored one
    pairs, count = np.unique(np.concatenate([x, y], 1)[last > 0], axis=0, return_counts=True)
    lengths = ((pairs[:, width:] != IGNORE) * np.arange(1, width + 1)).max(1, initial=0)
    order, parts = lengths.argsort(kind="stable"), []
    for some in np.split(order, np.cumsum(part_sizes(lengths[order], sizes.part // block_weights + 24))[:-1]):
        for chunk in np.array_split(some, math.ceil(len(some) * width / sizes.rows)) if len(some) else ():
            parts.append(Rows(pairs[chunk, :width], pairs[chunk, width:], count[chunk] / scored.sum(), like))
    return parts


def part_sizes(lengths: np.ndarray, overhead: float) -> list[int]:
    """How to part rows by length, so that short ones are not filled up to the longest: the cheapest way there is.

    A part costs its rows times the longest of them, and an overhead. Rows of one length stay together.

    Args:
        lengths: (B,) of the rows in tokens, in ascending order.
        overhead: of a part, in tokens.
    """
    values, counts = np.unique(lengths, return_counts=True)
    ends = [0, *np.cumsum(counts).tolist()]
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
