"""One call of the VAE on one rank: what is asked of the VAE, where its parts go, and what makes room."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from wan_pack.distributed.job.job import JobError, Parallel
from wan_pack.distributed.machine.memory_file import MemoryFile
from wan_pack.distributed.planning.gpu_memory import VAE_FRAGMENTATION
from wan_pack.distributed.planning.vae_plan import held_bytes, working_bytes
from wan_pack.distributed.rank import vae_work
from wan_pack.distributed.rank.vae_work import VaeWork
from wan_pack.wan.vae.latents import denormalise

LATENTS, FRAMES = (2, 16, 3, 4, 4), (2, 3, 9, 32, 32)


class Vae:
    """Makes one frame, then four at a time, of different values; remembers what it is given."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []
        self.upscale = 1

    def splits(self, rows: int) -> bool:
        return True

    def decode(self, latents: Tensor, *, clamp: bool, at_once: int) -> list[Tensor]:
        assert not clamp and at_once == 6
        self.given.append(latents)
        number = len(self.given)
        parts = torch.full((3, 9, 32, 32), float(number)) + torch.arange(9.0)[None, :, None, None] / 10
        return list(parts.split((1, 4, 4), dim=1))

    def encode(self, frames: Tensor) -> Tensor:
        self.given.append(frames)
        return torch.full((1, 16, 3, 4, 4), 0.25 * len(self.given))


def work_with(vae: Vae, rank: int = 0, *, encode: bool = False) -> Any:
    work = object.__new__(VaeWork)
    work.rank = rank
    given, made = (FRAMES, LATENTS) if encode else (LATENTS, FRAMES)
    work.job = SimpleNamespace(given=given, made=made, encode=encode, parallel=Parallel(gpu_count=1))
    work.session = SimpleNamespace(
        vae=lambda job: vae,
        check_stop=lambda folder, job: None,
        device=torch.device("cpu"),
        group=None,
        vae_ops="plain",
    )
    work.folder = SimpleNamespace(stop=SimpleNamespace(exists=lambda: False))
    work.files = SimpleNamespace(progress=lambda *_: None)
    return work


def test_parts_follow_each_other_and_latents_are_normalised_for_the_vae() -> None:
    vae, given = Vae(), torch.randn(LATENTS)
    work, out = work_with(vae), torch.zeros(FRAMES)
    for number in range(2):
        work.decode(number, given[number], out[number])
        assert out[number, 0, :, 0, 0].tolist() == pytest.approx([number + 1 + i / 10 for i in range(9)])
        torch.testing.assert_close(denormalise(vae.given[number], 16)[0], given[number], rtol=1e-4, atol=1e-4)


def test_the_gpu_is_at_the_next_part_while_one_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """And ranks without a picture look for a cancel in the same places."""
    vae, happens = Vae(), []

    def decode(latents: Tensor, *, clamp: bool, at_once: int) -> Iterator[Tensor | None]:
        for number, frames in enumerate((1, 4, 4)):
            happens.append(f"begins {number}")
            # As a decoder on a GPU leaves it, in another order.
            made = torch.full((frames, 32, 32, 3), float(number)).permute(3, 0, 1, 2)
            yield made if work.rank == 0 else None

    def arriving(part: Tensor) -> Any:
        assert part.is_contiguous(), "a GPU puts pixels in order faster than a core"
        return SimpleNamespace(there=lambda: part)

    monkeypatch.setattr(vae, "decode", decode)
    monkeypatch.setattr(vae_work, "Arriving", arriving)
    for rank in (0, 1):
        work, out = work_with(vae, rank), torch.full(FRAMES, -1.0)
        work.session.check_stop = lambda folder, job: happens.append("looks")
        happens.clear()
        work.decode(0, torch.randn(16, 3, 4, 4), out[0])
        assert happens == ["begins 0", "begins 1", "looks", "begins 2", "looks", "looks"]
        assert out[0, 0, :, 0, 0].tolist() == ([0, *[1] * 4, *[2] * 4] if rank == 0 else [-1] * 9)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_encoded_is_comfyuis_latents_from_one_rank(rank: int) -> None:
    vae, frames, out = Vae(), torch.rand(FRAMES), torch.zeros(LATENTS)
    work_with(vae, rank, encode=True).encode(1, frames[1], out[1])
    assert torch.equal(vae.given[0], frames[1:])
    expected = denormalise(torch.full((1, 16, 3, 4, 4), 0.25), 16)[0] if rank == 0 else torch.zeros(16, 3, 4, 4)
    torch.testing.assert_close(out[1], expected)
    assert not out[0].any()


