"""State tracking: parity, cyclic groups, permutation groups and their products.

A sequence x_1 .. x_n of group elements, drawn uniformly, and the state after each of them, y_t = x_1 x_2 ... x_t.
Parity counts ZEROS: y_t = (number of zeros among x_1 .. x_t) mod 2. Task and product follow Merrill, Petty and
Sabharwal 2024, "The Illusion of State in State-Space Models"; A5, A4xZ5 and Z60 all have 60 elements and are
non-solvable, solvable but not abelian, and abelian. Show some data with `python src/show_data.py task=state_tracking`.
"""

import itertools
import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from config.did_you_mean import one_of, unknown
from data.sequences import MAX_LENGTH, SequenceDataModule, Sequences, check_range, lay_out, split_strings

KNOWN_GROUPS = ("parity", "Z2", "Z3", "Z5", "Z60", "S3", "S5", "A5", "A4xZ5")
OF_GROUPS = ("parity", "Z<n>", "S<n>", "A<n>", "and products such as A4xZ5")  # what names may be like
MAX_ORDER = 5040  # the product table of S7 has 25 million entries; larger groups are refused


@dataclass(frozen=True)
class Group:
    """A finite group, elements in a fixed order with the identity first.

    >>> s3 = Group.named("S3")
    >>> s3.elements[s3.table[1, 4]]  # (1, 3, 2) . (3, 1, 2)
    (2, 1, 3)
    """

    elements: Sequence[Hashable]
    table: np.ndarray  # (|G|, |G|): table[i, j] is the index of elements[i] . elements[j]

    def __len__(self) -> int:
        return len(self.elements)

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
        parts = [re.fullmatch(r"([ZSA])([1-9]\d{0,3})", part) for part in name.split("x")]
        factors = [(part[1], int(part[2])) for part in parts if part]
        if len(factors) < len(parts):
            raise ValueError(unknown(f"datamodule.group={name}", name, KNOWN_GROUPS, OF_GROUPS))
        if all(n == 1 or (kind, n) == ("A", 2) for kind, n in factors):
            raise ValueError(f"datamodule.group={name} has one element only: there is nothing to learn; use Z2, say")
        if math.prod(n if kind == "Z" else math.factorial(n) for kind, n in factors) > MAX_ORDER:
            raise ValueError(f"datamodule.group={name} is too large: Z{MAX_ORDER}, S7 and A7 are the largest supported")
        groups = [cls.cyclic(n) if kind == "Z" else cls.permutations(n, even=kind == "A") for kind, n in factors]
        if len(groups) == 1:
            return groups[0]
        table = np.zeros((1, 1), dtype=np.int64)
        for group in groups:  # (a, b) . (c, d) = (a.c, b.d), with the last factor running fastest
            table = np.kron(table * len(group), np.ones_like(group.table)) + np.kron(np.ones_like(table), group.table)
        return cls([*itertools.product(*(group.elements for group in groups))], table)

    @classmethod
    def cyclic(cls, n: int) -> "Group":
        return cls(range(n), np.add.outer(np.arange(n), np.arange(n)) % n)

    @classmethod
    def permutations(cls, n: int, even: bool) -> "Group":
        """Permutations of 1 .. n in lexicographic order, all or the even ones; (a.b)[i] = a[b[i]]."""
        rows = np.array([*itertools.permutations(range(n))])  # (n!, n)
        if even:
            rows = rows[np.linalg.det(np.eye(n)[rows]) > 0]  # the sign of a permutation is that of its matrix
        place = n ** np.arange(n)[::-1]  # numbers whose digits are the permutations rise from row to row
        table = np.stack([np.searchsorted(rows @ place, a[rows] @ place) for a in rows])
        return cls([tuple(row) for row in (rows + 1).tolist()], table)


class StateTrackingDataModule(SequenceDataModule):
    """Strings of group elements and their running products.

    Args:
        group: "parity", "Z<n>", "S<n>", "A<n>" or a product such as "A4xZ5".
        length: elements a sequence, in training, validation and test.
        format: "seq" reads the input, a separator, and then writes the states (x has 2 * length tokens, length of them
            scored); "tag" writes the state below each input token.
        n_samples: training strings. Spaces of up to 65,536 strings are cut without repetition and the rest is shared by
            validation and test; of larger ones both hold 1,000.
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
        check_range("length", length, 1, MAX_LENGTH)
        check_range("test_lengths", test_lengths, 1, MAX_LENGTH)
        if length in test_lengths:  # strings of another length cannot be among the training strings
            raise ValueError(f"datamodule.test_lengths: length {length} is the training length and has its test split")
        self.group = Group.named("Z2" if group == "parity" else group)
        self.counts_zeros = group == "parity"
        self.length, self.format, self.test_lengths = length, format, tuple(test_lengths)
        self.classes = tuple(str(e).replace(" ", "") for e in self.group.elements)
        self.tokens = self.classes if format == "tag" else (*self.classes, "SEP")

    def n_outputs(self, prompt_length: int) -> int:
        return prompt_length if self.format == "tag" else max(1, prompt_length - 1)

    def make_splits(self) -> dict[str, Sequences]:
        sizes = {"train": self.n_samples, "val": -1, "test": -1}
        strings = split_strings(len(self.group), self.length, sizes, self.seed)
        for n in self.test_lengths:
            strings[f"test/length_{n}"] = split_strings(len(self.group), n, {"test": -1}, self.seed)["test"][:1000]
        return {name: self._lay_out(rows) for name, rows in strings.items()}

    def _lay_out(self, strings: np.ndarray) -> Sequences:
        states = self.group.prefix_products(1 - strings if self.counts_zeros else strings)
        if self.format == "tag":
            return Sequences(torch.from_numpy(strings.copy()), torch.from_numpy(states))
        separator = np.full((len(strings), 1), len(self.group))
        return lay_out(np.hstack([strings, separator]), states, range(len(self.group)))
