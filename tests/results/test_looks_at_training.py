"""The plane of a landscape and the spectrum of slopes: on numbers that are known, and on a short run."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.utils import parameters_to_vector

import report
from results import landscape, spectrum
from results.watched import train_watched

SHORT = ["experiment=z5", "trainer.max_steps=6", "callbacks=none"]


def test_the_plane_holds_a_way_that_lies_in_one():
    basis = torch.linalg.qr(torch.randn(7, 2, generator=torch.Generator().manual_seed(0)))[0].T
    places = torch.tensor([[4.0, 0], [3, 1], [1, 1], [0, 0]])
    axes, found, share = landscape.plane_of(places @ basis + 5)
    assert share == pytest.approx(1)
    assert torch.allclose(axes @ axes.T, torch.eye(2, dtype=axes.dtype), atol=1e-6)
    assert torch.allclose(torch.cdist(found, found), torch.cdist(places, places).double(), atol=1e-5)
    assert found[-1].abs().max() < 1e-6


def test_the_effective_rank_counts_alike_values():
    assert spectrum.effective_rank(pd.Series([1.0, 1, 1, 1])) == pytest.approx(4)
    assert spectrum.effective_rank(pd.Series([1.0, 0, 0])) == pytest.approx(1)
    assert 1 < spectrum.effective_rank(pd.Series([1.0, 0.5])) < 2


@pytest.mark.slow
def test_the_landscape_has_the_losses_of_the_way_and_leaves_the_weights():
    task, data, way = train_watched(SHORT, lambda *_: landscape.Way())
    assert len(way.weights) == 8  # the start, six steps, the end
    end = way.weights[-1]
    axes, places, _ = landscape.plane_of(torch.stack(way.weights))
    losses = landscape.losses_on(task, data, end, axes, np.array([0.0, float(places[0, 0])]), np.array([0.0]))
    split = data.splits["val"]
    with torch.no_grad():
        here = task.loss({"x": split.x[: landscape.SEQUENCES], "y": split.y[: landscape.SEQUENCES]})
    assert losses[0, 0] == pytest.approx(float(here), rel=1e-5)
    assert losses[0, 1] != losses[0, 0]
    assert torch.equal(parameters_to_vector(task.parameters_trained).detach(), end)


@pytest.mark.slow
def test_a_long_way_is_thinned_evenly(monkeypatch):
    monkeypatch.setattr(landscape, "WAY", 4)
    _, _, way = train_watched([*SHORT, "optimizer=adam", "trainer.max_steps=20"], lambda *_: landscape.Way())
    assert len(way.weights) <= 6
    assert way.every == 8


@pytest.mark.slow
def test_the_spectrum_of_the_search_step_is_flatter_than_that_of_the_slopes():
    _, _, seen = train_watched(SHORT, lambda task, data: spectrum.Spectrum(task, data, [6]))
    rows = pd.DataFrame(seen.rows)
    assert set(rows.of) == {"gradient", "slopes", "search step"}
    assert rows.matrix.nunique() == 6
    first = rows[rows["rank"] == 1]
    assert all(math.isclose(value, 1) for value in first.value)
    assert all(math.isclose(cosine, 1, rel_tol=1e-5) for cosine in first[first.of == "gradient"].cosine)
    ranks = rows.groupby(["matrix", "of"]).value.agg(spectrum.effective_rank).unstack()
    assert (ranks["search step"] > ranks.slopes).all()


@pytest.mark.parametrize("words", [["spectrum", "optimizer=adam"], ["spectrum", "optimizer=pattern_search_classic"]])
def test_a_run_without_slopes_is_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        report.main(words)
    assert end.value.code == 2
    assert "has slopes" in capsys.readouterr().err
