"""How many threads evaluate candidates, and that one operation never uses more than one."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PROCESSES = "PATTERN_SEARCH_PROCESSES"  # environment variable: how many processes like this one share the cores


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread within an operation, so that the order of its sums does not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def share_cores(processes: int) -> None:
    """Leave cores to as many processes like this one; -1 for one process per core."""
    os.environ[PROCESSES] = str(processes if processes > 0 else sys.maxsize)


def available_cores() -> int:
    """Cores for this process: its share of those it may use, which on a shared machine are fewer than it has."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get(PROCESSES, "1")))
