"""Keeps freed memory for the next step of a training on the CPU, where the C library is glibc.

``neq_cli.keep_freed_memory`` is public, and lies here so that it is had without torch.
"""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory for the next step, where it is glibc; returns whether it does.

    Else it gives the blocks of activations and gradients back, and the kernel clears every page of them anew in every
    step. What a process holds then stays at its peak. Call it once, before a training on the CPU; nothing is changed
    where the environment sets an allocator or its thresholds.
    """
    allocators_of_their_own = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in allocators_of_their_own):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
