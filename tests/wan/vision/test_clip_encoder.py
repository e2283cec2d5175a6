"""CLIP's features against transformers' own model; every file that holds one, and what others are called."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mount import GOLDEN
from safetensors.torch import load_file, save_file
from tiny_clip import LAYERS, as_official, as_open_clip, clip_weights, config, write_clip
from torch import Tensor
from umt5 import MODEL
from wan_pack.wan.files.stored_model import open_model
from wan_pack.wan.vision import seen_pictures
from wan_pack.wan.vision.clip_encoder import _Rows, encode_pictures, load_clip
from wan_pack.wan.vision.clip_keys import check_clip_files
from wan_pack.wan.vision.clip_picture import MEAN, STD, fit_clip_picture
from wan_pack.wan.vision.seen_pictures import SeenPictures

DIM = 64
VAE = GOLDEN / "vae_wan21" / "vae" / "model.safetensors"


def pictures(count: int = 2, rows: int = 224, columns: int = 224) -> Tensor:
    """[count, rows, columns, 3] of 8 bits."""
    values = torch.rand(count, rows, columns, 3, generator=torch.Generator().manual_seed(5))
    return (values * 255).round() / 255


def prepared(count: int = 2) -> Tensor:
    return torch.stack([fit_clip_picture(picture) for picture in pictures(count)])


def theirs(weights: dict[str, Tensor], given: Tensor) -> Tensor:
    """transformers' penultimate hidden states [n, 257, dim], of the whole model."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(**config(DIM))).eval()
    names = model.state_dict()
    state = {name: tensor for name, tensor in weights.items() if name.startswith("vision_model.")}
    if "vision_model.pre_layrnorm.weight" not in names:
        state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    model.load_state_dict(state)
    return model(pixel_values=given, output_hidden_states=True).hidden_states[-2]


def test_features_are_transformers_states_before_the_last_layer(tmp_path: Path):
    given = prepared()
    expected = theirs(clip_weights(), given)
    made = encode_pictures(load_clip([write_clip(tmp_path / "clip.safetensors")]), given)
    assert made.shape == (2 * 257, DIM) and made.dtype == torch.float32
    torch.testing.assert_close(made, expected.flatten(0, 1), rtol=1e-5, atol=1e-5)
    assert (made[:257] - made[257:]).abs().max() > 0.1, "each picture counts"


@pytest.mark.parametrize("layout", ["open-clip", "official", "bare", "prefixed", "shards", "half"])
def test_every_file_loads_to_the_same_features(layout: str, tmp_path: Path):
    weights, path = clip_weights(), tmp_path / "clip.safetensors"
    expected = encode_pictures(load_clip([write_clip(tmp_path / "expected.safetensors")]), prepared(1))
    files = [path]
    if layout == "open-clip":
        save_file({name: tensor.contiguous() for name, tensor in as_open_clip(weights).items()}, path)
    elif layout == "official":
        files = [tmp_path / "clip.pth"]
        torch.save(as_official(weights), files[0])
    elif layout == "bare":
        save_file({name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}, path)
    elif layout == "prefixed":
        save_file({f"image_encoder.{name}": tensor for name, tensor in weights.items()}, path)
    elif layout == "shards":
        files, names = [tmp_path / f"{part}.safetensors" for part in (1, 2)], sorted(weights)
        for part, file in enumerate(files):
            save_file({name: weights[name] for name in names[part::2]}, file)
    else:
        save_file({name: tensor.half() for name, tensor in weights.items()}, path)
    made = encode_pictures(load_clip(files), prepared(1))
    torch.testing.assert_close(made, expected, rtol=1e-6, atol=1e-6)


def test_the_last_layer_is_not_read(tmp_path: Path):
    path = write_clip(tmp_path / "clip.safetensors")
    model = load_clip([path], dtype=torch.float16)
    names = list(model.state_dict())
    assert not any(f"layers.{LAYERS - 1}." in name or "post_layernorm" in name for name in names)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert encode_pictures(model, prepared(1)).dtype == torch.float32
    counted = sum(Tensor.numel(parameter) for parameter in model.parameters())
    assert counted == sum(torch.Size(shape).numel() for shape in check_clip_files([path]).shapes.values())


