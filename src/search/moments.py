"""From an estimated slope to a direction uphill: momentum and Adam.

Their memory is a dict of tensors (n,) and plain values that the caller keeps, so that a search can save it.
"""

import torch
from torch import Tensor


def momentum(state: dict, slopes: Tensor, decay: float) -> Tensor:
    """The velocity (n,): decay times the last one, plus the slopes (n,), as in `torch.optim.SGD` (Polyak 1964)."""
    velocity = _kept(state, "velocity", slopes)
    return velocity.mul_(decay).add_(measured(slopes)).clone()


def adam(state: dict, slopes: Tensor, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Tensor:
    """Mean slopes (n,) over the root of their mean squares, both running (Kingma and Ba 2015, algorithm 1).

    Args:
        state: the memory; an empty dict is filled.
        slopes: (n,) in this step.
        betas: decay of the running means of slopes and of their squares.
        eps: added to the root.
    """
    mean, square = _kept(state, "mean", slopes), _kept(state, "square", slopes)
    slopes = measured(slopes)
    state["count"] = state.get("count", 0) + 1
    mean.lerp_(slopes, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(slopes, slopes, value=1 - betas[1])
    root = (square / (1 - betas[1] ** state["count"])).sqrt_().add_(eps)  # both means start at 0: correct their bias
    return mean.div(1 - betas[0] ** state["count"]).div_(root)


def measured(slopes: Tensor) -> Tensor:
    """Slopes (n,) with those that are not finite, or too large to be squared, as 0: they must reach no weight."""
    return slopes.where(slopes.square().isfinite(), 0)


def _kept(state: dict, name: str, like: Tensor) -> Tensor:
    """A tensor of the memory; it begins at 0, also where weights were added since."""
    if name not in state or state[name].shape != like.shape:
        state[name] = torch.zeros_like(like)
        state.pop("count", None)
    return state[name]
