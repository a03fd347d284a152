"""The optimizer against the textbook: test functions, radii, counts, budgets, exact restore, state."""

import copy
import inspect
import io
import math

import pytest
import torch
from torch import nn

from optimizer import PatternSearch
from pattern_search_task import masked_loss
from search.closure import OneByOne
from search.options import RECOMMENDED
from search.slopes import SlopeMemory
from transformer import DecoderOnlyTransformer


def sphere(w):
    return (w**2).sum()


def rosenbrock(w):
    return 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2


def run(search, closure, steps=10_000):
    for _ in range(steps):
        search.step(closure)
        if search.stopped_by is not None:
            break
    return search


@pytest.fixture(params=["opportunistic", "complete"])
def poll(request):
    return request.param


VARIANTS = {
    "opportunistic": dict(poll="opportunistic"),
    "complete": dict(poll="complete"),
    "one_sided": dict(poll="opportunistic", one_sided=True),
    "fading": dict(poll="complete", one_sided=True, step_lengths=[0.1, 0.05], contraction=1.0),
    "joined": dict(poll="complete", one_sided=True, step_lengths=[0.1, 0.05], join_improving=True, contraction=1.0),
    "shorter": dict(poll="complete", step_lengths=[0.1, 0.05], linear_decay=True, max_evaluations=9999),
    "tolerant": dict(poll="complete", step_lengths=[0.1, 0.05], search_first=True, tolerance=0.1, contraction=1.0),
    "unscaled": dict(poll="complete", step_lengths=[0.1], scale_memory=None, fade=None, memory=0.0),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


def test_sphere_is_solved_within_a_known_number_of_evaluations(poll):
    w = nn.Parameter(torch.tensor([3.3, -2.7, 1.1, 0.4], dtype=torch.float64))
    search = run(PatternSearch([w], radius=1.0, min_radius=1e-4, poll=poll), lambda: sphere(w))
    assert search.stopped_by == "min_radius"
    assert w.abs().max() < 1e-4
    assert search.evaluations < 700


@pytest.mark.slow
def test_rosenbrock_is_solved_within_a_known_number_of_evaluations(poll):
    w = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    search = PatternSearch([w], radius=0.5, min_radius=1e-9, expansion=2.0, poll=poll, target_loss=1e-4)
    run(search, lambda: rosenbrock(w), steps=50_000)
    assert search.stopped_by == "target_loss"
    assert rosenbrock(w) < 1e-4
    assert search.evaluations < 60_000


def test_the_radius_halves_exactly_when_a_complete_poll_fails(poll):
    w = nn.Parameter(torch.zeros(3))
    search = PatternSearch([w], radius=1.0, poll=poll)
    for k in range(1, 6):  # the start is the minimum: every poll fails
        search.step(lambda: sphere(w))
        assert search.param_groups[0]["radius"] == 0.5**k
        assert search.evaluations == 7 * k  # 6 directions and the incumbent


def test_a_poll_with_a_success_keeps_the_radius():
    w = nn.Parameter(torch.tensor([10.0, 0.0]))
    search = PatternSearch([w], radius=1.0)
    search.step(lambda: sphere(w))
    assert search.report.accepted == 1
    assert search.param_groups[0]["radius"] == 1.0


def test_expansion_multiplies_the_radius_up_to_its_maximum():
    w = nn.Parameter(torch.tensor([100.0]))
    search = PatternSearch([w], radius=1.0, expansion=2.0, max_radius=3.0)
    radii = []
    for _ in range(3):
        search.step(lambda: sphere(w))
        radii.append(search.param_groups[0]["radius"])
    assert radii == [2.0, 3.0, 3.0]


def test_a_step_polls_a_part_and_the_poll_goes_on_in_the_next_step():
    w = nn.Parameter(torch.zeros(5))
    search = PatternSearch([w], radius=1.0, polls_per_step=4)
    radii = []
    for _ in range(3):
        search.step(lambda: sphere(w))
        radii.append(search.param_groups[0]["radius"])
    assert radii == [1.0, 1.0, 0.5]  # 4 + 4 + 2 directions make one pass
    assert search.evaluations == 10 + 3  # and one at the incumbent of each step


def test_every_signed_coordinate_is_polled_once_a_pass_in_a_seeded_order():
    def seen(seed):
        w = nn.Parameter(torch.zeros(6))
        polled = []

        def closure():
            polled.append(tuple(w.tolist()))
            return torch.tensor(0.0)

        PatternSearch([w], radius=1.0, seed=seed).step(closure)
        return polled[1:]

    directions = seen(0)
    assert len(set(directions)) == len(directions) == 12
    assert all(sum(map(abs, d)) == 1 for d in directions)
    assert directions == seen(0) != seen(1)


@pytest.mark.parametrize("one_sided", [False, True])
def test_groups_are_polled_by_their_shares_each_in_its_own_order(one_sided):
    sizes, share = (6, 4, 30), 0.5
    groups = [{"params": [nn.Parameter(torch.zeros(n))]} for n in sizes]
    search = PatternSearch(groups, one_sided=one_sided, polls_per_step=8, last_group_share=share, step_lengths=[0.1])
    sides = 1 if one_sided else 2
    seen, _ = search.directions.take(0, 480, search.slopes)
    polled = [seen[(seen >= start) & (seen < start + n)] for start, n in zip((0, 6, 10), sizes, strict=True)]
    assert [len(part) for part in polled] == [144, 96, 240]  # half to the last; the others by their sizes
    for n, part in zip(sizes, polled, strict=True):  # every coordinate in turn, and never twice before all were
        turns = part[::sides].split(n)
        assert all(len(turn.unique()) == len(turn) for turn in turns)
        assert all(torch.equal(turn, turns[0][: len(turn)]) for turn in turns)
    for cut in (1, 7, 100):  # the order does not depend on how many are asked for at a time
        parts = [search.directions.take(a, min(a + cut, 480), search.slopes)[0] for a in range(0, 480, cut)]
        assert torch.equal(torch.cat(parts), seen)


def test_a_share_that_would_poll_a_weight_twice_in_a_step_is_refused():
    groups = [{"params": [nn.Parameter(torch.zeros(n))]} for n in (100, 4)]
    refused = pytest.raises(ValueError, match=r"share=0\.9 of polls_per_step=8 polls a group of 4 weights more")
    with refused:
        PatternSearch(groups, polls_per_step=8, last_group_share=0.9)
    PatternSearch(groups[1:], polls_per_step=8, last_group_share=0.9)  # all of a single group, once each


def test_an_accepted_direction_saves_the_way_back():
    w = nn.Parameter(torch.tensor([5.0]))
    search = PatternSearch([w], radius=1.0, seed=0)
    search.step(lambda: sphere(w))
    forward_first = search.evaluations == 2  # incumbent and the first sign
    assert search.evaluations == (2 if forward_first else 3)
    assert search.report.accepted == 1
    assert search.report.done == search.report.planned == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "tolerant"])
