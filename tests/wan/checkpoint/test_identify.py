"""Models told apart by names: of tensors, of files and of folders."""

from __future__ import annotations

import pytest
from wan_pack.wan.files.identify import noise_side

HIGH = (
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors",
    "Wan2_2-T2V-A14B_HIGH_fp8_e4m3fn_scaled_KJ.safetensors",
    "Wan2_2-I2V-A14B-HIGH_bf16.safetensors",
    "Wan2.2-T2V-A14B-HighNoise-Q4_K_M.gguf",
    "wan2.2_i2v_A14b_high_noise_scaled_fp8_e4m3_lightx2v_4step_1030.safetensors",
    "Wan2.2-T2V-A14B/high_noise_model",
    "high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors",
    "Wan2.2-T2V-A14B-Diffusers/transformer",
    "transformer/diffusion_pytorch_model-00001-of-00012.safetensors",
    "T2V/HIGH/wan22-Q8_0.gguf",
    "wan2.2 high noise.safetensors",
)
NEITHER = (
    "wan2.2_ti2v_5B_fp16.safetensors",
    "wan2.1_t2v_1.3B_fp16.safetensors",
    "slow_flow_yellow.safetensors",
    "wan_high_and_low.safetensors",
    "my_transformer.safetensors",
)


@pytest.mark.parametrize("name", HIGH)
def test_the_side_of_an_expert_is_read_off_its_name(name: str):
    low = name.replace("transformer", "transformer_2")
    for word, other in (("high", "low"), ("HIGH", "LOW"), ("High", "Low")):
        low = low.replace(word, other)
    assert (noise_side(name), noise_side(low)) == ("high", "low")


@pytest.mark.parametrize("name", NEITHER)
def test_other_names_have_no_side(name: str):
    assert noise_side(name) is None
