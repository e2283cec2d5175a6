"""What a rank keeps between jobs."""

from __future__ import annotations

import contextlib
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import stub_job
from wan_pack.distributed.job.job import FileIdentity, JobError, Parallel, VaeJob
from wan_pack.distributed.launch.launcher import new_job_id
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank import session
from wan_pack.wan.model.attention_kernels import KERNELS
from wan_pack.wan.model.sparse import block_order, sparse_steps


@pytest.mark.parametrize(("name", "exact"), [("fa3-fp8", "fa3"), ("sage", "fa3"), ("fa3", None), ("cudnn", None)])
def test_beside_a_kernel_in_8_bits_there_is_an_exact_one(monkeypatch: pytest.MonkeyPatch, name: str, exact: str | None):
    monkeypatch.setattr(session, "check_needs", lambda *_: None)
    monkeypatch.setattr(session, "_device", lambda job: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("wan_pack.wan.model.attention_kernels.AttentionKernel.obstacle", lambda *_: "")
    monkeypatch.setattr(session, "choose_ops", lambda *_, **__: ("plain", ""))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    made: list[Any] = []
    later: list[Any] = []
    kept: Any = SimpleNamespace(compute_by=lambda *given: later.append(given))
    monkeypatch.setattr(session, "ExpertCache", lambda *given: (made.append(given), kept)[1])
    monkeypatch.setattr(session, "PromptEncoder", lambda device: None)
    found = session.Session.of(stub_job(gpu_count=1, attention=name))
    assert found.kernel.name == name
    # The models get both, also with a job that asks for another kernel.
    runs = KERNELS[name].run, exact and KERNELS[exact].run
    assert (made[0][2], made[0][4]) == runs
    found._compute_as(Parallel(gpu_count=1, attention="flash"))
    found._compute_as(Parallel(gpu_count=1, attention=name))
    assert [(given[0], given[2]) for given in later] == [(KERNELS["flash"].run, None), runs]


def test_groups_stay_but_let_each_other_have_their_memory(monkeypatch: pytest.MonkeyPatch):
    """Guidance to and fro: what one group exchanges through is not kept from the other."""
    freed: list[Any] = []
    monkeypatch.setattr(session, "let_go", lambda group, device: freed.append(group))
    made: dict[int, Any] = {}

    class FakeMesh:
        def __init__(self, cfg: int) -> None:
            self.cfg_size, self.ulysses_group = cfg, f"groups of {cfg}"

        def laid_out(self, cfg: int, timeout: Any) -> FakeMesh:
            assert cfg not in made, "making groups is collective"
            made[cfg] = FakeMesh(cfg)
            return made[cfg]

    rank = session_of(FakeMesh(1))
    first = rank.mesh
    for cfg, at_last in ((1, []), (2, [1]), (2, [1]), (1, [1, 2]), (2, [1, 2, 1])):
        rank.begin(stub_job(gpu_count=4, cfg_parallel=cfg == 2), None)  # type: ignore[arg-type]
        assert rank.mesh is (made[2] if cfg == 2 else first)
        assert freed == [f"groups of {size}" for size in at_last]
    # Exchanged in another way, or not at all, it is of no use either; a job without a transformer changes nothing.
    freed.clear()
    for changed, settings in ((True, {"ulysses_engine": "packed"}), (False, {}), (True, {"use_ulysses": False})):
        rank.begin(vae_job(gpu_count=4), None)  # type: ignore[arg-type]
        before = rank.mesh
        parallel = {"gpu_count": 4, "cfg_parallel": True, "ulysses_engine": "packed", "use_fsdp": True}
        rank.begin(stub_job(**parallel | settings), None)  # type: ignore[arg-type]
        assert rank.mesh is before is made[2]
        assert freed == ["groups of 2"] * changed
        freed.clear()


def session_of(mesh: Any) -> session.Session:
    """Of a rank that has met the others."""
    made = session.Session(
        rank=0, world=4, device=torch.device("cpu"), kernel=KERNELS["cpu"], ops="plain", vae_ops="plain", mesh=mesh
    )
    made._joined, made._exchange = True, "auto"
    made._remember_mesh()
    return made


def vae_job(**settings: Any) -> VaeJob:
    file = FileIdentity(path="/models/vae.safetensors", size=1, mtime_ns=1)
    given, made = (1, 16, 1, 2, 2), (1, 3, 1, 16, 16)
    return VaeJob(id=new_job_id(), vae=(file,), encode=False, given=given, made=made, parallel=Parallel(**settings))


def test_each_job_has_the_kernels_that_it_asks_for(monkeypatch: pytest.MonkeyPatch):
    """Chosen once for those that ask for the same; what cannot run here is refused, whoever had the processes."""
    rank = session_of(None)
    asked: list[str] = []
    chosen = session.choose_kernel

    def choose(*how: Any) -> Any:
        asked.append(how[-1])
        kernel = chosen(*how)
        return kernel if how[-1] == "auto" else dataclasses.replace(kernel, function=lambda q, k, v: q)

    monkeypatch.setattr(session, "choose_kernel", choose)
    for attention, needed in (("auto", ["auto"]), ("auto", []), ("cpu", ["cpu"]), ("auto", ["auto"])):
        rank.begin(stub_job(gpu_count=1, attention=attention), None)  # type: ignore[arg-type]
        assert asked == needed
        asked.clear()
        assert rank.kernel.name == "cpu" and rank.experts._attention is rank.kernel.run
    with pytest.raises(JobError, match="needs a GPU"):
        rank.begin(stub_job(gpu_count=1, attention="cudnn"), None)  # type: ignore[arg-type]
    with pytest.raises(JobError, match="kernels is 'triton', which needs a GPU"):
        rank.begin(stub_job(gpu_count=1, kernels="triton"), None)  # type: ignore[arg-type]


def test_a_vae_is_read_again_where_it_is_to_compute_otherwise(monkeypatch: pytest.MonkeyPatch):
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(session, "import_diffusers", lambda: None)
    monkeypatch.setattr(session, "RankVae", lambda paths, **how: made.append(how) or object())
    rank, job = session_of(None), vae_job(gpu_count=1)
    assert rank.vae(job) is rank.vae(job) and len(made) == 1
    rank.vae_ops = "triton"
    rank.vae(job)
    monkeypatch.setattr(session.Session, "vae_dtype", lambda self, job: torch.bfloat16)
    rank.vae(job)
    assert [(how["ops"], how["dtype"]) for how in made] == [
        ("plain", torch.float32), ("triton", torch.float32), ("triton", torch.bfloat16),
    ]  # fmt: skip


def test_a_rank_has_its_own_part_of_the_tokens():
    grid = (3, 4, 5)
    rank = session_of(SimpleNamespace(ulysses_rank=1, ulysses_size=2, cfg_size=1))
    whole, part = SequenceShard(length=60), SequenceShard(length=60, rank=1, world=2)
    assert rank.shard(stub_job(gpu_count=2), grid) == part
    assert rank.shard(stub_job(gpu_count=2, use_ulysses=False, use_fsdp=True), grid) == whole
    assert session_of(None).shard(stub_job(gpu_count=1), grid) == whole


@pytest.mark.parametrize("world", [1, 2])
def test_where_attention_is_sparse_neighbours_follow_one_another(monkeypatch: pytest.MonkeyPatch, world: int):
    """Of a long video, whose steps are known; on one rank as on several."""
    monkeypatch.setattr("wan_pack.wan.model.sparse.LEAST_TOKENS", 60)
    entered: list[int] = []
    sparse = SimpleNamespace(steps=range(0), enter=entered.append)
    monkeypatch.setattr(session.Session, "sparse", sparse)
    mesh = SimpleNamespace(ulysses_rank=1, ulysses_size=2, cfg_size=1) if world == 2 else None
    rank, job = session_of(mesh), stub_job(gpu_count=world, steps=10)
    shard = rank.shard(job, (3, 4, 5))
    assert shard.order is not None and torch.equal(shard.order, block_order((3, 4, 5)))
    assert shard.world == world and entered == [0] and sparse.steps == sparse_steps(range(10), 10, 60) != range(0)
    assert rank.shard(job, (1, 4, 5)).order is None and not sparse.steps, "a short one"
    entered.clear()
    rank.shard(stub_job(gpu_count=world, steps=10, start_step=4), (3, 4, 5))
    assert entered == [4] and sparse.steps == sparse_steps(range(4, 10), 10, 60)
    entered.clear()
    assert rank.shard(vae_job(gpu_count=world), (3, 4, 5)).order is None and not entered


def test_how_latents_look_is_fitted_once_for_each_vae(monkeypatch: pytest.MonkeyPatch):
    read: list[list[str]] = []
    monkeypatch.setattr(session, "import_diffusers", lambda: None)
    monkeypatch.setattr(session, "load_vae", lambda files, **how: read.append(files) or files)
    monkeypatch.setattr(session, "preview_of_vae", lambda vae: object())
    rank, job = session_of(None), stub_job(gpu_count=1)
    assert rank.preview_map(job) is rank.preview_map(stub_job(gpu_count=1)) and read == [["/models/none.safetensors"]]
    other = dataclasses.replace(job.model, vae=(FileIdentity(path="/models/other.safetensors", size=1, mtime_ns=1),))
    first = rank.preview_map(job)
    assert rank.preview_map(dataclasses.replace(job, model=other)) is not first
    assert read[1:] == [["/models/other.safetensors"]]


@pytest.mark.parametrize(
    ("gpu_ids", "there", "count", "words"),
    [
        (("0", "1"), True, 1, "GPUs 0, 1 were chosen, but torch .* sees 1; the driver may be too old"),
        (("0",), False, 0, "GPUs 0 were chosen, but torch .* sees 0; the driver may be too old"),
        (("MIG-a", "MIG-b"), True, 1, "sees 1; CUDA shows a process one MIG slice only, .* set gpu_count to 1"),
        (("MIG-a",), True, 1, "sees 1; the driver may be too old"),
        (("MIG-a", "MIG-b"), False, 0, "sees 0; the driver may be too old"),
    ],
)
def test_gpus_that_torch_does_not_see_are_an_error(
    gpu_ids: tuple[str, ...], there: bool, count: int, words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    with pytest.raises(JobError, match=words):
        session._device(stub_job(gpu_count=len(gpu_ids), gpu_ids=gpu_ids))


def test_a_rank_takes_the_gpu_of_its_number_on_its_machine(monkeypatch: pytest.MonkeyPatch):
    taken: list[torch.device] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert session._device(stub_job(gpu_count=2, gpu_ids=("5", "7"))) == torch.device("cuda", rank)
    assert taken == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert session._device(stub_job(gpu_count=2)) == torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "others", "stops"),
    [(False, [b"\0", b"\0"], False), (True, [b"\1", b"\0"], True), (False, [b"\0", b"\1"], True), (True, None, True),
     (False, None, False)],
)  # fmt: skip
def test_all_ranks_stop_at_the_step_at_which_one_has_seen_the_request(
    asked: bool, others: list[bytes] | None, stops: bool, monkeypatch: pytest.MonkeyPatch
):
    told: list[bytes] = []
    monkeypatch.setattr(session, "gather_bytes", lambda mine, device: (told.append(mine), others)[1])
    rank = session_of(None if others is None else SimpleNamespace(cfg_size=1, group=None))
    folder: Any = SimpleNamespace(stop=SimpleNamespace(exists=lambda: asked))
    with pytest.raises(session.Stopped) if stops else contextlib.nullcontext():
        rank.check_stop(folder, stub_job(gpu_count=2, keep_warm_seconds=60.0))
    assert told == ([] if others is None else [b"\1" if asked else b"\0"])
    # Processes that end with their job are ended from outside.
    told.clear()
    rank.check_stop(folder, stub_job(gpu_count=2, keep_warm_seconds=0.0))
    assert told == []


