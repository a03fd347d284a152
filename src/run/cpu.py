"""What the program asks of the machine, so that nobody has to set an environment variable."""

import ctypes

import torch

MIB = 2**20
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc


def prepare_machine(threads: int = 1) -> None:
    """Set memory and the threads within an operation for a run, the same on every machine.

    One thread: the models are small, so a second one gains little, stalls when the machine is shared, and changes the
    order of sums and with it the result. Freed memory is kept for the next allocation: with glibc's defaults the
    kernel maps and zeroes every large activation anew, which halves the speed of batched forwards.
    """
    torch.set_num_threads(threads)
    settings = {M_MMAP_THRESHOLD: 1024 * MIB, M_TRIM_THRESHOLD: 1024 * MIB, M_TOP_PAD: 64 * MIB}
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have no such settings
        for name, size in settings.items():
            mallopt(name, size)
