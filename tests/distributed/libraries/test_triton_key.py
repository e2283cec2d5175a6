"""Triton's key is made before the first kernel asks for it, by whichever module has it."""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager

import pytest
from patience import AT_ONCE
from wan_pack.distributed.libraries.triton_key import PLACES, make_triton_key


def broken() -> str:
    raise OSError("no libtriton.so")


@pytest.mark.parametrize(
    ("places", "made"),
    [
        ({PLACES[0]: lambda: "new"}, ["new"]),
        ({PLACES[0]: None, PLACES[1]: lambda: "old"}, ["old"]),
        ({PLACES[0]: broken, PLACES[1]: lambda: "old"}, ["old"]),
        ({PLACES[0]: broken, PLACES[1]: broken}, []),
        ({"no_such_triton.cache": None}, []),
    ],
    ids=["as it is", "as it was", "broken", "both broken", "no Triton"],
)
def test_the_key_is_made_on_a_thread_of_its_own(
    places: dict[str, object], made: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    keys, spans = [], []
    for place, key in places.items():
        if not place.startswith("no_such"):
            module = types.ModuleType(place)
            if key is not None:
                module.triton_key = lambda key=key: keys.append(key())  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, place, module)

    @contextmanager
    def span(name: str):
        yield
        spans.append(name)

    thread = make_triton_key(span, tuple(places))
    thread.join(AT_ONCE)
    assert not thread.is_alive() and thread.daemon
    assert keys == made and len(spans) == len(made)
    assert capfd.readouterr().err == ""


def test_tritons_own_key_is_kept_for_its_kernels():
    cache = pytest.importorskip(PLACES[0])
    make_triton_key().join(AT_ONCE)
    before = cache.triton_key.cache_info()
    cache.triton_key()
    after = cache.triton_key.cache_info()
    assert (after.hits, after.misses) == (before.hits + 1, before.misses)
