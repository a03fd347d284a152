"""Thirteen formal languages: membership, exact counts, uniform members and near misses.

The seven of Tomita 1982 (as in Weiss, Goldberg and Yahav 2018), parity, (aa)*, (ab)*, a^n b^n, Dyck-1 and Dyck-2; the
empty string is a member of each. Strings are rows of symbol indices here; `membership_data.py` makes a task of them.
"""

from collections.abc import Sequence

import numpy as np

# alphabet, next state by (state, symbol), accepting states; the start is state 0
REGULAR = {
    "tomita1": ("01", [[1, 0], [1, 1]], [0]),  # 1*
    "tomita2": ("01", [[2, 1], [0, 2], [2, 2]], [0]),  # (10)*
    # no odd block of 0s anywhere after an odd block of 1s has ended: 1 is an odd block of 1s,
    # 2 and 3 an odd and an even number of 0s once one has ended
    "tomita3": ("01", [[0, 1], [2, 0], [3, 4], [2, 3], [4, 4]], [0, 1, 3]),
    "tomita4": ("01", [[1, 0], [2, 0], [3, 0], [3, 3]], [0, 1, 2]),  # no 000
    "tomita5": ("01", [[1, 2], [0, 3], [3, 0], [2, 1]], [0]),  # even numbers of 0s and of 1s
    "tomita6": ("01", [[2, 1], [0, 2], [1, 0]], [0]),  # (#1 - #0) mod 3 = 0
    "tomita7": ("01", [[0, 1], [2, 1], [2, 3], [4, 3], [4, 4]], [0, 1, 2, 3]),  # 0*1*0*1*
    "parity": ("01", [[0, 1], [1, 0]], [0]),  # an even number of 1s
    "aa": ("a", [[1], [0]], [0]),  # (aa)*
    "ab": ("ab", [[1, 2], [2, 0], [2, 2]], [0]),  # (ab)*
}
ALPHABETS = {name: alphabet for name, (alphabet, _, _) in REGULAR.items()} | {
    "anbn": "ab",  # a^n b^n
    "dyck1": "()",  # well nested and matched
    "dyck2": "()[]",
}
LANGUAGES = tuple(ALPHABETS)
ONE_MEMBER_A_LENGTH = ("tomita1", "tomita2", "aa", "ab", "anbn")  # at most one member of each length


