"""What every optimizer that needs losses only must do. A test class of its own inherits these tests:

class TestRandomSearch(LossOnlyTests):
    name = "random_search"              # configs/optimizer/random_search.yaml
    toy = dict(radius=0.1, samples=4)   # options for a problem of a few weights
"""

import copy
import io
import math
import pickle
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from search.base import LossOnlyOptimizer
from search.closure import OneByOne


class Answers(OneByOne):
    """A closure that answers one by one, and counts. A node is a parameter, its slopes are exact."""

    def __init__(self, loss, search):
        super().__init__(loss, search.coordinates)
        self.asked = 0
        self.node_parameter = torch.arange(len(search.coordinates.parameters))
        self.n_nodes = len(self.node_parameter)

    def __call__(self):
        assert not torch.is_grad_enabled()
        self.asked += 1
        return self.closure()

    def poll(self, coordinates, steps):
        self.asked += len(coordinates)
        return super().poll(coordinates, steps)

    def trial(self, changes, scales):
        self.asked += len(scales)
        return super().trial(changes, scales)

    def nodes(self, nodes, steps, signs):
        self.asked += len(nodes)
        with torch.enable_grad():
            parts = torch.autograd.grad(self.closure(), self.coordinates.parameters, materialize_grads=True)
        slopes = torch.cat([part.flatten() for part in parts])
        owner = self.coordinates.owner(torch.arange(len(self.coordinates)))
        return slopes, torch.isin(owner, nodes)

    def drawn(self, rows, generator):
        return self


