"""Kills runs again and again, and compares what they come to with runs that were left alone, bit for bit.

python tests/soak_kill.py --kills 200              ends with exit code 1 if a run differs
python tests/soak_kill.py --kills 200 --seed 1     other delays

Every run is a fork of this process, which has imported all it needs: a start costs no imports. Half of the kills come
after a random delay, half at a random call of one of SEAMS, just before or just after it.
"""

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from config.compose import compose_config, job_config
from pattern_search_task import PatternSearchTask
from run import training
from run.cpu import prepare_machine
from run.metrics_table import MetricsTable
from train import train

SHORT = "model=tiny logger=none callbacks.progress.log_every_seconds=0.1 checkpoint.every_seconds=null "
CASES = {
    "pattern_search": "trainer.max_epochs=3 optimizer.polls_per_step=64 checkpoint.every_steps=1",
    "pattern_search, validation within epochs": "task=membership datamodule.n_samples=400 datamodule.batch_size=32 "
    "trainer.max_epochs=-1 trainer.max_steps=20 optimizer.polls_per_step=32 trainer.check_val_every_n_epoch=null "
    "trainer.val_check_interval=5 checkpoint.every_steps=3",
    "nodes": "optimizer=pattern_search_nodes optimizer.nodes_per_step=50 trainer.max_epochs=3 checkpoint.every_steps=2",
    "nodes, lengths that fall": "optimizer=pattern_search_nodes_decay optimizer.nodes_per_step=50 "
    "optimizer.max_evaluations=900 trainer.max_epochs=-1 checkpoint.every_steps=1",
    "classic, a pass of many steps": "task=scan datamodule.split=scan_s optimizer=pattern_search_classic "
    "optimizer.polls_per_step=40 trainer.max_epochs=12 trainer.check_val_every_n_epoch=2 checkpoint.every_steps=2",
    "classic, stopped by its budget": "optimizer=pattern_search_classic optimizer.polls_per_step=100 "
    "optimizer.max_evaluations=1500 checkpoint.every_steps=2",
    "adam with dropout": "optimizer=adam model.dropout=0.2 trainer.max_epochs=8 checkpoint.every_steps=1",
    "adam, solved": "optimizer=adam trainer.max_epochs=20 callbacks.early_stopping.stopping_threshold=0.68 "
    "checkpoint.every_steps=4",
    "adam, accumulating": "optimizer=adam +trainer.accumulate_grad_batches=2 trainer.max_epochs=8 "
    "trainer.val_check_interval=0.5 model.dropout=0.1 checkpoint.every_steps=1",
    "sgd on scan": "task=scan datamodule.split=scan_s optimizer=sgd trainer.max_epochs=20 checkpoint.every_steps=5",
    "sgd, few batches": "task=membership optimizer=sgd trainer.max_epochs=6 trainer.limit_train_batches=7 "
    "model.dropout=0.1 checkpoint.every_steps=3",
}
SEAMS = [  # where a kill could do harm: in writing a checkpoint or a row, in a validation, an epoch's end, the test
    (os, "replace"),
    (os, "fsync"),
    (torch, "save"),
    (MetricsTable, "log_metrics"),
    (ModelCheckpoint, "on_train_epoch_end"),
    (ModelCheckpoint, "on_validation_end"),
    (PatternSearchTask, "training_step"),
    (PatternSearchTask, "validation_step"),
    (PatternSearchTask, "test_step"),
]


def kill_at(rng: random.Random) -> None:
    """Have this process kill itself at a random call of one of SEAMS."""
    owner, name = rng.choice(SEAMS)
    original, calls, before = (
        getattr(owner, name),
        iter(range(int(10 ** rng.uniform(0, 1.5)), 0, -1)),
        rng.random() < 0.5,
    )

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        due = next(calls, 0) == 1
        if due and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, wrapper)


