"""The orthogonalised direction: its singular values, its length, and what a search makes of it."""

import re

import pytest
import torch
from torch import nn

from optimizer import PatternSearch
from search.coordinates import Coordinates
from search.orthogonal import matrices_of, newton_schulz, orthogonalised
from transformer import DecoderOnlyTransformer


@pytest.mark.parametrize("shape", [(16, 16), (8, 32)])
def test_newton_schulz_keeps_the_singular_vectors_and_makes_the_values_about_1(shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    found = newton_schulz(x, 6)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ found @ v.mT  # diagonal, if the vectors are the same
    torch.testing.assert_close(values, torch.diag_embed(values.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-4)
    assert values.diagonal(dim1=1, dim2=2).min() > 0.6
    assert values.max() < 1.3


def test_the_direction_keeps_its_length_in_each_matrix_and_all_else_as_it_is():
    torch.manual_seed(1)
    direction, slopes = torch.randn(100), torch.randn(100)
    direction[:24] *= 10
    coordinates = Coordinates([nn.Parameter(torch.ones(shape)) for shape in ((4, 6), (6,), (6, 4), (2, 3), (40,))])
    matrices = matrices_of(coordinates, [6, 6, 6, 6, 6])
    found = orthogonalised(direction, slopes, matrices)
    outside = torch.ones(100, dtype=torch.bool)
    assert len(matrices) == 2  # the two of 4 x 6 and their transpose, and the small one
    for own, shape in ((slice(0, 24), (4, 6)), (slice(30, 54), (6, 4)), (slice(54, 60), (2, 3))):
        outside[own] = False
        torch.testing.assert_close(found[own].norm(), direction[own].norm())
        assert (found[own] * slopes[own]).sum() < 0  # downhill
        x = slopes[own].view(shape)
        alone = -(newton_schulz(x.mT[None], 6).mT if shape[0] > shape[1] else newton_schulz(x[None], 6)).flatten()
        torch.testing.assert_close(found[own] / found[own].norm(), alone / alone.norm())
    assert outside.sum() == 46
    assert torch.equal(found[outside], direction[outside])


def test_a_wide_matrix_moves_by_less_in_inverse_proportion_to_its_width():
    def length(m: int, n: int) -> float:
        x = torch.randn(m * n, generator=torch.Generator().manual_seed(0))
        matrices = matrices_of(Coordinates([nn.Parameter(torch.ones(m, n))]), [6])
        return float(orthogonalised(x, x, matrices).norm() / x.norm())

    lengths = [length(m, n) for m, n in ((64, 256), (128, 256), (256, 128), (256, 256))]
    assert lengths == pytest.approx([1, 1 / 2, 1 / 2, 1 / 4])


def test_where_nothing_is_known_the_direction_stays_zero():
    nothing, coordinates = torch.zeros(12), Coordinates([nn.Parameter(torch.ones(3, 4))])
    assert torch.equal(orthogonalised(nothing, nothing, matrices_of(coordinates, [6])), nothing)


def test_orthogonalising_is_refused_where_it_has_no_meaning():
    matrix, vector = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))
    nodes = dict(nodes_per_step=1, step_lengths=[0.1], orthogonalise=6)
    with pytest.raises(ValueError, match="orthogonalise=6 needs nodes_per_step"):
        PatternSearch([matrix], orthogonalise=6)
    with pytest.raises(ValueError, match="orthogonalise=6 needs a matrix"):
        PatternSearch([vector], **nodes)
    with pytest.raises(ValueError, match="orthogonalise=-1 must be at least 0"):
        PatternSearch([matrix], **nodes | dict(orthogonalise=-1))
    with pytest.raises(ValueError, match="and last_group_share"):
        PatternSearch([matrix, vector], **nodes, polls_per_step=2, last_group_share=0.5)
    PatternSearch([{"params": [matrix]}, {"params": [vector], "orthogonalise": 0}], **nodes)


def test_the_matrices_of_the_blocks_are_a_group_of_their_own():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(3, 4), nn.Linear(4, 2)
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    model = Model()
    groups = PatternSearch.parameter_groups(model, list(model.parameters()), orthogonalise=6)
    assert [len(group["params"]) for group in groups] == [1, 4]
    assert groups[0]["params"][0] is model.blocks[0].weight
    assert groups[1]["orthogonalise"] == 0


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["blocks.*.ff.*"], ["blocks.0.ff.inner.weight", "blocks.0.ff.outer.weight"]),
        (["head.*", "token_embedding.weight"], ["token_embedding.weight", "head.weight"]),
    ],
)
def test_names_with_wildcards_tell_which_matrices_are_orthogonalised(patterns, names):
    model = DecoderOnlyTransformer(4, 2, 8, d_model=16, n_layers=1, n_heads=2)
    options = dict(orthogonalise=6, orthogonalise_in=patterns)
    groups = PatternSearch.parameter_groups(model, list(model.parameters()), **options)
    of = {id(p): name for name, p in model.named_parameters()}
    assert [of[id(p)] for p in groups[0]["params"]] == names
    assert sum(len(group["params"]) for group in groups) == len(of)


@pytest.mark.parametrize(("patterns", "wrong"), [(["blocks.*", "block.*"], "'block.*'"), ([], "''")])
def test_a_name_that_no_matrix_has_is_refused_with_those_there_are(patterns, wrong):
    model = DecoderOnlyTransformer(4, 2, 8, d_model=16, n_layers=1, n_heads=2)
    with pytest.raises(ValueError, match=re.escape(f"has a name like {wrong}; there are token_embedding.weight")):
        PatternSearch.parameter_groups(model, [*model.parameters()], orthogonalise=6, orthogonalise_in=patterns)


def test_options_of_different_matrices_part_the_parameters_by_both():
    model = DecoderOnlyTransformer(4, 2, 8, d_model=16, n_layers=1, n_heads=2)
    options = dict(
        orthogonalise=6, orthogonalise_in=["blocks.*"], weight_decay=0.3, weight_decay_in=["*.ff.*", "head.*"]
    )
    groups = PatternSearch.parameter_groups(model, list(model.parameters()), **options)
    of = {id(p): name for name, p in model.named_parameters()}
    found = {of[id(p)]: (g.get("orthogonalise", 6), g.get("weight_decay", 0.3)) for g in groups for p in g["params"]}
    assert found["blocks.0.ff.inner.weight"] == (6, 0.3)
    assert found["blocks.0.attention.out.weight"] == (6, 0)
    assert found["head.weight"] == (0, 0.3)
    assert found["token_embedding.weight"] == found["head.bias"] == (0, 0)
    whole = list(model.parameters())
    assert PatternSearch.parameter_groups(model, whole, weight_decay=0.3) is whole
