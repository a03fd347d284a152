"""What every search promises on a fixed batch, whatever its options, weights and losses: drawn at random."""

import copy
import io
import math
import zlib
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from optimizer import PatternSearch
from search.closure import OneByOne

SHAPES = [(), (1,), (0,), (3,), (2, 2), (3, 0), (2, 3)]
LOSSES = st.one_of(
    st.floats(-3, 3, width=32),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 1e300, 0.0, 1e-40]),
)


def bits(parameters):
    """All weights as bytes: NaN equals NaN, and 0.0 is not -0.0."""
    return b"".join(p.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for p in parameters)


class Landscape:
    """A closure: a bowl with its lowest point at 1, or a loss that is drawn anew for every pattern of bits.

    Counts its calls, and raises in those named in `raising`.
    """

    def __init__(self, parameters, losses=None, raising=()):
        self.parameters, self.losses, self.raising, self.calls = parameters, losses, raising, 0

    def look(self):
        """The loss here, without a call."""
        if self.losses:
            return self.losses[zlib.crc32(bits(self.parameters)) % len(self.losses)]
        return sum(((p.detach().double() - 1) ** 2).sum().item() for p in self.parameters)

    def __call__(self):
        self.calls += 1
        if self.calls in self.raising:
            raise ArithmeticError("as it was told")
        return torch.tensor(self.look(), dtype=torch.float64)


class Answering(OneByOne):
    """Answers in blocks, and for nodes too: node u is the parameter u with weights, and its slopes are random."""

    def __init__(self, closure, coordinates, block=1):
        super().__init__(closure, coordinates)
        self.block = block
        self.node_parameter = torch.tensor([i for i, p in enumerate(coordinates.parameters) if p.numel()])
        self.n_nodes = len(self.node_parameter)

    def __call__(self):
        return self.closure()

    def nodes(self, nodes, steps, signs):
        assert len(nodes) == len(steps)
        for _ in nodes:
            self.closure()
        owner = self.coordinates.owner(torch.arange(len(self.coordinates)))
        return torch.randn(len(owner), generator=signs), torch.isin(owner, self.node_parameter[nodes])

    def drawn(self, rows, generator):
        torch.rand(rows, generator=generator)
        return self


