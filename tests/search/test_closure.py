"""The numbering of coordinates, the one-by-one reference, and evaluation without side effects."""

import pytest
import torch
from torch import nn

from search.closure import OneByOne, forward_only
from search.coordinates import Coordinates


@pytest.fixture
def coordinates():
    return Coordinates([nn.Parameter(torch.arange(6.0).reshape(2, 3)), nn.Parameter(torch.arange(10.0, 14.0))])


def test_coordinates_count_weights_over_the_parameters_in_order(coordinates):
    values = []
    for c in range(len(coordinates)):
        owner, index = coordinates.locate(c)
        values.append(coordinates.parameters[owner][index].item())
    assert values == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13]
    assert coordinates.owner(torch.arange(10)).tolist() == [0] * 6 + [1] * 4


def test_move_adds_to_the_named_weights_only(coordinates):
    coordinates.move(torch.tensor([0.5, 2.0, -1.0]), torch.tensor([9, 0, 4]))
    assert coordinates.parameters[0].flatten().tolist() == [2, 1, 2, 3, 3, 5]
    assert coordinates.parameters[1].tolist() == [10, 11, 12, 13.5]


def test_moving_every_weight_is_the_same_by_either_way():
    changes, order = torch.randn(10), torch.randperm(10, generator=torch.Generator().manual_seed(0))
    ends = []
    for moved in ((changes,), (changes[order], order)):
        strided = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
        some = Coordinates([strided, nn.Parameter(torch.arange(10.0, 14.0))])
        some.move(*moved)
        ends.append(torch.cat([p.flatten() for p in some.parameters]))
    assert torch.equal(*ends)


def loss_of(coordinates):
    weights = torch.arange(1.0, 11.0)
    return lambda: (torch.cat([p.flatten() for p in coordinates.parameters]) * weights).sum()


def test_poll_moves_one_weight_a_candidate_and_puts_it_back(coordinates):
    closure = loss_of(coordinates)
    before, start = [p.clone() for p in coordinates.parameters], closure()
    losses = OneByOne(closure, coordinates).poll(torch.tensor([0, 9, 9]), torch.tensor([1.0, 1.0, -0.5]))
    assert (losses - start).tolist() == [1.0, 10.0, -5.0]
    assert all(torch.equal(p, old) for p, old in zip(coordinates.parameters, before, strict=True))


def test_trial_moves_many_weights_at_every_scale_and_puts_them_back(coordinates):
    closure = loss_of(coordinates)
    before, start = [p.clone() for p in coordinates.parameters], closure()
    changes = torch.zeros(10).index_put((torch.tensor([1, 8]),), torch.tensor([1.0, 2.0]))
    losses = OneByOne(closure, coordinates).trial(changes, torch.tensor([1.0, 0.5, 0.0]))
    assert (losses - start).tolist() == [2 + 18, 1 + 9, 0]
    assert all(torch.equal(p, old) for p, old in zip(coordinates.parameters, before, strict=True))


def test_perturbed_moves_every_weight_in_a_way_of_its_own_and_puts_them_back(coordinates):
    closure = loss_of(coordinates)
    before, start = [p.clone() for p in coordinates.parameters], closure()
    rows = torch.zeros(3, 10)
    rows[0, 1], rows[1, 8], rows[2] = 1.0, 2.0, 0.5
    losses = OneByOne(closure, coordinates).perturbed(3, lambda first, last: rows[first:last])
    assert (losses - start).tolist() == [2.0, 18.0, 27.5]
    assert all(torch.equal(p, old) for p, old in zip(coordinates.parameters, before, strict=True))


def test_forward_only_turns_gradients_and_dropout_off_and_puts_modes_back():
    module = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5).eval())
    with forward_only(module):
        assert not torch.is_grad_enabled()
        assert not any(m.training for m in module.modules())
    assert [m.training for m in module.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
