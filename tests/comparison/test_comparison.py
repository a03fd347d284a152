"""A comparison: what its plan says, what is run, what is kept, chosen and drawn."""

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

import report
from comparison import runner
from comparison.pictures import draw_all, on_a_grid
from comparison.plan import Plan, job_of, pairs, read_plan, reported_jobs, tuning_jobs
from comparison.rows import (
    KEY,
    best_setting,
    curves_path,
    key_of,
    overview_of,
    read_table,
    replaced,
    reported,
    spread,
    summary_of,
    thinned,
)
from conftest import ROOT
from results.runs import RunError
from run.directory import locked

LOSS = {"metric": "val/loss"}
PLAN = {
    "seeds": [0, 1],
    "tuning_seed": 100,
    "tuning_share": 0.5,
    "baseline": "adam",
    "tasks": {
        "small": {"overrides": ["experiment=parity_tiny"], "seconds": 0.4},
        "text": {
            "overrides": ["experiment=z5"],
            "seconds": 4,
            "seeds": 1,
            "contenders": ["adam"],
            "target": {"metric": "val/loss", "at_most": 2},
        },
    },
    "contenders": {
        "adam": {"overrides": ["optimizer=adam"], "settings": [{"optimizer.lr": 0.01}, {"optimizer.lr": 1e-9}]},
        "nodes": {"overrides": ["optimizer=pattern_search_nodes"]},
    },
}


def written(directory: Path, **changes) -> Path:
    path = directory / "mine.yaml"
    path.write_text(yaml.safe_dump(PLAN | changes))
    return path


@pytest.fixture
def plan(tmp_path):
    return read_plan(written(tmp_path))


def row(task="small", contender="adam", setting=0, phase="reported", seed=0, solved=100.0, **more):
    plan = Plan.model_validate(PLAN)
    job = job_of(plan, task, contender, plan.contenders[contender].settings[setting], phase, seed)
    of = key_of(job) | {"command": job.command, "evaluations": 400, "seconds": 4.0, "steps": 100, "val/loss": 0.1}
    of |= {
        "test/loss": 0.2,
        "test/exact_match": 0.5,
        "solved_at_evaluations": solved,
        "solved_at_seconds": solved / 100,
    }
    return of | more


TUNED = [row(task, setting=k, phase="tuning", seed=100, solved=100.0 + k) for task in ("small", "text") for k in (0, 1)]


def curve(contender="adam", seed=0, at=(3, 6, 9), values=(3.0, 2.0, 1.0), task="small"):
    setting = "lr=0.01" if contender == "adam" else ""
    of = dict(zip(KEY, (task, contender, setting, "reported", seed), strict=True))
    return pd.DataFrame({"evaluations": at, "seconds": at, "value": values}).assign(metric="val/loss", **of)


# --- the plan ---


@pytest.mark.slow
def test_runs_find_what_they_need_imported_already():
    with runner.workers(1):
        code = "import sys; sys.exit(7 if 'run.training' in sys.modules else 3)"
        process = runner.preloaded().Process(target=exec, args=(code,))
        process.start()
        process.join()
    assert process.exitcode == 7


def test_every_contender_runs_on_every_task_unless_its_tasks_are_named(plan):
    assert [*pairs(plan)] == [("small", "adam"), ("small", "nodes"), ("text", "adam")]


def test_tuning_runs_each_setting_once_on_its_own_seed_for_its_share(plan):
    words = [" ".join(job.words) for job in tuning_jobs(plan, "small", "adam")]
    assert len(words) == 2
    assert all("seed=100" in line and "max_seconds:0.2}" in line for line in words)
    assert ["optimizer.lr=0.01" in line for line in words] == [True, False]
    assert tuning_jobs(plan, "small", "nodes") == []  # nothing to choose


def test_reported_runs_are_on_the_seeds_of_the_task_with_all_its_seconds(plan):
    jobs = reported_jobs(plan, "small", "adam", {"optimizer.lr": 0.01})
    assert [job.seed for job in jobs] == [0, 1]
    assert all("max_seconds:0.4}" in " ".join(job.words) for job in jobs)
    assert [job.seed for job in reported_jobs(plan, "text", "adam", {})] == [0]
    assert len({job.directory for job in jobs}) == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"seeds": []}, "seeds"),
        ({"tuning_seed": 1}, "tuning_seed=1 is among the seeds"),
        ({"tuning_share": 0}, "tuning_share"),
        ({"baseline": "adm"}, "baseline=adm is no contender; known: adam, nodes"),
        ({"budget": 3}, "budget: Extra inputs"),
        ({"tasks": {"small": {"overrides": [], "seconds": 0}}}, "tasks.small.seconds"),
        (
            {"tasks": {"small": {"overrides": [], "seconds": 1, "target": LOSS}}},
            "at_least or at_most",
        ),
        ({"tasks": {"small": {"overrides": [], "seconds": 1, "contenders": ["adm"]}}}, "tasks.small.contenders: adm"),
    ],
)
def test_a_plan_that_is_wrong_is_refused_by_name(tmp_path, wrong, said):
    with pytest.raises(RunError, match=said):
        read_plan(written(tmp_path, **wrong))


