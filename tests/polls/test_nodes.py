"""Slopes of nodes from the losses of single tokens: against a plain forward with hooks, and against autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_structured import LAYOUTS, loss, make_batch, make_model

from data.sequences import IGNORE
from optimizer import PatternSearch
from polls import node_kinds
from polls.nodes import NodePolls
from search.base import seeded
from search.coordinates import Coordinates


def setup(layout="seq", **options):
    model = make_model(**options)
    coordinates = Coordinates(model.parameters())
    batch = make_batch(layout)
    return model, coordinates, batch, NodePolls(model, coordinates, loss).on(batch)


def gradient(model, batch):
    loss(model(batch["x"]), batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def cosine(a, b):
    return float(F.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize(
    ("layout", "positions", "samples", "least"),
    [
        ("seq", "learned", 40, 0.85),
        ("ragged", "rotary", 40, 0.85),
        ("one", "none", 150, 0.7),
    ],  # the last has more noise
)
@pytest.mark.slow
def test_samples_of_every_node_average_to_the_gradient(layout, positions, samples, least, monkeypatch):
    monkeypatch.setattr(node_kinds, "FAINT", 0.0)  # without bias: every tie counts
    model, coordinates, batch, closure = setup(layout, positions=positions, dtype=torch.float64)
    mean, nodes = torch.zeros(len(coordinates), dtype=torch.float64), torch.arange(closure.n_nodes)
    for seed in range(samples):
        slopes, known = closure.nodes(nodes, torch.full((len(nodes),), 1e-3), seeded(seed, 0))
        assert known.all()
        mean += slopes / samples
    expected, start = gradient(model, batch), 0
    for (name, _), end in zip(model.named_parameters(), coordinates.ends, strict=True):
        if expected[start:end].norm() > 1e-9:
            assert cosine(mean[start:end], expected[start:end]) > least, name
        start = end


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_sample_of_a_node_behind_the_last_attention_is_its_slope(layout):
    model, coordinates, batch, closure = setup(layout, dtype=torch.float64)
    found, _ = closure.nodes(torch.arange(closure.n_nodes), torch.full((closure.n_nodes,), 1e-6), seeded(0, 0))
    expected, start = gradient(model, batch), 0
    for (name, _), end in zip(model.named_parameters(), coordinates.ends, strict=True):
        if name.startswith(("blocks.1.ff", "norm", "head", "blocks.1.attention.value", "blocks.1.attention.out")):
            torch.testing.assert_close(found[start:end], expected[start:end], atol=1e-6, rtol=1e-4, msg=name)
        start = end


class PlainAttention:
    """Stands in for torch's attention: softmax written out, which can be looked into and moved at the n-th call."""

    def __init__(self, at=None, scores=0.0, mixed=0.0):
        self.at, self.scores, self.mixed, self.seen = at, scores, mixed, []

    def __call__(self, query, key, value, is_causal, dropout_p):
        moved = len(self.seen) == self.at
        scores = query @ key.mT / query.shape[-1] ** 0.5 + (self.scores if moved else 0.0)
        weights = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1) == 1, -torch.inf).softmax(-1)
        self.seen.append((query, key, weights))
        return weights @ value + (self.mixed if moved else 0.0)


