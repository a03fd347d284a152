"""PatternSearchTask: the one place where task, model and optimizer meet.

One training step is one optimizer step on one batch. An optimizer that needs losses only gets a closure and
does everything forward only (Lightning's manual optimization); a gradient optimizer is left to
Lightning's automatic optimization. Loss, metrics and logs are the same for both.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from config.did_you_mean import unknown
from data.sequences import IGNORE
from polls.make import FastPolls, has_nodes, make_polls
from search.base import LossOnlyOptimizer
from search.closure import Candidates, forward_only

Batch = dict[str, Tensor]


class CountsLostError(ValueError):
    """An optimizer does not count on from where its checkpoint was written."""


def masked_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, over the scored positions: logits (B, T, C), y (B, T) -> scalar."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=IGNORE)


def batch_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The same of a batch, as the polls want it."""
    return masked_loss(logits, batch["y"])


class Scores:
    """Metrics of one split: means over all tokens or rows of the split, never means of batch means.

    A family adds its own by extending `measure`, which maps a name to the values of a batch that the mean is of.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def measure(self, logits: Tensor, y: Tensor) -> dict[str, Tensor]:
        scored = y != IGNORE  # (B, T)
        right = logits.argmax(-1) == y
        last = scored.shape[1] - 1 - scored.flip(1).int().argmax(1, keepdim=True)  # (B, 1) last scored position
        return {
            "loss": F.cross_entropy(
                logits[scored], y[scored], reduction="none"
            ),  # (scored tokens, C) -> (scored tokens,)
            "token_accuracy": right[scored],
            "exact_match": (right | ~scored).all(1),  # (B,)
            "last_accuracy": right.gather(1, last).flatten(),
        }

    def update(self, logits: Tensor, y: Tensor) -> None:
        for name, values in self.measure(logits, y).items():
            self.sums[name] = self.sums.get(name, 0) + values.double().sum()
            self.counts[name] = self.counts.get(name, 0) + len(values)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of everything since the start."""
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}


