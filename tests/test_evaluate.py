"""`src/evaluate.py`: the numbers of summary.json again, other data, predictions as people read them, refusals."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from omegaconf import OmegaConf

from config.compose import compose_config, job_config
from conftest import ROOT
from data.decoding import decode_rows, predict, wrong_rows
from data.sequences import IGNORE, Sequences
from evaluate import lines, main
from run.build import data_of_run, load_run
from state_tracking_data import StateTrackingDataModule
from train import train

pytestmark = pytest.mark.slow
RUNS = {
    "parity": ["optimizer=adam", "trainer.max_epochs=11"],
    "search": ["trainer.max_epochs=1", "callbacks.best.filename='e{epoch}'", "trainer.precision=64-true"],
    "tag": ["optimizer=adam", "trainer.max_epochs=15", "datamodule.format=tag", "model.positions=rotary"],
    "scan": ["task=scan", "datamodule.split=scan_s", "optimizer=adam", "trainer.max_epochs=70"],
    "strings": [
        "task=membership",
        "datamodule.language=tomita1",
        "datamodule.test_lengths=[16]",
        "datamodule.n_samples=200",
        "model.positions=sinusoidal",
        "optimizer=adam",
        "trainer.max_epochs=2",
    ],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One finished run of each kind; a test that changes one works on a copy."""
    home = tmp_path_factory.mktemp("runs")
    for name, overrides in RUNS.items():
        size = ["model=tiny", "optimizer.lr=0.02"] if "optimizer=adam" in overrides else ["model=tiny"]
        train(job_config(compose_config([*size, "logger=none", *overrides]), home / name))
    return home


@pytest.fixture
def parity(runs, tmp_path):
    """A copy of the run on parity."""
    return Path(shutil.copytree(runs / "parity", tmp_path / "parity"))


@pytest.fixture
def evaluated(capsys):
    """What the command prints."""

    def evaluated(*arguments):
        capsys.readouterr()
        main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return evaluated


