"""The average of the weights is what is kept and tested, and no step sees it."""

from pathlib import Path

import pytest
import torch

from pattern_search_task import PatternSearchTask
from run.averaging import WeightAverage
from run.checkpoints import read_checkpoint
from train import train

pytestmark = pytest.mark.slow
SHORT = ["model=tiny", "logger=none", "optimizer.polls_per_step=16", "trainer.max_epochs=2"]


@pytest.mark.parametrize("optimizer", ["pattern_search", "adam", "adamw"])
def test_what_is_tested_is_the_average_of_the_weights_that_the_steps_left(compose_config, monkeypatch, optimizer):
    weights, tested = [], {}
    ended, test_step = PatternSearchTask.on_train_batch_end, PatternSearchTask.test_step

    def on_train_batch_end(task, *args):
        ended(task, *args)
        weights.append({name: p.clone() for name, p in task.state_dict().items()})

    def recorded_test_step(task, *args):
        tested.update({name: p.clone() for name, p in task.state_dict().items()})
        test_step(task, *args)

    monkeypatch.setattr(PatternSearchTask, "on_train_batch_end", on_train_batch_end)
    monkeypatch.setattr(PatternSearchTask, "test_step", recorded_test_step)
    short = SHORT if optimizer == "pattern_search" else [*SHORT[:2], SHORT[3], f"optimizer={optimizer}"]
    cfg = compose_config(*short, "callbacks.averaging.decay=0.75", "~callbacks.best")
    train(cfg)
    average = weights[0]
    for newer in weights[1:]:
        average = {name: 0.75 * p + 0.25 * newer[name] for name, p in average.items()}
    end = read_checkpoint(Path(cfg.output_dir, "checkpoints/end.ckpt"))
    for name, p in average.items():
        torch.testing.assert_close(tested[name], p)
        torch.testing.assert_close(end["state_dict"][name], p)
    assert any(not torch.equal(p, weights[-1][name]) for name, p in average.items())


def test_steps_do_not_see_the_average(compose_config):
    ends = []
    for decay in (0.0, 0.9):
        cfg = compose_config(*SHORT, f"callbacks.averaging.decay={decay}", "checkpoint.every_steps=1")
        cfg.output_dir += f"/{decay}"
        train(cfg)
        ends.append(read_checkpoint(Path(cfg.output_dir, "checkpoints/last.ckpt"))["current_model_state"])
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_decay_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"decay=1.0 must lie in \[0, 1\)"):
        WeightAverage(decay=1.0)
