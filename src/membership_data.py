"""Membership: is the query in the set, is the string in the language?

Set membership reads m distinct elements in random order, SEP and a query; a language task reads a string and SEP. One
position is scored, the last one, with the classes "no" and "yes".
Show some data with `python src/show_data.py task=membership datamodule.language=tomita3`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from config.did_you_mean import one_of
from data.formal_languages import ALPHABETS, LANGUAGES, ONE_MEMBER_A_LENGTH, contains, draw_strings
from data.sequences import MAX_LENGTH, SequenceDataModule, Sequences, check_range, lay_out, split_by_hash

CLASSES = ("no", "yes")
N_SETS, N_STRINGS = 2000, 4000  # default sizes of the training set
N_HELD_OUT = 1000  # rows of validation and of each test set, at most
Draw = Callable[[bool, np.random.Generator, int], np.ndarray]  # (member, rng, n) -> n rows


def draw_sets(universe: int, sizes: Sequence[int], member: bool, rng: np.random.Generator, n: int) -> np.ndarray:
    """n sets with a query in (or not in) each: the sorted set, filled up with `universe`, then the query.

    Sets and queries are uniform, sizes too. Returns (n, max(sizes) + 1).
    """
    elements = rng.permuted(np.tile(np.arange(universe), (n, 1)), axis=1)
    size = rng.choice(sizes, n)
    query = elements[np.arange(n), rng.integers(size) if member else rng.integers(size, universe)]
    sets = np.where(np.arange(max(sizes)) < size[:, None], elements[:, : max(sizes)], universe)
    return np.column_stack([np.sort(sets, axis=1), query])


def balanced(draw: Draw, n: int, rng: np.random.Generator) -> np.ndarray:
    """n rows, half of them members, in random order."""
    return rng.permutation(np.concatenate([draw(False, rng, n // 2), draw(True, rng, n - n // 2)]))


class MembershipDataModule(SequenceDataModule):
    """Sets and queries, or strings, with the answers "no" and "yes".

    Rows are drawn with repetition, since languages have few short strings; train, validation and test share no string,
    and no pair of a set (in whatever order) and a query. Languages with at most one member a length (Tomita 1 and 2,
    (aa)*, (ab)*, a^n b^n) can only be tested on unseen lengths: a quarter of the lengths is for the test, an eighth for
    validation, the others, with the longest among them, for training.

    Args:
        language: "sets" or one of LANGUAGES.
        universe: sets: number of elements.
        set_size: sets: elements of a set, or a list of sizes to draw from.
        test_set_sizes: sets: sizes of further test sets, e.g. [7, 8] -> "test/size_7", "test/size_8".
        length: languages: longest string, in symbols; strings of 1 to `length` symbols are drawn.
        test_lengths: languages: upper ends of further bins of test strings, e.g. [24, 48] after length=12 ->
            "test/length_13_24", "test/length_25_48". Learned positions beyond `length` are never trained.
        n_samples: training rows; None for 2,000 sets or 4,000 strings.
        batch_size, seed: as in `SequenceDataModule`.

    Raises:
        ValueError: an unknown language, or an impossible size or length.
    """

    def __init__(
        self,
        language: str = "sets",
        universe: int = 16,
        set_size: int | Sequence[int] = 4,
        test_set_sizes: Sequence[int] = (),
        length: int = 12,
        test_lengths: Sequence[int] = (),
        n_samples: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ):
        one_of("datamodule.language", language, ("sets", *LANGUAGES))
        default = N_SETS if language == "sets" else N_STRINGS
        super().__init__(batch_size, default if n_samples is None else n_samples, seed)
        check_range("n_samples", self.n_samples, 2)  # one row of each label
        self.language, self.universe, self.length = language, universe, length
        self.set_sizes = (set_size,) if isinstance(set_size, int) else tuple(set_size)
        self.test_set_sizes, self.test_lengths = tuple(test_set_sizes), tuple(test_lengths)
        self.classes = CLASSES
        if language == "sets":
            check_range("universe", universe, 2, MAX_LENGTH)
            self.tokens, self.unread = (*map(str, range(universe)), "SEP"), ("length", "test_lengths")
            check_range("set_size", set_size, 1, universe - 1)  # so that there are queries of both labels
            check_range("test_set_sizes", test_set_sizes, 1, universe - 1)
            if not self.set_sizes or {*self.set_sizes} & {*test_set_sizes}:
                given = f"datamodule.set_size={list(self.set_sizes)}, test_set_sizes={list(test_set_sizes)}"
                raise ValueError(f"{given}: training needs a size, and further test sets need other ones")
            self._distinct = sum(universe * math.comb(universe, m) for m in {*self.set_sizes})
        else:
            self.tokens, self.unread = (*ALPHABETS[language], "SEP"), ("universe", "set_size", "test_set_sizes")
            check_range("length", length, 1, MAX_LENGTH)
            check_range("test_lengths", test_lengths, length + 1, MAX_LENGTH)
            if [*test_lengths] != sorted({*test_lengths}):
                raise ValueError(f"datamodule.test_lengths={list(test_lengths)}: each bin ends behind the one before")
            self._distinct = sum(len(ALPHABETS[language]) ** n for n in range(1, length + 1))

    def make_splits(self) -> dict[str, Sequences]:
        rng = np.random.default_rng((self.seed, 1))
        if self.language == "sets":
            draw: Draw = partial(draw_sets, self.universe, self.set_sizes)
            further = {f"test/size_{m}": partial(draw_sets, self.universe, [m]) for m in self.test_set_sizes}
        else:
            draw = partial(draw_strings, self.language, range(1, self.length + 1))
            further = {
                f"test/length_{low + 1}_{high}": partial(draw_strings, self.language, range(low + 1, high + 1))
                for low, high in itertools.pairwise([self.length, *self.test_lengths])
            }
        by_length = self.language in ONE_MEMBER_A_LENGTH
        rows = self._split_by_length(rng) if by_length else self._split_by_hash(draw, rng)
        rows |= {name: balanced(draw, N_HELD_OUT, rng) for name, draw in further.items()}
        return {name: self._lay_out(of_split, rng) for name, of_split in rows.items()}

    def _split_by_hash(self, draw: Draw, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Half of each split are members. Held-out rows are distinct: a few short strings would be most of them."""
        held_out = min(N_HELD_OUT, max(1, self._distinct // 12))  # leaves most of a small space to training
        by_label = []
        for member, n in ((False, self.n_samples // 2), (True, self.n_samples - self.n_samples // 2)):
            sizes = {"train": n, "val": held_out, "test": held_out}
            by_label.append(split_by_hash(partial(draw, member), sizes, self.seed))
        splits = {"train": rng.permutation(np.concatenate([part["train"] for part in by_label]))}
        for name in ("val", "test"):
            distinct = [rng.permutation(np.unique(part[name], axis=0)) for part in by_label]
            n = min(N_HELD_OUT // 2, *map(len, distinct))
            splits[name] = rng.permutation(np.concatenate([rows[:n] for rows in distinct]))
        return splits

    def _split_by_length(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A length is in one split; an odd one and the next even one stay together, so that both labels are in it."""
        pairs = [[k - 1, k] for k in range(2, self.length - 1, 2)]  # the longest are for training
        if len(pairs) < 3:
            raise ValueError(
                f"datamodule.length={self.length} is too short for datamodule.language={self.language}, which can "
                "only be tested on lengths it was not trained on; try datamodule.length=12"
            )
        val, test, _ = np.split(rng.permutation(pairs), np.cumsum([-(-len(pairs) // 8), -(-len(pairs) // 4)]))
        train = np.setdiff1d(np.arange(1, self.length + 1), [*val.flatten(), *test.flatten()])
        splits = {"train": (train, self.n_samples), "val": (val, N_HELD_OUT), "test": (test, N_HELD_OUT)}
        return {
            name: balanced(partial(draw_strings, self.language, lengths.flatten().tolist()), n, rng)
            for name, (lengths, n) in splits.items()
        }

    def _lay_out(self, rows: np.ndarray, rng: np.random.Generator) -> Sequences:
        prompts, labels, separator = [], [], len(self.tokens) - 1
        for row in rows:
            if self.language == "sets":
                context, query = rng.permutation(row[:-1][row[:-1] < self.universe]), row[-1]
                prompts.append([*context, separator, query])
                labels.append([int(query in context)])
            else:
                string = row[row >= 0]
                prompts.append([*string, separator])
                labels.append([int(contains(self.language, string[None])[0])])
        return lay_out(prompts, labels, ())
