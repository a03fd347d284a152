"""Slopes of units from the losses of single tokens: against a plain forward with hooks, and against autograd."""

import pytest
import torch
import torch.nn.functional as F
from test_structured_polls import LAYOUTS, loss, make_batch, make_model

from closure import Coordinates
from credit_polls import CreditPolls


def setup(layout="seq", **options):
    model = make_model(**options)
    coordinates = Coordinates(model.parameters())
    batch = make_batch(layout)
    return model, coordinates, batch, CreditPolls(model, coordinates, loss).on(batch)


def gradient(model, batch):
    loss(model(batch["x"]), batch).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double()


def cosine(a, b):
    return float(F.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("positions", ["learned", "rotary", "none"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_samples_of_every_unit_point_along_the_gradient_in_every_tensor(layout, positions):
    model, coordinates, batch, closure = setup(layout, positions=positions, dtype=torch.float64)
    mean, units = torch.zeros(len(coordinates), dtype=torch.float64), torch.arange(closure.n_units)
    samples = 300
    for seed in range(samples):
        where, slopes = closure.credit(units, torch.full((len(units),), 1e-3), seed)
        assert len(where.unique()) == len(where)
        mean[where] += slopes / samples
    expected = gradient(model, batch)
    start = 0
    for (name, _), end in zip(model.named_parameters(), coordinates.ends, strict=True):
        if expected[start:end].norm() > 1e-9:
            assert cosine(mean[start:end], expected[start:end]) > 0.85, name
        start = end