@pytest.mark.parametrize("encode", [False, True])
def test_what_lies_in_comfyuis_memory_is_read_as_it_was_written(encode: bool) -> None:
    """Frames for a GPU's VAE in bfloat16, with an odd number of them."""
    from wan_pack.distributed.job.job import FileIdentity, Parallel, VaeJob

    given, made = ((1, 3, 1, 5, 7), LATENTS[1:]) if encode else (LATENTS, FRAMES)
    work, memory = object.__new__(VaeWork), MemoryFile("test")
    file = FileIdentity(path="/models/vae.safetensors", size=1, mtime_ns=1)
    parallel = Parallel(gpu_count=1, gpu_ids=("0",))
    made = (given[0], *made[-4:])
    work.job = VaeJob(id="0f", vae=(file,), encode=encode, given=given, made=made, parallel=parallel)
    work.folder = SimpleNamespace(pictures="", read_json=lambda path: {"memory": str(memory.path)})  # type: ignore
    before, behind = work.job.memory
    values = torch.randn(given).to(torch.bfloat16 if encode else torch.float32)
    memory.map(behind.stop)[before] = values.view(-1).view(torch.uint8).numpy().tobytes()
    seen, place = work.opened()
    assert torch.equal(seen, values) and seen.dtype == values.dtype
    assert place.shape == made and place.dtype == torch.float32 and not place.any()


def test_frames_of_another_size_or_too_few_are_an_error() -> None:
    work = work_with(Vae())
    with pytest.raises(JobError, match=r"the VAE made \[3, 1, 32, 32\]; ComfyUI expects \[3, 1, 16, 16\]"):
        work.decode(0, torch.randn(16, 3, 4, 4), torch.zeros(3, 9, 16, 16))
    with pytest.raises(JobError, match="the VAE made 9 frames; ComfyUI expects 13"):
        work.decode(0, torch.randn(16, 3, 4, 4), torch.zeros(3, 13, 32, 32))


