"""What the rivals of the search compute: the estimates and the moves of their papers, against plain numpy."""

import math

import numpy as np
import pytest
import torch
from cmaes import SepCMA
from torch import nn

from search import moments, random_directions
from search.closure import OneByOne
from search.coordinates import Coordinates
from search.eggroll import Eggroll
from search.es import ES, centred_ranks
from search.fzoo import FZOO
from search.random_directions import RandomDirections
from search.sep_cma_es import SepCMAES
from search.spsa import SPSA

SLOPES, CURVATURES = np.linspace(-1, 2, 10), np.linspace(0.5, 2, 10)


class Quadratic:
    """L(w) = slopes w + curvatures w^2 / 2 of ten weights in two tensors of float64, at random weights."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        shapes = (2, 3), (4,)
        self.parameters = [nn.Parameter(torch.randn(*s, generator=generator, dtype=torch.float64)) for s in shapes]

    @property
    def weights(self):
        return np.concatenate([p.detach().numpy().ravel() for p in self.parameters])

    def loss(self, weights):
        return SLOPES @ weights + CURVATURES @ weights**2 / 2

    def slope(self, weights):
        return SLOPES + CURVATURES * weights

    def __call__(self):
        return torch.tensor(self.loss(self.weights))


class Recorded(OneByOne):
    """Answers one by one, and keeps the changes that it was asked about and the losses that it gave."""

    def perturbed(self, count, changes):
        losses = super().perturbed(count, changes)
        self.changes = np.concatenate([getattr(self, "changes", np.empty((0, 10))), changes(0, count).numpy()])
        self.losses = np.concatenate([getattr(self, "losses", []), losses.numpy()])
        return losses

    def __call__(self):
        return self.closure()


def stepped(search, problem):
    """One step: by how much the weights moved (n,), what was asked (K, n), and the losses (K,)."""
    answers, before = Recorded(problem, search.coordinates), problem.weights
    search.step(answers)
    return problem.weights - before, answers.changes, answers.losses


def test_spsa_moves_by_the_mean_of_its_central_differences_which_are_exact_on_a_quadratic():
    problem = Quadratic()
    weights = problem.weights
    move, changes, losses = stepped(SPSA(problem.parameters, lr=0.1, sigma=0.3, samples=5), problem)
    z = changes[0::2] / 0.3
    np.testing.assert_allclose(changes[1::2], -changes[0::2])
    expected = ((losses[0::2] - losses[1::2]) / 0.6) @ z / 5
    np.testing.assert_allclose(move, -0.1 * expected, rtol=1e-9)
    np.testing.assert_allclose(move, -0.1 * (z @ problem.slope(weights)) @ z / 5, rtol=1e-9)  # eq. 2 of Spall 1992


def test_the_estimate_of_spsa_is_the_slope_in_the_mean():
    problem = Quadratic()
    weights = problem.weights
    move, _, _ = stepped(SPSA(problem.parameters, lr=1.0, sigma=1e-3, samples=2000), problem)
    error = np.linalg.norm(-move - problem.slope(weights)) / np.linalg.norm(problem.slope(weights))
    assert error < 3 * math.sqrt(11 / 2000)  # its variance is (n + 1) / samples of the slope's square


def test_fzoo_divides_one_sided_differences_along_signs_by_the_spread_of_the_losses():
    problem = Quadratic()
    incumbent = problem().item()
    move, changes, losses = stepped(FZOO(problem.parameters, lr=0.01, sigma=0.2, samples=6), problem)
    np.testing.assert_allclose(np.abs(changes), 0.2)
    assert 10 < (changes > 0).sum() < 50
    expected = (losses - incumbent) @ (changes / 0.2) / (0.2 * 6) / losses.std(ddof=1)
    np.testing.assert_allclose(move, -0.01 * expected, rtol=1e-9)


def test_es_weighs_mirrored_perturbations_by_ranks_and_follows_them_with_momentum():
    problem = Quadratic()
    search = ES(problem.parameters, lr=0.01, sigma=0.1, samples=4, momentum=0.5)
    velocity = np.zeros(10)
    for _ in range(3):
        move, changes, losses = stepped(search, problem)
        ranks = losses.argsort().argsort() / 7 - 0.5
        velocity = 0.5 * velocity + ranks @ (changes / 0.1) / 8 / 0.1
        np.testing.assert_allclose(move, -0.01 * velocity, rtol=1e-9)


def test_ranks_do_not_change_where_losses_are_bent():
    losses = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(centred_ranks(losses), centred_ranks(losses.exp()))
    assert centred_ranks(losses).sum().abs() < 1e-12
    bad = losses.clone()
    bad[3, 0] = -math.inf
    assert centred_ranks(bad)[3, 0] == 0.5  # the worst


@pytest.mark.parametrize("update", ["sgd", "adam"])
def test_eggroll_perturbs_matrices_at_rank_1_and_follows_standardised_losses(update):
    problem = Quadratic()
    search = Eggroll(problem.parameters, lr=0.01, sigma=0.1, samples=4, update=update)
    mean, square = np.zeros(10), np.zeros(10)
    for t in (1, 2, 3):
        move, changes, losses = stepped(search, problem)
        assert [np.linalg.matrix_rank(row[:6].reshape(2, 3)) for row in changes] == [1] * 8
        fitness = (losses - losses.mean()) / losses.std()
        estimate = math.sqrt(8) * (fitness @ changes) / 8  # changes are sigma E
        mean, square = 0.9 * mean + 0.1 * estimate, 0.999 * square + 0.001 * estimate**2
        by_adam = mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        np.testing.assert_allclose(move, -0.01 * (estimate if update == "sgd" else by_adam), rtol=1e-7)


def test_sep_cma_es_moves_as_the_library_alone_does():
    problem = Quadratic()
    search, alone = SepCMAES(problem.parameters, sigma=0.5, population_size=6), None
    for step in range(5):
        if alone is None:
            alone = SepCMA(problem.weights, 0.5, population_size=6)
        before = problem.weights
        _, changes, losses = stepped(search, problem)
        alone.tell(list(zip(before + changes, losses, strict=True)))
        np.testing.assert_allclose(problem.weights, alone.mean, rtol=1e-9)
        assert search.saved["cma"]["_sigma"] == pytest.approx(alone.__getstate__()["_sigma"], rel=1e-9)
        assert alone.generation == step + 1


def test_sep_cma_es_draws_from_its_distribution():
    problem = Quadratic()
    search = SepCMAES(problem.parameters, sigma=0.5, population_size=1000)
    _, changes, _ = stepped(search, problem)
    np.testing.assert_allclose(changes.std(0), 0.5, rtol=0.1)
    assert np.abs(changes.mean(0)).max() < 0.08


@pytest.mark.parametrize("rival", [SPSA, FZOO, ES, Eggroll])
def test_every_parameter_group_moves_by_a_rate_of_its_own(rival):
    def moved(second):
        problem = Quadratic()
        first, other = problem.parameters
        search = rival([{"params": [first]}, {"params": [other], "lr": second}], lr=0.01, samples=4)
        return stepped(search, problem)[0]

    slow, fast = moved(0.01), moved(0.03)
    np.testing.assert_allclose(fast, np.where(np.arange(10) < 6, 1, 3) * slow, rtol=1e-9)


@pytest.mark.parametrize("rival", [SPSA, FZOO, ES, Eggroll])
def test_directions_whose_losses_are_not_finite_do_not_count(rival):
    problem = Quadratic()
    search = rival(problem.parameters, samples=6)
    bad = iter([math.nan, math.inf, -math.inf])

    class Some(Recorded):
        def perturbed(self, count, changes):
            losses = super().perturbed(count, changes)
            losses[:3] = torch.tensor(next(bad))
            return losses

    for _ in range(3):
        before = problem.weights
        answers = Some(problem, search.coordinates)
        answers.block = 1000
        search.step(answers)
        assert np.isfinite(problem.weights).all()
        assert not np.array_equal(problem.weights, before)  # the others do


@pytest.mark.parametrize("mirrored", [False, True])
def test_directions_are_the_same_whoever_asks_in_whatever_parts(mirrored, monkeypatch):
    def draw(direction, generator):
        direction.normal_(generator=generator)

    like = torch.empty(7)
    rows = RandomDirections(draw, torch.arange(5), like).changes(0.5, mirrored)(0, 5)
    monkeypatch.setattr(random_directions, "KEPT_BYTES", 2 * 28)  # two are kept
    again = RandomDirections(draw, torch.arange(5), like)
    parts = again.changes(0.5, mirrored)
    assert torch.equal(torch.cat([parts(3, 5), parts(0, 1), parts(1, 3)]).roll(-2, 0), rows)
    assert len(again.kept) == 2
    weights = torch.randn(5)
    expected = torch.stack([again.direction(k) for k in range(5)]).T @ weights
    torch.testing.assert_close(again.combined(weights), expected)
    assert len({tuple(again.direction(k).tolist()) for k in range(5)}) == 5


def test_a_step_draws_other_directions_than_the_step_before():
    problem = Quadratic()
    search = SPSA(problem.parameters, samples=3)
    seen = [stepped(search, problem)[1] for _ in range(2)]
    assert not np.isin(seen[0], seen[1]).any()


def test_moments_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    for own, theirs in ((moments.momentum, torch.optim.SGD), (moments.adam, torch.optim.Adam)):
        w = nn.Parameter(torch.randn(6, generator=generator, dtype=torch.float64))
        ours, state = w.detach().clone(), {}
        sgd = theirs is torch.optim.SGD
        optimizer = theirs([w], lr=0.1, **(dict(momentum=0.8) if sgd else {}))
        for _ in range(5):
            w.grad = torch.randn(6, generator=generator, dtype=torch.float64)
            ours -= 0.1 * own(state, w.grad, *([0.8] if sgd else []))
            optimizer.step()
            torch.testing.assert_close(ours, w.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_moments_take_no_slope_that_cannot_be_squared(bad):
    slopes = torch.tensor([bad, 1.0])
    assert moments.momentum({}, slopes, 0.9).tolist() == [0, 1]
    assert moments.adam({}, slopes).tolist() == [0, pytest.approx(1)]


@pytest.mark.parametrize(
    ("rival", "wrong"),
    [
        (SPSA, dict(lr=0.0)), (SPSA, dict(sigma=-1.0)), (SPSA, dict(samples=0)), (FZOO, dict(samples=1)),
        (ES, dict(momentum=1.0)), (Eggroll, dict(update="muon")), (SepCMAES, dict(sigma=0.0)),
        (SepCMAES, dict(population_size=1)),
    ],
)  # fmt: skip
def test_options_out_of_range_are_refused_by_name(rival, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        rival([nn.Parameter(torch.ones(3))], **wrong)


def test_coordinates_part_rows_of_many_candidates():
    coordinates = Coordinates([torch.empty(2, 3), torch.empty(()), torch.empty(4)])
    parts = [part for _, part in coordinates.with_parts(torch.arange(22.0).view(2, 11))]
    assert [part.shape for part in parts] == [(2, 2, 3), (2,), (2, 4)]
    assert parts[1].tolist() == [6, 17]
