"""What every task shares: the layout of x and y, disjoint splits, a resumable loader, the data module.

A family of tasks (`state_tracking_data.py`, `scan_data.py`, `text_data.py`, ...) says which
tokens and classes there are and makes its splits; everything else is here. The way of the data is
tokens -> `lay_out` -> `Sequences` -> `SequenceLoader` -> batch `{"x": (B, T), "y": (B, T)}`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from config.did_you_mean import one_of

IGNORE = -100  # the target of a position that is not scored; the default ignore_index of torch's cross_entropy
MAX_LENGTH = 4096  # elements or symbols of a sequence: attention needs memory for the square of it
MAX_ENUMERATED = 2**16  # spaces up to this size are enumerated, shuffled and cut; larger ones are split by hash


@dataclass(frozen=True)
class Sequences:
    """Sequences laid out for a decoder: `x` (N, T) token ids, `y` (N, T) classes or IGNORE.

    `output_tokens` holds the token by which each class is read once it is written, for the first classes; the others
    end an output. None if all of x is given, so that nothing that is written is read. `prompt_length` is how many
    tokens are given where all are scored, as in a text that is written on; None: all up to the first scored position.
    """

    x: Tensor
    y: Tensor
    output_tokens: tuple[int, ...] | None = None
    prompt_length: int | None = None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def scored(self) -> Tensor:
        """(N, T) bool: the positions that count in the loss and in the metrics."""
        return self.y != IGNORE

    @property
    def written(self) -> Tensor:
        """(N, T) bool: the scored positions that are not given."""
        return self.scored & (torch.arange(self.y.shape[1], device=self.y.device) + 1 >= (self.prompt_length or 0))

    def inputs(self) -> list[tuple[int, ...]]:
        """All tokens that each row reads, without the filler behind its last scored position."""
        return self._first(self.x.shape[1] - self.scored.flip(1).int().argmax(1))

    def prompts(self) -> list[tuple[int, ...]]:
        """The tokens that each row reads before it writes: up to the first written position, or all that are given."""
        return self.inputs() if self.output_tokens is None else self._first(self.written.int().argmax(1) + 1)

    def _first(self, ends: Tensor) -> list[tuple[int, ...]]:
        return [tuple(row[:end]) for row, end in zip(self.x.tolist(), ends.tolist(), strict=True)]


def lay_out(
    prompts: Sequence[Sequence[int]] | np.ndarray,
    outputs: Sequence[Sequence[int]] | np.ndarray,
    output_tokens: Sequence[int],
) -> Sequences:
    """Lay out prompt -> output pairs for next-token prediction.

    `full = prompt + output`, `x = full[:-1]`, `y = full[1:]`, scored from the last token of the
    prompt on. x holds input tokens and y holds output classes: `output_tokens[c]` is the token by
    which class c appears in x. Rows are padded on the right, x with token 0 and y with IGNORE;
    under a causal mask the filler cannot change a scored position.

    Args:
        prompts: N token sequences, each with at least one token (its last one predicts output 0).
        outputs: N class sequences, each with at least one class.
        output_tokens: (C,) the token of each class; classes that only ever end an output need none.
    """
    length = max(len(p) + len(o) - 1 for p, o in zip(prompts, outputs, strict=True))
    x = np.zeros((len(prompts), length), dtype=np.int64)
    y = np.full((len(prompts), length), IGNORE, dtype=np.int64)
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        end = len(prompt) + len(output) - 1
        x[row, : len(prompt)] = prompt
        x[row, len(prompt) : end] = [output_tokens[c] for c in output[:-1]]
        y[row, len(prompt) - 1 : end] = output
    return Sequences(torch.from_numpy(x), torch.from_numpy(y), tuple(output_tokens))


def hash_rows(rows: np.ndarray, seed: int) -> np.ndarray:
    """Hash the rows of an integer array (N, L) to uint64 (N,), the same on every machine.

    Mixes one column after the other with the finaliser of splitmix64 (Steele, Lea, Flood 2014).
    """
    h = np.full(len(rows), (seed + 1) * 0x9E3779B97F4A7C15 % 2**64, dtype=np.uint64)
    for column in rows.astype(np.int64).view(np.uint64).reshape(len(rows), -1).T:
        h = h ^ column
        h = h + np.uint64(0x9E3779B97F4A7C15)  # unsigned arithmetic wraps, as it should
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = h ^ (h >> np.uint64(31))
    return h


def split_by_hash(
    draw: Callable[[np.random.Generator, int], np.ndarray], sizes: dict[str, int], seed: int
) -> dict[str, np.ndarray]:
    """Draw rows until every split is full; which split a row may enter is a hash of the row itself.

    Equal rows have equal hashes, so the splits can share no row, however many rows are drawn.

    Args:
        draw: `draw(rng, n)` returns n random rows (n, L) of integers.
        sizes: rows wanted in each split, e.g. `{"train": 1000, "val": 500, "test": 500}`.
        seed: seeds the draws and the hash.

    Raises:
        ValueError: a split stays short although many times its size was drawn.
    """
    rng, wanted = np.random.default_rng(seed), np.array(list(sizes.values()))
    share = np.maximum(wanted / wanted.sum(), 0.05)  # rare splits must not wait forever
    edges = np.cumsum(share / share.sum()) * 2.0**64
    found: dict[str, list[np.ndarray]] = {name: [] for name in sizes}
    for _ in range(200):
        missing = {name: n - sum(map(len, found[name])) for name, n in sizes.items()}
        if max(missing.values()) <= 0:
            return {name: np.concatenate(found[name])[:n] for name, n in sizes.items()}
        rows = draw(rng, 2 * sum(m for m in missing.values() if m > 0) + 64)
        bucket = np.searchsorted(edges[:-1], hash_rows(rows, seed).astype(np.float64), side="right")
        for i, name in enumerate(sizes):
            found[name].append(rows[bucket == i])
    short = [f"{name} has {sizes[name] - n} of {sizes[name]}" for name, n in missing.items() if n > 0]
    raise ValueError(f"could not fill the splits ({', '.join(short)}): ask for fewer samples, or for more that differ")


def split_strings(n_symbols: int, length: int, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Disjoint splits of the strings of `length` symbols out of `n_symbols`: arrays (size, length).

    Small spaces are enumerated, shuffled with the seed and cut, so no string appears twice; a size
    of -1 takes an equal part of what the others leave. Large spaces are drawn and split by hash.

    Raises:
        ValueError: the sizes ask for more strings than there are.
    """
    space = n_symbols**length
    if space > MAX_ENUMERATED:
        sizes = {name: 1000 if n == -1 else n for name, n in sizes.items()}
        return split_by_hash(lambda rng, n: rng.integers(n_symbols, size=(n, length)), sizes, seed)
    left = space - sum(n for n in sizes.values() if n != -1)
    open_splits = [name for name, n in sizes.items() if n == -1]
    if left < len(open_splits):
        raise ValueError(
            f"datamodule.n_samples={sizes['train']} is too large: there are only {space:,} strings of length {length}, "
            f"and validation and test need some; try n_samples={space * 3 // 4}, or longer strings"
        )
    sizes = {name: n if n != -1 else left // len(open_splits) for name, n in sizes.items()}
    codes = np.random.default_rng(seed).permutation(space)
    digits = codes[:, None] // n_symbols ** np.arange(length - 1, -1, -1) % n_symbols  # (space, length)
    ends = np.cumsum(list(sizes.values()))
    return {name: digits[end - n : end] for (name, n), end in zip(sizes.items(), ends, strict=True)}


def check_range(name: str, values: int | Sequence[int], low: int, high: int | None = None) -> None:
    """Raise a ValueError that names an option of the data if a value of it is below `low` or above `high`."""
    for value in [values] if isinstance(values, int) else values:
        if value < low or (high is not None and value > high):
            rule = f"be at least {low}" if high is None else f"lie between {low} and {high:,}"
            raise ValueError(f"datamodule.{name}={values} must {rule}")


class SequenceLoader:
    """Batches of `Sequences`, shuffled anew each epoch by (seed, epoch), resumable within an epoch.

    The order depends on nothing but the seed and the number of the epoch, so the state is two
    integers. While shuffling, an incomplete last batch is left out: other rows will be left out in
    the next epoch, and an optimizer never decides on a batch of two rows.
    """

    def __init__(self, sequences: Sequences, batch_size: int, shuffle_seed: int | None = None):
        self.sequences = sequences
        self.batch_size = min(batch_size, len(sequences))
        self.shuffle_seed = shuffle_seed
        self.epoch = -1
        self.position = 0
        self._resuming = False

    def __len__(self) -> int:
        batches = len(self.sequences) / self.batch_size
        return math.ceil(batches) if self.shuffle_seed is None else math.floor(batches)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if not self._resuming:
            self.epoch, self.position = self.epoch + 1, 0
        self._resuming = False
        order = torch.arange(len(self.sequences))
        if self.shuffle_seed is not None:
            rng = np.random.default_rng((self.shuffle_seed, self.epoch))
            order = torch.from_numpy(rng.permutation(len(self.sequences)))
        while self.position < len(self):
            rows = order[self.position * self.batch_size :][: self.batch_size]
            self.position += 1
            yield {"x": self.sequences.x[rows], "y": self.sequences.y[rows]}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._resuming = True


class SequenceDataModule(L.LightningDataModule, ABC):
    """The data of a task: vocabulary, classes, splits.

    A subclass sets `tokens` (the input vocabulary, index = token id) and `classes` (the output
    classes) and implements `make_splits`. Splits are named "train", "val", "test" and, for
    further test sets, "test/<name>"; metrics are logged under the same names.

    Args:
        batch_size: sequences a batch.
        n_samples: size of the training set.
        seed: seeds the splits and the order of the batches.

    Raises:
        ValueError: a size is not positive, or the batch is larger than the training set.
    """

    tokens: tuple[str, ...]
    classes: tuple[str, ...]
    unread: tuple[str, ...] = ()  # names of arguments that have no effect beside the other ones
    separator = " "  # between the names of tokens and of classes where people write and read them

    def __init__(self, batch_size: int, n_samples: int, seed: int):
        super().__init__()
        check_range("batch_size", batch_size, 1)
        check_range("n_samples", n_samples, 1)
        self.batch_size, self.n_samples, self.seed = batch_size, n_samples, seed

    @abstractmethod
    def make_splits(self) -> dict[str, Sequences]:
        """Make every split; called once."""

    @cached_property
    def splits(self) -> dict[str, Sequences]:
        splits = self.make_splits()
        if self.batch_size > len(splits["train"]):
            raise ValueError(
                f"datamodule.batch_size={self.batch_size} is larger than the training set of "
                f"{len(splits['train'])}; try datamodule.batch_size={len(splits['train'])}"
            )
        return splits

    def setup(self, stage: str | None = None) -> None:
        _ = self.splits

    @property
    def vocab_size(self) -> int:
        return len(self.tokens)

    @property
    def n_classes(self) -> int:
        return len(self.classes)

    @property
    def max_len(self) -> int:
        """Tokens of the longest x of any split: the positions that a model of this task needs."""
        return max(split.x.shape[1] for split in self.splits.values())

    @property
    def max_train_len(self) -> int:
        """Tokens of the longest x of the training split: the positions that can be trained."""
        return self.splits["train"].x.shape[1]

    @property
    def chance_loss(self) -> float:
        """Cross-entropy, in nats a scored token, of a uniform guess over the classes."""
        return math.log(self.n_classes)

    def facts(self) -> dict[str, Any]:
        """What a run keeps about its data in summary.json, plain values by name; losses, in nats, end in "_loss"."""
        return {}

    # --- inputs of one's own: `data/decoding.py` ---

    def prompt(self, text: str) -> list[int]:
        """Token ids of an input in names, such as "0 1 1"; a SEP at its end may be left out.

        Raises:
            ValueError: no token, or a name that no token has.
        """
        words = text.split()
        if not words or words == ["SEP"]:
            raise ValueError(f"the input is empty; give some of {' '.join(self.tokens)}")
        if "SEP" in self.tokens and "SEP" not in words:
            words.append("SEP")
        for word in words:
            one_of("token", word, self.tokens)
        return [self.tokens.index(word) for word in words]

    def n_outputs(self, prompt_length: int) -> int:
        """How many classes are written after a prompt of so many tokens; the most of them if a class ends an output.

        A task whose outputs have several lengths overrides this. Here it is the length of the longest output.
        """
        return max(int(split.written.sum(1).max()) for split in self.splits.values())

    # --- loaders ---

    def train_dataloader(self) -> SequenceLoader:
        return SequenceLoader(self.splits["train"], self.batch_size, shuffle_seed=self.seed)

    def val_dataloader(self) -> SequenceLoader:
        return SequenceLoader(self.splits["val"], 1000)

    def test_dataloader(self) -> list[SequenceLoader]:
        return [SequenceLoader(self.splits[name], 1000) for name in self.test_names]

    def predict_dataloader(self) -> list[SequenceLoader]:
        return self.test_dataloader()

    @property
    def test_names(self) -> list[str]:
        """The test splits, in the order of the loaders: "test", then "test/<name>" for further ones."""
        return [name for name in self.splits if name == "test" or name.startswith("test/")]
