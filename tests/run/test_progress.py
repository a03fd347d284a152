"""The time to the target follows the trend and says nothing without one; hints come once, then at twice the cost."""

import math
from functools import partial

import lightning as L
import pytest
import torch

from optimizer import PatternSearch
from pattern_search_task import PatternSearchTask
from run import progress
from run.hints import Recent
from run.progress import SearchProgress, due, fitting, time_to
from search.base import LossOnlyOptimizer
from search.random_search import RandomSearch


def test_the_time_to_the_target_of_an_exponential_is_exact():
    seconds = list(range(10))
    assert time_to(0.01, seconds, [math.exp(-0.1 * s) for s in seconds]) == pytest.approx(math.log(100) / 0.1 - 9)


@pytest.mark.parametrize(
    "losses",
    [
        [0.5] * 10,  # flat
        [0.5 + 0.01 * i for i in range(10)],  # rising
        [0.7, 0.5] * 5,  # noise
        [0.69 - 1e-6 * i for i in range(10)],  # so slow that it says nothing
        [0.7, 0.6, 0.5],  # too few
        [0.5] * 9 + [math.inf],
        [0.5] * 9 + [math.nan],
    ],
)
def test_without_a_trend_there_is_no_time(losses):
    assert time_to(0.003, list(range(len(losses))), losses) is None


def test_a_hint_is_repeated_at_twice_the_evaluations_only(monkeypatch):
    monkeypatch.setattr(progress, "hints", lambda recent: [("chance", "try this")])
    recent, next_hint, said = Recent(chance_loss=0.7), {}, []
    for recent.evaluations in (100, 150, 200, 300, 400):
        said += [(recent.evaluations, text) for text in due(recent, next_hint)]
    assert said == [(100, "try this"), (200, "try this"), (400, "try this")]


def test_validation_before_the_start_of_training_is_left_alone():
    SearchProgress().on_validation_end(L.Trainer(logger=False), L.LightningModule())


class Plain(LossOnlyOptimizer):
    """An optimizer that has nothing but what it must have."""

    def __init__(self, params, **limits):
        super().__init__(params, {}, **limits)

    def take_step(self, evaluate):
        evaluate.loss()


class Looks(L.Callback):
    """Keeps the status as it is within each step of training and behind it."""

    def __init__(self, display):
        self.display, self.seen = display, []

    def on_train_batch_end(self, *_):
        self.seen.append((self.display.status.seconds_left(), " · ".join(self.display.status.parts())))


def watch(parity, model, optimizer, **options):
    """Train for 8 steps; returns what the display knew after each."""
    display = SearchProgress(refresh_per_second=1000, log_every_seconds=0.001)
    looks = Looks(display)
    task = PatternSearchTask(model, optimizer)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    options = dict(max_epochs=2, limit_train_batches=4, accelerator="cpu") | options
    L.Trainer(**quiet, **options, callbacks=[display, looks]).fit(task, datamodule=parity)
    return looks.seen


@pytest.mark.parametrize(
    ("optimizer", "has_radius"),
    [
        (Plain, False),
        (RandomSearch, True),
        (partial(PatternSearch, polls_per_step=16), True),
        (partial(torch.optim.Adam, lr=0.01), False),
    ],
)
def test_any_optimizer_is_shown(parity, model, optimizer, has_radius, capsys):
    seen = watch(parity, model, optimizer)
    assert len(seen) == 8
    assert all("loss" in line and "evaluations" in line for _, line in seen)
    said = capsys.readouterr()
    assert "step 8/8 loss" in said.out
    assert "Traceback" not in said.err  # of a thread that died
    assert ("radius" in said.out) == has_radius


def test_hints_are_printed(parity, model, monkeypatch, capsys):
    monkeypatch.setattr(progress, "hints", lambda recent: [("chance", "try this")])
    watch(parity, model, Plain)
    assert capsys.readouterr().out.count("hint: try this\n") == 2  # the second epoch ends at twice the evaluations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "trainer"),
    [
        (dict(max_evaluations=24), {}),  # of which a step takes two
        (dict(max_seconds=1.0), {}),
        ({}, dict(max_time="00:00:00:01")),
    ],
)
def test_the_time_left_follows_every_limit(parity, model, limit, trainer):
    endless = dict(max_epochs=-1, limit_train_batches=4) | trainer
    left = [seconds for seconds, _ in watch(parity, model, partial(Plain, **limit), **endless)]
    assert all(0 <= seconds < 60 for seconds in left)
    assert left[-1] < left[0]
    if "max_evaluations" in limit:
        assert len(left) == 12
        assert left[-1] == 0


@pytest.mark.parametrize(
    ("width", "line"), [(30, "one · two · three"), (17, "one · two · three"), (16, "one · two"), (1, "one")]
)
def test_a_narrow_terminal_loses_what_matters_least(width, line):
    assert fitting(["one", "two", "three"], width) == line
