"""The directory of a run: one process at a time, files that are whole, a record of every start, commands that go on."""

import io
import json
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from filelock import FileLock, Timeout

from config.compose import DEFAULT_CONFIG, given

PACKAGES = ("torch", "lightning", "hydra-core", "numpy")
TRAIN = Path(__file__).parents[1] / "train.py"


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
        process = f"process {newest[-1]['pid']}" if (newest := starts(run_dir)) else "another process"
        raise RunDirectoryError(f"{run_dir} is in use by {process}; wait for it, or end it") from None


def unusable(run_dir: Path) -> str | None:
    """Why nothing can be written to a directory, that need not exist yet."""
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return None
    why = f"no permission for {existing}" if existing.is_dir() else f"{existing} is a file"
    return f"the run's directory {run_dir} cannot be written: {why}; choose another one"


# --- files that are written as a whole or not at all ---


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when it is complete; after an OSError `path` is as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")  # the same name each time: a kill leaves no litter
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say what was written
            error.filename = str(path)
        raise
    move(unfinished, path)


def move(old: Path, new: Path) -> None:
    """Give a file another name in its directory, that survives a crash of the machine too."""
    os.replace(old, new)
    descriptor = os.open(new.parent, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: str | Path, text: str) -> None:
    """Write a file as a whole, or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


# --- what a run ran with ---


def record_start(run_dir: Path) -> None:
    """Append what this process runs with to environment.json, a list with one entry for every start of the run."""
    earlier, status = starts(run_dir), _git("status", "--porcelain")
    record = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
        "pid": os.getpid(),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "cores": os.cpu_count(),
        "wandb_id": earlier[0]["wandb_id"] if earlier else secrets.token_hex(4),  # one W&B run of all starts
    }
    write(run_dir / "environment.json", json.dumps([*earlier, record], indent=2) + "\n")


def starts(run_dir: Path) -> list[dict[str, Any]]:
    """The record of every start of a run, oldest first."""
    try:
        return json.loads((run_dir / "environment.json").read_text())
    except (OSError, ValueError):
        return []


def _git(*arguments: str) -> str | None:
    """The answer of git about this checkout; None without git, or outside a checkout."""
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(TRAIN.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


# --- what is printed ---


def typed(path: str | Path) -> str:
    """A path as short as it can be typed from here."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def quoted(value: str) -> str:
    """A value as Hydra's grammar reads it back."""
    return value if re.fullmatch(r"[\w./:@%+-]+", value) else "'" + value.replace("'", r"\'") + "'"


def to_type(script: Sequence[str], hydra: Any, *more: str) -> str:
    """The command of a run as it can be typed again, without `resume` and `picture`; `hydra` is of its config."""
    name = hydra.job.config_name
    flags = [] if name == DEFAULT_CONFIG else [f"--config-name={name}"]
    words = [word for word in given(hydra) if not word.startswith(("resume=", "picture="))]
    return shlex.join(["python", *script, *flags, *words, *more])


def print_any_character() -> None:
    """Have the output and the errors of this process show "?" for a character that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def printing() -> Iterator[None]:
    """What a command prints, any character of it, until the end or until its reader has enough, as `head` has."""
    print_any_character()
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        stop_printing()


def stop_printing() -> NoReturn:
    """End the process quietly with code 1: nobody reads what it prints."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
    sys.exit(1)