def count_ties(ties):
    return ties / (ties + 0.05 * ties.amax(-1, keepdim=True))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.0.ff.inner", "output"),
        ("blocks.0.ff.outer", "output"),
        ("blocks.0.attention_norm", "output"),
        ("blocks.0.attention.value", "mixed"),
        ("blocks.1.attention.value", "mixed"),
        ("blocks.0.attention.key", "scores"),
        ("blocks.1.attention.key", "scores"),
    ],
)
def test_a_sample_is_what_the_plain_forward_gives_with_the_node_moved_at_every_token(name, kind, monkeypatch):
    """The readable reference: the node is moved by a hook, one forward gives the losses of all tokens."""
    model, coordinates, _, other = setup(dtype=torch.float64)
    x = torch.randint(3, (5, 16), generator=torch.Generator().manual_seed(0)).unique(dim=0)
    batch = {"x": x, "y": torch.where(torch.arange(16) < 8, IGNORE, x.roll(1, 1))}
    closure, node, step, head, size = other.polls.on(batch), 3, 0.1, 0, 8
    (rows,) = closure.rows
    order = [int((x == row).all(1).nonzero()) for row in rows.x]  # the closure sorts the rows
    batch = {key: value[order] for key, value in batch.items()}
    module, block = model.get_submodule(name), int(name.split(".")[1])
    number = next(n for n, p in enumerate(coordinates.parameters) if p is module.weight)
    nodes = (closure.node_parameter == number).nonzero().flatten()[[node]]
    slopes, known = closure.nodes(nodes, torch.tensor([step]), seeded(7, 0))
    sign = torch.randint(2, (2, len(x), 1, 16), generator=seeded(7, 0))[:, :, 0] * 2.0 - 1  # (2, B, T)
    reads = []

    def token_losses(change, attention):
        def move(_, inputs, out):
            reads.append(inputs[0])
            if kind == "output":
                out = out.clone()
                out[..., node] += change
            return out

        handle = module.register_forward_hook(move)
        monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
        with torch.no_grad():
            losses = F.cross_entropy(model(batch["x"]).mT, batch["y"], ignore_index=IGNORE, reduction="none")
        handle.remove()
        return losses

    plain, moved = PlainAttention(), PlainAttention(block)
    before = token_losses(0.0, plain)
    (_, _, first), (query, key, second) = plain.seen
    query, key, weights = plain.seen[block]
    if kind == "mixed":
        moved.mixed = torch.zeros(5, 2, 16, size, dtype=torch.float64)
        moved.mixed[:, head, :, node] = step * sign[0]
    elif kind == "scores":
        moved.scores = torch.zeros(5, 2, 16, 16, dtype=torch.float64)
        moved.scores[:, head] = step * sign[0][:, :, None] * sign[1][:, None]
    gain = (token_losses(step * sign[0], moved) - before) / (batch["y"] != IGNORE).sum()  # (B, T)
    own = torch.eye(16, dtype=torch.float64)
    ties = own + second.square().sum(1)  # (B, loss at a token, what it looks at)
    if name.endswith("norm"):  # in front of both attentions
        ties = ties @ (own + first.square().sum(1))
    reach = own if block == 1 else count_ties(ties)
    credit = (gain[:, None] @ reach)[:, 0] * sign[0] / step  # (B, T)
    read = reads[0]
    if kind == "scores":
        pairs = credit[:, :, None] * sign[1][:, None] * count_ties(weights[:, head].square())
        pairs = pairs - weights[:, head] * pairs.sum(-1, keepdim=True)
        scale = size**-0.5
        expected = {
            "key": torch.einsum("bqk,bqi,bkf->if", pairs, query[:, head] * scale, read),
            "query": torch.einsum("bqk,bki,bqf->if", pairs, key[:, head] * scale, read),
        }
        parameter = {part: model.get_submodule(name.replace("key", part)).weight for part in expected}
    elif kind == "mixed":
        expected, parameter = {"": torch.einsum("bqk,bkf,bq->f", weights[:, head], read, credit)}, {"": module.weight}
    elif module.weight.ndim == 1:  # a norm: its gain reads the normed component
        normed = F.layer_norm(read, read.shape[-1:])[..., node]
        expected, parameter = {"": (credit * normed).sum()[None]}, {"": module.weight}
    else:
        expected, parameter = {"": torch.einsum("bt,bti->i", credit, read)}, {"": module.weight}
    found = slopes.where(known, torch.nan)
    for part, value in expected.items():
        n = next(n for n, p in enumerate(coordinates.parameters) if p is parameter[part])
        place = found[coordinates.ends[n] - coordinates.parameters[n].numel() : coordinates.ends[n]]
        place = place.view_as(parameter[part])[: size if kind == "scores" else None]
        torch.testing.assert_close(place if kind == "scores" else place[node].reshape(-1), value, atol=1e-9, rtol=1e-6)
    if getattr(module, "bias", None) is not None:
        bias = next(n for n, p in enumerate(coordinates.parameters) if p is module.bias)
        slope = found[coordinates.ends[bias] - len(module.bias) + node]
        torch.testing.assert_close(slope, credit.sum(), atol=1e-9, rtol=1e-6)


