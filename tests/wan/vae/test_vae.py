"""The VAEs against the official code's outputs, under every name their tensors go by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mount import GOLDEN
from safetensors.torch import load_file, save_file
from torch import Tensor
from wan_pack.wan.files.model_folder import folder_files
from wan_pack.wan.model.latent_space import WAN21, WAN22, LatentSpace
from wan_pack.wan.vae.autoencoder import decode_frames, encode, load_vae
from wan_pack.wan.vae.latents import denormalise, latent_statistics, normalise
from wan_pack.wan.vae.vae_keys import check_vae_file, module_names
from wan_pack.wan.vae.vae_layers import channels_last

CASES = [("vae_wan21", WAN21, 16), ("vae_wan22", WAN22, 48)]


def _model(case: str) -> Path:
    return GOLDEN / case / "vae" / "model.safetensors"


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(("case", "kind", "z_dim"), CASES)
def test_agrees_with_the_official_code(case: str, kind: LatentSpace, z_dim: int) -> None:
    io = load_file(GOLDEN / case / "io.safetensors")
    info = check_vae_file(_model(case))
    assert (info.kind, info.z_dim, info.base_dim) == (kind, z_dim, 4)
    for ours, theirs in zip(latent_statistics(z_dim), (io["mean"], io["std"]), strict=True):
        assert torch.equal(torch.tensor(ours), theirs)
    vae = load_vae([_model(case)])
    assert _difference(_decoded(vae, io["latents"]), io["decoded"]) < 1e-5
    assert _difference(encode(vae, io["video"]), io["encoded"]) < 1e-5


def _decoded(vae: torch.nn.Module, latents: Tensor) -> Tensor:
    return torch.cat(list(decode_frames(vae, latents)), dim=1)[None]


@pytest.mark.parametrize("case", [case for case, _, _ in CASES])
def test_parts_of_any_size_give_what_diffusers_gives(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one frame at a time to the whole video; in any layout of the weights."""
    io = load_file(GOLDEN / case / "io.safetensors")
    vae = load_vae([_model(case)], dtype=torch.float64)
    z_dim = vae.config.z_dim
    with torch.no_grad():
        decoded = vae.decode(denormalise(io["latents"], z_dim).double()).sample
        encoded = normalise(vae.encode(io["video"].double()).latent_dist.mode(), z_dim)
    lengths = set()
    for size in (1, 2, 100):
        monkeypatch.setattr("wan_pack.wan.vae.vae_coder.FRAMES_AT_ONCE", size)
        parts = list(decode_frames(vae, io["latents"], at_once=size))
        lengths.add(max(part.shape[1] for part in parts))
        # diffusers' upsampling rounds to float32.
        assert _difference(torch.cat(parts, dim=1)[None], decoded) < 2e-6, size
        assert _difference(encode(vae, io["video"]), encoded) < 1e-6, size
        channels_last(vae)
    for conv in vae.modules():
        if isinstance(conv, (torch.nn.Conv2d, torch.nn.Conv3d)):
            flat = isinstance(conv, torch.nn.Conv2d)
            assert conv.weight.is_contiguous(memory_format=torch.channels_last if flat else torch.channels_last_3d)
    assert lengths == {1, 2, 9}


@pytest.mark.parametrize("case", [case for case, _, _ in CASES])
def test_fewer_frames_at_once_are_the_same_video(case: str) -> None:
    """To rounding: libraries may choose another kernel for another number of frames."""
    latents, vae = load_file(GOLDEN / case / "io.safetensors")["latents"], load_vae([_model(case)])
    made = [list(decode_frames(vae, latents, at_once=most)) for most in (6, 2, 1)]
    assert [max(part.shape[1] for part in parts) for parts in made] == [5, 2, 1]
    whole, *others = (torch.cat(parts, dim=1) for parts in made)
    for other in others:
        torch.testing.assert_close(other, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("case", "kind", "z_dim"), CASES)
def test_every_file_loads_to_the_same_tensors(case: str, kind: LatentSpace, z_dim: int, tmp_path: Path) -> None:
    official = load_file(_model(case))
    names = module_names(kind)
    diffusers = {
        f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor for name, tensor in official.items()
    }
    files = {
        "diffusers.safetensors": diffusers,
        "prefixed.safetensors": {f"model.{name}": tensor for name, tensor in official.items()},
        "all_in_one.safetensors": {f"vae.{name}": tensor for name, tensor in official.items()}
        | {"model.diffusion_model.head.modulation": torch.zeros(1)},
        "half.safetensors": {name: tensor.half() for name, tensor in official.items()},
        "vae/diffusion_pytorch_model.safetensors": diffusers,
    }
    (tmp_path / "vae").mkdir()
    for name, tensors in files.items():
        save_file(tensors, tmp_path / name)
    torch.save(official, tmp_path / "official.pth")
    assert folder_files(tmp_path / "vae", "a VAE") == (tmp_path / "vae" / "diffusion_pytorch_model.safetensors",)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    expected = load_vae([_model(case)]).state_dict()
    for path in [*(tmp_path / name for name in files), tmp_path / "official.pth"]:
        info = check_vae_file(path)
        assert (info.kind, info.z_dim) == (kind, z_dim)
        vae = load_vae([config, path])
        for name, tensor in vae.state_dict().items():
            wanted = expected[name].half().float() if path.name.startswith("half") else expected[name]
            assert tensor.dtype == torch.float32 and torch.equal(tensor, wanted), (path.name, name)


