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
