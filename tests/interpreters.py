"""New interpreters that have imported the libraries already: forks of one process, the server.

An interpreter with torch and Lightning takes seconds of computing before it does anything, and some to end. The server
imports the libraries once, and nothing of the project. A fork of it has a directory, an environment, arguments,
streams, signal handlers and an exit code of its own, and imports the project anew. Runs of train.py draw no picture,
unless PICTURES stands in their environment. What Python reads at its own start (-X, PYTHONHASHSEED, PYTHONIOENCODING)
is that of the server, so tests of these start Python itself.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "lightning.pytorch", "pandas", "seaborn", "hydra.main", "pydantic", "rich.live", "wandb")


class Interpreter:
    """A running fork, with the interface of `subprocess.Popen` as far as tests use it.

    Args:
        arguments: what follows the word `python`: a script, `-m` with a module, or `-` for a program on stdin.
        cwd: the directory it starts in.
        env: its whole environment.
        code: what it reads from stdin.
    """

    def __init__(self, arguments: list[str], cwd: Path, env: Mapping[str, str], code: str = ""):
        request = json.dumps({"arguments": arguments, "cwd": str(cwd), "env": dict(env)})
        out, its_out = os.pipe()
        self._told, tell = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.stdout = os.fdopen(out)
        self._err = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by communicate
        self.returncode: int | None = None
        with tempfile.TemporaryFile("w+") as stdin, tell:
            stdin.write(code)
            stdin.seek(0)
            streams = [stdin.fileno(), its_out, self._err.fileno()]
            socket.send_fds(server(), [request.encode()], [*streams, tell.fileno()])
        os.close(its_out)
        self.pid = int(self._told.recv(100))

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Its exit code, or minus the number of the signal that killed it; None while it runs."""
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Wait for its end; returns its exit code, or minus the number of the signal that killed it."""
        if self.returncode is None:
            with self._told:
                self.returncode = int(self._told.recv(100))
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """All that it still prints until its end, on stdout and on stderr."""
        with self.stdout, self._err:
            out = self.stdout.read()
            self.wait()
            self._err.seek(0)
            return out, self._err.read()


@functools.cache
def server() -> socket.socket:
    """The channel to the server of this process."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(there.fileno())]
    quiet = os.environ | {"WANDB_SILENT": "true"}  # as train.py sets it before W&B, which reads it when imported
    nothing = dict(stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(command, pass_fds=[there.fileno()], env=quiet, **nothing)
    there.close()
    atexit.register(stop, here, process)
    return here


def stop(channel: socket.socket, process: subprocess.Popen[bytes]) -> None:
    channel.close()
    process.wait()


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """Fork on every request. Returns the request in a fork that is to carry it out, and None when there are no more."""
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # else a fork that collects garbage copies all memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, and they close the channel
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a keeper
    while True:
        message, descriptors, *_ = socket.recv_fds(channel, 2**20, 4)
        if not message:
            return None
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            channel.close()
            *streams, tell = descriptors
            if (pid := os.fork()) == 0:
                os.close(tell)
                for standard, stream in enumerate(streams):
                    os.dup2(stream, standard)
                    os.close(stream)
                return json.loads(message)
            for stream in streams:
                os.close(stream)
            keep(pid, tell)
        for descriptor in descriptors:
            os.close(descriptor)


def keep(pid: int, tell: int) -> None:
    """In a fork between the server and an interpreter: tell the pid of the interpreter, and then its exit code."""
    os.write(tell, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(tell, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def become(arguments: list[str], cwd: str, env: dict[str, str]) -> None:
    """Run what `python` followed by the arguments would, and end without freeing all that the libraries hold."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # those of the server were made for its own streams: whether one can seek, for instance
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[1:1] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    if arguments[0].endswith("train.py") and "PICTURES" not in env:  # progress.png takes longer than a short run
        sys.modules["results.figures"] = types.SimpleNamespace(draw_progress=lambda run_dir: None)
    end: dict[str, int] = {"code": 0}
    atexit.register(lambda: leave(end["code"]))  # the first, so the last to be called
    try:
        program(arguments, cwd)()
    except SystemExit as exit:
        if isinstance(exit.code, str):
            print(exit.code, file=sys.stderr)
        end["code"] = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        end["code"] = 1


def program(arguments: list[str], cwd: str) -> Callable[[], Any]:
    """What the arguments of `python` ask for, with sys.argv and sys.path as it sets them."""
    first, *rest = arguments
    if first == "-":
        sys.argv, sys.path[0] = arguments, ""
        return functools.partial(exec, compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
    if first == "-m":
        sys.argv, sys.path[0] = rest, cwd
        return functools.partial(runpy.run_module, rest[0], run_name="__main__", alter_sys=True)
    script = Path(first).resolve()
    sys.argv, sys.path[0] = arguments, str(script.parent)
    return functools.partial(runpy.run_path, str(script), run_name="__main__")


def leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    if request := serve(socket.socket(fileno=int(sys.argv[1]))):
        become(**request)
