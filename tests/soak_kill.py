"""Kills runs again and again, and compares what they come to with runs that were left alone, bit for bit.

python tests/soak_kill.py --kills 200              ends with exit code 1 if a run differs
python tests/soak_kill.py --kills 200 --seed 1     other delays

Every run is a fork of this process, which has imported all it needs: a start costs no imports.
"""

import argparse
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
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from config_check import compose_jobs
from machine import prepare_machine
from train import train

SHORT = "model=tiny logger=none callbacks.progress.log_every_seconds=0.1 checkpoint.every_seconds=null "
CASES = {
    "pattern_search": "trainer.max_epochs=3 optimizer.polls_per_step=64 checkpoint.every_steps=1",
    "pattern_search, validation within epochs": "task=membership datamodule.n_samples=400 datamodule.batch_size=32 "
    "trainer.max_epochs=-1 trainer.max_steps=20 optimizer.polls_per_step=32 trainer.check_val_every_n_epoch=null "
    "trainer.val_check_interval=5 checkpoint.every_steps=3",
    "classic, a pass of many steps": "task=scan datamodule.split=scan_s optimizer=pattern_search_classic "
    "optimizer.polls_per_step=40 trainer.max_epochs=12 trainer.check_val_every_n_epoch=2 checkpoint.every_steps=2",
    "classic, stopped by its budget": "optimizer=pattern_search_classic optimizer.polls_per_step=100 "
    "optimizer.max_evaluations=1500 checkpoint.every_steps=2",
    "adam with dropout": "optimizer=adam model.dropout=0.2 trainer.max_epochs=8 checkpoint.every_steps=1",
    "adam, solved": "optimizer=adam trainer.max_epochs=20 callbacks.early_stopping.stopping_threshold=0.68 "
    "checkpoint.every_steps=4",
    "adam, accumulating": "optimizer=adam trainer.accumulate_grad_batches=2 trainer.max_epochs=8 "
    "trainer.val_check_interval=0.5 model.dropout=0.1 checkpoint.every_steps=1",
    "sgd on scan": "task=scan datamodule.split=scan_s optimizer=sgd trainer.max_epochs=20 checkpoint.every_steps=5",
    "sgd, few batches": "task=membership optimizer=sgd trainer.max_epochs=6 trainer.limit_train_batches=7 "
    "model.dropout=0.1 checkpoint.every_steps=3",
}


def start(cfg: DictConfig) -> int:
    """Run `cfg` in a fork; returns its process id."""
    if pid := os.fork():
        return pid
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


def finish(pid: int, within: float | None = None) -> bool:
    """Wait for a process, and kill it after `within` seconds; returns whether it finished by itself."""
    deadline = time.monotonic() + (within if within is not None else 3600)
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise RuntimeError(f"process {pid} failed with status {status}")
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def results(run_dir: Path) -> dict[str, Any]:
    """All that a run comes to, but for what the clock says and where it lies."""
    table = pd.read_csv(run_dir / "metrics.csv")
    summary = json.loads((run_dir / "summary.json").read_text())
    found = {"metrics.csv": table[~table.metric.str.endswith("per_second")].drop(columns="seconds").to_csv()}
    for name in ("best", "last"):
        checkpoint = torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)
        kept = ("state_dict", "optimizer_states", "global_step", "epoch", "callbacks", "loops")
        found[f"{name}.ckpt"] = {key: checkpoint[key] for key in kept}
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
    elif isinstance(a, str) and isinstance(b, str) and "/" in a + b:
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
    rng, began = random.Random(args.seed), time.monotonic()
    home = Path(tempfile.mkdtemp(prefix="soak-"))
    configs = {}
    kills = restarts = different = rounds = 0
    twins: dict[str, tuple[dict[str, Any], float]] = {}
    cases = list(CASES)
    rng.shuffle(cases)
    while kills < args.kills and time.monotonic() - began < args.seconds:
        case = cases[rounds % len(cases)]
        rounds += 1
        if case not in twins:
            (configs[case],) = compose_jobs("pattern_search_train", (SHORT + CASES[case]).split())
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
        while not finish(start(cfg), within=rng.uniform(0, 1.2 * seconds) if kills < args.kills else None):
            kills, killed_here, restarts = kills + 1, killed_here + 1, restarts + 1
        found = list(differences(expected, results(home / "killed")))
        different += bool(found)
        print(f"{case}: {killed_here} kills, {'DIFFERENT' if found else 'the same'}", flush=True)
        for line in found[:10]:
            print(f"  {line}")
        shutil.rmtree(home / "killed")
    print(f"{kills} kills, {restarts} restarts, {rounds} runs of {len(twins)} cases, {different} differences")
    print(f"{time.monotonic() - began:.0f} s, seed {args.seed}")
    shutil.rmtree(home)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