class PatternSearchTask(L.LightningModule):
    """Train `model` with any optimizer; subclasses differ only in what they measure.

    Args:
        model: token ids (B, T) -> logits (B, T, C).
        optimizer: makes the optimizer from the parameters: a class or a `functools.partial` of one. A
            `LossOnlyOptimizer` is stepped with a closure, any other one by gradients.
        pattern_search_radius: initial radius of a pattern search. It is read by the optimizer's
            config (`radius: ${task.pattern_search_radius}`) and stands here for the command line.
        parameters: what is trained: names of tensors or of parts, such as ["blocks.1", "head"]; None for all of the
            model. The other weights keep their first values.
        fast_polls: evaluate many candidates in one pass (`make_polls`); False: one forward a candidate.
    """

    scores_class: type[Scores] = Scores

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        pattern_search_radius: float = 0.1,
        fast_polls: bool = True,
        parameters: list[str] | None = None,
    ):
        super().__init__()
        self.model = model
        self.make_optimizer = optimizer
        self.parameters_trained = chosen_parameters(model, parameters)
        self.pattern_search_radius = pattern_search_radius
        kind, _ = optimizer_class(optimizer)
        self.automatic_optimization = not (isinstance(kind, type) and issubclass(kind, LossOnlyOptimizer))
        self._evaluations_saved = 0  # when the checkpoint that a run goes on from was written
        self.seconds = 0.0  # wall-clock seconds in training steps: no validation, no setup
        self.fast_polls = fast_polls
        self._polls: FastPolls | None = None
        self._scores: dict[str, Scores] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (B, T) -> class logits (B, T, C)."""
        return self.model(tokens)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.automatic_optimization:
            return self.make_optimizer(self.parameters_trained)
        kind, options = optimizer_class(self.make_optimizer)
        optimizer = self.make_optimizer(kind.parameter_groups(self.model, self.parameters_trained, **options))
        assert isinstance(optimizer, LossOnlyOptimizer)
        if optimizer.needs_nodes and not (self.fast_polls and has_nodes(self.model)):
            raise ValueError(
                f"{kind.__name__} polls nodes, which only the fast polls of a DecoderOnlyTransformer do: "
                "use such a model and task.fast_polls=true; or an optimizer that polls none: optimizer=pattern_search"
            )
        return optimizer

    @property
    def search(self) -> LossOnlyOptimizer | None:
        """The optimizer of the run, if it asks for losses only; not Lightning's wrapper around it."""
        optimizers = self.trainer.optimizers  # none before training
        return optimizers[0] if optimizers and isinstance(optimizers[0], LossOnlyOptimizer) else None

    @property
    def evaluations(self) -> int:
        """Function evaluations so far. A gradient step counts as one, though its backward costs about two more."""
        return self.global_step if self.search is None else self.search.evaluations

    def loss(self, batch: Batch) -> Tensor:
        return masked_loss(self.model(batch["x"]), batch["y"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        search = self.search
        if search is None:
            loss = self.loss(batch)
            self._log_step({"train/loss": loss.detach()})
            return loss
        with forward_only(self.model):
            closure = self.make_closure(batch)
            # Lightning wraps the closure, so an optimizer sees none of its methods: hand it over a second time
            candidates = closure if isinstance(closure, Candidates) else None
            optimizer = self.optimizers()
            assert isinstance(optimizer, LightningOptimizer)
            optimizer.step(closure=closure, candidates=candidates)
        self._log_step({f"train/{name}": value for name, value in search.metrics().items()})
        if search.stopped_by is not None:
            self.trainer.should_stop = True
        return None

    def make_closure(self, batch: Batch) -> Callable[[], Tensor]:
        """What a search gets to ask about this batch: the loss, and those of candidates."""
        if self.search is None or not self.fast_polls:
            return partial(self.loss, batch)
        if self._polls is None:
            self._polls = make_polls(self.model, self.search.coordinates, batch_loss)
        return self._polls.on(batch)

    # --- the two axes of every plot: function evaluations and seconds ---

    def _log_step(self, metrics: dict[str, Any]) -> None:
        """To the loggers themselves: through Lightning's results, eight values take as long as a hundred polls."""
        self.log("train/loss", metrics["train/loss"], logger=False)  # what a callback may monitor
        step = self.global_step if self.automatic_optimization else self.global_step - 1  # a search has stepped already
        if (step + 1) % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        seconds = self.seconds + time.perf_counter() - self._step_started
        axes = {"evaluations": float(self.evaluations), "seconds": seconds, "epoch": self.current_epoch}
        for logger in self.loggers:
            logger.log_metrics({name: float(value) for name, value in (metrics | axes).items()}, step)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._step_started = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.seconds += time.perf_counter() - self._step_started
        if self.search is not None:  # a budget of seconds is one of training, with what makes the closure ready
            self.search.saved["seconds"] = self.seconds

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seconds"], checkpoint["evaluations"] = self.seconds, self.evaluations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.state.fn == "fit":  # a test loads the best weights, and leaves the clock alone
            self.seconds, self._evaluations_saved = checkpoint["seconds"], checkpoint["evaluations"]

    def on_train_start(self) -> None:
        if self.evaluations < self._evaluations_saved:  # a budget would be spent twice
            raise CountsLostError(
                f"the optimizer counts {self.evaluations} evaluations where its checkpoint has "
                f"{self._evaluations_saved}: keep what it counts and remembers in `saved`, see docs/extending.md"
            )

    # --- evaluation ---

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self._evaluate(data.test_names[dataloader_idx] if data else f"test/{dataloader_idx}", batch)

    def _evaluate(self, split: str, batch: Batch) -> None:
        self._scores.setdefault(split, self.scores_class()).update(self.model(batch["x"]), batch["y"])

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The most likely class at every position, (B, T), the tokens so far being the true ones."""
        return self(batch["x"]).argmax(-1)

    def on_validation_epoch_end(self) -> None:
        for split, scores in self._scores.items():
            metrics: dict[str, Any] = {f"{split}/{name}": value for name, value in scores.compute().items()}
            self.log_dict(metrics | {"evaluations": float(self.evaluations), "seconds": self.seconds})
        self._scores.clear()


def chosen_parameters(model: nn.Module, names: list[str] | None) -> list[nn.Parameter]:
    """The parameters with one of `names`, or in a part of the model with one of them; all parameters for None.

    Raises:
        ValueError: a name that neither a parameter nor a part has, or no name at all.
    """
    if names == []:
        raise ValueError("task.parameters=[] trains nothing; name some, or use null for all of them")
    named = dict(model.named_parameters())
    parts = [name for name, _ in model.named_modules() if name]
    for name in names or []:
        if name not in (*parts, *named):
            outer = [part for part in parts if part.count(".") < 2]  # an attention has parts, and these have tensors
            raise ValueError(unknown(f"task.parameters: {name}", name, [*parts, *named], listed=outer))
    return [p for known, p in named.items() if names is None or f"{known}.".startswith(tuple(f"{n}." for n in names))]


def optimizer_class(optimizer: Callable) -> tuple[Any, dict[str, Any]]:
    """The class behind `optimizer`, which is one or a partial of one, and the options that are set already."""
    return (optimizer.func, optimizer.keywords) if isinstance(optimizer, partial) else (optimizer, {})
