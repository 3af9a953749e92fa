"""Memory that was freed is kept for the next tensor: asking for new pages at every block takes a tenth of a sweep."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's `mallopt`: how much may lie free at the top of the heap, and from which size on memory is mapped apart."""
KEPT, APART = 2**30, 2**25
"""What is asked for: the second is the most that every glibc takes, and what is mapped apart leaves no holes."""


def keep_freed_memory() -> None:
    """Has glibc keep up to a GiB of what this process frees, unless the environment says how much.

    With other C libraries nothing is done.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not told else None
    # Keeping more, with nothing said of what is mapped apart, has all larger pieces mapped anew: that costs far more.
    if mallopt is not None and mallopt(M_MMAP_THRESHOLD, APART):
        mallopt(M_TRIM_THRESHOLD, KEPT)
