"""What a rank tells the launcher, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.rank.signs import RankFiles


def test_that_it_is_done_is_the_last_that_a_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The folder may be gone a moment later, and with it the rank that would still write into it."""
    folder, written = JobDir(tmp_path), []
    monkeypatch.setattr(JobDir, "write_json", lambda folder, path, value: written.append(path))
    RankFiles(folder, 0).progress("done", 0, 0)
    assert written == [folder.progress, folder.alive(0)]
