"""Which tensors a model takes, and of which shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from jobs import stub_job
from tiny import TINY, TINY_VACE
from wan_pack.distributed.job.input_tensors import check_inputs, latents_shape
from wan_pack.wan.model.variants import VARIANTS

TEXT = {"context": (7, TINY.text_dim)}
I2V = dataclasses.replace(TINY, in_dim=36)
LATENTS = (16, 2, 6, 8)


def check(config: Any, settings: dict[str, Any] | None = None, **shapes: Any) -> None:
    """Of a job of 64x48 pixels and 5 frames."""
    check_inputs(stub_job(**(settings or {})), config, {**TEXT, **shapes})


@pytest.mark.parametrize("rows", [1, 512])
def test_rows_of_text(rows: int):
    check(TINY, context=(rows, TINY.text_dim), context_null=(rows, TINY.text_dim))


@pytest.mark.parametrize("shape", [(0, TINY.text_dim), (513, TINY.text_dim), (7, TINY.text_dim + 1), (7,), (1, 7, 64)])
@pytest.mark.parametrize(("name", "words"), [("context", "text_embeds"), ("context_null", "negative_embeds")])
def test_other_text_is_refused(name: str, words: str, shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=f"{words} has shape"):
        check(TINY, **{name: shape})


def test_a_job_needs_text():
    with pytest.raises(ValueError, match="neither a prompt to encode nor embeddings"):
        check_inputs(stub_job(), TINY, {})


def test_pictures_are_of_the_videos_size():
    check(I2V, start_image=(3, 48, 64))
    for shape in ((3, 64, 48), (1, 48, 64), (3, 48, 65)):
        with pytest.raises(ValueError, match="start_image has shape"):
            check(I2V, start_image=shape)
    with pytest.raises(ValueError, match="start_image is given, but the model makes videos from text only"):
        check(TINY, start_image=(3, 48, 64))
    with pytest.raises(ValueError, match="makes videos from an image"):
        check(I2V)


def test_latents_to_start_from_are_of_the_videos_shape():
    check(TINY, samples=LATENTS)
    for shape in ((16, 1, 6, 8), (16, 2, 8, 6), (48, 2, 6, 8)):
        with pytest.raises(ValueError, match="samples has shape"):
            check(TINY, samples=shape)
    for settings, words in (
        ({"strength": 0.5}, r"strength is 0\.5"), ({"start_step": 1}, "start_step is 1"),
        ({"add_noise": False}, "add_noise is False"),
    ):  # fmt: skip
        check(TINY, settings, samples=LATENTS)
        with pytest.raises(ValueError, match=f"{words}, but no latents"):
            check(TINY, settings)


WITH_CLIP = dataclasses.replace(I2V, parts=frozenset({"img_emb"}), clip_dim=64)
PICTURE = {"start_image": (3, 48, 64)}


def test_an_image_branch_needs_the_features_of_one_or_two_pictures():
    for rows in (257, 514):
        check(WITH_CLIP, **PICTURE, clip_features=(rows, 64))
    for shape in ((256, 64), (771, 64), (257, 63), (1, 257, 64)):
        with pytest.raises(ValueError, match=r"this model takes \[257, 64\] or \[514, 64\]"):
            check(WITH_CLIP, **PICTURE, clip_features=shape)
    with pytest.raises(
        ValueError, match=r"choose clip_vision_h as clip_vision in Load .* or connect CLIP Vision Encode"
    ):
        check(WITH_CLIP, **PICTURE)
    with pytest.raises(ValueError, match=r"no image branch, as Wan2\.1 I2V, FLF2V, "):
        check(I2V, **PICTURE, clip_features=(257, 64))


PIXELS = {"control_video": (3, 5, 48, 64), "control_mask": (5, 48, 64), "reference_images": (2, 3, 48, 64)}


def test_a_control_is_of_the_videos_size_and_references_are_in_front():
    check(TINY_VACE)
    check(TINY_VACE, **PIXELS, vace_strength=(1,))
    check(TINY_VACE, vace_context=(3, 96, 4, 6, 8), vace_strength=(3,))
    check(TINY_VACE, reference_images=(2, 3, 48, 64), samples=(16, 4, 6, 8))
    for name, shape in (
        ("control_video", (3, 9, 48, 64)), ("control_video", (5, 48, 64)), ("control_mask", (5, 64, 48)),
        ("reference_images", (3, 48, 64)), ("reference_images", (0, 3, 48, 64)), ("vace_strength", (2,)),
        ("vace_context", (1, 96, 2, 8, 8)), ("vace_context", (1, 96, 1, 6, 8)), ("vace_context", (0, 96, 2, 6, 8)),
        ("vace_context", (96, 2, 6, 8)), ("vace_context", ()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} has shape"):
            check(TINY_VACE, **{name: shape})
    with pytest.raises(ValueError, match="samples has shape"):
        check(TINY_VACE, reference_images=(2, 3, 48, 64), samples=LATENTS)
    with pytest.raises(ValueError, match="control_video and another control, of text_embeds"):
        check(TINY_VACE, control_video=PIXELS["control_video"], vace_context=(1, 96, 2, 6, 8))
    for name, shape in PIXELS.items():
        with pytest.raises(
            ValueError,
            match=rf"{name} is given, but this model \(T2V\) follows no such control; choose one of these: VACE",
        ):
            check(TINY, **{name: shape})
    with pytest.raises(ValueError, match=r"start_image is given; this model \(VACE\) takes control_video,"):
        check(TINY_VACE, start_image=(3, 48, 64))


TI2V = dataclasses.replace(TINY, in_dim=48, out_dim=48)


def test_a_noise_mask_is_for_the_model_that_knows_frames():
    samples, mask = (48, 2, 2, 4), (2, 2, 4)
    settings = {"width": 64, "height": 32}
    check(TI2V, settings, samples=samples, noise_mask=mask)
    with pytest.raises(ValueError, match="the noise mask has shape"):
        check(TI2V, settings, samples=samples, noise_mask=(2, 4, 2))
    with pytest.raises(ValueError, match="a noise mask and start_image are both given"):
        check(TI2V, settings, samples=samples, noise_mask=mask, start_image=(3, 32, 64))
    with pytest.raises(ValueError, match=r"which only TI2V-5B, .* models follow; remove the mask"):
        check(TINY, samples=LATENTS, noise_mask=LATENTS[1:])
    with pytest.raises(ValueError, match="noise_mask is given, but no latents to start from"):
        check(TI2V, settings, noise_mask=mask)


def test_a_picture_comes_once():
    conditioning = (4 + 16, 2, 6, 8)
    check(I2V, image_conditioning=conditioning)
    with pytest.raises(ValueError, match="end_image and image conditioning are both given"):
        check(I2V, end_image=(3, 48, 64), image_conditioning=conditioning)
    with pytest.raises(ValueError, match="image conditioning has shape"):
        check(I2V, image_conditioning=(16, 2, 6, 8))


def test_pictures_for_the_jobs_own_clip():
    job = stub_job()
    looking = dataclasses.replace(job, model=dataclasses.replace(job.model, clip_vision=job.model.vae))
    assert looking.looks and not job.looks
    given = {**TEXT, **PICTURE}
    for count in (1, 2):
        check_inputs(looking, WITH_CLIP, {**given, "clip_pictures": (count, 3, 224, 224)})
    for shape in ((3, 3, 224, 224), (1, 3, 224, 225), (3, 224, 224)):
        with pytest.raises(ValueError, match=r"it must be \[1, 3, 224, 224\] or \[2, 3, 224, 224\]"):
            check_inputs(looking, WITH_CLIP, {**given, "clip_pictures": shape})
    pictures = {"clip_pictures": (1, 3, 224, 224)}
    with pytest.raises(ValueError, match=r"model\.clip_vision is"):
        check_inputs(job, WITH_CLIP, {**given, **pictures})
    with pytest.raises(ValueError, match="clip_features and clip_pictures are both given"):
        check_inputs(looking, WITH_CLIP, {**given, **pictures, "clip_features": (257, 64)})
    with pytest.raises(ValueError, match="no image branch"):
        check_inputs(looking, I2V, {**given, **pictures})


CAMERA = dataclasses.replace(TINY, in_dim=36, parts=frozenset({"control_adapter"}), camera_dim=24 * 64)
CAMERA_5B = dataclasses.replace(CAMERA, in_dim=100, out_dim=48, camera_dim=24 * 256)


def test_a_camera_is_of_the_videos_pixels_and_latent_frames():
    check(CAMERA, camera_conditions=(24, 2, 48, 64))
    check(CAMERA, camera_conditions=(24, 2, 48, 64), start_image=(3, 48, 64))
    check(CAMERA_5B, {"width": 64, "height": 32}, camera_conditions=(24, 2, 32, 64))
    for shape in ((24, 5, 48, 64), (24, 2, 6, 8), (6, 2, 48, 64), (24, 2, 48)):
        with pytest.raises(ValueError, match=r"camera_conditions has shape .*call for \[24, 2, 48, 64\]"):
            check(CAMERA, camera_conditions=shape)
    with pytest.raises(
        ValueError, match=r"follows no such control; choose one of these: Fun-Camera, Wan2\.1 Fun-Camera, Fun-"
    ):
        check(I2V, camera_conditions=(24, 2, 48, 64), start_image=(3, 48, 64))
    with pytest.raises(ValueError, match=r"from an image \(Fun-Camera\): connect start_image, or conditioning"):
        check(CAMERA)


ANIMATE = dataclasses.replace(TINY, in_dim=36, clip_dim=64, parts=VARIANTS["Animate"].parts, face_blocks=1)


def test_animate_takes_a_pose_and_a_face_of_the_video_or_shorter_ones():
    """Its latents have a frame in front of the video's two."""
    base = {"image_conditioning": (20, 3, 6, 8), "clip_features": (257, 64)}
    for frames, pictures in ((2, 5), (1, 1)):
        face = (3, pictures, 512, 512)
        told = {"face_video_pixels": face, "face_video_pixels_null": face, "pose_video_latent": (16, frames, 6, 8)}
        check(ANIMATE, **base, **told)
    check(ANIMATE, **base, samples=(16, 3, 6, 8))
    for name, shape, expected in (
        ("pose_video_latent", (16, 3, 6, 8), r"\[16, 2, 6, 8\]"),
        ("pose_video_latent", (16, 2, 6, 4), r"\[16, 2, 6, 8\]"),
        ("face_video_pixels", (3, 6, 512, 512), r"\[3, 5, 512, 512\]"),
        ("face_video_pixels_null", (3, 5, 512, 256), r"\[3, 5, 512, 512\]"),
        ("image_conditioning", (20, 2, 6, 8), r"\[20, 3, 6, 8\]"),
    ):
        with pytest.raises(ValueError, match=f"call for {expected}"):
            check(ANIMATE, **{**base, name: shape})
    with pytest.raises(ValueError, match=r"from an image \(Animate\): connect conditioning that holds one"):
        check(ANIMATE, clip_features=(257, 64))
    with pytest.raises(ValueError, match=r"through CLIP \(Animate\): connect CLIP Vision Encode to clip_vision_start"):
        check(ANIMATE, image_conditioning=(20, 3, 6, 8))
    with pytest.raises(ValueError, match=r"start_image is given; this model \(Animate\) takes image_conditioning only"):
        check(ANIMATE, start_image=(3, 48, 64), clip_features=(257, 64))
    with pytest.raises(ValueError, match=r"face_video_pixels is given, .*\(T2V\) follows no such control"):
        check(TINY, face_video_pixels=(3, 5, 512, 512))


