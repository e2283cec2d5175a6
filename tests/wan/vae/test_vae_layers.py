"""The layers of the VAEs: what they read, what they keep, how much goes through at once, and in which layout."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from mount import GOLDEN
from safetensors.torch import load_file
from torch import Tensor, nn
from wan_pack.wan.vae import vae_coder, vae_ops
from wan_pack.wan.vae.autoencoder import decode_frames, encode, load_vae
from wan_pack.wan.vae.vae_coder import ALIGNMENT, Decoder, Encoder, Stage
from wan_pack.wan.vae.vae_input import FrameParts
from wan_pack.wan.vae.vae_layers import CausalConv, Tools, WholePicture
from wan_pack.wan.vae.vae_ops import PLAIN, VAE_OPS, Sum, VaeOps

CASES = ["vae_wan21", "vae_wan22"]


def loaded(case: str) -> nn.Module:
    return load_vae([GOLDEN / case / "vae" / "model.safetensors"])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def severe() -> VaeOps:
    """As plain as a kernel may be: reads contiguous memory only, and leaves nothing in what it need not return."""

    def checked(total: Sum) -> Sum:
        assert total.x.is_contiguous() and (total.residual is None or total.residual.is_contiguous())
        return total

    def norm(total: Sum, weight: Tensor, out: Tensor, silu: bool, keep: bool) -> Tensor:
        made = PLAIN.norm(checked(total), weight, out, silu, keep)
        return total.x.copy_(made) if keep else total.x.fill_(torch.nan)

    def add(total: Sum, out: Tensor | None = None) -> Tensor:
        return PLAIN.add(checked(total), out)

    def upsample(total: Sum, of: int, out: Tensor) -> None:
        PLAIN.upsample(checked(total), of, out)

    return VaeOps(add, norm, upsample)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_read_that_was_not_written(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where new memory holds no numbers, and kernels leave none where they may."""
    vae, io = loaded(case), load_file(GOLDEN / case / "io.safetensors")
    plain = torch.cat(list(decode_frames(vae, io["latents"], at_once=2)), dim=1), encode(vae, io["video"])
    new_empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda *given, **more: new_empty(*given, **more).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *given, **more: empty_like(*given, **more).fill_(torch.nan))
    monkeypatch.setitem(VAE_OPS, "severe", severe)
    made = torch.cat(list(decode_frames(vae, io["latents"], ops="severe", at_once=2)), dim=1)
    torch.testing.assert_close(made, plain[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encode(vae, io["video"], ops="severe"), plain[1], rtol=1e-5, atol=1e-6)


def test_what_is_kept_of_the_frames_before_is_no_part_of_their_memory() -> None:
    layer = nn.Conv3d(2, 2, 3).requires_grad_(False)
    conv = CausalConv(layer, Tools(WholePicture(), PLAIN))
    frames = noise(4, 5, 6, 2)
    made = []
    for start, end in ((0, 1), (1, 4)):
        padded, inside = conv.room(end - start, 5, 6)
        assert inside.shape == (end - start, 5, 6, 2)
        inside.copy_(frames[start:end])
        out = conv(padded)
        assert out.bias is layer.bias and out.x.is_contiguous()
        made.append(out.x + layer.bias)
        # Whoever has the room next may write into it.
        padded.fill_(torch.nan)
    channels = F.pad(frames.permute(3, 0, 1, 2)[None], (1, 1, 1, 1, 2, 0))
    torch.testing.assert_close(torch.cat(made), layer(channels)[0].permute(1, 2, 3, 0))


def test_around_a_whole_picture_there_is_nothing() -> None:
    padded = torch.ones(2, 4, 3, 1)
    WholePicture().fill_halo(padded, above=False)
    assert padded[0, :, 0, 0].tolist() == [1, 1, 1, 0]
    WholePicture().fill_halo(padded, above=True)
    assert padded[1, :, 2, 0].tolist() == [0, 1, 1, 0]


def test_parts_are_as_even_as_can_be() -> None:
    x, residual, bias = noise(10, 1, 1, 2), noise(10, 1, 1, 2, seed=1), noise(2)
    for total, most, lengths in (
        (10, 4, [3, 3, 4]),
        (10, 5, [5, 5]),
        (10, 10, [10]),
        (9, 4, [3, 3, 3]),
        (2, 1, [1, 1]),
    ):
        whole = Sum(x[:total], bias, residual[:total])
        parts = whole.split(most)
        assert [len(part.x) for part in parts] == lengths
        joined = Sum.joined(parts)
        assert torch.equal(joined.x, whole.x) and torch.equal(joined.residual, whole.residual) and joined.bias is bias
        assert Sum(x).split(most)[0].residual is None and Sum.joined([Sum(x)]).residual is None


def test_a_vector_of_almost_no_length_is_not_blown_up() -> None:
    """As `F.normalize`, which divides by no less than 1e-12; here the two are added up squared."""
    for length in (0.0, 1e-12, 1e-6, 1.0):
        x = torch.full((1, 1, 1, 4), length / 2)
        out = torch.empty_like(x)
        assert vae_ops.norm(Sum(x), torch.full((4,), 3.0), out, False, True).equal(x)
        assert out.flatten().tolist() == pytest.approx([3 * length / (length**2 + 1e-24) ** 0.5] * 4, rel=1e-5)
    vae_ops.norm(Sum(x), torch.full((4,), 3.0), out, True, True)
    assert out.flatten().tolist() == pytest.approx([3 / (1 + 2.718281828**-3)] * 4, rel=1e-5)


def test_frames_of_one_position_become_positions_of_several_frames() -> None:
    x, out = torch.arange(8.0).view(1, 1, 2, 4), torch.empty(2, 2, 4, 2)
    vae_ops.upsample(Sum(x, torch.ones(4)), 2, out)
    for frame, row in ((0, [[1, 2], [1, 2], [5, 6], [5, 6]]), (1, [[3, 4], [3, 4], [7, 8], [7, 8]])):
        assert out[frame].tolist() == [row, row]


def test_what_a_stage_holds_is_counted() -> None:
    """Four tensors of its widest convolution, eight where it enlarges pictures, sixteen where frames too."""
    decoder = Decoder(loaded("vae_wan21"), Tools(WholePicture(), PLAIN))
    assert [stage.elements(1) for stage in decoder.stages] == [4 * 16, 16 * 16, 16 * 16, 8 * 8, 4 * 4]
    stage = decoder.stages[-1]
    assert stage.elements(10, 3) == 3 * 10 * stage.elements(1)
    assert [stage.frames(10, 3 * 160 + more) for more in (0, -1, 159, 160)] == [3, 2, 3, 4]
    assert stage.frames(10, 1) == 1, "one, whatever it takes"
    assert [stage.up for stage in decoder.stages] == [False, True, True, True, False]


@pytest.mark.parametrize("at_once", [1, 2, 6])
def test_no_stage_takes_more_at_once_than_the_last_one_may(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many elements as the last one holds of that many frames; and the first waits for the second."""
    decoder = Decoder(loaded("vae_wan21"), Tools(WholePicture(), PLAIN))
    taken: dict[int, list[int]] = {}
    call = Stage.__call__

    def counted(self: Stage, x: Sum) -> Sum:
        taken.setdefault(decoder.stages.index(self), []).append(len(x.x))
        most = decoder.stages[-1].elements(2 * 2 * 8 * 8, at_once)
        assert self.elements(x.x.shape[1] * x.x.shape[2], len(x.x)) <= most or len(x.x) == 1
        return call(self, x)

    monkeypatch.setattr(Stage, "__call__", counted)
    with torch.no_grad():
        assert sum(part.shape[2] for part in decoder.frames(noise(1, 16, 9, 2, 2), at_once)) == 33
    assert taken[0] == {1: [3, 3, 3], 2: [4, 5], 6: [9]}[at_once] and sum(taken[4]) == 33
    assert max(taken[4]) == {1: 1, 2: 2, 6: 6}[at_once]


@pytest.mark.parametrize(("at_once", "reads"), [(6, [0, 5, 9, 13, 17]), (9, [0, 9, 17]), (1, [0, 5, 9, 13, 17])])
def test_an_encoder_reads_a_few_frames_at_a_time(
    at_once: int, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole latent frames, behind the first frame, which is one by itself."""
    seen: list[tuple[int, int]] = []
    read = FrameParts.read
    monkeypatch.setattr(FrameParts, "read", lambda self, *run: (seen.append(run), read(self, *run))[1])
    monkeypatch.setattr(vae_coder, "FRAMES_AT_ONCE", at_once)
    vae, video = loaded("vae_wan21"), noise(1, 3, 17, 16, 16)
    parts = FrameParts(video, dtype=torch.float32, device=torch.device("cpu"), patch=None)
    with torch.no_grad():
        moments = Encoder(vae, Tools(WholePicture(), PLAIN)).moments(parts)
        expected = vae.encode(video).latent_dist.parameters
    assert seen == list(pairwise(reads))
    torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-4)


def test_channels_of_both_ends_are_as_many_as_fast_convolutions_take() -> None:
    """Those beyond a picture's are zeros, in the layout that they are read in."""
    vae = loaded("vae_wan21")
    tools = Tools(WholePicture(), PLAIN)
    for conv, own in (
        (Encoder(vae, tools).conv_in, vae.encoder.conv_in), (Decoder(vae, tools).head.conv, vae.decoder.conv_out),
    ):  # fmt: skip
        weight = conv.weight
        assert weight.shape[0] % ALIGNMENT == (own.out_channels if own is vae.encoder.conv_in else 0) % ALIGNMENT
        assert weight.is_contiguous(memory_format=torch.channels_last_3d)
        outputs, inputs = own.weight.shape[:2]
        assert torch.equal(weight[:outputs, :inputs], own.weight) and torch.equal(conv.bias[:outputs], own.bias)
        assert not weight[outputs:].any() and not weight[:, inputs:].any() and not conv.bias[outputs:].any()
    assert Encoder(vae, tools).conv_in.weight.shape[1] == Decoder(vae, tools).head.conv.weight.shape[0] == 8