def automaton(language: str, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """A finite automaton that decides the strings of up to `longest` symbols of a language (Dyck-2 has none).

    Returns:
        table (S, A): the next state by (state, symbol), started in state 0; accepting (S,) bool.
    """
    if language == "dyck1":  # the state is the depth, the last state is dead
        depth, dead = np.arange(longest + 1), longest + 1
        moves = np.stack([depth + 1, np.where(depth > 0, depth - 1, dead)], axis=1)
        table, accepting = [*moves.tolist(), [dead, dead]], [0]
    elif language == "anbn":  # 0..h count the a's read, h + 1 + k says that k b's are missing, the last is dead
        h = longest // 2
        dead = 2 * h + 2
        table = [[i + 1 if i < h else dead, h + i if i else dead] for i in range(h + 1)]
        table += [[dead, h + k if k else dead] for k in range(h + 1)] + [[dead, dead]]
        accepting = [0, h + 1]
    else:
        _, table, accepting = REGULAR[language]
    return np.asarray(table), np.isin(np.arange(len(table)), accepting)


def contains(language: str, strings: np.ndarray) -> np.ndarray:
    """Which strings are members: symbol indices (N, n) -> bool (N,)."""
    if language == "dyck2":
        return np.array([_is_nested(string) for string in strings.tolist()], dtype=bool)
    table, accepting = automaton(language, strings.shape[1])
    state = np.zeros(len(strings), dtype=np.int64)
    for symbol in strings.T:
        state = table[state, symbol]
    return accepting[state]


def _is_nested(string: list[int]) -> bool:
    stack = []
    for symbol in string:
        if symbol % 2 == 0:
            stack.append(symbol)
        elif not stack or stack.pop() != symbol - 1:
            return False
    return not stack


def path_counts(language: str, length: int) -> np.ndarray:
    """(length + 1, S): entry [r, s] counts the strings of r symbols that lead from state s to acceptance.

    For Dyck-2 it counts shapes, i.e. the strings with both kinds of bracket written alike. Row 0 of Dyck-1 holds the
    ballot numbers. Exact up to 2^53.
    """
    table, accepting = automaton("dyck1" if language == "dyck2" else language, length)
    counts = [accepting.astype(np.float64)]
    for _ in range(length):
        counts.append(counts[-1][table].sum(1))
    return np.array(counts)


def count_members(language: str, length: int) -> int:
    """How many strings of `length` symbols are members."""
    shapes = int(path_counts(language, length)[length, 0])
    return shapes * 2 ** (length // 2) if language == "dyck2" else shapes


def sample_members(language: str, length: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """n members of `length` symbols, exactly uniform, without rejection: symbol indices (n, length).

    Each symbol is drawn in proportion to the number of members that begin like this.
    """
    table, _ = automaton("dyck1" if language == "dyck2" else language, length)
    counts = path_counts(language, length)
    strings = np.zeros((n, length), dtype=np.int64)
    state = np.zeros(n, dtype=np.int64)
    for t in range(length):
        cumulative = counts[length - t - 1][table[state]].cumsum(1)  # (n, A)
        strings[:, t] = (rng.random((n, 1)) * cumulative[:, -1:] >= cumulative).sum(1)
        state = table[state, strings[:, t]]
    return _colour(strings, rng) if language == "dyck2" else strings


def _colour(strings: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Make each matched pair of ( ) a pair of [ ] by a fair coin: all shapes have equally many colourings."""
    open_kind = np.zeros((len(strings), strings.shape[1] + 1), dtype=np.int64)  # kind of the open bracket at a depth
    rows, depth = np.arange(len(strings)), np.zeros(len(strings), dtype=np.int64)
    coloured = strings.copy()
    for t, symbol in enumerate(strings.T):
        opens = symbol == 0
        depth = depth - ~opens  # of this bracket
        open_kind[rows, depth] = np.where(opens, 2 * rng.integers(2, size=len(strings)), open_kind[rows, depth])
        coloured[:, t] += open_kind[rows, depth]
        depth = depth + opens
    return coloured


def sample_non_members(language: str, length: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """n non-members, half uniform and half near misses (one or two edits of a member): (n, length)."""
    n_symbols = len(ALPHABETS[language])
    strings = np.zeros((n, length), dtype=np.int64)
    near, missing = rng.random((n, 1)) < 0.5, np.arange(n if n_symbols > 1 else 0)
    while len(missing):
        uniform = rng.integers(n_symbols, size=(len(missing), length))
        edited = _edit(sample_members(language, length, len(missing), rng), n_symbols, rng)
        edited = np.where(rng.random((len(missing), 1)) < 0.5, edited, _edit(edited, n_symbols, rng))
        strings[missing] = np.where(near[missing], edited, uniform)
        missing = missing[contains(language, strings[missing])]
    return strings


def _edit(strings: np.ndarray, n_symbols: int, rng: np.random.Generator) -> np.ndarray:
    """In each row substitute a symbol or swap two."""
    (n, length), rows = strings.shape, np.arange(len(strings))
    i, j = rng.integers(length, size=(2, n))
    substituted, swapped = strings.copy(), strings.copy()
    substituted[rows, i] = (strings[rows, i] + rng.integers(1, n_symbols, size=n)) % n_symbols
    swapped[rows, i], swapped[rows, j] = strings[rows, j], strings[rows, i]
    return np.where(rng.random((n, 1)) < 0.5, substituted, swapped)


def draw_strings(language: str, lengths: Sequence[int], member: bool, rng: np.random.Generator, n: int) -> np.ndarray:
    """n members or n non-members, of lengths drawn uniformly: (n, max(lengths)), padded with -1.

    Only lengths that have both count, so that the length is no cue. (aa)* has no such length: there the label is the
    length.

    Raises:
        ValueError: no length has members and non-members.
    """
    n_symbols = len(ALPHABETS[language])
    members = {k: count_members(language, k) for k in lengths}
    if n_symbols == 1:
        usable = [k for k in lengths if bool(members[k]) == member]
    else:
        usable = [k for k in lengths if 0 < members[k] < n_symbols**k]
    if not usable:
        raise ValueError(
            f"datamodule.language={language} has no members and non-members of {min(lengths)} to {max(lengths)} symbols"
        )
    sample = sample_members if member else sample_non_members
    length = rng.choice(usable, n)
    rows = np.full((n, max(lengths)), -1, dtype=np.int64)
    for k in usable:
        at = np.flatnonzero(length == k)
        rows[at, :k] = sample(language, k, len(at), rng)
    return rows
