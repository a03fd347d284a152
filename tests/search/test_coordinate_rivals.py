"""Rivals that move single weights, rows or nodes: their steps against plain ones, order, options out of range."""

from functools import partial

import pytest
import torch
from loss_only_tests import Answers, bits, equal
from torch import nn

from search.closure import OneByOne
from search.coherent_descent import CoherentDescent
from search.node_perturbation import NodePerturbation
from search.random_search import RandomSearch
from search.rso import RSO, VECTOR_STD

CURVATURE = torch.linspace(0.5, 3, 10, dtype=torch.float64)
START = torch.linspace(-2, 3, 10, dtype=torch.float64)


def parameters():
    """A matrix (2, 3) and a vector (4,)."""
    return [nn.Parameter(START[:6].view(2, 3).clone()), nn.Parameter(START[6:].clone())]


def flat(weights):
    return torch.cat([p.detach().flatten() for p in weights])


def quadratic(weights):
    """Of gradient CURVATURE * w."""
    return lambda: 0.5 * (CURVATURE * torch.cat([p.flatten() for p in weights]).square()).sum()


class Asked(OneByOne):
    """Answers in blocks, and keeps what was asked."""

    def __init__(self, closure, coordinates, block=1):
        super().__init__(closure, coordinates)
        self.block, self.polled = block, []

    def __call__(self):
        return self.closure()

    def poll(self, coordinates, steps):
        self.polled.append((coordinates.tolist(), steps.tolist()))
        return super().poll(coordinates, steps)


@pytest.mark.parametrize("gamma", [1.0, 0.5, 0.0])
def test_coherent_descent_follows_its_equations_on_a_quadratic(gamma):
    weights = parameters()
    search = CoherentDescent(weights, lr=0.1, radius=0.3, coordinates_per_step=4, gamma=gamma, seed=3)
    w, g, cursor = START.clone(), torch.zeros(10, dtype=torch.float64), search.saved["cursor"]
    for _ in range(7):
        search.step(Asked(quadratic(weights), search.coordinates))
        block = [(cursor + k) % 10 for k in range(4)]
        g *= gamma
        g[block] = (CURVATURE * w)[block]  # central differences of a quadratic are its slopes
        w -= 0.1 * g
        cursor = (cursor + 4) % 10
        torch.testing.assert_close(flat(weights), w)
        assert search.report.loss_after == search.report.loss_before
        assert search.report.evaluations == 9


def test_coherent_descent_takes_all_coordinates_in_turn_both_ways():
    weights = parameters()
    search = CoherentDescent([{"params": weights[:1], "radius": 0.5}, {"params": weights[1:]}], coordinates_per_step=5)
    asked, first = Asked(quadratic(weights), search.coordinates), search.saved["cursor"]
    for _ in range(4):
        search.step(asked)
    for step, (coordinates, steps) in enumerate(asked.polled):
        expected = [(first + 5 * step + k) % 10 for k in range(5)]
        radii = [0.5 if coordinate < 6 else 0.1 for coordinate in expected]
        assert coordinates == 2 * expected
        assert steps == radii + [-radius for radius in radii]


def test_a_slope_of_coherent_descent_that_is_not_finite_counts_as_none():
    weights = parameters()
    search = CoherentDescent(weights, lr=0.1, coordinates_per_step=10)
    loss = quadratic(weights)
    search.step(Asked(lambda: loss() if weights[1][0] <= START[6] else loss() / 0, search.coordinates))
    moved = flat(weights) != START
    assert moved.tolist() == [True] * 6 + [False] + [True] * 3


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_rso_takes_the_moves_of_one_candidate_at_a_time(block):
    weights = parameters()
    search = RSO(weights, moves_per_step=12, anneal_evaluations=100, seed=5)
    w, evaluations = START.clone(), 0
    for step in range(6):
        std = torch.tensor([(2 / 3) ** 0.5] * 6 + [VECTOR_STD] * 4, dtype=torch.float64)
        std *= 1 - 0.9 * min(1, evaluations / 100)
        generator = torch.Generator().manual_seed(5 * 1_000_003 + step)
        drawn = torch.randint(10, (12,), generator=generator)
        normal = torch.randn(12, generator=generator, dtype=torch.float64)
        loss = 0.5 * (CURVATURE * w**2).sum()
        evaluations += 1
        for coordinate, change in zip(drawn.tolist(), normal * std[drawn], strict=True):
            for move in (change, -change):
                moved = w.clone()
                moved[coordinate] += move
                evaluations += 1
                if (lower := 0.5 * (CURVATURE * moved**2).sum()) < loss:
                    w, loss = moved, lower
                    break
        search.step(Asked(quadratic(weights), search.coordinates, block))
        assert torch.equal(flat(weights), w)
        assert search.evaluations == evaluations
        assert search.report.done == search.report.planned == 24
    assert search.saved["accepted"] > 10


