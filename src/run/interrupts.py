"""Ctrl-C and SIGTERM while a run trains: the step is finished and saved first; a second one stops at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import lightning as L


class Interrupted(BaseException):  # no error, like KeyboardInterrupt
    """Training was stopped by a signal, and its checkpoint is written."""


class Interrupts:
    """The signal that came, if any. `received` is 0 or the number of the signal."""

    def __init__(self) -> None:
        self.received = 0

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 143 for SIGTERM, as shells have it."""
        return 128 + (self.received or signal.SIGINT)

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
        os.write(2, b"\nFinishing the step, then saving; Ctrl-C again stops at once.\n")


@contextmanager
def undisguised(trainer: L.Trainer) -> Iterator[None]:
    """What Lightning's trainer does, with KeyboardInterrupt as it is: Lightning turns it into an exit with code 1."""
    try:
        yield
    except Interrupted:
        pass
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
