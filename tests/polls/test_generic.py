"""The generic path: any module, exact against the plain closure, and honest about what it cannot do."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import demos
from torch import nn

from optimizer import PatternSearch
from polls.generic import GenericPolls
from polls.make import make_polls
from search.closure import OneByOne
from search.coordinates import Coordinates


def loss(outputs, batch):
    return F.cross_entropy(outputs.flatten(0, -2), batch["y"].flatten())


class Tied(nn.Module):
    """Reads and writes with the same matrix."""

    def __init__(self):
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.mix(self.embedding(x)).relu())


class Decoder(nn.Module):
    """torch's own transformer layers under a causal mask."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 8), nn.Linear(8, 5)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=self.head.weight.dtype)
        return self.head(self.layers(self.embedding(x), mask=mask, is_causal=True))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.rnn, self.head = nn.Embedding(5, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.rnn(self.embedding(x))[0])


class Foreign(nn.Module):
    """The encoder and decoder of Lightning's demos, written by others; its token embedding is its head here."""

    def __init__(self):
        super().__init__()
        self.model = demos.Transformer(vocab_size=5, ninp=8, nhead=2, nhid=16, nlayers=1)
        self.model.decoder.weight = self.model.embedding.weight

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=self.model.decoder.weight.dtype)
        return self.model(x, x, mask).view(*x.shape, -1)


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 5))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


MODULES = {"mlp": (mlp, (7, 6)), "cnn": (cnn, (7, 3, 6, 6)), "tied": (Tied, None), "decoder": (Decoder, None)}
MODULES["foreign"] = (Foreign, None)


def setup(make, shape=None, dtype=torch.float32):
    torch.manual_seed(0)
    module = make().to(dtype)
    x = torch.randint(5, (7, 6)) if shape is None else torch.randn(shape, dtype=dtype)
    batch = {"x": x, "y": torch.randint(5, (7, 6) if shape is None else (7,))}
    coordinates = Coordinates(module.parameters())
    closure = GenericPolls(module, coordinates, loss).on(batch)
    return module, coordinates, closure, OneByOne(closure.plain, coordinates)


