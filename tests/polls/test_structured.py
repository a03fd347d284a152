"""The structured path against the plain forward: exact for every tensor, layout, position kind and radius."""

import copy
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from data.sequences import IGNORE
from optimizer import PatternSearch
from pattern_search_task import masked_loss
from polls.generic import GenericPolls
from polls.make import make_polls
from polls.structured import StructuredPolls
from search.closure import OneByOne
from search.coordinates import Coordinates
from transformer import POSITIONS, DecoderOnlyTransformer

MODELS = {
    "learned": dict(),
    "rotary": dict(positions="rotary"),
    "sinusoidal": dict(positions="sinusoidal", n_layers=1, n_heads=1),
    "none": dict(positions="none", n_heads=8, d_ff=20, dropout=0.1),
    "default": dict(d_model=64, n_heads=4),
}
LAYOUTS = ("seq", "tag", "one", "ragged")


def loss(logits, batch):
    return masked_loss(logits, batch["y"])


def make_model(n_classes=3, scale=1.0, dtype=torch.float32, **sizes):
    torch.manual_seed(1)
    model = DecoderOnlyTransformer(3, n_classes, 16, **dict(d_model=16, n_layers=2, n_heads=2) | sizes)
    with torch.no_grad():
        for p in model.parameters():  # no gain may be 1 and no bias 0, or a wrong fold would pass
            p.mul_(scale).add_(0.05 * torch.randn_like(p))
    return model.to(dtype)


