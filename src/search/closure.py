"""What an optimizer may ask: the loss here, and the losses of many candidates.

A *coordinate* is one flat number per weight, counted over the parameters in the order in which the
optimizer holds them. A closure is any callable that returns the loss at the current weights. It may
also answer for many candidates in one call, without the optimizer moving a weight:

    poll(coordinates (K,), steps (K,)) -> losses (K,)
        candidate k moves one coordinate: weight[coordinates[k]] + steps[k]
    trial(changes (n,), scales (S,)) -> losses (S,)
        candidate s moves all n coordinates at once: weights + scales[s] * changes
    perturbed(count, changes) -> losses (count,)
        candidate k moves all n coordinates in a way of its own: weights + changes(k, k + 1)[0]. The changes of all
        would fill the memory, so `changes(first, last)` makes those of some, (last - first, n), when they are needed.
        It is called from several threads, maybe twice for the same, and has to give the same each time

One more question is answered for models whose tokens have losses of their own (`polls/nodes.py`):

    nodes(nodes (K,), steps (K,), signs) -> slopes (n,), known (n,)
        samples of the slopes of all weights of K of the model's `n_nodes` nodes, for K evaluations; and which those are
    drawn(rows, generator) -> what answers about so many rows of the batch, for slopes that are its own in the mean

Which candidates there are is decided on the host: coordinates, nodes, scales and losses are tensors of the CPU.
Changes and slopes of all coordinates are on the device of the weights.

`OneByOne` answers the first three for any closure by moving the weights and putting them back: the readable
reference that every faster answer is checked against.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from search.coordinates import Coordinates

Changes = Callable[[int, int], Tensor]  # first, last -> changes (last - first, n) of these candidates


def part_of(changes: Changes, start: int) -> Changes:
    """The changes of the candidates from number `start` on, counted from 0."""
    return lambda first, last: changes(start + first, start + last)


@runtime_checkable
class Candidates(Protocol):
    """What answers for many candidates. `block` is how many it likes to get in a call."""

    @property
    def block(self) -> int: ...

    def poll(self, coordinates: Tensor, steps: Tensor) -> Tensor: ...

    def trial(self, changes: Tensor, scales: Tensor) -> Tensor: ...

    def perturbed(self, count: int, changes: Changes) -> Tensor: ...


@runtime_checkable
class AnswersNodes(Candidates, Protocol):
    """What answers for nodes too: there are `n_nodes`; the weights of node u are of parameter `node_parameter[u]`."""

    @property
    def n_nodes(self) -> int: ...

    @property
    def node_parameter(self) -> Tensor: ...

    def nodes(self, nodes: Tensor, steps: Tensor, signs: torch.Generator) -> tuple[Tensor, Tensor]: ...

    def drawn(self, rows: int, generator: torch.Generator) -> "AnswersNodes": ...


class OneByOne:
    """Answers `poll`, `trial` and `perturbed` for any `closure()`, one candidate after the other.

    The weights are put back by copy, bit for bit: adding a step and subtracting it again is not
    exact. Losses come back in float64, which holds those of every narrower type exactly.

    Args:
        closure: returns the loss at the current weights.
        coordinates: the weights that the candidates move.
    """

    block = 1  # asking for more in a call would only delay an acceptance

    def __init__(self, closure: Callable[[], Tensor], coordinates: Coordinates):
        self.closure, self.coordinates = closure, coordinates

    @torch.no_grad()
    def poll(self, coordinates: Tensor, steps: Tensor) -> Tensor:
        losses = []
        for coordinate, step in zip(coordinates.tolist(), steps.tolist(), strict=True):
            p, index, weight = self.coordinates.move_one(coordinate, step)
            try:
                losses.append(float(self.closure()))
            finally:
                p[index] = weight
        return torch.tensor(losses, dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def trial(self, changes: Tensor, scales: Tensor) -> Tensor:
        losses = []
        saved = [(p, p.clone()) for p in self.coordinates.parameters]
        for scale in scales.tolist():
            try:
                self.coordinates.move(scale * changes)
                losses.append(float(self.closure()))
            finally:
                for p, weights in saved:
                    p.copy_(weights)
        return torch.tensor(losses, dtype=torch.float64, device="cpu")

    def perturbed(self, count: int, changes: Changes) -> Tensor:
        one = torch.ones(1, device="cpu")
        return torch.cat([self.trial(changes(k, k + 1)[0], one) for k in range(count)])


@contextmanager
def forward_only(module: nn.Module) -> Iterator[None]:
    """Evaluate `module` as a search must: no gradients, eval mode (dropout off), modes put back."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True