@pytest.fixture
def refused(capsys):
    """The one line of a command that is refused."""

    def refused(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("evaluate: ")

    return refused


def summary(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


# --- numbers ---


@pytest.mark.parametrize("name", RUNS)
def test_the_metrics_are_those_of_the_summary(runs, evaluated, name):
    metrics = json.loads(evaluated(f"run={runs / name}", "--json"))
    assert metrics == pytest.approx(summary(runs / name)["test"], rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_decoded_is_right_as_often_as_exact_match_says(runs, name):
    task, data, _ = load_run(runs / name)
    for split in data.test_names:
        predictions = decode_rows(task.model, data, split, range(len(data.splits[split])))
        right = [prediction["output"] == prediction["truth"] for prediction in predictions]
        assert sum(right) / len(right) == pytest.approx(summary(runs / name)["test"][f"{split}/exact_match"])
        assert wrong_rows(task.model, data, split) == [row for row, ok in enumerate(right) if not ok]


def test_the_table_has_both_numbers_and_the_weights_are_named(runs, evaluated):
    text = evaluated(f"run={runs / 'parity'}")
    (row,) = [line for line in text.splitlines() if "test/exact_match" in line]
    assert row.count(f"{summary(runs / 'parity')['test']['test/exact_match']:.4f}") == 2
    assert "checkpoints/best.ckpt" in text
    assert "accuracy_at" not in text


def test_any_checkpoint_of_a_run_can_be_taken(parity, evaluated, monkeypatch):
    path = parity / "checkpoints/end.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["model.head.bias"][0] += 1
    torch.save(checkpoint, path)
    text = evaluated(f"run={path}")
    assert "end.ckpt" in text
    (row,) = [line for line in text.splitlines() if "test/loss" in line]
    assert row.count(f"{summary(parity)['test']['test/loss']:.4f}") == 1
    monkeypatch.chdir(path.parent)
    assert evaluated("run=end.ckpt", "--json") == evaluated(f"run={path}", "--json")


def test_a_run_that_was_not_tested_is_evaluated_with_its_newest_weights(parity, evaluated):
    whole = evaluated(f"run={parity}/checkpoints/end.ckpt", "--json")
    (parity / "summary.json").unlink()
    assert evaluated(f"run={parity}", "--json") == whole
    text = evaluated(f"run={parity}")
    assert "end.ckpt, the run was not tested" in text
    assert "summary.json" not in text


def test_a_run_that_has_moved_is_found_with_its_own_weights(runs, parity, evaluated):
    assert evaluated(f"run={parity}", "--json") == evaluated(f"run={runs / 'parity'}", "--json")


def test_a_test_that_was_limited_is_limited_again(parity, evaluated):
    cfg = OmegaConf.load(parity / "config.yaml")
    cfg.trainer.limit_test_batches = 0
    OmegaConf.save(cfg, parity / "config.yaml")
    assert json.loads(evaluated(f"run={parity}", "--json")) == {}
    assert json.loads(evaluated(f"run={parity}", "--json", "trainer.limit_test_batches=1.0"))


# --- other data ---


def test_longer_inputs_are_read_by_a_model_without_a_table_of_positions(runs, evaluated):
    command = [f"run={runs / 'strings'}", "--json"]
    metrics = json.loads(evaluated(*command, "datamodule.test_lengths=[16,24,40]"))
    splits = {name.rpartition("/")[0] for name in metrics}
    assert splits == {"test", "test/length_13_16", "test/length_17_24", "test/length_25_40"}
    stored = summary(runs / "strings")["test"]
    assert {name: metrics[name] for name in stored} == pytest.approx(stored, rel=1e-5)
    tag = json.loads(evaluated(f"run={runs / 'tag'}", "--json", "datamodule.test_lengths=[20]"))
    assert tag["test/exact_match"] == pytest.approx(summary(runs / "tag")["test"]["test/exact_match"])
    assert 0 <= tag["test/length_20/exact_match"] <= 1


def test_a_longer_input_than_the_positions_is_refused_before_the_model_is_built(runs, refused, monkeypatch):
    monkeypatch.setattr("run.build.build_task", None)
    assert refused(f"run={runs / 'parity'}", "datamodule.test_lengths=[12]") == (
        "datamodule.test_lengths=[12]: an input of 24 tokens is longer than the 16 positions that this model has; "
        "train with model.positions=rotary, sinusoidal or none for inputs of any length"
    )


def test_shorter_inputs_are_read_by_every_model(runs, evaluated):
    metrics = json.loads(evaluated(f"run={runs / 'parity'}", "--json", "datamodule.test_lengths=[4]"))
    assert "test/length_4/exact_match" in metrics


def test_test_sequences_that_were_trained_on_are_counted(runs, evaluated):
    text = evaluated(f"run={runs / 'parity'}", "datamodule.seed=1")
    assert "test: 19 of 28 sequences are among those that the run was trained on" in text
    assert "other data" in text
    assert json.loads(evaluated(f"run={runs / 'parity'}", "datamodule.seed=1", "--json"))["test/trained_on"] == 19
    assert "trained on" not in evaluated(f"run={runs / 'parity'}", "datamodule.test_lengths=[4]")


# --- predictions ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("parity", r"(right|wrong)  input  ([01] ){8}SEP\n {7}output ([01] ?){8}\n {7}truth  ([01] ?){8}\n"),
        ("tag", r"(right|wrong)  input  ([01] ?){8}\n {7}output ([01] ?){8}\n"),
        ("scan", r"(right|wrong)  input  [a-z ]+SEP\n {7}output (I_[A-Z_]+ *)+"),
        ("strings", r"(right|wrong)  input  ([01] )*SEP\n {7}output (yes|no)\s*\n {7}truth  (yes|no)\n"),
    ],
)
def test_predictions_are_shown_of_every_split_as_people_read_them(runs, evaluated, monkeypatch, name, expected):
    monkeypatch.setenv("COLUMNS", "300")
    text = evaluated(f"run={runs / name}", "--show", "3").partition("Weights")[2]
    blocks = text.split("\n\n")[1:]
    assert len(blocks) == (2 if name == "strings" else 1)
    for block in blocks:
        title, shown = block.split("\n", 1)
        assert title.endswith("sequences, the first 3")
        assert len(re.findall(expected, shown + "\n")) == 3
    assert "\x1b" not in text


def test_only_wrong_predictions_are_shown_if_asked_for(runs, evaluated):
    text = evaluated(f"run={runs / 'scan'}", "--wrong")
    n = round((1 - summary(runs / "scan")["test"]["test/exact_match"]) * 20)
    assert n > 0
    assert f"test: {n} wrong of 20" in text
    assert text.count("\nwrong  ") == min(n, 10)
    assert "\nright  " not in text
    assert evaluated(f"run={runs / 'scan'}", "--wrong", "--show", "1").count("\nwrong  ") == 1
    assert "test: 0 wrong of 1,000" in evaluated(f"run={runs / 'strings'}", "--wrong")


def test_columns_stand_below_each_other_and_long_lines_are_cut_between_tokens(runs):
    task, data, _ = load_run(runs / "scan")
    for prediction in decode_rows(task.model, data, "test", range(20)):
        for width in (40, 80, 1000):
            text = list(lines(prediction, width))
            assert max(map(len, text)) <= width
            labels = [line[7:14].strip() for line in text]
            of = {name: [line[14:] for line, at in zip(text, labels, strict=True) if at == name] for name in labels}
            assert {name: " ".join(parts).split() for name, parts in of.items()} == prediction
            if width == 1000 and prediction["output"] == prediction["truth"]:
                assert of["output"] == of["truth"]


# --- in Python ---


def test_two_lines_of_python_use_a_trained_model(runs):
    task, data, _ = load_run(runs / "scan")
    row = next(p for p in decode_rows(task.model, data, "train", range(74)) if p["output"] == p["truth"])
    assert predict(task, data, [" ".join(row["input"][:-1])]) == [" ".join(row["truth"])]
    assert not task.training


def test_inputs_of_ones_own_that_are_empty_or_too_long_are_refused(runs):
    task, data, _ = load_run(runs / "parity")
    assert len(predict(task, data, ["0 1 1"])[0].split()) == 3  # shorter than in training
    for empty in ("", " ", "SEP"):
        with pytest.raises(ValueError, match="the input is empty; give some of 0 1 SEP"):
            predict(task, data, [empty])
    with pytest.raises(ValueError, match=r"longer than model\.max_len=16"):
        predict(task, data, ["0 1 1 0 1 0 0 1 1"])


@pytest.mark.parametrize("name", ["parity", "strings"])
def test_lightning_can_test_validate_and_predict_with_a_loaded_run(runs, name):
    task, data, _ = load_run(runs / name)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = L.Trainer(accelerator="cpu", **quiet)
    tested = trainer.test(task, datamodule=data, verbose=False)
    joined = {key.partition("/dataloader")[0]: value for of_split in tested for key, value in of_split.items()}
    stored = summary(runs / name)["test"]
    assert {key: joined[key] for key in stored} == pytest.approx(stored, rel=1e-5)
    assert trainer.validate(task, datamodule=data, verbose=False)[0]["val/loss"] > 0
    assert trainer.test(task, dataloaders=data.test_dataloader(), verbose=False)
    batches = trainer.predict(task, datamodule=data)
    first, y = batches[0] if name == "parity" else batches[0][0], data.splits["test"].y
    right = (first == y) | (y == IGNORE)
    assert right.all(1).float().mean().item() == pytest.approx(stored["test/exact_match"])


def test_data_of_a_generator_of_a_library_are_made_again_and_it_is_left_alone(runs, monkeypatch):
    def drawn(data):
        x = torch.randint(2, (40, 16))
        return dict.fromkeys(("train", "val", "test"), Sequences(x, x))

    monkeypatch.setattr(StateTrackingDataModule, "make_splits", drawn)
    state = torch.get_rng_state()
    first, second = (load_run(runs / "tag")[1].splits["test"].x for _ in range(2))
    assert torch.equal(first, second)
    torch.set_rng_state(state)
    expected = torch.rand(3)
    torch.set_rng_state(state)
    data_of_run(OmegaConf.load(runs / "tag" / "config.yaml"))
    assert torch.equal(torch.rand(3), expected)


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["datamodule.test_lenghts=[4]"], r"did you mean datamodule.test_lengths\?"),
        (["datamodule.test_lengths"], "give options of the data only"),
        (["test_lengths=[4]"], "give options of the data only, such as datamodule.test_lengths"),
        (["model.d_model=4"], "give options of the data only"),
        (["seed=1"], "give options of the data only"),
        (["datamodule.test_lengths=[8]"], "length 8 is the training length"),
        (["datamodule.group=Z3"], "these data have 0, 1, 2, SEP, and the model has learned to read 0, 1, SEP$"),
        (["datamodule.format=tag"], "the model has learned to read 0, 1, SEP"),
        (["datamodule.group=Z0"], "group=Z0 is not known"),
        (["datamodule.test_lengths=5"], "datamodule.test_lengths=5 must be a valid array"),
        (["datamodule.n_samples=null"], "datamodule.n_samples=null must be a valid integer"),
        (["datamodule.test_lengths=[4"], r"datamodule.test_lengths=\[4: "),
        (["datamodule._target_=os.system"], "package os is not allowed"),
    ],
)
def test_other_data_that_cannot_be_is_refused(runs, refused, changes, message):
    assert re.search(message, refused(f"run={runs / 'parity'}", *changes))


