"""Membership: is the query in the set, is the string in the language?

Set membership reads m distinct elements in random order, SEP and a query; a language task reads a
string and SEP. One position is scored, the last one, with the classes "no" and "yes".
Show some data with `python src/show_data.py task=membership datamodule.language=tomita3`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from config.did_you_mean import one_of
from data.formal_languages import ALPHABETS, LANGUAGES, ONE_MEMBER_A_LENGTH, contains, draw_strings, is_member
from data.sequences import MAX_LENGTH, SequenceDataModule, Sequences, lay_out, split_by_hash

__all__ = ["LANGUAGES", "MembershipDataModule", "draw_sets", "is_member"]

CLASSES = ("no", "yes")
N_SETS, N_STRINGS = 2000, 4000  # default sizes of the training set
N_HELD_OUT = 1000  # rows of validation and of each test set, at most
Draw = Callable[[bool, int, np.random.Generator], np.ndarray]  # (member, n, rng) -> n rows


def draw_of_label(draw: Draw, member: bool, rng: np.random.Generator, n: int) -> np.ndarray:
    """The rows of one label, with the arguments that `split_by_hash` gives."""
    return draw(member, n, rng)


def draw_sets(universe: int, sizes: Sequence[int], member: bool, n: int, rng: np.random.Generator) -> np.ndarray:
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
    return rng.permutation(np.concatenate([draw(False, n // 2, rng), draw(True, n - n // 2, rng)]))


class MembershipDataModule(SequenceDataModule):
    """Sets and queries, or strings, with the answers "no" and "yes".

    Rows are drawn with repetition, since languages have few short strings; train, validation and
    test share no string, and no pair of a set (in whatever order) and a query. Languages with at
    most one member a length (Tomita 1 and 2, (aa)*, (ab)*, a^n b^n) can only be tested on unseen
    lengths: a quarter of the lengths is for the test, an eighth for validation, the others, with
    the longest among them, for training.

    Args:
        language: "sets" or one of LANGUAGES.
        universe: sets: number of elements.
        set_size: sets: elements of a set, or a list of sizes to draw from.
        test_set_sizes: sets: sizes of further test sets, e.g. [7, 8] -> "test/size_7", "test/size_8".
        length: languages: longest string, in symbols; strings of 1 to `length` symbols are drawn.
        test_lengths: languages: upper ends of further bins of test strings, e.g. [24, 48] after
            length=12 -> "test/length_13_24", "test/length_25_48". Learned positions beyond
            `length` are never trained.
        n_samples: training rows; None for 2,000 sets or 4,000 strings.
        batch_size, seed: as in `SequenceDataModule`.

    Raises:
        ValueError: an unknown language, an impossible size or length, or more rows than inputs exist.
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
        if self.n_samples < 2:
            raise ValueError(f"datamodule.n_samples={n_samples} must be at least 2: one row of each label")
        self.language, self.universe, self.length = language, universe, length
        self.set_sizes = (set_size,) if isinstance(set_size, int) else tuple(set_size)
        self.test_set_sizes, self.test_lengths = tuple(test_set_sizes), tuple(test_lengths)
        self.classes = CLASSES
        self.unread = ("length", "test_lengths") if language == "sets" else ("universe", "set_size", "test_set_sizes")
        if language == "sets":
            self._check_sets()
            self.tokens = (*map(str, range(universe)), "SEP")
            inputs = sum(universe * math.perm(universe, m) for m in set(self.set_sizes))
            self._distinct = sum(universe * math.comb(universe, m) for m in set(self.set_sizes))
        else:
            self._check_lengths()
            self.tokens = (*ALPHABETS[language], "SEP")
            inputs = self._distinct = sum(len(ALPHABETS[language]) ** n for n in range(1, length + 1))
        if self.n_samples > max(default, inputs):
            raise ValueError(
                f"datamodule.n_samples={n_samples} is too large: datamodule.language={language} has only {inputs:,} "
                f"inputs of this size; try n_samples={max(1, inputs // 2)} or n_samples=null"
            )

    def _check_sets(self) -> None:
        sizes = (*self.set_sizes, *self.test_set_sizes)
        if self.universe > MAX_LENGTH:
            raise ValueError(f"datamodule.universe={self.universe} is too large; at most {MAX_LENGTH:,} elements")
        if not self.set_sizes or any(not 1 <= m < self.universe for m in sizes):
            raise ValueError(
                f"datamodule.set_size={list(self.set_sizes)}, test_set_sizes={list(self.test_set_sizes)}: a size must "
                f"lie between 1 and {self.universe - 1}, so that universe={self.universe} has queries of both labels"
            )
        if both := set(self.set_sizes) & set(self.test_set_sizes):
            raise ValueError(f"datamodule.test_set_sizes: size {min(both)} is a training size and has its test split")

    def _check_lengths(self) -> None:
        ends = [self.length, *self.test_lengths]
        if self.length < 1 or ends[-1] > MAX_LENGTH or any(b <= a for a, b in itertools.pairwise(ends)):
            raise ValueError(
                f"datamodule.length={self.length}, test_lengths={list(self.test_lengths)}: "
                f"lengths start at 1, end at {MAX_LENGTH:,}, and each bin must end behind the one before"
            )

    def n_outputs(self, prompt_length: int) -> int:
        return 1

    def make_splits(self) -> dict[str, Sequences]:
        rng = np.random.default_rng((self.seed, 1))
        if self.language == "sets":
            rows = self._split_by_hash(partial(draw_sets, self.universe, self.set_sizes), rng)
            for m in self.test_set_sizes:
                rows[f"test/size_{m}"] = balanced(partial(draw_sets, self.universe, [m]), N_HELD_OUT, rng)
            return {name: self._lay_out_sets(split, rng) for name, split in rows.items()}
        if self.language in ONE_MEMBER_A_LENGTH:
            lengths, sizes = self._split_lengths(rng), {"train": self.n_samples}
            rows = {
                name: balanced(partial(draw_strings, self.language, part), sizes.get(name, N_HELD_OUT), rng)
                for name, part in lengths.items()
            }
        else:
            rows = self._split_by_hash(partial(draw_strings, self.language, range(1, self.length + 1)), rng)
        for low, high in itertools.pairwise([self.length, *self.test_lengths]):
            draw = partial(draw_strings, self.language, range(low + 1, high + 1))
            rows[f"test/length_{low + 1}_{high}"] = balanced(draw, N_HELD_OUT, rng)
        return {name: self._lay_out_strings(split) for name, split in rows.items()}

    def _split_by_hash(self, draw: Draw, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Half of each split are members. Held-out rows are distinct: a few short strings would be most of them."""
        held_out = min(N_HELD_OUT, max(1, self._distinct // 12))  # leaves most of a small space to training
        by_label = []
        for member, n in ((False, self.n_samples // 2), (True, self.n_samples - self.n_samples // 2)):
            sizes = {"train": n, "val": held_out, "test": held_out}
            try:
                by_label.append(split_by_hash(partial(draw_of_label, draw, member), sizes, self.seed))
            except ValueError as error:
                size = f"universe={self.universe}" if self.language == "sets" else f"length={self.length}"
                where = f"datamodule.{size} is too small for datamodule.language={self.language}"
                raise ValueError(f"{where}: {error}") from None
        splits = {"train": rng.permutation(np.concatenate([part["train"] for part in by_label]))}
        for name in ("val", "test"):
            distinct = [rng.permutation(np.unique(part[name], axis=0)) for part in by_label]
            n = min(N_HELD_OUT // 2, *map(len, distinct))
            splits[name] = rng.permutation(np.concatenate([rows[:n] for rows in distinct]))
        return splits

    def _split_lengths(self, rng: np.random.Generator) -> dict[str, list[int]]:
        """Lengths for each split; an odd one and the next even one stay together, so that both labels are in each."""
        pairs = [[k - 1, k] for k in range(2, self.length - 1, 2)]  # the longest are for training
        if len(pairs) < 3:
            raise ValueError(
                f"datamodule.length={self.length} is too short for datamodule.language={self.language}, which can "
                "only be tested on lengths it was not trained on; try datamodule.length=12"
            )
        val, test, _ = np.split(rng.permutation(pairs), np.cumsum([-(-len(pairs) // 8), -(-len(pairs) // 4)]))
        train = np.setdiff1d(np.arange(1, self.length + 1), [*val.flatten(), *test.flatten()])
        return {name: lengths.flatten().tolist() for name, lengths in (("train", train), ("val", val), ("test", test))}

    def _lay_out_sets(self, rows: np.ndarray, rng: np.random.Generator) -> Sequences:
        prompts, labels = [], []
        for *elements, query in rows.tolist():
            context = rng.permutation([e for e in elements if e < self.universe]).tolist()
            prompts.append([*context, self.universe, query])  # SEP is token number `universe`
            labels.append([int(query in context)])
        return lay_out(prompts, labels, ())

    def _lay_out_strings(self, rows: np.ndarray) -> Sequences:
        separator = len(self.tokens) - 1
        strings = [row[row >= 0] for row in rows]
        labels = [[int(contains(self.language, string[None])[0])] for string in strings]
        return lay_out([[*string, separator] for string in strings], labels, ())