@pytest.mark.parametrize("make", [partial(RSO, unit="row"), partial(RandomSearch, radius=0.2)])
def test_moves_of_many_weights_are_the_same_however_many_are_asked_for_at_a_time(make):
    ends = []
    for block in (1, 2, 7, 64):
        weights = parameters()
        search = make(weights, seed=5)
        for _ in range(6):
            search.step(Asked(quadratic(weights), search.coordinates, block))
        ends.append((flat(weights).tolist(), search.evaluations, search.saved["accepted"]))
    assert ends == ends[:1] * 4
    assert ends[0][2] > 10


def test_rso_moves_whole_rows_and_keeps_what_is_lower():
    weights = parameters()
    search = RSO(weights, unit="row", moves_per_step=1)
    rows = [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    seen = set()
    for _ in range(40):
        before = flat(weights)
        search.step(Asked(quadratic(weights), search.coordinates))
        moved = (flat(weights) != before).nonzero().flatten().tolist()
        assert moved in [*rows, []]
        assert bool(moved) == (search.report.loss_after < search.report.loss_before)
        assert search.report.loss_after == pytest.approx(quadratic(weights)().item())
        seen.add(tuple(moved))
    assert seen > set(map(tuple, rows))


@pytest.mark.parametrize("update", ["sgd", "adam"])
def test_node_perturbation_with_exact_slopes_is_the_optimizer_of_torch(update):
    weights, twins = parameters(), parameters()
    search = NodePerturbation(weights, lr=0.05, update=update, momentum=0.9, square_decay=0.99)
    theirs = torch.optim.SGD(twins, lr=0.05, momentum=0.9)
    if update == "adam":
        theirs = torch.optim.Adam(twins, lr=0.05, betas=(0.9, 0.99))
    loss, answers = quadratic(twins), Answers(quadratic(weights), search)
    for _ in range(20):
        search.step(answers)
        theirs.zero_grad()
        loss().backward()
        theirs.step()
        torch.testing.assert_close(flat(weights), flat(twins))
    assert search.report.loss_after == search.report.loss_before


class Noisy(Answers):
    """Whose slopes are 1, 2, 3, ... from question to question, and not finite in weight 7."""

    def __init__(self, loss, search):
        super().__init__(loss, search)
        self.questions = []

    def nodes(self, nodes, steps, signs):
        self.questions.append((nodes.tolist(), steps.tolist()))
        slopes, known = super().nodes(nodes, steps, signs)
        slopes = torch.full_like(slopes, len(self.questions))
        slopes[7] = torch.inf
        return slopes, known


def test_node_perturbation_averages_samples_and_leaves_what_it_did_not_sample():
    weights = parameters()
    search = NodePerturbation(
        [{"params": weights[:1], "radius": 0.5}, {"params": weights[1:], "lr": 2.0}],
        lr=1.0, momentum=0.0, radius=0.25, samples=3, nodes_per_step=1,
    )  # fmt: skip
    answers = Noisy(quadratic(weights), search)
    sampled = []
    for step in range(4):
        before = flat(weights)
        search.step(answers)
        node = sampled.append(answers.questions[-1][0][0]) or sampled[-1]
        assert answers.questions[-3:] == [([node], [0.5 if node == 0 else 0.25])] * 3
        mean = 3 * step + 2.0  # of three successive numbers
        expected = [-mean] * 6 + [0] * 4 if node == 0 else [0] * 6 + [-2 * mean, 0, -2 * mean, -2 * mean]
        torch.testing.assert_close(flat(weights) - before, torch.tensor(expected, dtype=torch.float64))
        assert search.report.evaluations == 4
    assert sorted(sampled[:2]) == sorted(sampled[2:]) == [0, 1]


def test_node_perturbation_asks_for_a_closure_that_answers_nodes():
    weights = parameters()
    with pytest.raises(ValueError, match="need a closure that answers `nodes`"):
        NodePerturbation(weights).step(quadratic(weights))
    assert equal(bits(weights), parameters())


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (CoherentDescent, dict(lr=0.0)),
        (CoherentDescent, dict(radius=-1.0)),
        (CoherentDescent, dict(coordinates_per_step=0)),
        (CoherentDescent, dict(gamma=1.1)),
        (RSO, dict(unit="column")),
        (RSO, dict(scale=0.0)),
        (RSO, dict(final_scale=0.0)),
        (RSO, dict(anneal_evaluations=0)),
        (RSO, dict(moves_per_step=0)),
        (NodePerturbation, dict(lr=0.0)),
        (NodePerturbation, dict(update="muon")),
        (NodePerturbation, dict(momentum=1.0)),
        (NodePerturbation, dict(square_decay=-0.1)),
        (NodePerturbation, dict(radius=0.0)),
        (NodePerturbation, dict(samples=0)),
        (NodePerturbation, dict(nodes_per_step=0)),
    ],
)
def test_options_out_of_range_are_refused_by_name(kind, wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        kind(parameters(), **wrong)
