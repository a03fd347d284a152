"""What state tracking measures beside the metrics of every task: accuracy by position."""

from torch import Tensor

from data.sequences import IGNORE
from pattern_search_task import PatternSearchTask, Scores


class StateTrackingScores(Scores):
    """Adds `accuracy_at_<k>`: how often the k-th state (from 1) is right, for plots over depth."""

    def measure(self, logits: Tensor, y: Tensor) -> dict[str, Tensor]:
        right = logits.argmax(-1) == y
        step = (y != IGNORE).cumsum(1) * (y != IGNORE)  # (B, T): k at the k-th scored position, 0 where none is scored
        at = {f"accuracy_at_{k}": right[step == k] for k in range(1, int(step.max()) + 1)}
        return super().measure(logits, y) | at


class StateTrackingTask(PatternSearchTask):
    scores_class = StateTrackingScores
