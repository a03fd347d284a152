"""Files that are written as a whole or not at all, paths as they are typed, and output that takes any character."""

import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

RESUMABLE = ("last.ckpt", "previous.ckpt")  # what a run goes on from, in checkpoints/, newest first


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
    os.replace(unfinished, path)
    sync_directory(path.parent)


def write(path: str | Path, text: str) -> None:
    """Write a file as a whole, or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def sync_directory(directory: Path) -> None:
    """Have the names of the files in it survive a crash of the machine too."""
    descriptor = os.open(directory, os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def typed(path: str | Path) -> str:
    """A path as short as it can be typed from here."""
    path = Path(path)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def quoted(value: str) -> str:
    """A value as Hydra's grammar reads it back."""
    return value if re.fullmatch(r"[\w./:@%+-]+", value) else "'" + value.replace("'", r"\'") + "'"


def print_any_character() -> None:
    """Have the output and the errors of this process show "?" for a character that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
