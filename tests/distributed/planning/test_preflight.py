"""Files that do not belong together, refused in the user's words by what their headers say."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from mount import GOLDEN
from safetensors.torch import save_file
from tiny import TINY, random_weights
from wan_pack.distributed.job.job import FileIdentity, ModelFiles
from wan_pack.distributed.planning.preflight import check_model
from wan_pack.wan.model.config import WanConfig

ONE_HEAD = replace(TINY, dim=128, num_heads=1)
WAN21_VAE, WAN22_VAE = (GOLDEN / case / "vae" / "model.safetensors" for case in ("vae_wan21", "vae_wan22"))


def transformer(path: Path, **changes: object) -> Path:
    config: WanConfig = replace(ONE_HEAD, **changes)
    save_file(random_weights(config), path)
    return path


def check(high: Path, low: Path | None = None, vae: Path = WAN21_VAE) -> WanConfig:
    files = {"high_noise": high, "low_noise": low, "vae": vae}
    return check_model(ModelFiles(**{name: (FileIdentity.of(path),) if path else () for name, path in files.items()}))


def test_mixed_experts_are_named_as_people_name_them(tmp_path: Path):
    t2v = transformer(tmp_path / "t2v_high.safetensors")
    i2v = transformer(tmp_path / "i2v_low.safetensors", in_dim=36)
    with pytest.raises(ValueError, match="belong together") as refusal:
        check(t2v, i2v)
    assert str(refusal.value) == (
        "the experts do not belong together: T2V of 2 layers and 128 channels high-noise with I2V of 2 layers and 128 "
        f"channels low-noise. high_noise is {t2v}, low_noise is {i2v}; choose both from one release"
    )
    wider = transformer(tmp_path / "wider.safetensors", ffn_dim=96)
    with pytest.raises(ValueError, match=r"low-noise \(ffn_dim 80 and 96\)\. high_noise is "):
        check(t2v, wider)
    assert check(t2v, t2v).variant.name == "T2V"


def test_the_vae_of_another_model_is_named_with_the_right_one(tmp_path: Path):
    t2v = transformer(tmp_path / "t2v.safetensors")
    ti2v = transformer(tmp_path / "ti2v.safetensors", in_dim=48, out_dim=48)
    with pytest.raises(ValueError, match=re.escape(
        f"{WAN22_VAE} is a Wan2.2 VAE; a T2V of 2 layers and 128 channels model goes with the Wan2.1 VAE (wan_2.1_vae"
    )):  # fmt: skip
        check(t2v, vae=WAN22_VAE)
    with pytest.raises(ValueError, match=r"is a Wan2\.1 VAE; a TI2V-5B of .* goes with the Wan2\.2 VAE \(wan2\.2_vae"):
        check(ti2v, vae=WAN21_VAE)
    assert check(ti2v, vae=WAN22_VAE).variant.name == "TI2V-5B"
