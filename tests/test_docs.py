"""What the documents promise: every command runs and every example works."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from itertools import cycle, islice

import pandas as pd
import pytest
import torch

from commands import (
    CODE,
    DOCUMENTS,
    FILE,
    LOG,
    README,
    WITH_COMMANDS,
    begin,
    blocks,
    commands,
    files,
    finish,
    run,
    run_alone,
    run_dirs,
    short,
)
from conftest import ROOT

EXTENDING = ROOT / "docs" / "extending.md"
COMMANDS = commands(*WITH_COMMANDS)
OWN_CONFIGS = [c for c in COMMANDS if "mine" in c]
TRAIN = [c for c in COMMANDS if c.startswith("python src/train.py") and c not in OWN_CONFIGS]
LOOKS = tuple(f"python src/report.py {name}" for name in ("diagnosis", "landscape", "spectrum"))
DIAGNOSES = [c for c in commands(*DOCUMENTS) if c.startswith(LOOKS)]
DIAGNOSES = list(dict.fromkeys(c.partition(" --output")[0] for c in DIAGNOSES))
SCRIPTS = [(doc, code) for doc in DOCUMENTS for code in blocks(doc, "python") if not FILE.match(code)]
EXAMPLE_RUN = "runs/2026-11-26_00-33-10-441156"  # what the documents call a run of yours
TESTED_ELSEWHERE = {
    "make train": "tests/test_docs.py::test_make_does_what_the_documents_say",
    "make test": "tests/test_docs.py::test_make_does_what_the_documents_say",
    "make test-fast": "tests/test_docs.py::test_make_does_what_the_documents_say",
    "make report": "tests/test_docs.py::test_make_does_what_the_documents_say",
    "make report-quick": "tests/test_docs.py::test_make_does_what_the_documents_say",
    "python src/report.py compare report/full.yaml --draw": "tests/comparison/test_comparison.py::"
    "test_the_figures_of_the_project_are_drawn_from_its_rows",
    "make lint": "tests/test_docs.py::test_make_does_what_the_documents_say",
    "make types": "tests/test_docs.py::test_make_does_what_the_documents_say",
    "make format": "tests/test_docs.py::test_make_does_what_the_documents_say",
    "pip install -r requirements.txt": "tests/test_docs.py::test_make_does_what_the_documents_say",
    "python -m pytest": "tests/test_docs.py::test_make_does_what_the_documents_say",
    "python src/benchmark.py --models tiny small medium --batches 32 --output report/benchmark.png": "tests/"
    "test_all.py::test_the_benchmark_measures_models_against_their_weights",
    "python src/report.py tables report/results/tomita.csv": "tests/test_docs_text.py::"
    "test_a_table_of_kept_rows_is_as_its_command_prints_it",
    "python src/benchmark.py": "tests/test_all.py::test_the_benchmark_ends_with_its_rates_as_json",
    "python tests/soak_kill.py --kills 200": "tests/run/test_resume.py::"
    "test_killed_runs_end_as_their_twins_that_were_left_alone",
    "python tests/fuzz_config.py --cases 2000": "tests/config/test_check.py::"
    "test_random_mistakes_run_or_are_refused_by_name",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory that all runs of this module go below."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(home):
    """A finished run where the documents have one; returns its directory."""
    directory = home / EXAMPLE_RUN
    done = run(f"python src/train.py model=tiny trainer.max_epochs=2 logger=none hydra.run.dir={directory}", home)
    assert done.returncode == 0, done.stderr
    return directory


def from_anywhere(command):
    """The same command, to be typed outside the repository."""
    return command.replace("src/", f"{shlex.quote(str(ROOT))}/src/")


# --- commands ---


def test_the_readme_has_the_promised_commands():
    assert {"make train", "make test", "pip install -r requirements.txt"} <= set(commands(README))
    assert "python src/train.py --config-name=pattern_search_train" in commands(README)


def test_make_does_what_the_documents_say():
    targets = ["train", "test", "test-fast", "report", "report-quick", "lint", "types", "format"]
    printed = subprocess.run(
        ["make", "-n", "-B", *targets], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "src/train.py --config-name=pattern_search_train" in printed
    assert "-m pytest -n auto" in printed
    assert "src/report.py compare report/full.yaml" in printed
    assert "src/report.py compare report/quick.yaml" in printed
    assert '-m "not slow"' in printed
    assert "pip install --quiet --requirement requirements.txt" in printed
    assert all(part in printed for part in ("ruff check .", "ruff format .", "-m mypy"))


def test_every_command_of_the_documents_is_run_by_a_test():
    scripts = (
        "train.py",
        "evaluate.py",
        "show_data.py",
        "report.py figures",
        "report.py tables",
        "report.py diagnosis",
        "report.py landscape",
        "report.py spectrum",
    )
    here = tuple(f"python src/{name}" for name in scripts)
    assert [c for c in COMMANDS if not c.startswith(here) and c not in TESTED_ELSEWHERE] == []
    for test in TESTED_ELSEWHERE.values():
        file, name = test.split("::")
        assert f"def {name}(" in (ROOT / file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAIN)
def test_every_training_command_runs(command, home):
    """Sweeps with two seeds; without W&B, which starts slowly, where a command has options and no logger among them."""
    quiet = " logger=none" * (bool(re.search(r" \w+=", command)) and "logger" not in command)
    done = run(short(command).replace("seed=0,1,2", "seed=0,1") + quiet, home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", OWN_CONFIGS)
def test_configs_may_lie_outside_the_repository(command, tmp_path):
    for path, text in files(ROOT / "docs" / "running.md").items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    done = run(short(from_anywhere(command)) + " logger=none", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trains tiny" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python src/show_data.py")])
def test_every_data_command_shows_examples_and_chance(command, home):
    done = run(command, home)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("train", "val", "test", "input tokens", "chance"))


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python src/report.py figures")])
def test_every_figure_command_draws(command, home, trained):
    done = run(from_anywhere(command), home, cwd=home)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Drew \d+ run", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python src/report.py tables runs")])
def test_every_table_command_prints_a_row_a_group(command, home, trained):
    done = run(from_anywhere(command), home, cwd=home)
    assert done.returncode == 0, done.stderr
    assert "| tiny | pattern_search |" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python src/evaluate.py")])
def test_every_evaluation_runs(command, home, trained):
    done = run(from_anywhere(command), home, cwd=home)
    assert done.returncode == 0, done.stderr
    expected = r"[01]( [01]){7}\n" if "--prompt" in command else r".*test/exact_match.*"
    assert re.fullmatch(expected, done.stdout, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("command", DIAGNOSES)
def test_every_diagnosis_draws(command, tmp_path):
    done = run(f"{command} trainer.max_steps=5 callbacks=none --output {tmp_path}/seen.png", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Drew" in done.stdout
    assert (tmp_path / "seen.png").stat().st_size > 10_000


def choices(swept):
    return [swept] if swept.startswith(("{", "[")) else swept.split(",")


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands(LOG) if "src/report.py" not in c])
def test_every_command_of_the_log_composes(command, compose_config):
    """Sweeps of hours: each value of each key is composed once, but of all seeds only the first."""
    arguments = [word for word in shlex.split(command)[2:] if word != "-m"]
    name = next((a.removeprefix("--config-name=") for a in arguments if a.startswith("--")), "pattern_search_train")
    keys = [a.partition("=") for a in arguments if not a.startswith("--")]
    values = [[f"{key}={v}" for v in choices(swept)[: 1 if key == "seed" else None]] for key, _, swept in keys]
    jobs = max(map(len, values))
    for overrides in zip(*(islice(cycle(of_key), jobs) for of_key in values), strict=True):
        assert compose_config(*overrides, config_name=name).seed >= 0


REFUSALS = [code for doc in DOCUMENTS for code in blocks(doc, "") if code.startswith("$ python")]


@pytest.mark.slow
@pytest.mark.parametrize("transcript", REFUSALS)
def test_wrong_commands_are_refused_as_shown(transcript, tmp_path):
    command, expected = transcript.removeprefix("$ ").split("\n", 1)
    done = run(command, tmp_path / "runs_go_here")
    assert (done.returncode, done.stderr) == (2, expected)
    assert not (tmp_path / "runs_go_here").exists()


# --- examples ---


@pytest.mark.slow
@pytest.mark.parametrize(("document", "code"), [pytest.param(doc, code, id=doc.name) for doc, code in SCRIPTS])
def test_every_script_of_the_documents_runs(document, code, home, trained):
    done = run("python -", home, cwd=home, code=code, PYTHONPATH=str(ROOT / "src"))
    assert done.returncode == 0, done.stderr
    if "search.step" in code:  # it starts near 1, the variance of the target
        assert float(re.fullmatch(r"loss (\S+) after \d+ evaluations\n", done.stdout)[1]) < 0.1
    if "exact match" in code:
        tested = json.loads((trained / "summary.json").read_text())["test"]
        assert f"exact match {tested['test/exact_match']:.3f}\n" in done.stdout
        printed = re.search(r"test/loss\D+([\d.]+)", done.stdout)[1]  # Lightning's own table
        assert float(printed) == pytest.approx(tested["test/loss"], rel=1e-4)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with the examples of docs/extending.md in it, a file each."""
    root = tmp_path_factory.mktemp("copy")
    for folder in ("src", "configs", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for path, text in files(EXTENDING).items():
        before = f"{(root / path).read_text()}\n\n" if (root / path).exists() else ""
        (root / path).write_text(before + text)
    return root


def test_the_examples_are_complete_and_their_values_have_comments():
    examples = files(EXTENDING)
    assert len(examples) == len(blocks(EXTENDING, "python")) + len(blocks(EXTENDING, "yaml")) == 8
    for path, text in examples.items():
        values = [line for line in text.splitlines() if path.endswith(".yaml") and not line.startswith("_")]
        assert [line for line in values if " # " not in line] == []
    own = re.search(r"class OnePlusOne.*", examples["src/search/one_plus_one.py"], flags=re.DOTALL)[0]
    assert len(own.splitlines()) <= 24


@pytest.mark.slow
def test_the_task_of_the_documents_is_a_task(copy, tmp_path):
    shown = run("python src/show_data.py task=reversal", tmp_path, cwd=copy)
    assert "SEP" in shown.stdout, shown.stderr
    done = run("python src/train.py task=reversal model=tiny logger=none trainer.max_steps=2", tmp_path, cwd=copy)
    assert done.returncode == 0, done.stderr
    assert "tiny" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["pattern_search", "adam"])
