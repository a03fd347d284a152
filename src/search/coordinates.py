"""The flat numbering of the weights of several parameters, and moves of some of them."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate

import torch
from torch import Tensor


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
