"""Commands as a user types them, and what the documents hold: their commands, their code, their links."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from interpreters import Interpreter

SHORT = ["trainer.max_steps=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
README, LOG = ROOT / "README.md", ROOT / "report" / "log.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
WITH_COMMANDS = [README, *DOCS, ROOT / "CONTRIBUTING.md"]  # that are run; those of the others take hours
COMPARISON = ROOT / "report" / "README.md"
DOCUMENTS = [*WITH_COMMANDS, LOG, COMPARISON]
CODE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# (\S+/\S+)\n")  # the first line of a block that is a file


def run(
    command: str, home: Path, cwd: Path = ROOT, code: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command, with its runs below `home` and `code` as what is typed; returns the finished process."""
    return finish(begin(command, home, cwd, code, **environment))


def run_alone(command: str, home: Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command with an interpreter of its own, which takes seconds more."""
    return finish(begin_alone(command, home, cwd, **environment))


def begin(command: str, home: Path, cwd: Path = ROOT, code: str = "", **environment: str) -> Interpreter:
    """Start a command, with its runs below `home`."""
    python, *arguments = shlex.split(command)
    assert python == "python", command
    return Interpreter(arguments, cwd, surroundings(home, **environment), code)


def begin_alone(command: str, home: Path, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    """Start a command with an interpreter of its own."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    env, piped = surroundings(home, **environment), subprocess.PIPE
    return subprocess.Popen(
        words, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=piped, stderr=piped, text=True, encoding="utf-8"
    )


def finish(process: Interpreter | subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a command's end; returns the finished process with what it still printed."""
    out, err = process.communicate()
    return subprocess.CompletedProcess([], process.wait(), out, err)


def surroundings(home: Path, **environment: str) -> dict[str, str]:
    """The environment of a command with its runs below `home`, without what W&B would take from that of the tests."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    return env | environment | {"PATTERN_SEARCH_ROOT": str(home), "COLUMNS": "200"}


def run_dirs(home: Path) -> list[Path]:
    return sorted(path.parent for path in home.rglob("config.yaml") if ".hydra" not in path.parts)


def short(command: str) -> str:
    """A training command that takes one step; one that only prints stays as it is."""
    return " ".join([command, *SHORT]) if not re.search(r"--(help|cfg)", command) else command


def blocks(document: Path, language: str) -> list[str]:
    """The code of a document in one language, "" for none."""
    return [code for found, code in CODE.findall(document.read_text()) if found == language]


def commands(*documents: Path) -> list[str]:
    """The commands of all bash blocks, each once, without comments."""
    lines = [line for document in documents for block in blocks(document, "bash") for line in block.splitlines()]
    found = [line.split("  #")[0].strip() for line in lines if not line.startswith("#")]
    return list(dict.fromkeys(filter(None, found)))


def files(document: Path) -> dict[str, str]:
    """The blocks of a document that are files: those whose first line is a comment with their path."""
    found = {}
    for language in ("python", "yaml"):
        for block in blocks(document, language):
            if match := FILE.match(block):
                found[match[1]] = block[match.end() :]
    return found
