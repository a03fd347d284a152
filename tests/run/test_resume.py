"""A run that is stopped goes on as if it had not been; what cannot go on is refused before anything starts."""

import functools
import json
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from commands import run
from config.compose import CONFIGS, job_config
from config.compose import compose_config as compose_command
from pattern_search_task import PatternSearchTask
from results.runs import OUTCOME, RESUMABLE
from run.checkpoints import Checkpoints, read_checkpoint
from run.directory import RunDirectoryError, locked, record_start, replacing, starts
from run.start import Start
from soak_kill import differences, results
from train import train

pytestmark = pytest.mark.slow
SHORT = ["model=tiny", "logger=none", "optimizer.polls_per_step=16", "trainer.max_epochs=2", "checkpoint.every_steps=1"]
# 24 steps; with one step length each takes 18 evaluations: the incumbent, 16 polls and a trial
LONGER = ["trainer.check_val_every_n_epoch=2", "trainer.max_epochs=4", "optimizer.step_lengths=[0.01]"]


@pytest.fixture
def short_run(compose_config, tmp_path):
    """Makes the config of a short run in a directory of the given name; 12 steps, a checkpoint before each."""

    def make(name, *overrides):
        cfg = compose_config(*SHORT, *overrides)
        cfg.output_dir = str(tmp_path / name)
        return cfg

    return make


def train_stopped(cfg, monkeypatch, steps, stop):
    """Train, with `stop` called at the end of a step; returns the exit code."""
    ended = PatternSearchTask.on_train_batch_end

    def on_train_batch_end(task, *args):
        ended(task, *args)
        if task.global_step == steps:
            stop()

    with monkeypatch.context() as patch:
        patch.setattr(PatternSearchTask, "on_train_batch_end", on_train_batch_end)
        with pytest.raises(SystemExit) as end:
            train(cfg)
    return end.value.code


def train_interrupted(cfg, monkeypatch, steps, *signals):
    """Train, with signals sent to this process at the end of a step; returns the exit code."""
    return train_stopped(cfg, monkeypatch, steps, lambda: [signal.raise_signal(number) for number in signals])


