"""The training step: forward only for a search, automatic for gradients, metrics and logs for both."""

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn

from data.sequences import IGNORE, SequenceLoader
from optimizer import PatternSearch
from pattern_search_task import PatternSearchTask, Scores, masked_loss
from results.runs import read_runs
from run.build import build_datamodule, build_task
from run.metrics_table import MetricsTable
from state_tracking_task import StateTrackingTask


def fit(task, data, logger=False, **options):
    settings = dict(max_epochs=1, limit_train_batches=3, accelerator="cpu", logger=logger, log_every_n_steps=1)
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer = L.Trainer(**settings | quiet | options)
    trainer.fit(task, datamodule=data)
    return trainer


NODES = ["pattern_search_nodes", "pattern_search_nodes_long", "pattern_search_nodes_decay"]
SEARCHES = ["pattern_search", "pattern_search_classic", *NODES]


@pytest.mark.parametrize(
    ("optimizer", "evaluated"),
    [(search, "by structured polls") for search in SEARCHES] + [(search, "one by one") for search in SEARCHES[:2]],
)
def test_a_search_never_runs_backward_and_allocates_no_gradient(
    optimizer, evaluated, compose_config, parity, monkeypatch
):
    def backward(*args, **kwargs):
        raise AssertionError("backward ran")

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", backward)
    cfg = compose_config(f"optimizer={optimizer}", "model=tiny", "optimizer.max_evaluations=600")
    cfg.task.fast_polls = evaluated == "by structured polls"
    task = build_task(cfg, parity)
    trainer = fit(task, parity)
    assert trainer.global_step >= 1
    assert task.evaluations > 100
    assert all(p.grad is None for p in task.model.parameters())


@pytest.mark.slow
def test_a_search_with_fast_polls_takes_the_decisions_of_the_plain_closure(compose_config, parity):
    def decisions(plain):
        torch.manual_seed(0)
        options = "model.n_layers=2", "optimizer.polls_per_step=20"  # two groups, which share the polls
        cfg = compose_config("model=tiny", *options, f"task.fast_polls={not plain}")
        task = build_task(cfg, parity).double()
        seen = []
        task.on_train_batch_end = lambda *a: seen.append(task.search.report)
        fit(task, parity, limit_train_batches=6, max_epochs=4, limit_val_batches=0, precision="64-true")
        return seen

    fast, slow = decisions(plain=False), decisions(plain=True)
    assert len(fast) == len(slow) == 24
    assert [r.search_accepted for r in fast] == [r.search_accepted for r in slow]
    assert [r.evaluations for r in fast] == [r.evaluations for r in slow]
    assert [r.loss_after for r in fast] == pytest.approx([r.loss_after for r in slow], abs=1e-10)


def test_every_loss_of_a_search_is_taken_without_gradients_and_in_eval_mode(model, parity):
    seen = []
    model.register_forward_hook(lambda m, i, o: seen.append((torch.is_grad_enabled(), m.training, o.requires_grad)))
    task = StateTrackingTask(model, partial(PatternSearch, polls_per_step=5), fast_polls=False)
    fit(task, parity, limit_val_batches=0)
    assert len(seen) >= 3 * 4
    assert set(seen) == {(False, False, False)}
    assert model.training  # as Lightning left it


def test_dropout_is_off_in_polls(parity):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return nn.functional.dropout(self.w.expand(*x.shape, 2) + 1, 0.5, self.training)

    task = PatternSearchTask(Dropping(), partial(PatternSearch, polls_per_step=None, radius=0.5))
    with pytest.warns(UserWarning, match="Dropping with this loss has no structured polls"):
        fit(task, parity, limit_val_batches=0)
    assert task.search.report.loss_after <= task.search.report.loss_before


