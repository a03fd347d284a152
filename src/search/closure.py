"""What an optimizer may ask: the loss here, and the losses of many candidates.

A *coordinate* is one flat number per weight, counted over the parameters in the order in which the
optimizer holds them. A closure is any callable that returns the loss at the current weights. It may
also answer for many candidates in one call, without the optimizer moving a weight:

    poll(coordinates (K,), steps (K,)) -> losses (K,)
        candidate k moves one coordinate: weight[coordinates[k]] + steps[k]
    trial(coordinates (M,), changes (M,), scales (S,)) -> losses (S,)
        candidate s moves many distinct coordinates at once: weight[coordinates] + scales[s] * changes

A third question is answered for models whose tokens have losses of their own (`polls/nodes.py`):

    credit(units (K,), steps (K,), signs) -> coordinates (M,), slopes (M,)
        samples of the slopes of all weights of K of the model's `n_units` units, for K evaluations

`OneByOne` answers the first two for any closure by moving the weights and putting them back: the readable
reference that every faster answer is checked against.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor, nn


class Candidates(Protocol):
    """A closure that answers for many candidates. `block` is how many it likes to get in a call."""

    block: int

    def poll(self, coordinates: Tensor, steps: Tensor) -> Tensor: ...

    def trial(self, coordinates: Tensor, changes: Tensor, scales: Tensor) -> Tensor: ...


class Coordinates:
    """The flat numbering of the weights of several parameters.

    Args:
        parameters: the tensors, in the order in which their weights are counted.
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self.parameters = list(parameters)
        self.ends = list(accumulate(p.numel() for p in self.parameters))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def locate(self, coordinate: int) -> tuple[int, tuple[int, ...]]:
        """The number of the parameter that a coordinate belongs to, and its index there."""
        owner = bisect_right(self.ends, coordinate)
        p = self.parameters[owner]
        # an index of one number an axis works for every memory layout, where view(-1) does not
        rest, index = coordinate - self.ends[owner] + p.numel(), []
        for size in reversed(p.shape):
            rest, i = divmod(rest, size)
            index.append(i)
        return owner, tuple(reversed(index))

    def owner(self, coordinates: Tensor) -> Tensor:
        """(K,) coordinates -> (K,) number of the parameter that each belongs to."""
        return torch.bucketize(coordinates, torch.tensor(self.ends), right=True)

    def touched(self, coordinates: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...], Tensor]]:
        """Of coordinates (K,): each parameter touched, the indices touched in it, their rows among the K."""
        owner = self.owner(coordinates)
        in_order = bool((owner[1:] >= owner[:-1]).all())
        order = torch.arange(len(owner)) if in_order else owner.argsort(stable=True)
        counts = owner.bincount(minlength=len(self.parameters)).tolist()
        for p, end, rows in zip(self.parameters, self.ends, order.split(counts), strict=True):
            if len(rows):
                flat = coordinates[rows] - end + p.numel()
                yield p, torch.unravel_index(flat.to(p.device), p.shape), rows

    @torch.no_grad()
    def move_one(self, coordinate: int, step: float) -> tuple[Tensor, tuple[int, ...], Tensor]:
        """Add a step to one weight, in place; returns its tensor, its index and the weight as it was."""
        owner, index = self.locate(coordinate)
        p = self.parameters[owner]
        weight = p[index].clone()
        p[index] = weight + step
        return p, index, weight

    def spread(self, coordinates: Tensor, changes: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Changes (K,) at distinct coordinates (K,): each parameter touched, and a tensor of its shape to add to it."""
        sizes = [p.numel() for p in self.parameters]
        if len(coordinates) == len(self) and torch.equal(coordinates, torch.arange(len(self))):
            flat, counts = changes, sizes  # every weight in order: nothing to look up
        else:
            flat = changes.new_zeros(len(self)).index_put_((coordinates,), changes)
            counts = self.owner(coordinates).bincount(minlength=len(sizes)).tolist()
        parts = zip(self.parameters, flat.split(sizes), counts, strict=True)
        return [(p, part.view(p.shape)) for p, part, count in parts if count]

    @torch.no_grad()
    def move(self, coordinates: Tensor, changes: Tensor) -> None:
        """Add changes (K,) to the weights at distinct coordinates (K,), in place."""
        for p, change in self.spread(coordinates, changes):
            p.add_(change.to(p))


class OneByOne:
    """Answers `poll` and `trial` for any `closure()`, one candidate after the other.

    The weights are put back by copy, bit for bit: adding a step and subtracting it again is not
    exact. Losses come back in float64, which holds those of every narrower type exactly.

    Args:
        closure: returns the loss at the current weights.
        coordinates: the weights that the candidates move.
    """

    block = 1  # asking for more in a call would only delay an acceptance

    def __init__(self, closure: Callable[[], Tensor], coordinates: Coordinates):
        self.closure, self.coordinates = closure, coordinates

    @torch.no_grad()
    def poll(self, coordinates: Tensor, steps: Tensor) -> Tensor:
        losses = []
        for coordinate, step in zip(coordinates.tolist(), steps.tolist(), strict=True):
            p, index, weight = self.coordinates.move_one(coordinate, step)
            try:
                losses.append(float(self.closure()))
            finally:
                p[index] = weight
        return torch.tensor(losses, dtype=torch.float64)

    @torch.no_grad()
    def trial(self, coordinates: Tensor, changes: Tensor, scales: Tensor) -> Tensor:
        losses = []
        saved = [(p, p.clone()) for p, _ in self.coordinates.spread(coordinates, changes)]
        for scale in scales:
            try:
                self.coordinates.move(coordinates, scale * changes)
                losses.append(float(self.closure()))
            finally:
                for p, weights in saved:
                    p.copy_(weights)
        return torch.tensor(losses, dtype=torch.float64)


@contextmanager
def forward_only(module: nn.Module) -> Iterator[None]:
    """Evaluate `module` as a search must: no gradients, eval mode (dropout off), modes put back."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True
