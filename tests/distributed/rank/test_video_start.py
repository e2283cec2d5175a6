"""What a video starts from: its schedule, and its pictures, encoded while weights are read, where both have room."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import stub_job
from safetensors.torch import save_file
from tiny import TINY
from torch import Tensor
from wan_pack.distributed.job.input_tensors import CLIP_FEATURES, CLIP_PICTURES
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank import video_start, video_work
from wan_pack.distributed.rank.signs import RankFiles
from wan_pack.distributed.rank.video_start import VideoStart
from wan_pack.distributed.rank.video_work import VideoWork
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.patch import patchify
from wan_pack.wan.sampling.denoise import Guidance, draw_noise
from wan_pack.wan.sampling.schedule import make_solver
from wan_pack.wan.transformer.conditions import Conditions

I2V = replace(TINY, in_dim=36)
PICTURE = {"start_image": torch.zeros(3, 48, 64)}
SHAPES = {"blocks.0.ffn.0.weight": (1 << 12, 1 << 12), "head.head.bias": (64,)}
WEIGHTS = int(((1 << 24) + 64) * 2 * 1.05)
"""Bytes of an expert in bf16."""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    encoded: list[tuple[int, ...]] = []

    class Vae:
        def encode(self, video: Tensor) -> Tensor:
            encoded.append(tuple(video.shape))
            return torch.ones(1, 16, 2, 6, 8)

    def made(
        free: int, *, config: WanConfig = I2V, inputs: Any = PICTURE, held: Any = (), **settings: Any
    ) -> VideoStart:
        monkeypatch.setattr(video_start, "free_bytes", lambda device, ranks: free)
        session = SimpleNamespace(
            experts=SimpleNamespace(models=dict.fromkeys(held)), group=None, device=torch.device("cpu"),
            vae=lambda job: Vae(),
        )  # fmt: skip
        checkpoint: Any = SimpleNamespace(config=config, shapes=SHAPES)
        job = stub_job(gpu_count=1, mixed_precision="bf16", **settings)
        found = VideoStart(
            job, session, RankFiles(JobDir(tmp_path), 0), checkpoint, inputs, torch.zeros(16, 2, 6, 8), 1.0
        )
        found.encoded = encoded  # type: ignore[attr-defined]
        return found

    return made


ROOM = 1 << 40


def test_pictures_wait_for_the_reading_that_is_to_come(start: Any):
    assert start(ROOM).waits_for_reading(2)


def test_without_room_for_all_at_once_they_come_first(start: Any):
    """Frames and weights: of both experts, unless one of them waits elsewhere."""
    fits = next(size for size in range(0, ROOM, 1 << 20) if start(size).waits_for_reading(0))
    assert fits >= 5 * 64 * 48 * 3 * 4
    assert not start(fits + WEIGHTS - (1 << 20)).waits_for_reading(1)
    assert start(fits + WEIGHTS).waits_for_reading(1)
    assert not start(fits + WEIGHTS).waits_for_reading(2)
    assert start(fits + 2 * WEIGHTS).waits_for_reading(2)
    assert start(fits + WEIGHTS, offload_model=True).waits_for_reading(2)


@pytest.mark.parametrize("name", ["start_image", "end_image", "control_video", "reference_images"])
def test_every_picture_that_the_vae_encodes_may_wait_and_nothing_else(start: Any, name: str):
    assert start(ROOM, inputs={name: torch.zeros(3, 48, 64)}).waits_for_reading(1)
    assert not start(ROOM, inputs={"context": torch.zeros(1)}).waits_for_reading(1)


@pytest.mark.parametrize(
    "case",
    [
        {"inputs": {}},
        {"held": ("high_noise",)},
        {"config": replace(I2V, parts=frozenset({"ref_conv"}))},
    ],
    ids=["no pictures", "nothing to read", "a picture in front"],
)
def test_nothing_waits_in_vain(start: Any, case: dict[str, Any]):
    assert not start(ROOM, **case).waits_for_reading(1)


def test_they_are_encoded_once(start: Any):
    video = start(ROOM)
    grid = video.grid()
    first = video.conditioning()
    assert video.conditioning() is first and video.encoded == [(1, 3, 5, 48, 64)]
    assert video.grid() == grid == (2, 3, 4)
    assert first.conditions.image is not None and first.conditions.image[4:].mean() == 1


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_one_rank_looks_at_the_pictures_and_all_have_what_it_saw(
    start: Any, rank: int, ranks: int, monkeypatch: pytest.MonkeyPatch
):
    pictures, sent, asked = torch.zeros(2, 3, 8, 8), [], []
    config = replace(I2V, parts=frozenset({"img_emb"}), clip_dim=4)
    video = start(ROOM, config=config, inputs={CLIP_PICTURES: pictures})
    seen = torch.arange(2 * 257 * 4.0).view(-1, 4)

    def features(paths: Any, given: Tensor, *, version: Any, say: Any) -> Tensor:
        asked.append((paths, given is pictures, version))
        return seen

    session = video._session
    session.rank, session.mesh = rank, None if ranks == 1 else object()
    session.pictures = SimpleNamespace(features=features)
    monkeypatch.setattr(video_start.dist, "broadcast", lambda rows, *, src: sent.append((rows.clone(), src)))
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(video_start, "build_conditioning", lambda inputs, noise, **how: made.append(inputs | how))
    video.look()
    files = video._job.model.clip_vision
    assert asked == ([([file.path for file in files], True, files)] if rank == 0 else [])
    kept = seen if rank == 0 else torch.zeros_like(seen)
    assert len(sent) == ranks - 1 and all(torch.equal(rows, kept) and src == 0 for rows, src in sent)
    video.conditioning()
    assert torch.equal(made[0][CLIP_FEATURES], kept) and made[0]["sigma"] == 1.0 and made[0]["num_frames"] == 5
    assert made[0]["variant"] is config.variant and made[0]["add_noise"] is video._job.sampling.add_noise
    other = start(ROOM)
    other.look()
    assert len(asked) == (rank == 0), "nothing came for it"


@pytest.mark.parametrize(("settings", "sigma"), [({}, 1.0), ({"start_step": 2}, None)])
def test_a_video_is_prepared_by_its_schedule(
    settings: dict[str, Any], sigma: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole one starts from pure noise; a part of one where its first step does."""
    sampling = {"steps": 6, "seed": 77, "solver": "euler", "shift": 3.0, "guidance_low": 1.5, "guidance_high": 2.5}
    job = stub_job(gpu_count=1, boundary=0.7, **sampling, **settings)
    made: list[Any] = []
    checkpoint = SimpleNamespace(config="config")
    monkeypatch.setattr(video_work, "Checkpoint", lambda files: (made.append(files), checkpoint)[1])
    monkeypatch.setattr(video_work, "latents_shape", lambda *of: (made.append(of), (16, 2, 6, 8))[1])
    monkeypatch.setattr(video_work, "VideoStart", lambda *of: (made.append(of), "start")[1])
    work = object.__new__(VideoWork)
    work.job, work.session, work.files, work.folder = job, "session", "files", JobDir(tmp_path)  # type: ignore
    for given in ({}, {"context": torch.zeros(3, 4)}):
        if given:
            save_file(given, work.folder.inputs)
        work.prepare()
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        assert made[:2] == [[file.path for file in job.model.transformer], (job, "config", shapes)]
        assert work.inputs.keys() == given.keys()
        first = work.solver.sigmas[2] if sigma is None else sigma
        assert 0 < first <= 1 and made[2][:4] == (job, "session", "files", checkpoint)
        assert made[2][4] is work.inputs and made[2][5] is work.noise and made[2][6] == first
        assert torch.equal(work.noise, draw_noise((16, 2, 6, 8), 77)) and work.start == "start"
        made.clear()
    assert work.steps == job.sampling.step_range and work.steps.start == settings.get("start_step", 0)
    solver = make_solver("euler", 6, 3.0, work.steps.start)
    assert list(work.solver.timesteps) == list(solver.timesteps) and type(work.solver) is type(solver)
    assert work.guidance == Guidance(low=1.5, high=2.5, boundary=0.7)
    work.job = replace(job, model=replace(job.model, low_noise=()))
    work.prepare()
    assert work.guidance.only == "high_noise"


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("parks", [True, False])
@pytest.mark.parametrize("ranks", [1, 2])
def test_all_that_a_video_has_reaches_its_steps(
    given: bool, parks: bool, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts, conditions and frames that are given; afterwards experts go where the processes do."""
    seen: dict[str, Any] = {}
    shard = SequenceShard(length=12)
    job = replace(
        stub_job(gpu_count=ranks, offload_model=parks, memory_optimization=given, reuse_threshold=0.25), preview=given
    )
    work = object.__new__(VideoWork)
    work.job, work.rank, work.device, work.phase_seconds = job, 0, torch.device("cpu"), {}
    work.step_seconds, work.steps, work._preview_map = [], job.sampling.step_range, None
    work.solver, work.guidance = SimpleNamespace(timesteps=[900.0] * 4), "guidance"  # type: ignore[assignment]
    latents = torch.randn(16, 3, 4, 4)
    known = torch.ones(16, 3, 4, 4) if given else None
    mask = torch.zeros(1, 3, 4, 4, dtype=torch.bool) if given else None
    conditions = Conditions()
    conditioning = SimpleNamespace(conditions=conditions, latents=latents, known=known, known_mask=mask)
    work.start = SimpleNamespace(grid=lambda: (3, 2, 2), conditioning=lambda: conditioning)  # type: ignore[assignment]
    cache = SimpleNamespace(
        models="models", weights="weights", drop=lambda: seen.update(dropped=True),
        load=lambda *of: seen.update(load=of),
    )  # fmt: skip
    mesh = None if ranks == 1 else SimpleNamespace(ulysses_group="row")
    kernel = SimpleNamespace(activate=contextlib.nullcontext)
    work.session = SimpleNamespace(  # type: ignore[assignment]
        shard=lambda of, grid: (seen.update(shard=(of, grid)), shard)[1], experts=cache, mesh=mesh, kernel=kernel,
        group="all", memory=lambda: "", preview_map=lambda of: "map",
    )  # fmt: skip
    work.files = SimpleNamespace(  # type: ignore[assignment]
        say=lambda text: None, span=contextlib.nullcontext, progress=lambda *_, **__: None
    )
    work.folder = SimpleNamespace(preview="preview.jpg")  # type: ignore[assignment]
    predictor = SimpleNamespace(predict="predict", release=lambda: seen.update(released=True))
    monkeypatch.setattr(video_work, "VelocityPredictor", lambda *of, **how: (seen.update(of=of, how=how), predictor)[1])
    reused = SimpleNamespace(reused=[3])
    monkeypatch.setattr(video_work, "StepCache", lambda *of, **how: (seen.update(cache=(of, how)), reused)[1])
    monkeypatch.setattr(video_work, "PreviewWriter", lambda *of, **how: (seen.update(preview=(of, how)), "shows")[1])
    monkeypatch.setattr(
        video_work, "denoise", lambda tokens, **how: (seen.update(start=tokens, steps=how), 2 * tokens)[1]
    )
    monkeypatch.setattr(SequenceShard, "gather", lambda self, tokens, group: (seen.update(group=group), tokens)[1])
    work.needed = lambda: ["high_noise"]  # type: ignore[method-assign]
    found = work.denoised("texts")  # type: ignore[arg-type]
    torch.testing.assert_close(found, 2 * latents)
    group = None if ranks == 1 else "row"
    assert seen["shard"] == (job, (3, 2, 2)) and seen["group"] == group and seen["released"] and seen["dropped"]
    names, wanted, parallel, over, tokens, say, beside = seen["load"]
    assert (names, parallel, over, tokens, say) == (["high_noise"], job.parallel, mesh, shard, work.files.say)
    assert wanted == {name: job.model.expert(name) for name in ("high_noise", "low_noise")}
    assert beside.span is work.files.span and beside.use.keywords == {"shard": shard}
    how = seen["how"]
    assert seen["of"] == ("models", "texts") and (how["grid"], how["shard"], how["mesh"]) == ((3, 2, 2), shard, mesh)
    assert how["keep_text"] is not given and how["weights"] == ("weights" if parks else {})
    assert how["arrive"] == work.arrive and how["conditions"] == conditions and how["rounded"] is not None
    assert seen["cache"][0] == ("predict",)
    assert {**seen["cache"][1], "mean": 0} == {"threshold": 0.25, "steps": range(4), "schedule_steps": 4, "mean": 0}
    assert seen["cache"][1]["mean"].keywords == {"shard": shard, "group": "all"}
    assert torch.equal(seen["start"], patchify(latents)) and work.reused == [3]
    told = seen["steps"]
    assert (told["solver"], told["guidance"], told["predict"]) == (work.solver, "guidance", reused)
    assert (told["steps"], told["on_step"]) == (range(4), work.on_step)
    assert told["on_estimate"] == ("shows" if given else None)
    if not given:
        assert told["known"] is how["which_timestep"] is None
        return
    assert seen["preview"][0] == ("preview.jpg",)
    shown = {"preview_map": "map", "grid": (3, 2, 2), "shard": shard, "group": group, "steps": 4}
    assert seen["preview"][1] == shown
    assert torch.equal(told["known"].tokens, torch.ones(12, 64)) and not told["known"].mask.any()
    assert told["known"].mask.shape == (12, 64) and torch.equal(how["which_timestep"], told["known"].which_timestep)
