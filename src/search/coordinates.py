"""The flat numbering of the weights of several parameters, and moves of some of them."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate

import numpy as np
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
        return torch.bucketize(coordinates, torch.tensor(self.ends, device=coordinates.device), right=True)

    def touched(self, coordinates: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...], Tensor]]:
        """Of coordinates (K,): each parameter touched, the indices touched in it, their rows among the K."""
        flat = coordinates.cpu().numpy()
        owner = np.searchsorted(self.ends, flat, side="right")
        order = owner.argsort(kind="stable")
        counts = np.bincount(owner, minlength=len(self.parameters))
        for p, end, rows in zip(self.parameters, self.ends, np.split(order, counts.cumsum()[:-1]), strict=True):
            if len(rows):
                index = np.unravel_index(flat[rows] - end + p.numel(), p.shape) if p.ndim else ()
                yield p, tuple(torch.as_tensor(i, device=p.device) for i in index), torch.from_numpy(rows)

    def with_parts(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each parameter, and its part of numbers of all coordinates (..., n), in its shape (..., *shape)."""
        parts = flat.split([p.numel() for p in self.parameters], -1)
        return [(p, part.view((*flat.shape[:-1], *p.shape))) for part, p in zip(parts, self.parameters, strict=True)]

    def empty_like_weights(self) -> Tensor:
        """(n,) without values, on the device of the weights; in float32, unless they are of float64."""
        first = self.parameters[0]
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        return torch.empty(len(self), dtype=dtype, device=first.device)

    @torch.no_grad()
    def move_one(self, coordinate: int, step: float) -> tuple[Tensor, tuple[int, ...], Tensor]:
        """Add a step to one weight, in place; returns its tensor, its index and the weight as it was."""
        owner, index = self.locate(coordinate)
        p = self.parameters[owner]
        weight = p[index].clone()
        p[index] = weight + step
        return p, index, weight

    @torch.no_grad()
    def move(self, changes: Tensor, coordinates: Tensor | None = None) -> None:
        """Add changes to the weights, in place: (n,) to all of them, or (K,) to those at distinct coordinates (K,)."""
        if coordinates is None:
            for p, change in self.with_parts(changes):
                p.add_(change.to(p))
        else:
            for p, index, rows in self.touched(coordinates):
                p[index] += changes[rows].to(p).view(-1 if p.ndim else ())
