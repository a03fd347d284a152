"""Why a run ended is told truly, whatever ended it; and a run is told on any output."""

import json
from pathlib import Path

import lightning as L
import pytest

from commands import run_alone
from run import training
from train import train

SHORT = ["model=tiny", "logger=none", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1"]
ADAM = [*SHORT, "optimizer=adam", "trainer.max_epochs=30"]
SEARCH = [*SHORT, "optimizer.polls_per_step=16", "trainer.max_epochs=30"]
LIMIT = "+callbacks.limit={_target_: run.limits.MaxSeconds, max_seconds: 1e-6}"  # for any optimizer


class Stops(L.Callback):
    """Asks for an end, and gives no reason."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("not_finite", [*ADAM, "optimizer=sgd", "optimizer.lr=1e30", "trainer.check_val_every_n_epoch=3"]),
        ("no_improvement", [*ADAM, "optimizer.lr=.5", "callbacks.early_stopping.patience=1"]),
        ("diverged", [*ADAM, "+callbacks.early_stopping.divergence_threshold=0.1"]),
        ("solved", [*ADAM, "callbacks.early_stopping.stopping_threshold=5"]),  # in the first epoch
        ("max_epochs", [*ADAM, "trainer.max_epochs=1"]),
        ("max_steps", [*ADAM, "trainer.max_steps=1"]),
        ("max_time", [*ADAM, "trainer.max_time=00:00:00:00"]),
        ("max_evaluations", [*SEARCH, "optimizer.max_evaluations=30"]),
        ("max_seconds", [*SEARCH, "optimizer.max_seconds=1e-6"]),
        ("max_seconds", [*SEARCH, LIMIT]),
        ("max_seconds", [*ADAM, LIMIT]),
        ("target_loss", [*SEARCH, "optimizer.target_loss=5"]),
        ("callback", [*ADAM, "+callbacks.stops._target_=test_summary.Stops"]),
    ],
)
def test_stopped_by_says_what_ended_the_run(reason, options, compose_config, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    cfg = compose_config(*options)
    assert train(cfg)["stopped_by"] == reason
    Path(cfg.output_dir, "summary.json").unlink()  # as if it had been killed in its test
    cfg.resume = "auto"
    assert train(cfg)["stopped_by"] == reason


@pytest.mark.parametrize("picture", [True, False])
def test_a_run_draws_its_losses_unless_told_not_to(picture, compose_config, monkeypatch):
    monkeypatch.setattr(training, "leave_picture", lambda run_dir: (Path(run_dir) / "progress.png").touch())
    cfg = compose_config(*ADAM, "trainer.max_epochs=1")
    cfg.picture = picture
    train(cfg)
    assert (Path(cfg.output_dir) / "progress.png").exists() == picture


@pytest.mark.slow
def test_a_run_prolonged_after_an_early_stop_forgets_its_reason(compose_config):
    cfg = compose_config(*ADAM, "callbacks.early_stopping.stopping_threshold=5", "trainer.max_epochs=3")
    assert train(cfg)["stopped_by"] == "solved"
    cfg.callbacks.early_stopping.stopping_threshold, cfg.resume = 1e-9, "auto"
    assert train(cfg)["stopped_by"] == "max_epochs"


@pytest.mark.slow
def test_a_run_and_its_tables_are_told_on_an_output_that_knows_ascii_only(tmp_path):
    command = "python src/train.py model=tiny logger=none trainer.max_epochs=1 trainer.limit_train_batches=2"
    done = run_alone(command, tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "held-out test" in done.stdout
    assert done.stdout.isascii()
    (run_dir,) = (tmp_path / "runs").iterdir()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["stopped_by"] == "max_epochs"


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["trainer.max_steps=1", "optimizer.max_evaluations=40"])
def test_a_run_says_what_was_left_of_a_plan_that_another_limit_ended(limit, compose_config, capsys):
    train(compose_config("model=tiny", "logger=none", "optimizer=pattern_search_nodes_decay", limit))
    said = (
        "Note: the search step still had 100% of its length: linear_decay ends at max_evaluations=750000, and max_steps"
    )
    assert (said in capsys.readouterr().out) == limit.startswith("trainer")