@pytest.mark.parametrize(("held", "ops", "kernels"), [(False, "triton", 1), (True, "triton", 1), (True, "plain", 1.3)])
def test_models_make_room_for_the_work_and_for_a_vae_that_is_not_there_yet(
    held: bool, ops: str, kernels: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wan_pack.distributed.job.job import FileIdentity, Parallel, VaeJob

    file = FileIdentity(path="/models/vae.safetensors", size=1, mtime_ns=1)
    job = VaeJob(id="0f", vae=(file,), encode=False, given=LATENTS, made=FRAMES, parallel=Parallel(gpu_count=1))
    asked: list[int] = []

    class Enough(Exception):
        """All that is looked at has happened."""

    def make_room(needed: int, **how: Any) -> None:
        asked.append(needed)
        raise Enough

    work = object.__new__(VaeWork)
    work.rank, work.job, work.phase_seconds = 0, job, {}
    experts = SimpleNamespace(make_room=make_room)
    work.session = SimpleNamespace(world=1, experts=experts, holds_vae=lambda job: held, vae_ops=ops, memory=lambda: "")
    work.files = SimpleNamespace(progress=lambda *_, **__: None, say=lambda text: None)
    work.folder = SimpleNamespace(job=SimpleNamespace(read_bytes=lambda: b""))
    monkeypatch.setattr(VaeWork, "begin", lambda work: None)
    monkeypatch.setattr(VaeWork, "check_all_have", lambda work, digest, other: None)
    monkeypatch.setattr(VaeWork, "opened", lambda work: (torch.zeros(0), torch.zeros(0)))
    with pytest.raises(Enough):
        work.run()
    # Of one frame at a time, with what lies between its tensors; kernels that are not fused leave more of those alive.
    working = int(working_bytes(job, 1) * (1 + VAE_FRAGMENTATION) * kernels)
    assert asked == [working + (0 if held else held_bytes(job))] and 0 < working_bytes(job, 1) < working_bytes(job)
    assert held_bytes(job) > 0
    assert vae_work.held_bytes is held_bytes


@pytest.mark.parametrize("split", [True, False])
def test_a_decode_is_told_in_frames_of_all_videos_and_stops_between_two_parts(split: bool) -> None:
    """Where one rank decodes alone it stops by itself: the others wait for it behind the loop."""
    vae, told, looks = Vae(), [], []
    work, out = work_with(vae), torch.zeros(FRAMES)
    vae.splits = lambda rows: (looks.append(rows), split)[1]  # type: ignore[method-assign]
    work.files = SimpleNamespace(progress=lambda *given: told.append(given))
    work.session.check_stop = lambda folder, job: looks.append("all")
    work.decode(1, torch.randn(16, 3, 4, 4), out[1])
    assert told == [("decode", done, 18) for done in (9, 10, 14, 18)]
    assert looks == [4, *["all"] * 3 * split]
    told.clear()
    work.folder = SimpleNamespace(stop=SimpleNamespace(exists=lambda: True))
    work.decode(0, torch.randn(16, 3, 4, 4), out[0])
    assert told == [("decode", done, 18) for done in ((0, 1, 5, 9) if split else (0, 1))]


def test_what_is_encoded_is_told_video_by_video() -> None:
    told: list[tuple[Any, ...]] = []
    work = work_with(Vae(), encode=True)
    work.files = SimpleNamespace(progress=lambda *given: told.append(given))
    work.encode(1, torch.rand(FRAMES[1:]), torch.zeros(LATENTS[1:]))
    assert told == [("encode", 1, 2), ("encode", 2, 2)]
    with pytest.raises(JobError, match=r"the VAE made \[16, 3, 4, 4\]; ComfyUI expects \[16, 3, 4, 5\]"):
        work.encode(0, torch.rand(FRAMES[1:]), torch.zeros(16, 3, 4, 5))


@pytest.mark.parametrize("encode", [False, True])
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_a_call_goes_through_its_phases_video_by_video(
    rank: int, world: int, encode: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    happens: list[Any] = []
    given, made = torch.arange(2.0), torch.arange(2.0) + 5
    work: Any = object.__new__(VaeWork)
    work.rank, work.phase_seconds = rank, {}
    shapes = (FRAMES, LATENTS) if encode else (LATENTS, FRAMES)
    parallel = Parallel(gpu_count=world)
    work.job = SimpleNamespace(given=shapes[0], made=shapes[1], encode=encode, parallel=parallel, files=())
    experts = SimpleNamespace(make_room=lambda needed, **how: happens.append(how))
    work.session = SimpleNamespace(
        vae_ops="triton",
        world=world, experts=experts, holds_vae=lambda job: rank == 1, memory=lambda: "",
        vae=lambda job: happens.append("VAE"), check_stop=lambda folder, job: happens.append("looks"),
    )  # fmt: skip
    work.files = SimpleNamespace(
        progress=lambda phase, *_, message: happens.append((phase, message)), say=happens.append
    )  # fmt: skip
    work.folder = SimpleNamespace(result="result", write_json=lambda *written: happens.append(written))
    for name in ("begin", "check_same_job"):
        setattr(work, name, lambda name=name: happens.append(name))
    work.opened = lambda: (given, made)
    for name in ("encode", "decode"):
        setattr(work, name, lambda number, one, out, name=name: happens.append((name, number, one + out)))
    for name in ("working_bytes", "held_bytes"):
        monkeypatch.setattr(vae_work, name, lambda *_: 1)
    monkeypatch.setattr(vae_work, "gather_peaks", lambda session: "peaks")
    monkeypatch.setattr(vae_work, "result_of", lambda job, session, **told: told)
    work.run()
    name = "encode" if encode else "decode"
    assert happens[:10] == [
        ("start", "" if world == 1 else "connecting the processes"), "begin", "check_same_job", ("load", ""),
        "loading the VAE" if rank == 0 else "", {"but": "", "parks": False, "ranks": world}, "VAE", (name, ""),
        (name, 0, 5.0), "looks",
    ]  # fmt: skip
    told = {"phases": work.phase_seconds, "step_seconds": [], "peaks": "peaks"}
    assert happens[10:] == [(name, 1, 7.0), "looks", *([("result", told)] if rank == 0 else [])]