@st.composite
def parameter_groups(draw):
    """Groups of parameters, at least one weight in all; some are frozen, not contiguous, or of no element."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    shapes = draw(st.lists(st.lists(st.sampled_from(SHAPES), max_size=3), min_size=1, max_size=3))
    if not any(math.prod(shape) for group in shapes for shape in group):
        shapes[0] = [(1,)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scale = draw(st.sampled_from([0.1, 1.0, 100.0]))  # at 100, bfloat16 does not see a small step
    groups = []
    for group in shapes:
        tensors = [(scale * torch.randn(shape[::-1], generator=generator)).to(dtype) for shape in group]
        params = [
            nn.Parameter(t.permute(tuple(range(t.ndim))[::-1]), requires_grad=draw(st.booleans())) for t in tensors
        ]
        own = {"radius": draw(st.sampled_from([0.01, 0.3, 2.0])), "max_radius": draw(st.sampled_from([0.5, math.inf]))}
        own |= {"contraction": draw(st.sampled_from([1.0, 0.5, 0.9]))}
        groups.append({"params": params, **(own if draw(st.booleans()) else {})})
    if not any(p.requires_grad and p.numel() for p in weights(groups)):
        next(p for p in weights(groups) if p.numel()).requires_grad_(True)
    return groups


@st.composite
def searches(draw, **fixed):
    """Options of a search of some groups, as they could stand in a config, and the groups."""
    groups = draw(parameter_groups())
    n = sum(p.numel() for p in weights(groups) if p.requires_grad)
    options = {
        "poll": draw(st.sampled_from(["complete", "opportunistic"])),
        "one_sided": draw(st.booleans()),
        "polls_per_step": draw(st.none() | st.integers(1, n)),
        "step_lengths": draw(st.lists(st.sampled_from([0.01, 0.3, 1.0]), max_size=2)),
        "join_improving": draw(st.booleans()),
        "memory": draw(st.sampled_from([0.0, 0.5, 0.9])),
        "scale_memory": draw(st.sampled_from([None, 0.0, 0.9])),
        "fade": draw(st.sampled_from([None, 0.5, 10.0])),
        "contraction": draw(st.sampled_from([1.0, 0.5])),
        "expansion": draw(st.sampled_from([1.0, 2.0])),
        "min_radius": draw(st.sampled_from([0.0, 0.2])),
        "max_evaluations": draw(st.none() | st.integers(1, 20)),
        "target_loss": draw(st.none() | st.floats(-1, 3)),
        "seed": draw(st.integers(0, 3)),
    }
    if options["step_lengths"] and draw(st.booleans()):
        options |= {"nodes_per_step": draw(st.integers(1, 3)), "polls_per_step": draw(st.integers(0, n))}
        options |= {"rows_per_step": draw(st.none() | st.integers(1, 4))}
    if options["step_lengths"]:
        options["weight_decay"] = draw(st.sampled_from([0.0, 0.5]))
    if options["step_lengths"] and (options | fixed)["max_evaluations"]:
        options["linear_decay"] = draw(st.booleans())
    if options["step_lengths"] and draw(st.booleans()):
        options |= {"search_first": True, "tolerance": draw(st.sampled_from([None, 0.0, 0.1, 2.0]))}
    return groups, options | fixed


def weights(groups):
    return [p for group in groups for p in group["params"]]


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


def step(search, landscape, block=1):
    return search.step(Answering(landscape, search.coordinates, block))


def assert_moves_improve(report, landscape, before, tolerance=None):
    """Where a step that began with the weights `before` has come to: lower, no higher than tolerated, or nowhere."""
    assert same(report.loss_after, landscape.look())
    if report.accepted:
        assert math.isfinite(report.loss_after)
        if tolerance is not None and math.isfinite(report.loss_before):
            assert report.loss_after <= report.loss_before + tolerance * abs(report.loss_before)
        else:
            assert report.loss_after < report.loss_before or not math.isfinite(report.loss_before)
    else:
        assert bits(landscape.parameters) == before
        assert same(report.loss_after, report.loss_before)


@given(searches(), st.lists(LOSSES, max_size=7))
def test_a_step_never_worsens_counts_exactly_and_stops_at_its_limits(drawn_search, losses):
    groups, options = drawn_search
    landscape, search = Landscape(weights(groups), losses), PatternSearch(groups, **options)
    for _ in range(6):
        before, calls, spent, known = bits(landscape.parameters), landscape.calls, search.evaluations, landscape.look()
        loss, report = step(search, landscape), search.report
        assert same(loss, report.loss_after)
        assert same(known, report.loss_before)
        assert_moves_improve(report, landscape, before, options.get("tolerance"))
        assert report.evaluations == landscape.calls - calls == search.evaluations - spent
        assert options["max_evaluations"] is None or search.evaluations <= options["max_evaluations"]
        assert report.done <= report.planned
        for group in search.param_groups:
            assert 0 < group["radius"] <= max(group["max_radius"], 2.0)
        reached = {
            "target_loss": options["target_loss"] is not None and -math.inf < loss <= options["target_loss"],
            "max_evaluations": search.evaluations == options["max_evaluations"],
            "min_radius": all(group["radius"] < group["min_radius"] for group in search.param_groups),
        }
        assert search.stopped_by == next((limit for limit, is_reached in reached.items() if is_reached), None)
        if search.stopped_by:
            before, calls = bits(landscape.parameters), landscape.calls
            step(search, landscape)
            assert (bits(landscape.parameters), landscape.calls) == (before, calls)
            return


@given(searches(), st.lists(LOSSES, max_size=7), st.sets(st.integers(1, 50), min_size=1, max_size=3))
def test_a_closure_that_raises_leaves_the_last_incumbent_and_the_search_goes_on(drawn_search, losses, raising):
    groups, options = drawn_search
    landscape, search = Landscape(weights(groups), losses, raising), PatternSearch(groups, **options)
    for _ in range(8):
        before, calls, spent = bits(landscape.parameters), landscape.calls, search.evaluations
        try:
            step(search, landscape)
        except ArithmeticError:
            # the call that raised is not counted, nor is what was answered in the same question
            assert search.report.evaluations == search.evaluations - spent < landscape.calls - calls
            if landscape.calls == calls + 1:  # before the step knew where it is
                assert bits(landscape.parameters) == before
                continue
        else:
            assert search.report.evaluations == landscape.calls - calls
        if landscape.calls > calls:
            assert_moves_improve(search.report, landscape, before, options.get("tolerance"))


@given(searches(), st.lists(LOSSES, max_size=7), st.integers(0, 5))
def test_a_saved_search_goes_on_as_if_it_had_not_been(drawn_search, losses, steps_before):
    groups, options = drawn_search
    landscape, search = Landscape(weights(groups), losses), PatternSearch(groups, **options)
    for _ in range(steps_before):
        step(search, landscape)
    in_memory, file = search.state_dict(), io.BytesIO()
    torch.save(in_memory, file)
    file.seek(0)
    followers = []
    for state in (torch.load(file, weights_only=True), in_memory):
        own = copy.deepcopy(groups)
        follower = PatternSearch(own, **options)
        follower.load_state_dict(state)
        followers.append((follower, Landscape(weights(own), losses)))
    for _ in range(3):
        step(search, landscape)
        for follower, its_landscape in followers:
            step(follower, its_landscape)
            assert bits(its_landscape.parameters) == bits(landscape.parameters)
            assert follower.state["search"] | {"seconds": 0} == search.state["search"] | {"seconds": 0}
            assert follower.report.accepted == search.report.accepted
            radii = [[group["radius"] for group in each.param_groups] for each in (follower, search)]
            assert radii[0] == radii[1]


@given(searches(max_evaluations=None), st.lists(LOSSES, max_size=7), st.integers(2, 40))
def test_answers_in_blocks_lead_to_the_same_weights(drawn_search, losses, block):
    groups, options = drawn_search
    twins = copy.deepcopy(groups)
    ends = []
    for own, size in ((groups, 1), (twins, block)):
        landscape, search = Landscape(weights(own), losses), PatternSearch(own, **options)
        for _ in range(4):
            step(search, landscape, size)
        ends.append((bits(landscape.parameters), search.evaluations, search.stopped_by))
    assert ends[0] == ends[1]


@given(searches(target_loss=None, min_radius=0.0), st.lists(LOSSES, max_size=7), st.integers(1, 20), st.integers(1, 9))
def test_the_budget_of_evaluations_is_used_to_the_last_one_and_never_exceeded(drawn_search, losses, budget, block):
    groups, options = drawn_search
    search = PatternSearch(groups, **options | {"max_evaluations": budget})
    landscape = Landscape(weights(groups), losses)
    for _ in range(budget):
        step(search, landscape, block)
        assert search.evaluations <= budget
    assert search.evaluations == budget
    assert search.stopped_by == "max_evaluations"


@given(
    searches(target_loss=None, min_radius=0.0, max_evaluations=None), st.lists(LOSSES, max_size=7), st.integers(1, 9)
)
def test_the_budget_of_seconds_is_looked_at_before_every_question(drawn_search, losses, budget):
    groups, options = drawn_search
    landscape, search = Landscape(weights(groups), losses), PatternSearch(groups, **options, max_seconds=budget)

    def clock():
        return float(landscape.calls)  # each call takes a second

    with mock.patch("search.budget.time.perf_counter", clock):
        for _ in range(budget):
            assert search.stopped_by is None or landscape.calls >= budget
            step(search, landscape)
    assert search.stopped_by == "max_seconds"
    largest = max(1, len(options["step_lengths"]), options.get("nodes_per_step") or 0)
    assert landscape.calls < budget + largest


def test_a_tensor_given_twice_is_moved_as_often_and_put_back():
    w = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        search = PatternSearch([w, w], radius=0.1, poll="complete", step_lengths=[0.1, 0.5])
    landscape = Landscape([w])
    for offset in (3.0, 0.0, -3.0):
        with torch.no_grad():
            w += offset
        before = bits([w])
        step(search, landscape)
        assert_moves_improve(search.report, landscape, before)


def test_weights_that_share_their_memory_are_put_back():
    w = torch.ones(2, 3)
    search = PatternSearch(map(nn.Parameter, [w, w.T, w[0]]), radius=0.1, poll="complete", step_lengths=[0.1, 0.5])
    landscape = Landscape([w], losses=[1.0])
    step(search, landscape)
    step(search, landscape)
    assert torch.equal(w, torch.ones(2, 3))


@pytest.mark.parametrize("options", [{}, {"one_sided": True, "step_lengths": [0.1], "poll": "complete"}])
def test_a_group_added_in_the_middle_of_a_pass_is_searched(options):
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    landscape = Landscape([first, second])
    search = PatternSearch([first], radius=0.125, polls_per_step=2, **options)
    step(search, landscape)
    search.add_param_group({"params": [second], "radius": 0.25})
    for _ in range(20):
        step(search, landscape)
    assert landscape.look() < 1
    assert second.min() > 0


def test_a_loss_below_all_numbers_reaches_no_target():
    search = PatternSearch([nn.Parameter(torch.zeros(2))], target_loss=0.5)
    search.step(lambda: torch.tensor(-math.inf))
    assert search.stopped_by is None


def test_both_sides_of_a_weight_are_remembered_also_if_they_are_polled_in_one_block():
    def remembered(block):
        w = nn.Parameter(torch.zeros(5))
        search = PatternSearch([w], radius=0.5, poll="complete", step_lengths=[1e-9], memory=0.5, scale_memory=None)
        step(search, Landscape([w]), block)
        return {name: values.tolist() for name, values in search.state["slopes"].items()}

    assert remembered(1)["visits"] == [2] * 5
    assert remembered(1) == remembered(3) == remembered(16)


def test_losses_too_large_to_be_squared_do_not_stay_in_the_memory():
    w = nn.Parameter(torch.zeros(4))
    search = PatternSearch([w], radius=0.05, poll="complete", one_sided=True, step_lengths=[0.05])
    for height in (1e30, 1e300, 1.0):
        search.step(lambda height=height: height * (w.detach().double() - 1).square().sum())
    assert search.report.search_accepted


def test_groups_without_a_weight_are_refused():
    with pytest.raises(ValueError, match="no weights to search"):
        PatternSearch([{"params": []}, {"params": [nn.Parameter(torch.ones(0))]}])
