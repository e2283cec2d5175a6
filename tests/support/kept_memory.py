"""What a test frees stays with its process, for the next one.

To give large tensors' memory back and take it anew, page by page, was a quarter of the processor time of tests that
compute.
"""

from __future__ import annotations

import ctypes

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
"""Of glibc's mallopt."""


def keep_freed_memory() -> None:
    """Has this process, and those that are forked from it, keep what is freed. Without glibc: nothing."""
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(TRIM_THRESHOLD, 1 << 30)
        set_option(TOP_PAD, 64 << 20)
        # More than this is given back still.
        set_option(MMAP_THRESHOLD, 128 << 20)


def give_back_freed_memory() -> None:
    """For tests that look at how much this process has."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