def test_a_plan_that_is_not_there_or_no_yaml_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("a: [")
    for path in (tmp_path / "none.yaml", tmp_path / "bad.yaml"):
        with pytest.raises(SystemExit) as end:
            report.main(["compare", str(path)])
        assert end.value.code == 2
        assert str(path) in capsys.readouterr().err


def test_commands_that_cannot_run_are_refused_before_any_run(tmp_path, capsys):
    contenders = {"adam": {"overrides": ["optimizer=adam"], "settings": [{"optimizer.lrr": 1}]}}
    with pytest.raises(SystemExit) as end:
        report.main(["compare", str(written(tmp_path, contenders=contenders))])
    assert end.value.code == 2
    assert "small, adam: " in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


# --- rows and curves ---


def test_the_setting_that_solved_soonest_is_chosen_else_the_lowest_loss(plan):
    tried = [row(phase="tuning", seed=100), row(phase="tuning", seed=100, setting=1, solved=50.0)]
    assert best_setting(plan, pd.DataFrame(tried), "small", "adam") == {"optimizer.lr": 1e-9}
    never = [
        one | {"solved_at_seconds": math.nan, "val/loss": loss} for one, loss in zip(tried, (0.1, 0.3), strict=True)
    ]
    assert best_setting(plan, pd.DataFrame(never), "small", "adam") == {"optimizer.lr": 0.01}
    with pytest.raises(RunError, match="tuning of adam on text"):
        best_setting(plan, pd.DataFrame(never), "text", "adam")
    unknown = row(phase="tuning", seed=100, solved=1.0, command="python src/train.py of another plan")
    assert best_setting(plan, pd.DataFrame([*tried, unknown]), "small", "adam") == {"optimizer.lr": 1e-9}


def test_a_new_row_takes_the_place_of_an_old_one_of_its_key():
    old, new = pd.DataFrame([row(), row(seed=1)]), pd.DataFrame([row(solved=7.0), row(seed=2)])
    table = replaced(old, new)
    assert sorted(table.seed) == [0, 1, 2]
    assert table[table.seed == 0].solved_at_evaluations.tolist() == [7.0]


def test_thin_curves_keep_the_first_and_the_last_point():
    long = curve(at=range(1, 1001), values=np.linspace(3, 1, 1000))
    kept = thinned(long)
    assert len(kept) <= 60
    assert kept.evaluations.iloc[0] == 1
    assert kept.evaluations.iloc[-1] == 1000


def test_costs_of_runs_that_did_not_solve_are_bounds():
    nan = math.nan
    assert spread(pd.Series([1.0, 3.0, 2.0]), pd.Series([9.0, 9, 9]), ".0f") == "2 (1 to 3)"
    assert spread(pd.Series([1.0, 3.0, nan]), pd.Series([9.0, 9, 9]), ".0f") == "3 (1 to not solved)"
    assert spread(pd.Series([1.0, nan, nan]), pd.Series([9.0, 9, 9]), ".0f") == "> 9"
    assert spread(pd.Series([1.0, nan, nan]), pd.Series([1.0, 9, 0.1]), ".0f") == "> 9"  # one ended early, as by NaN
    assert spread(pd.Series([1.0, nan]), pd.Series([1.0, 9]), ".0f") == "> 9"


def test_the_table_is_in_the_order_of_the_plan(plan):
    rows = [row("text"), row("small", "nodes"), row("small", seed=1, solved=math.nan), row("small")]
    stale = [row("small", setting=1), row("small", seed=7)]  # a setting that is not chosen, a seed that is not reported
    rows = pd.DataFrame([*TUNED, *rows, *stale])
    table = summary_of(plan, rows)
    assert [(line["task"], line["contender"]) for line in table] == [
        ("small", "adam"),
        ("small", "nodes"),
        ("text", "adam"),
    ]
    assert [line["solved / seeds"] for line in table] == ["1 / 2", "1 / 1, 1 missing", "1 / 1"]
    assert reported(plan, rows).solved.sum() == 3


def test_the_overview_has_a_line_per_contender(plan):
    nan = math.nan
    rows = [row("text"), row("small", solved=nan), row("small", seed=1), row("small", "nodes")]
    adam, nodes = overview_of(plan, pd.DataFrame([*TUNED, *rows]))
    assert adam["small"] == "1 / 2"  # not more than half
    assert adam["text"].startswith("1 / 1 in ")
    assert adam["all"] == "2 / 3"
    assert nodes["text"] == ""
    assert nodes["all"] == "1 / 1"


