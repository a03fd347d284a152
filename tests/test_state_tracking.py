"""State tracking: groups against their axioms and a second definition, targets, metrics, messages."""

import functools
import itertools

import numpy as np
import pytest
import torch

from data.sequences import IGNORE
from state_tracking_data import Group, StateTrackingDataModule
from state_tracking_task import StateTrackingScores

ORDERS = {"Z2": 2, "Z5": 5, "Z60": 60, "S3": 6, "S5": 120, "A5": 60, "A4xZ5": 60}


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_groups_satisfy_the_axioms(name, order):
    group = Group.named(name)
    table, everyone = group.table, np.arange(order)
    assert len(set(group.elements)) == len(group) == order
    assert (table[0] == everyone).all()
    assert (table[:, 0] == everyone).all()  # identity
    assert (np.sort(table, axis=0) == everyone[:, None]).all()
    assert (np.sort(table, axis=1) == everyone).all()  # inverses
    a, b, c = np.random.default_rng(0).integers(order, size=(3, 5000))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()  # associative


def derived_order(name):
    """Elements of the subgroup that the commutators a b a^-1 b^-1 generate."""
    table = Group.named(name).table
    inverse = (table == 0).argmax(1)
    members = {int(table[table[a, b], table[inverse[a], inverse[b]]]) for a, b in np.ndindex(table.shape)}
    while True:
        closed = members | {int(table[a, b]) for a in members for b in members}
        if closed == members:
            return len(members)
        members = closed


def test_the_three_groups_of_order_60_differ_as_in_the_paper():
    """A5 is its own commutator subgroup (not solvable), that of A4xZ5 is Klein's four-group, Z60 is abelian."""
    assert [derived_order(name) for name in ("A5", "A4xZ5", "Z60")] == [60, 4, 1]


def test_permutations_are_in_lexicographic_order_and_multiply_from_the_right():
    s3 = Group.named("S3")
    assert s3.elements == [(1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)]
    assert s3.elements[s3.table[1, 4]] == (2, 1, 3)  # (1, 3, 2) . (3, 1, 2)


def permutation_matrix(permutation):
    """M with M e_i = e_p(i), so that the matrix of a.b is the product of the matrices."""
    return np.eye(len(permutation), dtype=int)[:, [i - 1 for i in permutation]]


@pytest.mark.parametrize("name", ["S3", "S5", "A5"])
def test_prefix_products_are_products_of_permutation_matrices(name):
    group = Group.named(name)
    strings = np.random.default_rng(0).integers(len(group), size=(20, 9))
    states = group.prefix_products(strings)
    for string, state in zip(strings, states, strict=True):
        matrices = itertools.accumulate((permutation_matrix(group.elements[i]) for i in string), np.matmul)
        assert all((m == permutation_matrix(group.elements[s])).all() for m, s in zip(matrices, state, strict=True))


def test_product_groups_multiply_factor_by_factor():
    group = Group.named("A4xZ5")
    a4, (a, i), (b, j) = Group.named("A4"), group.elements[17], group.elements[44]
    product = a4.elements[a4.table[a4.elements.index(a), a4.elements.index(b)]]
    assert group.elements[group.table[17, 44]] == (product, (i + j) % 5)


@functools.cache
def module(**options):
    return StateTrackingDataModule(**options)


def read_and_written(datamodule, split):
    """The input strings and the scored classes of a seq split: (N, n), (N, n)."""
    x, y = datamodule.splits[split].x, datamodule.splits[split].y
    return x[:, : datamodule.length].numpy(), y[:, datamodule.length :].numpy()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_parity_counts_zeros(split):
    read, written = read_and_written(module(), split)
    assert (written == (read == 0).cumsum(1) % 2).all()


def test_cyclic_groups_sum_modulo_n():
    read, written = read_and_written(module(group="Z5", n_samples=500), "train")
    assert (written == read.cumsum(1) % 5).all()


def test_seq_writes_every_state_after_the_separator():
    """Fault: targets shifted by one, so the input token at each scored position was the label."""
    datamodule = module()
    x, y = datamodule.splits["train"].x, datamodule.splits["train"].y
    assert datamodule.tokens == ("0", "1", "SEP")
    assert datamodule.max_len == 16
    assert (x[:, 8] == 2).all()  # SEP predicts the first state
    assert (y[:, :8] == IGNORE).all()
    assert (y[:, 8:] != IGNORE).all()  # 8 scored, the last state too
    assert torch.equal(x[:, 9:], y[:, 8:-1])  # each state is read after it was predicted
    assert (x[:, 8:] == y[:, 8:]).float().mean() < 0.6


def test_tag_and_seq_hold_the_same_strings_and_states():
    seq, tag = module(group="S3", n_samples=500), module(group="S3", n_samples=500, format="tag")
    read, written = read_and_written(seq, "train")
    assert np.array_equal(tag.splits["train"].x.numpy(), read)
    assert np.array_equal(tag.splits["train"].y.numpy(), written)
    assert (tag.vocab_size, seq.vocab_size, tag.max_len, seq.max_len) == (6, 7, 8, 16)


def test_default_parity_uses_all_256_strings_once():
    datamodule = module()
    strings = [tuple(row) for split in datamodule.splits for row in read_and_written(datamodule, split)[0].tolist()]
    assert [len(datamodule.splits[name]) for name in ("train", "val", "test")] == [200, 28, 28]
    assert len(set(strings)) == len(strings) == 256


def test_further_test_lengths_have_their_own_splits():
    datamodule = module(length=8, test_lengths=(16, 32))
    assert datamodule.splits["test/length_16"].x.shape == (1000, 32)
    assert datamodule.splits["test/length_32"].x.shape == (1000, 64)
    x, y = datamodule.splits["test/length_32"].x, datamodule.splits["test/length_32"].y
    assert ((x[:, :32] == 0).cumsum(1) % 2 == y[:, 32:]).all()


def test_accuracy_by_position():
    y = torch.tensor([[IGNORE, 0, 1], [IGNORE, 1, 1]])
    answers = torch.tensor([[0, 0, 0], [0, 1, 1]])
    scores = StateTrackingScores()
    scores.update(torch.nn.functional.one_hot(answers, 2).float(), y)
    result = scores.compute()
    assert (result["accuracy_at_1"], result["accuracy_at_2"]) == (1.0, 0.5)
    assert (result["token_accuracy"], result["exact_match"], result["last_accuracy"]) == (0.75, 0.5, 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(group="party"), r"datamodule.group=party is not known; did you mean parity\? Known: parity, Z<n>"),
        (dict(group="S5xparity"), r"datamodule.group=S5xparity is not known"),
        (dict(group="S9"), r"S9 is too large: Z5040, S7 and A7 are the largest"),
        (dict(group="Z9999"), r"Z9999 is too large"),
        (dict(group="Z99999"), r"Z99999 is not known"),
        (dict(group="S5xS5"), r"S5xS5 is too large"),
        (dict(group="Z1"), r"Z1 has one element only"),
        (dict(format="sq"), r"datamodule.format=sq is not known; did you mean seq\?"),
        (dict(length=0), r"datamodule.length=0 must lie between 1 and 4,096"),
        (dict(test_lengths=[0]), r"datamodule.test_lengths=\[0\] must lie between 1 and 4,096"),
        (dict(test_lengths=[8]), r"length 8 is the training length"),
        (dict(n_samples=256), r"n_samples=256 is too large: there are only 256 strings of length 8"),
        (dict(batch_size=201), r"batch_size=201 is larger than the training set of 200"),
    ],
)
def test_bad_input_is_refused_with_a_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        StateTrackingDataModule(**options).setup()
