"""What a search does on its way: does a step help beyond its batch, how long do slopes stay true, where does it move?

python src/report.py diagnosis                                         the main command, looked at in every step
python src/report.py diagnosis experiment=z5 seed=1 --output z5.png    any options of src/train.py

Draws the figure and prints, for each part of the model, what the moves of its weights gained, and for polls of nodes
the cosine of the slopes that they sample with the gradient of the same batch.
Gradients appear here and nowhere else beside a search: its slopes and moves are compared with them.
"""

from argparse import ArgumentParser
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from config.refusal import ConfigError
from data.sequences import SequenceDataModule
from optimizer import PatternSearch
from pattern_search_task import PatternSearchTask, masked_loss, optimizer_class
from results.figures import save
from results.watched import train_watched
from run.quiet import silence_libraries
from search.base import seeded
from search.closure import AnswersNodes, forward_only

SEQUENCES = 1000  # of the training set, at the most, that stand for all of it
AGES = torch.tensor([1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 140, 200, 1000])  # steps since a poll: edges of bins


class Diagnosis(L.Callback):
    """Looks at every step of a pattern search from outside, with the loss and the gradient of the training set.

    Attributes:
        steps: a dict per step: batch_before, batch_after, train_before, train_after (losses, nats per scored token),
            search_accepted, and for each part of the model how far its moves lowered the training loss
            to first order (minus gradient times move).
        agreement: (bins of AGES, 4) sums over coordinates and steps: coordinates; those whose remembered direction has
            the sign of the downhill gradient; the share of the gradient (sum of sizes) they have; that of all.
    """

    def __init__(self, task: PatternSearchTask, datamodule: SequenceDataModule) -> None:
        if not issubclass(optimizer_class(task.make_optimizer)[0], PatternSearch):
            known = "optimizer=pattern_search or pattern_search_nodes"
            raise ConfigError([f"only a pattern search can be looked at: {known}"])
        self.task, self.split = task, datamodule.splits["train"]
        self.steps: list[dict[str, Any]] = []
        self.agreement = torch.zeros(len(AGES) - 1, 4, dtype=torch.float64)
        weights = sum(p.numel() for p in task.parameters_trained if p.requires_grad)
        self.visits, self.polled_at = torch.zeros(weights), torch.zeros(weights)

    @property
    def search(self) -> PatternSearch:
        """The search, once its training has begun."""
        assert isinstance(self.task.search, PatternSearch)
        return self.task.search

    @property
    def parts(self) -> dict[str, Tensor]:
        """The coordinates of each part of the model."""
        names = {id(p): name for name, p in self.task.model.named_parameters()}
        numbers, owned = torch.arange(len(self.search.coordinates)), defaultdict(list)
        parameters = self.search.coordinates.parameters
        for p, own in zip(parameters, numbers.split([p.numel() for p in parameters]), strict=True):
            owned[part_of(names[id(p)])].append(own)
        return {part: torch.cat(own) for part, own in owned.items()}

    def gradient(self, loss: Tensor) -> Tensor:
        """(P,) of the loss, by coordinate."""
        return parameters_to_vector(torch.autograd.grad(loss, self.search.coordinates.parameters))

    def on_train_batch_start(self, trainer: L.Trainer, task: L.LightningModule, batch: Any, batch_idx: int) -> None:
        with torch.enable_grad():  # the one gradient, and the search never sees it
            loss = self._training_loss()
            self._gradient = self.gradient(loss)
        self._weights_before, self._loss_before = self._weights(), float(loss.detach())
        if self.search.slopes is not None:
            self._compare_slopes(self.search.slopes.state, trainer.global_step, self._gradient)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        report, gains = self.search.report, -(self._weights() - self._weights_before) * self._gradient
        with torch.no_grad():
            loss = float(self._training_loss())
        seen: dict[str, Any] = dict(train_before=self._loss_before, train_after=loss)
        seen |= dict(batch_before=report.loss_before, batch_after=report.loss_after)
        seen |= dict(search_accepted=report.search_accepted)
        self.steps.append(seen | {part: float(gains[own].sum()) for part, own in self.parts.items()})

    def _weights(self) -> Tensor:
        return parameters_to_vector(self.search.coordinates.parameters).detach()

    def _training_loss(self) -> Tensor:
        return masked_loss(self.task.model(self.split.x[:SEQUENCES]), self.split.y[:SEQUENCES])

    def _compare_slopes(self, slopes: dict[str, Tensor], step: int, gradient: Tensor) -> None:
        self.polled_at[slopes["visits"] != self.visits] = step
        self.visits = slopes["visits"].clone()
        age = step + 1 - self.polled_at
        known = (slopes["direction"] != 0) & (gradient != 0) & (age < AGES[-1])  # where there is a downhill
        right = (slopes["direction"].sign() == -gradient.sign())[known].double()
        size = (gradient.abs() / gradient.abs().sum())[known].double()
        bins = torch.bucketize(age[known], AGES, right=True) - 1
        self.agreement.index_add_(0, bins, torch.stack([torch.ones_like(right), right, size * right, size], 1))