def test_dtype_and_abandoned_decode() -> None:
    vae = load_vae([_model("vae_wan21")], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    latents = torch.randn(1, 16, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    before = _decoded(vae, latents)
    frames = decode_frames(vae, latents)
    assert next(frames).dtype == torch.bfloat16
    frames.close()
    assert torch.equal(_decoded(vae, latents), before)


def test_latent_scale_round_trip() -> None:
    latents = torch.randn(1, 16, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(normalise(denormalise(latents, 16), 16), latents, atol=1e-6)
    with pytest.raises(ValueError, match="channels"):
        latent_statistics(8)
    with pytest.raises(ValueError, match=r"\.\.\., 48, T, h, w"):
        normalise(latents, 48)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_of_any_dtype_are_scaled_in_float32(dtype: torch.dtype) -> None:
    latents = torch.randn(1, 16, 2, 3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    for scale in (normalise, denormalise):
        out = scale(latents, 16)
        assert out.dtype == torch.float32 and torch.equal(out, scale(latents.float(), 16))
    with pytest.raises(ValueError, match=r"have 5 channels; they must have one of \[16, 48\]"):
        latent_statistics(5)


def test_inputs_are_checked() -> None:
    vae = load_vae([_model("vae_wan21")])
    with pytest.raises(ValueError, match="4n \\+ 1"):
        encode(vae, torch.zeros(1, 3, 4, 16, 16))
    with pytest.raises(ValueError, match="multiples of 8"):
        encode(vae, torch.zeros(1, 3, 1, 16, 12))
    with pytest.raises(ValueError, match="16, T, h, w"):
        next(decode_frames(vae, torch.zeros(16, 3, 2, 2)))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("dit_t2v/model/diffusion_pytorch_model.safetensors", "a Wan DiT checkpoint"),
        ("t5_encoder/text_encoder/model.safetensors", "a umT5 text encoder"),
        ("vae_wan21/io.safetensors", "a file of 6 tensors"),
        ("schedules.json", "no file"),
        ("README.md", "of an unknown format"),
        ("none.safetensors", "cannot be read"),
    ],
)
def test_wrong_files_are_named(path: str, words: str) -> None:
    file = GOLDEN / path
    if file.suffix == ".json":
        words = "given"
    for attempt in (check_vae_file, lambda file: load_vae([file])):
        with pytest.raises(ValueError, match=r"expected a Wan2\.1 VAE") as caught:
            attempt(file)
        assert str(file) in str(caught.value) and words in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    official = load_file(_model("vae_wan21"))
    cases: dict[str, str] = {}

    def add(name: str, tensors: dict[str, Tensor], words: str) -> None:
        (torch.save if name.endswith(".pth") else save_file)(tensors, tmp_path / name)
        cases[name] = words

    add(
        "lacking.safetensors",
        {k: v for k, v in official.items() if k != "conv2.weight"},
        "lacks 1 tensors (conv2.weight)",
    )
    add("bias.safetensors", {k: v for k, v in official.items() if k != "conv2.bias"}, "lacks 1 tensors (conv2.bias)")
    add("lacking.pth", {k: v for k, v in official.items() if "upsamples.14" not in k}, "lacks 6 tensors")
    add("lora.safetensors", {"x.lora_up.weight": torch.zeros(2), "x.lora_down.weight": torch.zeros(2)}, "a LoRA")
    add("cut.pth", official, "truncated or damaged")
    add("cut.safetensors", official, "is truncated")
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-5000])
    for name, words in cases.items():
        for attempt in (check_vae_file, lambda file: load_vae([file])):
            with pytest.raises(ValueError, match=r"expected a Wan2\.1 VAE") as caught:
                attempt(tmp_path / name)
            assert name in str(caught.value) and words in str(caught.value)

    save_file(official | {"decoder.conv1.weight": torch.zeros(16, 16, 3, 3, 1)}, tmp_path / "shape.safetensors")
    with pytest.raises(
        ValueError, match=r"shape\.safetensors: tensor decoder\.conv1\.weight has shape \[16, 16, 3, 3, 1\]"
    ):
        load_vae([tmp_path / "shape.safetensors"])
    save_file(official | {"conv2.bias": torch.zeros(16, dtype=torch.int8)}, tmp_path / "int8.safetensors")
    for attempt in (check_vae_file, lambda file: load_vae([file])):
        with pytest.raises(ValueError, match=r"int8\.safetensors: tensor conv2\.bias is int8 without a scale"):
            attempt(tmp_path / "int8.safetensors")
    # Which blocks have a shortcut depends on their widths: only the model built from them tells.
    shortcut = next(name for name in official if name.endswith("shortcut.weight"))
    save_file({k: v for k, v in official.items() if k != shortcut}, tmp_path / "shortcut.safetensors")
    with pytest.raises(ValueError, match=rf"shortcut\.safetensors is a Wan2\.1 VAE that lacks 1 tensors \({shortcut}"):
        load_vae([tmp_path / "shortcut.safetensors"])


class _Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("unpickled",))


def test_pickled_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(load_file(_model("vae_wan21")) | {"trap": _Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match=r"trap\.pth is a .*damaged PyTorch checkpoint: its list of tensors calls"):
        load_vae([tmp_path / "trap.pth"])
    assert "unpickled" not in capsys.readouterr().out
