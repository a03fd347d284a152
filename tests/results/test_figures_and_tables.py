"""Runs become one tidy table, from local files and from W&B, and the table becomes figures."""

import json
from argparse import ArgumentParser

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from omegaconf import OmegaConf

from results.figures import AXES, draw_accuracy, draw_runs, main
from results.runs import COLUMNS, LIMITS, OUTCOME, RunError, name_settings, read_runs, read_wandb
from results.tables import read_summaries, summary_table
from run.metrics_table import MetricsTable
from run.training import leave_picture

CONFIG = {
    "choices": {"task": "state_tracking", "model": "tiny", "optimizer": "pattern_search"},
    "datamodule": {"group": "Z5"},
    "seed": 3,
}


def write_run(path, optimizer="pattern_search", value=0.5, chance_loss=1.6, seed=3, options=None, **choices):
    path.mkdir(parents=True)
    choices = CONFIG["choices"] | choices | {"optimizer": optimizer}
    OmegaConf.save(CONFIG | {"choices": choices, "optimizer": options or {}, "seed": seed}, path / "config.yaml")
    summary = dict.fromkeys(OUTCOME, 0) | {"chance_loss": chance_loss, "stopped_by": "interrupted"}
    (path / "summary.json").write_text(json.dumps(summary))
    table = MetricsTable(path)
    for step in range(3):
        table.log_metrics({"train/loss": value / (step + 1), "evaluations": 10.0 * step, "seconds": 0.5 * step}, step)
    for name in ("val/loss", "val/exact_match", "test/exact_match", "test/token_accuracy"):
        table.log_metrics({name: value, "epoch": 0}, 3)


def drawn(panel):
    """The lines of a panel, without the empty ones that a legend shows."""
    return [line for line in panel.lines if len(line.get_xdata())]


def test_a_table_has_one_row_a_value_with_its_axes(tmp_path):
    write_run(tmp_path / "a")
    rows = pd.read_csv(tmp_path / "a" / "metrics.csv")
    assert list(rows.columns) == COLUMNS
    assert rows[rows.metric == "train/loss"].evaluations.tolist() == [0, 10, 20]
    assert rows.iloc[-1].to_dict() == {
        "step": 3, "evaluations": 20, "seconds": 1.0, "metric": "test/token_accuracy", "value": 0.5,
    }  # fmt: skip