def test_a_gradient_optimizer_uses_automatic_optimization(model, parity):
    task = StateTrackingTask(model, partial(torch.optim.Adam, lr=0.01))
    before = [p.detach().clone() for p in model.parameters()]
    trainer = fit(task, parity)
    assert task.automatic_optimization
    assert trainer.global_step == task.evaluations == 3
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_one_optimizer_step_a_batch_is_logged_once_with_the_report(model, parity, tmp_path):
    task = StateTrackingTask(model, partial(PatternSearch, polls_per_step=6, radius=0.2))
    reports = []
    task.on_train_batch_end = lambda *a: reports.append((task.search.report, task.evaluations))
    fit(task, parity, MetricsTable(tmp_path), limit_val_batches=0)
    rows = (tmp_path / "metrics.csv").read_text().splitlines()[1:]
    names = {"loss", "loss_after", "accepted", "search_accepted", "evaluations_per_second", "radius"}
    assert len(rows) == 3 * len(names)
    assert {row.split(",")[3] for row in rows} == {f"train/{name}" for name in names}
    logged = {(int(r.split(",")[0]), r.split(",")[3]): r.split(",") for r in rows}
    for step, (report, evaluations) in enumerate(reports):
        assert float(logged[step, "train/loss"][4]) == pytest.approx(report.loss_before)
        assert float(logged[step, "train/loss_after"][4]) == pytest.approx(report.loss_after)
        assert float(logged[step, "train/accepted"][4]) == report.accepted
        assert float(logged[step, "train/search_accepted"][4]) == (report.search_accepted or 0)
        assert int(logged[step, "train/loss"][1]) == evaluations


def test_a_radius_is_logged_for_every_group(model, parity, tmp_path):
    class TwoGroups(PatternSearch):
        @classmethod
        def parameter_groups(cls, model, parameters, **options):
            first, *rest = parameters
            return [{"params": [first], "radius": 0.3}, {"params": rest}]

    task = StateTrackingTask(model, partial(TwoGroups, radius=0.1, polls_per_step=4))
    fit(task, parity, MetricsTable(tmp_path))
    rows = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert {float(row[4]) for row in rows if row[3] == "train/radius"} == {0.3}
    assert {float(row[4]) for row in rows if row[3] == "train/radius_1"} == {0.1}


def test_only_every_nth_step_is_logged_if_asked(model, parity, tmp_path):
    task = StateTrackingTask(model, partial(PatternSearch, polls_per_step=6))
    trainer = fit(task, parity, MetricsTable(tmp_path), limit_val_batches=0, limit_train_batches=5, log_every_n_steps=2)
    rows = [row.split(",") for row in (tmp_path / "metrics.csv").read_text().splitlines()]
    assert [int(row[0]) for row in rows if row[3] == "train/loss"] == [1, 3]
    assert trainer.callback_metrics["train/loss"] == pytest.approx(task.search.report.loss_before)


@pytest.mark.slow
def test_the_last_block_gets_its_share_of_the_polls(compose_config, parity):
    task = build_task(compose_config("model=small", "optimizer.polls_per_step=40"), parity)
    before, last = (group["params"] for group in task.configure_optimizers().param_groups)
    named = {id(p): name for name, p in task.model.named_parameters()}
    assert {named[id(p)].split(".")[0] for p in before} == {"token_embedding", "position_embedding", "blocks"}
    assert all(named[id(p)].startswith(("blocks.1.", "norm", "head")) for p in last)
    assert len(before) + len(last) == len(named)
    fit(task, parity, limit_train_batches=5, max_epochs=10)
    visits = task.search.state["slopes"]["visits"]
    share = float(visits[-sum(p.numel() for p in last) :].sum() / visits.sum())
    assert share == pytest.approx(0.97, abs=0.01)


@pytest.mark.parametrize(
    "overrides",
    ["task.parameters=[blocks.1,head]", "task.parameters=[blocks.0]", "model=tiny", "optimizer.last_group_share=null"],
)
def test_there_is_one_group_where_there_is_nothing_to_share_out(overrides, compose_config, parity):
    assert len(build_task(compose_config("model=small", overrides), parity).configure_optimizers().param_groups) == 1


def test_a_stopped_search_ends_training(model, parity):
    task = StateTrackingTask(model, partial(PatternSearch, max_evaluations=20))
    trainer = fit(task, parity, max_epochs=100)
    assert task.evaluations == 20
    assert task.search.stopped_by == "max_evaluations"
    assert trainer.global_step < 10


def test_the_loss_counts_scored_positions_only():
    logits, y = torch.randn(2, 4, 3), torch.tensor([[IGNORE, 1, 2, IGNORE], [IGNORE, IGNORE, 0, IGNORE]])
    chosen = logits.log_softmax(-1)
    expected = -(chosen[0, 1, 1] + chosen[0, 2, 2] + chosen[1, 2, 0]) / 3
    assert torch.allclose(masked_loss(logits, y), expected)


def test_scores_are_sums_over_the_split_whatever_the_batch_size(model, parity):
    split, results = parity.splits["train"], []
    lengths = torch.arange(len(split)) % 8  # rows with different numbers of scored positions
    y = torch.where(torch.arange(16) < 16 - lengths[:, None], split.y, IGNORE)
    for size in (1, 7, 200):
        scores = Scores()
        for rows in torch.arange(len(split)).split(size):
            scores.update(model(split.x[rows]), y[rows])
        results.append({k: v.item() for k, v in scores.compute().items()})
    assert results[0] == pytest.approx(results[2], rel=1e-5)
    assert results[1] == pytest.approx(results[2], rel=1e-5)


