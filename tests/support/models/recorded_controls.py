"""VACE's controls of a recorded case, made of its pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def recorded_controls(case: dict[str, Any], io: dict[str, Tensor]) -> tuple[Any, ...]:
    """What is to be encoded must be what was recorded, and so must what comes of it; none for other models.

    The recorded latents stand for the encoder's: they are of no real VAE.
    """
    from wan_pack.wan.sampling.control import build_controls

    if "frames" not in io:
        return ()
    given = {"control_video": io["frames"], "control_mask": io["mask"][0]}
    given |= {"vace_strength": torch.tensor([case["vace_context_scale"]])}
    if case["references"]:
        given["reference_images"] = io["reference_frames"].transpose(0, 1)
    recorded = [
        (io[f"{name}_frames"], io[f"{name}_latents"])
        for name in ("inactive", "reactive", "reference")
        if f"{name}_frames" in io
    ]

    def encode(video: Tensor) -> Tensor:
        return next(latents[None] for frames, latents in recorded if torch.equal(frames[None], video))

    frames, height, width = io["mask"].shape[1:]
    (control,) = build_controls(given, (frames, height, width), encode)
    if not torch.equal(control.values, io["vace_context"]):
        raise ValueError("the control differs from the recorded one")
    return (control,)