def test_curves_of_seeds_are_joined_at_the_same_costs():
    seeds = pd.concat([curve(seed=0, at=(2, 4, 8), values=(3.0, 2, 1)), curve(seed=1, at=(1, 16), values=(5.0, 4))])
    joined = on_a_grid(seeds, "evaluations")
    assert joined.groupby("spent").seed.nunique().eq(2).all()
    assert joined.spent.min() == pytest.approx(2)  # where both have been validated
    ends = joined[joined.spent == joined.spent.max()].set_index("seed").value
    assert ends.to_dict() == {0: 1.0, 1: 4.0}  # a run that has ended keeps its last value


@pytest.mark.parametrize("nothing", [False, True])
def test_every_figure_is_drawn_also_where_nothing_is_solved(nothing, plan, tmp_path):
    nan = math.nan
    rows = [row(), row(seed=1), row("small", "nodes", solved=nan), row("text", solved=nan)]
    rows = pd.DataFrame([*TUNED, *([one | {"solved_at_seconds": nan} for one in rows] if nothing else rows)])
    curves = pd.concat([curve(), curve("nodes"), curve(task="text"), curve().assign(metric="val/exact_match")])
    drawn = {path.name for path in draw_all(plan, rows, curves, tmp_path / "mine")}
    assert drawn == {
        f"mine_{n}.{s}" for n in ("loss", "exact_match", "solved", "ratios", "costs") for s in ("png", "svg")
    }
    assert all((tmp_path / name).stat().st_size > 1000 for name in drawn)


# --- the runs ---


@pytest.mark.slow
def test_a_comparison_runs_is_kept_and_is_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATTERN_SEARCH_ROOT", str(tmp_path))
    path = written(tmp_path, tasks={"small": PLAN["tasks"]["small"]}, seeds=[0])
    report.main(["compare", str(path)])
    printed = capsys.readouterr().out
    rows = read_table(tmp_path / "results" / "mine.csv")
    assert len(rows) == 4  # two settings tuned, two contenders reported
    assert set(rows[rows.contender == "adam"].setting[rows.phase == "reported"]) == {"lr=0.01"}
    assert (rows.stopped_by == "max_seconds").all()
    assert (rows.seconds >= [0.2 if phase == "tuning" else 0.4 for phase in rows.phase]).all()
    adam = rows[rows.contender == "adam"]
    assert (adam.evaluations == 3 * adam.steps).all()
    assert rows.command.str.startswith("python src/train.py experiment=parity_tiny").all()
    assert len(read_table(curves_path(tmp_path / "results" / "mine.csv"))) > 0
    assert "at most 0:00:00 left" in printed
    assert "| adam | " in printed
    assert "| small | adam | lr=0.01 | " in (tmp_path / "mine_table.md").read_text()

    monkeypatch.setattr(runner, "run_apart", None)  # nothing is asked for
    report.main(["compare", str(path)])
    assert read_table(tmp_path / "results" / "mine.csv")[KEY].equals(rows[KEY])


def test_two_of_the_same_do_not_run_at_the_same_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATTERN_SEARCH_ROOT", str(tmp_path))
    with locked(tmp_path / "runs" / "comparison" / "mine"), pytest.raises(SystemExit) as end:
        report.main(["compare", str(written(tmp_path))])
    assert end.value.code == 2
    assert "is in use by another process" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATTERN_SEARCH_ROOT", str(tmp_path))
    path = written(tmp_path, tasks={"small": PLAN["tasks"]["small"]}, seeds=[0])
    place = tmp_path / "runs" / "comparison" / "mine" / "small" / "nodes" / "defaults" / "reported_0.4s_seed_0"
    place.parent.mkdir(parents=True)
    place.write_text("a file where a directory is needed")
    with pytest.raises(SystemExit) as end:
        report.main(["compare", str(path)])
    assert end.value.code == 2
    said = capsys.readouterr()
    assert "1 run(s) failed" in said.err
    assert len(read_table(tmp_path / "results" / "mine.csv")) == 3


@pytest.mark.slow
def test_the_figures_of_the_project_are_drawn_from_its_rows(tmp_path, capsys):
    for path in ("full.yaml", "results/full.csv", "results/full_curves.csv.gz"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "report" / path, tmp_path / path)
    report.main(["compare", str(tmp_path / "full.yaml"), "--draw"])
    table = capsys.readouterr().out.split("\n\n")[0]
    assert table in (ROOT / "report" / "README.md").read_text()
    assert (tmp_path / "full_table.md").read_text() == (ROOT / "report" / "full_table.md").read_text()
    assert len(list(tmp_path.glob("full_*.png"))) == 5


@pytest.mark.parametrize("name", ["full", "quick"])
def test_the_plans_of_the_project_name_tasks_and_contenders_that_compose(name, compose_config):
    plan = read_plan(ROOT / "report" / f"{name}.yaml")
    first_task, first_contender = next(iter(plan.tasks)), next(iter(plan.contenders))
    for task, contender in pairs(plan):
        if task == first_task or contender == first_contender:
            job = job_of(plan, task, contender, plan.contenders[contender].settings[-1], "tuning", 0)
            assert compose_config(*job.words).callbacks.limit.max_seconds > 0
