"""Any optimizer is shown, with the share of the run that is done; each hint appears where its sign is, once."""

from functools import partial

import lightning as L
import pytest
import torch

from optimizer import PatternSearch
from pattern_search_task import PatternSearchTask
from run import progress
from run.progress import PATIENCE, WINDOW, SearchProgress, hints, share_done
from search.base import LossOnlyOptimizer
from search.random_search import RandomSearch

FALLING = [0.6 - 0.4 * i / WINDOW for i in range(WINDOW)]


@pytest.mark.parametrize(
    ("losses", "validations", "evaluations", "expected"),
    [
        (FALLING, [0.6, 0.5], 0, []),
        (FALLING, [], PATIENCE, []),
        ([0.69] * WINDOW, [], PATIENCE, ["chance"]),
        ([0.69] * WINDOW, [], PATIENCE - 1, []),
        ([0.69] * 50, [], PATIENCE, []),  # too early to tell
        ([0.1] * WINDOW, [0.7, 0.5, 0.7, 0.7, 0.7], 0, ["overfitting"]),
        ([0.1] * WINDOW, [0.7, 0.5, 0.7, 0.5, 0.7], 0, []),  # not for long
        ([0.4] * WINDOW, [0.7, 0.5, 0.7, 0.7, 0.7], 0, []),  # training is as bad
    ],
)
def test_each_hint_appears_where_its_sign_is_only(losses, validations, evaluations, expected):
    assert list(hints(losses, validations, 0.693, evaluations)) == expected


def test_a_hint_names_what_to_change():
    text = hints([0.69] * WINDOW, [], 0.693, PATIENCE)["chance"]
    assert "after 100,000 evaluations; try another task.pattern_search_radius" in text


class Plain(LossOnlyOptimizer):
    """An optimizer that has nothing but what it must have."""

    def __init__(self, params, **limits):
        super().__init__(params, {}, **limits)

    def take_step(self, evaluate):
        evaluate.loss()


class Looks(L.Callback):
    """Keeps the share that is done after each step."""

    def __init__(self):
        self.shares = []

    def on_train_batch_end(self, trainer, task, *_):
        self.shares.append(share_done(trainer, task, trainer.estimated_stepping_batches))


def watch(parity, model, optimizer, **options):
    """Train for 8 steps; returns the share that was done after each."""
    display = SearchProgress(refresh_per_second=1000, log_every_seconds=0.001)
    looks = Looks()
    task = PatternSearchTask(model, optimizer)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    options = dict(max_epochs=2, limit_train_batches=4, accelerator="cpu") | options
    L.Trainer(**quiet, **options, callbacks=[display, looks]).fit(task, datamodule=parity)
    return looks.shares


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
    shares = watch(parity, model, optimizer)
    assert len(shares) == 8
    assert shares == sorted(shares)
    assert shares[-1] == 1
    said = capsys.readouterr()
    assert "step 8/8 loss" in said.out
    assert "Traceback" not in said.err  # of a thread that died
    assert ("radius" in said.out) == has_radius
    assert "accepted" in said.out or not has_radius
    assert "% done" in said.out


def test_a_hint_is_printed_once(parity, model, monkeypatch, capsys):
    monkeypatch.setattr(progress, "hints", lambda *_: {"chance": "try this"})
    watch(parity, model, Plain)
    assert capsys.readouterr().out.count("hint: try this\n") == 1  # of two validations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "trainer"),
    [
        (dict(max_evaluations=24), {}),  # of which a step takes two
        (dict(max_seconds=1.0), {}),
        ({}, dict(max_time="00:00:00:01")),
    ],
)
def test_the_share_that_is_done_follows_every_limit(parity, model, limit, trainer):
    endless = dict(max_epochs=-1, limit_train_batches=4) | trainer
    shares = watch(parity, model, partial(Plain, **limit), **endless)
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.9 < shares[-1] <= 1
    if "max_evaluations" in limit:
        assert shares == pytest.approx([i / 12 for i in range(1, 13)])