def part_of(parameter: str) -> str:
    """The part of the model that a parameter belongs to: block 0 attention, block 0 ff, ..., or its first name."""
    names = parameter.split(".")
    if names[0] == "blocks":
        return f"block {names[1]} {names[2].removesuffix('_norm')}"
    return "norm, head" if names[0] in ("norm", "head") else "embeddings" if "embedding" in names[0] else names[0]


def diagnose(overrides: list[str]) -> tuple[Diagnosis, pd.DataFrame]:
    """What was seen of the search of a command, and the table of the model's parts; ConfigError if it cannot run."""
    task, datamodule, diagnosis = train_watched(overrides, Diagnosis)
    gains = pd.DataFrame(diagnosis.steps)[[*diagnosis.parts]].sum()
    sizes = {part: len(own) for part, own in diagnosis.parts.items()}
    table = pd.DataFrame({"weights": sizes, "share of decrease": gains / gains.sum()})
    batch = next(iter(datamodule.train_dataloader()))
    with forward_only(task.model):
        closure = task.make_closure(batch)
        if isinstance(closure, AnswersNodes) and diagnosis.search.needs_nodes:
            with torch.enable_grad():
                gradient = diagnosis.gradient(task.loss(batch))
            table["cosine of samples"] = sample_cosines(closure, diagnosis, gradient)
    return diagnosis, table


def sample_cosines(closure: AnswersNodes, diagnosis: Diagnosis, gradient: Tensor) -> dict[str, float]:
    """Of the slopes that one evaluation per node gives to each part, with the gradient (P,) of the same batch."""
    steps = torch.full((closure.n_nodes,), diagnosis.search.param_groups[0]["radius"])
    slopes, _ = closure.nodes(torch.arange(closure.n_nodes), steps, seeded(0, 0))
    return {
        part: float(torch.cosine_similarity(slopes[own], gradient[own], dim=0)) for part, own in diagnosis.parts.items()
    }


def draw_diagnosis(diagnosis: Diagnosis, table: pd.DataFrame, command: str) -> Figure:
    """Losses by step, decrease on the batch against decrease on all, age of slopes, and parts by time."""
    sns.set_theme(style="whitegrid", context="notebook")
    figure = Figure(figsize=(13, 9), layout="constrained")
    figure.suptitle(command)
    (losses, decreases), (ages, parts) = figure.subplots(2, 2)
    steps = pd.DataFrame(diagnosis.steps)
    batch, train = "batch that decided", "all training strings"

    lines = pd.DataFrame({batch: steps.batch_before, train: steps.train_before})
    fell = (steps.train_after < steps.train_before)[steps.batch_after < steps.batch_before].mean()
    title = f"{fell:.0%} of the accepted steps lowered the loss of all strings"
    lines.plot(ax=losses, xlabel="step", ylabel="loss before the step, nats a token", ylim=(0, None), title=title)

    window = min(max(10, len(steps) // 30), len(steps))
    lines = pd.DataFrame({batch: steps.batch_before - steps.batch_after, train: steps.train_before - steps.train_after})
    lines.rolling(window).mean().plot(ax=decreases, xlabel="step", ylabel=f"decrease per step, mean of {window}")
    decreases.axhline(0, color="0.4", linewidth=1)
    if steps.search_accepted.notna().any():
        decreases.set_title(f"the search step wins in {steps.search_accepted.mean():.0%} of the steps")

    middle = (AGES[:-1] * (AGES[1:] - 1).clamp_min(1)).double().sqrt().numpy()
    count, right, weighted, size = diagnosis.agreement.numpy().T
    shares = {"coordinates": right / count.clip(1), "weighted by the gradient's size": weighted / size.clip(1e-12)}
    lines = pd.DataFrame(shares, index=middle)[count > 0]
    title = "against the gradient of all training strings"
    lines.plot(ax=ages, marker="o", logx=True, xlabel="age of a remembered slope, steps", title=title)
    ages.set_ylabel("share that points downhill")
    ages.axhline(0.5, color="0.4", linestyle="--", linewidth=1)

    gains = steps[[*table.index]].rolling(window).sum().iloc[window - 1 :].clip(lower=0)
    gains.div(gains.sum(axis=1), axis=0).plot.area(
        ax=parts, colormap="viridis", linewidth=0, xlabel="step", ylim=(0, 1)
    )
    parts.set(ylabel="share of the decrease", title="where moves lower the loss")
    parts.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)
    return figure


def main(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("overrides", nargs="*", help="as those of src/train.py")
    parser.add_argument("--output", type=Path, default=Path("diagnosis.png"), help="the picture to write")
    args = parser.parse_intermixed_args(arguments)
    silence_libraries()
    diagnosis, table = diagnose(args.overrides)
    print(table.to_string(float_format="{:.3f}".format), end="\n\n")
    figure = draw_diagnosis(diagnosis, table, " ".join(["python src/train.py", *args.overrides]))
    save(figure, args.output, f"{len(diagnosis.steps)} steps")
