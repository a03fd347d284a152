"""A step costs what it computes: operators and waits are counted, and every tensor is made where the weights are."""

from collections import Counter

import pytest
import torch
from test_structured import loss
from torch.utils._python_dispatch import TorchDispatchMode

from optimizer import PatternSearch
from polls.nodes import NodePolls
from search.eggroll import Eggroll
from search.es import ES
from search.fzoo import FZOO
from search.options import RECOMMENDED
from search.sep_cma_es import SepCMAES
from search.spsa import SPSA
from transformer import POSITIONS, DecoderOnlyTransformer

WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "equal", "masked_select")
NODES = dict(
    radius=0.05, poll="complete", polls_per_step=0, one_sided=True, step_lengths=[0.02, 0.01, 0.005],
    memory=0.7, scale_memory=0.95, fade=3.0, contraction=1.0,
)  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts the operators that compute something, and those for whose result the host waits."""

    def __init__(self):
        super().__init__()
        self.computed, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if name in WAITS:
            self.waits[name] += 1
        elif not view and name != "_unsafe_view":
            self.computed[name] += 1
        return func(*args, **kwargs or {})


def setup(positions="learned", length=16, make=PatternSearch, **options):
    """A search of the default model on 32 strings, and a closure for it."""
    torch.manual_seed(0)
    model = DecoderOnlyTransformer(4, 2, length, d_model=64, n_layers=2, n_heads=4, positions=positions)
    x = torch.randint(2, (32, length))
    y = x.clone()
    y[:, : length // 2] = -100
    search = make(make.parameter_groups(model, list(model.parameters()), **options), **options)
    polls = NodePolls(model, search.coordinates, loss)
    return search, lambda: polls.on({"x": x, "y": y})


@pytest.mark.parametrize(("nodes", "most"), [(8, 750), (128, 1000), (256, 1125)])
def test_a_step_of_node_perturbation_has_few_operators_and_waits(nodes, most):
    search, closure = setup(nodes_per_step=nodes, orthogonalise=6, **NODES)
    for _ in range(2):
        search.step(closure())
    with Operators() as operators:
        search.step(closure())
    assert sum(operators.waits.values()) <= 3, operators.waits
    assert sum(operators.computed.values()) <= most, operators.computed


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    "options",
    [NODES | dict(nodes_per_step=64, orthogonalise=6, weight_decay=0.1), RECOMMENDED],
    ids=["nodes", "weights"],
)
def test_every_tensor_of_a_step_is_made_where_the_weights_are(options, positions):
    search, closure = setup(positions, **options)
    torch.set_default_device("meta")
    try:
        losses = [search.step(closure()) for _ in range(3)]
    finally:
        torch.set_default_device(None)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("rival", [SPSA, FZOO, ES, Eggroll, SepCMAES])
def test_every_tensor_of_a_step_along_random_directions_is_made_where_the_weights_are(rival):
    search, closure = setup(make=rival, **({} if rival is SepCMAES else dict(samples=3)))
    before = [p.clone() for p in search.coordinates.parameters]
    torch.set_default_device("meta")
    try:
        for _ in range(2):
            search.step(closure())
    finally:
        torch.set_default_device(None)
    moved = [not torch.equal(p, old) for p, old in zip(search.coordinates.parameters, before, strict=True)]
    assert all(moved)
