"""What SCAN measures beside the metrics of every task. `exact_match` is of all the actions with EOS."""

from torch import Tensor

from data.sequences import IGNORE
from pattern_search_task import PatternSearchTask, Scores


class ScanScores(Scores):
    """Adds `prefix_accuracy`: the share of an output before its first error, which is what a decoder gets right.

    Token accuracy misleads here: the gold actions so far give most of the next ones away.
    """

    def measure(self, logits: Tensor, y: Tensor) -> dict[str, Tensor]:
        scored = y != IGNORE
        right = (logits.argmax(-1) == y) | ~scored
        prefix = (right.cumprod(1).bool() & scored).sum(1) / scored.sum(1)  # (B,)
        return super().measure(logits, y) | {"prefix_accuracy": prefix}


class ScanTask(PatternSearchTask):
    scores_class = ScanScores