def test_the_incumbent_never_gets_worse_on_a_fixed_batch(name):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), torch.randn(16, 4)
    search = PatternSearch(net.parameters(), radius=0.3, **VARIANTS[name], polls_per_step=7)
    losses = []
    for _ in range(200):
        search.step(lambda: ((net(x) - x.prod(1, keepdim=True)) ** 2).mean())
        losses += [search.report.loss_before, search.report.loss_after]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.7 * losses[0]


def test_losses_of_different_batches_are_never_compared():
    w = nn.Parameter(torch.tensor([1.0]))
    search = PatternSearch([w], radius=0.5, polls_per_step=2, contraction=0.9)
    for offset in (0.0, 1000.0, 0.0, 1000.0):  # a stale best of 0 would reject every move at 1000
        before = sphere(w).item()
        search.step(lambda offset=offset: sphere(w) + offset)
        assert sphere(w) < before or before == 0


def test_evaluation_counts_are_exact(variant):
    w, calls = nn.Parameter(torch.randn(7, generator=torch.Generator().manual_seed(0))), 0

    def closure():
        nonlocal calls
        calls += 1
        return sphere(w)

    search = PatternSearch([w], radius=0.7, **variant, polls_per_step=5)
    total = 0
    for _ in range(30):
        search.step(closure)
        total += search.report.evaluations
        assert search.evaluations == calls == total


