"""Node perturbation: the slopes of all weights from the losses of single tokens, followed without a test.

Q Labs 2026, "Dust: pretraining transformers without backpropagation", qlabs.sh/research/dust; after Williams 1992 and
Flower and Jabri 1993.
"""

from typing import Any

import torch

from config.did_you_mean import one_of
from search import moments
from search.base import LossOnlyOptimizer
from search.budget import Evaluator, LimitReached
from search.node_polls import answers_nodes, next_nodes


class NodePerturbation(LossOnlyOptimizer):
    """Sample the slopes of all weights of K nodes, average the samples, and descend with momentum or as Adam does.

    With a sign s_t for every token t, drawn anew in each sample, r_t the fall of the losses which the token reaches
    when the node moves by radius s_t there, and x_t what the weights of the node read:

        slopes <- mean over samples of  -sum over t of  r_t s_t x_t / radius       (`polls/nodes.py`)
        v <- momentum v + slopes,  w <- w - lr v                                    (update: sgd)
        w <- w - lr m / (sqrt(q) + 1e-8), m and q running means of slopes and of their squares    (update: adam)

    It differs from Dust in what a node's move says: signs instead of normal numbers, one node per evaluation instead
    of all of a layer, and losses credited by the attention of the tokens in between (`polls/nodes.py`). A slope that
    was not sampled in a step, or is not finite, counts as 0.

    A step costs `samples` evaluations per node, and one. No loss speaks for its move, and none is spent on it:
    `report.loss_after` stays the loss before the step. A step that the budget does not allow is not begun.

    Args:
        params: parameters or parameter groups; every group may set lr and radius for itself.
        lr: step size, per unit of slope with sgd, in units of the weights with adam.
        update: "sgd" or "adam".
        momentum: decay of the running sum (sgd) or mean (adam) of the slopes per step, in [0, 1).
        square_decay: of the running mean of their squares per step, in [0, 1), for adam.
        radius: by how much a node is moved, in units of what it puts out; sigma of Dust.
        samples: of every slope in a step.
        nodes_per_step: nodes sampled in a step, in a seeded random order, all equally often; None for all.
        seed, max_evaluations, max_seconds, target_loss: see `LossOnlyOptimizer`.

    Raises:
        ValueError: an option out of range; from a step, a closure that does not answer `nodes`.
    """

    tests_moves = False

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        update: str = "sgd",
        momentum: float = 0.95,
        square_decay: float = 0.99,
        radius: float = 0.2,
        samples: int = 1,
        nodes_per_step: int | None = None,
        **limits: Any,
    ):
        one_of("update", update, ("sgd", "adam"))
        if not (lr > 0 and radius > 0 and samples >= 1 and (nodes_per_step is None or nodes_per_step >= 1)):
            raise ValueError(
                f"lr={lr} and radius={radius} must be above 0, samples={samples} and nodes_per_step={nodes_per_step} "
                "at least 1, the latter None (null in YAML) for all nodes"
            )
        if not (0 <= momentum < 1 and 0 <= square_decay < 1):
            raise ValueError(f"momentum={momentum} and square_decay={square_decay} must be in [0, 1)")
        super().__init__(params, dict(lr=lr, radius=radius), **limits)
        self.update, self.momentum, self.square_decay = update, momentum, square_decay
        self.samples, self.nodes_per_step = samples, nodes_per_step
        self.saved.update(nodes=0, moments={})  # nodes sampled so far; the running means of slopes

    def take_step(self, evaluate: Evaluator) -> None:
        candidates = answers_nodes(evaluate)
        n_nodes = candidates.n_nodes
        nodes = next_nodes(self.saved["nodes"], n_nodes, self.nodes_per_step or n_nodes, self.seed)  # (K,)
        radius = self.by_group(candidates.node_parameter[nodes], "radius")  # (K,)
        self.report.planned = self.samples * len(nodes)
        if evaluate.affordable(self.report.planned) < self.report.planned:
            raise LimitReached("max_evaluations")
        like = self.coordinates.parameters[0]
        slopes = torch.zeros(len(self.coordinates), dtype=like.dtype, device=like.device)
        for _ in range(self.samples):
            found, known = evaluate.nodes(nodes, radius, self.generator)  # (n,)
            slopes += found.where(known, 0) / self.samples
            self.report.done += len(nodes)
        self.saved["nodes"] += len(nodes)
        kept = self.saved["moments"]
        if self.update == "adam":
            self.descend(moments.adam(kept, slopes, (self.momentum, self.square_decay)))
        else:
            self.descend(moments.momentum(kept, slopes, self.momentum))

    @property
    def needs_nodes(self) -> bool:
        return True
