"""The whole system as a user runs it: from the root and from src/, and with wrong commands."""

import json
import re
import signal
import time

import pandas as pd
import pytest
import torch

from commands import begin, begin_alone, run, run_dirs, short
from conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "options",
    [
        "--config-name=pattern_search_train trainer.max_epochs=2 trainer.limit_train_batches=3 "
        "trainer.limit_val_batches=2 logger.offline=True",
        "--config-name=train trainer.max_epochs=1 logger=csv",
    ],
)
def test_a_run_from_src_leaves_everything_a_run_must_leave(options, tmp_path):
    done = run(f"python train.py {options}", tmp_path, cwd=ROOT / "src", PICTURES="drawn")
    assert done.returncode == 0, done.stderr
    (run_dir,) = run_dirs(tmp_path)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(summary) >= {"test", "evaluations", "seconds", "checkpoint", "config", "stopped_by"}
    assert set(summary["test"]) >= {"test/loss", "test/token_accuracy", "test/exact_match"}
    checkpoint = torch.load(summary["checkpoint"], weights_only=True)
    assert checkpoint["global_step"] > 0
    table = pd.read_csv(run_dir / "metrics.csv")
    assert {"train/loss", "val/loss", "val/exact_match", "test/exact_match"} <= set(table.metric)
    assert summary["evaluations"] == table.evaluations.max()
    assert (run_dir / "progress.png").stat().st_size > 10_000
    assert str(run_dir) in done.stdout
    assert f"Plot: {run_dir}/progress.png" in done.stdout
    log = (run_dir / "train.log").read_text()
    assert "loss" in log
    assert "evaluations" in log


def test_a_finished_run_can_be_loaded_and_gives_the_metrics_it_reported(tmp_path):
    from run.build import load_run

    run("python src/train.py model=tiny trainer.max_epochs=2 logger=none", tmp_path)
    (run_dir,) = run_dirs(tmp_path)
    task, data, _ = load_run(run_dir)
    scores = task.scores_class()
    with torch.no_grad():
        scores.update(task.model.eval()(data.splits["test"].x), data.splits["test"].y)
    reported = json.loads((run_dir / "summary.json").read_text())["test"]
    assert scores.compute()["loss"].item() == pytest.approx(reported["test/loss"], rel=1e-5)


