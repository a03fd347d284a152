"""Rows of a batch: evaluated once if equal, parted by length the cheapest way, with the losses of the whole."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_structured import loss, make_batch, make_model, setup, some_of_every_tensor

from polls.rows import part_sizes
from polls.structured import StructuredPolls
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
