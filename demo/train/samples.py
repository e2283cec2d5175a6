"""Sample sheets: what each part can do, by the files that it wrote, read as any user's are."""

from __future__ import annotations

from pathlib import Path

import torch

from ...wan.vae.autoencoder import decode_frames, encode, load_vae
from ..meaning.pipeline import FOUR_STEPS, I2V, T2V, Pipeline, sheet
from .captions import held_out_scenes, plain_caption
from .distill import FILES
from .dit import T2V as T2V_TASK
from .i2v import I2V as I2V_TASK
from .trained_files import NAMES, place
from .world import render


def write_samples(part: str, models: Path, *, count: int, device: torch.device) -> Path:
    """Writes samples/<part>.png: a clip per row. Of the VAE: what was given, and below it what came back."""
    scenes = held_out_scenes(count)
    clips = []
    if part == "vae":
        vae = load_vae([place(models, NAMES.vae)], device=device)
        for clip in render(scenes):
            clips += [clip, torch.cat(list(decode_frames(vae, encode(vae, clip[None].to(device)))), 1).cpu()]
    elif part == "i2v":
        pipeline = Pipeline(models, I2V_TASK.files, device=str(device))
        for seed, scene in enumerate(scenes):
            picture = render([scene])[0, :, 0]
            clips.append(pipeline.clip(plain_caption(scene), I2V, seed=seed, picture=picture))
    else:
        loras, settings = (FILES, FOUR_STEPS) if part == "distill" else (None, T2V)
        pipeline = Pipeline(models, T2V_TASK.files, loras, device=str(device))
        clips = [pipeline.clip(plain_caption(scene), settings, seed=i) for i, scene in enumerate(scenes)]
    path = models / "samples" / f"{part}.png"
    sheet(clips, path)
    path.with_suffix(".txt").write_text("".join(f"{plain_caption(scene)}\n" for scene in scenes))
    return path
