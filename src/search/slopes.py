"""Remembered slopes: what the polls so far say about the direction downhill.

A poll of coordinate i at the step r gives the slope (loss there - loss here) / r, a simplex gradient
of one coordinate (Custodio and Vicente 2007). The memory keeps, for every coordinate, running means of
its slopes and of their squares, and what direction they spoke for when it was polled last. That
direction fades with its age: it was measured at another incumbent, on another batch.
"""

import math

import torch
from torch import Tensor


class SlopeMemory:
    """Slopes of n coordinates.

    Args:
        state: the tensors of the memory, (n,) each; an empty dict is filled. It is changed in place,
            so whoever owns it can save it.
        n: coordinates.
        dtype: of the tensors.
        memory: decay in [0, 1) of the running mean of a coordinate's slopes, a visit; 0 keeps the last one.
        scale_memory: decay in [0, 1) of the running mean of their squares, a visit; None: slopes are not scaled.
        fade: steps after which a direction has faded to 1/e; None: it never fades.
    """

    def __init__(
        self,
        state: dict[str, Tensor],
        n: int,
        dtype: torch.dtype,
        memory: float,
        scale_memory: float | None,
        fade: float | None,
    ):
        self.state, self.memory, self.scale_memory, self.fade = state, memory, scale_memory, fade
        for name in ("mean", "square", "visits", "direction"):
            state.setdefault(name, torch.zeros(n, dtype=dtype))

    @property
    def direction(self) -> Tensor:
        """(n,) downhill, as far as is known; 0 where a coordinate was never polled."""
        return self.state["direction"]

    def uphill(self, coordinates: Tensor) -> Tensor:
        """(K,) signs of the remembered slopes, 0 where there is none."""
        return self.state["mean"][coordinates].sign()

    def age(self) -> None:
        """Let a step pass."""
        if self.fade is not None:
            self.state["direction"] *= math.exp(-1 / self.fade)

    def learn(self, coordinates: Tensor, slopes: Tensor) -> None:
        """Take in slopes (K,) measured at distinct coordinates (K,); one too large to be squared counts as none."""
        slopes = slopes.to(self.direction)
        usable = (slopes**2).isfinite()
        coordinates, slopes = coordinates[usable], slopes[usable]
        visits = self.state["visits"][coordinates] + 1
        mean = self._average("mean", coordinates, slopes, self.memory)
        downhill = -mean / (1 - self.memory**visits)  # the mean starts at 0: correct its bias, as Adam does
        if self.scale_memory is not None:
            square = self._average("square", coordinates, slopes**2, self.scale_memory)
            scale = (square / (1 - self.scale_memory**visits)).sqrt()
            downhill = torch.where(scale > 0, downhill / scale, 0)
        self.state["visits"][coordinates] = visits
        self.state["direction"][coordinates] = downhill

    def learn_polls(self, coordinates: Tensor, slopes: Tensor) -> None:
        """Take in slopes (K,) of polls, in their order: a coordinate stands twice if both sides were polled."""
        second = torch.zeros(len(coordinates), dtype=torch.bool)
        second[1:] = coordinates[1:] == coordinates[:-1]
        for side in (~second, second):
            self.learn(coordinates[side], slopes[side])

    def _average(self, name: str, coordinates: Tensor, values: Tensor, decay: float) -> Tensor:
        mean = decay * self.state[name][coordinates] + (1 - decay) * values
        self.state[name][coordinates] = mean
        return mean
