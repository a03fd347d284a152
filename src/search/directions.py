"""The directions of a pattern search, + and - each coordinate, and the order in which a pass takes them."""

from collections.abc import Sequence

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
        self.sizes, self.one_sided, self.seed = torch.tensor(sizes), one_sided, seed
        self.shares = torch.tensor(shares, dtype=torch.float64)  # of the polls, of each group
        self.starts = self.sizes.cumsum(0) - self.sizes
        self._drawn: dict[int, tuple[int, Tensor, Tensor]] = {}  # by group: the number, the order, the first signs

    def __len__(self) -> int:
        return int(self.sizes.sum()) * (1 if self.one_sided else 2)

    def take(self, start: int, end: int, slopes: SlopeMemory | None) -> tuple[Tensor, Tensor]:
        """Directions start .. end, counted over all passes, (end - start,) each: coordinates, and signs 1. or -1.

        Args:
            slopes: what is remembered, which one-sided directions ask.
        """
        direction = torch.arange(start, end)
        turn = direction if self.one_sided else direction // 2
        groups, items = self._merged(int(turn[0]), int(turn[-1]) + 1)
        group, item = groups[turn - turn[0]], items[turn - turn[0]]
        coordinates, negative = torch.empty_like(turn), torch.empty(len(turn), dtype=torch.bool)
        for g in group.unique().tolist():
            its = group == g
            number, place = item[its] // self.sizes[g], item[its] % self.sizes[g]
            # several groups keep their orders: new ones might bring a coordinate twice within a step
            order, first_negative = self._draw(g, 1 + (int(number[0]) if len(self.sizes) == 1 else g))
            coordinates[its], negative[its] = self.starts[g] + order[place], first_negative[order[place]]
        if self.one_sided and slopes is not None:
            uphill = slopes.uphill(coordinates)
            negative = torch.where(uphill == 0, negative, uphill > 0)
        else:
            negative ^= direction % 2 == 1
        return coordinates, 1.0 - 2.0 * negative.double()

    def _merged(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Turns start .. end: the group of each, and how many turns that group had before.

        Turn k of a group is due at (k + 1/2) / share; turns are taken as they fall due.
        """
        before = (start * self.shares).floor().long().sub(len(self.shares)).clamp(min=0)  # due before `start` for sure
        n = end - int(before.sum())
        k = before[:, None] + torch.arange(n)
        due = ((k + 0.5) / self.shares[:, None]).flatten().argsort(stable=True)[n - (end - start) : n]
        return due // n, k.flatten()[due]

    def _draw(self, group: int, number: int) -> tuple[Tensor, Tensor]:
        if self._drawn.get(group, (0,))[0] != number:
            generator, size = seeded(self.seed, number), int(self.sizes[group])
            order = torch.randperm(size, generator=generator)
            self._drawn[group] = number, order, torch.randint(2, (size,), generator=generator, dtype=torch.bool)
        return self._drawn[group][1:]
