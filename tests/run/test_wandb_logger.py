"""A run has one W&B run however often it starts, and does without W&B when that fails."""

import os
from pathlib import Path

import pandas as pd
import pytest
import wandb

from run import wandb_logger
from train import train

pytestmark = pytest.mark.slow
SHORT = ["model=tiny", "optimizer.polls_per_step=16", "trainer.max_epochs=1"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_all_starts_of_a_run_have_one_id_and_another_run_has_another(compose_config, tmp_path):
    cfg = compose_config(*SHORT)
    train(cfg)
    cfg.resume, cfg.trainer.max_epochs = "auto", 2
    train(cfg)
    other = compose_config(*SHORT)
    other.output_dir = str(tmp_path / "other")
    train(other)

    def ids(run_dir):
        # offline-run-<time>-<id>, with a number behind it for a second start in the same second
        return [path.name.split("-")[3] for path in run_dir.glob("wandb/offline-run-*")]

    assert len(set(ids(tmp_path))) == 1
    assert len(ids(tmp_path)) == 2
    assert len(set(ids(tmp_path) + ids(tmp_path / "other"))) == 2


@pytest.mark.parametrize("part", ["log", "finish"])
def test_a_run_goes_on_when_wandb_fails_and_says_so_once(part, compose_config, monkeypatch, capsys):
    calls = []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3 or part == "finish":
            raise ConnectionResetError("as it was told")

    monkeypatch.setattr(f"wandb.Run.{part}", failing)
    cfg = compose_config(*SHORT)
    summary = train(cfg)
    said = capsys.readouterr().err
    assert said.count("W&B failed (ConnectionResetError: as it was told)") == 1
    assert len(calls) == (3 if part == "log" else 1)
    table = pd.read_csv(Path(cfg.output_dir, "metrics.csv"))
    assert table[table.metric == "train/loss"].step.tolist() == list(range(6))
    assert "test/exact_match" in set(table.metric)
    assert summary["steps"] == 6
    assert "WANDB_MODE" not in os.environ
    cfg.output_dir += "/next"  # the next job of a sweep tries again
    before = len(calls)
    train(cfg)
    assert len(calls) > before


def test_runs_have_tags_and_those_of_a_sweep_a_group(compose_config, monkeypatch, tmp_path):
    given, init = [], wandb.init
    monkeypatch.setattr("wandb.init", lambda **options: given.append(options) or init(**options))
    train(compose_config(*SHORT))
    monkeypatch.setattr(wandb_logger, "in_sweep", lambda: True)
    cfg = compose_config(*SHORT)
    cfg.output_dir = str(tmp_path / "job")
    train(cfg)
    assert [options["tags"] for options in given] == [["state_tracking", "tiny", "pattern_search"]] * 2
    assert given[0]["group"] is None
    assert given[1]["group"].startswith("sweep_20")


def test_disabled_means_disabled(compose_config, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(compose_config(*SHORT))
    assert not (tmp_path / "wandb").exists()
    assert os.environ["WANDB_MODE"] == "disabled"
