"""Remembered slopes: what the polls so far say about the direction downhill.

A poll of coordinate i at the step r gives the slope (loss there - loss here) / r, a simplex gradient
of one coordinate (Custodio and Vicente 2007). The memory keeps, for every coordinate, running means of
its slopes and of their squares, and what direction they spoke for when it was polled last. That
direction fades with its age: it was measured at another incumbent, on another batch.
"""

import math

import numpy as np
import torch
from torch import Tensor


class SlopeMemory:
    """Slopes of n coordinates.

    Args:
        state: the tensors of the memory, (n,) each; an empty dict is filled. It is changed in place,
            so whoever owns it can save it.
        n: coordinates.
        like: a weight, on whose device the tensors are; in float32, unless it is of float64.
        memory: decay in [0, 1) of the running mean of a coordinate's slopes, a visit; 0 keeps the last one.
        scale_memory: decay in [0, 1) of the running mean of their squares, a visit; None: slopes are not scaled.
        fade: steps after which a direction has faded to 1/e; None: it never fades.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        n: int,
        like: Tensor,
        memory: float,
        scale_memory: float | None,
        fade: float | None,
    ):
        self.state, self.memory, self.scale_memory, self.fade = state, memory, scale_memory, fade
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        for name in ("mean", "square", "visits", "direction"):
            if name not in state:
                state[name] = torch.zeros(n, dtype=dtype, device=like.device)

    @property
    def direction(self) -> Tensor:
        """(n,) downhill, as far as is known; 0 where a coordinate was never polled."""
        return self.state["direction"]

    @property
    def mean(self) -> Tensor:
        """(n,) running means of the slopes, corrected for their start at 0; 0 where there is none."""
        return self.state["mean"] / (1 - torch.pow(self.memory, self.state["visits"].clamp(min=1)))

    def uphill(self, coordinates: Tensor) -> Tensor:
        """(K,) signs of the remembered slopes, 0 where there is none."""
        return self.state["mean"][coordinates.to(self.direction.device)].sign().to(coordinates.device)

    def age(self) -> None:
        """Let a step pass."""
        if self.fade is not None:
            self.state["direction"] *= math.exp(-1 / self.fade)

    def learn(self, slopes: Tensor, known: Tensor, where: Tensor | slice = slice(None)) -> None:
        """Take in slopes that were measured; one too large to be squared counts as none.

        Args:
            slopes: (n,) of all coordinates, or (K,).
            known: which of them were measured, (n,) or (K,).
            where: the K distinct coordinates; all of them by default.
        """
        old, slopes = {name: tensor[where] for name, tensor in self.state.items()}, slopes.to(self.direction)
        square = slopes.square()
        known = known.to(square.device) & (square < math.inf)
        visits = old["visits"] + 1
        mean = torch.lerp(slopes, old["mean"], self.memory)
        downhill = mean / torch.pow(self.memory, visits).sub_(1)  # the mean starts at 0: correct its bias, as Adam does
        new = {"mean": mean, "visits": visits}
        if self.scale_memory is not None:
            new["square"] = square = torch.lerp(square, old["square"], self.scale_memory)
            scale = (square / (1 - torch.pow(self.scale_memory, visits))).sqrt_()
            downhill = (downhill / scale).where(scale > 0, 0)
        for name, values in (new | {"direction": downhill}).items():
            self.state[name][where] = values.where(known, old[name])

    def learn_polls(self, coordinates: Tensor, slopes: Tensor) -> None:
        """Take in slopes (K,) of polls, in their order: a coordinate stands twice if both sides were polled."""
        second = np.zeros(len(coordinates), dtype=bool)
        second[1:] = coordinates[1:] == coordinates[:-1]
        for side in map(torch.from_numpy, map(np.flatnonzero, (~second, second))):
            if len(side):
                its = slopes[side]
                self.learn(its, torch.ones_like(its, dtype=torch.bool), coordinates[side].to(self.direction.device))
