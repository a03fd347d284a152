"""Draw the singular values of what the search step follows, beside those of the gradient, matrix by matrix.

python src/report.py spectrum experiment=z5                     after 5, 20 and 80 steps
python src/report.py spectrum experiment=z5 --steps 10 40       after others

For every matrix of the blocks: the gradient of the first 1,000 training strings; the slopes that the search remembers;
and the direction that it steps along, orthogonalised if the command asks for it. Each is divided by its largest
singular value. The table gives the effective rank of each (Roy and Vetterli 2007): the exponential of the entropy of
its singular values taken as shares.
"""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import lightning as L
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from config.refusal import ConfigError
from data.sequences import SequenceDataModule
from optimizer import PatternSearch
from pattern_search_task import PatternSearchTask, masked_loss, optimizer_class
from results.figures import closed, save
from results.watched import train_watched
from run.quiet import silence_libraries
from search.orthogonal import orthogonalised

SEQUENCES = 1000  # of the training set, at the most, that the gradient is of


class Spectrum(L.Callback):
    """Singular values of each matrix of the blocks after some steps.

    Attributes:
        rows: a dict per value: step, matrix, of ("gradient", "slopes", "search step"), rank (from 1), value
            (the largest is 1), cosine (with the gradient, of the whole matrix).
    """

    def __init__(self, task: PatternSearchTask, datamodule: SequenceDataModule, steps: list[int]) -> None:
        kind, options = optimizer_class(task.make_optimizer)
        if not issubclass(kind, PatternSearch) or not options.get("step_lengths"):
            raise ConfigError(["only a pattern search with a search step has slopes: optimizer=pattern_search_nodes"])
        self.task, self.split, self.steps = task, datamodule.splits["train"], steps
        self.rows: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step not in self.steps:
            return
        search = self.task.search
        assert isinstance(search, PatternSearch)
        assert search.slopes is not None
        with torch.enable_grad():  # the search never sees it
            loss = masked_loss(self.task.model(self.split.x[:SEQUENCES]), self.split.y[:SEQUENCES])
            gradients = torch.autograd.grad(loss, search.coordinates.parameters)
        slopes, uphill = (
            search.slopes.mean,
            -orthogonalised(search.slopes.direction, search.slopes.mean, search.matrices),
        )
        parts = zip(*(search.coordinates.with_parts(flat) for flat in (slopes, uphill)), gradients, strict=True)
        names = {id(p): name for name, p in self.task.model.named_parameters()}
        for (p, slope), (_p, step), gradient in parts:
            name = names[id(p)]
            if p.ndim == 2 and name.startswith("blocks."):
                here: dict[str, Any] = dict(
                    step=trainer.global_step, matrix=name.removeprefix("blocks.").removesuffix(".weight")
                )
                for of, found in {"gradient": gradient, "slopes": slope, "search step": step}.items():
                    self._add(here | {"of": of}, found, gradient)

    def _add(self, here: dict[str, Any], matrix: Tensor, gradient: Tensor) -> None:
        values = torch.linalg.svdvals(matrix.detach().double())
        cosine = float(torch.cosine_similarity(matrix.flatten(), gradient.flatten(), dim=0))
        for rank, value in enumerate((values / values[0].clamp_min(1e-300)).tolist(), start=1):
            self.rows.append(here | {"rank": rank, "value": value, "cosine": cosine})


def effective_rank(values: pd.Series) -> float:
    """exp of the entropy of singular values taken as shares: from 1, one value, to their number, all alike."""
    shares = torch.tensor(values.to_numpy()) / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def draw_spectrum(rows: pd.DataFrame) -> Figure:
    """A column per matrix, a row per step."""
    sns.set_theme(style="whitegrid", context="notebook")
    places: dict[str, Any] = dict(row="step", col="matrix", height=2.4, aspect=1.1, facet_kws=dict(sharex="col"))
    grid = sns.relplot(rows, kind="line", x="rank", y="value", hue="of", style="of", markers=True, **places)
    grid.set_titles("step {row_name}: {col_name}").set_axis_labels("", "singular value, largest 1").set(ylim=(0, 1.05))
    grid.legend.set_title("")
    return closed(grid)


def main(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("overrides", nargs="*", help="as those of src/train.py")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 80], help="after which it is looked at")
    parser.add_argument("--output", type=Path, default=Path("spectrum.png"), help="the picture to write")
    args = parser.parse_intermixed_args(arguments)
    silence_libraries()
    words = [f"trainer.max_steps={max(args.steps)}", *args.overrides]
    _, _, seen = train_watched(words, lambda task, data: Spectrum(task, data, args.steps))
    if not seen.rows:
        raise ConfigError([f"the run ended before step {min(args.steps)}"])
    rows = pd.DataFrame(seen.rows)
    by = rows.groupby(["step", "matrix", "of"], sort=False)
    table = pd.DataFrame({"effective rank": by.value.agg(effective_rank), "cosine": by.cosine.first()})
    print(table.unstack().to_string(float_format="{:.2f}".format), end="\n\n")
    save(draw_spectrum(rows), args.output, f"the matrices after {rows.step.nunique()} step(s)")
