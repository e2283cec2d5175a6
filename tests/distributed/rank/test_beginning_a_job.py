"""What a rank does before its first job and before later ones, and at its end: without others to meet."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import FILE, stub_job
from wan_pack.distributed.job.job import ForwardsJob, GroupJob, JobError
from wan_pack.distributed.launch.launcher import new_job_id
from wan_pack.distributed.machine.memory_file import STORE_VARIABLE
from wan_pack.distributed.rank import session
from wan_pack.distributed.rank.session import Session
from wan_pack.wan.model.attention_kernels import KERNELS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
GROUP: Any = SimpleNamespace(store=Path("/group/store.json"))


def a_session(device: torch.device = CPU, **settings: Any) -> Session:
    return Session(
        rank=1, world=2, device=device, kernel=KERNELS["cpu"], ops="plain", vae_ops="plain", **settings
    )  # fmt: skip


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How the others were met, each time."""
    seen: list[dict[str, Any]] = []
    mesh = SimpleNamespace(cfg_size=1, group="all", ulysses_group="row")
    monkeypatch.setattr(session, "init_mesh", lambda **how: (seen.append(how), mesh)[1])
    monkeypatch.setattr(session, "let_go", lambda group, device: None)
    monkeypatch.delenv(STORE_VARIABLE, raising=False)
    return seen


