"""VAEs as GGUF files: the values are those that the gguf package reads, whichever way five axes are written."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from mount import GOLDEN
from safetensors.torch import load_file, save_file
from wan_pack.wan.model.latent_space import WAN21, WAN22
from wan_pack.wan.vae.autoencoder import decode_frames, load_vae
from wan_pack.wan.vae.vae_keys import check_vae_file

CASES = {WAN21: "vae_wan21", WAN22: "vae_wan22"}


@pytest.mark.parametrize("flat", [False, True], ids=["five axes", "original shape beside"])
@pytest.mark.parametrize("kind", [WAN21, WAN22], ids=["Wan2.1", "Wan2.2"])
def test_a_gguf_vae_decodes_as_its_values_do(tmp_path: Path, kind, flat: bool):
    """Convolutions in fp16, the rest in fp32, as such files are made; llama.cpp knows four axes only."""
    source, path = GOLDEN / CASES[kind] / "vae" / "model.safetensors", tmp_path / "vae.gguf"
    writer, rounded = gguf.GGUFWriter(path, "pig"), {}
    for name, tensor in load_file(source).items():
        array = tensor.float().numpy()
        if tensor.dim() >= 4:
            array = array.astype(np.float16)
        rounded[name] = torch.from_numpy(array.astype(np.float32))
        if flat and tensor.dim() > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", array.shape)
            array = array.reshape(array.shape[0], -1)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check_vae_file(path).kind == kind
    latents = load_file(GOLDEN / CASES[kind] / "io.safetensors")["latents"]
    save_file(rounded, tmp_path / "plain.safetensors")
    files = ([path], [tmp_path / "plain.safetensors"])
    frames, expected = (torch.cat(list(decode_frames(vae, latents)), dim=1) for vae in map(load_vae, files))
    assert torch.equal(frames, expected)
