"""Memory that tensors free is kept for the next ones."""

from __future__ import annotations

import ctypes
import os
import platform

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tells glibc to keep what this process frees, so that a CPU's step does not wait for fresh pages.

    By default every block above 32 MB is taken from the system and given back, and the system clears it each time: a tenth of
    a training step of megapixel images. In exchange the process stays as large as it ever was, and may become some percent
    larger where sizes vary. What the environment says about allocation (MALLOC_..., GLIBC_TUNABLES, LD_PRELOAD) stays as it is.

    Returns:
        Whether it was done; other systems and C libraries are left alone.
    """
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1))
