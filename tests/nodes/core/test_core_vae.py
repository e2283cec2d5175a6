"""ComfyUI's own VAE and ours around the same weights: the same frames and latents from every node with a VAE input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from core_sampling import Modules
from mount import GOLDEN
from plain_vae import PlainVae
from safetensors.torch import load_file
from torch import Tensor
from wan_pack.nodes.core.vae_loader import KNOWN_TO_COMFYUI
from wan_pack.nodes.host.core_vae import vae_without_weights
from wan_pack.wan.model.latent_space import WAN21, WAN22, LatentSpace
from wan_pack.wan.vae.vae_keys import VaeInfo, vae_shapes

LIMIT = 1e-4
FILES = {WAN21: GOLDEN / "vae_wan21/vae/model.safetensors", WAN22: GOLDEN / "vae_wan22/vae/model.safetensors"}


class TwoVaes:
    """The same file behind both sockets."""

    def __init__(self, core: Modules, space: LatentSpace) -> None:
        self.core, self.space = core, space
        self.remote = PlainVae(FILES[space])
        self.ours = weightless(space, self.remote)
        tensors = load_file(FILES[space])
        if space is WAN21:
            self.theirs = core["comfy.sd"].VAE(sd=tensors, dtype=torch.float32)
        else:
            # ComfyUI builds this one of its released size, whatever the file says.
            self.theirs = weightless(space, self.remote)
            kind = type(self.theirs).__mro__[1]
            self.theirs.__class__ = kind
            dim = tensors["encoder.conv1.weight"].shape[0]
            sizes = {"dim": dim, "dec_dim": tensors["decoder.head.0.gamma"].shape[0], "z_dim": 48}
            stage = core["comfy.ldm.wan.vae2_2"].WanVAE(**sizes, temperal_downsample=[False, True, True])
            stage.load_state_dict(tensors)
            self.theirs.first_stage_model = stage

    def same(self, graph: Callable[[Any], Tensor]) -> Tensor:
        """What `graph` makes of ours, which must be what it makes of theirs."""
        with torch.inference_mode():
            ours, theirs = graph(self.ours), graph(self.theirs)
        assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
        assert theirs.std() > 0.01 and (ours - theirs).abs().max() < LIMIT
        return ours


def weightless(space: LatentSpace, remote: Any, upscale: int = 1) -> Any:
    info = VaeInfo(space, *KNOWN_TO_COMFYUI[space], 1, "", True)
    return vae_without_weights(vae_shapes(info), upscale, remote)


@pytest.fixture(scope="module")
def made() -> dict[LatentSpace, TwoVaes]:
    """Those that a test before has made."""
    return {}


@pytest.fixture(params=[WAN21, WAN22], ids=lambda space: space.vae)
def vaes(request: pytest.FixtureRequest, core: Modules, made: dict[LatentSpace, TwoVaes]) -> TwoVaes:
    if request.param not in made:
        made[request.param] = TwoVaes(core, request.param)
    known = made[request.param]
    known.remote.asked.clear()
    known.remote.blocks = 0
    return known


def latents(space: LatentSpace, batch: int = 1, frames: int = 3, rows: int = 6, columns: int = 8) -> Tensor:
    """Large enough that some frames are cut."""
    return 6 * torch.randn(
        batch, space.channels, frames, rows, columns, generator=torch.Generator().manual_seed(frames)
    )


def pictures(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize(("batch", "frames"), [(1, 3), (2, 2), (1, 1)])
def test_frames_are_those_of_core(vaes: TwoVaes, batch: int, frames: int) -> None:
    asked = latents(vaes.space, batch, frames)
    before = asked.clone()
    made = vaes.same(lambda vae: vae.decode(asked))
    assert made.shape[:2] == (batch, 4 * frames - 3) and made.min() == 0 and made.max() > 0.9
    assert torch.equal(asked, before)
    decoder = vaes.core["nodes"].VAEDecode()
    assert len(vaes.same(lambda vae: decoder.decode(vae, {"samples": asked})[0])) == batch * (4 * frames - 3)


@pytest.mark.parametrize(("count", "height", "width"), [(9, 64, 96), (1, 64, 64), (7, 70, 100)])
def test_latents_are_those_of_core(vaes: TwoVaes, count: int, height: int, width: int) -> None:
    """Also of pictures that are no whole steps, and of frames that fill no latent one."""
    encoder = vaes.core["nodes"].VAEEncode()
    made = vaes.same(lambda vae: encoder.encode(vae, pictures(count, height, width))[0]["samples"])
    assert made.shape == (1, *vaes.space.shape(width, height, count))


def test_batches_of_videos_are_encoded_as_core_does(vaes: TwoVaes) -> None:
    batch = pictures(32, 64, 64).view(2, 16, 64, 64, 3)
    assert len(vaes.same(lambda vae: vae.encode(batch))) == 2


def test_tiles_are_those_of_core_and_follow_one_upon_another(vaes: TwoVaes) -> None:
    """Two or three in each direction, of which some are cut."""
    nodes, rows = vaes.core["nodes"], 96 // vaes.space.stride
    asked = latents(vaes.space, 1, 3, rows, rows + 2)
    sizes = {"tile_size": 64, "overlap": 16, "temporal_size": 8, "temporal_overlap": 4}
    vaes.same(lambda vae: nodes.VAEDecodeTiled().decode(vae, {"samples": asked}, **sizes)[0])
    assert len(vaes.remote.asked) > 7 and vaes.remote.blocks == 1
    vaes.same(lambda vae: nodes.VAEEncodeTiled().encode(vae, pictures(9, 96, 80), **sizes)[0]["samples"])
    assert vaes.remote.blocks == 2


@pytest.mark.parametrize(("height", "width"), [(288, 48), (48, 288)])
@pytest.mark.parametrize("encodes", [False, True])
def test_what_does_not_fit_whole_is_done_in_tiles_as_core_does(
    vaes: TwoVaes, encodes: bool, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, stride = vaes.core["comfy.model_management"].OOM_EXCEPTION, vaes.space.stride
    stages = [vaes.remote, vaes.theirs.first_stage_model]
    name, given = "encode" if encodes else "decode", latents(vaes.space, 1, 1, height // stride, width // stride)
    if encodes:
        given = pictures(1, height, width)

    def small(run: Any, tensor: Tensor) -> Tensor:
        if max(tensor.shape[-2:]) > (256 if encodes else 256 // stride):
            raise full("too large")
        return run(tensor)

    for stage in stages:
        monkeypatch.setattr(stage, name, functools.partial(small, getattr(stage, name)))
    vaes.same(lambda vae: getattr(vae, name)(given))


def test_nodes_that_start_from_pictures_take_it(vaes: TwoVaes) -> None:
    wan, nodes = vaes.core["comfy_extras.nodes_wan"], vaes.core["nodes"]
    size = {"width": 64, "height": 64, "length": 9, "batch_size": 1}
    text: Any = [[torch.zeros(1, 9, 8), {}]]
    picture = pictures(1, 64, 64)

    def of(node: str, which: str, **inputs: Any) -> Callable[[Any], Tensor]:
        def graph(vae: Any) -> Tensor:
            found = getattr(wan, node).execute(text, text, vae, **size, **inputs).result[0][0][1][which]
            return found[0] if isinstance(found, list) else found

        return graph

    if vaes.space is WAN21:
        vaes.same(of("WanImageToVideo", "concat_latent_image", start_image=picture))
        vaes.same(of("WanFirstLastFrameToVideo", "concat_latent_image", start_image=picture, end_image=picture))
        control = {"strength": 1.0, "control_video": pictures(9, 64, 64), "reference_image": picture}
        vaes.same(of("WanVaceToVideo", "vace_frames", **control))
    else:
        known = wan.Wan22ImageToVideoLatent
        vaes.same(lambda vae: known.execute(vae, **size, start_image=picture).result[0]["samples"])
    if vaes.space is WAN21:
        inpaint = nodes.InpaintModelConditioning()
        vaes.same(lambda vae: inpaint.encode(text, text, picture, vae, picture[..., 0])[0][0][1]["concat_latent_image"])
        masked = nodes.VAEEncodeForInpaint()
        try:
            masked.encode(vaes.theirs, picture, picture[..., 0])
        except TypeError:
            # Older ones cannot use it with any video VAE: they divide by what is three numbers there.
            with pytest.raises(TypeError):
                masked.encode(vaes.ours, picture, picture[..., 0])
        else:
            vaes.same(lambda vae: masked.encode(vae, picture, picture[..., 0])[0]["samples"])


def test_what_nodes_ask_of_it_is_what_core_answers(vaes: TwoVaes) -> None:
    ours, theirs = vaes.ours, vaes.theirs
    for name in (
        "latent_channels",
        "latent_dim",
        "output_channels",
        "downscale_index_formula",
        "upscale_index_formula",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("spacial_compression_decode", "spacial_compression_encode", "temporal_compression_decode"):
        assert getattr(ours, name)() == getattr(theirs, name)(), name
    assert ours.upscale_ratio[0](21) == 81 and ours.downscale_ratio[0](81) == 21
    assert ours.process_output(torch.tensor(-3.0)) == 0 and ours.process_input(torch.tensor(1.0)) == 1
    ours.throw_exception_if_invalid()
    assert isinstance(ours, vaes.core["comfy.sd"].VAE)


def test_model_management_holds_nothing_of_it(vaes: TwoVaes) -> None:
    management = vaes.core["comfy.model_management"]
    vaes.ours.encode(pictures(1, 64, 64))
    (loaded,) = [each for each in management.current_loaded_models if each.model is vaes.ours.patcher]
    assert (loaded.model_memory(), vaes.ours.model_size()) == (0, 0)
    assert list(vaes.ours.first_stage_model.parameters()) == []
    management.unload_all_models()
    with pytest.raises(ValueError, match="has no weights in ComfyUI"):
        vaes.ours.get_sd()


def test_a_vae_of_twice_the_size_says_so(core: Modules) -> None:
    class Doubled(PlainVae):
        def decode(self, latents: Tensor) -> Tensor:
            return super().decode(latents).repeat_interleave(2, 3).repeat_interleave(2, 4)

    vae = weightless(WAN21, Doubled(FILES[WAN21]), upscale=2)
    asked = latents(WAN21, 1, 2, 12, 16)
    whole = vae.decode(asked)
    assert whole.shape == (1, 5, 192, 256, 3)
    assert (vae.spacial_compression_decode(), vae.spacial_compression_encode()) == (16, 8)
    # As ComfyUI runs its nodes: where one tile is the whole, newer ones change it in place.
    with torch.inference_mode():
        tiled = vae.decode_tiled(asked, tile_x=12, tile_y=16, overlap=4)
    assert tiled.shape == whole.shape and (tiled - whole).abs().max() < LIMIT


def test_options_that_no_wan_vae_takes_are_refused(core: Modules) -> None:
    vae = weightless(WAN21, SimpleNamespace())
    with pytest.raises(ValueError, match="octree_resolution, which a Wan VAE does not take"):
        vae.decode(latents(WAN21), vae_options={"octree_resolution": 256})
