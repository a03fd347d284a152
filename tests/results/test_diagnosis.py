"""What is seen of a search: sums that must agree with the search itself, on a short run."""

import math

import pandas as pd
import pytest
import torch

import report
from results import diagnosis

pytestmark = pytest.mark.slow
SHORT = ["experiment=parity_tiny", "optimizer.polls_per_step=96", "trainer.max_steps=12", "callbacks=none"]


@pytest.fixture(scope="module")
def seen():
    return diagnosis.diagnose(SHORT)


def test_every_step_is_seen_and_the_losses_connect(seen):
    steps = pd.DataFrame(seen[0].steps)
    assert len(steps) == 12
    assert steps.train_after[:-1].tolist() == pytest.approx(steps.train_before[1:].tolist(), abs=1e-6)
    assert (steps.batch_after <= steps.batch_before).all()


def test_the_gains_of_the_parts_add_up_to_about_the_decrease(seen):
    found, table = seen
    steps = pd.DataFrame(found.steps)
    gained, decrease = steps[list(table.index)].sum(axis=1), steps.train_before - steps.train_after
    assert gained.corr(decrease) > 0.9  # to first order


def test_the_table_covers_all_weights_and_its_shares_are_whole(seen):
    found, table = seen
    assert table.weights.sum() == len(found.search.coordinates)
    assert list(table.index) == ["embeddings", "block 0 attention", "block 0 ff", "norm, head"]
    assert math.isclose(table["share of decrease"].sum(), 1)


def test_slopes_are_compared_by_their_age(seen):
    count, right, weighted, size = seen[0].agreement.T
    first, steps = seen[0].search.options["polls_per_step"], len(seen[0].steps)
    polled = first * (steps - 1)  # those polled in the step before are of age 1; a slope may be 0
    assert 0.98 * polled < count[0] <= polled
    assert ((right >= 0) & (right <= count)).all()
    assert ((weighted >= 0) & (weighted <= size)).all()
    assert right[0] / count[0] > 0.6  # a fresh slope mostly points downhill


def test_samples_of_nodes_are_compared_with_the_gradient():
    options = ["experiment=z5", "trainer.max_steps=2", "callbacks=none", "task.parameters=[blocks,norm,head]"]
    _, table = diagnosis.diagnose(options)
    cosines = table["cosine of samples"]
    assert cosines["norm, head"] > 0.99  # exact behind the last attention
    assert cosines["block 0 ff"] > 0.99
    assert 0.3 < cosines["block 0 attention"] < 1


def test_looking_does_not_change_the_search(seen):
    from config.check import checked_config
    from run.build import build_datamodule, build_task

    cfg = checked_config(SHORT)
    torch.manual_seed(cfg.seed)
    data = build_datamodule(cfg)
    task = build_task(cfg, data)
    optimizer, losses = task.configure_optimizers(), []
    loader = data.train_dataloader()
    while len(losses) < 12:
        for batch in loader:
            if len(losses) < 12:
                with torch.no_grad():
                    optimizer.step(lambda batch=batch: task.loss(batch))
                losses.append(optimizer.report.loss_before)
    # the plain forward rounds otherwise, and a move that changes the loss by nothing but rounding is joined or not
    assert [row["batch_before"] for row in seen[0].steps] == pytest.approx(losses, rel=2e-3)


@pytest.mark.parametrize(
    ("mistake", "reason"), [("model=tny", "did you mean tiny"), ("optimizer=adam", "optimizer=pattern_search")]
)
def test_a_command_that_cannot_run_is_refused(mistake, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["diagnosis", mistake])
    assert stopped.value.code == 2
    assert reason in capsys.readouterr().err
