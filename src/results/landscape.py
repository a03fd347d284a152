"""Draw the loss around the way that weights took, in the plane that holds most of it.

python src/report.py landscape experiment=z5                                       the search of that command
python src/report.py landscape experiment=z5 --optimizers adam,pattern_search_nodes    a panel for each, from one start

Each panel shows the validation loss on the plane through the last weights along the two principal components of all
weights on the way (Li et al. 2018, https://arxiv.org/abs/1712.09913, section 7), and the way itself.
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from data.sequences import SequenceDataModule
from pattern_search_task import PatternSearchTask
from results.figures import save
from results.watched import train_watched
from run.quiet import silence_libraries
from search.closure import forward_only

SEQUENCES = 200  # of the validation set, at the most, that the loss is of
POINTS = 33  # of the plane, along each axis
WAY = 256  # weights on the way that are kept, at the most
MARGIN = 0.25  # of the plane beyond the way, in lengths of the way


class Way(L.Callback):
    """Keeps the weights (P,) of a run from its start to its end, every step or fewer, evenly spread."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.every = 1

    def on_train_start(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self._keep(task)

    def on_train_batch_end(self, trainer: L.Trainer, task: L.LightningModule, *_: Any) -> None:
        if trainer.global_step % self.every == 0:
            self._keep(task)
        if len(self.weights) > WAY:
            self.weights, self.every = self.weights[::2], 2 * self.every

    def on_train_end(self, trainer: L.Trainer, task: L.LightningModule) -> None:
        self._keep(task)

    def _keep(self, task: L.LightningModule) -> None:
        assert isinstance(task, PatternSearchTask)
        self.weights.append(parameters_to_vector(task.parameters_trained).detach().clone())


def plane_of(way: Tensor) -> tuple[Tensor, Tensor, float]:
    """A way (S, P) -> two orthonormal axes (2, P), the way in them (S, 2) from its end, and the share they hold.

    The share is of the squared distances from the end.
    """
    from_end = (way - way[-1]).double()
    _, sizes, axes = torch.linalg.svd(from_end, full_matrices=False)
    axes = axes[:2]
    share = float(sizes[:2].square().sum() / sizes.square().sum().clamp_min(1e-300))
    return axes, from_end @ axes.T, share


@torch.no_grad()
def losses_on(
    task: PatternSearchTask, data: SequenceDataModule, end: Tensor, axes: Tensor, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Validation losses (Y, X) of the weights end + x axes[0] + y axes[1]."""
    split = data.splits["val"]
    batch = {"x": split.x[:SEQUENCES], "y": split.y[:SEQUENCES]}
    losses = np.empty((len(y), len(x)))
    with forward_only(task.model):
        for row, b in enumerate(y):
            for column, a in enumerate(x):
                vector_to_parameters((end + a * axes[0] + b * axes[1]).to(end.dtype), task.parameters_trained)
                losses[row, column] = float(task.loss(batch))
    vector_to_parameters(end, task.parameters_trained)
    return losses


def draw_landscape(panel: Axes, task: PatternSearchTask, data: SequenceDataModule, way: Way, title: str) -> None:
    """One panel: the loss on the plane as colours, on a logarithmic scale, and the way in it."""
    weights = torch.stack(way.weights)
    axes, places, share = plane_of(weights)
    low, high = places.min(0).values, places.max(0).values
    margin = MARGIN * max(float((high - low).max()), 1e-6)
    x, y = (np.linspace(float(low[i]) - margin, float(high[i]) + margin, POINTS) for i in range(2))
    losses = losses_on(task, data, weights[-1], axes, x, y)
    colors = panel.contourf(x, y, np.log10(losses.clip(1e-6)), levels=24, cmap="viridis")
    panel.figure.colorbar(colors, ax=panel, label="validation loss, log10 of nats per token")
    panel.plot(*places.T.numpy(), color="white", linewidth=1, marker=".", markersize=3)
    panel.plot(*places[0].numpy(), "o", color="white", markersize=8, label="start")
    panel.plot(*places[-1].numpy(), "*", color="red", markersize=12, label="end")
    panel.legend(loc="best")
    panel.set(xlabel="first component, units of the weights", ylabel="second", title=f"{title}\n{share:.0%} of the way")


def main(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("overrides", nargs="*", help="as those of src/train.py")
    parser.add_argument("--optimizers", default="", metavar="A,B", help="a panel for each of these options")
    parser.add_argument("--output", type=Path, default=Path("landscape.png"), help="the picture to write")
    args = parser.parse_intermixed_args(arguments)
    silence_libraries()
    names = [f"optimizer={name}" for name in args.optimizers.split(",") if name] or [""]
    figure = Figure(figsize=(6.5 * len(names), 5.5), layout="constrained")
    figure.suptitle(" ".join(["python src/train.py", *args.overrides]))
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        task, data, way = train_watched([*args.overrides, *filter(None, [name])], lambda *_: Way())
        draw_landscape(panel, task, data, way, name.removeprefix("optimizer="))
    save(figure, args.output, f"{len(names)} way(s)")
