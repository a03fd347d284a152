"""The model: causal, every parameter felt by the loss, sizes as named, bad sizes refused."""

import pytest
import torch
import torch.nn.functional as F

from state_tracking_data import StateTrackingDataModule
from transformer import POSITIONS, Attention, DecoderOnlyTransformer, rotate, sinusoids


def make(**options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=5, n_classes=3, max_len=12, d_model=16, n_layers=2, n_heads=2)
    return DecoderOnlyTransformer(**sizes | options).eval()


@pytest.mark.parametrize("positions", POSITIONS)
def test_logits_at_a_position_do_not_depend_on_what_is_right_of_it(positions):
    model = make(positions=positions)
    x = torch.randint(5, (4, 12))
    logits = model(x)
    for t in range(11):
        changed = x.clone()
        changed[:, t + 1 :] = torch.randint(5, changed[:, t + 1 :].shape)
        assert torch.allclose(model(changed)[:, : t + 1], logits[:, : t + 1], atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_positions_make_the_order_count(positions):
    x, y = torch.tensor([[1, 2, 3, 0]]), torch.tensor([[2, 1, 3, 0]])
    model = make(positions=positions)
    assert not torch.allclose(model(x)[:, -1], model(y)[:, -1], atol=1e-4)
    blind = make(positions="none", n_layers=1)  # one layer of causal attention sees a bag of tokens
    assert torch.allclose(blind(x)[:, -1], blind(y)[:, -1], atol=1e-5)


def test_no_parameter_of_the_default_model_is_dead():
    data = StateTrackingDataModule()
    model = make(vocab_size=data.vocab_size, n_classes=data.n_classes, max_len=data.max_len)
    split = data.splits["train"]
    F.cross_entropy(model(split.x).flatten(0, 1), split.y.flatten()).backward()
    for name, p in model.named_parameters():
        dead = (p.grad == 0).sum().item()
        assert dead == 0 or ("ff." in name and dead < 0.5 * p.numel()), f"{name}: {dead} weights cannot change the loss"


def test_the_default_model_has_the_size_that_the_readme_names():
    data = StateTrackingDataModule()
    model = DecoderOnlyTransformer(data.vocab_size, data.n_classes, data.max_len)
    assert (data.vocab_size, data.n_classes, data.max_len) == (3, 2, 16)
    assert sum(p.numel() for p in model.parameters()) == 101_314


def test_the_first_embeddings_have_the_spread_that_is_asked_for():
    model = make(vocab_size=1000, embedding_std=0.1)
    assert model.token_embedding.weight.std().item() == pytest.approx(0.1, rel=0.05)
    with pytest.raises(ValueError, match=r"model\.embedding_std=0 must be above 0"):
        make(embedding_std=0)


def test_attention_equals_its_definition():
    torch.manual_seed(0)
    attention, x = Attention(8, 2, 0.0, rotary=False), torch.randn(3, 5, 8)
    out = torch.zeros(3, 5, 8)
    for head in range(2):
        columns = slice(4 * head, 4 * head + 4)
        query, key, value = (f(x)[..., columns] for f in (attention.query, attention.key, attention.value))
        for t in range(5):
            weights = (torch.einsum("bd,bsd->bs", query[:, t], key[:, : t + 1]) / 2).softmax(-1)
            out[:, t, columns] = torch.einsum("bs,bsd->bd", weights, value[:, : t + 1])
    assert torch.allclose(attention(x), attention.out(out), atol=1e-6)


def test_rotary_scores_depend_on_the_distance_only():
    q, k = torch.randn(1, 1, 1, 8).expand(1, 1, 9, 8), torch.randn(1, 1, 1, 8).expand(1, 1, 9, 8)
    scores = rotate(q) @ rotate(k).transpose(-1, -2)
    assert torch.allclose(scores[0, 0, 3, 1], scores[0, 0, 8, 6], atol=1e-5)
    assert not torch.allclose(scores[0, 0, 3, 1], scores[0, 0, 3, 2], atol=1e-3)


def test_sinusoids_of_an_odd_width_fit():
    assert sinusoids(7, 5).shape == (7, 5)
    assert torch.equal(sinusoids(7, 6)[0], torch.tensor([0.0, 1.0] * 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 66, "n_heads": 4}, "d_model=66 is not divisible by model.n_heads=4; try model.d_model=64 or"),
        ({"n_layers": 0}, "model.n_layers=0 must be at least 1"),
        ({"d_model": -8}, "model.d_model=-8 must be at least 1"),
        ({"positions": "absolute"}, "positions=absolute is not known. Known: learned"),
        ({"positions": "rotary", "d_model": 6, "n_heads": 2}, "use an even head width"),
        ({"dropout": 1.0}, "dropout=1.0 must lie in"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_an_input_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match=r"13 tokens is longer than model\.max_len=12"):
        make()(torch.zeros(1, 13, dtype=torch.long))
