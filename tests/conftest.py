"""Fixtures that many tests share: composed configs, and data and models of the default task.

Nothing heavy is imported before a fixture needs it: the process that only hands tests to workers reads this file too.
"""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from state_tracking_data import StateTrackingDataModule
    from transformer import DecoderOnlyTransformer

ROOT = Path(__file__).resolve().parents[1]
settings.register_profile("quick", max_examples=40, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=1000, deadline=None)  # pytest --hypothesis-profile=thorough
settings.load_profile("quick")


@pytest.fixture(autouse=True, scope="session")
def machine() -> None:
    """Memory and threads as every run sets them."""
    from run.cpu import prepare_machine

    prepare_machine()


@pytest.fixture(autouse=True, scope="session")
def no_pictures() -> None:
    """Runs in this process leave no progress.png, which takes longer than most of them: see tests/interpreters.py."""
    if training := sys.modules.get("run.training"):  # the module of no test that was collected may have imported it
        training.leave_picture = lambda run_dir: None


@functools.cache
def composed(overrides: tuple[str, ...], config_name: str) -> DictConfig:
    from config.compose import compose_config

    return compose_config(overrides, config_name)


@pytest.fixture
def compose_config(tmp_path):
    """Compose a config as the command line would, with its output in the test's own directory."""
    from config.compose import job_config

    def compose(*overrides: str, config_name: str = "pattern_search_train") -> DictConfig:
        return job_config(copy.deepcopy(composed(overrides, config_name)), tmp_path)

    return compose


@pytest.fixture
def parity() -> StateTrackingDataModule:
    from state_tracking_data import StateTrackingDataModule

    return StateTrackingDataModule()


@pytest.fixture
def model(parity) -> DecoderOnlyTransformer:
    """A model of 1 layer and width 8 for parity."""
    import torch

    from transformer import DecoderOnlyTransformer

    torch.manual_seed(0)
    return DecoderOnlyTransformer(parity.vocab_size, parity.n_classes, parity.max_len, 8, n_layers=1, n_heads=2)
