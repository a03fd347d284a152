"""What the program asks of the machine it runs on: memory that stays with the process, and how many threads.

Called once at the start of a program; nobody has to set an environment variable.
"""

import ctypes

import torch

MIB = 2**20
# malloc.h of glibc
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


def prepare_machine() -> None:
    """Set memory and threads for a run, the same on every machine.

    One thread within an operation: the models are small, so a second one gains little, stalls when the
    machine is shared, and changes the order of sums and with it the result.
    """
    keep_freed_memory()
    torch.set_num_threads(1)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next allocation instead of returning it to the system.

    With glibc's defaults every large activation is mapped anew and zeroed page by page by the kernel,
    which halves the speed of batched forwards. Other C libraries have no such settings and are left alone.
    """
    settings = {M_MMAP_THRESHOLD: 1024 * MIB, M_TRIM_THRESHOLD: 1024 * MIB, M_TOP_PAD: 64 * MIB}
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for name, size in settings.items():
            mallopt(name, size)
