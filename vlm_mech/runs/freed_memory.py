"""Memory that was freed is kept for the next tensor: asking for new pages at every block takes a tenth of a sweep."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's `mallopt`: how much may lie free at the top of the heap, and from which size on memory is mapped apart."""
MOST = 2**30


def keep_freed_memory() -> None:
    """Has glibc keep what this process frees, unless the environment says how much; elsewhere nothing is done.

    Peaks stay as they are; between them the process holds on to what it had.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MOST)
        mallopt(M_TRIM_THRESHOLD, MOST)
