"""The directions of a pattern search, + and - each coordinate, and the order in which a pass takes them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from search.base import seeded
from search.slopes import SlopeMemory


class Directions:
    """Signed coordinates in a random order: of all at once, or of groups that get shares of the polls.

    Direction d is a sign of the coordinate order[d // 2], or of order[d] if each coordinate is polled on one side only.
    Orders and first signs are drawn from the seed, so that all a search has to save is how far it came. A single group
    gets a new order in every pass. With several, each has an order of its own and goes through it again and again,
    at the pace of its share.

    Args:
        sizes: weights of each group that are searched; coordinates are numbered group after group.
        last_share: of the polls, of the last group; the others share the rest by their sizes. None, or a single group:
            all coordinates in one order.
        one_sided: one direction a coordinate, on the side that its remembered slope calls downhill.
        seed: of the orders and of the first signs.
    """

    def __init__(self, sizes: Sequence[int], last_share: float | None, one_sided: bool, seed: int):
        if last_share is None or len(sizes) == 1:
            sizes, shares = [sum(sizes)], [1.0]
        else:
            shares = [(1 - last_share) * size / sum(sizes[:-1]) for size in sizes[:-1]] + [last_share]
        self.sizes, self.one_sided, self.seed = np.array(sizes), one_sided, seed
        self.shares = np.array(shares)  # of the polls, of each group
        self.starts = self.sizes.cumsum() - self.sizes
        self._drawn: dict[int, tuple[int, np.ndarray, np.ndarray]] = {}  # by group: number, order, first signs

    def __len__(self) -> int:
        return int(self.sizes.sum()) * (1 if self.one_sided else 2)

    def take(self, start: int, end: int, slopes: SlopeMemory | None) -> tuple[Tensor, Tensor]:
        """Directions start .. end, counted over all passes, (end - start,) each: coordinates, and signs 1. or -1.

        Args:
            slopes: what is remembered, which one-sided directions ask.
        """
        direction = np.arange(start, end)
        turn = direction if self.one_sided else direction // 2
        groups, items = self._merged(int(turn[0]), int(turn[-1]) + 1)
        group, item = groups[turn - turn[0]], items[turn - turn[0]]
        coordinates, negative = np.empty_like(turn), np.empty(len(turn), dtype=bool)
        for g in range(len(self.sizes)):
            its = np.flatnonzero(group == g)
            if len(its):
                number, place = np.divmod(item[its], self.sizes[g])
                # several groups keep their orders: new ones might bring a coordinate twice within a step
                order, first_negative = self._draw(g, 1 + (int(number[0]) if len(self.sizes) == 1 else g))
                coordinates[its], negative[its] = self.starts[g] + order[place], first_negative[order[place]]
        chosen = torch.from_numpy(coordinates)
        if self.one_sided and slopes is not None:
            uphill = slopes.uphill(chosen).numpy()
            negative = np.where(uphill == 0, negative, uphill > 0)
        else:
            negative ^= direction % 2 == 1
        return chosen, torch.from_numpy(np.where(negative, -1.0, 1.0))

    def _merged(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Turns start .. end: the group of each, and how many turns that group had before.

        Turn k of a group is due at (k + 1/2) / share; turns are taken as they fall due.
        """
        before = np.floor(start * self.shares).astype(int)  # due before `start` for sure, but for rounding
        before = np.maximum(before - len(self.shares), 0)
        n = end - int(before.sum())
        k = before[:, None] + np.arange(n)
        due = ((k + 0.5) / self.shares[:, None]).ravel().argsort(kind="stable")[n - (end - start) : n]
        return due // n, k.ravel()[due]

    def _draw(self, group: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        if self._drawn.get(group, (0,))[0] != number:
            generator, size = seeded(self.seed, number), int(self.sizes[group])
            order = torch.randperm(size, generator=generator, device="cpu")
            negative = torch.randint(2, (size,), generator=generator, dtype=torch.bool, device="cpu")
            self._drawn[group] = number, order.numpy(), negative.numpy()
        return self._drawn[group][1:]