def test_threads_and_rows_at_a_time_make_no_difference():
    model, coordinates, batch, closure = setup("ragged")
    other = NodePolls(model, coordinates, loss, threads=2).on(batch)
    nodes = torch.randperm(closure.n_nodes)
    steps = torch.full((len(nodes),), 0.05)
    for a, b in zip(*(c.nodes(nodes, steps, seeded(3, 0)) for c in (closure, other)), strict=True):
        assert torch.equal(a, b)


def test_the_search_learns_from_nodes_alone_and_resumes_exactly():
    model, _, batch, _ = setup()
    first = copy.deepcopy(model)

    def search(model, steps, state=None):
        optimizer = PatternSearch(
            model.parameters(), radius=0.05, poll="complete", polls_per_step=0, one_sided=True, nodes_per_step=40,
            step_lengths=[0.01, 0.005], fade=None, contraction=1.0,
        )  # fmt: skip
        if state:
            optimizer.load_state_dict(state)
        closure = NodePolls(model, optimizer.coordinates, loss).on(batch)
        for _ in range(steps):
            optimizer.step(closure)
        return optimizer

    whole = search(model, 12)
    assert whole.evaluations <= 12 * 43  # the loss, the nodes, two step lengths; fewer where a pass over the nodes ends
    with torch.no_grad():
        assert loss(model(batch["x"]), batch) < loss(first(batch["x"]), batch) - 0.01
    halves = search(first, 5)
    halves = search(first, 7, copy.deepcopy(halves.state_dict()))
    assert halves.evaluations == whole.evaluations
    for a, b in zip(first.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_pass_over_the_nodes_is_shared_out_evenly_and_polls_each_once():
    model, _, _, closure = setup()
    n, polled = closure.n_nodes, []
    optimizer = PatternSearch(model.parameters(), polls_per_step=0, nodes_per_step=n // 3 + 2, step_lengths=[0.01])
    credit = closure.nodes
    closure.nodes = lambda nodes, *args: polled.append(nodes.tolist()) or credit(nodes, *args)
    for _ in range(3):
        optimizer.step(closure)
    assert max(map(len, polled)) - min(map(len, polled)) <= 1
    assert sorted(node for nodes in polled for node in nodes) == list(range(n))


@pytest.mark.parametrize("budget", [1, 5, 9, 10])
def test_a_budget_is_never_exceeded_by_nodes(budget):
    model, _, _, closure = setup()
    options = dict(polls_per_step=0, nodes_per_step=8, step_lengths=[0.01], max_evaluations=budget)
    optimizer = PatternSearch(model.parameters(), **options)
    for _ in range(3):
        optimizer.step(closure)
    assert optimizer.evaluations == budget
    assert optimizer.stopped_by == "max_evaluations"


def test_frozen_tensors_stay_and_the_others_get_slopes_of_their_own():
    model, _, batch, _ = setup()
    trained = list(model.blocks[1].parameters())
    frozen = [p.requires_grad_(False) for p in model.parameters() if all(p is not other for other in trained)]
    before = [p.clone() for p in frozen]
    search = PatternSearch(model.parameters(), radius=0.05, polls_per_step=0, nodes_per_step=999, step_lengths=[0.01])
    closure = NodePolls(model, search.coordinates, loss).on(batch)
    slopes, known = closure.nodes(torch.arange(closure.n_nodes), torch.full((closure.n_nodes,), 0.05), seeded(0, 0))
    assert len(slopes) == sum(p.numel() for p in trained)
    assert known.all()
    losses = [search.step(closure) for _ in range(3)]
    assert losses[-1] < losses[0]
    assert all(map(torch.equal, frozen, before))


def test_a_node_out_of_range_and_a_closure_without_nodes_are_refused():
    model, _, batch, closure = setup()
    with pytest.raises(IndexError, match=f"node {closure.n_nodes} is out of range"):
        closure.nodes(torch.tensor([0, closure.n_nodes]), torch.ones(2), seeded(0, 0))
    optimizer = PatternSearch(model.parameters(), polls_per_step=0, nodes_per_step=4, step_lengths=[0.01])
    with pytest.raises(ValueError, match="answers `nodes`"):
        optimizer.step(lambda: loss(model(batch["x"]), batch))
    with pytest.raises(ValueError, match="needs step_lengths"):
        PatternSearch(model.parameters(), nodes_per_step=4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_asked_about_drawn_rows_is_what_autograd_says_of_these_rows_weighed_by_their_factors(layout):
    """The readable reference: the loss of every row, weighed, by the plain forward; a node's slope by autograd."""
    model, coordinates, _, closure = setup(layout, dtype=torch.float64)
    drawn = closure.drawn(3, seeded(5, 0))
    assert 0 < sum(len(rows.x) for rows in drawn.rows) <= 3 < sum(len(rows.x) for rows in closure.rows)
    expected = 0.0
    for rows in drawn.rows:
        for row, (at, target, weight) in enumerate(zip(rows.at, rows.target, rows.weight, strict=True)):
            logits = model(rows.x[row : row + 1])[0, at]
            losses = F.cross_entropy(logits, target, reduction="none")
            expected = expected + losses @ weight
    torch.testing.assert_close(drawn(), expected.detach(), atol=1e-9, rtol=1e-9)
    gradient = torch.autograd.grad(expected, model.head.weight)[0]
    nodes = torch.arange(drawn.n_nodes)
    slopes, _ = drawn.nodes(nodes, torch.full((len(nodes),), 1e-6), seeded(0, 0))
    number = next(n for n, p in enumerate(coordinates.parameters) if p is model.head.weight)
    found = slopes[coordinates.ends[number] - gradient.numel() : coordinates.ends[number]]
    torch.testing.assert_close(found.view_as(gradient), gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drawn_rows_are_the_batch_in_the_mean(layout):
    _, _, _, closure = setup(layout, dtype=torch.float64)
    losses = [float(closure.drawn(4, seeded(seed, 0))()) for seed in range(400)]
    assert sum(losses) / len(losses) == pytest.approx(float(closure()), rel=0.02)
    assert max(losses) > min(losses)


def test_a_batch_with_no_more_rows_is_taken_whole():
    _, _, _, closure = setup()
    n = sum(len(rows.x) for rows in closure.rows)
    assert closure.drawn(n, seeded(0, 0)) is closure
    assert closure.drawn(n - 1, seeded(0, 0)) is not closure


def test_nodes_are_polled_on_drawn_rows_and_the_search_step_is_judged_by_the_batch():
    model, _, batch, _ = setup()
    options = dict(polls_per_step=0, nodes_per_step=8, rows_per_step=3, step_lengths=[0.01])
    search = PatternSearch(model.parameters(), **options)
    closure = NodePolls(model, search.coordinates, loss).on(batch)
    asked = []

    def drawn(rows, generator):
        asked.append(rows)
        some = type(closure).drawn(closure, rows, generator)
        del some.drawn, some.nodes
        some.trial = lambda *_: pytest.fail("judged by drawn rows")
        return some

    closure.drawn, closure.nodes = drawn, lambda *_: pytest.fail("nodes polled on the whole batch")
    search.step(closure)
    assert asked == [3]
    assert search.evaluations == 1 + 8 + 1


def test_rows_per_step_out_of_range_or_without_nodes_is_refused():
    w = [torch.nn.Parameter(torch.ones(3))]
    for options in (dict(rows_per_step=0, nodes_per_step=1, step_lengths=[0.1]), dict(rows_per_step=4)):
        with pytest.raises(ValueError, match=r"rows_per_step=\d must be at least 1 and needs nodes_per_step"):
            PatternSearch(w, **options)
