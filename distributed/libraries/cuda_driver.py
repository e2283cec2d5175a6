"""A GPU's context, made by the driver while Python imports torch, which would ask for it afterwards."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

LIBRARY = "libcuda.so.1"


def make_context(
    number: int, span: Callable[[str], AbstractContextManager[object]] = nullcontext, library: str = LIBRARY
) -> threading.Thread:
    """On a thread of its own. What goes wrong is left to torch, which asks for the same and has words for it.

    Args:
        number: of the GPU, among those that this process sees.
        span: measures what it is named.
    """
    # Beside the imports, as a call by ctypes lets other threads run.
    thread = threading.Thread(target=_make, args=(number, span, library), name="context", daemon=True)
    thread.start()
    return thread


def _make(number: int, span: Callable[[str], AbstractContextManager[object]], library: str) -> None:
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    with span("context"):
        # The one that torch's runtime takes for this device; kept until the process ends.
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), number) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