def block(coordinates, n=60):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(len(coordinates), (n,), generator=generator), torch.linspace(-1, 1, n, dtype=torch.float64)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polls_and_trials_are_exact(name, dtype):
    _, coordinates, closure, plain = setup(*MODULES[name], dtype)
    chosen, steps = block(coordinates)
    expected = plain.poll(chosen, steps)
    assert expected.unique().numel() > 20
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(closure.poll(chosen, steps), expected, rtol=0, atol=tolerance)
    scales = torch.tensor([0.3, 0.1, 0.0], dtype=torch.float64)
    changes = torch.randn(len(coordinates), dtype=torch.float64)
    torch.testing.assert_close(closure.trial(changes, scales), plain.trial(changes, scales), rtol=0, atol=tolerance)
    assert closure.polls.refusal is None


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_perturbations_are_exact(name, dtype):
    _, coordinates, closure, plain = setup(*MODULES[name], dtype)
    rows = 0.1 * torch.randn(14, len(coordinates), dtype=dtype)
    rows[3], rows[4, 0] = torch.inf, 1e25  # left to the plain forward; those beside them are not harmed
    closure.polls.sizes = closure.polls.sizes._replace(vmapped=5 * closure.tokens)  # 5, 5 and 4 at a time
    expected = plain.perturbed(14, lambda first, last: rows[first:last])
    assert expected[expected.isfinite()].unique().numel() >= 12
    losses = closure.perturbed(14, lambda first, last: rows[first:last])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(losses, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert closure.polls.refusal is None


@pytest.mark.parametrize("name", ["mlp", "tied", "decoder"])
@pytest.mark.slow
def test_a_search_takes_the_same_decisions(name):
    ends = []
    for generic in (False, True):
        module, coordinates, closure, plain = setup(*MODULES[name], torch.float64)
        search = PatternSearch(module.parameters(), radius=0.3, polls_per_step=40, seed=3)
        reports = []
        for _ in range(15):
            search.step(closure if generic else closure.plain, closure if generic else plain)
            reports.append((search.report.accepted, search.report.evaluations))
        ends.append((reports, torch.cat([p.detach().flatten() for p in coordinates.parameters])))
    assert sum(accepted for accepted, _ in ends[0][0]) > 40
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


def test_a_module_in_training_is_evaluated_in_eval_mode_and_left_as_it_was():
    for name in ("mlp", "cnn"):
        module, coordinates, closure, plain = setup(*MODULES[name])
        module.train()
        before = {key: value.clone() for key, value in module.state_dict().items()}
        chosen, steps = block(coordinates)
        torch.testing.assert_close(closure.poll(chosen, steps), plain.poll(chosen, steps), rtol=0, atol=1e-5)
        assert all(m.training for m in module.modules())
        assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_what_vmap_cannot_do_is_done_one_by_one_with_one_warning():
    _, coordinates, closure, plain = setup(Recurrent)
    chosen, steps = block(coordinates, 10)
    expected = plain.poll(chosen, steps)
    with pytest.warns(UserWarning, match="Recurrent cannot be vectorised.*gru"):
        losses = closure.poll(chosen, steps)
    assert torch.equal(losses, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the next batch says nothing
        assert torch.equal(closure.polls.on(closure.batch).poll(chosen, steps), expected)
    assert closure.block == 1


def test_dense_perturbations_that_vmap_cannot_do_are_done_one_by_one_with_one_warning():
    _, coordinates, closure, plain = setup(Recurrent)
    rows = 0.1 * torch.randn(6, len(coordinates))
    expected = plain.perturbed(6, lambda first, last: rows[first:last])
    with pytest.warns(UserWarning, match="Recurrent cannot be vectorised.*gru"):
        losses = closure.perturbed(6, lambda first, last: rows[first:last])
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(closure.perturbed(6, lambda first, last: rows[first:last]), losses)


@pytest.mark.parametrize("name", ["mlp", "decoder"])  # the decoder's attention is computed in another way under vmap
def test_a_candidate_that_changes_nothing_is_exactly_as_good_as_the_incumbent(name):
    module, coordinates, closure, _ = setup(*MODULES[name])
    linear = module[0] if name == "mlp" else module.layers.layers[0].linear1
    with torch.no_grad():
        linear.bias[2] = -1e3  # a node that never fires
    owner = [p is linear.weight for p in coordinates.parameters].index(True)
    row = coordinates.ends[owner] - linear.weight.numel() + torch.arange(2, 3) * linear.in_features
    losses = closure.poll(row + torch.arange(linear.in_features), torch.full((linear.in_features,), 0.5).double())
    assert (losses == float(closure())).all()


@pytest.mark.parametrize("step", [1e25, 3e38, float("inf"), float("nan")])
def test_candidates_that_overflow_come_out_as_in_the_plain_forward(step):
    for make, shape in MODULES.values():
        _, coordinates, closure, plain = setup(make, shape)
        chosen, _ = block(coordinates)
        steps = torch.full((60,), step, dtype=torch.float64)
        steps[::2] = 0.1
        expected = plain.poll(chosen, steps)
        torch.testing.assert_close(closure.poll(chosen, steps), expected, rtol=0, atol=1e-5, equal_nan=True)


def test_bad_questions_are_refused():
    module, coordinates, closure, _ = setup(*MODULES["mlp"])
    one = torch.ones(1)
    with pytest.raises(IndexError, match="out of range"):
        closure.poll(torch.tensor([len(coordinates)]), one)
    with pytest.raises(IndexError, match="coordinate -1"):
        closure.poll(torch.tensor([-1]), one)
    with pytest.raises(ValueError, match="one for each coordinate"):
        closure.trial(one, one)
    with pytest.raises(ValueError, match="empty block"):
        closure.poll(torch.empty(0, dtype=torch.long), torch.empty(0))
    with pytest.raises(ValueError, match="must both be"):
        closure.poll(torch.tensor([1, 2]), one)
    with pytest.raises(ValueError, match="at least one step length"):
        closure.trial(torch.ones(len(coordinates)), torch.empty(0))
    with pytest.raises(ValueError, match="count=0 must be at least 1"):
        closure.perturbed(0, lambda first, last: torch.ones(last - first, len(coordinates)))
    with pytest.raises(ValueError, match=r"changes\(0, 4\) \(4, 1\) must be"):
        closure.perturbed(4, lambda first, last: torch.ones(last - first, 1))
    with pytest.raises(ValueError, match="not a parameter of Sequential"):
        GenericPolls(module, Coordinates([nn.Parameter(one)]), loss)
    module.count = nn.Parameter(torch.ones(2, dtype=torch.long), requires_grad=False)
    with pytest.raises(ValueError, match="only floating types"):
        GenericPolls(module, Coordinates(module.parameters()), loss)


def test_a_forward_that_draws_random_numbers_is_refused():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.randn(5)

    _, _, closure, _ = setup(lambda: Noisy(6, 5), (7, 6))
    with pytest.raises(ValueError, match="two evaluations of Noisy at the same weights differ"):
        closure.poll(torch.tensor([0]), torch.ones(1))


def test_an_error_of_the_module_itself_is_shown():
    _, _, closure, _ = setup(*MODULES["mlp"])
    closure = closure.polls.on({"x": torch.randn(7, 9), "y": torch.zeros(7, dtype=torch.long)})
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        closure.poll(torch.tensor([0]), torch.ones(1))


def test_what_recurrent_layers_get_is_said_before_the_first_poll():
    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.cell, self.head = torch.nn.Embedding(3, 4), torch.nn.LSTM(4, 4), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.cell(self.token(x))[0])

    module = Recurrent()
    with pytest.warns(UserWarning, match="evaluated one by one.*recurrent layers"):
        polls = make_polls(module, coordinates := Coordinates(module.parameters()), loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing else to say
        closure = polls.on({"x": torch.randint(3, (4, 6)), "y": torch.randint(3, (4, 6))})
        losses = closure.poll(torch.arange(10), torch.full((10,), 0.1, dtype=torch.float64))
    expected = OneByOne(closure.plain, coordinates).poll(torch.arange(10), torch.full((10,), 0.1, dtype=torch.float64))
    assert torch.equal(losses, expected)
