"""What Animate takes beside the rest, at the size of the release."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plan_inputs import workload
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.planning import gpu_memory as memory
from wan_pack.wan.model.variants import VARIANTS
from wan_pack.wan.transformer.motion_encoder import MotionEncoder
from wan_pack.wan.transformer.transformer import meta_model

GB = 1e9


def of_animate() -> memory.Workload:
    plain = workload(experts=1)
    parts = VARIANTS["Animate"].parts
    return replace(plain, config=replace(plain.config, in_dim=36, parts=parts, face_blocks=8), references=1)


def test_the_release_has_as_many_parameters_as_its_file():
    """34.5 GB in bf16. The face's convolutions are kept in float32."""
    model = meta_model(of_animate().config, torch.bfloat16)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert 2 * sum(sizes.values()) == pytest.approx(34.5 * GB, rel=0.002)
    assert sum(size for name, size in sizes.items() if name.startswith("face_adapter.")) == 8 * (
        4 * 5120**2 + 4 * 5120 + 2 * 128
    )


def test_a_gpu_holds_few_of_the_adapters_blocks_where_blocks_are_streamed_or_gathered():
    """They are 1.7 of the 2.7 GB that are no main blocks."""
    model = meta_model(of_animate().config, torch.bfloat16)
    held = {id(parameter) for unit in model.units for parameter in unit.parameters()}
    outside = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in held)
    assert outside == pytest.approx(0.98 * GB, rel=0.01)


def test_a_face_is_encoded_before_the_blocks_run():
    """It counts where a video is small; a large one's blocks take more."""
    large = of_animate()
    plain = replace(large, config=replace(large.config, parts=frozenset({"img_emb"})))
    alone = Parallel(gpu_count=1)
    assert memory.activation_bytes(large, alone) == memory.activation_bytes(plain, alone)
    small = replace(large, width=64, height=64, num_frames=5)
    tokens = 3 * 16
    assert memory.activation_bytes(small, alone) == memory.FACE_BYTES + 4 * tokens * 5120


def test_a_face_takes_what_is_counted():
    """Of tensors on the CPU, by torch's own count of what is held at a time."""
    encoder = MotionEncoder(of_animate().config).requires_grad_(False)
    for parameter in encoder.parameters():
        parameter.zero_()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as seen, torch.no_grad():
        encoder(torch.zeros(1, 3, 512, 512))
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 0.5 * memory.FACE_BYTES < 4 * most <= memory.FACE_BYTES, 4 * most / memory.FACE_BYTES