@pytest.mark.parametrize(
    ("settings", "timeout", "published"),
    [
        ({"start_timeout": 70.0, "stall_timeout": 50.0}, 130.0, None),
        ({"start_timeout": 50.0, "stall_timeout": 90.0}, 150.0, None),
        ({"master_port": 2000}, 120.0, GROUP.store),
        ({"hosts": ("a", "b")}, 120.0, GROUP.store),
    ],
)
def test_ranks_meet_once_and_wait_longer_for_each_other_than_they_are_waited_for(
    settings: dict[str, Any], timeout: float, published: Path | None, met: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(STORE_VARIABLE, "/memory/store")
    rank, job = a_session(), stub_job(**settings)
    for _ in range(2):
        rank.begin(job, GROUP)
    assert met == [{
        "rank": 1, "world": 2, "cfg": 1, "device": CPU, "timeout": timeout, "store_file": Path("/memory/store"),
        "master_port": settings.get("master_port", 0), "published": published,
    }]  # fmt: skip
    assert rank.group == "all" and rank._exchange == job.parallel.exchange


def test_a_rank_of_two_halves_begins_in_them(met: list[dict[str, Any]]) -> None:
    a_session().begin(stub_job(cfg_parallel=True), GROUP)
    assert met[0]["cfg"] == 2 and met[0]["store_file"] is None


def test_groups_that_are_made_later_have_the_jobs_time_limit(met: list[dict[str, Any]]) -> None:
    rank = a_session()
    rank.begin(stub_job(), GROUP)
    asked: list[tuple[int, timedelta]] = []
    rank.mesh.laid_out = lambda *how: (asked.append(how), SimpleNamespace(cfg_size=2))[1]  # type: ignore
    rank.begin(stub_job(cfg_parallel=True, start_timeout=70.0), GROUP)
    assert asked == [(2, timedelta(seconds=130))]


def test_what_a_job_before_has_used_of_a_gpu_is_no_peak_of_this_one(
    met: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", done.append)
    rank = a_session()
    monkeypatch.setattr(Session, "_prepare", lambda self, job: done.append("prepared"))
    monkeypatch.setattr(Session, "_compute_as", lambda self, parallel: done.append("kernels"))
    rank.begin(stub_job(), GROUP)
    rank.rest()
    assert done == ["kernels", "prepared"]
    done.clear()
    rank = a_session(GPU)
    rank.begin(stub_job(), GROUP)
    rank.rest()
    assert done == ["emptied", GPU, "kernels", "prepared", "emptied"]


def test_a_rank_is_the_one_that_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    rank = Session.of(stub_job())
    assert (rank.rank, rank.world, rank.device, rank.kernel.name) == (1, 2, CPU, "cpu")
    assert rank.mesh is None and rank.group is None and rank.sparse is None
    assert (rank.experts._rank, rank.experts._device, rank.experts._ops) == (1, CPU, rank.ops)
    chosen = rank.kernel
    monkeypatch.setattr(session, "choose_kernel", lambda *_: pytest.fail("it is chosen already"))
    rank._compute_as(stub_job().parallel)
    assert rank.kernel is chosen


@pytest.mark.parametrize("compiles", [True, False])
def test_kernels_are_chosen_by_the_gpu_and_the_precision_of_the_products(
    compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled has its own kernels between the products; the VAE is not."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(session, "check_needs", lambda parallel, capability: asked.append((capability,)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, device.index))
    monkeypatch.setattr(session, "choose_kernel", lambda *how: (asked.append(how), KERNELS["cpu"])[1])

    def ops(capability: Any, name: str, *, compiled: bool = False) -> tuple[str, str]:
        asked.append((capability, name, compiled))
        return f"compiled {compiled}", "a reason"

    monkeypatch.setattr(session, "choose_ops", ops)
    for device, capability in ((GPU, (9, 1)), (CPU, None)):
        asked.clear()
        rank = a_session(device)
        rank._compute_as(stub_job(mixed_precision="fp16", torch_compile=compiles).parallel)
        assert asked == [
            (capability,), (capability, torch.float16, "auto"), (capability, "auto", compiles),
            (capability, "auto", False),
        ]  # fmt: skip
        assert (rank.ops, rank.vae_ops) == (f"compiled {compiles}", "compiled False")


def test_pictures_of_what_is_sampled_come_of_a_vae_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU in bfloat16, which takes it a tenth of the time."""
    read: list[dict[str, Any]] = []
    monkeypatch.setattr(session, "import_diffusers", lambda: None)
    monkeypatch.setattr(session, "load_vae", lambda files, **how: read.append(how))
    monkeypatch.setattr(session, "preview_of_vae", lambda vae: object())
    for device, dtype in ((CPU, torch.bfloat16), (GPU, torch.float32)):
        rank, job = a_session(device), stub_job()
        assert rank.preview_map(job) is rank.preview_map(job)
        assert read.pop() == {"dtype": dtype, "device": device} and not read


def test_a_vae_is_spread_over_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []
    imported: list[int] = []
    monkeypatch.setattr(session, "import_diffusers", lambda: imported.append(len(made)))
    monkeypatch.setattr(session, "RankVae", lambda *of, **how: (made.append((*of, how)), object())[1])
    rank, job = a_session(mesh=SimpleNamespace(group="all", cfg_size=1)), stub_job()
    assert not rank.holds_vae(job)
    rank.vae(job)
    how = {"dtype": torch.float32, "device": CPU, "group": "all", "ops": "plain"}
    assert made == [([FILE.path], how)] and imported == [0] and rank.holds_vae(job)


@pytest.mark.parametrize("joined", [True, False])
def test_a_rank_leaves_its_group_and_reads_no_longer(joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(session.dist, "is_initialized", lambda: joined)
    monkeypatch.setattr(session.dist, "destroy_process_group", lambda: done.append("left"))
    rank = a_session()
    monkeypatch.setattr(rank.experts, "stop_reading", lambda: done.append("reads no longer"))
    rank.leave()
    assert done == ["reads no longer", *["left"] * joined]


@pytest.mark.parametrize("sparse", [True, False])
def test_a_model_gets_ready_with_the_kernel_that_its_steps_have(sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is sparse in some steps looks at what it computes: not with zeros."""
    asked: list[Any] = []
    monkeypatch.setattr(session, "get_ready", lambda *given, **how: asked.append((*given, how)))
    monkeypatch.setattr(Session, "sparse", object() if sparse else None)
    rank, job = a_session(mesh=SimpleNamespace(group="all", cfg_size=1)), stub_job()
    rank.get_ready("model", job, "shard", "span")  # type: ignore[arg-type]
    how = {"mesh": rank.mesh, "device": CPU, "kernel": None if sparse else rank.kernel, "span": "span"}
    assert asked == [("model", job.parallel, "shard", how)]


def test_a_job_without_a_transformer_prepares_nothing_for_one(
    met: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    prepared: list[GroupJob] = []
    monkeypatch.setattr(Session, "_prepare", lambda self, job: prepared.append(job))
    forwards = ForwardsJob(id=new_job_id(), model=(FILE,), parallel=stub_job().parallel)
    vae: Any = SimpleNamespace(parallel=stub_job().parallel, transformer=())
    for first, second in ((forwards, vae), (vae, forwards)):
        rank = a_session()
        rank.begin(first, GROUP)
        rank.begin(second, GROUP)
        assert prepared == [forwards]
        prepared.clear()


def test_a_gpu_that_does_not_do_what_is_asked_is_an_error_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = a_session()
    with pytest.raises(JobError, match="needs a GPU"):
        rank._compute_as(stub_job(attention="fa3").parallel)
    assert rank.kernel.name == "cpu"
