"""How well the last few tokens alone predict the next one: the baselines of a language model."""

import numpy as np


def ngram_losses(train: np.ndarray, test: np.ndarray, n_tokens: int, order: int) -> list[float]:
    """Losses of the unigram, the bigram, ... up to `order`, fitted on some windows and measured on others.

    Smoothed by interpolation as Witten and Bell (1991, method C; Chen and Goodman 1999, eq. 16): a context that was
    seen n times, before k different tokens, gives the next shorter context the weight k / (n + k); the shortest one is
    uniform. Where a window begins, contexts are as long as they can be.

    Args:
        train: (N, L) token ids.
        test: (M, L') token ids; all but the first of a window are predicted.
        n_tokens: size of the vocabulary.
        order: longest n-gram, tokens.

    Returns:
        Mean negative log-likelihoods, nats per token, one for each order from 1.
    """
    p, losses = np.full((len(test), test.shape[1] - 1), 1 / n_tokens), []  # (M, L' - 1), of the true token
    for n in range(1, order + 1):
        grams, counts = np.unique(codes(train, n, n_tokens), return_counts=True)
        contexts, of_gram = np.unique(grams // n_tokens, return_inverse=True)
        seen, kinds = np.bincount(of_gram, counts), np.bincount(of_gram)  # n and k of a context
        asked = codes(test, n, n_tokens)[:, max(0, 2 - n) :]  # the first token of a window is given
        shorter = p[:, p.shape[1] - asked.shape[1] :]  # a view: longer contexts begin later in a window
        count, total, k = (
            look_up(grams, counts, asked),
            look_up(contexts, seen, asked // n_tokens),
            look_up(contexts, kinds, asked // n_tokens),
        )
        shorter[:] = np.where(total > 0, (count + k * shorter) / np.maximum(total + k, 1), shorter)
        losses.append(float(-np.log(p).mean()))
    return losses


def codes(windows: np.ndarray, n: int, n_tokens: int) -> np.ndarray:
    """Every n-gram of windows (N, L) as a number, (N, L - n + 1)."""
    grams = np.lib.stride_tricks.sliding_window_view(windows.astype(np.int64), n, axis=1)
    return grams @ n_tokens ** np.arange(n - 1, -1, -1)


def look_up(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The values of the keys that are asked for, 0 for others; `keys` is sorted."""
    at = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)
