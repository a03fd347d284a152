"""How long commands take before and after the work itself, beside what the libraries alone take."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

TRAIN = str(Path(__file__).resolve().parents[1] / "train.py")
HYDRA, LIBRARIES = "import hydra", "import torch, lightning"  # what the others are compared with
STEP = "model=tiny trainer.max_steps=1 trainer.limit_val_batches=1 trainer.limit_test_batches=1"
COMMANDS = {
    HYDRA: ["-c", HYDRA],
    "--help": [TRAIN, "--help"],
    "--cfg job": [TRAIN, "--cfg", "job"],
    "model=tny (refused)": [TRAIN, "model=tny"],
    "model.d_modell=8 (refused)": [TRAIN, "model.d_modell=8"],
    LIBRARIES: ["-c", LIBRARIES],
    "seed=-1 (refused)": [TRAIN, "seed=-1"],
    "one step, logger=none": [TRAIN, *STEP.split(), "logger=none"],
    "one step, W&B offline": [TRAIN, *STEP.split()],
}
Costs = tuple[float, float, float]  # wall-clock seconds, CPU seconds, MiB of memory at the peak


def cost_of(arguments: list[str]) -> Costs:
    """What a Python process costs from its start to its end."""
    with tempfile.TemporaryDirectory() as home:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | {"PATTERN_SEARCH_ROOT": home},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def measure_startup(rounds: int, console: Console) -> dict[str, dict[str, float]]:
    """Print the medians of some rounds, in each of which every command runs once; returns them by command."""
    seen: dict[str, list[Costs]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            seen[name].append(cost_of(arguments))
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in seen.items()}
    table = Table(title=f"Starting, medians of {rounds}", title_justify="left")
    for column in ("python src/train.py", "seconds", "CPU seconds", f"CPU beyond {LIBRARIES}", "MiB"):
        table.add_column(column, justify="left" if column.startswith("python") else "right")
    base = medians[LIBRARIES][1]
    for name, (wall, cpu, memory) in medians.items():
        table.add_row(name, f"{wall:.2f}", f"{cpu:.2f}", f"{cpu - base:+.2f}", f"{memory:,.0f}")
    console.print(table)
    return {name: dict(zip(("seconds", "cpu_seconds", "mib"), of, strict=True)) for name, of in medians.items()}
