"""Losses of many candidates in one pass, for any module: the closure behind most models.

Candidates that move a weight of the same tensor go through one vectorised forward in which only that
tensor is stacked. What lies before it is computed once for all of them, and every other weight is shared.

    polls = GenericPolls(module, Coordinates(module.parameters()), loss)
    closure = polls.on(batch)  # cheap: once per step
    closure(), closure.poll(coordinates, steps), closure.trial(changes, scales)
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from polls.shared import WILD, Incumbent, check_block, check_trial, checked, wild
from polls.sizes import sizes_on
from search.closure import Changes, OneByOne, forward_only
from search.coordinates import Coordinates
from search.losses import within_rounding

FEW = 4  # fewer candidates of a tensor are not worth vmap's own cost


def settled(losses: Tensor, changes: Changes, incumbent: Tensor, generic: "GenericClosure") -> Tensor:
    """Losses (K,) of candidates where those that are not finite, or that rounding may decide, are evaluated plainly.

    A candidate whose plain loss is that of the incumbent has exactly the incumbent's loss.
    """
    rounded = incumbent.to(generic.coordinates.parameters[0].dtype)  # rounding is that of the weights' type
    unsettled = (~losses.isfinite() | within_rounding(losses, rounded)).nonzero().flatten().tolist()
    for k in unsettled:
        losses[k] = generic.plain_moved(changes(k, k + 1)[0])
    return torch.where(losses == generic.plain(), incumbent, losses) if unsettled else losses


class GenericPolls:
    """Evaluates candidates of any `nn.Module`, exact up to rounding: `on(batch)` is a closure.

    Args:
        module: any module.
        coordinates: numbers the weights that may move, all of them parameters of `module`.
        loss: (outputs of the module, batch) -> scalar loss.
        inputs: batch -> positional arguments of the module.

    Raises:
        ValueError: a tensor that is not a parameter of the module or not of a floating type.
    """

    def __init__(
        self,
        module: nn.Module,
        coordinates: Coordinates,
        loss: Callable[[Any, Any], Tensor],
        inputs: Callable[[Any], tuple] = lambda batch: (batch["x"],),
    ):
        self.module, self.coordinates, self.loss, self.inputs = module, coordinates, loss, inputs
        self.names = {id(p): name for name, p in module.named_parameters()}
        for i, p in enumerate(coordinates.parameters):
            if id(p) not in self.names:
                raise ValueError(
                    f"parameter {i} of shape {tuple(p.shape)} is not a parameter of {type(module).__name__}: "
                    "moving it could not change the loss; give the optimizer parameters of the module it evaluates"
                )
            if not p.is_floating_point():
                raise ValueError(f"{self.names[id(p)]} is of type {p.dtype}; only floating types can be searched")
        self.sizes = sizes_on(coordinates.parameters[0].device)
        self.refusal: str | None = None  # why vmap refused this module, for the closures of all batches

    def on(self, batch: Any) -> "GenericClosure":
        """The closure that answers about this batch."""
        return GenericClosure(self, batch)


class GenericClosure:
    """Answers `poll`, `trial` and `perturbed` (see `search/closure.py`) about one batch.

    The module is evaluated in eval mode, without gradients, and left in the mode it was in: dropout is
    off and BatchNorm uses its running statistics. A tensor used in several places (tied weights) moves
    in all of them. A candidate that ties with the incumbent within rounding is evaluated once more by
    the plain forward, so that a dead weight is exactly as good as the incumbent and never accepted;
    so is one whose loss is not finite.
    What cannot be vectorised is evaluated one by one; one warning names the reason.

    Raises:
        ValueError: `poll` and `trial` raise it for an empty block, for lengths that differ and for a forward
            that draws random numbers in eval mode.
        IndexError: a coordinate out of range.
    """

    def __init__(self, polls: GenericPolls, batch: Any):
        self.polls, self.batch, self.incumbent = polls, batch, Incumbent()
        self.module, self.coordinates = polls.module, polls.coordinates
        self.inputs = polls.inputs(batch)
        x = self.inputs[0]
        # tokens are numbers; vectors have their features, and images their channels, in the second axis
        self.tokens = x[:, :1].numel() if x.is_floating_point() and x.ndim > 1 else x.numel()

    @property
    def block(self) -> int:
        """Candidates per call that keep the chunks of most tensors full."""
        return 1 if self.polls.refusal else self.polls.sizes.candidates_per_call(self.tokens)

    def __call__(self) -> Tensor:
        """The loss at the incumbent; see `Incumbent`."""
        return self.incumbent(self.module.parameters(), self.plain)

    def plain(self) -> Tensor:
        """The loss at the current weights by the plain forward, on the CPU."""
        with forward_only(self.module):
            return self._loss({}).cpu()

    def poll(self, coordinates: Tensor, steps: Tensor) -> Tensor:
        """Losses (K,) of the candidates weight[coordinates[k]] + steps[k]; coordinates and steps are (K,)."""
        check_block(self.coordinates, coordinates, steps)
        if self.polls.refusal:
            return OneByOne(self.plain, self.coordinates).poll(coordinates, steps)
        incumbent, plain = self(), self.plain()
        if plain.isfinite() and not within_rounding(incumbent, plain):
            raise ValueError(
                f"two evaluations of {type(self.module).__name__} at the same weights differ ({incumbent}, {plain}): a "
                "search needs a forward that is deterministic in eval mode; draw random numbers only if self.training"
            )
        losses, sizes = torch.empty(len(coordinates), dtype=torch.float64, device="cpu"), self.polls.sizes
        with forward_only(self.module):
            for p, index, rows in self.coordinates.touched(coordinates):
                size = max(1, min(sizes.vmapped // max(1, self.tokens), sizes.vmapped_weights // p.numel()))
                for some in torch.arange(len(rows), device=rows.device).split(size):
                    if len(some) < FEW:
                        losses[rows[some]] = self.plain_poll(coordinates[rows[some]], steps[rows[some]])
                        continue
                    stack = p.expand(len(some), *p.shape).clone()  # (k, *shape of p)
                    place = (torch.arange(len(some), device=p.device), *(i[some] for i in index))
                    stack[place] += steps[rows[some]].to(p)
                    found = self._losses({self.polls.names[id(p)]: stack})
                    if found is None:
                        return self.poll(coordinates, steps)
                    losses[rows[some]] = found
        beyond = (~losses.isfinite() | (steps.abs() > WILD)).nonzero().flatten()
        losses[beyond] = self.plain_poll(coordinates[beyond], steps[beyond])
        tie = within_rounding(losses, plain).nonzero().flatten()
        # weights that change nothing share one value, bit by bit: one of them is evaluated for all
        values, which = losses[tie].unique(return_inverse=True)
        first = torch.empty_like(values, dtype=torch.long)
        example = tie[first.scatter_(0, which, torch.arange(len(tie), device=tie.device))]
        losses[tie] = self.plain_poll(coordinates[example], steps[example])[which]
        losses = torch.where(losses == plain, incumbent, losses)
        self.incumbent.polled = losses
        return losses

    def plain_poll(self, coordinates: Tensor, steps: Tensor) -> Tensor:
        """The same losses (K,) by one plain forward for each candidate; no weight is moved."""
        losses = []
        with forward_only(self.module):
            for coordinate, step in zip(coordinates.tolist(), steps.tolist(), strict=True):
                owner, index = self.coordinates.locate(coordinate)
                p = self.coordinates.parameters[owner]
                moved = p.clone()
                moved[index] += step
                losses.append(float(self._loss({self.polls.names[id(p)]: moved})))
        return torch.tensor(losses, dtype=torch.float64, device="cpu")

    def trial(self, changes: Tensor, scales: Tensor) -> Tensor:
        """Losses (S,) of the weights with scales[s] * changes added; changes (n,), of all coordinates, scales (S,)."""
        check_trial(self.coordinates, changes, scales)
        with forward_only(self.module):  # a few: not worth vmap's own cost
            losses = [float(self._loss(self._moved(scale * changes))) for scale in scales.tolist()]
        return torch.tensor(losses, dtype=torch.float64, device="cpu")

    def perturbed(self, count: int, changes: Changes) -> Tensor:
        """Losses (count,) of the weights with the changes (last - first, n) of each candidate added."""
        changes = checked(changes, count, len(self.coordinates))
        sizes = self.polls.sizes
        size = max(1, min(sizes.vmapped // max(1, self.tokens), sizes.vmapped_weights // len(self.coordinates)))
        losses = torch.full((count,), torch.nan, dtype=torch.float64, device="cpu")
        with forward_only(self.module):
            for first in range(0, count, size) if min(size, count) >= FEW and not self.polls.refusal else ():
                some = changes(first, min(first + size, count))
                found = self._losses(self._moved(some))
                if found is None:
                    break
                losses[first : first + size] = found.where(~wild(some).cpu(), torch.nan)
        return settled(losses, changes, self(), self)

    def plain_moved(self, changes: Tensor) -> Tensor:
        """The loss of the weights with changes (n,) of all coordinates added, by the plain forward, on the CPU."""
        with forward_only(self.module):
            return self._loss(self._moved(changes)).cpu()

    def _moved(self, changes: Tensor) -> dict[str, Tensor]:
        """The searched tensors with changes (..., n) of all coordinates added, by name, (..., *shape)."""
        return {self.polls.names[id(p)]: p + part.to(p) for p, part in self.coordinates.with_parts(changes)}

    def _loss(self, tensors: dict[str, Tensor]) -> Tensor:
        """The loss with some of the module's tensors replaced by name."""
        return self.polls.loss(functional_call(self.module, tensors, self.inputs), self.batch)

    def _losses(self, stacked: dict[str, Tensor]) -> Tensor | None:
        """Losses (k,) in float64, on the CPU, for tensors (k, *shape); None if the module cannot be vectorised."""
        try:
            with plain_attention():
                return vmap(self._loss)(stacked).double().cpu()
        except Exception as reason:  # vmap raises what the operator raises that it does not know
            self._loss({})  # an error of the module itself is no reason to go on one by one
            self.polls.refusal = str(reason).strip().split("\n")[0] or type(reason).__name__
            warnings.warn(
                f"{type(self.module).__name__} cannot be vectorised, so candidates are evaluated one by one, "
                f"which is slower: {self.polls.refusal}",
                stacklevel=4,
            )
            return None


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as single operations: vmap would run the fused ones once for each candidate."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
