"""Membership: languages against a second definition, exact sampling, splits, metrics, messages."""

import functools
import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch

from data.formal_languages import (
    ALPHABETS,
    ONE_MEMBER_A_LENGTH,
    contains,
    count_members,
    draw_strings,
    sample_members,
    sample_non_members,
)
from data.sequences import IGNORE
from membership_data import LANGUAGES, MembershipDataModule
from membership_task import MembershipScores


def tomita3(string):
    """No odd block of 0s stands anywhere right of an odd block of 1s."""
    odd = "".join(symbol for symbol, block in itertools.groupby(string) if len(list(block)) % 2)
    return not re.search("1.*0", odd)


def nested(string):
    """Taking out matched neighbours leaves nothing."""
    while (shorter := string.replace("()", "").replace("[]", "")) != string:
        string = shorter
    return not string


DEFINITIONS = {
    "tomita1": lambda s: re.fullmatch("1*", s),
    "tomita2": lambda s: re.fullmatch("(10)*", s),
    "tomita3": tomita3,
    "tomita4": lambda s: "000" not in s,
    "tomita5": lambda s: s.count("0") % 2 == s.count("1") % 2 == 0,
    "tomita6": lambda s: (s.count("1") - s.count("0")) % 3 == 0,
    "tomita7": lambda s: re.fullmatch("0*1*0*1*", s),
    "parity": lambda s: s.count("1") % 2 == 0,
    "aa": lambda s: len(s) % 2 == 0,
    "ab": lambda s: re.fullmatch("(ab)*", s),
    "anbn": lambda s: s == "a" * (len(s) // 2) + "b" * (len(s) // 2),
    "dyck1": nested,
    "dyck2": nested,
}
COUNTS = {  # members of length 0..10
    "tomita3": [1, 2, 3, 6, 10, 18, 31, 54, 93, 160, 274],
    "tomita4": [1, 2, 4, 7, 13, 24, 44, 81, 149, 274, 504],
    "tomita5": [1, 0, 2, 0, 8, 0, 32, 0, 128, 0, 512],
    "tomita6": [1, 0, 2, 2, 6, 10, 22, 42, 86, 170, 342],
    "tomita7": [1, 2, 4, 8, 15, 26, 42, 64, 93, 130, 176],
    "dyck1": [1, 0, 1, 0, 2, 0, 5, 0, 14, 0, 42],  # Catalan numbers
    "dyck2": [1, 0, 2, 0, 8, 0, 40, 0, 224, 0, 1344],  # times 2^n
}


def all_strings(language, length):
    """Every string of a length: symbol indices (A^n, n) and the strings themselves."""
    alphabet = ALPHABETS[language]
    indices = np.array(list(itertools.product(range(len(alphabet)), repeat=length)), dtype=np.int64)
    return indices, ["".join(alphabet[i] for i in row) for row in indices]


@pytest.mark.parametrize("language", LANGUAGES)
def test_membership_agrees_with_a_second_definition_on_every_string(language):
    for length in range(7 if language == "dyck2" else 11):
        indices, strings = all_strings(language, length)
        expected = [bool(DEFINITIONS[language](s)) for s in strings]
        assert contains(language, indices).tolist() == expected
        assert count_members(language, length) == sum(expected)


@pytest.mark.parametrize(("language", "counts"), COUNTS.items())
def test_numbers_of_members(language, counts):
    assert [count_members(language, length) for length in range(11)] == counts


@pytest.mark.parametrize("language", ["tomita4", "tomita7", "tomita3", "dyck1", "dyck2", "parity", "anbn"])
def test_members_are_drawn_uniformly(language):
    """Chi-square against the uniform distribution over all members of the length, at 5 standard deviations."""
    length, n = 6, 20_000
    drawn = Counter(map(tuple, sample_members(language, length, n, np.random.default_rng(0)).tolist()))
    indices, _ = all_strings(language, length)
    members = set(map(tuple, indices[contains(language, indices)].tolist()))
    assert drawn.keys() == members
    expected = n / len(members)
    chi_square = sum((count - expected) ** 2 / expected for count in drawn.values())
    freedom = len(members) - 1
    assert chi_square <= freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("language", LANGUAGES)
def test_long_draws_have_the_label_they_were_drawn_for(language):
    rng = np.random.default_rng(0)
    length = 21 if language == "aa" else 40
    others = sample_non_members(language, length, 200, rng)
    members = sample_members(language, 40, 200, rng)
    assert not contains(language, others).any()
    assert contains(language, members).all()
    if language != "aa":
        assert len(np.unique(others, axis=0)) > 100


def test_half_of_the_negatives_are_near_misses():
    """(ab)* has one member of length 12: at most two edits move at most 4 symbols; uniform strings seldom do (.19)."""
    strings = sample_non_members("ab", 12, 4000, np.random.default_rng(0))
    distance = (strings != np.tile([0, 1], 6)).sum(1)
    assert (distance <= 4).mean() == pytest.approx(0.5 + 0.5 * 0.19, abs=0.03)
    assert (distance == 1).mean() > 0.1
    assert (distance == 2).mean() > 0.1


def test_draws_leave_the_length_no_cue():
    rng = np.random.default_rng(0)
    for language in ("tomita4", "tomita5", "dyck1"):
        lengths = [set((draw_strings(language, range(1, 9), label, rng, 500) >= 0).sum(1)) for label in (True, False)]
        assert lengths[0] == lengths[1]
    assert lengths[0] == {2, 4, 6, 8}  # Dyck has no odd length


@functools.cache
def module(**options):
    return MembershipDataModule(**options)


def rows_of(datamodule, split):
    """The prompts as token names and the labels: [(tokens, "yes"), ...]."""
    sequences = datamodule.splits[split]
    for x, y in zip(sequences.x.tolist(), sequences.y.tolist(), strict=True):
        (t,) = [t for t, target in enumerate(y) if target != IGNORE]  # one position is scored
        yield tuple(datamodule.tokens[i] for i in x[: t + 1]), datamodule.classes[y[t]]


# --- sets ---


def test_sets_hold_distinct_elements_and_the_right_label():
    datamodule = module()
    assert datamodule.tokens == (*map(str, range(16)), "SEP")
    assert [len(split) for split in datamodule.splits.values()] == [2000, 1000, 1000]
    for split in datamodule.splits:
        for (*context, separator, query), label in rows_of(datamodule, split):
            assert separator == "SEP"
            assert len(set(context)) == len(context) == 4
            assert label == ("yes" if query in context else "no")


def test_sets_share_no_set_and_query_whatever_the_order():
    datamodule = module()
    keys = {
        name: {(frozenset(context), query) for (*context, _, query), _ in rows_of(datamodule, name)}
        for name in datamodule.splits
    }
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["val"]
    assert not keys["val"] & keys["test"]


def test_no_single_token_is_a_cue():
    """Neither the query nor an element at a place tells the label: all answers are yes half the time."""
    datamodule = MembershipDataModule(n_samples=20_000)
    rows = list(rows_of(datamodule, "train"))
    for place in (0, 3, -1):
        seen, yes = Counter(), Counter()
        for tokens, label in rows:
            seen[tokens[place]] += 1
            yes[tokens[place]] += label == "yes"
        assert len(seen) == 16
        assert all(abs(yes[t] / seen[t] - 0.5) < 5 * 0.5 / seen[t] ** 0.5 for t in seen)
        assert all(abs(n - 1250) < 5 * 1250**0.5 for n in seen.values())  # tokens are uniform, too


def test_set_sizes_in_training_and_in_test():
    datamodule = module(set_size=(2, 3, 4, 5, 6), test_set_sizes=(7, 8))
    sizes = {name: {len(tokens) - 2 for tokens, _ in rows_of(datamodule, name)} for name in datamodule.splits}
    assert sizes["train"] == sizes["test"] == {2, 3, 4, 5, 6}
    assert (sizes["test/size_7"], sizes["test/size_8"]) == ({7}, {8})
    assert datamodule.test_names == ["test", "test/size_7", "test/size_8"]


# --- languages ---


@pytest.mark.parametrize("language", LANGUAGES)
def test_languages_have_the_right_labels_and_share_no_string(language):
    datamodule = module(language=language, n_samples=1000)
    strings = {}
    for split in datamodule.splits:
        rows = list(rows_of(datamodule, split))
        assert all(tokens[-1] == "SEP" and "SEP" not in tokens[:-1] for tokens, _ in rows)
        strings[split] = {"".join(tokens[:-1]): label for tokens, label in rows}
        for string, label in strings[split].items():
            assert label == ("yes" if DEFINITIONS[language](string) else "no")
        assert Counter(label for _, label in rows)["yes"] == len(rows) / 2
    for a, b in itertools.combinations(strings, 2):
        assert not strings[a].keys() & strings[b].keys()
    assert max(map(len, strings["train"])) == 12
    assert datamodule.max_len == 13


@pytest.mark.slow
@pytest.mark.parametrize("language", ONE_MEMBER_A_LENGTH)
@pytest.mark.parametrize("length", [9, 12, 16])
def test_languages_with_one_member_a_length_are_tested_on_unseen_lengths(language, length):
    datamodule = MembershipDataModule(language=language, length=length)
    lengths = {name: {len(tokens) - 1 for tokens, label in rows_of(datamodule, name)} for name in datamodule.splits}
    assert not lengths["train"] & lengths["test"]
    assert not lengths["train"] & lengths["val"]
    assert not lengths["val"] & lengths["test"]
    assert datamodule.max_len == datamodule.max_train_len


def test_held_out_strings_are_distinct():
    """Else a few short strings would be most of the test."""
    datamodule = module(language="tomita5")
    assert len(datamodule.splits["train"]) == 4000
    for split in ("val", "test"):
        x = datamodule.splits[split].x
        assert len(x.unique(dim=0)) == len(x) > 300


def test_length_bins():
    datamodule = module(language="dyck1", length=8, test_lengths=(16, 32))
    assert datamodule.test_names == ["test", "test/length_9_16", "test/length_17_32"]
    lengths = {name: {len(tokens) - 1 for tokens, _ in rows_of(datamodule, name)} for name in datamodule.test_names}
    assert lengths["test/length_9_16"] == {10, 12, 14, 16}
    assert lengths["test/length_17_32"] == set(range(18, 33, 2))
    assert (datamodule.max_train_len, datamodule.max_len) == (9, 33)


# --- metrics ---


def test_accuracy_by_label():
    """Fault: (B, 1) predictions compared with (B,) labels broadcast to (B, B)."""
    y = torch.tensor([[IGNORE, 1], [1, IGNORE], [IGNORE, 1], [IGNORE, 0], [IGNORE, 1]])
    answers = torch.tensor([[0, 1], [1, 0], [1, 0], [0, 1], [0, 1]])
    scores = MembershipScores()
    scores.update(torch.nn.functional.one_hot(answers, 2).float(), y)
    result = scores.compute()
    assert (result["accuracy_yes"], result["accuracy_no"], result["balanced_accuracy"]) == (0.75, 0.0, 0.375)
    assert result["token_accuracy"] == result["exact_match"] == result["last_accuracy"] == pytest.approx(0.6)


def test_balanced_accuracy_of_a_constant_answer_is_half():
    y = torch.tensor([[1], [1], [1], [0]])
    scores = MembershipScores()
    for row in y:  # the labels come in different batches
        scores.update(torch.tensor([[[0.0, 1.0]]]), row[None])
    assert scores.compute()["balanced_accuracy"] == 0.5


# --- messages ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(language="dyck3"), r"datamodule.language=dyck3 is not known; did you mean dyck[12]"),
        (dict(set_size=16), r"datamodule.set_size=16 must lie between 1 and 15"),
        (dict(set_size=[]), r"datamodule.set_size=\[\], .*: training needs a size"),
        (dict(test_set_sizes=[0]), r"datamodule.test_set_sizes=\[0\] must lie between 1 and 15"),
        (dict(test_set_sizes=[4]), r"test_set_sizes=\[4\]: .* further test sets need other ones"),
        (dict(universe=1), r"datamodule.universe=1 must lie between 2 and 4,096"),
        (dict(language="ab", length=0), r"datamodule.length=0 must lie between 1 and 4,096"),
        (dict(language="ab", test_lengths=[12]), r"datamodule.test_lengths=\[12\] must lie between 13 and 4,096"),
        (dict(language="ab", test_lengths=[24, 16]), r"test_lengths=\[24, 16\]: each bin ends behind the one before"),
        (dict(language="ab", length=5), r"length=5 is too short for datamodule.language=ab.*try datamodule.length=12"),
        (
            dict(language="tomita4", length=2),
            r"datamodule.language=tomita4 has no members and non-members of 1 to 2 symbols",
        ),
        (dict(universe=2, set_size=1), r"could not fill the splits"),
        (dict(n_samples=1), r"n_samples=1 must be at least 2"),
    ],
)
def test_bad_input_is_refused_with_a_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        MembershipDataModule(**options).setup()