def test_the_model_of_the_documents_is_a_model(optimizer, copy, tmp_path):
    command = f"python src/train.py model=convolution optimizer={optimizer} logger=none trainer.max_steps=2"
    done = run(command, tmp_path, cwd=copy)
    assert done.returncode == 0, done.stderr
    assert f"{optimizer} trains convolution" in done.stdout
    assert "one by one" not in done.stderr  # vmap knows it


@pytest.mark.slow
def test_the_optimizer_of_the_documents_keeps_the_contract(copy, tmp_path):
    done = run_alone(
        "python -m pytest -q -p no:cacheprovider tests/search/test_contract.py -k OnePlusOne", tmp_path, cwd=copy
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"^[2-9]\d passed", done.stdout, flags=re.MULTILINE)


SEARCH = (  # of many short steps, with a checkpoint before each
    "python src/train.py optimizer=one_plus_one model=tiny logger=none trainer.max_epochs=-1 "
    "trainer.check_val_every_n_epoch=20 checkpoint.every_steps=1 optimizer.max_evaluations=1000"
)


def outcome(run_dir):
    """What a run came to: why it stopped, its count, its weights and the whole state of its optimizer."""
    summary = json.loads((run_dir / "summary.json").read_text())
    checkpoint = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    search = checkpoint["optimizer_states"][0]["state"]["search"]
    del search["seconds"]
    return summary["stopped_by"], summary["evaluations"], summary["steps"], checkpoint["state_dict"], search


