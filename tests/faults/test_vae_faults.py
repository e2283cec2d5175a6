"""A VAE node of ComfyUI's whose processes die, hang, run out of memory or are cancelled in the middle of a picture."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from decoding import GIVEN, Act, Decoding, decoding
from jobs import STUB_VAE, agent_of, gone_within, pack_with, rank_of
from left_over import settled
from mount import SUPPORT
from patience import AT_ONCE, COMES_UP
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.group.leftovers import remove_abandoned
from wan_pack.distributed.job.errors import JobCancelled
from wan_pack.distributed.launch.pool import Pool

pytestmark = pytest.mark.processes


@pytest.fixture
def ranks(tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Decoding]]:
    """Ranks that do, at part `at`, what `action` says."""

    def make(action: str = "", at: int = 0, act: Act | None = None) -> Decoding:
        monkeypatch.setattr(worker_group, "AGENT", pack_with(STUB_VAE, tmp_path, action=action, at=at))
        return Decoding(tmp_path, pool, act, at)

    yield make
    pool.release()
    settled()


@pytest.mark.parametrize("who", ["rank", "agent"])
def test_fault_01_10_29_a_process_killed_in_a_picture_is_named(who: str, ranks: Callable[..., Decoding]):
    """And the next one starts on new processes."""
    here = ranks("hang", 2, lambda decoding: decoding.processes[2 if who == "rank" else 0].kill())
    error = here.fails()
    assert str(error).startswith({"rank": "rank 1 was killed by SIGKILL", "agent": "the agent was killed by SIG"}[who])
    assert "the job is kept in" in str(error) and "distributed run" not in str(error)
    here.nothing_is_left()
    ranks().run()


def test_fault_02_a_rank_that_raises_in_a_picture_says_why(ranks: Callable[..., Decoding]):
    here = ranks("raise", 3)
    assert str(here.fails()).startswith("rank 1: ValueError: the weights of layer 3 are bad\nin decode at step 2")
    here.nothing_is_left()


def test_fault_03_full_memory_is_known_as_such(ranks: Callable[..., Decoding]):
    """So that ComfyUI goes on with tiles."""
    here = ranks("full", 2)
    assert here.fails().out_of_memory
    here.nothing_is_left()


@pytest.mark.parametrize("frozen", [False, True], ids=["hung", "frozen"])
def test_fault_05_06_a_rank_that_stands_still_is_named(frozen: bool, ranks: Callable[..., Decoding]):
    def freeze(decoding: Decoding) -> None:
        if frozen:
            decoding.processes[2].kill(signal.SIGSTOP)

    here = ranks("hang", 2, freeze)
    error = here.fails(stall_timeout=2.0)
    assert "made no progress for 2 s in decode" in str(error)
    assert not frozen or str(error).startswith("rank 1 ")
    assert ("it is frozen" in str(error)) is frozen
    here.nothing_is_left()


@pytest.mark.parametrize("warm", [0.0, 60.0])
def test_fault_07_a_cancel_ends_the_node_and_leaves_nothing_that_hangs(warm: float, ranks: Callable[..., Decoding]):
    """Those that would stay get their time, and are ended."""
    here = ranks("hang", 2, lambda decoding: setattr(decoding, "cancelled", True))
    with pytest.raises(JobCancelled):
        here.run(keep_warm_seconds=warm, more_follow=not warm)
    settled()
    here.nothing_is_left()


def test_fault_17_processes_that_end_well_without_a_result(ranks: Callable[..., Decoding]):
    here = ranks("no result")
    assert str(here.fails()).startswith("the job ended without a valid result")
    here.nothing_is_left()


def test_the_processes_end_with_free_memory_once_the_picture_is_done(ranks: Callable[..., Decoding]):
    here = ranks()
    here.run()
    assert len(here.pool.view()) == 1
    with here.calls.together():
        here.calls.run(decoding(), GIVEN)
        assert here.pool.release() == 0
    here.nothing_is_left()


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
from mount import mount_pack
mount_pack()
from pathlib import Path
from decoding import Decoding
from wan_pack.distributed.group import worker_group
from wan_pack.distributed.launch.pool import Pool
worker_group.AGENT = Path(sys.argv[3])
folder = Path(sys.argv[2])
here = Decoding(folder, Pool(), lambda decoding: (folder / "decodes").touch())
here.run()
"""


def test_fault_09_everything_ends_with_comfyui_in_a_picture(ranks: Callable[..., Decoding], tmp_path: Path):
    here = ranks("hang", 2)
    with (tmp_path / "parent.log").open("wb") as log:
        arguments = [str(SUPPORT), str(tmp_path), str(worker_group.AGENT)]
        parent = subprocess.Popen([sys.executable, "-c", PARENT, *arguments], stderr=log)
    try:
        deadline = time.monotonic() + COMES_UP
        while not (tmp_path / "decodes").exists():
            assert time.monotonic() < deadline and parent.poll() is None, (tmp_path / "parent.log").read_text()
            time.sleep(0.05)
        here.processes = [agent_of(here.job), rank_of(here.job, 0), rank_of(here.job, 1)]
    finally:
        parent.kill()
        parent.wait(AT_ONCE)
    assert gone_within(AT_ONCE, *here.processes)
    remove_abandoned(tmp_path / "jobs")
    here.nothing_is_left()
