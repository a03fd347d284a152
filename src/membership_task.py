"""What membership measures beside the metrics of every task: accuracy by label, balanced accuracy."""

import torch
from torch import Tensor

from data.sequences import IGNORE
from membership_data import CLASSES
from pattern_search_task import PatternSearchTask, Scores


class MembershipScores(Scores):
    """Adds `accuracy_no`, `accuracy_yes` and their mean, `balanced_accuracy`: .5 for a constant answer."""

    def measure(self, logits: Tensor, y: Tensor) -> dict[str, Tensor]:
        scored = y != IGNORE  # one position a row
        labels, right = y[scored], (logits.argmax(-1) == y)[scored]  # (B,), (B,)
        return super().measure(logits, y) | {f"accuracy_{name}": right[labels == c] for c, name in enumerate(CLASSES)}

    def compute(self) -> dict[str, Tensor]:
        scores = super().compute()
        recalls = [scores[f"accuracy_{name}"] for name in CLASSES if f"accuracy_{name}" in scores]
        return scores | {"balanced_accuracy": torch.stack(recalls).mean()}


class MembershipTask(PatternSearchTask):
    scores_class = MembershipScores