@pytest.mark.parametrize("budget", [1, 2, 9, 50])
def test_the_evaluation_budget_is_never_exceeded(variant, budget):
    w, calls = nn.Parameter(torch.randn(7, generator=torch.Generator().manual_seed(0))), 0

    def closure():
        nonlocal calls
        calls += 1
        return sphere(w)

    search = run(PatternSearch([w], radius=0.7, **variant | dict(max_evaluations=budget)), closure)
    assert calls == search.evaluations == budget
    assert search.stopped_by == "max_evaluations"
    search.step(closure)  # a stopped search does nothing
    assert calls == budget


def test_the_time_budget_ends_a_step_within_a_long_poll():
    w = nn.Parameter(torch.zeros(100_000))
    search = PatternSearch([w], radius=0.7, max_seconds=0.2)
    search.step(lambda: sphere(w))
    assert search.stopped_by == "max_seconds"
    assert search.report.done < search.report.planned


def test_weights_are_restored_bit_for_bit_after_a_rejected_poll(variant):
    w = nn.Parameter(torch.randn(50))
    before = w.detach().clone()
    PatternSearch([w], radius=0.1, **variant).step(lambda: torch.tensor(1.0))
    assert torch.equal(w, before)


def test_weights_are_restored_when_the_closure_raises():
    w = nn.Parameter(torch.randn(5))
    before, calls = w.detach().clone(), iter([1.0, 2.0])
    with pytest.raises(StopIteration):
        PatternSearch([w], radius=0.1).step(lambda: torch.tensor(next(calls)))
    assert torch.equal(w, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_worse_than_any(poll, bad):
    w = nn.Parameter(torch.tensor([2.0, 2.0]))
    search = PatternSearch([w], radius=1.0, poll=poll)
    for _ in range(4):
        search.step(lambda: sphere(w) if w[0] == 2 else torch.tensor(bad))
    assert w.tolist() == [2.0, 0.0]


def test_a_search_leaves_a_start_whose_loss_is_not_finite(variant):
    w = nn.Parameter(torch.tensor([2.0]))
    search = PatternSearch([w], radius=1.0, **variant)
    search.step(lambda: torch.tensor(math.nan) if w[0] == 2 else sphere(w))
    assert w.item() in (1.0, 3.0)


def test_each_group_has_its_own_radius():
    still, moving = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.tensor([9.0]))
    groups = [{"params": [still], "radius": 1.0}, {"params": [moving], "radius": 2.0, "expansion": 2.0}]
    search = PatternSearch(groups)
    search.step(lambda: sphere(still) + sphere(moving))
    assert [g["radius"] for g in search.param_groups] == [0.5, 4.0]
    assert moving.item() == 7.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floating_types(dtype):
    w = nn.Parameter(torch.tensor([3.0, -2.0], dtype=dtype))
    run(PatternSearch([w], radius=1.0, min_radius=0.1), lambda: sphere(w))
    assert w.tolist() == [0.0, 0.0]


def test_frozen_and_strided_parameters():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    strided = nn.Parameter(torch.ones(2, 3).t())  # not contiguous: flat views of it do not exist
    run(PatternSearch([frozen, strided], radius=1.0, min_radius=0.3), lambda: sphere(frozen) + sphere(strided))
    assert sphere(strided) == 0
    assert frozen.tolist() == [1.0, 1.0]  # left alone, as gradient optimizers do


