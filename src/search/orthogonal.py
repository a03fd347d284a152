"""The direction of a search step, orthogonalised: in a matrix, all directions of its weights count alike.

The slopes of a weight matrix are dominated by a few singular vectors, and a step along them moves little else. Muon
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) replaces the matrix of slopes by the nearest one with
orthogonal rows or columns: its singular vectors stay, its singular values become about 1.
"""

import torch
from torch import Tensor

QUINTIC = 3.4445, -4.7750, 2.0315  # Muon's: takes singular values from 0 to 1 near to 1 in five or six iterations


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


def orthogonalised(
    direction: Tensor, slopes: Tensor, matrices: list[tuple[slice, torch.Size]], iterations: int
) -> Tensor:
    """The direction with its part in some matrices replaced by the orthogonalised slopes there.

    In each matrix its root mean square stays as it was, so that a step is as long as it would have been.

    Args:
        direction: (n,) downhill.
        slopes: (n,) uphill, not scaled.
        matrices: their coordinates, and their shapes.
        iterations: of `newton_schulz`.
    """
    direction = direction.clone()
    for shape in dict.fromkeys(shape for _, shape in matrices):
        alike = [own for own, of in matrices if of == shape]
        before = torch.stack([direction[own] for own in alike])  # (K, m n)
        after = -newton_schulz(torch.stack([slopes[own].view(shape) for own in alike]), iterations).flatten(1)
        length = after.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(after.dtype).tiny)
        after *= before.norm(dim=1, keepdim=True) / length
        for own, part in zip(alike, after, strict=True):
            direction[own] = part
    return direction
