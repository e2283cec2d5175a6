"""What the evaluations of one sampling are conditioned on, on one rank: one brings it, and those behind it name it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...wan.model.config import WanConfig
from ...wan.model.patch import patchify
from ...wan.transformer.animate import Face, Pose
from ...wan.transformer.camera import Camera
from ...wan.transformer.context import Context
from ...wan.transformer.reference import Reference
from ...wan.transformer.vace import Control
from ..group.evaluation_request import Evaluation, SentKeys
from ..job.errors import JobError
from ..job.evaluator import KEPT_ROW_BYTES, KEPT_VOLUME_BYTES, NO_CONTROL, NO_PICTURE
from ..parallel.sequence import SequenceShard
from ..planning.gpu_memory import GUIDED_PROMPTS

FACE_CHANNELS = 3


class KeptConditions:
    """Of one model.

    Args:
        keeps: what is derived of a text or a picture stays between evaluations.
    """

    def __init__(self, config: WanConfig, device: torch.device, *, keeps: bool) -> None:
        self._config, self._device, self._keeps = config, device, keeps
        self._keys, self._volume_keys = SentKeys(KEPT_ROW_BYTES), SentKeys(KEPT_VOLUME_BYTES)
        self._rows: dict[str, Tensor] = {}
        self._volumes: dict[str, tuple[tuple[int, ...], Tensor]] = {}
        """Frames, rows and columns, and the rank's tokens in the host's memory."""
        self._contexts: dict[str, Context] = {}
        """The one that was used last is last."""
        self._pictures: dict[str, Context] = {}
        self._controls: dict[str, Tensor] = {}
        """Both of the last evaluation."""
        self._whole: dict[str, Tensor] = {}
        """References, poses and faces, in the host's memory."""
        self._cameras: dict[str, tuple[tuple[int, ...], Camera]] = {}
        """As `_volumes`: what the rank needs of it."""
        self._faces: dict[tuple[str, tuple[int, ...]], Face] = {}
        """Those of the last evaluation, with what is derived of them, by the size of its latents."""
        self._embedded_cameras: dict[str, Camera] = {}
        """Those of the last evaluation."""

    def check(self, evaluation: Evaluation) -> None:
        """Raises JobError if the model is given what it does not look at, or lacks what it does."""
        if evaluation.pictures and not self._config.image_branch:
            raise JobError("the sampler gives what CLIP sees in a picture, and this model has no image branch")
        if self._config.image_branch and not evaluation.pictures:
            raise JobError(NO_PICTURE)
        if evaluation.controls and not self._config.vace_layers:
            raise JobError("the sampler gives a control video, and this model has no VACE blocks")
        if self._config.vace_layers and not evaluation.controls:
            raise JobError(NO_CONTROL)
        if evaluation.cameras and not self._config.camera:
            raise JobError("the sampler tells where the camera is, and this model has no place for that")
        if (evaluation.poses or evaluation.faces) and not self._config.animates:
            raise JobError("the sampler gives a pose or a face, and this model takes over neither")
        if evaluation.references and not self._config.reference_frame:
            raise JobError("the sampler gives a reference picture, and this model has no place for one")
        if evaluation.references and evaluation.by_frame:
            raise JobError("the sampler gives a reference picture and timesteps by frame; no model takes both")

    def take(self, evaluation: Evaluation, views: Sequence[memoryview], shard: SequenceShard) -> None:
        """Keeps what comes with an evaluation.

        Args:
            views: of what it sends, in order.
            shard: the rank's tokens.
        Raises:
            JobError: it is of another model.
        """
        config, stride = self._config, self._config.variant.latents.stride
        followed = [key for keys in evaluation.controls for key in keys]
        kinds = (
            (evaluation.texts, "the text has rows", config.text_dim),
            (evaluation.pictures, "what CLIP sees has rows", config.clip_dim),
            (followed, "the control is", config.control_dim),
            (evaluation.references, "the reference picture is", config.reference_dim),
            (evaluation.cameras, "the camera's rays are", config.camera_dim // stride**2),
            (evaluation.poses, "the pose is", config.out_dim),
            (evaluation.faces, "the face is", FACE_CHANNELS),
        )
        for sent, view in zip(evaluation.sent, views, strict=True):
            values = torch.frombuffer(view, dtype=getattr(torch, sent.dtype)).view(sent.shape)
            what, taken = next((what, taken) for keys, what, taken in kinds if sent.key in keys)
            given = sent.shape[-1] if sent.key in evaluation.rows else sent.shape[0]
            if given != taken:
                raise JobError(f"{what} of {given} channels; this model takes {taken}")
            if sent.key in evaluation.rows:
                self._rows[sent.key] = values.clone()
            elif sent.key in evaluation.cameras:
                frames, height, width = sent.shape[1:]
                camera = Camera(values, stride, keep=self._keeps).on_rank(shard.split, shard.length, self._device)
                self._cameras[sent.key] = (frames, height // stride, width // stride), camera
            elif sent.key in followed:
                # A copy: what it is cut from is the other end's memory, or the whole video's.
                self._volumes[sent.key] = sent.shape[1:], shard.split(patchify(values)).clone()
            else:
                self._whole[sent.key] = values.clone()
        for key in self._keys.use(evaluation.rows, evaluation.sent):
            self._rows.pop(key, None)
        for key in self._volume_keys.use(evaluation.volumes, evaluation.sent):
            self._volumes.pop(key, None)
            self._whole.pop(key, None)
            self._cameras.pop(key, None)
        for keys, there in (
            (evaluation.rows, self._rows),
            (evaluation.volumes, self._volumes.keys() | self._whole.keys() | self._cameras.keys()),
        ):
            if missing := [key for key in keys if key not in there]:
                raise JobError(f"{missing[0]} is asked for, but was never sent")
        sizes = {self._volumes[key][0] for keys in evaluation.controls for key in keys}
        if sizes - {evaluation.shape[2:]}:
            raise JobError(f"a control is of {sizes} frames, rows and columns; the latents are {evaluation.shape[2:]}")
        sizes = {self._cameras[key][0] for key in evaluation.cameras}
        if sizes - {evaluation.shape[2:]}:
            raise JobError(
                f"a camera's rays are of {sizes} frames, rows and columns; the latents are {evaluation.shape[2:]}"
            )

    def texts(self, evaluation: Evaluation) -> list[Context]:
        """For each sample that of its text. What is derived of a text is kept for as many as a plan counts."""
        asked = {key: self._contexts.get(key) or self._context(key) for key in evaluation.texts}
        if self._keeps:
            last = {key: context for key, context in self._contexts.items() if key not in asked} | asked
            self._contexts = dict(list(last.items())[-GUIDED_PROMPTS:])
        return [asked[key] for key in evaluation.texts]

    def pictures(self, evaluation: Evaluation) -> list[Context | None]:
        """For each sample, where the model looks at pictures. Kept while they are the same, as texts are."""
        known, self._pictures = self._pictures, {}
        for key in evaluation.pictures:
            self._pictures[key] = known.get(key) or self._context(key)
        return [self._pictures[key] for key in evaluation.pictures] or [None] * evaluation.shape[0]

    def controls(self, evaluation: Evaluation) -> list[tuple[Control, ...]]:
        """For each sample, of the rank's tokens; on the device as long as they are the same."""
        known, self._controls = self._controls, {}
        for key in (key for keys in evaluation.controls for key in keys):
            self._controls[key] = known[key] if key in known else self._volumes[key][1].to(self._device)
        found = [
            tuple(Control(self._controls[key], strength) for key, strength in zip(keys, strengths, strict=True))
            for keys, strengths in zip(evaluation.controls, evaluation.strengths, strict=True)
        ]
        return found or [()] * evaluation.shape[0]

    def references(self, evaluation: Evaluation, shard: SequenceShard) -> list[Reference | None]:
        """For each sample, of the rank's tokens, where a picture is in front."""
        found = [
            Reference(self._whole[key]).on_rank(shard.split, shard.length, self._device)
            for key in evaluation.references
        ]
        return [*found] or [None] * evaluation.shape[0]

    def cameras(self, evaluation: Evaluation) -> list[Camera | None]:
        """For each sample. What is derived of one is kept while it is the same."""
        known, self._embedded_cameras = self._embedded_cameras, {}
        for key in evaluation.cameras:
            self._embedded_cameras[key] = known.get(key) or replace(self._cameras[key][1])
        return [self._embedded_cameras[key] for key in evaluation.cameras] or [None] * evaluation.shape[0]

    def poses(self, evaluation: Evaluation, shard: SequenceShard) -> list[Pose | None]:
        """For each sample, of the rank's tokens."""
        found = [Pose(self._whole[key]).on_rank(shard.split, shard.length, self._device) for key in evaluation.poses]
        return [*found] or [None] * evaluation.shape[0]

    def faces(self, evaluation: Evaluation, shard: SequenceShard) -> list[Face | None]:
        """For each sample, of the rank's tokens. What is derived of one is kept while it is the same."""
        known, self._faces = self._faces, {}
        size = evaluation.shape[2:]
        for key in evaluation.faces:
            face = known.get((key, size)) or Face(self._whole[key], size[0])
            self._faces[key, size] = face if face.runs else face.on_rank(shard.split, shard.length, self._device)
        return [self._faces[key, size] for key in evaluation.faces] or [None] * evaluation.shape[0]

    def _context(self, key: str) -> Context:
        return Context(self._rows[key].to(self._device), keep=self._keeps)
