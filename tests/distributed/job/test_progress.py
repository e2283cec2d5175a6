"""What the user sees of a running job."""

from __future__ import annotations

import pytest
from wan_pack.distributed.job.progress import SHARES, Progress


def test_progress_is_one_bar_and_one_line():
    fractions = [Progress(phase=phase, step=step, total=4).fraction for phase in SHARES for step in range(5)]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] == pytest.approx(1)
    text = Progress(phase="denoise", step=4, total=40, seconds_per_step=12.3).text
    assert text == "sampling 4/40 - 12.30 s/it - ETA 7:23"
    assert Progress(phase="load", step=2, total=8, message="low_noise expert").text == "loading 2/8 - low_noise expert"
    assert Progress(phase="something new").fraction == 0
    assert Progress(phase="encode", message="encoding the start image").text == "encoding the start image"


def test_progress_is_never_over_its_phase():
    """A rank may count more than it promised; a bar over 1 is drawn over its frame."""
    phases = list(SHARES)
    for phase, after in zip(phases, [*phases[1:], phases[-1]], strict=True):
        over = Progress(phase=phase, step=9, total=4).fraction
        assert over == Progress(phase=phase, step=4, total=4).fraction <= 1
        assert over == pytest.approx(Progress(phase=after).fraction)
    assert Progress(phase="done", step=1, total=1).fraction <= 1
    assert Progress(phase="load", step=3, total=0).fraction == Progress(phase="load").fraction
    assert sum(SHARES.values()) == pytest.approx(1)


def test_every_phase_has_its_share_and_its_words():
    shown = {phase: (round(Progress(phase=phase, step=1, total=2).fraction, 3), Progress(phase=phase).text)
             for phase in [*SHARES, "something new"]}  # fmt: skip
    assert shown == {
        "start": (0.01, "starting"), "encode": (0.035, "encoding"), "load": (0.125, "loading"),
        "denoise": (0.525, "sampling"), "decode": (0.92, "decoding"), "write": (0.995, "writing the video"),
        "done": (1.0, "finishing"), "something new": (0.0, "something new"),
    }  # fmt: skip
    assert Progress(phase="decode", seconds_per_step=0.0).text == "decoding - 0.00 s/it - ETA 0:00"


def test_long_jobs_have_hours():
    assert Progress(phase="denoise", step=1, total=11, seconds_per_step=400).text.endswith("400.00 s/it - ETA 1:06:40")
    assert Progress(phase="denoise", step=1, total=2, seconds_per_step=9).text.endswith("ETA 0:09")
