"""Running means of slopes, for optimizers that follow them without testing the move: momentum and Adam."""

from typing import Any

import torch
from torch import Tensor


def averaged(saved: dict[str, Any], slopes: Tensor, update: str, momentum: float, square_decay: float) -> Tensor:
    """What to descend along, (n,), after the slopes (n,) of one more step.

    sgd:   v <- momentum v + slopes; v                      (Polyak 1964, in the form of `torch.optim.SGD`)
    adam:  m / (sqrt(q) + 1e-8), m and q running means of slopes and of their squares, corrected for their start at 0
                                                            (Kingma and Ba 2015, algorithm 1)

    Args:
        saved: of the optimizer; `first` (n,), `second` (n,) and the number of steps, `averaged`, are kept there.
        slopes: of this step.
        update: "sgd" or "adam".
        momentum: decay of v or m per step, in [0, 1).
        square_decay: decay of q per step, in [0, 1).
    """
    saved.setdefault("averaged", 0)
    saved["averaged"] += 1
    first = saved.get("first", torch.zeros_like(slopes))
    if update == "sgd":
        saved["first"] = momentum * first + slopes
        return saved["first"]
    mean = saved["first"] = torch.lerp(slopes, first, momentum)
    square = saved["second"] = torch.lerp(slopes.square(), saved.get("second", torch.zeros_like(slopes)), square_decay)
    root = (square / (1 - square_decay ** saved["averaged"])).sqrt()
    return mean / (1 - momentum ** saved["averaged"]) / (root + 1e-8)
