"""Signs that training stagnates, each with the setting to change: pure functions of the recent metrics.

`run.progress.SearchProgress` asks after each validation. The rules are conservative: a run that gets on gets no hint.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any

WINDOW = 100  # steps that the rules look back on
PATIENCE = 100_000  # evaluations that a search may spend at chance
AT_CHANCE = 0.97  # a training loss above this share of chance has learned nothing
LEARNED = 0.1  # below this share of chance the task is almost solved, and fewer moves are accepted


of_window: Callable[[], deque] = partial(deque, maxlen=WINDOW)


@dataclass
class Recent:
    """What the rules look at. What goes by step holds the last WINDOW steps of a search, or of gradients."""

    chance_loss: float  # nats
    evaluations: int = 0
    train_losses: deque[float] = field(default_factory=of_window)  # by step, nats
    val_losses: list[float] = field(default_factory=list)  # by validation, all of them, nats
    accepted: deque[bool] = field(default_factory=of_window)  # by step of a search: did it move?
    search_accepted: deque[bool] = field(default_factory=of_window)  # by step, if the search has a search step

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain values, for a checkpoint."""
        return {name: value if isinstance(value, int | float) else [*value] for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, deque(value, WINDOW) if isinstance(getattr(self, name), deque) else value)


def hints(recent: Recent) -> Iterator[tuple[str, str]]:
    """The name of each rule that applies, and what to tell the user."""
    if len(recent.train_losses) < WINDOW:
        return
    loss = fmean(recent.train_losses)
    unsolved = loss > LEARNED * recent.chance_loss
    if unsolved and recent.search_accepted and (share := fmean(recent.search_accepted)) < 0.2:
        yield (
            "search step",
            f"the search step won {share:.0%} of the last {WINDOW} steps; try smaller optimizer.step_lengths, or a "
            "larger datamodule.batch_size, whose losses are less noisy",
        )
    elif unsolved and recent.accepted and (share := fmean(recent.accepted)) < 0.05:
        yield (
            "poll",
            f"{share:.0%} of the last {WINDOW} steps moved; try a smaller task.pattern_search_radius or a larger "
            "optimizer.polls_per_step",
        )
    if recent.accepted and recent.evaluations >= PATIENCE and loss > AT_CHANCE * recent.chance_loss:
        yield (
            "chance",
            f"the training loss {loss:.3f} is still at chance ({recent.chance_loss:.3f}) after "
            f"{recent.evaluations:,} evaluations; try another task.pattern_search_radius, model.embedding_std or seed",
        )
    best = min(recent.val_losses, default=0.0)
    if loss < 0.5 * best and min(recent.val_losses[-3:]) > 1.2 * best:  # for three validations
        yield (
            "overfitting",
            f"the training loss is {loss:.3f}, but validation has risen from {best:.3f} to "
            f"{recent.val_losses[-1]:.3f}: it learns by heart; try a larger datamodule.n_samples or batch_size",
        )
