"""What stops a run: Ctrl-C and SIGTERM let the step finish and be saved first, a second one stops at once."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from run.directory import TRAIN, quoted, to_type, typed


class Interrupted(BaseException):  # no error, like KeyboardInterrupt
    """Training was stopped by a signal, and its checkpoint is written."""


class Interrupts:
    """The signal that came, if any. `received` is 0 or the number of the signal."""

    def __init__(self) -> None:
        self.received = 0

    def listen(self) -> None:
        """Take the place of Lightning's handlers, which it puts back when training ends."""
        if threading.current_thread() is threading.main_thread():  # no other one may
            signal.signal(signal.SIGINT, self._handle)
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        # print is not safe within a handler: the signal may have come in the middle of one
        os.write(2, b"\nFinishing the step, then saving; a second signal (Ctrl-C) stops at once.\n")


@contextmanager
def resumable(run_dir: Path, interrupts: Interrupts) -> Iterator[None]:
    """Whatever stops the run, say how to go on with it, and exit: 130 or 143 after a signal, 1 if it cannot write."""
    code = 0
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Lightning makes the second of the first
        code = 128 + signal.SIGINT
    except OSError as error:  # most often a full disk; the checkpoints on it are whole
        logging.getLogger(__name__).info("stopped", exc_info=True)
        print(f"Stopped: {error}", file=sys.stderr)
        code = 1
    if interrupts.received:
        code = 128 + interrupts.received
    if code and not in_sweep():  # which says it at its end
        command = to_type([typed(TRAIN)], HydraConfig.get(), f"resume={quoted(typed(run_dir))}")
        print(f"Go on with: {command}", flush=True)
    if code:
        sys.exit(code)


def in_sweep() -> bool:
    """Whether this process runs a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
