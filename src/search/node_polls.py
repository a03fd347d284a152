"""Polls of nodes: one evaluation gives a sample of the slopes of all weights of a node (node perturbation)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from search.base import seeded
from search.budget import Evaluator
from search.closure import AnswersNodes
from search.slopes import SlopeMemory


def poll_nodes(
    evaluate: Evaluator,
    slopes: SlopeMemory,
    radius_of: Callable[[Tensor], Tensor],
    saved: dict[str, Any],
    at_most: int,
    rows: int | None,
    seed: int,
) -> None:
    """Poll the next nodes of a random order of all, and remember the slopes that they gave.

    Args:
        evaluate: answers `nodes`.
        slopes: remembers.
        radius_of: (K,) numbers of parameters -> (K,) poll radii.
        saved: of the search; here how many `nodes` were polled so far.
        at_most: nodes polled per step.
        rows: of a larger batch on which they are polled, drawn by the errors left in them; None: all.
        seed: of the order, and of the signs of the moves.

    Raises:
        ValueError: the closure does not answer `nodes`.
    """
    candidates, done = answers_nodes(evaluate), saved["nodes"]
    nodes = next_nodes(done, candidates.n_nodes, at_most, seed)
    nodes = nodes[: evaluate.affordable(len(nodes))]
    steps = radius_of(candidates.node_parameter[nodes])
    found = evaluate.nodes(nodes, steps, seeded(seed, done), rows)
    saved["nodes"] += len(nodes)
    slopes.learn(*found)


def answers_nodes(evaluate: Evaluator) -> AnswersNodes:
    """The candidates of a closure that answers `nodes`; ValueError if it does not."""
    if not isinstance(evaluate.candidates, AnswersNodes):
        raise ValueError(
            "polls of nodes need a closure that answers `nodes`; `polls.nodes.NodePolls` does for a "
            "DecoderOnlyTransformer (task.fast_polls=true); else use an optimizer that polls none "
            "(nodes_per_step=None, null in YAML, for a pattern search)"
        )
    return evaluate.candidates


def next_nodes(done: int, n_nodes: int, at_most: int, seed: int) -> Tensor:
    """The nodes to poll after so many polls of nodes: the next of a random order of all, drawn anew for every pass.

    A pass is shared out evenly among its steps.
    """
    turn, start = divmod(done, n_nodes)
    order = torch.randperm(n_nodes, generator=seeded(seed, turn), device="cpu")
    left = n_nodes - start
    return order[start : start + math.ceil(left / math.ceil(left / at_most))]
