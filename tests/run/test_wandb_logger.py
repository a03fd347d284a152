"""A run has one W&B run however often it starts, and does without W&B when that fails."""

from pathlib import Path

import pandas as pd
import pytest

from run import wandb_logger
from train import train

SHORT = ["model=tiny", "optimizer.polls_per_step=16", "trainer.max_epochs=1"]


@pytest.fixture
def train_and_finish(monkeypatch):
    """Trains as a job of a sweep does."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")

    def run(cfg):
        try:
            return train(cfg)
        finally:
            wandb_logger.finish(None, 0)

    return run


def test_all_starts_of_a_run_have_one_id_and_another_run_has_another(compose_config, train_and_finish, tmp_path):
    cfg = compose_config(*SHORT)
    train_and_finish(cfg)
    cfg.resume, cfg.trainer.max_epochs = "auto", 2
    train_and_finish(cfg)
    other = compose_config(*SHORT)
    other.output_dir = str(tmp_path / "other")
    train_and_finish(other)

    def ids(run_dir):
        return [path.name.rpartition("-")[2] for path in run_dir.glob("wandb/offline-run-*")]

    assert len(set(ids(tmp_path))) == 1
    assert len(ids(tmp_path)) == 2
    assert len(set(ids(tmp_path) + ids(tmp_path / "other"))) == 2


@pytest.mark.parametrize("part", ["log", "finish"])
def test_a_run_goes_on_when_wandb_fails_and_says_so_once(part, compose_config, train_and_finish, monkeypatch, capsys):
    calls = []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3 or part == "finish":
            raise ConnectionResetError("as it was told")

    monkeypatch.setattr(f"wandb.Run.{part}", failing)
    cfg = compose_config(*SHORT)
    summary = train_and_finish(cfg)
    said = capsys.readouterr().err
    assert said.count("W&B failed (ConnectionResetError: as it was told)") == 1
    assert len(calls) == (3 if part == "log" else 1)
    table = pd.read_csv(Path(cfg.output_dir, "metrics.csv"))
    assert table[table.metric == "train/loss"].step.tolist() == list(range(6))
    assert "test/exact_match" in set(table.metric)
    assert summary["steps"] == 6
    assert not wandb_logger.WandbRun.lost  # the next job of a sweep tries again