@pytest.mark.slow
def test_a_killed_run_of_the_optimizer_of_the_documents_goes_on_as_if_it_had_not_been(copy, tmp_path):
    done = run(SEARCH, tmp_path / "alone", cwd=copy)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (alone,) = run_dirs(tmp_path / "alone")

    process = begin(SEARCH, tmp_path / "killed", cwd=copy)
    while process.poll() is None and steps_done(tmp_path / "killed") < 50:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert finish(process).returncode == -signal.SIGKILL, "it ended before it was killed"
    (killed,) = run_dirs(tmp_path / "killed")
    assert not (killed / "summary.json").exists()

    done = run(f"{SEARCH} resume=auto", tmp_path / "killed", cwd=copy)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Goes on from step \d{2,}", done.stdout)
    assert run_dirs(tmp_path / "killed") == [killed]
    (*counts, weights, search), (*expected, other_weights, other_search) = outcome(killed), outcome(alone)
    assert counts == expected
    assert counts[:2] == ["max_evaluations", 1000]
    assert search == other_search
    assert all(torch.equal(weights[name], other_weights[name]) for name in other_weights)
    table = pd.read_csv(killed / "metrics.csv")
    evaluations = table[table.metric == "train/sigma"].evaluations
    assert evaluations.is_monotonic_increasing
    assert evaluations.is_unique  # no step was counted twice
    assert evaluations.max() == 1000


