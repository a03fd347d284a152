"""What state tracking measures beside the metrics of every task: accuracy by position."""

import torch
from torch import Tensor

from data.sequences import IGNORE
from pattern_search_task import PatternSearchTask, Scores


class StateTrackingScores(Scores):
    """Adds `accuracy_at_<k>`: how often the k-th state (from 1) is right, for plots over depth."""

    def measure(self, logits: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        scored = y != IGNORE
        right = (logits.argmax(-1) == y).float()
        step = scored.cumsum(1)  # (B, T): 1 at the first scored position
        by_position = {}
        for k in range(1, int(step.max()) + 1):
            at_k = right[scored & (step == k)]
            by_position[f"accuracy_at_{k}"] = (at_k, torch.ones(len(at_k)))
        return super().measure(logits, y) | by_position


class StateTrackingTask(PatternSearchTask):
    scores_class = StateTrackingScores
