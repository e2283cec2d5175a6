"""Pictures and latents that a video starts from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from wan_pack.wan.model.patch import patchify
from wan_pack.wan.model.variants import VARIANTS
from wan_pack.wan.sampling.conditioning import build_conditioning, start_latents
from wan_pack.wan.sampling.control import build_controls
from wan_pack.wan.sampling.denoise import Known, denoise, noised
from wan_pack.wan.sampling.image_channels import Given, image_frames, image_mask
from wan_pack.wan.sampling.picture import fit_image, fit_mask
from wan_pack.wan.sampling.schedule import SOLVERS, make_solver
from wan_pack.wan.vae.latents import denormalise

T2V, I2V, TI2V = (VARIANTS[name] for name in ("T2V", "I2V", "TI2V-5B"))
NOISE = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def build(inputs: dict[str, torch.Tensor], **settings: object):
    arguments = {
        "variant": T2V,
        "num_frames": 9,
        "sigma": 1.0,
        "add_noise": True,
        "encode": encode,
    } | settings
    return build_conditioning(inputs, arguments.pop("noise", NOISE), **arguments)


def encode(video: torch.Tensor) -> torch.Tensor:
    """Stands for a VAE: what it was given can be read off what it returns."""
    frames = (video.shape[2] - 1) // 4 + 1
    return video.mean() * torch.ones(1, 16, frames, video.shape[3] // 8, video.shape[4] // 8)


@pytest.mark.parametrize(
    ("size", "frame"), [((50, 80), (32, 32)), ((80, 50), (32, 32)), ((20, 20), (64, 32)), ((32, 64), (64, 32))]
)
@pytest.mark.parametrize("name", ["I2V", "TI2V-5B"])
def test_a_picture_covers_the_frame_and_keeps_its_middle(size: tuple[int, int], frame: tuple[int, int], name: str):
    picture = torch.zeros(*size, 3)
    picture[size[0] // 2 - 3 : size[0] // 2 + 3, size[1] // 2 - 3 : size[1] // 2 + 3] = 1.0
    fitted = fit_image(picture, *frame, VARIANTS[name])
    assert fitted.shape == (3, frame[1], frame[0]) and fitted.is_contiguous()
    bright = (fitted[0] > 0).nonzero().float().mean(0)
    assert (bright - torch.tensor([frame[1] / 2 - 0.5, frame[0] / 2 - 0.5])).abs().max() < 1.5
    assert fitted[0, 0, 0] < -0.9


def test_a_picture_of_the_frames_size_is_not_resampled():
    picture = torch.rand(32, 64, 3)
    fitted = fit_image(picture, 64, 32, I2V)
    assert torch.equal(fitted, (picture * 2 - 1).permute(2, 0, 1)) and fitted.is_contiguous()


def test_the_mask_marks_the_frames_that_are_given():
    start = image_mask((3, 2, 2), start=True, end=False)
    assert start[:, 0].all()
    assert not start[:, 1:].any()
    both = image_mask((3, 2, 2), start=True, end=True)
    # The last frame is the last of the four that the last latent frame stands for.
    assert both[3, 2].all()
    assert not both[:3, 2].any()
    assert not both[:, 1].any()


def test_frames_that_are_not_given_are_grey():
    start, end = torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), -0.25)
    frames = image_frames(start, end, 9)
    assert [frames[0, 0, i, 0, 0].item() for i in range(9)] == [0.5, 0, 0, 0, 0, 0, 0, 0, -0.25]
    assert image_frames(None, end, 5)[0, 0, 0].abs().max() == 0


def test_an_i2v_model_gets_mask_then_latents():
    picture = torch.full((3, 32, 48), 0.9)
    image = build({"start_image": picture}, variant=I2V).conditions.image
    assert image.shape == (20, 3, 4, 6)
    assert torch.equal(image[:4], image_mask((3, 4, 6), start=True, end=False))
    torch.testing.assert_close(image[4:], torch.full((16, 3, 4, 6), 0.1))
    # A last frame alone, of which the channels' mean speaks as well.
    image = build({"end_image": picture}, variant=I2V).conditions.image
    assert torch.equal(image[:4], image_mask((3, 4, 6), start=False, end=True))
    torch.testing.assert_close(image[4:], torch.full((16, 3, 4, 6), 0.1))
    given = torch.randn(20, 3, 4, 6)
    assert build({"image_conditioning": given}, variant=I2V).conditions.image is given


def test_latents_start_at_the_noise_level_of_the_first_step():
    samples = torch.randn(16, 3, 4, 6)
    raw = denormalise(samples, 16)
    torch.testing.assert_close(build({"samples": raw}, sigma=0.25).latents, 0.75 * samples + 0.25 * NOISE)
    torch.testing.assert_close(build({"samples": raw}, add_noise=False).latents, samples)
    assert torch.equal(build({}).latents, NOISE)
    assert torch.equal(start_latents(NOISE, samples, sigma=1.0, add_noise=True), NOISE)


def test_a_first_frame_stays_and_has_timestep_zero():
    noise = torch.randn(48, 3, 2, 4)
    built = build({"start_image": torch.full((3, 32, 64), 0.6)}, variant=TI2V, noise=noise, encode=encode_48)
    assert built.known_mask[0].all()
    assert not built.known_mask[1:].any()
    known = Known(patchify(built.known), patchify(built.known_mask.expand_as(built.known)))
    assert known.which_timestep.tolist() == [0, 0] + [1] * 4
    tokens = denoise(
        patchify(noise), solver=make_solver("euler", 3, 5.0), guidance=Always(), known=known,
        predict=lambda expert, tokens, timestep, passes: [tokens],
    )  # fmt: skip
    torch.testing.assert_close(tokens[:2], torch.full((2, 192), 0.6))
    assert not torch.equal(tokens[2:], patchify(noise)[2:])


def test_a_noise_mask_keeps_what_it_covers():
    samples, mask = torch.randn(48, 3, 2, 4), torch.ones(3, 2, 4)
    mask[0] = 0
    noise = torch.randn(48, 3, 2, 4)
    built = build({"samples": denormalise(samples, 48), "noise_mask": mask}, variant=TI2V, noise=noise)
    assert torch.equal(built.known_mask, mask == 0)
    torch.testing.assert_close(built.known, samples, rtol=1e-4, atol=1e-5)
    assert torch.equal(built.latents, noise)


def encode_48(video: torch.Tensor) -> torch.Tensor:
    return video.mean() * torch.ones(1, 48, 1, video.shape[3] // 16, video.shape[4] // 16)


class Always:
    """Guidance of 1 by one expert."""

    def expert(self, timestep: float) -> str:
        return "low_noise"

    def scale(self, expert: str) -> float:
        return 1.0


def velocity(expert: str, tokens: torch.Tensor, timestep: float, passes: tuple[bool, ...]) -> list[torch.Tensor]:
    return [torch.tanh(tokens) * timestep / 1000]


@pytest.mark.parametrize("name", ["euler"])
def test_two_runs_of_a_part_each_equal_one_run(name: str):
    """Without a history, stopping and going on changes nothing."""
    start = torch.randn(5, 64)
    arguments = {"guidance": Always(), "predict": velocity}
    whole = denoise(start, solver=make_solver(name, 4, 5.0), **arguments)
    half = denoise(start, solver=make_solver(name, 4, 5.0), steps=range(2), **arguments)
    rest = denoise(half, solver=make_solver(name, 4, 5.0, 2), steps=range(2, 4), **arguments)
    assert not torch.equal(half, whole)
    torch.testing.assert_close(rest, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("first", [1, 3])
def test_every_solver_arrives_from_the_middle_of_its_schedule(name: str, first: int):
    solver = make_solver(name, 6, 5.0, first)
    noise, video = torch.randn(2, 6, 4).unbind(0)
    sample = noised(video, noise, solver.sigmas[first])
    for index in range(first, 6):
        sample = solver.step(noise - video, index, sample)
    torch.testing.assert_close(sample, video, rtol=1e-4, atol=1e-4)


def test_a_noise_mask_is_cut_at_a_half():
    samples, mask = torch.randn(48, 3, 2, 4), torch.full((3, 2, 4), 0.5)
    mask[0] = 0.49
    noise = torch.randn(48, 3, 2, 4)
    built = build({"samples": denormalise(samples, 48), "noise_mask": mask}, variant=TI2V, noise=noise)
    assert built.known_mask[0].all() and not built.known_mask[1:].any()


def test_a_control_is_cut_at_a_half_and_each_of_four_frames_has_a_mask_of_its_own():
    """Half is kept. What is encoded is cut; the mask itself follows as it is."""
    seen: list[torch.Tensor] = []

    def watched(video: torch.Tensor) -> torch.Tensor:
        seen.append(video[0])
        return encode(video)

    video, mask = torch.rand(3, 9, 32, 48) + 0.5, torch.full((9, 32, 48), 0.5)
    mask[3], mask[4] = 0.51, 1.0
    (control,) = build_controls({"control_video": video, "control_mask": mask}, (9, 32, 48), watched)
    kept, anew = seen
    assert torch.equal(kept[:, [0, 8]], video[:, [0, 8]]) and not kept[:, [3, 4]].any()
    assert torch.equal(anew[:, [3, 4]], video[:, [3, 4]]) and not anew[:, [0, 8]].any()
    # Nine frames are three latent ones: of each three the middle one speaks.
    assert [control.values[32:, t].unique().tolist() for t in range(3)] == [[0.5], [1.0], [0.5]]


def test_reference_pictures_keep_their_order_in_front_of_the_video():
    references = torch.stack([torch.full((3, 32, 48), value) for value in (0.25, 0.75)])
    given = {"reference_images": references, "vace_strength": torch.tensor([0.5])}
    (control,) = build_controls(given, (9, 32, 48), encode)
    assert control.strength == 0.5 and control.values.shape == (96, 2 + 3, 4, 6)
    assert control.values[0, :, 0, 0].tolist() == [0.25, 0.75, 0.0, 0.0, 0.0]
    assert not control.values[16:32].any(), "nothing of them is made anew"
    assert control.values[32:, :2].abs().max() == 0 and control.values[32:, 2:].min() == 1


def test_controls_that_others_have_encoded_come_each_with_its_strength():
    contexts = torch.randn(2, 96, 3, 4, 6)
    one, two = build_controls(
        {"vace_context": contexts, "vace_strength": torch.tensor([0.5, -1.0])}, (9, 32, 48), encode
    )
    assert (one.strength, two.strength) == (0.5, -1.0)
    assert torch.equal(one.values, contexts[0]) and torch.equal(two.values, contexts[1])
    (alone,) = build_controls({"vace_context": contexts[:1]}, (9, 32, 48), encode)
    assert alone.strength == 1.0


@pytest.mark.parametrize("size", [(32, 67), (35, 64)])
def test_of_an_odd_rest_pictures_and_masks_lose_the_same_side(size: tuple[int, int]):
    picture = torch.rand(*size, 3)
    mask = fit_mask(picture[None, ..., 0], 64, 32)
    assert torch.equal(mask * 2 - 1, fit_image(picture, 64, 32, TI2V)[:1])


@pytest.mark.parametrize("wide", [True, False])
def test_what_is_over_is_cut_off_not_squeezed(wide: bool):
    """A picture of the frame's height, or width, and four times the other side: its middle, as it is."""
    size = (32, 256) if wide else (128, 64)
    picture = torch.rand(*size, 3)
    middle = picture[:, 96:160] if wide else picture[48:80]
    for variant in (I2V, TI2V):
        assert torch.equal(fit_image(picture, 64, 32, variant), (middle * 2 - 1).permute(2, 0, 1))
    assert torch.equal(fit_mask(picture[None, ..., 0], 64, 32), middle[None, ..., 0])
    # And where it has to be scaled, by the same factor both ways: a square of ones stays one.
    large = torch.zeros(2 * size[0], 2 * size[1])
    rows, cols = size
    large[rows - 16 : rows + 16, cols - 16 : cols + 16] = 1
    small = fit_mask(large[None], 64, 32)[0] > 0.5
    assert (small.any(1).sum().item(), small.any(0).sum().item()) == (16, 16)
    square = fit_image(large[..., None].expand(-1, -1, 3), 64, 32, TI2V)[0] > 0
    assert (square.any(1).sum().item(), square.any(0).sum().item()) == (16, 16)


