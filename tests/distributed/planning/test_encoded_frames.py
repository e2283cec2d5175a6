"""Frames that the VAE encodes before a video is denoised: counted by the plan, as many as there are."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from node_inputs import asked_for, sampling, use_model_folders
from plan_inputs import A14B, workload
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.planning import gpu_memory as memory
from wan_pack.distributed.planning import workload as workload_module
from wan_pack.distributed.planning.gpu_memory import estimate
from wan_pack.distributed.planning.plan import DoesNotFit, as_set
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.inference import planning
from wan_pack.wan.model.variants import VARIANTS

PICTURE, VIDEO = torch.zeros(1, 48, 64, 3), torch.zeros(5, 48, 64, 3)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a plan is told of its work, by those who ask for one."""
    use_model_folders(tmp_path, monkeypatch)
    told: dict[str, Any] = {}
    monkeypatch.setattr(workload_module, "workload_of", lambda *_, **sizes: told.update(sizes))
    ground = SimpleNamespace(plan=lambda work, request: as_set(Parallel(gpu_count=1), "of a test"))
    monkeypatch.setattr(planning, "ground_for", lambda *_, **__: ground)
    monkeypatch.setattr(planning, "shown", lambda plan, status: plan.parallel)
    return told


def streamed(**more: Any) -> Parallel:
    """Weights that leave the VAE to be what takes most."""
    return Parallel(gpu_count=1, stream_blocks=True, offload_model=True, memory_optimization=True, **more)


def test_the_fuller_of_encoding_and_decoding_counts():
    """What is decoded needs no frames at once, but works on more of them; two thousand frames to encode pass that."""
    size = {"width": 1280, "height": 720}
    few, many = (workload(encode_frames=frames, **size) for frames in (81, 2001))
    decoding = estimate(workload(encode_frames=0, **size), streamed()).vae
    assert estimate(few, streamed()).vae == decoding > memory.vae_encode_bytes(few, streamed())
    assert estimate(many, streamed()).vae == memory.vae_encode_bytes(many, streamed()) > decoding
    alone = workload(encode_frames=2001, decode=False, **size)
    assert estimate(alone, streamed()).vae == memory.vae_encode_bytes(many, streamed())


def test_each_rank_has_its_rows_of_frames_and_numbers_as_wide_as_the_vaes():
    one, more = workload(encode_frames=1), workload(encode_frames=81)
    for gpus, precision, width in ((1, "bf16", 1), (4, "bf16", 1), (4, "fp32", 2)):
        parallel = Parallel(gpu_count=gpus, mixed_precision=precision)
        found = memory.vae_encode_bytes(more, parallel) - memory.vae_encode_bytes(one, parallel)
        assert found == 80 * memory.ENCODER_PIXEL_BYTES[16][1] * 832 * 480 // gpus * width


def test_a_group_that_stays_encodes_beside_its_weights():
    work = workload(encode_frames=2001, decode=False)
    cold, warm = (estimate(work, Parallel(gpu_count=1, keep_warm_seconds=seconds)) for seconds in (0.0, 60.0))
    assert warm.weights == 2 * A14B[0] and warm.vae == memory.vae_encode_bytes(work, Parallel(gpu_count=1))
    assert cold.total < warm.total


@pytest.mark.parametrize(
    ("variant", "given", "frames"),
    [
        ("T2V", {}, 0),
        ("I2V", {"start_image": PICTURE}, 81),
        ("I2V", {"end_image": PICTURE}, 81),
        ("I2V", {"image_embeds": {}}, 0),
        ("TI2V-5B", {"start_image": PICTURE}, 1),
        ("TI2V-5B", {}, 0),
        ("VACE", {"control_video": VIDEO}, 81),
        ("VACE", {"reference_images": PICTURE}, 81),
        ("VACE", {}, 81),
        ("VACE", {"carried": True}, 0),
        ("Fun-Control", {"control_video": VIDEO}, 81),
        ("Fun-Control", {"start_image": PICTURE}, 1),
        ("Fun-Control", {"reference_images": PICTURE}, 1),
        ("Fun-Control", {}, 0),
    ],
)
@pytest.mark.parametrize("decode", [True, False])
def test_the_plan_is_told_of_what_the_inputs_have_encoded(
    variant: str,
    given: dict[str, Any],
    frames: int,
    decode: bool,
    monkeypatch: pytest.MonkeyPatch,
    told: dict[str, Any],
):
    monkeypatch.setattr(planning, "_request", lambda *_: SimpleNamespace(base=Parallel(gpu_count=1)))
    carried = {"vace_context": torch.zeros(1, 96, 21, 6, 8)} if given.get("carried") else {}
    asked = asked_for(decode_video=decode, **{name: value for name, value in given.items() if name != "carried"})
    planning.planned(
        asked, lambda: Parallel(gpu_count=1), SimpleNamespace(clip_vision=()), sampling(num_frames=81),  # type: ignore[arg-type]
        config=SimpleNamespace(variant=VARIANTS[variant]),  # type: ignore[arg-type]
        control=carried, encodes_text=False, status=Status(),
    )  # fmt: skip
    assert (told["encode_frames"], told["decode"]) == (frames, decode)


