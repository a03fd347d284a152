"""The direction of a search step, orthogonalised: in a matrix, all directions of its weights count alike.

The slopes of a weight matrix are dominated by a few singular vectors, and a step along them moves little else. Muon
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the matrix of slopes by the nearest one with
orthogonal rows or columns: its singular vectors stay, its singular values become about 1.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from search.coordinates import Coordinates

QUINTIC = 3.4445, -4.7750, 2.0315  # Muon's: takes singular values from 0 to 1 near to 1 in five or six iterations


class Matrices(NamedTuple):
    """Weight matrices of one shape, by the coordinates of each, and the iterations of `newton_schulz` for them."""

    shape: torch.Size
    coordinates: list[slice]
    iterations: int


def newton_schulz(x: Tensor, iterations: int) -> Tensor:
    """Matrices (K, m, n) -> (K, m, n) with the same singular vectors and singular values of about 1.

    Those of 0 stay 0. Every iteration applies a polynomial a s + b s^3 + c s^5 to the singular values s, by products of
    matrices alone.
    """
    a, b, c = QUINTIC
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def matrices_of(coordinates: Coordinates, iterations: Sequence[int]) -> list[Matrices]:
    """The matrices among the parameters, those of one shape together, by the iterations asked for; 0 leaves one out."""
    alike: dict[tuple[torch.Size, int], list[slice]] = {}
    for p, end, n in zip(coordinates.parameters, coordinates.ends, iterations, strict=True):
        if p.ndim == 2 and n:
            alike.setdefault((p.shape, n), []).append(slice(end - p.numel(), end))
    return [Matrices(shape, some, n) for (shape, n), some in alike.items()]


def orthogonalised(direction: Tensor, slopes: Tensor, matrices: Iterable[Matrices]) -> Tensor:
    """The direction (n,) downhill with its part in some matrices replaced by the orthogonalised slopes (n,) there.

    In each matrix its root mean square stays as it was, so that a step is as long as it would have been.
    """
    direction = direction.clone()
    for some in matrices:
        before = torch.stack([direction[own] for own in some.coordinates])  # (K, m n)
        uphill = torch.stack([slopes[own].view(some.shape) for own in some.coordinates])
        after = -newton_schulz(uphill, some.iterations).flatten(1)
        length = after.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(after.dtype).tiny)
        after *= before.norm(dim=1, keepdim=True) / length
        for own, part in zip(some.coordinates, after, strict=True):
            direction[own] = part
    return direction
