"""The VAE split over ranks equals the whole VAE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mount import GOLDEN
from ranks import run_ranks
from torch import Tensor, nn
from wan_pack.distributed.parallel import split_vae
from wan_pack.distributed.parallel.image_rows import ImageShard
from wan_pack.wan.vae.autoencoder import decode_frames, encode, load_vae
from wan_pack.wan.vae.vae_layers import WholePicture

CASES = ["vae_wan21", "vae_wan22"]
STRIDE = 8
"""The encoder's input rows per latent row; the Wan2.2 VAE puts 2x2 pixels into one position before."""


def _model(case: str) -> Path:
    return GOLDEN / case / "vae" / "model.safetensors"


def test_decodes_and_encodes_as_one_rank() -> None:
    """1 to 4 ranks; 7 rows are uneven for all of them, 3 are one row per rank and too few for 4 ranks."""
    # Both VAEs at once: most of the time goes into four imports of diffusers.
    results = run_ranks("split_vae_equals_whole", 4, models=[str(_model(case)) for case in CASES], heights=[7, 3])
    for case in range(len(CASES)):
        shares = [result["shares"][case] for result in results]
        for size, rows in ((1, [7]), (2, [4, 3]), (3, [3, 2, 2]), (4, [2, 2, 2, 1])):
            assert [shares[rank][f"{size} 7"] for rank in range(size)] == [[n, n * STRIDE] for n in rows]
        assert [shares[rank]["3 3"] for rank in range(3)] == [[1, STRIDE]] * 3
        # Not split: all encode, rank 0 decodes.
        assert [shares[rank]["4 3"] for rank in range(4)] == [[3, 3 * STRIDE]] + [[3 * STRIDE]] * 3


def _shard(rank: int, sizes: tuple[int, ...]) -> ImageShard:
    return ImageShard(group=None, rank=rank, sizes=sizes)


@pytest.mark.parametrize("scale", [1, 8])
def test_shares_cover_the_picture_once(scale: int) -> None:
    sizes = (3, 2, 2)
    picture = torch.arange(7 * scale * 2).view(1, 7 * scale, 2)
    shares: list[Tensor] = [_shard(rank, sizes).split(picture) for rank in range(3)]
    assert [share.shape[1] for share in shares] == [size * scale for size in sizes]
    assert torch.equal(torch.cat(shares, dim=1), picture)


class _Counted(WholePicture):
    def __init__(self) -> None:
        self.halos, self.gathered = 0, 0

    def fill_halo(self, padded: Tensor, *, above: bool) -> None:
        self.halos += 1
        super().fill_halo(padded, above=above)

    def gather(self, local: Tensor, dim: int) -> Tensor:
        self.gathered += 1
        return super().gather(local, dim)


@pytest.mark.parametrize("case", CASES)
def test_what_crosses_rows_asks_for_them(case: str) -> None:
    """Every convolution with a spatial kernel, and the attention, of the encoder and of the decoder."""
    vae = load_vae([_model(case)])
    stride = vae.config.scale_factor_spatial
    runs = {
        vae.decoder: lambda rows: list(decode_frames(vae, torch.zeros(1, vae.config.z_dim, 1, 2, 2), rows=rows)),
        vae.encoder: lambda rows: encode(vae, torch.zeros(1, 3, 1, 2 * stride, 2 * stride), rows=rows),
    }
    for coder, run in runs.items():
        rows = _Counted()
        run(rows)
        spatial = [m for m in coder.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)) and m.kernel_size[-1] > 1]
        assert (rows.halos, rows.gathered) == (len(spatial), 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_picture_that_is_not_split_is_decoded_by_the_first_rank_alone(rank: int, monkeypatch: pytest.MonkeyPatch):
    """Two rows of latents are none for each of three ranks."""
    monkeypatch.setattr(split_vae.dist, "get_rank", lambda group: rank)
    monkeypatch.setattr(split_vae.RankVae, "_rows", lambda self, rows: None)
    vae = split_vae.RankVae([_model("vae_wan21")], dtype=torch.float32, device=torch.device("cpu"), group=object())  # type: ignore[arg-type]
    latents = torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    made = list(vae.decode(latents))
    assert [tuple(frames.shape) for frames in made if frames is not None] == [(3, 1, 16, 16)][: 1 - rank]
