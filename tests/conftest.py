"""Fixtures that many tests share: composed configs, and data and models of the default task."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from config.compose import compose_config as compose_command
from config.compose import job_config
from run.cpu import prepare_machine
from state_tracking_data import StateTrackingDataModule
from transformer import DecoderOnlyTransformer

ROOT = Path(__file__).resolve().parents[1]
prepare_machine()  # as every run does


@pytest.fixture
def compose_config(tmp_path):
    """Compose a config as the command line would, with its output in the test's own directory."""

    def compose(*overrides: str, config_name: str = "pattern_search_train") -> DictConfig:
        return job_config(compose_command(overrides, config_name), tmp_path)

    return compose


@pytest.fixture
def parity() -> StateTrackingDataModule:
    return StateTrackingDataModule()


@pytest.fixture
def model(parity) -> DecoderOnlyTransformer:
    """A model of 1 layer and width 8 for parity."""
    torch.manual_seed(0)
    return DecoderOnlyTransformer(parity.vocab_size, parity.n_classes, parity.max_len, 8, n_layers=1, n_heads=2)
