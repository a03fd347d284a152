"""The weights that are judged: a running average of those that the steps leave behind.

Steps decide on minibatches, so weights go back and forth around what they tend to. Their average generalises better
(Polyak and Juditsky 1992; Izmailov et al. 2018). Steps themselves never see it.
"""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging


class WeightAverage(EMAWeightAveraging):
    """Validates, keeps and tests an exponential average of the weights; the steps go on from the weights themselves.

    Args:
        decay: of the average, per step: it looks back about 1 / (1 - decay) steps.
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must lie in [0, 1); 0 takes the weights of the last step")
        super().__init__(decay=decay)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore average and weights in a run that goes on; a test has been given the average already."""
        if trainer.state.fn == "fit":
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