@pytest.mark.slow
def test_what_is_drawn_can_be_kept_and_drawn_again(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", optimizer="adam", chance_loss=None)
    kept, pictures = tmp_path / "kept.csv.gz", [tmp_path / name for name in ("first.png", "again.png")]
    main(ArgumentParser(), [str(tmp_path), "--keep", str(kept), "--output", str(pictures[0])])
    main(ArgumentParser(), [str(kept), "--output", str(pictures[1])])
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_a_table_that_is_opened_again_is_continued(tmp_path):
    write_run(tmp_path / "a")
    MetricsTable(tmp_path / "a").log_metrics({"val/loss": 0.25}, 4)
    rows = pd.read_csv(tmp_path / "a" / "metrics.csv")
    assert len(rows) == 3 + 4 + 1


def test_runs_are_read_together_and_described_by_their_configs(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "sweep" / "0", optimizer="adam")
    table = read_runs(tmp_path)
    described = table.groupby("run")[["task", "model", "optimizer", "seed"]].first()
    assert set(described.optimizer) == {"pattern_search", "adam"}
    assert described.task.tolist() == ["state_tracking Z5"] * 2
    assert described.seed.tolist() == [3, 3]


def test_a_place_without_runs_is_named(tmp_path):
    with pytest.raises(RunError, match=str(tmp_path)):
        read_runs(tmp_path)


def test_wandb_runs_become_the_same_table(monkeypatch):
    """Against W&B's interface: a wide history of dicts with gaps, under either name of the step."""

    class Run:
        name, config = "r", CONFIG

        def __init__(self, step):
            self.step = step

        def scan_history(self):
            yield {self.step: 0, "train/loss": 0.7, "evaluations": 10, "seconds": 0.1, "epoch": 0}
            yield {self.step: 1, "train/loss": 0.6, "evaluations": 20, "seconds": 0.2, "epoch": 0}
            yield {self.step: 1, "val/loss": 0.65, "epoch": 0}

    class Api:
        def runs(self, path):
            assert path == "team/project"
            return [Run("trainer/global_step"), Run("global_step")]

    monkeypatch.setattr("wandb.Api", Api)
    table = read_wandb("team", "project")
    half = table.iloc[: len(table) // 2][[*COLUMNS, "task"]].values.tolist()
    assert half == [
        [0, 10, 0.1, "train/loss", 0.7, "state_tracking Z5"],
        [1, 20, 0.2, "train/loss", 0.6, "state_tracking Z5"],
        [1, 20, 0.2, "val/loss", 0.65, "state_tracking Z5"],
    ]
    assert table.iloc[len(table) // 2 :][[*COLUMNS, "task"]].values.tolist() == half


def test_figures_show_every_run_on_both_axes(tmp_path):
    write_run(tmp_path / "a", value=0.7)
    write_run(tmp_path / "b", optimizer="adam")
    write_run(tmp_path / "c", variant="no_fade")
    table = read_runs(tmp_path)
    figure = draw_runs(table)
    assert [panel.get_xlabel() for panel in figure.axes] == list(AXES.values()) * 2
    lines_of_runs = 3 * 2  # training and validation
    assert [len(drawn(panel)) for panel in figure.axes] == [lines_of_runs + 1, lines_of_runs + 1, 3, 3]  # + chance
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:4] == ["optimizer · variant", "pattern_search", "adam", "pattern_search · no_fade"]
    assert names[4:] == ["measured on", "training", "validation", "loss of chance"]
    assert sum(len(c.get_offsets()) for c in draw_accuracy(table).axes[0].collections) == 6


def test_a_few_seeds_have_dashes_and_limits_no_names(tmp_path):
    for seed in range(3):
        write_run(tmp_path / str(seed), seed=seed, options={"max_seconds": seed})
    figure = draw_runs(read_runs(tmp_path))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[:5] == ["optimizer", "pattern_search", "measured on", "training", "validation"]
    assert names[5:] == ["seed", "0", "1", "2", "loss of chance"]
    for seed in range(3, 6):
        write_run(tmp_path / str(seed), seed=seed)
    assert "seed" not in [text.get_text() for text in draw_runs(read_runs(tmp_path)).legends[0].get_texts()]


def test_a_seed_has_the_same_dashes_in_every_panel_and_stands_in_the_legend(tmp_path):
    for experiment, seed in (("a", 0), ("b", 1), ("b", 2)):
        write_run(tmp_path / f"{experiment}{seed}", seed=seed, experiment=experiment)
    figure = draw_runs(read_runs(tmp_path))
    assert [text.get_text() for text in figure.legends[0].get_texts()][-5:-1] == ["seed", "0", "1", "2"]
    (of_a, *_), (of_b, *_) = (drawn(panel) for panel in figure.axes[::4])
    assert of_a.get_linestyle() == "-"
    assert of_b.get_linestyle() != "-"


@pytest.mark.slow
def test_any_number_of_kinds_is_drawn_with_looks_of_their_own(tmp_path):
    for i in range(21):
        write_run(tmp_path / str(i), options={"fade": i})
    figure = draw_runs(read_runs(tmp_path))
    assert len({line.get_color() for line in drawn(figure.axes[0])[:-1]}) == 21
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names[1:22] == [f"fade={i}" for i in range(21)]


def test_the_legend_is_no_wider_than_the_panels_however_long_its_names(tmp_path):
    for i in range(6):
        write_run(tmp_path / str(i), options={"orthogonalise_in": [f"blocks.{i}.attention.*", f"blocks.{i}.ff.*"]})
    figure = draw_runs(read_runs(tmp_path))
    legend = figure.legends[0].get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert legend.width <= figure.bbox.width


def test_losses_near_zero_get_a_logarithmic_axis(tmp_path):
    write_run(tmp_path / "a", value=0.5)
    assert [panel.get_yscale() for panel in draw_runs(read_runs(tmp_path)).axes] == ["linear"] * 4
    MetricsTable(tmp_path / "a").log_metrics({"train/loss": 0.001, "val/loss": float("inf")}, 4)
    assert [panel.get_yscale() for panel in draw_runs(read_runs(tmp_path)).axes] == ["log", "log", "linear", "linear"]


def test_accuracies_of_one_optimizer_with_two_settings_are_told_apart(tmp_path):
    for i, fade in enumerate((1, 1, 2)):
        write_run(tmp_path / str(i), options={"fade": fade})
    panel = draw_accuracy(read_runs(tmp_path)).axes[0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["fade=1", "fade=2"]
    with pytest.raises(RunError, match="no metrics"):
        draw_runs(read_runs(tmp_path).head(0))
    with pytest.raises(RunError, match="tested"):
        draw_accuracy(read_runs(tmp_path).head(0))


def test_tasks_have_rows_of_their_own_with_their_own_chance(tmp_path):
    write_run(tmp_path / "a", experiment="easy", chance_loss=0.7)
    write_run(tmp_path / "b", experiment="hard", chance_loss=3.0)
    panels = draw_runs(read_runs(tmp_path)).axes
    assert [panel.get_title().partition(":")[0] for panel in panels] == ["easy"] * 4 + ["hard"] * 4
    assert [line.get_ydata()[0] for panel in (panels[0], panels[4]) for line in panel.lines[-1:]] == [0.7, 3.0]
    assert panels[0].get_ylim() != panels[4].get_ylim()


def test_a_task_without_any_exact_match_gets_no_panels_for_it(tmp_path):
    write_run(tmp_path / "a", task="text")
    table = read_runs(tmp_path)
    assert len(draw_runs(table).axes) == 4
    table.loc[table.metric.str.endswith("exact_match"), "value"] = 0.0
    assert [panel.get_title() for panel in draw_runs(table).axes] == ["text Z5: loss, nats per token"] * 2
    write_run(tmp_path / "b")
    assert len(draw_runs(pd.concat([table, read_runs(tmp_path / "b")])).axes) == 6


def test_a_run_without_a_summary_is_drawn_without_chance(tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "a" / "summary.json").unlink()
    assert [len(drawn(panel)) for panel in draw_runs(read_runs(tmp_path)).axes] == [2, 2, 1, 1]


def test_no_run_fails_for_its_picture(tmp_path, caplog):
    write_run(tmp_path / "a")
    leave_picture(tmp_path / "a")
    assert (tmp_path / "a" / "progress.png").stat().st_size > 10_000
    leave_picture(tmp_path / "nothing")
    assert "progress.png was not drawn: RunError" in caplog.text


def test_finished_runs_become_a_markdown_table_over_their_seeds(tmp_path):
    for seed, value in enumerate((1.0, 0.5)):
        write_run(tmp_path / str(seed))
        summary = {"test": {"test/exact_match": value}, "evaluations": 1000, "seconds": 2.0 + seed, "steps": 10}
        summary["stopped_by"] = "max_steps"
        (tmp_path / str(seed) / "summary.json").write_text(json.dumps(summary))
    write_run(tmp_path / "interrupted")
    (tmp_path / "interrupted" / "summary.json").write_text(json.dumps(summary | {"stopped_by": "interrupted"}))
    row = summary_table(read_summaries(tmp_path)).splitlines()[-1]
    assert len(summary_table(read_summaries(tmp_path)).splitlines()) == 3  # the interrupted run is left out
    cells = ["state_tracking Z5", "tiny", "pattern_search", "1 / 2", "0.750 (0.500)", "10", "2.5 (3.0)", "1,000"]
    assert row == f"| {' | '.join([*cells, 'max_steps 2'])} |"
    with pytest.raises(RunError):
        summary_table(read_summaries(tmp_path), "test/unknown")
    with pytest.raises(RunError):
        read_summaries(tmp_path / "nothing")


def test_runs_with_different_settings_get_rows_of_their_own(tmp_path):
    for i, length in enumerate((8, 16)):
        write_run(tmp_path / str(i))
        config = CONFIG | {"datamodule": CONFIG["datamodule"] | {"length": length}, "seed": i}
        OmegaConf.save(config, tmp_path / str(i) / "config.yaml")
        summary = {"test": {"test/exact_match": 1.0}, "evaluations": 1, "seconds": 1.0, "steps": 1, "stopped_by": "x"}
        (tmp_path / str(i) / "summary.json").write_text(json.dumps(summary))
    rows = summary_table(read_summaries(tmp_path)).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| state_tracking Z5, length={n}" for n in (8, 16)]


def test_settings_tell_runs_of_a_kind_apart():
    def config(name, max_steps, precision, **options):
        nodes = {"trainer": {"max_steps": max_steps, "precision": precision}, "optimizer": options}
        return CONFIG | nodes | {"choices": CONFIG["choices"] | {"optimizer": name}}

    configs = [
        config("pattern_search", 9, 32, memory=0.5, seed=1),
        config("pattern_search", 9, 32, memory=0.7, seed=2),
        config("adam", 5, 64, lr=1),
    ]
    assert name_settings(configs) == ["memory=0.5", "memory=0.7", ""]
    configs[1]["trainer"]["max_steps"] = 7
    assert name_settings(configs) == ["memory=0.5, max_steps=9", "memory=0.7, max_steps=7", ""]
    assert name_settings(configs, leave_out=LIMITS) == ["memory=0.5", "memory=0.7", ""]
    configs = [configs[0] | {"callbacks": {"averaging": {"decay": decay}}} for decay in (0.9, 0.99)]
    assert name_settings(configs) == ["decay=0.9", "decay=0.99"]  # it decides what is tested


def test_of_a_loss_the_worst_is_the_highest_and_none_counts_as_solved():
    kind = dict(task="text", model="small", optimizer="adam", variant="", settings="", steps=1, seconds=1.0)
    rows = [kind | {"evaluations": 1, "stopped_by": "max_seconds", "test/loss": loss} for loss in (2.0, 3.0)]
    table = summary_table(pd.DataFrame(rows), "test/loss")
    assert "| runs | mean (worst) loss |" in table
    assert "| 2 | 2.500 (3.000) |" in table