FOLLOWS = dataclasses.replace(TINY, in_dim=52, parts=frozenset({"ref_conv"}), reference_dim=16)


def test_a_control_video_may_be_shorter_where_no_mask_says_what_is_behind_it():
    for frames in (1, 5):
        check(FOLLOWS, control_video=(3, frames, 48, 64))
    for frames in (0, 2, 3, 4, 9):
        with pytest.raises(ValueError, match=r"control_video has shape .* call for \[3, 5, 48, 64\]"):
            check(FOLLOWS, control_video=(3, frames, 48, 64))
    for shape in ((3,), (3, 1), (3, 1, 64, 48)):
        with pytest.raises(ValueError, match="control_video has shape"):
            check(FOLLOWS, control_video=shape)
    with pytest.raises(ValueError, match="control_video has shape"):
        check(TINY_VACE, control_video=(3, 1, 48, 64))
    with pytest.raises(ValueError, match="control_video and image conditioning are both given"):
        check(FOLLOWS, control_video=(3, 5, 48, 64), image_conditioning=(36, 2, 6, 8))
    check(FOLLOWS, image_conditioning=(36, 2, 6, 8))
    with pytest.raises(ValueError, match=r"connect start_image, control_video, or conditioning that holds one"):
        check(FOLLOWS)


