"""Finished runs as rows of a CSV, from which the tables of the documents are made."""

import json

import pandas as pd
import pytest
from omegaconf import OmegaConf

import report


def write_run(path, seed, exact_match, stopped_by="solved"):
    (path / ".hydra").mkdir(parents=True)
    choices = {"task": "state_tracking", "model": "tiny", "optimizer": "adam", "experiment": "z5", "variant": None}
    OmegaConf.save({"choices": choices, "datamodule": {}, "seed": seed}, path / "config.yaml")
    hydra = {"job": {"config_name": "train"}, "overrides": {"task": ["experiment=z5", f"seed={seed}"]}}
    OmegaConf.save({"hydra": hydra}, path / ".hydra" / "hydra.yaml")
    start = {"git_commit": "abcdef0123456789", "git_dirty": False, "cores": 2, "platform": "Linux"}
    (path / "environment.json").write_text(json.dumps([start | {"started": "2026-11-26T17:00:00"}]))
    test = {"test/exact_match": exact_match, "test/accuracy_at_1": 1.0}
    summary = {"test": test, "steps": 10, "evaluations": 10, "seconds": 1.5, "stopped_by": stopped_by}
    (path / "summary.json").write_text(json.dumps(summary))


def collected(*paths, output):
    report.main(["collect", *map(str, paths), "--output", str(output)])
    return pd.read_csv(output)


def test_a_row_says_how_its_run_is_made_again_and_what_it_came_to(tmp_path):
    write_run(tmp_path / "a", 3, 0.5)
    (row,) = collected(tmp_path, output=tmp_path / "kept" / "x.csv").to_dict("records")
    assert row["command"] == "python src/train.py --config-name=train experiment=z5 seed=3"
    assert (row["commit"], row["machine"], row["date"]) == ("abcdef0123", "2 cores, Linux", "2026-11-26")
    assert (row["test/exact_match"], row["stopped_by"], row["seed"]) == (0.5, "solved", 3)
    assert "test/accuracy_at_1" not in row


def test_a_command_has_one_row_the_newest(tmp_path):
    write_run(tmp_path / "first" / "a", 0, 0.1)
    write_run(tmp_path / "first" / "b", 1, 0.2)
    write_run(tmp_path / "second" / "a", 0, 0.9)
    write_run(tmp_path / "second" / "c", 2, 0.9, stopped_by="interrupted")
    for part in ("first", "second"):
        rows = collected(tmp_path / part, output=tmp_path / "x.csv")
    assert sorted(rows["test/exact_match"]) == [0.2, 0.9]


def test_the_table_of_the_rows_is_that_of_the_runs(tmp_path, capsys):
    for seed in range(3):
        write_run(tmp_path / "runs" / str(seed), seed, 1.0)
    collected(tmp_path / "runs", output=tmp_path / "x.csv")
    capsys.readouterr()
    for source in (tmp_path / "runs", tmp_path / "x.csv"):
        report.main(["tables", str(source)])
    of_runs, of_rows = capsys.readouterr().out.split("| task |")[1:]
    assert of_runs == of_rows
    assert "| z5 | tiny | adam | 3 / 3 | 1.000 (1.000) | 10 | 1.5 (1.5) | 10 | solved 3 |" in of_rows


def test_a_place_without_runs_writes_nothing(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        collected(tmp_path, output=tmp_path / "x.csv")
    assert stopped.value.code == 2
    assert not (tmp_path / "x.csv").exists()


def test_a_run_that_does_not_say_with_what_code_it_was_made_is_named_and_left_out(tmp_path, capsys):
    write_run(tmp_path / "a", 0, 0.5)
    write_run(tmp_path / "b", 1, 0.5)
    (tmp_path / "b" / "environment.json").unlink()
    assert list(collected(tmp_path, output=tmp_path / "x.csv").seed) == [0]
    assert f"Left out: {tmp_path / 'b'}/environment.json is missing" in capsys.readouterr().err


def test_kept_rows_stand_beside_runs(tmp_path, capsys):
    write_run(tmp_path / "a", 0, 1.0)
    write_run(tmp_path / "b", 1, 0.5)
    collected(tmp_path / "a", output=tmp_path / "x.csv")
    capsys.readouterr()
    report.main(["tables", str(tmp_path / "x.csv"), str(tmp_path / "b")])
    assert "| z5 | tiny | adam | 1 / 2 | 0.750 (0.500) |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report.main(["tables", str(tmp_path / "x.csv"), str(tmp_path / "nothing")])


def test_a_metric_that_some_kept_rows_lack_is_that_of_the_others(tmp_path, capsys):
    pd.DataFrame(
        [
            {"task": task, "model": "tiny", "optimizer": "adam", "variant": "", "settings": "", "seed": 0, "steps": 1}
            | {"evaluations": 1, "seconds": 1.0, "stopped_by": "max_steps", "test/balanced_accuracy": value}
            for task, value in (("sets", 0.75), ("z5", None))
        ]
    ).to_csv(tmp_path / "x.csv", index=False)
    report.main(["tables", str(tmp_path / "x.csv"), "--metric", "test/balanced_accuracy"])
    out = capsys.readouterr().out
    assert "| sets | tiny | adam | 0 / 1 | 0.750 (0.750) |" in out
    assert "| z5 | tiny | adam | 0 / 1 | nan (nan) |" in out