def test_a_picture_and_a_control_video_have_zeros_behind_them():
    given = Given(start=torch.full((3, 32, 48), 0.5), num_frames=9, shape=(16, 3, 4, 6), encode=encode)
    assert torch.equal(given.followed(), torch.zeros(16, 3, 4, 6))
    picture = given.picture()
    assert torch.equal(picture[:, :1], torch.full((16, 1, 4, 6), 0.5)) and not picture[:, 1:].any()
    followed = replace(given, start=None, control=torch.full((3, 5, 32, 48), 0.25))
    assert torch.equal(followed.followed()[:, :2], torch.full((16, 2, 4, 6), 0.25))
    assert not followed.followed()[:, 2:].any() and not followed.picture().any()
    # What is given no frame is encoded from none: zeros, not grey that was encoded.
    nothing = replace(given, start=None, encode=lambda video: pytest.fail("nothing is there to encode"))
    assert torch.equal(nothing.frames(), torch.zeros(16, 3, 4, 6)) and not nothing.mask().any()


def test_fun_models_of_5b_keep_the_first_frame_and_are_told_of_it():
    """As their makers' own code does; behind it a camera or nothing to follow."""
    picture, noise = torch.full((3, 64, 96), 0.9), torch.randn(48, 3, 4, 6, generator=torch.Generator().manual_seed(1))

    def encode_22(video: torch.Tensor) -> torch.Tensor:
        return video.mean() * torch.ones(1, 48, (video.shape[2] - 1) // 4 + 1, 4, 6)

    for name, first, told in (("Fun-InP 5B", 4, 0.1), ("Fun-Control 5B", 52, 0.9), ("Fun-Camera 5B", 4, 0.9)):
        made = build({"start_image": picture}, variant=VARIANTS[name], noise=noise, encode=encode_22)
        image = made.conditions.image
        assert image is not None and len(image) == VARIANTS[name].channels[0] - 48
        torch.testing.assert_close(image[first:, 0], torch.full((48, 4, 6), told))
        assert torch.equal(image[first - 4 : first], image_mask((3, 4, 6), start=True, end=False))
        assert made.known is not None and made.known_mask is not None
        assert made.known_mask[0].all() and not made.known_mask[1:].any()
        torch.testing.assert_close(made.known[:, 0], torch.full((48, 4, 6), 0.9))
    # Frames that come as latents, with channels that other nodes have made.
    samples, mask = torch.ones(48, 3, 4, 6), torch.ones(3, 4, 6)
    mask[0] = 0
    given = {"samples": samples, "noise_mask": mask, "image_conditioning": torch.zeros(52, 3, 4, 6)}
    made = build(given, variant=VARIANTS["Fun-InP 5B"], noise=noise, encode=encode_22)
    assert made.known_mask is not None and torch.equal(made.known_mask, mask < 0.5)
    assert made.conditions.image is given["image_conditioning"]


def test_a_camera_alone_has_no_picture_to_begin_with():
    rays = torch.randn(24, 3, 32, 48)
    for name in ("Fun-Camera", "Wan2.1 Fun-Camera"):
        made = build({"camera_conditions": rays}, variant=VARIANTS[name]).conditions
        assert made.image is not None and not made.image.any() and made.camera is not None
        assert made.camera.values is rays and made.camera.stride == 8


def test_a_face_is_another_one_with_the_negative_prompt_and_a_pose_is_not():
    face, pose = torch.zeros(3, 5, 2, 2), torch.zeros(16, 2, 4, 6)
    given = {"image_conditioning": torch.zeros(20, 3, 4, 6), "pose_video_latent": pose, "face_video_pixels": face}
    alone = build(given, variant=VARIANTS["Animate"]).conditions
    assert alone.face is not None and alone.face.pictures is face and alone.face.frames == 3
    assert alone.pose is not None and alone.pose.values is pose and alone.instead == {"face": None}
    null = torch.ones(3, 5, 2, 2)
    besides = build(given | {"face_video_pixels_null": null}, variant=VARIANTS["Animate"]).conditions.besides(keep=True)
    assert [besides[conditional].face.pictures for conditional in (True, False)] == [face, null]
