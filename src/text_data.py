"""Text: the next character of any text file, or of the help texts that Python itself ships (no download).

The text is cut into windows, neighbouring windows into blocks, and whole blocks are dealt to the splits, so that no
character is in two of them. A window reads all its characters but the last, and every position is scored.
Show some data with `python src/show_data.py task=text datamodule.length=32`.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.ngrams import ngram_losses
from data.sequences import MAX_LENGTH, SequenceDataModule, Sequences, check_range

OTHER = "\N{REPLACEMENT CHARACTER}"  # the one token of all rare characters
BLOCK = 10  # neighbouring windows that go to the same split
HELD_OUT = 0.05  # share of the blocks in validation, and in the test
NGRAMS = ("unigram", "bigram", "trigram")


def read_text(path: str | None, encoding: str) -> str:
    """The text of a file, or of Python's own help; every end of a line is a newline.

    Raises:
        ValueError: it cannot be read, is no text, or has another encoding.
    """
    if path is None:
        from pydoc_data.topics import topics  # "assert", "assignment", ...: other versions of Python have other texts

        return "\n".join(topics[name] for name in sorted(topics))
    file, given = Path(path).expanduser(), f"datamodule.path={path}"
    try:
        if file.exists() and not file.is_file():  # a directory, or a device that may never end
            raise ValueError(f"{given} is not a file; give one text file")
        text = file.read_text(encoding=encoding)
    except LookupError:
        raise ValueError(f"datamodule.encoding={encoding} is not known; try utf-8, utf-16 or latin-1") from None
    except UnicodeError as error:
        raise ValueError(f"{given} is not text in datamodule.encoding={encoding}: {error}") from None
    except OSError as error:
        raise ValueError(f"{given} cannot be read: {error.strerror}") from None
    if not text:
        raise ValueError(f"{given} is empty")
    if "\0" in text:
        raise ValueError(f"{given} is not text in datamodule.encoding={encoding}: it holds the character NUL")
    return text


class TextDataModule(SequenceDataModule):
    """Windows of a text; the classes are the tokens, characters of the whole text.

    Args:
        path: text file; None for `pydoc_data.topics`, some 465,000 characters of English with code.
        encoding: of the file.
        length: characters that a window reads.
        min_count: characters that the text has less often are one token, OTHER.
        n_samples: training windows, a random subset; None for all.
        n_held_out: windows of validation and of the test, at most.
        batch_size, seed: as in `SequenceDataModule`.

    Raises:
        ValueError: a file that is not text, a text that is too short, an impossible size.
    """

    separator = ""
    characters: int  # of the text
    sha256: str  # of the text in UTF-8

    def __init__(
        self,
        path: str | None = None,
        encoding: str = "utf-8",
        length: int = 64,
        min_count: int = 20,
        n_samples: int | None = None,
        n_held_out: int = 256,
        batch_size: int = 32,
        seed: int = 0,
    ):
        check_range("length", length, 1, MAX_LENGTH)
        check_range("min_count", min_count, 1)
        check_range("n_held_out", n_held_out, 1)
        text = read_text(path, encoding)
        self.length, self.unread = length, ("encoding",) if path is None else ()
        self.characters = len(text)
        self.sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        if len(text) < (needed := 3 * BLOCK * (length + 1)):
            raise ValueError(
                f"datamodule.length={length} needs a text of {needed:,} characters at least, and this one has "
                f"{len(text):,}; use shorter windows or a longer text"
            )
        self.tokens, ids = tokenise(text, min_count)
        self.classes = self.tokens
        windows = cut(ids, length)
        if len(windows) < 3 * BLOCK:
            raise ValueError(
                f"datamodule.length={length} leaves {len(windows)} windows that differ, and three splits need "
                f"{3 * BLOCK}: the text repeats itself; use another one"
            )
        rng = np.random.default_rng((seed, 1))
        blocks = np.array_split(np.arange(len(windows)), len(windows) // BLOCK)  # neighbours stay together
        blocks = [blocks[i] for i in rng.permutation(len(blocks))]
        n = max(1, round(HELD_OUT * len(blocks)))
        train = rng.permutation(np.concatenate(blocks[2 * n :]))
        if (n_samples or 1) > len(train):
            raise ValueError(f"datamodule.n_samples={n_samples} is more than the {len(train):,} training windows")
        super().__init__(batch_size, len(train) if n_samples is None else n_samples, seed)
        rows = {
            "train": train[: self.n_samples],
            "val": rng.permutation(np.concatenate(blocks[:n]))[:n_held_out],
            "test": rng.permutation(np.concatenate(blocks[n : 2 * n]))[:n_held_out],
        }
        self.windows = {split: windows[of_split] for split, of_split in rows.items()}

    def make_splits(self) -> dict[str, Sequences]:
        every, half = tuple(range(self.n_classes)), max(1, self.length // 2)
        splits = {}
        for split, windows in self.windows.items():
            full = torch.from_numpy(windows)  # (N, length + 1)
            splits[split] = Sequences(full[:, :-1], full[:, 1:], output_tokens=every, prompt_length=half)
        return splits

    def prompt(self, text: str) -> list[int]:
        """Token ids of an input's characters; ValueError for one that the text lacks, or has too seldom."""
        if unknown := sorted({*text} - {*self.tokens}):
            raise ValueError(f"the text has too few of these characters, or none: {' '.join(map(repr, unknown))}")
        if not text:
            raise ValueError("an input needs a character at least")
        return [self.tokens.index(character) for character in text]

    def n_outputs(self, prompt_length: int) -> int:
        return max(1, self.max_len - prompt_length + 1)  # to the end of a window

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Loss of n-grams that were fitted to the training windows, nats per character of a split."""
        known = NGRAMS[: self.length + 1]  # a window of 2 characters has no trigram
        losses = ngram_losses(self.windows["train"], self.windows[split], self.n_classes, len(known))
        return dict(zip(known, losses, strict=True))

    def facts(self) -> dict[str, Any]:
        losses = {f"{name}_loss": loss for name, loss in self.baselines().items()}
        return {"characters": self.characters, "sha256": self.sha256} | losses


def cut(ids: np.ndarray, length: int) -> np.ndarray:
    """The windows (N, length + 1) of a text, in its order, without its last few characters.

    Of windows that read the same, tables and rulers, the first stays: splits that share no character share no input.
    """
    windows = ids[: len(ids) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    if not len(windows):
        return windows
    return windows[np.sort(np.unique(windows[:, :-1], axis=0, return_index=True)[1])]


def tokenise(text: str, min_count: int) -> tuple[tuple[str, ...], np.ndarray]:
    """The tokens of a text, frequent characters in the order of Unicode and OTHER if there are rare ones, and its ids.

    Raises:
        ValueError: fewer than two tokens are left.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    found, inverse, counts = np.unique(codes, return_inverse=True, return_counts=True)
    kept = (counts >= min_count) & (found != ord(OTHER))
    tokens = (*map(chr, found[kept].tolist()), *[OTHER] * (not kept.all()))
    if not kept.any() or len(tokens) < 2:
        raise ValueError(
            f"datamodule.min_count={min_count} leaves {kept.sum()} of the {len(found)} characters of the text, the "
            f"most frequent of which it has {counts.max():,} times; a model needs two tokens to tell apart"
        )
    ids = np.where(kept, kept.cumsum() - 1, kept.sum())  # by character; the rare ones share the last
    return tokens, ids[inverse]
