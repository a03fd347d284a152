"""The directions of a pattern search, + and - each coordinate, and the order in which a pass takes them."""

import torch
from torch import Tensor

from slopes import SlopeMemory


class Directions:
    """Signed coordinates in a random order, anew in every pass.

    Direction d of a pass is a sign of the coordinate order[d // 2], or of order[d] if each coordinate is polled on one
    side only. Order and first signs are drawn from the seed and the number of the pass, so that all a search has to
    save is that number and how far it came.

    Args:
        n_coordinates: weights that are searched.
        one_sided: one direction a coordinate, on the side that its remembered slope calls downhill.
        seed: of the order and of the first signs.
    """

    def __init__(self, n_coordinates: int, one_sided: bool, seed: int):
        self.n_coordinates, self.one_sided, self.seed = n_coordinates, one_sided, seed
        self._drawn_for: int | None = None  # the pass that the order at hand is of

    def __len__(self) -> int:
        return self.n_coordinates * (1 if self.one_sided else 2)

    def take(self, number: int, start: int, end: int, slopes: SlopeMemory | None) -> tuple[Tensor, Tensor]:
        """Directions start .. end of a pass, (end - start,) each: coordinates, and signs 1. or -1.

        Args:
            number: of the pass.
            slopes: what is remembered; only one-sided directions ask it.
        """
        self._draw(number)
        direction = torch.arange(start, end)
        if self.one_sided:
            coordinates = self._order[direction]
            uphill = slopes.uphill(coordinates)
            negative = torch.where(uphill == 0, self._first_negative[coordinates], uphill > 0)
        else:
            coordinates = self._order[direction // 2]
            negative = self._first_negative[coordinates] ^ (direction % 2 == 1)
        return coordinates, 1.0 - 2.0 * negative.double()

    def _draw(self, number: int) -> None:
        if self._drawn_for != number:
            generator = seeded(self.seed, number)
            self._order = torch.randperm(self.n_coordinates, generator=generator)
            self._first_negative = torch.randint(2, (self.n_coordinates,), generator=generator, dtype=torch.bool)
            self._drawn_for = number


def seeded(seed: int, number: int) -> torch.Generator:
    """A generator of its own for each number of each seed."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)
