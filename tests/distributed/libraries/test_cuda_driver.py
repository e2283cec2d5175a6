"""A GPU's context beside the imports; without a GPU, or a driver, nothing happens."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from patience import AT_ONCE
from wan_pack.distributed.libraries import cuda_driver
from wan_pack.distributed.libraries.cuda_driver import make_context


class Driver:
    """Knows two GPUs."""

    def __init__(self, says: int = 0) -> None:
        self.says, self.asked = says, []

    def cuInit(self, flags: int) -> int:
        self.asked.append(("init", flags))
        return self.says

    def cuDeviceGet(self, device: ctypes.c_int, number: int) -> int:
        device._obj.value = 40 + number
        return 0 if number < 2 else 101

    def cuDevicePrimaryCtxRetain(self, context: object, device: ctypes.c_int) -> int:
        self.asked.append(("context", device.value))
        return 0


@pytest.mark.parametrize(
    ("number", "says", "asked"),
    [(1, 0, [("init", 0), ("context", 41)]), (2, 0, [("init", 0)]), (0, 100, [("init", 0)])],
    ids=["there", "no such GPU", "no GPU"],
)
def test_the_context_is_that_of_the_gpu_with_this_number(
    number: int, says: int, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
):
    driver, loaded, spans = Driver(says), [], []

    @contextmanager
    def span(name: str) -> Iterator[None]:
        spans.append(name)
        yield

    names = {"c_int": ctypes.c_int, "c_void_p": ctypes.c_void_p, "byref": ctypes.byref}
    monkeypatch.setattr(
        cuda_driver, "ctypes", SimpleNamespace(CDLL=lambda name: loaded.append(name) or driver, **names)
    )
    make_context(number, span).join(AT_ONCE)
    assert (driver.asked, loaded, spans) == (asked, ["libcuda.so.1"], ["context"])


def test_without_a_driver_nothing_is_said(recwarn: pytest.WarningsRecorder):
    """A thread's exception would be."""
    thread = make_context(0, library="libthere-is-none.so.1")
    thread.join(AT_ONCE)
    assert not thread.is_alive() and not list(recwarn)
