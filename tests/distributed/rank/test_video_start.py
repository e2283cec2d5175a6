"""When pictures are encoded: while weights are read, where both have room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import stub_job
from tiny import TINY
from torch import Tensor
from wan_pack.distributed.job.input_tensors import CLIP_FEATURES, CLIP_PICTURES
from wan_pack.distributed.job.job_folder import JobDir
from wan_pack.distributed.rank import video_start
from wan_pack.distributed.rank.signs import RankFiles
from wan_pack.distributed.rank.video_start import VideoStart
from wan_pack.wan.model.config import WanConfig

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
