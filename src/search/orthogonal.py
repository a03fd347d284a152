"""The direction of a search step, orthogonalised: in a matrix, all directions of its weights count alike.

The slopes of a weight matrix are dominated by a few singular vectors, and a step along them moves little else. Muon
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the matrix of slopes by the nearest one with
orthogonal rows or columns: its singular vectors stay, its singular values become about 1.

All directions of a wide matrix then add up to a long step of what it puts out. So a matrix wider than `WIDTH` moves by
less, in inverse proportion, as the learning rates of Adam do that fit every width (Yang et al. 2021, Tensor Programs
V): the same step lengths then do for larger models.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from search.coordinates import Coordinates

QUINTIC = 3.4445, -4.7750, 2.0315  # Muon's: takes singular values from 0 to 1 near to 1 in five or six iterations
WIDTH = 64  # up to which, in the smaller dimension of a matrix, its step lengths are as they are given


class Matrices(NamedTuple):
    """Weight matrices of m rows and n columns, or the other way round, with m <= n.

    Each is given by its coordinates, and whether it is the tall one; `iterations` are those of `newton_schulz`.
    """

    size: tuple[int, int]
    members: list[tuple[slice, bool]]
    iterations: int

    def of(self, flat: Tensor) -> Tensor:
        """Numbers of all coordinates (n,) -> (K, m, n) of the matrices."""
        m, n = self.size
        return torch.stack([flat[own].view(n, m).mT if tall else flat[own].view(m, n) for own, tall in self.members])


def newton_schulz(x: Tensor, iterations: int) -> Tensor:
    """Matrices (K, m, n), m <= n -> (K, m, n) with the same singular vectors and singular values of about 1.

    Those of 0 stay 0. Every iteration applies a polynomial a s + b s^3 + c s^5 to the singular values s, by products of
    matrices alone.
    """
    a, b, c = QUINTIC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def matrices_of(coordinates: Coordinates, iterations: Sequence[int]) -> list[Matrices]:
    """The matrices among the parameters, those of one size together, by the iterations asked for; 0 leaves one out."""
    alike: dict[tuple[tuple[int, int], int], list[tuple[slice, bool]]] = {}
    for p, end, k in zip(coordinates.parameters, coordinates.ends, iterations, strict=True):
        if p.ndim == 2 and k:
            m, n = sorted(p.shape)
            alike.setdefault(((m, n), k), []).append((slice(end - p.numel(), end), p.shape != (m, n)))
    return [Matrices(size, members, k) for (size, k), members in alike.items()]


def orthogonalised(direction: Tensor, slopes: Tensor, matrices: Iterable[Matrices]) -> Tensor:
    """The direction (n,) downhill with its part in some matrices replaced by the orthogonalised slopes (n,) there.

    In each matrix its root mean square stays as it was, so that a step is as long as it would have been; in one of
    m > WIDTH rows and columns at least, WIDTH / m of it.
    """
    direction = direction.clone()
    for some in matrices:
        downhill = newton_schulz(some.of(slopes), some.iterations)  # but for its sign
        length = -min(1.0, WIDTH / some.size[0]) * some.of(direction).norm(dim=(1, 2), keepdim=True)
        downhill *= length / downhill.norm(dim=(1, 2), keepdim=True).clamp_(min=torch.finfo(downhill.dtype).tiny)
        for (own, tall), part in zip(some.members, downhill, strict=True):
            direction[own] = (part.mT if tall else part).flatten()
    return direction