def test_an_option_without_effect_is_refused(runs, refused):
    assert "datamodule.universe=8: it has no effect" in refused(f"run={runs / 'strings'}", "datamodule.universe=8")


def damage(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = bytes(500)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: (run / "checkpoints/best.ckpt").unlink(), "has no checkpoint (best.ckpt)"),
        (lambda run: shutil.rmtree(run / "checkpoints"), "has no checkpoint (best.ckpt)"),
        (lambda run: damage(run / "checkpoints/best.ckpt"), "best.ckpt is damaged: "),
        (lambda run: (run / "checkpoints/best.ckpt").write_bytes(b""), "best.ckpt is damaged: "),
        (lambda run: (run / "config.yaml").unlink(), "holds no run: it has no config.yaml"),
        (lambda run: (run / "config.yaml").write_text(""), "config.yaml is not the config of a run"),
        (lambda run: (run / "config.yaml").write_text("seed: [1"), "config.yaml is not the config of a run"),
        (lambda run: (run / "summary.json").write_text('{"test":'), "summary.json is empty or cut off"),
        (lambda run: shutil.rmtree(run), "holds no run"),
    ],
)
def test_a_run_that_cannot_be_read_is_refused_in_one_line(parity, refused, harm, message):
    harm(parity)
    assert message in refused(f"run={parity}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("datamodule._target_", "parity_data.Parity", "config.yaml does not build any more: "),
        ("datamodule.n_digits", 3, "key datamodule.n_digits is not known"),
        ("model.d_modell", 8, "did you mean model.d_model?"),
        ("model.positions", "alibi", "model.positions=alibi is not known"),
        ("model.d_model", 8, "best.ckpt does not fit the model of "),
        ("optimizer._target_", "credit.CreditSearch", "config.yaml does not build any more: "),
    ],
)
def test_a_config_that_does_not_build_any_more_is_refused_with_the_reason(parity, refused, key, value, message):
    cfg = OmegaConf.load(parity / "config.yaml")
    OmegaConf.update(cfg, key, value, force_add=True)
    OmegaConf.save(cfg, parity / "config.yaml")
    assert message in refused(f"run={parity}")


def test_paths_that_are_no_run_are_refused(runs, parity, refused, monkeypatch):
    assert "is the directory of 5 run(s); give one of them, such as" in refused(f"run={runs}")
    assert "config.yaml is not the config of a run" in refused(f"run={parity / 'config.yaml'}")
    monkeypatch.setenv("PATTERN_SEARCH_ROOT", str(parity.parent))
    assert refused("run=nope") == "nope holds no run: it has no config.yaml; python src/train.py makes one"
    shutil.copytree(parity, parity.parent / "runs/a")
    assert refused("run=nope").endswith(f"; the newest are {os.path.relpath(parity.parent / 'runs/a')}")
    lost = shutil.copy(parity / "checkpoints/best.ckpt", parity.parent / "lost.ckpt")
    assert "holds no run" in refused(f"run={lost}")


@pytest.mark.parametrize("words", [["run=a", "--show", "x"], ["run=a", "run=b"], ["--wrong"]])
def test_words_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(("words", "code"), [("--help", 0), ("run=nowhere", 2)])
def test_help_and_what_is_not_there_need_no_torch(words, code):
    program = "import sys, evaluate\ntry: evaluate.main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", program, words]
    done = subprocess.run(command, cwd=ROOT / "src", capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
