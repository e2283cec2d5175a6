"""One sampling of ComfyUI's, whose evaluations an `Evaluator` computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...distributed.job.errors import counted, listed
from ...distributed.job.evaluator import (
    KEPT_AT_LEAST,
    KEPT_ROW_BYTES,
    KEPT_VOLUME_BYTES,
    MAX_CONTROL_BYTES,
    MAX_CONTROLS,
    Evaluator,
    SampleConditioning,
    SampleControl,
)
from ...distributed.job.job import FLOAT_BYTES
from ...wan.model.latent_space import TEMPORAL_STRIDE, WAN21
from ..host.exceptions import told_to_comfyui
from ..host.tensors import check_finite
from .unsupported import check_conds, check_options

if TYPE_CHECKING:
    from torch import Tensor

GIB = 1 << 30


class Evaluation:
    """Translates ComfyUI's calls.

    Args:
        start: gives the evaluator; called for the first evaluation only, which a cache may make none.
    """

    def __init__(self, start: Callable[[], Evaluator]) -> None:
        self._start = start
        self._evaluator: Evaluator | None = None
        self._rows, self._volumes = _Known(KEPT_ROW_BYTES), _Known(KEPT_VOLUME_BYTES)

    def velocity(
        self, x: Tensor, timestep: Tensor, context: Tensor, options: Mapping[str, Any], conds: Mapping[str, Any]
    ) -> Tensor:
        """As `Transformer.velocity`. Raises ValueError for what cannot be done elsewhere."""
        import torch
        from torch.nn.functional import pad

        check_options(options)
        check_conds(conds)
        rows, columns = x.shape[-2:]
        whole = x.detach().to("cpu", torch.float32)
        if rows % 2 or columns % 2:
            # Of an area; ComfyUI's model repeats the other edge.
            whole = pad(whole, (0, columns % 2, 0, rows % 2, 0, 0), mode="circular")
        # As ComfyUI's model takes one for all.
        timestep = timestep.expand(x.shape[0], *timestep.shape[1:])
        given = self._samples(context, conds, tuple(whole.shape), options)
        if self._evaluator is None:
            check_finite("what the sampler starts from (latents and pictures)", whole)
        with told_to_comfyui():
            if self._evaluator is None:
                self._evaluator = self._start()
            velocity = self._evaluator.evaluate(whole.contiguous(), timestep.detach().to("cpu", torch.float32), given)
        return velocity[..., :rows, :columns].to(x.device)

    def close(self) -> None:
        """The sampling is over."""
        if self._evaluator is not None:
            self._evaluator.close()

    def _samples(
        self, context: Tensor, conds: Mapping[str, Any], shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> list[SampleConditioning]:
        """What each sample of a batch is conditioned on: ComfyUI stacks prompts, each with all latents of its batch."""
        count = shape[0]
        prompts: Sequence[int] = options.get("cond_or_uncond") or [0]
        if count % len(prompts):
            # A node's wrapper around the model asks for a part of the batch, or for more.
            prompts = [0]
        each = count // len(prompts)
        pictures, videos = conds.get("clip_fea"), conds.get("vace_context")
        strengths, references = conds.get("vace_strength"), conds.get("reference_latent")
        cameras = conds.get("camera_conditions")
        poses, faces = conds.get("pose_latents"), conds.get("face_pixel_values")
        return [
            SampleConditioning(
                text=self._rows.same(_of_sample(context, i)),
                picture=None if pictures is None else self._rows.same(_of_sample(pictures, i)),
                controls=() if videos is None else self._controls(_of_sample(videos, i), strengths, shape[2:]),
                reference=None if references is None else self._reference(_of_sample(references, i), shape[3:]),
                conditional=prompts[i // each] == 0,
                camera=None if cameras is None else self._camera(_of_sample(cameras, i), shape[2:]),
                pose=None if poses is None else self._pose(_of_sample(poses, i), shape[2:]),
                face=None if faces is None else self._face(_of_sample(faces, i), shape[2]),
            )
            for i in range(count)
        ]

    def _controls(self, videos: Tensor, strengths: Any, size: tuple[int, ...]) -> tuple[SampleControl, ...]:
        """Of one sample's VACE context, [n, 96, T, h, w]."""
        if tuple(videos.shape[2:]) != size:
            raise ValueError(
                f"the VACE control is of [{listed(videos.shape[2:])}] latent frames, rows and columns, and what is "
                f"sampled of [{listed(size)}]: take the latents of the same WanVaceToVideo. A control is not cut to "
                "areas or context windows"
            )
        if not isinstance(strengths, list) or len(strengths) != len(videos):
            raise ValueError(
                f"vace_strength is {strengths!r}; it must be a list of one for each of {len(videos)} controls"
            )
        count, taken = len(videos), videos.numel() * FLOAT_BYTES
        if count > MAX_CONTROLS or taken > MAX_CONTROL_BYTES:
            raise ValueError(
                f"the prompt has {counted(count, 'VACE control')}, {taken / GIB:.1f} GiB; a sampling on several GPUs "
                f"takes at most {MAX_CONTROLS}, and {MAX_CONTROL_BYTES / GIB:g} GiB. Chain fewer WanVaceToVideo, or "
                "make the video smaller or shorter"
            )
        return tuple(
            SampleControl(self._volumes.same(video), float(strength))
            for video, strength in zip(videos, strengths, strict=True)
        )

    def _reference(self, picture: Tensor, sides: tuple[int, ...]) -> Tensor:
        """Of one sample's, [C, h, w]."""
        if tuple(picture.shape[1:]) != sides:
            raise ValueError(
                f"the reference picture is of [{listed(picture.shape[1:])}] latent rows and columns, and what is "
                f"sampled of [{listed(sides)}]: take the latents of the node that gives it. It is not cut to areas"
            )
        return self._volumes.same(picture[:, None])

    def _camera(self, rays: Tensor, size: tuple[int, ...]) -> Tensor:
        """Of one sample's, [24, T, height, width]."""
        frames, rows, columns = size
        expected = frames, rows * WAN21.stride, columns * WAN21.stride
        if tuple(rays.shape[1:]) != expected:
            raise ValueError(
                f"the camera is of [{listed(rays.shape[1:])}] latent frames, height and width, and what is sampled of "
                f"[{listed(expected)}]: give WanCameraEmbedding and WanCameraImageToVideo the same. A camera is not "
                "cut to areas or context windows"
            )
        return self._volumes.same(rays)

    def _pose(self, latents: Tensor, size: tuple[int, ...]) -> Tensor:
        """Of one sample's, [C, P, h, w]."""
        frames, *sides = size
        if latents.shape[1] > frames - 1 or list(latents.shape[2:]) != sides:
            raise ValueError(
                f"the pose is of [{listed(latents.shape[1:])}] latent frames, rows and columns, and what is sampled of "
                f"[{listed((frames - 1, *sides))}] behind its first frame: take the latents of the same "
                "WanAnimateToVideo. A pose is not cut to areas or context windows"
            )
        return self._volumes.same(latents)

    def _face(self, pictures: Tensor, frames: int) -> Tensor:
        """Of one sample's, [3, F, 512, 512]."""
        if (pictures.shape[1] - 1) // TEMPORAL_STRIDE + 2 > frames:
            raise ValueError(
                f"the face is of {pictures.shape[1]} frames, and what is sampled of {frames} latent ones with the one "
                "in front: take the latents of the same WanAnimateToVideo. A face is not cut to context windows"
            )
        return self._volumes.same(pictures)


class _Known:
    """The same object for the same values: ComfyUI copies them for each call.

    Args:
        most: bytes of what is remembered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._tensors: list[Tensor] = []

    def same(self, given: Tensor) -> Tensor:
        """On the CPU, in float32."""
        import torch

        given = given.detach().to("cpu", torch.float32)
        for known in self._tensors:
            if known.shape == given.shape and torch.equal(known, given):
                return known
        # ComfyUI runs in inference mode, whose tensors do not tell whether they have been changed.
        with torch.inference_mode(False):
            kept = given.clone(memory_format=torch.contiguous_format)
        self._tensors.insert(0, kept)
        sizes = itertools.accumulate(max(tensor.nbytes, KEPT_AT_LEAST) for tensor in self._tensors)
        within = sum(size <= self._most for size in sizes)
        del self._tensors[max(within, 1) :]
        return kept


def _of_sample(stacked: Tensor, index: int) -> Tensor:
    return stacked[index % stacked.shape[0]]