def test_scores_equal_their_definitions():
    y = torch.tensor([[IGNORE, 0, 1, 1], [IGNORE, 1, 0, IGNORE], [1, IGNORE, IGNORE, IGNORE]])
    guess = torch.tensor([[0, 0, 1, 0], [1, 1, 0, 1], [1, 0, 0, 0]])
    scores = Scores()
    scores.update(nn.functional.one_hot(guess, 2).float(), y)
    values = {k: v.item() for k, v in scores.compute().items()}
    assert values["token_accuracy"] == pytest.approx(5 / 6)
    assert values["exact_match"] == pytest.approx(2 / 3)
    assert values["last_accuracy"] == pytest.approx(2 / 3)


def test_seconds_and_evaluations_survive_a_checkpoint(model, parity, tmp_path):
    task = StateTrackingTask(model, partial(PatternSearch, polls_per_step=5))
    trainer = fit(task, parity, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)  # plain values only
    again = StateTrackingTask(model, partial(PatternSearch, polls_per_step=5))
    resumed = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    resumed.fit(again, datamodule=parity, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert (again.seconds, again.evaluations) == (task.seconds, task.evaluations)
    tested = StateTrackingTask(model, partial(PatternSearch, polls_per_step=5))
    tested.seconds = 99.0
    resumed.test(tested, datamodule=parity, ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert tested.seconds == 99.0  # a test loads weights, not the clock


def test_a_loader_repeats_its_order_and_resumes_in_the_middle(parity):
    loader = SequenceLoader(parity.splits["train"], 32, shuffle_seed=1)
    first = [b["x"] for b in loader]
    assert len(first) == len(loader) == 6  # the incomplete seventh is left out
    assert not torch.equal(first[0], next(iter(loader))["x"])  # another epoch, another order
    again = SequenceLoader(parity.splits["train"], 32, shuffle_seed=1)
    batches = iter(again)
    next(batches), next(batches)
    resumed = SequenceLoader(parity.splits["train"], 32, shuffle_seed=1)
    resumed.load_state_dict(again.state_dict())
    assert torch.equal(next(iter(resumed))["x"], first[2])


def test_local_tables_are_read_back_with_their_configs(compose_config, tmp_path):
    from train import train

    cfg = compose_config("model=tiny", "trainer.max_epochs=1", "optimizer.polls_per_step=3", "logger=none")
    train(cfg)
    table = read_runs(tmp_path)
    assert set(table.columns) >= {"step", "evaluations", "seconds", "metric", "value", "task", "optimizer", "seed"}
    assert table.optimizer.unique().tolist() == ["pattern_search"]
    assert {"train/loss", "val/exact_match", "test/loss", "test/accuracy_at_8"} <= set(table.metric)
    train_rows = table[table.metric == "train/loss"]
    assert train_rows.evaluations.is_monotonic_increasing
    assert len(train_rows) == 6


def test_only_the_chosen_parameters_are_trained(compose_config):
    cfg = compose_config("model=tiny", "task.parameters=[blocks.0.ff,head]")
    task = build_task(cfg, build_datamodule(cfg))
    (group,) = task.configure_optimizers().param_groups
    names = {name for name, p in task.model.named_parameters() if any(p is q for q in group["params"])}
    assert names == {f"blocks.0.ff.{m}.{k}" for m in ("inner", "outer") for k in ("weight", "bias")} | {
        "head.weight",
        "head.bias",
    }


def test_a_part_that_the_model_has_not_is_refused(compose_config):
    cfg = compose_config("model=tiny", "task.parameters=[blocks.0.fff]")
    with pytest.raises(Exception, match=r"blocks.0.fff is not known; did you mean blocks.0.ff\?") as refusal:
        build_task(cfg, build_datamodule(cfg))
    parts = "token_embedding, position_embedding, drop, blocks, blocks.0, norm, head"
    assert str(refusal.value.__cause__).endswith(f"Known: {parts}")


def test_nodes_need_the_fast_polls(compose_config):
    cfg = compose_config("model=tiny", "optimizer=pattern_search_nodes", "task.fast_polls=false")
    with pytest.raises(ValueError, match=r"and task.fast_polls=true"):
        build_task(cfg, build_datamodule(cfg)).configure_optimizers()