def make_batch(layout="seq", n_rows=9, length=16, n_classes=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(3, (n_rows, length), generator=generator)
    y = torch.randint(n_classes, (n_rows, length), generator=generator)
    if layout == "seq":
        y[:, : length // 2] = IGNORE
    elif layout == "one":
        y[:, : length - 2] = y[:, length - 1 :] = IGNORE
    elif layout == "ragged":  # any mask at all: gaps, different lengths, rows without a scored token
        y[torch.rand(y.shape, generator=generator) < 0.8] = IGNORE
        y[0], y[1, :] = IGNORE, IGNORE
        y[1, 0] = 1
    x[3], y[3] = x[2], y[2]  # equal rows are evaluated once
    return {"x": x, "y": y}


def some_of_every_tensor(coordinates, n=4, seed=3):
    generator = torch.Generator().manual_seed(seed)
    draws = [
        end - p.numel() + torch.randint(p.numel(), (n,), generator=generator)
        for p, end in zip(coordinates.parameters, coordinates.ends, strict=True)
    ]
    chosen = torch.cat(draws)
    return chosen[torch.randperm(len(chosen), generator=generator)]


def setup(layout="seq", n_rows=9, **model_options):
    model = make_model(**model_options)
    coordinates = Coordinates(model.parameters())
    batch = make_batch(layout, n_rows)
    polls = StructuredPolls(model, coordinates, loss)
    closure = polls.on(batch)
    return model, coordinates, closure, OneByOne(closure.generic.plain, coordinates)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_poll_is_exact(kind, layout, scale):
    model, coordinates, closure, plain = setup(layout, scale=scale, **MODELS[kind])
    chosen = some_of_every_tensor(coordinates, n=3)
    steps = torch.tensor([0.01, -0.1, 1.0], dtype=torch.float64).repeat(len(chosen) // 3)
    assert abs(float(closure()) - float(closure.generic.plain())) < 1e-5
    losses = closure.poll(chosen, steps)
    expected = plain.poll(chosen, steps)
    for radius in steps.unique():  # the candidates do differ from the incumbent
        assert (expected - float(closure()))[steps == radius].abs().max() > 1e-5
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-5)
    if scale > 1:  # where rounding is worse
        referee = GenericPolls(double := copy.deepcopy(model).double(), Coordinates(double.parameters()), loss)
        exact = referee.on(make_batch(layout)).poll(chosen, steps)
        torch.testing.assert_close(losses, exact, rtol=0, atol=1e-5)


@given(
    sizes=st.fixed_dictionaries(
        {
            "n_heads": st.sampled_from([1, 2, 4]),
            "n_layers": st.integers(1, 3),
            "d_ff": st.integers(1, 40),
            "positions": st.sampled_from(POSITIONS),
        }
    ),
    head_width=st.sampled_from([2, 4, 8]),
    n_rows=st.integers(4, 40),
    layout=st.sampled_from(LAYOUTS),
    data=st.data(),
)
def test_polls_and_trials_of_any_sizes_batches_and_coordinates_are_exact(sizes, head_width, n_rows, layout, data):
    sizes |= {"d_model": head_width * sizes["n_heads"], "dtype": torch.float64}
    _, coordinates, closure, plain = setup(layout, n_rows, **sizes)
    indices = st.integers(0, len(coordinates) - 1)
    chosen = torch.tensor(data.draw(st.lists(indices, min_size=1, max_size=30)))
    radius = data.draw(st.floats(0.001, 2.0))
    steps = torch.where(torch.arange(len(chosen)) % 2 == 0, radius, -radius).double()
    torch.testing.assert_close(closure.poll(chosen, steps), plain.poll(chosen, steps), rtol=0, atol=1e-10)
    changes = radius * torch.linspace(-1, 1, len(coordinates), dtype=torch.float64).roll(len(chosen))
    scales = torch.tensor([1.0, 0.5], dtype=torch.float64)
    expected = plain.trial(changes, scales)
    torch.testing.assert_close(closure.trial(changes, scales), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.slow
def test_polls_and_trials_are_exact_to_the_last_digits_in_float64(kind, layout):
    _, coordinates, closure, plain = setup(layout, dtype=torch.float64, **MODELS[kind] | dict(n_layers=3))
    chosen = some_of_every_tensor(coordinates, n=2)
    steps = torch.linspace(-1, 1, len(chosen), dtype=torch.float64)
    torch.testing.assert_close(closure.poll(chosen, steps), plain.poll(chosen, steps), rtol=0, atol=1e-12)
    scales = torch.tensor([0.3, 0.1, 0.0], dtype=torch.float64)
    changes = torch.randn(len(coordinates), dtype=torch.float64)
    torch.testing.assert_close(closure.trial(changes, scales), plain.trial(changes, scales), rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", ["blocks.0.ff.inner.weight", "blocks.1.attention_norm.weight", "norm.weight"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_polls_and_trials_are_exact_where_the_first_weights_are_frozen(first, positions):
    model = make_model(dtype=torch.float64, positions=positions)
    names = [name for name, _ in model.named_parameters()]
    coordinates = Coordinates(list(model.parameters())[names.index(first) :])
    closure = StructuredPolls(model, coordinates, loss).on(make_batch("ragged"))
    plain = OneByOne(closure.generic.plain, coordinates)
    chosen = some_of_every_tensor(coordinates)
    steps = torch.linspace(-1, 1, len(chosen), dtype=torch.float64)
    torch.testing.assert_close(closure.poll(chosen, steps), plain.poll(chosen, steps), rtol=0, atol=1e-12)
    changes, scales = torch.randn(len(coordinates), dtype=torch.float64), torch.tensor([0.3, 0.1], dtype=torch.float64)
    torch.testing.assert_close(closure.trial(changes, scales), plain.trial(changes, scales), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_perturbations_are_exact(kind, layout, dtype, monkeypatch):
    _, coordinates, closure, plain = setup(layout, dtype=dtype, **MODELS[kind])
    closure.polls.sizes = closure.polls.sizes._replace(perturbed=2**9)  # in several chunks
    rows = 0.05 * torch.randn(9, len(coordinates), dtype=dtype)
    expected = plain.perturbed(9, lambda first, last: rows[first:last])
    assert expected.unique().numel() == 9
    monkeypatch.setattr(closure.generic, "plain_moved", None)  # the structured path manages by itself
    losses = closure.perturbed(9, lambda first, last: rows[first:last])
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_perturbations_that_change_nothing_have_the_loss_of_the_incumbent(layout):
    """A row of the embedding whose token no input has moves: rounding must not make a success of it."""
    torch.manual_seed(1)
    model = DecoderOnlyTransformer(4, 3, 16, d_model=16, n_layers=2, n_heads=2)  # no input has token 3
    coordinates = Coordinates(model.parameters())
    closure = StructuredPolls(model, coordinates, loss).on(make_batch(layout))
    rows = torch.zeros(40, len(coordinates))
    rows[1:, 48:64] = torch.randn(39, 16)
    assert model.token_embedding.weight is coordinates.parameters[0]
    losses = closure.perturbed(40, lambda first, last: rows[first:last])
    assert (losses == closure()).all()


@pytest.mark.parametrize("frozen", [3, 11, -2])
def test_dense_perturbations_are_exact_where_the_first_weights_are_frozen(frozen):
    model = make_model(dtype=torch.float64)
    coordinates = Coordinates(list(model.parameters())[frozen:][::-1])
    closure = StructuredPolls(model, coordinates, loss).on(make_batch("ragged"))
    rows = 0.1 * torch.randn(5, len(coordinates), dtype=torch.float64)
    expected = OneByOne(closure.generic.plain, coordinates).perturbed(5, lambda first, last: rows[first:last])
    losses = closure.perturbed(5, lambda first, last: rows[first:last])
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)


def test_dense_perturbations_that_overflow_come_out_as_in_the_plain_forward():
    _, coordinates, closure, plain = setup()
    rows = 0.05 * torch.randn(6, len(coordinates))
    for k, bad in ((1, 1e25), (2, torch.inf), (4, torch.nan)):
        rows[k, :100] = bad
    expected = plain.perturbed(6, lambda first, last: rows[first:last])
    losses = closure.perturbed(6, lambda first, last: rows[first:last])
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_losses_of_dense_perturbations_do_not_depend_on_the_number_of_threads():
    model, coordinates, closure, _ = setup(n_rows=40, d_model=64)
    rows = 0.05 * torch.randn(40, len(coordinates))
    expected = closure.perturbed(40, lambda first, last: rows[first:last])
    spread = StructuredPolls(model, coordinates, loss, threads=3).on(make_batch(n_rows=40))
    assert torch.equal(spread.perturbed(40, lambda first, last: rows[first:last]), expected)


def test_dense_perturbations_take_no_more_memory_where_there_are_more_of_them():
    _, coordinates, closure, _ = setup()
    closure.polls.sizes = closure.polls.sizes._replace(stacked=2**16)
    asked, largest = [], []

    def changes(first, last):
        asked.append(last - first)
        return torch.full((last - first, len(coordinates)), 0.01)

    for count in (20, 100):
        with LargestTensor() as seen:
            closure.perturbed(count, changes)
        largest.append(seen.bytes)
    assert max(asked) * len(coordinates) <= 2**16
    assert largest[0] == largest[1]


@pytest.mark.parametrize(("poll", "positions"), [("opportunistic", "learned"), ("complete", "rotary")])
@pytest.mark.slow
def test_a_search_takes_the_same_decisions(poll, positions):
    ends = []
    for fast in (False, True):
        model = make_model(dtype=torch.float64, positions=positions)
        search = PatternSearch(model.parameters(), radius=0.1, poll=poll, polls_per_step=12, seed=5)
        polls = StructuredPolls(model, search.coordinates, loss)
        reports = []
        for step in range(60):
            closure = polls.on(make_batch("ragged" if step % 2 else "seq", n_rows=4, seed=step))
            candidates = closure if fast else OneByOne(closure.generic.plain, search.coordinates)
            search.step(closure if fast else closure.generic.plain, candidates)
            reports.append((search.report.accepted, search.report.evaluations))
        ends.append((reports, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert sum(accepted for accepted, _ in ends[0][0]) > 30
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


def test_a_weight_that_changes_nothing_is_exactly_as_good_as_the_incumbent():
    model, coordinates, closure, _ = setup()
    with torch.no_grad():
        model.blocks[0].ff.inner.bias[3] = -1e3  # a node that never fires
        model.token_embedding.weight[:, 0] = 0
    model.max_len = 16
    start = coordinates.ends[[p is model.blocks[0].ff.inner.weight for p in coordinates.parameters].index(True) - 1]
    dead = start + 3 * 16 + torch.arange(16)
    losses = closure.poll(dead, torch.full((16,), 0.5, dtype=torch.float64))
    assert (losses == float(closure())).all()


@pytest.mark.parametrize("options", [dict(poll="complete", search_first=True), dict(poll="opportunistic")])
def test_weights_that_change_nothing_are_not_moved_by_rounding(options):
    model = make_model()
    searched, options = [model.token_embedding.weight], dict(one_sided=True, step_lengths=[0.01]) | options
    search = PatternSearch(searched, radius=0.05, **options)
    polls = StructuredPolls(model, search.coordinates, loss)
    absent = model.token_embedding.weight[2].clone()
    for seed in range(10):
        batch = make_batch(seed=seed)
        batch["x"].clamp_(max=1)  # token 2 is in no batch
        search.step(polls.on(batch))
    assert search.saved["accepted"] >= 5
    assert torch.equal(model.token_embedding.weight[2], absent)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("factor", [30.0, 300.0])
def test_scores_beyond_the_range_of_exp_are_exact(positions, factor, monkeypatch):
    model, coordinates, closure, plain = setup(positions=positions, dtype=torch.float64)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query.weight.mul_(factor)
            block.attention.key.weight.mul_(factor)
    chosen = some_of_every_tensor(coordinates)
    steps = torch.linspace(-1, 1, len(chosen), dtype=torch.float64)
    expected = plain.poll(chosen, steps)
    monkeypatch.setattr(closure.generic, "plain_poll", None)  # the structured path manages by itself
    torch.testing.assert_close(closure.poll(chosen, steps), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("step", [1e15, 1e25, 3e38, float("inf"), float("nan")])
def test_candidates_that_overflow_come_out_as_in_the_plain_forward(step):
    _, coordinates, closure, plain = setup()
    chosen = some_of_every_tensor(coordinates)
    steps = torch.full((len(chosen),), step, dtype=torch.float64)
    steps[::2] = 0.1  # candidates beside them are not harmed
    expected = plain.poll(chosen, steps)
    torch.testing.assert_close(closure.poll(chosen, steps), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_change_of_the_stream_that_overflows_comes_out_as_in_the_plain_forward():
    model, coordinates, closure, plain = setup()
    ff = model.blocks[1].ff
    with torch.no_grad():
        ff.inner.bias[0], ff.outer.weight[:, 0] = 1e25, 0  # a huge node that nothing reads yet
    owner = [p is ff.outer.weight for p in coordinates.parameters].index(True)
    chosen = coordinates.ends[owner] - ff.outer.weight.numel() + torch.arange(16) * ff.outer.in_features
    steps = torch.full((16,), 0.1, dtype=torch.float64)
    assert closure().isfinite()
    expected = plain.poll(chosen, steps)
    torch.testing.assert_close(closure.poll(chosen, steps), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_logits_beyond_the_range_of_exp_are_exact():
    model, coordinates, closure, plain = setup()
    with torch.no_grad():
        model.head.weight.mul_(200)
    chosen = some_of_every_tensor(coordinates)
    steps = torch.full((len(chosen),), 0.1, dtype=torch.float64)
    expected = plain.poll(chosen, steps)
    assert expected.max() > 88
    torch.testing.assert_close(closure.poll(chosen, steps), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
def test_an_incumbent_beyond_all_range_is_left_to_the_plain_forward(bad):
    model, coordinates, closure, plain = setup()
    with torch.no_grad():
        model.token_embedding.weight[1, 2] = bad
    chosen = some_of_every_tensor(coordinates, n=1)
    steps = torch.full((len(chosen),), 0.1, dtype=torch.float64)
    torch.testing.assert_close(
        closure.poll(chosen, steps), plain.poll(chosen, steps), rtol=1e-5, atol=1e-5, equal_nan=True
    )
    torch.testing.assert_close(float(closure()), float(closure.generic.plain()), equal_nan=True)


def test_a_batch_without_a_scored_token_has_the_plain_loss():
    model = make_model()
    coordinates = Coordinates(model.parameters())
    batch = make_batch()
    batch["y"].fill_(IGNORE)
    closure = StructuredPolls(model, coordinates, loss).on(batch)
    assert closure().isnan()
    assert closure.poll(torch.tensor([0]), torch.tensor([0.1])).isnan().all()
    assert closure.trial(torch.full((len(coordinates),), 0.1), torch.ones(1)).isnan().all()


def test_the_caches_follow_every_move_in_place():
    model, coordinates, closure, _ = setup(n_rows=4)
    chosen = some_of_every_tensor(coordinates, n=1)
    steps = torch.full((len(chosen),), 0.2, dtype=torch.float64)
    before = closure.poll(chosen, steps)
    for coordinate in some_of_every_tensor(coordinates, n=1, seed=7).tolist():
        coordinates.move_one(coordinate, 0.3)
        fresh = StructuredPolls(model, coordinates, loss).on(make_batch(n_rows=4))
        after = closure.poll(chosen, steps)
        assert torch.equal(after, fresh.poll(chosen, steps))
        assert torch.equal(closure(), fresh())
        assert not torch.equal(after, before)
        before = after


def test_closures_of_several_batches_live_side_by_side():
    model = make_model()
    polls = StructuredPolls(model, Coordinates(model.parameters()), loss)
    first, second = polls.on(make_batch(seed=1)), polls.on(make_batch("ragged", seed=2))
    chosen, steps = torch.arange(0, 3000, 100), torch.full((30,), 0.1)
    before = first.poll(chosen, steps)
    assert not torch.equal(before, second.poll(chosen, steps))
    assert torch.equal(before, first.poll(chosen, steps))


def test_results_do_not_depend_on_the_number_of_threads():
    model, coordinates, closure, _ = setup(n_rows=40, d_model=64)
    chosen = some_of_every_tensor(coordinates)
    steps = torch.linspace(-1, 1, len(chosen), dtype=torch.float64)
    expected, before = closure.poll(chosen, steps), torch.get_num_threads()
    spread = StructuredPolls(model, coordinates, loss, threads=3).on(make_batch(n_rows=40))
    assert torch.equal(spread.poll(chosen, steps), expected)
    try:
        torch.set_num_threads(2)  # within an operation: taken back to one for the time of a poll
        assert torch.equal(closure.poll(chosen, steps), expected)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_losses_do_not_depend_on_what_else_is_asked():
    _, coordinates, closure, _ = setup()
    chosen = some_of_every_tensor(coordinates)
    steps = torch.linspace(-1, 1, len(chosen), dtype=torch.float64)
    backwards = closure.poll(chosen.flip(0), steps.flip(0)).flip(0)
    torch.testing.assert_close(closure.poll(chosen, steps), backwards, rtol=0, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operator returned."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_batch_and_the_block():
    model = make_model()
    coordinates = Coordinates(model.parameters())
    polls = StructuredPolls(model, coordinates, loss)
    polls.sizes = polls.sizes._replace(cache=2**21, chunk=2**11)
    small, large = [], []
    for n_rows, n, found in ((100, 1, small), (1000, 3, large)):
        closure = polls.on(make_batch("ragged", n_rows=n_rows))
        chosen = some_of_every_tensor(coordinates, n=n)
        with LargestTensor() as largest:
            losses = closure.poll(chosen, torch.full((len(chosen),), 0.1, dtype=torch.float64))
        assert sum(rows.bytes() for rows in closure.rows) <= 2**21
        found.append(largest.bytes)
        again = closure.poll(chosen, torch.full((len(chosen),), 0.1, dtype=torch.float64))
        assert torch.equal(losses, again)  # with what was forgotten computed anew
    assert large[0] <= 2 * small[0]


def test_a_large_batch_in_several_chunks_is_exact():
    _, coordinates, closure, plain = setup("ragged", n_rows=300)
    assert len(closure.rows) > 1
    chosen = some_of_every_tensor(coordinates, n=1)
    steps = torch.full((len(chosen),), 0.1, dtype=torch.float64)
    torch.testing.assert_close(closure.poll(chosen, steps), plain.poll(chosen, steps), rtol=0, atol=1e-5)


def test_the_chunks_of_a_poll_cost_alike():
    _, coordinates, closure, _ = setup(d_model=64, n_heads=4)
    closure.polls.sizes = closure.polls.sizes._replace(chunk=2**13)
    chosen = torch.randperm(len(coordinates), generator=torch.Generator().manual_seed(0))[:525]
    in_front = chosen < len(coordinates) // 2
    chosen = torch.cat([chosen[in_front][:10], chosen[~in_front]])  # most in the last block, as the default search asks
    costs = []

    def counted(evaluate, chunks):
        for chunk in chunks:
            with FlopCounterMode(display=False) as flops:
                yield evaluate(chunk)
            costs.append(flops.get_total_flops())

    closure.polls.map = counted
    closure.poll(chosen, torch.full((len(chosen),), 0.1, dtype=torch.float64))
    assert len(costs) > 1
    assert max(costs) < 1.5 * min(costs)


def test_the_chunks_hold_every_candidate_once_and_not_too_many_of_those_that_cost_little():
    _, _, closure, _ = setup()
    polls, rows = closure.polls, closure.rows[0]
    polls.sizes = polls.sizes._replace(chunk=2**10)
    counts = np.array([3000 if group.stage == len(polls.stages) - 1 else 1 for group in polls.groups])
    chunks = list(polls.chunks(rows, counts))
    some = [number for part, _ in chunks for number in range(part.start, part.stop)]
    assert some == list(range(counts.sum()))
    assert all(own.stop - own.start <= 4 * 2**10 / rows.x.numel() for own, _ in chunks)
    assert [sum(own.stop - own.start for _, own in groups) for _, groups in chunks] == [
        own.stop - own.start for own, _ in chunks
    ]


def test_any_subset_and_order_of_the_parameters_can_be_searched():
    model = make_model()
    parameters = list(model.parameters())[::-3]
    coordinates = Coordinates(parameters)
    closure = StructuredPolls(model, coordinates, loss).on(make_batch())
    chosen = some_of_every_tensor(coordinates)
    steps = torch.full((len(chosen),), 0.1, dtype=torch.float64)
    expected = OneByOne(closure.generic.plain, coordinates).poll(chosen, steps)
    torch.testing.assert_close(closure.poll(chosen, steps), expected, rtol=0, atol=1e-5)


def test_a_training_model_is_evaluated_without_dropout_and_left_as_it_was():
    model, coordinates, closure, _ = setup(dropout=0.5)
    model.train()
    versions, weights = [p._version for p in model.parameters()], copy.deepcopy(model.state_dict())
    chosen, steps = some_of_every_tensor(coordinates), torch.full((144,), 0.1, dtype=torch.float64)
    steps[0] = float("inf")  # the plain forward answers too
    losses = closure.poll(chosen, steps)
    assert torch.equal(losses[1:], closure.poll(chosen, steps)[1:])
    assert model.training
    assert versions == [p._version for p in model.parameters()]
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_bad_questions_are_refused():
    _, coordinates, closure, _ = setup()
    with pytest.raises(IndexError, match=r"coordinate \d+ is out of range"):
        closure.poll(torch.tensor([len(coordinates)]), torch.tensor([0.1]))
    with pytest.raises(ValueError, match="empty block"):
        closure.poll(torch.tensor([], dtype=torch.long), torch.tensor([]))
    with pytest.raises(ValueError, match="not a parameter"):
        StructuredPolls(make_model(), coordinates, loss)


def test_the_factory_takes_the_fast_path_only_where_it_is_exact():
    model = make_model()
    coordinates = Coordinates(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(make_polls(model, coordinates, loss), StructuredPolls)
    with pytest.warns(UserWarning, match="no structured polls.*go through vmap"):
        assert isinstance(make_polls(model, coordinates, lambda logits, batch: logits.square().mean()), GenericPolls)

    class Other(DecoderOnlyTransformer):
        pass

    model = Other(3, 3, 16, 8)
    with pytest.warns(UserWarning, match="Other"):
        assert isinstance(make_polls(model, Coordinates(model.parameters()), loss), GenericPolls)
