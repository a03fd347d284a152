"""The directory of a run: one process at a time, and a record of what it ran with."""

import json
import os
import platform
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from run.files import write

PACKAGES = ("torch", "lightning", "hydra-core", "numpy")
ROOT = Path(__file__).resolve().parents[2]


class RunDirectoryError(ValueError):
    """A run cannot start in its directory; the message says why, and what to do."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Own the directory until the end, even that of a killed process; RunDirectoryError if another process owns it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_dir / ".lock", timeout=0):
            yield
    except Timeout:
        raise RunDirectoryError(in_use(run_dir)) from None


def in_use(run_dir: Path) -> str:
    record = starts(run_dir)
    return f"{run_dir} is in use by process {record[-1]['pid'] if record else 'unknown'}; wait for it, or end it"


def unusable(run_dir: Path) -> str | None:
    """Why no run can start in a directory, that need not exist yet."""
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not existing.is_dir():
        return f"the run's directory {run_dir} cannot be made: {existing} is a file; choose another directory"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"the run's directory {run_dir} cannot be written: no permission for {existing}; choose another one"
    if (run_dir / ".lock").exists():
        try:
            with FileLock(run_dir / ".lock", timeout=0):
                return None
        except Timeout:
            return in_use(run_dir)
        except OSError as error:
            return f"the run's directory {run_dir} cannot be locked: {error}; choose another one"
    return None


def record_start(run_dir: Path) -> None:
    """Append what this process runs with to environment.json, a list with one entry for every start of the run."""
    earlier = starts(run_dir)
    wandb_id = earlier[0]["wandb_id"] if earlier else secrets.token_hex(4)  # of the one W&B run of all starts
    record = environment() | {"wandb_id": wandb_id}
    write(run_dir / "environment.json", json.dumps([*earlier, record], indent=2) + "\n")


def starts(run_dir: Path) -> list[dict[str, Any]]:
    """The record of every start of a run, oldest first."""
    try:
        return json.loads((run_dir / "environment.json").read_text())
    except (OSError, ValueError):
        return []


def environment() -> dict[str, Any]:
    """Versions, code and machine of this process."""
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "pid": os.getpid(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if (status := _git("status", "--porcelain")) is None else bool(status),
        "cores": os.cpu_count(),
        "threads_per_operation": torch.get_num_threads(),
    }


def _git(*arguments: str) -> str | None:
    """The answer of git about this checkout; None without git, or outside a checkout."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None