def forbid_training(monkeypatch):
    monkeypatch.setattr(PatternSearchTask, "training_step", lambda *_: pytest.fail("it trained"))


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The results of a short run that was left alone."""
    cfg = job_config(compose_command(SHORT), tmp_path_factory.mktemp("twin"))
    train(cfg)
    return results(Path(cfg.output_dir))


@pytest.fixture(scope="module")
def longer_twin(tmp_path_factory):
    """The results of a run of 24 steps that was left alone, under limits that it did not reach."""
    cfg = job_config(compose_command([*SHORT, *LONGER]), tmp_path_factory.mktemp("longer"))
    train(cfg)
    return results(Path(cfg.output_dir))


@pytest.fixture(scope="module")
def stopped_at_5(tmp_path_factory):
    """The directory of the same run, stopped after step 5."""
    cfg = job_config(compose_command(SHORT), tmp_path_factory.mktemp("stopped"))
    with pytest.MonkeyPatch.context() as patch:
        train_interrupted(cfg, patch, 5, signal.SIGINT)
    return Path(cfg.output_dir)


@pytest.fixture
def stopped(short_run, stopped_at_5):
    """The config that goes on with a copy of the run that was stopped after step 5."""
    cfg = short_run("stopped", "resume=auto")
    shutil.copytree(stopped_at_5, cfg.output_dir)
    return cfg


def assert_same(cfg, expected):
    assert list(differences(expected, results(Path(cfg.output_dir)))) == []


def test_killed_runs_end_as_their_twins_that_were_left_alone(tmp_path):
    done = run("python tests/soak_kill.py --kills 12 --seconds 12", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 differences" in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_step_finish_and_the_run_goes_on(short_run, twin, monkeypatch, capsys, number, code):
    cfg = short_run("stopped", "checkpoint.every_steps=null")
    assert train_interrupted(cfg, monkeypatch, 5, number) == code
    assert f"resume={cfg.output_dir}" in capsys.readouterr().out
    assert read_checkpoint(f"{cfg.output_dir}/checkpoints/last.ckpt")["global_step"] == 5
    assert json.loads(Path(cfg.output_dir, "summary.json").read_text())["stopped_by"] == "interrupted"
    cfg.resume, cfg.checkpoint.every_steps = cfg.output_dir, 1
    train(cfg)
    assert "Goes on from step 5" in capsys.readouterr().out
    assert_same(cfg, twin)


def test_a_second_signal_stops_at_once_and_leaves_the_checkpoint_before(short_run, monkeypatch, capsys):
    cfg = short_run("stopped")
    assert train_interrupted(cfg, monkeypatch, 5, signal.SIGINT, signal.SIGINT) == 130
    assert "resume=" in capsys.readouterr().out
    assert read_checkpoint(f"{cfg.output_dir}/checkpoints/last.ckpt")["global_step"] == 4


def test_ctrl_c_during_the_test_says_how_to_go_on(short_run, monkeypatch, capsys):
    cfg = short_run("stopped")
    # Python's own handler: a test before this one may have left another
    monkeypatch.setattr(PatternSearchTask, "test_step", lambda *_: signal.default_int_handler(signal.SIGINT, None))
    with pytest.raises(SystemExit) as end:
        train(cfg)
    assert end.value.code == 130
    assert "resume=" in capsys.readouterr().out


def test_a_checkpoint_cut_anywhere_falls_back_to_the_one_before_and_nothing_is_lost(stopped, twin, tmp_path, capsys):
    cfg = stopped
    whole = Path(cfg.output_dir)
    assert read_checkpoint(whole / "checkpoints/previous.ckpt")["global_step"] == 4
    for tenths in (0, 3, 6, 9):
        cfg.output_dir = str(tmp_path / f"cut{tenths}")
        shutil.copytree(whole, cfg.output_dir)
        with Path(cfg.output_dir, "checkpoints/last.ckpt").open("r+b") as file:
            file.truncate(file.seek(0, 2) * tenths // 10)
        train(cfg)
        out = capsys.readouterr().out
        assert "last.ckpt is damaged" in out
        assert "Goes on from step 4" in out
        assert read_checkpoint(f"{cfg.output_dir}/checkpoints/previous.ckpt")["global_step"] == 10
        assert_same(cfg, twin)


def test_a_checkpoint_with_one_wrong_byte_is_noticed(stopped):
    path = Path(stopped.output_dir, "checkpoints/last.ckpt")
    content = bytearray(path.read_bytes())
    weights = read_checkpoint(path)["state_dict"]["model.head.weight"].numpy().tobytes()
    content[content.index(weights)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(path)


def test_two_damaged_checkpoints_end_with_a_message_and_are_left_alone(stopped):
    cfg = stopped
    for name in RESUMABLE:
        Path(cfg.output_dir, "checkpoints", name).write_bytes(b"nothing")
    with pytest.raises(RunDirectoryError, match=r"last.ckpt is damaged.*previous.ckpt is damaged.*begin a new run"):
        train(cfg)
    assert Path(cfg.output_dir, "metrics.csv").exists()


def test_half_a_row_and_rows_after_the_checkpoint_are_cut_off(stopped, twin):
    cfg = stopped
    with Path(cfg.output_dir, "metrics.csv").open("a") as table:
        table.write("6,99,0.1,train/loss,0.5\n6,99,0.1,trai")
    train(cfg)
    assert_same(cfg, twin)


def test_a_full_disk_stops_the_run_with_a_message_and_the_checkpoint_before_is_whole(
    short_run, twin, monkeypatch, capsys
):
    cfg = short_run("full")
    unlimited, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    bytes_a_file = 50_000  # a checkpoint has 100,000
    try:
        stop = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (bytes_a_file, hard))
        assert train_stopped(cfg, monkeypatch, 5, stop) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, hard))
    said = capsys.readouterr()
    assert "File too large" in said.err
    assert ".ckpt" in said.err
    assert "resume=" in said.out
    assert not list(Path(cfg.output_dir).rglob("*.unfinished"))
    cfg.resume = "auto"
    train(cfg)
    assert "Goes on from step 4" in capsys.readouterr().out
    assert_same(cfg, twin)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(TypeError), replacing(tmp_path / "a") as file:
        file.writelines([b"ne", None])
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_a_run_that_was_moved_goes_on_with_its_best_weights(stopped, twin, tmp_path):
    cfg = stopped
    shutil.move(cfg.output_dir, tmp_path / "elsewhere")
    cfg.output_dir = str(tmp_path / "elsewhere")
    train(cfg)
    assert_same(cfg, twin)


def test_a_finished_run_is_not_trained_again(short_run, monkeypatch, capsys):
    cfg = short_run("finished")
    summary = train(cfg)
    cfg.resume = "auto"
    forbid_training(monkeypatch)
    assert train(cfg) == summary
    assert "is finished already" in capsys.readouterr().out


def test_a_run_killed_in_its_test_does_the_newest_steps_again_and_is_tested(short_run, twin, capsys):
    cfg = short_run("finished")
    train(cfg)
    Path(cfg.output_dir, "summary.json").unlink()
    cfg.resume = "auto"
    train(cfg)
    assert "Goes on from step 11" in capsys.readouterr().out
    assert_same(cfg, twin)


@pytest.mark.parametrize("limit", ["trainer.max_time=00:01:00:00", "optimizer.max_seconds=3600"])
def test_time_used_before_counts(short_run, monkeypatch, limit):
    cfg = short_run("stopped", limit)
    train_interrupted(cfg, monkeypatch, 5, signal.SIGINT)
    path = Path(cfg.output_dir, "checkpoints/last.ckpt")
    checkpoint = read_checkpoint(path)
    used = checkpoint["callbacks"]["Timer"]["time_elapsed"] if "time" in limit else {}
    assert used.get("train", 1) > 0
    used["train"] = checkpoint["optimizer_states"][0]["state"]["search"]["seconds"] = 3600
    torch.save(checkpoint, path)
    cfg.resume = "auto"
    summary = train(cfg)
    assert summary["steps"] <= 6
    assert summary["stopped_by"] == limit.split("=")[0].split(".")[1]


@pytest.mark.parametrize(
    ("limit", "longer"),
    [
        (
            "callbacks.early_stopping.stopping_threshold=0.69",  # after the second epoch
            "callbacks.early_stopping.stopping_threshold=0.1",
        ),
        ("trainer.max_epochs=1", "trainer.max_epochs=4"),
        ("trainer.max_steps=4", "trainer.max_steps=-1"),
        ("trainer.max_steps=8", "trainer.max_steps=-1"),
        ("optimizer.max_evaluations=126", "optimizer.max_evaluations=null"),  # 7 steps of 18
    ],
)
def test_a_finished_run_with_a_larger_limit_goes_on_as_if_it_had_had_it(short_run, longer_twin, limit, longer):
    cfg = short_run("prolonged", *LONGER, limit)
    first = train(cfg)
    key, value = longer.split("=")
    OmegaConf.update(cfg, key, OmegaConf.create(f"x: {value}").x)
    cfg.resume = "auto"
    train(cfg)
    assert first["steps"] < 24
    expected, found = longer_twin, results(Path(cfg.output_dir))
    for part in ("state_dict", "current_model_state", "optimizer_states", "global_step"):
        assert list(differences(expected["last.ckpt"][part], found["last.ckpt"][part])) == []
    for key in ("evaluations", "steps", "stopped_by"):
        assert expected["summary.json"][key] == found["summary.json"][key]


# --- what is refused, before anything starts ---


@pytest.fixture
def check(monkeypatch, tmp_path, capsys):
    """Checks a command with its runs below the test's directory; returns the run's directory, or what was said."""
    monkeypatch.setenv("PATTERN_SEARCH_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def check(*arguments, flags=()):
        capsys.readouterr()
        mode = RunMode.MULTIRUN if "-m" in flags else RunMode.RUN
        try:
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                loader = GlobalHydra.instance().config_loader()
                config = loader.load_configuration("pattern_search_train", [*SHORT, *arguments], mode)
                config.hydra.mode = mode
                if mode == RunMode.RUN:
                    Start().on_run_start(config)
                    return Path(config.hydra.run.dir)
                Start().on_multirun_start(config)
                return Path(config.hydra.sweep.dir)
        except SystemExit as end:
            return f"{capsys.readouterr().err} exit code {end.code}"

    return check


def save_config(run_dir, cfg):
    run_dir.mkdir(parents=True)
    cfg.output_dir = str(run_dir)
    OmegaConf.save(cfg, run_dir / "config.yaml", resolve=True)


def test_a_config_that_leads_elsewhere_is_refused_with_both_values(check, compose_config, tmp_path):
    save_config(tmp_path / "a", compose_config(*SHORT))
    said = check("resume=a", "model.d_ff=8", "seed=1", "trainer.max_epochs=9")
    assert "model.d_ff is 8 here and was null in a" in said
    assert "seed is 1 here and was 0 in a" in said
    assert "max_epochs" not in said


def test_a_schedule_that_ends_elsewhere_is_another_run(check, compose_config, tmp_path):
    decay = ["optimizer.linear_decay=true", "optimizer.max_evaluations=500"]
    save_config(tmp_path / "a", compose_config(*SHORT, *decay))
    assert check("resume=a", *decay, "trainer.max_epochs=9") == tmp_path / "a"
    said = check("resume=a", decay[0], "optimizer.max_evaluations=600")
    assert "optimizer.max_evaluations is 600 here and was 500 in a" in said


@pytest.mark.parametrize("resumed", ["a", "auto"])
def test_harmless_changes_are_allowed_and_the_run_goes_on_in_its_directory(check, compose_config, tmp_path, resumed):
    save_config(tmp_path / "runs/a", compose_config(*SHORT))
    resumed = resumed if resumed == "auto" else f"runs/{resumed}"
    changes = [
        "logger=wandb",
        "callbacks.progress.refresh_per_second=1",
        "wandb.project=x",
        "trainer.max_time=00:01:00:00",
    ]
    assert check(f"resume={resumed}", *changes) == tmp_path / "runs/a"


def test_auto_takes_the_newest_unfinished_run_of_the_same_config(check, compose_config, tmp_path):
    for name, seed in (("old", 0), ("new", 0), ("other", 1), ("finished", 0)):
        save_config(tmp_path / "runs" / name, compose_config(*SHORT, f"seed={seed}"))
    summary = dict.fromkeys(OUTCOME, 0) | {"stopped_by": "solved"}
    (tmp_path / "runs/finished/summary.json").write_text(json.dumps(summary))
    assert check("resume=auto") == tmp_path / "runs/new"
    assert str(tmp_path / "runs/20") in str(check("resume=auto", "seed=5"))  # a new one


def test_a_directory_that_holds_a_run_is_not_written_over(check, compose_config, tmp_path):
    save_config(tmp_path / "a", compose_config(*SHORT))
    assert "holds a run already; resume=auto" in check("hydra.run.dir=a")
    save_config(tmp_path / "sweep/1", compose_config(*SHORT, "seed=1"))
    assert "holds a run already; resume=auto" in check("hydra.sweep.dir=sweep", "seed=0,1", flags=["-m"])
    assert isinstance(check("hydra.sweep.dir=sweep", "seed=0,1", "resume=auto", flags=["-m"]), Path)
    assert "seed is 3 here and was 1" in check("hydra.sweep.dir=sweep", "seed=0,3", "resume=auto", flags=["-m"])
    assert "a sweep resumes with" in check("resume=a", "seed=0,1", flags=["-m"])
    assert "a sweep resumes with" in check("resume=auto", "seed=0,1", flags=["-m"])  # which one?


@pytest.mark.parametrize("shared", ["hydra.sweep.subdir=x", "output_dir=x"])
def test_jobs_that_would_share_a_directory_are_refused(check, shared):
    said = check(shared, "seed=0,1", flags=["-m"])
    assert "2 jobs would write to" in said
    assert "exit code 2" in said
    assert isinstance(check("hydra.sweep.subdir=s${seed}", "seed=0,1", flags=["-m"]), Path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("resume=nowhere", "no run is there"),
        ("resume=a/checkpoints/best.ckpt", "best.ckpt is a file"),
        ("hydra.run.dir=a/config.yaml/b", "config.yaml is a file"),
        ("resume=5", "resume=5 must be a valid string"),
        ("checkpoint.every_steps=0", "checkpoint.every_steps=0 must be greater than or equal to 1"),
    ],
)
def test_a_wrong_place_is_refused(check, compose_config, tmp_path, arguments, message):
    save_config(tmp_path / "a", compose_config(*SHORT))
    (tmp_path / "a/checkpoints").mkdir()
    (tmp_path / "a/checkpoints/best.ckpt").touch()
    said = check(arguments)
    assert message in said
    assert "exit code 2" in said


def test_a_directory_without_permission_is_refused(check, monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "no permission for" in check("hydra.run.dir=b")
    assert not (tmp_path / "b").exists()


def test_a_run_directory_has_one_owner_and_a_dead_one_is_none(short_run, tmp_path):
    cfg = short_run("a")
    train(cfg)
    with locked(tmp_path / "a"):  # its lock file is still there
        pass
    pid = json.loads((tmp_path / "a/environment.json").read_text())[-1]["pid"]
    in_use = pytest.raises(RunDirectoryError, match=f"in use by process {pid}")
    with FileLock(tmp_path / "a/.lock"), in_use, locked(tmp_path / "a"):
        pass


def test_every_start_is_recorded(stopped):
    cfg = stopped
    train(cfg)
    first, second = json.loads(Path(cfg.output_dir, "environment.json").read_text())
    assert set(first) == set(second) >= {"python", "torch", "lightning", "hydra-core", "numpy", "git_commit", "command"}


def test_a_machine_without_git_is_recorded_too(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    record_start(tmp_path)
    (start,) = starts(tmp_path)
    assert start["git_commit"] is start["git_dirty"] is None


def test_no_step_is_lost_to_a_checkpoint_by_the_clock(short_run, monkeypatch):
    """With no seconds between two checkpoints there is one before every step."""
    saved = []
    save = Checkpoints._save
    monkeypatch.setattr(Checkpoints, "_save", lambda self, *args, **kw: (saved.append(1), save(self, *args, **kw)))
    train(short_run("a", "checkpoint.every_steps=null", "checkpoint.every_seconds=0", "trainer.max_epochs=1"))
    assert len(saved) == 6


def test_only_a_run_that_never_validated_says_so(short_run, capsys):
    cfg = short_run("validated")
    train(cfg)
    cfg.resume, cfg.trainer.max_epochs, cfg.trainer.max_steps = "auto", -1, 13  # one more step, and no validation
    assert train(cfg)["steps"] == 13
    assert "Nothing was validated" not in capsys.readouterr().out
    cfg = short_run("short")
    cfg.trainer.max_steps = 1
    train(cfg)
    assert "Nothing was validated" in capsys.readouterr().out