def test_no_gradient_is_ever_allocated():
    w = nn.Parameter(torch.ones(3))

    def closure():
        assert not torch.is_grad_enabled()
        return sphere(w)

    PatternSearch([w], radius=0.1).step(closure)
    assert w.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("steps_before", [1, 7, 20])
def test_a_saved_search_goes_on_exactly_where_it_was(variant, steps_before):
    def make():
        w = nn.Parameter(torch.linspace(-1, 1, 9))
        return w, PatternSearch([w], radius=0.3, **variant, polls_per_step=4, seed=3)

    def steps(w, search, n):
        for _ in range(n):
            search.step(lambda: ((w - torch.arange(9) / 7) ** 2).sum())

    w, search = make()
    steps(w, search, steps_before)
    file = io.BytesIO()
    torch.save({"w": w, "search": search.state_dict()}, file)
    steps(w, search, 25)

    file.seek(0)
    saved = torch.load(file, weights_only=True)  # plain values only
    w2, search2 = make()
    with torch.no_grad():
        w2.copy_(saved["w"])
    search2.load_state_dict(saved["search"])
    steps(w2, search2, 25)
    assert torch.equal(w, w2)
    assert search2.evaluations == search.evaluations
    assert search2.param_groups[0]["radius"] == search.param_groups[0]["radius"]


def test_a_copied_search_goes_on_alone():
    w = nn.Parameter(torch.ones(3))
    search = PatternSearch([w], radius=0.1, polls_per_step=2)
    search.step(lambda: sphere(w))
    twin = copy.deepcopy(search)
    twin.step(lambda: torch.tensor(0.0))
    assert twin.evaluations == search.evaluations + 3


class ManyAtOnce(OneByOne):
    """Answers as `OneByOne` does, and asks for large blocks, so that the search meets the same losses in batches."""

    block = 16

    def __call__(self):
        return self.closure()


@pytest.mark.slow
def test_polls_of_many_candidates_take_the_same_decisions(variant):
    def trajectory(wrap):
        torch.manual_seed(1)
        net, x = nn.Linear(6, 3).double(), torch.randn(20, 6).double()
        search = PatternSearch(net.parameters(), radius=0.2, **variant, polls_per_step=11)
        seen = []
        for step in range(60):
            search.step(wrap(lambda step=step: ((net(x + step % 3) - x[:, :3]) ** 2).mean(), search))
            seen.append((search.report.loss_after, search.report.accepted, search.evaluations))
        return seen

    assert trajectory(lambda f, search: ManyAtOnce(f, search.coordinates)) == trajectory(lambda f, search: f)


@pytest.mark.slow
def test_a_search_step_follows_the_slopes_of_all_coordinates_at_once():
    w = nn.Parameter(torch.full((100,), 5.0, dtype=torch.float64))
    search = PatternSearch([w], radius=0.1, **VARIANTS["fading"])
    for _ in range(30):
        search.step(lambda: sphere(w))
        assert search.report.search_accepted
    assert search.evaluations == 30 * (1 + 100 + 2)
    assert (w < 2.6).all()  # 30 steps of .1 on every coordinate; single moves would have changed 30 of the 100


def test_the_best_of_the_step_lengths_is_taken():
    w = nn.Parameter(torch.full((100,), 0.1, dtype=torch.float64))
    search = PatternSearch([w], radius=0.01, poll="complete", one_sided=True, step_lengths=[0.5, 0.1, 0.05], memory=0)
    search.step(lambda: sphere(w))  # .5 leads far beyond the minimum, .1 to it, and .05 half way
    assert search.report.search_accepted
    assert search.evaluations == 1 + 100 + 3
    assert torch.allclose(w, torch.zeros_like(w))