@pytest.mark.parametrize("room", [True, False])
def test_a_vae_goes_before_the_models_where_there_is_no_room(room: bool, monkeypatch: pytest.MonkeyPatch):
    rank, calls = session_of(None), []
    rank.experts = SimpleNamespace(  # type: ignore[assignment]
        has_room=lambda needed, ranks: (calls.append((needed, ranks)), room)[1],
        make_room=lambda needed, **how: calls.append((needed, how, rank._vae is None)),
    )
    asked = 7, {"but": "a", "parks": True, "ranks": 4}
    rank._vae = None
    rank.make_room(7, but="a", parks=True)
    assert calls == [(*asked, True)]
    calls.clear()
    rank._vae = object()  # type: ignore[assignment]
    rank.make_room(7, but="a", parks=True)
    assert calls == [(7, 4), (*asked, not room)]


def test_a_rank_of_another_number_of_ranks_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(JobError, match="WORLD_SIZE is 3; the job was written for 2"):
        session.Session.of(stub_job(gpu_count=2))


def test_memory_of_a_gpu_is_told_in_gib(monkeypatch: pytest.MonkeyPatch):
    rank = session_of(None)
    assert rank.memory() == ""
    rank.device = torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 3 << 29)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 5 << 29)
    assert rank.memory() == ", GPU memory 1.50 GiB, peak 2.50 GiB"


def test_what_a_video_was_not_planned_with_goes_before_it_takes_memory(monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []
    rank = session_of(None)
    rank.experts = SimpleNamespace(  # type: ignore[assignment]
        keep_only=lambda model: done.append("only its own"), prepare=lambda parallel: done.append("laid"),
        park_later=lambda: done.append("parked"),
    )  # fmt: skip
    monkeypatch.setattr(rank.prompts, "drop", lambda: done.append("no prompts"))
    vae: Any = object()
    for parks, own in ((False, True), (True, False)):
        job = stub_job(gpu_count=1, offload_model=parks)
        rank._vae, rank._vae_made_of = vae, rank._vae_of(job) if own else ()
        rank._prepare(job)
        assert rank._vae is (vae if own else None)
        assert done == ["only its own", "laid", *(["no prompts", "parked"] if parks else [])]
        done.clear()
    rank._prepare(SimpleNamespace(parallel=Parallel(gpu_count=1, offload_model=True)))  # type: ignore[arg-type]
    assert done == ["laid"], "evaluations alone park nothing before they need it"