def test_wandb_is_offline_without_an_account_and_a_sweep_has_one_run_a_job(tmp_path):
    done = run(short("python src/train.py -m optimizer=pattern_search,adam model=tiny"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wandb sync" in done.stdout
    assert len(run_dirs(tmp_path)) == 2
    assert len(list(tmp_path.rglob("offline-run-*"))) == 2
    for run_dir in run_dirs(tmp_path):
        assert len(list(run_dir.glob("wandb/offline-run-*/*.wandb"))) == 1


def test_the_same_seed_gives_the_same_run(tmp_path):
    tables = []
    for home in (tmp_path / "a", tmp_path / "b"):
        run("python src/train.py model=tiny trainer.max_epochs=2 logger=none", home)
        table = pd.read_csv(run_dirs(home)[0] / "metrics.csv")
        timed = table.metric.str.endswith("per_second")
        tables.append(table[~timed].drop(columns="seconds").reset_index(drop=True))
    pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("model.d_modell=8", "did you mean model.d_model?"),
        ("model=gigantic", "Known: large, medium, small, tiny"),
        ("model.d_model=66", "try model.d_model=64 or model.n_heads=3"),
        ("datamodule.group=S_3", "datamodule.group=S_3 is not known"),
        ("trainer.max_epochs=many", "trainer.max_epochs=many must be a valid integer"),
        ("--config-name=trian", "did you mean train?"),
        ("-m seed=0,-1", "seed=-1 must be greater than or equal to 0"),
        ("logger.offline=False", "wandb login"),
    ],
)
def test_a_wrong_command_says_so_and_leaves_nothing(options, message, tmp_path):
    no_account = {"HOME": str(tmp_path / "nobody"), "NETRC": str(tmp_path / "nobody" / ".netrc")}
    done = run(f"python src/train.py {options}", tmp_path / "runs_go_here", **no_account)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs_go_here").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_newest_weights_and_the_printed_command_goes_on_with_them(tmp_path, number, code):
    command = "python src/train.py logger=none callbacks.progress.log_every_seconds=1 model=tiny"
    process = (begin_alone if number == signal.SIGINT else begin)(command, tmp_path)
    for line in process.stdout:
        if line.startswith("step ") and not line.startswith("step 0"):
            break
    process.send_signal(number)
    out, err = process.communicate()
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert "Finishing the step" in err
    (run_dir,) = run_dirs(tmp_path)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["stopped_by"] == "interrupted"
    assert str(run_dir) in out
    assert torch.load(summary["checkpoint"], weights_only=True)["global_step"] == summary["steps"]

    printed = next(line for line in out.splitlines() if line.startswith("Go on with: "))
    done = run(f"{printed.removeprefix('Go on with: ')} trainer.max_steps={summary['steps'] + 2}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"Goes on from step {summary['steps']:,}" in done.stdout
    assert done.stderr == ""
    assert run_dirs(tmp_path) == [run_dir]
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == summary["steps"] + 2


def test_ctrl_c_before_anything_has_begun_leaves_no_traceback(tmp_path):
    process = begin_alone("python src/train.py logger=none", tmp_path / "runs_go_here")
    time.sleep(0.5)  # in the imports
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")
    assert not (tmp_path / "runs_go_here").exists()


def test_progress_moves_during_a_long_poll(tmp_path):
    """One step here is a pass over 200,000 directions; lines must come long before it ends."""
    command = "optimizer=pattern_search_classic callbacks.progress.log_every_seconds=.1 trainer.max_steps=1"
    command += " optimizer.max_evaluations=500 logger=none"
    started = time.time()
    done = run(f"python src/train.py {command}", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    counts = [int(re.search(r"evaluations ([\d,]+)", line)[1].replace(",", "")) for line in lines]
    assert len(counts) >= 2, (lines, time.time() - started)
    assert counts == sorted(counts)
    assert 0 < counts[0] < counts[-1] == 500


def test_the_benchmark_ends_with_its_rates_as_json(tmp_path):
    figure = tmp_path / "benchmark.png"
    done = run(f"python src/benchmark.py --seconds 2 --batches 4 --output {figure}", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    ways = {"backward_closure", "plain", "batched_inference", "generic", "structured", "structured_cores"}
    ways |= {"perturbed", "perturbed_generic"}
    assert result["threads"] == 1
    assert set(result["batch"]["4"]) == ways
    assert all(rate > 0 for rate in result["batch"]["4"].values())
    assert figure.stat().st_size > 10_000


@pytest.mark.slow
def test_the_benchmark_measures_models_against_their_weights(tmp_path):
    figure = tmp_path / "sizes.png"
    command = f"python src/benchmark.py --models tiny small --seconds 3 --batches 4 --output {figure}"
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    models = json.loads(done.stdout.splitlines()[-1])["models"]
    assert models["tiny"]["weights"] < models["small"]["weights"]
    assert models["tiny"]["batch"]["4"]["structured"] > 0
    assert figure.stat().st_size > 10_000
    done = run("python src/benchmark.py --models tny", tmp_path)
    assert done.returncode == 2
    assert "did you mean tiny?" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an NVIDIA GPU")
def test_the_benchmark_of_a_gpu_that_is_not_there_is_refused(tmp_path):
    done = run("python src/benchmark.py --device cuda", tmp_path)
    assert done.returncode == 2
    assert "--device cuda: this machine has no CUDA GPU" in done.stderr


def test_figures_of_a_place_without_runs_say_so(tmp_path):
    done = run(f"python src/report.py figures {tmp_path}", tmp_path)
    assert done.returncode == 2
    assert "no run" in done.stderr
    assert "Traceback" not in done.stderr