def start(cfg: DictConfig, at_seam: random.Random | None = None) -> int:
    """Run `cfg` in a fork, that kills itself at a seam if it gets a generator for it; returns its process id."""
    if pid := os.fork():
        return pid
    if at_seam is not None:
        kill_at(at_seam)
    log = os.open(Path(cfg.output_dir).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        train(cfg)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def finish(pid: int, within: float = 3600) -> bool:
    """Wait for a process, and kill it after `within` seconds; returns whether it ended unkilled."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status not in (0, signal.SIGKILL):
                raise RuntimeError(
                    f"a run failed with status {status}; its output lies in {tempfile.gettempdir()}/soak-*/"
                )
            return status == 0
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def results(run_dir: Path) -> dict[str, Any]:
    """All that a run comes to, but for what the clock says and where it lies."""
    table = pd.read_csv(run_dir / "metrics.csv")
    summary = json.loads((run_dir / "summary.json").read_text())
    found = {
        "metrics.csv": table[~table.metric.str.endswith("per_second")].drop(columns="seconds").to_csv().splitlines()
    }
    for name in ("best", "last"):
        checkpoint = torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)
        varies = ("seconds", "resume")  # what the clock says, and what only the next start reads
        found[f"{name}.ckpt"] = {key: value for key, value in checkpoint.items() if key not in varies}
    found["summary.json"] = {key: value for key, value in summary.items() if key != "seconds"}
    return found


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Where two nested results differ."""
    if isinstance(a, dict) and isinstance(b, dict) and len(a) == len(b):
        for (key, value), (other, other_value) in zip(a.items(), b.items(), strict=True):
            if str(key).split("/")[-1] not in ("seconds", "last.ckpt", "best.ckpt") and key != other:
                yield f"{where}/{key} against {other}"
            if key not in ("seconds", "time_elapsed", "current_score"):  # Lightning reports that score, and forgets it
                yield from differences(value, other_value, f"{where}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.nan_to_num(), b.nan_to_num()):
            yield where
    elif (
        isinstance(a, str) and isinstance(b, str) and a.startswith("/") and b.startswith("/")
    ):  # in the run's directory
        if Path(a).name != Path(b).name:
            yield f"{where}: {a} against {b}"
    elif a != b and not (a != a and b != b):
        yield f"{where}: {str(a)[:80]} against {str(b)[:80]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="kills in all (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the delays and the cases (default 0)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after these")
    args = parser.parse_args()
    prepare_machine()
    training.leave_picture = lambda run_dir: None  # it takes longer than most of these runs, and is not compared
    rng, began = random.Random(args.seed), time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    configs = {}
    kills = at_seams = different = rounds = 0
    twins: dict[str, tuple[dict[str, Any], float]] = {}
    cases = list(CASES)
    rng.shuffle(cases)
    while kills < args.kills and time.monotonic() - began < args.seconds:
        case = cases[rounds % len(cases)]
        rounds += 1
        if case not in twins:
            configs[case] = job_config(compose_config((SHORT + CASES[case]).split()), home)
            twin = configs[case].copy()
            twin.output_dir = str(home / "twin")
            started = time.monotonic()
            finish(start(twin))
            twins[case] = results(home / "twin"), time.monotonic() - started
            shutil.rmtree(home / "twin")
        expected, seconds = twins[case]
        cfg = configs[case].copy()
        cfg.output_dir, cfg.resume = str(home / "killed"), "auto"
        killed_here = 0
        while True:
            at_seam = random.Random(rng.random()) if kills < args.kills and rng.random() < 0.5 else None
            delay = rng.uniform(0, 1.2 * seconds) if kills < args.kills and at_seam is None else 3600
            if finish(start(cfg, at_seam), delay):
                break
            kills, killed_here, at_seams = kills + 1, killed_here + 1, at_seams + (at_seam is not None)
        found = list(differences(expected, results(home / "killed")))
        different += bool(found)
        print(f"{case}: {killed_here} kills, {'DIFFERENT' if found else 'the same'}", flush=True)
        for line in found[:10]:
            print(f"  {line}")
        shutil.rmtree(home / "killed")
    print(
        f"{kills} kills ({at_seams} at seams), {kills} restarts, {rounds} runs of {len(twins)} cases, "
        f"{different} differences; {time.monotonic() - began:.0f} s, seed {args.seed}"
    )
    shutil.rmtree(home)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