def test_a_move_within_the_tolerance_that_raises_the_loss_is_no_success():
    w = nn.Parameter(torch.zeros(2))
    options = dict(poll="complete", one_sided=True, search_first=True, step_lengths=[3.0], tolerance=100.0)
    search = PatternSearch([w], radius=0.5, expansion=2.0, **options)
    for _ in range(3):
        radius = search.param_groups[0]["radius"]
        search.step(lambda: ((w - 0.3) ** 2).sum())
    assert search.report.search_accepted
    assert search.report.loss_after > search.report.loss_before
    assert search.param_groups[0]["radius"] < radius


@pytest.mark.parametrize(("tolerance", "reached"), [(0.0, -0.9), (0.7, -1.4), (None, 0.1)])
def test_a_tolerance_takes_the_longest_step_that_it_allows(tolerance, reached):
    w = nn.Parameter(torch.tensor([1.1], dtype=torch.float64))
    options = dict(radius=1e-6, poll="complete", one_sided=True, memory=0, contraction=1.0, search_first=True)
    search = PatternSearch([w], step_lengths=[3.0, 2.5, 2.0, 1.0], tolerance=tolerance, **options)
    for _ in range(2):  # the first gives the slope
        w.data.fill_(1.1)
        search.step(lambda: sphere(w))
    assert w.item() == pytest.approx(reached, abs=1e-5)


def test_all_moves_of_a_poll_that_improve_are_made_together():
    start, radius = [1.0, -1.0, 0.02, 2.0], 0.25  # a step of .25 improves on all weights but the third, on one side
    w = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    options = dict(poll="complete", step_lengths=[1e-9], join_improving=True, contraction=1.0)
    search = PatternSearch([w], radius=radius, **options)
    search.step(lambda: sphere(w))
    assert search.report.search_accepted
    assert w.tolist() == pytest.approx([0.75, -0.75, 0.02, 1.75])


def test_joined_moves_are_shortened_with_the_step():
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def valley():  # lower along x = y up to x + y = 1: one weight alone improves, both together overshoot
        x, y = w
        return 3 * torch.relu(x + y - 1) - x - y + (x - y) ** 2 / 2

    options = dict(poll="complete", step_lengths=[2e-9, 1e-9], join_improving=True, contraction=1.0)
    search = PatternSearch([w], radius=1.0, **options)
    search.step(valley)
    assert search.evaluations == 1 + 4 + 2
    assert search.report.search_accepted
    assert w.tolist() == pytest.approx([0.5, 0.5])


def test_moves_get_shorter_with_the_evaluations_and_slopes_fade_more_slowly():
    w, slope = nn.Parameter(torch.zeros(3, dtype=torch.float64)), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    options = dict(radius=1e-3, poll="complete", contraction=1.0, step_lengths=[0.1], memory=0.5, fade=10.0)
    search, moves = PatternSearch([w], linear_decay=True, max_evaluations=32, **options), []
    for _ in range(4):
        before = w.detach().clone()
        search.step(lambda: (slope * w).sum())  # a step: 1 + 6 + 1 evaluations
        moves.append((before - w.detach()).tolist())
    assert moves == [pytest.approx([0.1 * part, -0.1 * part, 0.1 * part]) for part in (1, 0.75, 0.5, 0.25)]
    assert search.slopes.fade == pytest.approx(40)
    assert search.stopped_by == "max_evaluations"
    search.step(lambda: (slope * w).sum())  # which does nothing any more
    assert search.slopes.fade is None


