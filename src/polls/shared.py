"""What all ways to evaluate candidates share: the incumbent's loss, what counts as a change, what may be asked."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from search.closure import Changes
from search.coordinates import Coordinates
from search.losses import within_rounding

WILD = 1e12  # changes beyond this square to the largest float32: order of operations decides what comes out


class Incumbent:
    """The incumbent's loss as a search knows it: once it moved to a candidate, the loss polled for this candidate.

    Computed from the new weights it might differ from that in the last digit, and then a weight that
    changes nothing would pass for an improvement.
    """

    def __init__(self) -> None:
        self.polled = torch.empty(0, dtype=torch.float64, device="cpu")  # the losses of the newest poll
        self._weights: list[tuple[int, int, torch.dtype]] = []
        self._loss: Tensor | None = None

    def __call__(self, weights: Iterable[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """The loss in float64, on the CPU; computed only if a weight was changed since the last call."""
        versions = [version(p) for p in weights]
        if self._loss is None or versions != self._weights:
            loss = compute().cpu()
            self._weights, self._loss = versions, loss.double()
            if len(self.polled):
                same = self.polled[np.flatnonzero(within_rounding(self.polled, loss).numpy())]
                self._loss = torch.cat([same, self._loss[None]]).amax()
        return self._loss


def version(p: Tensor) -> tuple[int, int, torch.dtype]:
    """Changes whenever a tensor is changed in place or its memory exchanged."""
    return p._version, p.data_ptr(), p.dtype


def wild(changes: Tensor) -> Tensor:
    """Which candidates (K,) change a weight so far that they are left to the plain forward; changes (K, n)."""
    return torch.linalg.vector_norm(changes, torch.inf, dim=1) > WILD


def check_block(coordinates: Coordinates, asked: Tensor, steps: Tensor) -> None:
    """Raise unless `asked` (K,) and `steps` (K,) are one block of candidates.

    Raises:
        ValueError: the shapes differ, or the block is empty.
        IndexError: a coordinate is out of range.
    """
    if asked.shape != steps.shape or asked.ndim != 1:
        raise ValueError(f"coordinates {tuple(asked.shape)} and steps {tuple(steps.shape)} must both be (K,)")
    if not len(asked):
        raise ValueError("an empty block: ask for at least one candidate")
    flat = asked.cpu().numpy()
    wrong = flat[(flat < 0) | (flat >= len(coordinates))]
    if len(wrong):
        raise IndexError(f"coordinate {wrong[0]} is out of range: there are {len(coordinates)}, numbered from 0")


def check_trial(coordinates: Coordinates, changes: Tensor, scales: Tensor) -> None:
    """Raise a ValueError unless changes are (n,), of all coordinates, and scales (S,) with S > 0."""
    if changes.shape != (len(coordinates),):
        raise ValueError(f"changes {tuple(changes.shape)} must be ({len(coordinates)},), one for each coordinate")
    if scales.ndim != 1 or not len(scales):
        raise ValueError(f"scales {tuple(scales.shape)} must be (S,) with at least one step length")


def checked(changes: Changes, count: int, n: int) -> Changes:
    """The same changes, of which every part is looked at: (last - first, n).

    Raises:
        ValueError: count is not positive; from the result, a part of another shape.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1: ask for at least one candidate")

    def some(first: int, last: int) -> Tensor:
        part = changes(first, last)
        if part.shape != (last - first, n):
            raise ValueError(f"changes({first}, {last}) {tuple(part.shape)} must be ({last - first}, {n})")
        return part

    return some
