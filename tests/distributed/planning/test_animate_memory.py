"""What Animate takes beside the rest, at the size of the release."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_inputs import workload
from tiny import TINY_ANIMATE, random_weights, write_official
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.job.model_files import FileIdentity
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.planning import gpu_memory as memory
from wan_pack.distributed.planning.workload import workload_of_forwards
from wan_pack.distributed.rank.expert import load_expert
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


def test_what_is_streamed_is_planned_so(tmp_path: Path):
    """Attention to a face waits in the host's memory as the blocks do."""
    folder = write_official(tmp_path / "m", random_weights(TINY_ANIMATE), TINY_ANIMATE)
    file = folder / "diffusion_pytorch_model.safetensors"
    parallel = Parallel(gpu_count=1, mixed_precision="fp32", stream_blocks=True)
    work = workload_of_forwards((FileIdentity.of(file),), (1, 36, 3, 6, 10), parallel, steps=1, guided=False)
    held: list[Any] = []
    model = load_expert(
        [str(file)], parallel=parallel, mesh=None, shard=SequenceShard(length=45), device=torch.device("cpu"),
        on_weights=held.append,
    )  # fmt: skip
    adapter = sum(parameter.nbytes for parameter in model.face_adapter.parameters())
    others = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "img_emb", "head")
    others += ("pose_patch_embedding", "motion_encoder", "face_encoder")
    outside = sum(parameter.nbytes for name in others for parameter in model.get_submodule(name).parameters())
    assert work.outside_bytes == outside and work.experts[0] > outside + adapter
    # Beginnings of tensors are aligned.
    assert 0 <= held[0].resident_bytes - memory.weights_at_rest(work, parallel) < 0.02 * work.experts[0] < adapter
