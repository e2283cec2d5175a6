"""The README's clips: what the trained model makes of captions that it has not seen, and only what it does show."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..train.captions import held_out_scenes, plain_caption
from ..train.dit import T2V as T2V_TASK
from ..train.world import HEIGHT, WIDTH, Scene
from .measure import agreement, measure
from .pipeline import FPS, T2V, Pipeline, as_video

COLUMNS, ZOOM, BORDER, LINES = 3, 2, 4, 28
"""Of the picture: tiles in a row; how much larger than the clip; pixels between tiles, and for a caption under each."""
TILE = WIDTH * ZOOM + BORDER, HEIGHT * ZOOM + BORDER + LINES


def main(models: Path, picture: Path, count: int = 6) -> None:
    """Writes a GIF of the first `count` clips of held-out captions, one for a motion, that measure as they say."""
    pipeline, made, motions = Pipeline(models, T2V_TASK.files), [], set()
    for seed, scene in enumerate(held_out_scenes(100)):
        motion = scene.things[0].kind.motion
        if motion in motions:
            continue
        clip = as_video(pipeline.clip(plain_caption(scene), T2V, seed=seed))
        right = all(agreement(scene, measure(clip)).values())
        print(f"{'shown' if right else 'missed'}: {plain_caption(scene)}", flush=True)
        if right:
            motions.add(motion)
            made.append((scene, clip))
        if len(made) == count:
            break
    write_gif(made, picture)


def write_gif(clips: Sequence[tuple[Scene, Tensor]], path: Path) -> None:
    """clips: [3, F, H, W] in [-1, 1] each. The captions are the file's comment, as JSON."""
    from PIL import Image, ImageDraw

    captions, frames = [plain_caption(scene) for scene, _ in clips], clips[0][1].shape[1]
    size = TILE[0] * COLUMNS + BORDER, TILE[1] * -(-len(clips) // COLUMNS) + BORDER
    pictures = []
    for frame in range(frames):
        picture = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(picture)
        for at, (_, clip) in enumerate(clips):
            left, top = corner(at)
            pixels = ((clip[:, frame].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
            tile = Image.frombytes("RGB", (WIDTH, HEIGHT), pixels.numpy().tobytes())
            picture.paste(tile.resize((WIDTH * ZOOM, HEIGHT * ZOOM), Image.Resampling.NEAREST), (left, top))
            text = "\n".join(textwrap.wrap(captions[at], 31))
            draw.multiline_text((left, top + HEIGHT * ZOOM + 2), text, fill="black", spacing=1)
        pictures.append(picture)
    # One palette for all: each frame's own would flicker.
    palette = pictures[frames // 2].quantize(128)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    pictures[0].save(
        path, save_all=True, append_images=pictures[1:], duration=1000 // FPS * 2, loop=0, optimize=True,
        comment=json.dumps(captions).encode(),
    )  # fmt: skip


def read_gif(path: Path) -> list[tuple[str, Tensor]]:
    """Caption and clip [3, F, H, W] in [-1, 1] of each tile that `write_gif` has drawn."""
    from PIL import Image, ImageSequence

    with Image.open(path) as picture:
        captions = json.loads(picture.info["comment"])
        frames = []
        for frame in ImageSequence.Iterator(picture):
            pixels = torch.frombuffer(bytearray(frame.convert("RGB").tobytes()), dtype=torch.uint8)
            frames.append(pixels.view(picture.height, picture.width, 3))
    video = torch.stack(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
    found = []
    for at, caption in enumerate(captions):
        left, top = corner(at)
        tile = video[:, :, top : top + HEIGHT * ZOOM : ZOOM, left : left + WIDTH * ZOOM : ZOOM]
        found.append((caption, tile.contiguous()))
    return found


def corner(at: int) -> tuple[int, int]:
    """Left and top of a tile."""
    row, column = divmod(at, COLUMNS)
    return BORDER + column * TILE[0], BORDER + row * TILE[1]