def bits(parameters):
    return [p.detach().clone() for p in parameters]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class LossOnlyTests:
    name: ClassVar[str]
    toy: ClassVar[dict[str, Any]] = {}

    @pytest.fixture(autouse=True)
    def _read_config(self, compose_config):
        self.partial = instantiate(compose_config(f"optimizer={self.name}").optimizer)

    def make(self, params, **options) -> LossOnlyOptimizer:
        return self.partial.func(params, **self.partial.keywords | self.toy | options)

    def weights(self, dtype=torch.float32):
        return [nn.Parameter(torch.linspace(-2, 3, 6).view(2, 3).to(dtype)), nn.Parameter(torch.ones(4, dtype=dtype))]

    @staticmethod
    def sphere(parameters):
        return lambda: sum((p**2).sum() for p in parameters)

    def run(self, search, loss, steps):
        answers = Answers(loss, search)
        for _ in range(steps):
            if search.stopped_by is None:
                search.step(answers)
        return answers

    def test_its_yaml_names_a_loss_only_optimizer(self):
        assert issubclass(self.partial.func, LossOnlyOptimizer)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_a_sphere_gets_smaller(self, dtype):
        weights = self.weights(dtype)
        loss = self.sphere(weights)
        before = loss().item()
        self.run(self.make(weights), loss, 60)
        assert loss().item() < 0.5 * before
        assert all(p.dtype == dtype for p in weights)

    def test_it_needs_no_gradient_and_leaves_none(self):
        weights = self.weights()
        self.run(self.make(weights), self.sphere(weights), 3)  # `Answers` looks whether gradients are on
        assert all(p.grad is None for p in weights)

    def test_weights_that_are_added_later_are_searched_too(self):
        weights = self.weights()
        search, before = self.make(weights[:1]), bits(weights)
        self.run(search, self.sphere(weights), 30)
        assert equal(weights[1:], before[1:])
        search.add_param_group({"params": weights[1:]})
        self.run(search, self.sphere(weights), 30)
        assert not any(map(torch.equal, weights, before))

    def test_every_evaluation_is_counted(self):
        weights = self.weights()
        search, reported = self.make(weights), 0
        answers = Answers(self.sphere(weights), search)
        for _ in range(6):
            search.step(answers)
            reported += search.report.evaluations
        assert search.evaluations == reported == answers.asked

    @pytest.mark.parametrize("budget", [1, 2, 3, 7, 20, 21])
    def test_a_budget_of_evaluations_is_never_exceeded(self, budget):
        weights = self.weights()
        search = self.make(weights, max_evaluations=budget)
        answers = self.run(search, self.sphere(weights), 50)
        assert search.stopped_by == "max_evaluations"
        assert answers.asked == search.evaluations <= budget
        ended = bits(weights)
        search.step(answers)
        assert answers.asked <= budget
        assert equal(bits(weights), ended)

    def test_a_budget_of_seconds_ends_it(self):
        weights = self.weights()
        search, clock = self.make(weights, max_seconds=5), map(float, range(10**6))
        with mock.patch("search.budget.time.perf_counter", side_effect=clock):
            self.run(search, self.sphere(weights), 100)
        assert search.stopped_by == "max_seconds"
        assert 5 <= search.saved["seconds"] < 10

    def test_a_target_ends_it(self):
        weights = self.weights()
        search = self.make(weights, target_loss=20.0)
        self.run(search, self.sphere(weights), 200)
        assert search.stopped_by == "target_loss"

    @pytest.mark.parametrize("wrong", [dict(max_evaluations=0), dict(max_seconds=0), dict(max_seconds=-1.0)])
    def test_limits_out_of_range_are_refused(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            self.make(self.weights(), **wrong)

    @pytest.mark.parametrize("steps", [0, 1, 5, 11])
    def test_a_state_goes_on_bit_for_bit_from_any_step(self, steps):
        weights = self.weights()
        search = self.make(weights)
        self.run(search, self.sphere(weights), steps)
        file = io.BytesIO()
        torch.save(search.state_dict(), file)
        file.seek(0)
        others = [nn.Parameter(p.detach().clone()) for p in weights]
        other = self.make(others)
        other.load_state_dict(torch.load(file, weights_only=True))
        for _ in range(5):
            self.run(search, self.sphere(weights), 1)
            self.run(other, self.sphere(others), 1)
            assert equal(weights, others)
            assert search.evaluations == other.evaluations
            assert {**search.report.__dict__, "seconds": 0} == {**other.report.__dict__, "seconds": 0}

    def test_copies_and_pickles_go_on_alike(self):
        weights = self.weights()
        search = self.make(weights)
        self.run(search, self.sphere(weights), 3)
        twins = [copy.deepcopy(search), pickle.loads(pickle.dumps(search))]
        self.run(search, self.sphere(weights), 2)
        for twin in twins:
            self.run(twin, self.sphere(twin.coordinates.parameters), 2)
            assert equal(twin.coordinates.parameters, weights)

    def test_the_state_of_another_search_is_refused(self):
        other = self.make([nn.Parameter(torch.ones(8, 5))])
        with pytest.raises(ValueError, match="another search"):
            self.make(self.weights()).load_state_dict(other.state_dict())

    def test_the_seed_decides(self):
        ends = []
        for seed in (0, 0, 1):
            weights = self.weights()
            self.run(self.make(weights, seed=seed), self.sphere(weights), 3)
            ends.append(torch.cat([p.detach().flatten() for p in weights]))
        assert torch.equal(ends[0], ends[1])
        assert not torch.equal(ends[0], ends[2])

    def test_frozen_and_empty_parameters_are_left_alone(self):
        frozen, empty = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.empty(0))
        weights = self.weights()
        search = self.make([frozen, empty, *weights])
        self.run(search, self.sphere([frozen, *weights]), 20)
        assert frozen.tolist() == [1.0, 1.0, 1.0]
        with pytest.raises(ValueError, match="no weights to search"):
            self.make([frozen, empty])

    def test_a_weight_shared_by_two_layers_moves_in_both(self):
        first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        second.weight = first.weight
        model, x = nn.Sequential(first, second), torch.eye(3)
        search = self.make(model.parameters())
        assert len(search.coordinates) == 9
        self.run(search, lambda: (model(x) - x).square().sum(), 20)
        assert first.weight is second.weight

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_losses_that_are_not_finite_are_never_taken(self, bad):
        weights = self.weights()
        sphere = self.sphere(weights)
        calls = iter(range(10**6))
        search = self.make(weights)
        losses = [search.step(Answers(lambda: sphere() if next(calls) % 3 else torch.tensor(bad), search))]
        for _ in range(20):
            losses.append(search.step(Answers(sphere, search)))
            assert all(p.isfinite().all() for p in weights)
        assert math.isfinite(losses[-1])

    def test_what_it_says_of_itself_has_the_names_of_the_contract(self):
        weights = self.weights()
        search = self.make(weights)
        names = search.metrics().keys()  # before any step
        self.run(search, self.sphere(weights), 2)
        metrics = search.metrics()
        assert metrics.keys() == names >= {"loss", "loss_after", "accepted", "evaluations_per_second"}
        assert all(isinstance(value, float) for value in metrics.values())
        assert all(isinstance(part, str) for part in search.status())

    def test_a_parameter_that_is_not_of_a_floating_type_is_refused(self):
        with pytest.raises(ValueError, match=r"int64 cannot be searched"):
            self.make([*self.weights(), nn.Parameter(torch.ones(2, dtype=torch.long), requires_grad=False)])