def test_weight_decay_takes_a_part_of_the_matrices_off_in_proportion_to_the_step():
    def moved(**options):
        matrix, vector = nn.Parameter(torch.tensor([[4.0, -2.0, 0.0]])), nn.Parameter(torch.tensor([5.0]))
        options |= dict(radius=1e-3, poll="complete", contraction=1.0, step_lengths=[0.1], linear_decay=True)
        search = PatternSearch([matrix, vector], max_evaluations=20, **options)
        for _ in range(2):  # 10 evaluations each: the second step is half as long
            search.step(lambda: 1000 * matrix.sum() + vector.sum())
        assert search.report.search_accepted
        return matrix.detach(), vector.detach()

    (plain, its_vector), (decayed, vector) = moved(), moved(weight_decay=0.2)
    taken_off = torch.tensor([[4.0, -2.0, 0.0]]) * 0.02
    taken_off += (torch.tensor([[4.0, -2.0, 0.0]]) - 0.1 - taken_off) * 0.01
    assert torch.allclose(plain - decayed, taken_off, atol=1e-5)
    assert torch.equal(vector, its_vector)


def test_weight_decay_concerns_the_matrices_that_are_named():
    def moved(**options):
        torch.manual_seed(0)
        model = DecoderOnlyTransformer(4, 2, 8, d_model=16, n_layers=1, n_heads=2)
        groups = PatternSearch.parameter_groups(model, list(model.parameters()), **options)
        search = PatternSearch(groups, step_lengths=[0.1], radius=1e-3, poll="complete", **options)
        search.step(lambda: sum(p.sum() for p in model.parameters()))
        assert search.report.search_accepted
        return dict(model.named_parameters())

    plain, decayed = moved(), moved(weight_decay=0.2, weight_decay_in=["blocks.*.ff.*", "head.weight"])
    named = {"blocks.0.ff.inner.weight", "blocks.0.ff.outer.weight", "head.weight"}
    assert {name for name, p in plain.items() if not torch.allclose(p, decayed[name], atol=1e-3)} == named


def test_polls_of_one_side_take_the_side_remembered_as_downhill():
    w = nn.Parameter(torch.tensor([1.0, -1.0, 1.0]))
    polled = []

    def closure():
        polled.append(w.detach().clone())
        return sphere(w) * 0 + (w * torch.tensor([1.0, -1.0, 1.0])).sum()

    search = PatternSearch([w], radius=0.125, poll="complete", one_sided=True, contraction=1.0, step_lengths=[1e-3])
    search.step(closure)
    for _ in range(3):
        start = w.detach().clone()
        polled.clear()
        search.step(closure)
        moves = torch.stack(polled[1:4]) - start
        assert moves.sum(0).sign().tolist() == [-1, 1, -1]


def test_remembered_slopes_are_bias_corrected_means_scaled_and_faded():
    memory = SlopeMemory({}, 3, torch.zeros(1, dtype=torch.float64), memory=0.5, scale_memory=0.9, fade=10.0)
    first, second = torch.tensor([2.0, -4.0], dtype=torch.float64), torch.tensor([6.0, -4.0], dtype=torch.float64)
    where, both = torch.tensor([2, 0]), torch.tensor([True, True])
    memory.learn(first, both, where)
    assert memory.direction.tolist() == pytest.approx([1, 0, -1])  # one slope: its sign, whatever its size
    memory.age()
    assert memory.direction.tolist() == pytest.approx([math.exp(-0.1), 0, -math.exp(-0.1)])
    memory.learn(second, both, where)
    mean = (0.5 * 0.5 * 2 + 0.5 * 6) / (1 - 0.5**2)
    square = (0.9 * 0.1 * 4 + 0.1 * 36) / (1 - 0.9**2)
    assert memory.direction.tolist() == pytest.approx([1, 0, -mean / math.sqrt(square)])
    assert memory.uphill(torch.arange(3)).tolist() == [-1, 0, 1]