def steps_done(home):
    """Steps that the metrics table of the only run below `home` has."""
    return sum(path.read_text().count("train/sigma") for path in home.rglob("metrics.csv"))


@pytest.mark.slow
def test_an_optimizer_that_counts_elsewhere_is_refused_when_it_goes_on(copy, tmp_path):
    (copy / "src/search/own_count.py").write_text(
        "from search.one_plus_one import OnePlusOne\n"
        "class OwnCount(OnePlusOne):\n"
        "    count = 0\n"
        "    @property\n"
        "    def evaluations(self):\n"
        "        return self.count\n"
        "    def take_step(self, evaluate):\n"
        "        super().take_step(evaluate)\n"
        "        self.count += self.report.evaluations\n"
        "    def state_dict(self):\n"
        "        return super().state_dict() | {'count': self.count}\n"
    )
    text = (copy / "configs/optimizer/one_plus_one.yaml").read_text()
    (copy / "configs/optimizer/own_count.yaml").write_text(
        text.replace("search.one_plus_one.OnePlusOne", "search.own_count.OwnCount")
    )
    command = "python src/train.py optimizer=own_count model=tiny logger=none"
    done = run(f"{command} trainer.max_steps=3 checkpoint.every_steps=1", tmp_path, cwd=copy)
    assert done.returncode == 0, done.stderr
    (run_dir,) = run_dirs(tmp_path)
    done = run(f"{command} trainer.max_steps=6 resume={run_dir}", tmp_path, cwd=copy)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "keep what it counts and remembers in `saved`" in done.stderr


@pytest.fixture(scope="module")
def readme_copy(tmp_path_factory):
    """A copy of the project with the examples of the README in it."""
    root = tmp_path_factory.mktemp("readme")
    for folder in ("src", "configs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    examples = files(README) | dict(re.findall(r"^\| `(configs/\S+)` \| `(.*)` \|$", README.read_text(), re.MULTILINE))
    assert len(examples) == 7
    for path, text in examples.items():
        (root / path).write_text(text)
    return root


@pytest.mark.slow
def test_the_task_the_model_and_the_optimizer_of_the_readme_work_together(readme_copy, tmp_path):
    command = next(c for c in re.findall(r"`([^`]+)`", CODE.sub("", README.read_text())) if "task=copying" in c)
    done = run(f"{command} logger=none trainer.max_steps=3", tmp_path, cwd=readme_copy)
    assert done.returncode == 0, done.stderr
    assert "one_try trains running_sum" in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_model_needs_no_more_than_the_readme_says(readme_copy, tmp_path):
    command = "python src/train.py model=running_sum model.width=8 logger=none trainer.max_steps=2"
    done = run(f"{command} optimizer.polls_per_step=20", tmp_path, cwd=readme_copy)
    assert done.returncode == 0, done.stderr
    assert "running_sum" in done.stdout
    refused = run(command, tmp_path, cwd=readme_copy)  # 42 weights, 384 polls
    assert refused.stderr.count("  - ") == 1, refused.stderr
    assert "optimizer.polls_per_step=384 is more than the 42 directions" in refused.stderr
    refused = run(f"{command} optimizer=pattern_search_nodes", tmp_path, cwd=readme_copy)
    assert refused.returncode == 2
    assert "only the fast polls of a DecoderOnlyTransformer do" in refused.stderr
