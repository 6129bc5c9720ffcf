"""Freed memory of a training process: kept for the next step instead of given back."""

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # names and numbers of mallopt(3)


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for what is made next, in this process and until it ends.

    Every step of training on a CPU makes and frees the same large tensors. glibc asks the system for each above 32 MiB
    anew and gives back free memory at the end of the heap; the system then fills with zeros, page by page, what is
    overwritten at once. What it costs instead: the process holds its peak until it ends, and somewhat more than without,
    since free memory can only be used again where a tensor fits. Measured: ``benchmarks/kept_memory.py``.

    Returns:
        Whether it was done: other C libraries than glibc are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    asked = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))  # -1: never trim
    answers = [mallopt(parameter, value) for parameter, value in asked]  # each is asked, whatever the others say
    return all(answer == 1 for answer in answers)