def test_slopes_that_are_not_finite_are_not_remembered():
    memory = SlopeMemory({}, 2, torch.zeros(1), memory=0.5, scale_memory=0.9, fade=None)
    memory.learn(torch.tensor([math.nan, -math.inf]), torch.tensor([True, True]))
    assert memory.direction.tolist() == [0, 0]
    memory.learn(torch.tensor([0.0, 5.0]), torch.tensor([True, False]))  # flat: no direction, and no division by zero
    assert memory.direction.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0}, "radius=0 must be above 0"),
        ({"radius": math.nan}, "radius=nan must be above 0"),
        ({"contraction": 0}, r"contraction=0 must lie in \(0, 1\]"),
        ({"step_lengths": [0.1, 0]}, "must be above 0"),
        ({"tolerance": -0.1, "search_first": True}, "must be at least 0"),
        ({"tolerance": 0.1}, "needs search_first=True"),
        ({"memory": 1.0}, r"memory=1.0 must lie in \[0, 1\)"),
        ({"scale_memory": -0.1}, r"scale_memory=-0.1 must lie in \[0, 1\)"),
        ({"fade": 0}, "fade=0 must be above 0 steps"),
        ({"weight_decay": -1}, "weight_decay=-1 must be at least 0"),
        (
            {"weight_decay": 1, "weight_decay_in": ["blocks.*"], "last_group_share": 0.5, "polls_per_step": 1},
            r"weight_decay_in=\['blocks.\*'\] and last_group_share=0.5 each part the weights",
        ),
        ({"linear_decay": True, "step_lengths": [0.1]}, "linear_decay=True needs step_lengths, and max_evaluations"),
        ({"linear_decay": True, "max_evaluations": 9}, "linear_decay=True needs step_lengths, and max_evaluations"),
        ({"expansion": 0.9}, "expansion=0.9 must be at least 1"),
        ({"poll": "random"}, "poll=random is not known"),
        ({"polls_per_step": 0}, "polls_per_step=0 must be at least 1"),
        ({"polls_per_step": 3}, "polls_per_step=3 is more than the 2 directions of 1 weights"),
        ({"last_group_share": 0.5}, "last_group_share=0.5 must lie in .* and needs polls_per_step"),
        ({"last_group_share": 1.0, "polls_per_step": 1}, "last_group_share=1.0 must lie in"),
        ({"max_evaluations": 0}, "max_evaluations=0 must be at least 1"),
        ({"max_seconds": 0}, "max_seconds=0 must be above 0"),
    ],
)
def test_options_outside_their_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PatternSearch([nn.Parameter(torch.ones(1))], **options)


def test_integer_parameters_are_refused():
    with pytest.raises(ValueError, match=r"int64 cannot be searched"):
        PatternSearch([torch.ones(2, dtype=torch.int64)])


def test_the_recommended_search_is_that_of_the_yaml(compose_config):
    cfg = compose_config("optimizer=pattern_search").optimizer
    given = {key: value for key, value in cfg.items() if not key.startswith("_")}
    search, defaults = inspect.signature(PatternSearch).parameters, RECOMMENDED
    assert given == {
        key: defaults.get(key, list(d) if isinstance(d := search[key].default, tuple) else d) for key in given
    }


def test_one_call_makes_the_recommended_search_of_a_transformer(model, parity):
    torch.manual_seed(0)
    deeper = DecoderOnlyTransformer(parity.vocab_size, parity.n_classes, parity.max_len, 16, n_layers=2, n_heads=2)
    for module, groups in ((model, 1), (deeper, 2)):
        search = PatternSearch.recommended(module, lambda logits, batch: masked_loss(logits, batch["y"]))
        assert len(search.param_groups) == groups  # of two blocks, the last one gets most of the polls
        batch = next(iter(parity.train_dataloader()))
        closure = search.polls.on(batch)
        before = float(closure())
        for _ in range(5):
            search.step(search.polls.on(batch))
        assert search.report.loss_after < before
    alone = PatternSearch.recommended(model)
    with pytest.raises(AssertionError, match="recommended"):
        alone.polls.on(batch)


def test_a_small_model_is_polled_less_by_the_recommended_search():
    linear = nn.Linear(2, 1)
    search = PatternSearch.recommended(linear)
    search.step(lambda: sphere(linear.weight) + sphere(linear.bias))
    assert search.report.planned == 3
    assert search.evaluations == 7
