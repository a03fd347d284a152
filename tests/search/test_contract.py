"""Every optimizer that needs losses only keeps the contract: one class each, and none is forgotten."""

import torch
from hydra.utils import get_class
from loss_only_tests import LossOnlyTests
from omegaconf import OmegaConf
from torch import nn

from conftest import ROOT
from search.base import LossOnlyOptimizer


class TestPatternSearch(LossOnlyTests):
    name = "pattern_search"
    toy = dict(radius=0.5, polls_per_step=4, last_group_share=None, step_lengths=[0.2, 0.1])


class TestPatternSearchClassic(LossOnlyTests):
    name = "pattern_search_classic"
    toy = dict(radius=0.5, polls_per_step=5)


class TestPatternSearchNodes(LossOnlyTests):
    name = "pattern_search_nodes"
    toy = dict(radius=0.5, polls_per_step=2, nodes_per_step=1, step_lengths=[0.2, 0.1])


class TestPatternSearchNodesLong(LossOnlyTests):
    name = "pattern_search_nodes_long"
    toy = dict(radius=0.5, polls_per_step=2, nodes_per_step=2, step_lengths=[0.2, 0.1])


class TestPatternSearchNodesOnDrawnRows(LossOnlyTests):
    name = "pattern_search_nodes_long"
    toy = dict(radius=0.5, polls_per_step=2, nodes_per_step=2, rows_per_step=1, step_lengths=[0.2, 0.1])


class TestPatternSearchNodesDecay(LossOnlyTests):
    name = "pattern_search_nodes_decay"
    toy = dict(radius=0.5, polls_per_step=2, nodes_per_step=2, step_lengths=[0.2, 0.1])


class TestRandomSearch(LossOnlyTests):
    name = "random_search"
    toy = dict(radius=0.2, samples=4)


class TestCoherentDescent(LossOnlyTests):
    name = "coherent_descent"
    toy = dict(lr=0.1, coordinates_per_step=4, gamma=0.9)


class TestRSO(LossOnlyTests):
    name = "rso"
    toy = dict(moves_per_step=4, anneal_evaluations=1000)


class TestNodePerturbation(LossOnlyTests):
    name = "node_perturbation"
    toy = dict(lr=0.02, nodes_per_step=1)

    def weights(self, dtype=torch.float32):
        matrix, vector = super().weights(dtype)
        return [matrix, *map(nn.Parameter, vector.detach().split([1, 1, 2]))]  # four nodes, so that the seed can order


class TestSPSA(LossOnlyTests):
    name = "spsa"
    toy = dict(lr=0.05, samples=2)


class TestFZOO(LossOnlyTests):
    name = "fzoo"
    toy = dict(lr=0.002, samples=4)


class TestES(LossOnlyTests):
    name = "es"
    toy = dict(lr=0.002, samples=4)


class TestEggroll(LossOnlyTests):
    name = "eggroll"
    toy = dict(lr=0.1, samples=4)


class TestEggrollSGD(LossOnlyTests):
    name = "eggroll"
    toy = dict(lr=0.5, sigma=0.05, samples=4, update="sgd")


class TestSepCMAES(LossOnlyTests):
    name = "sep_cma_es"
    toy = dict(sigma=0.5)


def test_every_yaml_of_a_loss_only_optimizer_is_tested():
    def target(path):
        cfg = OmegaConf.load(path)
        return cfg.get("_target_") or target(path.with_name(f"{cfg.defaults[0]}.yaml"))

    yamls = (ROOT / "configs" / "optimizer").glob("*.yaml")
    names = {path.stem for path in yamls if issubclass(get_class(target(path)), LossOnlyOptimizer)}
    assert names == {suite.name for suite in LossOnlyTests.__subclasses__()}
