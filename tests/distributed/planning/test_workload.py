"""What the planner counts of an expert's files: weights as they are kept, and LoRAs beside them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from checkpoint_formats import write_scaled
from mount import GOLDEN
from safetensors.torch import load_file, save_file
from tiny import random_weights
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.job.model_files import FileIdentity, LoraFile, ModelFiles
from wan_pack.distributed.job.sampling import Sampling
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.planning.gpu_memory import Workload
from wan_pack.distributed.planning.workload import workload_of, workload_of_forwards
from wan_pack.distributed.rank.expert import load_expert
from wan_pack.wan.model.config import WanConfig

CONFIG = WanConfig(dim=128, ffn_dim=256, num_heads=1, num_layers=2, in_dim=16, out_dim=16, text_dim=48, freq_dim=32)
FILES = {"bf16": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


def write(folder: Path, kind: str) -> ModelFiles:
    weights, dtype = random_weights(CONFIG), FILES[kind]
    if dtype is None:
        save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, folder / "m.safetensors")
    else:
        write_scaled(folder / "m.safetensors", weights, dtype, scale="weight_scale", per_row=True)
    lora = {}
    for layer in ("self_attn.q", "cross_attn.o"):
        lora |= {f"blocks.0.{layer}.lora_up.weight": torch.zeros(128, 8)}
        lora |= {f"blocks.0.{layer}.lora_down.weight": torch.zeros(8, 128)}
    save_file(lora, folder / "l.safetensors")
    files = (FileIdentity.of(folder / "m.safetensors"),)
    loras = (LoraFile(file=FileIdentity.of(folder / "l.safetensors"), strength=1.0),)
    return ModelFiles(high_noise=files, low_noise=(), vae=files, high_noise_loras=loras)


def counted(model: ModelFiles, parallel: Parallel, *, decode: bool = False) -> Workload:
    sampling = Sampling(width=64, height=64, num_frames=5, steps=2, seed=0)
    return workload_of(model, sampling, parallel, encodes_text=False, decode=decode)


@pytest.mark.parametrize("precision", ["full", "fp8", "int8"])
@pytest.mark.parametrize("kind", FILES)
def test_an_expert_takes_what_the_plan_counts(tmp_path: Path, kind: str, precision: str):
    model = write(tmp_path, kind)
    for loras in ("beside", "merged"):
        parallel = Parallel(gpu_count=1, linear_precision=precision, quantised_loras=loras)
        work = counted(model, parallel)
        expert = load_expert(
            [file.path for file in model.high_noise], [(lora.file.path, 1.0) for lora in model.high_noise_loras],
            parallel=parallel, mesh=None, shard=SequenceShard(length=4), device=torch.device("cpu"),
        )  # fmt: skip
        assert work.experts == (sum(parameter.nbytes for parameter in expert.parameters()),)
        blocks = [sum(parameter.nbytes for parameter in block.parameters()) for block in expert.blocks]
        assert work.block_bytes == max(blocks)


def test_int8_halves_the_blocks_and_counts_what_is_unpacked(tmp_path: Path):
    model = write(tmp_path, "int8")
    full, int8 = (counted(model, Parallel(gpu_count=1, linear_precision=how)) for how in ("full", "int8"))
    assert 0.5 < int8.block_bytes / full.block_bytes < 0.6
    assert int8.unpacked and not full.unpacked
    assert not counted(model, Parallel(gpu_count=1, linear_precision="fp8")).unpacked


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_exact_blocks_are_counted_as_the_file_has_them(tmp_path: Path, precision: str):
    """An expert takes what is counted, and one weight is unpacked at a time."""
    model = write(tmp_path, "bf16")
    ways = [
        Parallel(gpu_count=1, linear_precision=precision, exact_blocks=blocks, exact_steps=steps)
        for blocks, steps in (("", 0), ("0", 0), ("", 1))
    ]
    rounded, block, step = (counted(model, way) for way in ways)
    expert = load_expert(
        [file.path for file in model.high_noise], [(lora.file.path, 1.0) for lora in model.high_noise_loras],
        parallel=ways[1], mesh=None, shard=SequenceShard(length=4), device=torch.device("cpu"),
    )  # fmt: skip
    assert block.experts == (sum(parameter.nbytes for parameter in expert.parameters()),)
    assert block.experts[0] > rounded.experts[0] == step.experts[0]
    assert (rounded.unpacked, step.unpacked) == (precision == "int8", True)


def test_loras_beside_are_counted(tmp_path: Path):
    model = write(tmp_path, "fp8")
    beside, merged = (counted(model, Parallel(gpu_count=1, quantised_loras=how)) for how in ("beside", "merged"))
    assert beside.experts[0] - merged.experts[0] == 2 * (128 + 128) * 8 * 2


@pytest.mark.parametrize("scale", [1, 2])
def test_the_videos_size_is_counted_as_the_vae_makes_it(tmp_path: Path, scale: int):
    state = load_file(GOLDEN / "vae_wan21" / "vae" / "model.safetensors")
    for name in ("decoder.head.2.weight", "decoder.head.2.bias"):
        state[name] = state[name].repeat_interleave(scale**2, 0)
    save_file(state, tmp_path / "vae.safetensors")
    model = dataclasses.replace(write(tmp_path, "bf16"), vae=(FileIdentity.of(tmp_path / "vae.safetensors"),))
    assert counted(model, Parallel(gpu_count=1), decode=True).vae_upscale == scale
    assert counted(model, Parallel(gpu_count=1)).vae_upscale == 1


@pytest.mark.parametrize("larger", ["high_noise", "low_noise"])
def test_of_two_experts_the_larger_blocks_count(tmp_path: Path, larger: str):
    """One file in 8 bits, one in 16, either way round."""
    files = {}
    for kind in ("bf16", "fp8"):
        (tmp_path / kind).mkdir()
        files[kind] = write(tmp_path / kind, kind)
    alone = {kind: counted(dataclasses.replace(model, high_noise_loras=()), Parallel(gpu_count=1))
             for kind, model in files.items()}  # fmt: skip
    high, low = ("bf16", "fp8") if larger == "high_noise" else ("fp8", "bf16")
    model = ModelFiles(high_noise=files[high].high_noise, low_noise=files[low].high_noise, vae=files[high].vae)
    work = counted(model, Parallel(gpu_count=1))
    assert work.experts == (*alone[high].experts, *alone[low].experts)
    assert work.block_bytes == alone["bf16"].block_bytes > alone["fp8"].block_bytes
    assert work.outside_bytes == max(one.outside_bytes for one in alone.values())


@pytest.mark.parametrize(("channels", "by_frame"), [(16, False), (48, True)])
def test_evaluations_of_a_model_that_knows_frames_may_have_timesteps_by_frame(
    tmp_path: Path, channels: int, by_frame: bool
):
    """Then modulation takes six vectors for each token. Areas of odd sizes are padded to whole tokens."""
    config = dataclasses.replace(CONFIG, in_dim=channels, out_dim=channels)
    save_file(random_weights(config), tmp_path / "m.safetensors")
    files = (FileIdentity.of(tmp_path / "m.safetensors"),)
    for rows, columns in ((7, 10), (8, 9)):
        shape = 1, channels, 3, rows, columns
        work = workload_of_forwards(files, shape, Parallel(gpu_count=1), steps=4, guided=True)
        assert (work.given_frames, work.guided, work.decode) == (by_frame, True, False)
        assert work.tokens == 3 * 4 * 5
