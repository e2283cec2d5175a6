"""A group over several machines, seen from ComfyUI: without processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import stub_job
from wan_pack.distributed.group.worker_group import WorkerGroup
from wan_pack.distributed.hosts.hostfile import HostsDir
from wan_pack.distributed.hosts.hosts_group import HostsGroup


def test_a_group_whose_folder_is_gone_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Another ComfyUI with the same temporary folder empties that when it starts. What is ended can be forgotten."""
    ended: list[WorkerGroup] = []
    monkeypatch.setattr(WorkerGroup, "end", lambda group: ended.append(group) or [7])
    group = HostsGroup.__new__(HostsGroup)
    group._job, group.folder = stub_job(gpu_count=2, hosts=("a", "b")), HostsDir(tmp_path / "gone")
    assert group.end() == [7] and ended == [group]
    assert group.end_text() == "host a did not answer; host b did not answer" and group.notes() == ""
