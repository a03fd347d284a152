"""Rows of a batch: evaluated once if equal, parted by length the cheapest way, with the losses of the whole."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_structured import loss, make_batch, make_model, setup, some_of_every_tensor

from polls.rows import draw_rows, part_sizes
from polls.structured import StructuredPolls
from search.base import seeded
from search.coordinates import Coordinates


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8).map(sorted), overhead=st.floats(0, 30))
def test_rows_are_parted_by_length_the_cheapest_way(lengths, overhead):
    def cost(sizes):
        ends = list(itertools.accumulate(sizes))
        return sum(overhead + size * lengths[end - 1] for size, end in zip(sizes, ends, strict=True))

    every_way = [
        [b - a for a, b in itertools.pairwise((0, *cuts, len(lengths)))]
        for n in range(len(lengths))
        for cuts in itertools.combinations(range(1, len(lengths)), n)
    ]
    sizes = part_sizes(np.array(lengths), overhead)
    assert sum(sizes) == len(lengths)
    assert cost(sizes) == pytest.approx(min(map(cost, every_way)))
    if len(set(lengths)) == 1:
        assert sizes == [len(lengths)]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_parts_by_length_give_the_losses_of_the_whole(positions):
    losses, n_parts = [], []
    for cost in (0, 10**9):
        model, coordinates, *_ = setup(positions=positions)
        polls = StructuredPolls(model, coordinates, loss)
        polls.sizes = polls.sizes._replace(part=cost)
        closure = polls.on(make_batch("ragged", n_rows=40))
        chosen = some_of_every_tensor(coordinates, n=2)
        losses.append(closure.poll(chosen, torch.full((len(chosen),), 0.1, dtype=torch.float64)))
        n_parts.append(len(closure.rows))
    assert n_parts[0] > 1
    assert n_parts[1] == 1
    torch.testing.assert_close(*losses, rtol=0, atol=1e-5)


def test_equal_rows_are_evaluated_once():
    batch = make_batch(n_rows=4)
    batch = {name: values.repeat(5, 1) for name, values in batch.items()}
    model = make_model()
    closure = StructuredPolls(model, Coordinates(model.parameters()), loss).on(batch)
    assert sum(len(rows.x) for rows in closure.rows) == 3  # of 20, 3 are different
    torch.testing.assert_close(float(closure()), float(closure.generic.plain()), rtol=0, atol=1e-5)


def test_rows_are_drawn_by_their_errors_and_count_once_in_the_mean():
    errors, shares = torch.tensor([0.0, 0.1, 0.3, 0.0, 0.6]).double(), torch.tensor([0.2] * 5).double()
    factors = torch.stack([draw_rows(errors, shares, 3, seeded(seed, 0)) for seed in range(4000)])
    torch.testing.assert_close(factors.mean(0), torch.ones(5).double(), atol=0.2, rtol=0)
    often = (factors > 0).double().mean(0)  # of 3 draws, each at 1 / 50 and nine tenths of the share of the errors
    torch.testing.assert_close(often, torch.tensor([0.06, 0.33, 0.87, 0.06, 1.0]).double(), atol=0.03, rtol=0)


@pytest.mark.parametrize("errors", [[0.0, 0.0, 0.0], [float("nan"), 1.0, 0.0], [1.0, 0.0, 0.0]])
def test_rows_are_drawn_where_nothing_is_left_and_where_a_loss_is_not_finite(errors):
    errors, shares = torch.tensor(errors).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    for seed in range(20):
        factors = draw_rows(errors, shares, 2, seeded(seed, 0))
        assert factors.isfinite().all()
        assert factors.sum() > 0
