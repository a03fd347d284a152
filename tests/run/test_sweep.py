"""A sweep outlives its failing jobs, says what came of each, and ends as a whole on Ctrl-C."""

import json
import re
import shlex
import signal

import pandas as pd
import pytest
from omegaconf import OmegaConf

from commands import begin_alone, run, run_alone
from polls import threads
from run.sweep import read_jobs

FAILING = """
import lightning as L

class Failing(L.Callback):
    def __init__(self, fails: bool):
        self.fails = fails

    def on_train_batch_end(self, *_):
        if self.fails:
            raise RuntimeError("as it was told")
"""


def sweep(start, home, *options):
    """`start` a sweep of small jobs with its runs below `home`."""
    (home / "failing.py").write_text(FAILING)
    return start(shlex.join(["python", "src/train.py", "-m", "model=tiny", *options]), home, PYTHONPATH=str(home))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_the_other_jobs_run_when_some_fail(launcher, tmp_path):
    deep = launcher == "basic"  # directories two levels deep
    options = ["logger=none", *["hydra.sweep.subdir=a/${hydra.job.num}"] * deep]
    options += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    options += ["allowed_packages=[failing]", "+callbacks.mine._target_=failing.Failing"]
    options += ["+callbacks.mine.fails=true,false", "trainer.max_steps=2", "seed=0,1"]
    done = sweep(run_alone if launcher == "joblib" else run, tmp_path, *options)
    out = done.stdout + done.stderr
    assert done.returncode == 1, out
    (directory,) = (tmp_path / "runs").iterdir()
    jobs = pd.read_csv(directory / "sweep.csv")
    assert jobs["status"].tolist() == ["failed", "failed", "done", "done"]
    assert jobs["seconds"].notna().tolist() == jobs["test/exact_match"].notna().tolist() == [False, False, True, True]
    assert jobs["error"].tolist()[:2] == ["RuntimeError: as it was told"] * 2
    for job in ("a/0", "a/1") if deep else ("0", "1"):
        assert "Traceback" in (directory / job / "error.txt").read_text()
        assert not (directory / job / "summary.json").exists()
    assert "2 of 4 jobs failed; the reasons are in" in out
    assert f"hydra.sweep.dir={directory}" in out
    assert f"report.py tables {directory}" in out
    assert "Traceback" not in out
    if launcher == "joblib":
        assert out.count(f"candidates on {max(1, threads.available_cores() // 2)} thread(s)") == 4


@pytest.mark.slow
def test_ctrl_c_ends_the_whole_sweep_with_its_table_and_the_printed_command_goes_on(tmp_path):
    process = sweep(
        begin_alone, tmp_path, "logger=none", "trainer.max_steps=2,3000", "callbacks.progress.log_every_seconds=1"
    )
    for line in process.stdout:
        if re.match(r"step \d+/1200 ", line):  # in the second job
            break
    process.send_signal(signal.SIGINT)
    out = "".join(process.communicate(timeout=60))
    assert process.returncode == 130, out
    assert "Traceback" not in out
    (directory,) = (tmp_path / "runs").iterdir()
    assert pd.read_csv(directory / "sweep.csv")["status"].tolist() == ["done", "interrupted"]
    assert "stopped sweep: the jobs begun" in out
    assert out.count("Go on with: ") == 1
    start_of_command = "Go on with: python src/train.py -m model=tiny "
    printed = next(line for line in out.splitlines() if line.startswith(start_of_command))

    shorter = printed.removeprefix(start_of_command).replace("=2,3000", "=2,3")
    done = sweep(run, tmp_path, *shlex.split(shorter))
    assert done.returncode == 0, done.stderr
    assert pd.read_csv(directory / "sweep.csv")["status"].tolist() == ["done", "done"]
    assert "sweep of 2 jobs" in done.stdout


def test_jobs_are_found_wherever_they_lie(tmp_path):
    for job, stopped_by in (("1", "interrupted"), ("a/b/2", "solved"), ("10", "solved")):
        run = tmp_path / job
        (run / ".hydra").mkdir(parents=True)
        config = {"choices": {"task": "t", "model": "m", "optimizer": "o"}, "datamodule": {}, "seed": 0}
        OmegaConf.save(config, run / "config.yaml")
        OmegaConf.save([f"seed={job}"], run / ".hydra/overrides.yaml")
        summary = {"test": {"test/loss": 0.5}, "seconds": 3.0, "steps": 1, "evaluations": 1, "stopped_by": stopped_by}
        (run / "summary.json").write_text(json.dumps(summary))
    jobs = read_jobs(tmp_path, "test/loss")
    assert [job["job"] for job in jobs] == ["1", "10", "a/b/2"]
    assert [job["status"] for job in jobs] == ["interrupted", "done", "done"]
    assert [job["override"] for job in jobs] == ["seed=1", "seed=10", "seed=a/b/2"]
    assert [job["test/loss"] for job in jobs] == [None, 0.5, 0.5]
    (tmp_path / "10" / "summary.json").write_text('{"test"')
    assert read_jobs(tmp_path, "test/loss")[1]["status"] == "interrupted"


@pytest.mark.parametrize(("processes", "cores"), [(1, 6), (2, 3), (4, 1), (-1, 1)])
def test_processes_share_the_cores(processes, cores, monkeypatch):
    monkeypatch.setenv(threads.PROCESSES, "1")
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    threads.share_cores(processes)
    assert threads.available_cores() == cores


@pytest.mark.slow
def test_a_sweep_stops_at_the_first_failure_if_asked(tmp_path):
    options = ["allowed_packages=[failing]", "+callbacks.mine._target_=failing.Failing", "trainer.max_steps=2"]
    options += ["logger=none"]
    options += ["+callbacks.mine.fails=false,true,false", "hydra.callbacks.sweep.stop_at_failure=true"]
    done = sweep(run, tmp_path, *options)
    assert done.returncode == 1, done.stdout
    (directory,) = (tmp_path / "runs").iterdir()
    assert pd.read_csv(directory / "sweep.csv")["status"].tolist() == ["done", "failed"]
    assert "Go on with: " in done.stdout
