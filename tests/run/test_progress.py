"""The time to the target follows the trend and says nothing without one; hints come once, then at twice the cost."""

import math
from functools import partial
from types import SimpleNamespace

import pytest

from run import progress
from run.progress import SearchProgress, fitting, time_to


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


def test_a_hint_is_repeated_at_twice_the_evaluations_only(monkeypatch, capsys):
    monkeypatch.setattr(progress, "hints", lambda recent: [("chance", "try this")])
    callback = SearchProgress()
    callback._monitor, callback._target, callback._next_hint = "val/loss", None, {}
    callback._recent = SimpleNamespace()
    look = partial(callback.on_validation_end, SimpleNamespace(callback_metrics={}, sanity_checking=False))
    for evaluations in (100, 150, 200, 300, 400):
        look(SimpleNamespace(evaluations=evaluations))
    assert capsys.readouterr().out.splitlines() == ["hint: try this"] * 3  # at 100, 200, 400


def test_validation_before_the_start_of_training_is_left_alone():
    SearchProgress().on_validation_end(SimpleNamespace(callback_metrics={}, sanity_checking=True), None)


@pytest.mark.parametrize(
    ("width", "line"), [(30, "one · two · three"), (17, "one · two · three"), (16, "one · two"), (1, "one")]
)
def test_a_narrow_terminal_loses_what_matters_least(width, line):
    assert fitting(["one", "two", "three"], width) == line
