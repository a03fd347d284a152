"""What text measures beside the metrics of every task; `exact_match` is of whole windows, and of no use here."""

import math

from torch import Tensor

from pattern_search_task import PatternSearchTask, Scores


class TextScores(Scores):
    """Adds `bits_per_character`: the loss in bits, as the literature of such models has it."""

    def compute(self) -> dict[str, Tensor]:
        scores = super().compute()
        return scores | {"bits_per_character": scores["loss"] / math.log(2)}


class TextTask(PatternSearchTask):
    scores_class = TextScores
