"""What happens before a command starts: refusals with exit code 2, light imports, data that are made once."""

import os
import shlex
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import open_dict, read_write

from commands import run, run_alone
from config.compose import CONFIGS, compose_config, job_config
from config.refusal import ConfigError
from conftest import ROOT
from run import build
from run.start import Start, jobs
from run.training import job
from state_tracking_data import StateTrackingDataModule

HEAVY = ("torch", "lightning", "pandas", "matplotlib")
MINE = "# @package _global_\ndefaults:\n  - override /model: tiny\nseed: 7\nmodel:\n  n_layers: 2\n"


def train(home, *arguments):
    """Run the training command with its runs below `home`; returns the finished process."""
    return run(shlex.join(["python", "src/train.py", *arguments]), home)


def imported(done):
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--cfg", "job"], 0),
        (["model=tny"], 2),
        (["model.d_modell=8"], 2),
        (["seed=1,2"], 2),
        (["foo"], 2),
        (["seed=abc"], 2),
        (["-m", "seed=abc,-1"], 2),
        (["resume=runs/nope"], 2),
        (["datamodule.seed=${sed}"], 2),
    ],
)
def test_help_and_refusals_of_text_and_of_files_import_nothing_heavy(arguments, code, tmp_path):
    done = run_alone(shlex.join(["python", "-X", "importtime", "src/train.py", *arguments]), tmp_path)
    assert done.returncode == code
    assert imported(done) & {*HEAVY} == set()


@pytest.mark.slow
def test_a_run_begins_with_its_header_and_libraries_say_nothing(tmp_path):
    command = "python src/train.py experiment=parity_tiny trainer.max_steps=1 logger=none"
    done = run_alone(command, tmp_path)  # a new interpreter: it imports the libraries after the program has begun
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("pattern_search trains tiny")
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train", "report", "evaluate", "show_data"])
def test_a_reader_of_the_help_may_leave(script):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, f"src/{script}.py", "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode in (0, 1)  # argparse looks over what it cannot print


def test_a_report_without_a_command_prints_what_there_is(tmp_path):
    done = run("python src/report.py", tmp_path)
    assert done.returncode == 2
    assert "report.py tables runs" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=tny"], "model=tny is not known; did you mean tiny? Known: large, medium, small, tiny"),
        (["-m", "optimizer=adam,sgd", "optimizer.lr=.1"], "; or add it with ++optimizer.lr=.1"),
        (["-m", "model.d_modell=8,16"], "key model.d_modell is not known; did you mean model.d_model?"),
        (["logger.group=g"], "To append to your config use ++logger.group=g"),
        (["optimizer=adam", "optimizer.max_seconds=60"], "did you mean trainer.max_time?"),
        (["hydra.callbacks.sweep._target_=sweep.Sweep"], "Error locating target 'sweep.Sweep'"),
        (["--config-name=trian"], "--config-name=trian is not known; did you mean train?"),
        (["--config-dir=nowhere"], "nowhere"),
        (["-m", "seed=interval(0,1)"], "seed=interval(0,1)"),
        (["-m", "seed=0,-1"], "seed=-1 must be greater than or equal to 0"),
        (["-m", "model.d_model=64,66"], "model.d_model=66 is not divisible by"),
    ],
)
def test_what_cannot_run_ends_with_code_2_and_leaves_nothing(arguments, message, tmp_path):
    done = train(tmp_path / "runs_go_here", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("This cannot run:\n  - ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 2
    assert not (tmp_path / "runs_go_here").exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["--config-dir={}", "hydra.searchpath=[file://{}]"])
def test_configs_of_ones_own_are_checked_like_ours(place, tmp_path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    file = tmp_path / "mine/experiment/mine.yaml"
    file.write_text(MINE)
    options = [place.format(tmp_path / "mine"), "experiment=mine", "logger=csv", "+logger.version=${hydra:job.name}"]
    done = train(tmp_path / "runs_go_here", *options, "trainer.max_steps=1", "trainer.limit_val_batches=1")
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs_go_here/runs").iterdir()
    assert "n_layers: 2" in (run_dir / "config.yaml").read_text()
    assert (run_dir / "csv/train").exists()
    file.write_text(MINE.replace("n_layers", "n_leyers"))
    done = train(tmp_path / "nothing", *options)
    assert done.returncode == 2
    assert "key model.n_leyers is not known; did you mean model.n_layers?" in done.stderr
    assert not (tmp_path / "nothing").exists()


def test_the_data_of_a_run_are_made_once(tmp_path, monkeypatch):
    made, make_splits = [], StateTrackingDataModule.make_splits
    monkeypatch.setattr(StateTrackingDataModule, "make_splits", lambda self: made.append(1) or make_splits(self))
    build.made.cache_clear()
    options = ["model=tiny", "logger=none", "trainer.max_steps=1", f"hydra.run.dir={tmp_path}/a", "seed=11"]
    config = compose_config(options)
    Start().on_run_start(config)
    assert not (tmp_path / "a").exists()
    job(job_config(config, config.hydra.run.dir))
    assert (tmp_path / "a/summary.json").exists()
    assert len(made) == 1


def test_a_job_that_a_sweeper_chose_is_refused_by_itself(tmp_path):
    config = compose_config(["model=tiny", "model.d_model=15"])
    with read_write(config), open_dict(config):
        config.hydra.mode = RunMode.MULTIRUN
        config.hydra.sweeper._target_ = "one.that.chooses.on.the.Way"
    cfg = job_config(config, tmp_path)
    with pytest.raises(ConfigError, match=r"model\.d_model=15 is not divisible by model\.n_heads=2"):
        job(cfg)
    assert list(tmp_path.iterdir()) == []
    HydraConfig.instance().cfg = None


@pytest.mark.slow
def test_the_sweep_that_an_experiment_names_has_all_variants_and_the_command_line_wins():
    with initialize_config_dir(str(CONFIGS), version_base="1.3", job_name="train"):
        sweep = compose("pattern_search_train", ["experiment=ablation_z5", "seed=7"], return_hydra_config=True)
        found = [compose("pattern_search_train", overrides) for overrides in jobs(sweep)]
        nodes = compose("pattern_search_train", ["experiment=ablation_nodes"], return_hydra_config=True)
        of_nodes = nodes.hydra.sweeper.params.variant.split(",")
        every = {path.stem for path in (CONFIGS / "variant").glob("*.yaml")}
        variants = sorted(sweep.hydra.sweeper.params.variant.split(","))
        assert {*variants, *of_nodes} == every
        assert sorted(overrides[0].partition("=")[2] for overrides in jobs(sweep)) == variants
    assert {(cfg.seed, cfg.datamodule.group, cfg.optimizer.max_evaluations) for cfg in found} == {(7, "Z5", 135_000)}
    searches = {str(dict(cfg.optimizer) | {"max_seconds": None}) for cfg in found}
    assert len(searches) == len(variants)  # no two are the same search
