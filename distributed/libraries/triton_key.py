"""The key that Triton looks up compiled kernels by: a hash of its own 400 MB, made while Python imports torch."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

PLACES = ("triton.runtime.cache", "triton.compiler.compiler")
"""Modules that have had its function, the newest first."""


def make_triton_key(
    span: Callable[[str], AbstractContextManager[object]] = nullcontext, places: tuple[str, ...] = PLACES
) -> threading.Thread:
    """On a thread of its own: Triton keeps it, and the first kernel would wait for it. Triton imports nothing of torch,
    nor torch of Triton. What goes wrong is left to that kernel.

    Args:
        span: measures what it is named.
    """
    thread = threading.Thread(target=_make, args=(span, places), name="triton-key", daemon=True)
    thread.start()
    return thread


def _make(span: Callable[[str], AbstractContextManager[object]], places: tuple[str, ...]) -> None:
    for place in places:
        try:
            key = importlib.import_module(place).triton_key
            with span("key of Triton's kernels"):
                key()
        except Exception:
            continue
        return