def test_a_reference_picture_is_one_latent_frame_of_the_videos_size():
    video = {"control_video": (3, 5, 48, 64)}
    check(FOLLOWS, **video, reference_latent=(16, 6, 8))
    check(FOLLOWS, **video, reference_images=(1, 3, 48, 64))
    for name, shape in (
        ("reference_latent", (16, 8, 6)), ("reference_latent", (15, 6, 8)), ("reference_latent", (1, 16, 6, 8)),
        ("reference_images", (1, 3, 64, 48)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} has shape"):
            check(FOLLOWS, **video, **{name: shape})
    with pytest.raises(ValueError, match="reference_images and a reference of text_embeds or image_embeds are both"):
        check(FOLLOWS, **video, reference_images=(1, 3, 48, 64), reference_latent=(16, 6, 8))


@pytest.mark.parametrize(
    ("config", "shapes", "frames"),
    [
        (TINY, {}, 2), (TINY_VACE, {}, 2), (TINY_VACE, {"reference_images": (2, 3, 48, 64)}, 4),
        (TINY_VACE, {"vace_context": (1, 96, 5, 6, 8)}, 5), (TINY_VACE, {"vace_context": (1, 96, 1, 6, 8)}, 2),
        (FOLLOWS, {"reference_images": (1, 3, 48, 64)}, 2), (ANIMATE, {}, 3),
    ],
)  # fmt: skip
def test_what_is_sampled_has_the_pictures_in_front(config: Any, shapes: dict[str, Any], frames: int):
    assert latents_shape(stub_job(), config, shapes) == (16, frames, 6, 8)
