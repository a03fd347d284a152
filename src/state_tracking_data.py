"""State tracking: parity, cyclic groups, permutation groups and their products.

A sequence x_1 .. x_n of group elements, drawn uniformly, and the state after each of them,
y_t = x_1 x_2 ... x_t. Parity counts ZEROS: y_t = (number of zeros among x_1 .. x_t) mod 2.
Task and product follow Merrill, Petty and Sabharwal 2024, "The Illusion of State in State-Space
Models"; A5, A4xZ5 and Z60 all have 60 elements and are non-solvable, solvable but not abelian,
and abelian. Show some data with `python src/show_data.py task=state_tracking`.
"""

import itertools
import re
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property

import numpy as np
import torch

from config.did_you_mean import one_of, unknown
from data.sequences import MAX_LENGTH, SequenceDataModule, Sequences, lay_out, split_strings

KNOWN_GROUPS = ("parity", "Z2", "Z3", "Z5", "Z60", "S3", "S5", "A5", "A4xZ5")
MAX_ORDER = 5040  # the product table of S7 has 25 million entries; larger groups are refused


class Group:
    """A finite group, elements in a fixed order with the identity first.

    >>> s3 = Group.named("S3")
    >>> s3.multiply((1, 3, 2), (3, 1, 2))
    (2, 1, 3)
    >>> s3.elements[0] == s3.identity
    True
    """

    def __init__(self, name: str, elements: Sequence[Hashable], product: Callable):
        self.name = name
        self.elements = tuple(elements)
        self.multiply = product  # multiply(a, b) -> a.b, on elements
        self.identity = self.elements[0]
        self.index = {element: i for i, element in enumerate(self.elements)}

    def __len__(self) -> int:
        return len(self.elements)

    @cached_property
    def table(self) -> np.ndarray:
        """(|G|, |G|) indices: table[i, j] is the index of elements[i].elements[j]."""
        rows = [[self.index[self.multiply(a, b)] for b in self.elements] for a in self.elements]
        return np.array(rows, dtype=np.int64)

    def prefix_products(self, indices: np.ndarray) -> np.ndarray:
        """States y_t = x_1 x_2 ... x_t of sequences of element indices: (N, T) -> (N, T)."""
        states = np.array(indices, dtype=np.int64)
        for t in range(1, states.shape[1]):
            states[:, t] = self.table[states[:, t - 1], states[:, t]]
        return states

    @classmethod
    def named(cls, name: str) -> "Group":
        """Z<n>, S<n>, A<n>, or a product of them such as A4xZ5.

        Raises:
            ValueError: the name is not of this form, or the group is too large for a product table.
        """
        factors = [_factor(part, name) for part in name.split("x")]
        order = int(np.prod([len(f) for f in factors]))
        if order > MAX_ORDER:
            raise ValueError(f"datamodule.group={name} has {order:,} elements; at most {MAX_ORDER:,} are supported")
        if len(factors) == 1:
            return factors[0]

        def product(a, b):
            return tuple(f.multiply(x, y) for f, x, y in zip(factors, a, b, strict=True))

        return cls(name, list(itertools.product(*(f.elements for f in factors))), product)


def _factor(part: str, name: str) -> Group:
    match = re.fullmatch(r"([ZSA])([1-9]\d*)", part)
    if not match:
        raise ValueError(unknown(f"datamodule.group={name}", name, KNOWN_GROUPS))
    kind, n = match[1], int(match[2])
    if kind == "Z":
        if n > MAX_ORDER:
            raise ValueError(f"datamodule.group={name} is too large: Z<n> takes n up to {MAX_ORDER}")
        return Group(part, range(n), lambda a, b: (a + b) % n)
    if n > 7:
        raise ValueError(f"datamodule.group={name} is too large: {kind}<n> takes n up to 7")
    permutations = list(itertools.permutations(range(1, n + 1)))  # lexicographic, identity first
    if kind == "A":
        permutations = [p for p in permutations if _is_even(p)]
    return Group(part, permutations, lambda a, b: tuple(a[i - 1] for i in b))


def _is_even(permutation: tuple[int, ...]) -> bool:
    inversions = sum(a > b for a, b in itertools.combinations(permutation, 2))
    return inversions % 2 == 0


class StateTrackingDataModule(SequenceDataModule):
    """Strings of group elements and their running products.

    Args:
        group: "parity", "Z<n>", "S<n>", "A<n>" or a product such as "A4xZ5".
        length: elements a sequence, in training, validation and test.
        format: "seq" reads the input, a separator, and then writes the states (x has 2 * length
            tokens, length of them scored); "tag" writes the state below each input token.
        n_samples: training strings. Spaces of up to 65,536 strings are cut without repetition and
            the rest is shared by validation and test; of larger ones both hold 1,000.
        test_lengths: lengths of further test sets, e.g. [16, 32] -> "test/length_16", "test/length_32".
        batch_size, seed: as in `SequenceDataModule`.

    Raises:
        ValueError: an unknown group or format, or more strings than there are.
    """

    def __init__(
        self,
        group: str = "parity",
        length: int = 8,
        format: str = "seq",
        n_samples: int = 200,
        batch_size: int = 32,
        test_lengths: Sequence[int] = (),
        seed: int = 0,
    ):
        super().__init__(batch_size, n_samples, seed)
        one_of("datamodule.format", format, ("seq", "tag"))
        if any(not 1 <= n <= MAX_LENGTH for n in (length, *test_lengths)):
            given = f"datamodule.length={length}, test_lengths={list(test_lengths)}"
            raise ValueError(f"{given}: lengths start at 1, and end at {MAX_LENGTH:,}")
        if length in test_lengths:  # strings of another length cannot be among the training strings
            raise ValueError(f"datamodule.test_lengths: length {length} is the training length and has its test split")
        self.group = Group.named("Z2" if group == "parity" else group)
        if len(self.group) < 2:
            raise ValueError(f"datamodule.group={group} has one element, so there is nothing to track")
        self.counts_zeros = group == "parity"
        self.length, self.format, self.test_lengths = length, format, tuple(test_lengths)
        self.classes = tuple(str(e).replace(" ", "") for e in self.group.elements)
        self.tokens = self.classes if format == "tag" else (*self.classes, "SEP")

    def states(self, strings: np.ndarray) -> np.ndarray:
        """The state after each element: (N, n) element indices -> (N, n)."""
        return self.group.prefix_products(1 - strings if self.counts_zeros else strings)

    def n_outputs(self, prompt_length: int) -> int:
        return prompt_length if self.format == "tag" else max(1, prompt_length - 1)

    def make_splits(self) -> dict[str, Sequences]:
        sizes = {"train": self.n_samples, "val": -1, "test": -1}
        strings = split_strings(len(self.group), self.length, sizes, self.seed)
        for n in self.test_lengths:
            strings[f"test/length_{n}"] = split_strings(len(self.group), n, {"test": -1}, self.seed)["test"][:1000]
        return {name: self._lay_out(rows) for name, rows in strings.items()}

    def _lay_out(self, strings: np.ndarray) -> Sequences:
        states = self.states(strings)
        if self.format == "tag":
            return Sequences(torch.from_numpy(strings.copy()), torch.from_numpy(states))
        separator = np.full((len(strings), 1), len(self.group))
        return lay_out(np.hstack([strings, separator]), states, range(len(self.group)))
