"""What is read of a run's directory, and that a damaged run is named and does not stop the others."""

import json
import subprocess
import sys

import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf

import report
from conftest import ROOT
from results.runs import RunError, read_all, read_run, read_runs
from run.metrics_table import MetricsTable

CONFIG = {
    "choices": {"task": "state_tracking", "model": "tiny", "optimizer": "adam", "variant": "v"},
    "datamodule": {"group": "Z5"},
    "seed": 3,
}
SUMMARY = {"test": {"test/exact_match": 1.0}, "steps": 3, "evaluations": 3, "seconds": 1.0, "stopped_by": "solved"}


@pytest.fixture
def runs(tmp_path):
    """Three runs of three seeds."""
    for seed in range(3):
        directory = tmp_path / "runs" / str(seed)
        directory.mkdir(parents=True)
        OmegaConf.save(CONFIG | {"seed": seed}, directory / "config.yaml")
        (directory / "summary.json").write_text(json.dumps(SUMMARY))
        MetricsTable(directory).log_metrics({"train/loss": 0.5, "evaluations": 1, "seconds": 0.1}, 0)
    return tmp_path / "runs"


DAMAGE = [
    ("metrics.csv", ""),
    ("metrics.csv", "step,evaluations\n1,2\n"),
    ("metrics.csv", "step,evaluations,seconds,metric,value\n1,2,3,train/loss,wrong\n"),
    ("summary.json", '{"test": {"test/exa'),
    ("summary.json", ""),
    ("summary.json", "[]"),
    ("config.yaml", ""),
    ("config.yaml", "a: [1"),
    ("config.yaml", "just a word"),
    ("config.yaml", "choices: 3\ndatamodule: {}\nseed: 1\n"),
]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["figures", "tables", "ablation"])
@pytest.mark.parametrize(("name", "content"), DAMAGE)
def test_a_damaged_run_is_named_in_one_line_and_the_others_are_shown(runs, command, name, content, capsys, monkeypatch):
    monkeypatch.setattr("results.figures.draw_runs", lambda table: Figure())  # which takes seconds, and is tested alone
    monkeypatch.setattr("results.ablation.draw_ablation", lambda *_: Figure())
    (runs / "1" / name).write_text(content)
    report.main([command, str(runs)])
    said = capsys.readouterr()
    if name == "metrics.csv" and command != "figures":
        assert said.err == ""  # it is not read
        return
    (line,) = said.err.splitlines()
    assert line.startswith("Left out: ")
    assert str(runs / "1") in line
    assert {"figures": "2 run(s)", "tables": "2 / 2", "ablation": "2 / 2"}[command] in said.out


def test_a_summary_of_an_older_version_is_named_too(runs, capsys):
    (runs / "0" / "summary.json").write_text('{"stopped_by": "solved"}')
    report.main(["tables", str(runs)])
    assert "has no steps, evaluations, seconds, test" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["figures", "tables", "ablation"])
@pytest.mark.parametrize("place", ["", "nowhere", "kept.csv"])
def test_a_place_without_a_run_ends_with_one_line_and_code_2(command, place, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        report.main([command, str(tmp_path / place)])
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(f"{command}: no ") or line.endswith("is not there")
    assert str(tmp_path / place) in line


def test_an_unknown_command_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as end:
        report.main(["figure"])
    assert end.value.code == 2
    assert "Known: tables, figures" in capsys.readouterr().err


def test_a_run_says_what_it_was_and_whether_it_is_finished(runs):
    run = read_run(runs / "0")
    assert {"task": "state_tracking Z5", "variant": "v", "seed": 0}.items() <= run.description.items()
    assert run.finished
    (runs / "1" / "summary.json").write_text(json.dumps(SUMMARY | {"stopped_by": "interrupted"}))
    (runs / "2" / "summary.json").unlink()
    assert read_all(runs, read=lambda run: run.finished) == [True, False, False]
    with pytest.raises(RunError, match="holds no run"):
        read_run(runs)


def test_a_last_row_that_is_being_written_is_left_out(runs):
    with (runs / "0" / "metrics.csv").open("a") as table:
        table.write("1,2,0.2,train/loss,0.4\n2,3,0.3,train/lo")
    assert read_run(runs / "0").metrics().value.tolist() == [0.5, 0.4]


def test_runs_of_one_name_in_two_places_stay_two(runs, tmp_path):
    for sweep in ("a", "b"):
        (tmp_path / sweep / "0").mkdir(parents=True)
        for name in ("config.yaml", "metrics.csv"):
            (tmp_path / sweep / "0" / name).write_text((runs / "0" / name).read_text())
    assert read_runs(tmp_path).run.nunique() == 5


def test_the_reader_needs_neither_torch_nor_lightning_nor_pandas():
    code = "import sys, results.runs; print([m for m in ('torch', 'lightning', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