@pytest.mark.parametrize(
    ("variant", "given", "clip", "expected"),
    [
        ("T2V", {}, (), {"encodes_text": False, "looks": False, "given_frames": False, "controls": 0, "references": 0}),
        ("I2V", {"start_image": PICTURE}, ("clip",), {"looks": True, "given_frames": False}),
        ("TI2V-5B", {"start_image": PICTURE}, (), {"given_frames": True}),
        ("TI2V-5B", {"end_image": PICTURE}, (), {"given_frames": False}),
        ("VACE", {"reference_images": PICTURE}, (), {"controls": 1, "references": 1}),
        ("Fun-Control", {"reference_images": PICTURE}, (), {"controls": 0, "references": 1}),
        ("Fun-Control", {}, (), {"controls": 0, "references": 0}),
        ("Animate", {}, (), {"controls": 0, "references": 1}),
        ("T2V", {"encodes": True}, (), {"encodes_text": True}),
    ],
)
def test_the_plan_is_told_of_what_else_runs(
    variant: str, given: dict[str, Any], clip: tuple[str, ...], expected: dict[str, Any], told: dict[str, Any]
):
    asked = asked_for(**{name: value for name, value in given.items() if name != "encodes"})
    planning.planned(
        asked, lambda: Parallel(gpu_count=1), SimpleNamespace(clip_vision=clip, low_noise=(), high_noise=()),  # type: ignore[arg-type]
        sampling(), config=SimpleNamespace(variant=VARIANTS[variant]),  # type: ignore[arg-type]
        control={}, encodes_text="encodes" in given, status=Status(),
    )  # fmt: skip
    assert {name: told[name] for name in expected} == expected


@pytest.mark.parametrize("given", ["", "samples", "image_embeds", "camera_conditions", "control", "too small", "off"])
def test_a_video_is_made_smaller_where_nothing_has_a_size_of_its_own(
    given: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
):
    use_model_folders(tmp_path, monkeypatch)
    planned: list[tuple[int, int]] = []

    def plan(work: Any, request: Any) -> Any:
        planned.append((work.width, work.height))
        if len(planned) == 1:
            raise DoesNotFit("does not fit", None if given == "too small" else (48, 32))
        return as_set(Parallel(gpu_count=1), "of a test")

    monkeypatch.setattr(workload_module, "workload_of", lambda *_, **__: workload(width=64, height=48))
    monkeypatch.setattr(planning, "ground_for", lambda *_, **__: SimpleNamespace(plan=plan))
    monkeypatch.setattr(planning, "shown", lambda plan, status: plan.parallel)
    asked = asked_for(dynamic_resolution=given != "off", **({given: {}} if given[:1] in "si" and given else {}))
    asked = dataclasses.replace(asked, camera_conditions=PICTURE if given == "camera_conditions" else None)
    status = Status()
    ask = functools.partial(
        planning.planned, asked, lambda: Parallel(gpu_count=1),
        SimpleNamespace(clip_vision=(), low_noise=(), high_noise=()),
        sampling(), config=SimpleNamespace(variant=VARIANTS["VACE"]), encodes_text=False, status=status,
        control={"vace_context": torch.zeros(1, 96, 2, 6, 8)} if given == "control" else {},
    )  # fmt: skip
    if given:
        with pytest.raises(DoesNotFit, match="does not fit"):
            ask()
        assert planned == [(64, 48)] and status.warnings == []
    else:
        _, lowered = ask()
        assert planned == [(64, 48), (48, 32)] and (lowered.width, lowered.height) == (48, 32)
        assert status.warnings == ["dynamic_resolution lowered the video from 64x48 to 48x32, the largest that fits"]
