"""Memory of a CPU's tensors: kept when it is freed, in large pages."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's malloc.h
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # read by PyTorch at its first tensor
HAS_THEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def tune_allocation() -> bool:
    """Has glibc keep what this process frees, and PyTorch ask for huge pages, so that a CPU waits less for memory.

    By default every block above 32 MB is taken from the system and given back, and the system clears it each time: a tenth of
    a training step of megapixel images. In exchange the process stays as large as it ever was, and may become some percent
    larger where sizes vary. PyTorch asks for huge pages for tensors of 2 MB and more if this is called before its first one:
    fewer to make and to look up. Where the environment speaks about allocation (MALLOC_..., GLIBC_TUNABLES, LD_PRELOAD), all
    stays as it is; THP_MEM_ALLOC_ENABLE=0 refuses the huge pages.

    Returns:
        Whether it was done; other systems and C libraries are left alone.
    """
    told = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ)
    if told or platform.libc_ver()[0] != "glibc":
        return False
    if HAS_THEM.is_file():  # else PyTorch would warn
        os.environ.setdefault(HUGE_PAGES, "1")
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1))