def changed(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    weights = clip_weights()
    if tensor is None:
        del weights[name]
    else:
        weights[name] = tensor
    return weights


PATCHES, POSITIONS = (
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight",
)
SIGLIP = {"vision_model.embeddings.patch_embedding.bias": torch.ones(8), "vision_model.head.probe": torch.ones(8)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (changed("vision_model.encoder.layers.1.mlp.fc1.bias", None), "a CLIP vision model that lacks 1 tensors"),
        (changed(PATCHES, torch.ones(64, 3, 32, 32)), r"patches are \[3, 32, 32\]; they must be \[3, 14, 14\]"),
        (changed(POSITIONS, torch.ones(577, 64)), r"position_embedding.weight has shape \[577, 64\]; .* \[257, 64\]"),
        (clip_weights(dim=40), "of 40 channels; they must divide by 16 heads"),
        (SIGLIP, "is a SigLIP vision model; expected a CLIP vision model"),
        ({"encoder.layer.0.layer_scale2.lambda1": torch.ones(8)}, "is a DINOv2 vision model; expected a CLIP vision"),
        ({"vision_model.embeddings.class_embedding": torch.ones(8)}, "expected a CLIP vision model"),
    ],
    ids=["lacks one", "patches", "positions", "heads", "SigLIP", "DINOv2", "no layers"],
)  # fmt: skip
def test_other_models_are_refused_as_what_they_are(tensors: dict[str, Tensor], words: str, tmp_path: Path):
    save_file(tensors, tmp_path / "clip.safetensors")
    with pytest.raises(ValueError, match=rf"clip\.safetensors.*{words}"):
        check_clip_files([tmp_path / "clip.safetensors"])


@pytest.mark.parametrize(("path", "kind"), [(VAE, "a Wan2.1 VAE"), (MODEL, "a umT5 text encoder")], ids=["VAE", "umT5"])
def test_other_parts_of_a_model_are_refused_as_what_they_are(path: Path, kind: str):
    with pytest.raises(ValueError, match=f"is {kind}.*; expected a CLIP vision model"):
        check_clip_files([path])


def test_a_picture_is_stretched_as_the_official_code_does_it():
    """Its values go through -1 to 1, as there: bicubic without antialiasing, nothing cut off or rounded."""
    (picture,) = pictures(1, 300, 500)
    video = (picture.permute(2, 0, 1)[None] - 0.5) / 0.5
    resized = F.interpolate(video, size=(224, 224), mode="bicubic", align_corners=False)[0] * 0.5 + 0.5
    expected = (resized - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(fit_clip_picture(picture), expected, rtol=1e-5, atol=1e-5)
    for given in (picture.double(), picture.half()):
        made = fit_clip_picture(given)
        assert made.dtype == torch.float32 and torch.equal(made, fit_clip_picture(given.float()))
    with pytest.raises(ValueError, match=r"shape \[3, 8, 8\]; it must be \[H, W, 3\]"):
        fit_clip_picture(torch.zeros(3, 8, 8))


def test_the_same_pictures_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loads: list[object] = []

    def load(*given: object, **how: object) -> object:
        loads.append(given)
        return load_clip(*given, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(seen_pictures, "load_clip", load)
    path, given = write_clip(tmp_path / "clip.safetensors"), prepared(1)
    seen, said = SeenPictures(torch.device("cpu")), []
    first = seen.features([path], given, version=1, say=said.append)
    assert said == ["loading CLIP's vision model", "looking at the picture"]
    assert torch.equal(seen.features([path], given.clone(), version=1), first) and len(loads) == 1
    # Whose memory the caller may use for others afterwards.
    shared = given + 1
    other = seen.features([path], shared, version=1)
    shared += 1
    assert not torch.equal(other, first) and not torch.equal(seen.features([path], shared, version=1), other)
    write_clip(path, seed=1)
    again = seen.features([path], given, version=2)
    assert len(loads) == 4 and not torch.equal(again, first)
    torch.testing.assert_close(again, encode_pictures(load_clip([path]), given))
    assert load_file(path).keys() == clip_weights().keys()


def test_rows_of_a_tensor_may_be_read_in_parts(tmp_path: Path):
    """q, k and v in one, as open-clip has them: each is a third, from wherever a reader begins in it."""
    whole = torch.arange(24.0).view(6, 4)
    save_file({"qkv": whole}, tmp_path / "m.safetensors")
    stored = open_model([tmp_path / "m.safetensors"], "a model").weights({"qkv": "qkv"})["qkv"]
    out = torch.empty(3)
    _Rows(stored, (2, 4), 8).read_into(out, start=5)
    assert out.tolist() == [13.0, 14.0, 15.0]


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.float16)])
def test_a_gpu_looks_in_half_precision_as_the_official_code(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype
):
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(seen_pictures, "load_clip", lambda files, **how: asked.append(how))
    monkeypatch.setattr(seen_pictures, "encode_pictures", lambda model, given: torch.zeros(len(given) * 257, 4))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: asked.append({"emptied": True}))
    said: list[str] = []
    seen = SeenPictures(torch.device(device)).features(["clip"], torch.zeros(2, 3, 224, 224), say=said.append)
    assert seen.shape == (2 * 257, 4) and said[-1] == "looking at the pictures"
    loaded, *emptied = asked
    assert loaded == {"dtype": dtype, "device": torch.device(device)} and len(emptied) == (device == "cuda")
