"""A run is loaded with the weights that were tested, from wherever it lies, and can be tested again."""

import json
import shutil
from pathlib import Path

import lightning as L
import pytest

from results.runs import RunError
from run.build import load_run
from train import train

SHORT = ["model=tiny", "logger=none", "optimizer=adam", "trainer.max_epochs=4"]


def metrics_of(run_dir):
    task, data, _ = load_run(run_dir)
    trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    (metrics,) = trainer.test(task, datamodule=data, verbose=False)
    assert trainer.validate(task, datamodule=data, verbose=False)
    return metrics


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["callbacks.best.filename='e{epoch}'"], ["~callbacks.best"]])
def test_a_loaded_run_has_the_metrics_that_it_reported_wherever_it_lies(options, compose_config, tmp_path):
    cfg = compose_config(*SHORT, *options)
    cfg.output_dir += "/a"
    reported = train(cfg)["test"]
    for place in ("a", "b"):
        assert metrics_of(tmp_path / place)["test/loss"] == pytest.approx(reported["test/loss"], rel=1e-5)
        if place == "a":
            shutil.move(tmp_path / "a", tmp_path / "b")


def test_what_cannot_be_loaded_is_told_in_one_line(compose_config, tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        load_run(tmp_path)
    cfg = compose_config(*SHORT, "trainer.max_epochs=1")
    train(cfg)
    path = Path(json.loads((tmp_path / "summary.json").read_text())["checkpoint"])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match="is damaged"):
        load_run(tmp_path)
    path.unlink()
    with pytest.raises(RunError, match="has no checkpoint"):
        load_run(tmp_path)
