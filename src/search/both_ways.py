"""Moves tried one after the other, each forward and then backward, and made where the loss of the batch falls."""

from collections.abc import Callable

from torch import Tensor

from search.base import LossOnlyOptimizer
from search.budget import Evaluator
from search.closure import Changes, part_of
from search.losses import improves


def try_both_ways(search: LossOnlyOptimizer, evaluate: Evaluator, moves: int, changes: Changes) -> None:
    """Try moves of all weights, each forward, and backward if that fails; make those that lower the loss.

    Candidate 2 k is move k forward and 2 k + 1 backward: `changes` gives the changes (last - first, n) of some.
    """

    def ask(begin: int, end: int) -> Tensor:
        return evaluate.perturbed_until(search.report.loss_after, end - begin, part_of(changes, begin))

    ask_ahead(search, evaluate, moves, ask, lambda k, loss: search.accept(loss, changes(k, k + 1)[0]))


def ask_ahead(
    search: LossOnlyOptimizer,
    evaluate: Evaluator,
    moves: int,
    ask: Callable[[int, int], Tensor],
    accept: Callable[[int, Tensor], None],
) -> None:
    """The same for moves of any kind. Candidates are asked for many at a time, the moves are those of one at a time.

    Args:
        search: the optimizer.
        evaluate: tells how much the budget allows.
        moves: how many, of two candidates each.
        ask: losses of candidates begin to end, up to the first that improves.
        accept: makes the move of a candidate, with its loss.
    """
    total, ahead = 2 * moves, 1
    search.report.planned = total
    while search.report.done < total and evaluate.limit() is None:
        begin = search.report.done
        losses = ask(begin, begin + evaluate.affordable(min(ahead, evaluate.block, total - begin)))
        last = begin + len(losses) - 1
        success = bool(improves(losses[-1:], search.report.loss_after))
        if success:
            accept(last, losses[-1])
        search.report.done = last + 2 - last % 2 if success else last + 1  # without the other side of a success
        ahead = 1 if success else 2 * ahead
