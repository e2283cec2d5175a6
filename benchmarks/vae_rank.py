"""What one rank of `vae.py` measures."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import vae_before
from moving_picture import moving_picture, quality
from torch.profiler import ProfilerActivity, profile
from wan_pack.distributed.parallel.image_rows import ImageShard
from wan_pack.distributed.parallel.split_vae import RankVae
from wan_pack.wan.model.latent_space import FRAMES_AT_ONCE
from wan_pack.wan.vae.autoencoder import load_vae
from wan_pack.wan.vae.vae_ops import PLAIN, VAE_OPS, Sum
from wan_pack.wan.video import video
from wan_pack.wan.video.video_formats import CRF, FORMATS, H264
from wan_pack.wan.video.yuv import frames_to_rgb

FPS = 16
CHECKED_FRAMES = 17
"""That float32, without the matrix units, is asked for."""

Size = tuple[int, int, int]


class VaeRank:
    """One rank of the run, and what it measures."""

    def __init__(self, rank: int, world: int, arguments: argparse.Namespace, folder: Path) -> None:
        torch.set_grad_enabled(False)
        self.rank, self.arguments, self.folder = rank, arguments, folder
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", rank) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank,
            world_size=world, timeout=timedelta(seconds=90), device_id=self.device if cuda else None,
        )  # fmt: skip
        self.groups = {size: dist.new_group(list(range(size))) for size in arguments.gpus if size > 1}
        self.dtype = torch.bfloat16 if cuda else torch.float32
        self.ops = "plain"
        self.rows: list[str] = []
        self.references: dict[Any, Any] = {}

    def say(self, *row: object) -> None:
        """A line of the table."""
        if self.rank == 0:
            self.rows.append(" | ".join(str(cell) for cell in row))
            print(self.rows[-1], flush=True)

    def barrier(self) -> None:
        dist.barrier(device_ids=[self.rank] if self.device.type == "cuda" else None)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def first_says(self, answer: bool) -> bool:
        """The first rank's answer, on every rank."""
        said = torch.tensor([float(answer)], device=self.device)
        dist.broadcast(said, src=0)
        return bool(said.item())

    def seconds(self, gpus: int, run: Callable[[], object]) -> tuple[float, float]:
        """Median on the first `gpus` ranks, and the first's peak memory in GiB above what it held."""
        cuda = self.device.type == "cuda"
        times = []
        for index in range(1 + self.arguments.repeats):
            self.barrier()
            if cuda and index == 0:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            start = time.perf_counter()
            if self.rank < gpus:
                run()
                if cuda:
                    torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30 if cuda else 0.0
        return statistics.median(times[1:]), peak

    def latents(self, size: Size) -> Any:
        """[1, 16, T, h, w]: noise that varies over a few positions and frames."""
        width, height, frames = size
        shape = ((frames + 3) // 4, height // 8, width // 8)
        coarse = torch.randn(1, 16, *(max(n // 4, 1) for n in shape), generator=torch.Generator().manual_seed(1))
        noise = F.interpolate(coarse, size=shape, mode="trilinear")
        return (noise / noise.square().mean().sqrt()).to(self.device)

    def load(self) -> None:
        file = [self.folder / "vae.safetensors"]
        self.old = load_vae(file, dtype=self.dtype, device=self.device)
        self.new = {
            gpus: RankVae(file, dtype=self.dtype, device=self.device, group=self.groups.get(gpus))
            for gpus in self.arguments.gpus if self.rank < gpus
        }  # fmt: skip

    def set_ops(self, ops: str) -> None:
        for vae in self.new.values():
            vae._ops = ops
        self.ops = ops

    def shard(self, gpus: int, latents: Any) -> Any:
        return None if gpus == 1 else ImageShard.of(latents.shape[-2], self.groups[gpus])

    def kernels(self) -> None:
        """Whether the fused kernels run and compute what the plain ones do; otherwise the plain ones are measured."""
        if self.device.type != "cuda":
            return
        fused = VAE_OPS["triton"]()
        worst = 0.0
        for dtype, channels in ((torch.float32, 96), (self.dtype, 192), (self.dtype, 384)):
            x, residual = torch.randn(2, 3, 10, 104, channels, device=self.device, dtype=dtype).unbind(0)
            bias, weight = torch.randn(2, channels, device=self.device, dtype=dtype).unbind(0)
            made = []
            for ops, cast in ((fused, dtype), (PLAIN, torch.float32)):
                total = Sum(*(part.to(cast) for part in (x, bias, residual)))
                room, up = (x.new_zeros(3, k * 10 + 2, k * 104, channels, dtype=cast) for k in (1, 2))
                half = x.new_zeros(6, 22, 208, channels // 2, dtype=cast)
                ops.upsample(total, 1, up[:, 1:-1])
                ops.upsample(Sum(total.x, total.bias), 2, half[:, 1:-1])
                added = ops.add(total, None)
                kept = ops.norm(total._replace(x=total.x.clone()), weight.to(cast), room[:, 1:-1], True, True)
                made.append((kept, room, up, half, added))
            for ours, theirs in zip(*made, strict=True):
                error = ((ours.float() - theirs).norm() / theirs.norm()).item()
                worst = max(worst, error if dtype != torch.float32 else 1e3 * error)
                if not error < (1e-5 if dtype == torch.float32 else 5e-3):
                    raise AssertionError(f"{dtype} {channels}: {error}")
        self.set_ops("triton")
        self.say("fused kernels", "equal the plain ones", f"worst error {worst:.1e}")

    def exactness(self, size: Size) -> None:
        """How far from diffusers in float32, of a short video."""
        if self.rank == 0:
            torch.backends.cudnn.allow_tf32 = False
            file, latents = [self.folder / "vae.safetensors"], self.latents((*size[:2], min(CHECKED_FRAMES, size[2])))
            exact = load_vae(file, dtype=torch.float32, device=self.device)
            wanted = torch.cat(list(vae_before.decode(exact, latents, None)), dim=1)
            video = moving_picture(min(CHECKED_FRAMES, size[2]), size[1], size[0], self.device)[None]
            code = vae_before.encode(exact, video, None)
            del exact
            single = RankVae(file, dtype=torch.float32, device=self.device, group=None, ops=self.ops)
            for name, decoded, encoded in (
                ("before", vae_before.decode(self.old, latents, None), vae_before.encode(self.old, video, None)),
                ("after", self.new[1].decode(latents), self.new[1].encode(video)),
                ("after, float32", single.decode(latents), single.encode(video)),
            ):
                frames = torch.cat(list(decoded), dim=1).float()
                errors = ((frames - wanted).norm() / wanted.norm(), (frames - wanted).abs().max(),
                          (encoded - code).norm() / code.norm())  # fmt: skip
                self.say(f"{size[1]}p", f"{name}: decode's error", f"{errors[0]:.2e}, at most {errors[1]:.2e};",
                         f"encode's {errors[2]:.2e}")  # fmt: skip
            torch.backends.cudnn.allow_tf32 = True

    def decode(self, size: Size, name: str, numbers: list[int], at_once: int = FRAMES_AT_ONCE) -> None:
        """Seconds on each number of GPUs; and whether all give the same."""
        latents = self.latents(size)
        first = None
        for gpus in numbers:
            rows = self.shard(gpus, latents) if self.rank < gpus else None
            made: list[Any] = []

            def run(gpus: int = gpus, rows: Any = rows, made: list[Any] = made) -> None:
                made.clear()
                if name == "before":
                    made.extend(vae_before.decode(self.old, latents, rows))
                else:
                    made.extend(self.new[gpus].decode(latents, at_once=at_once))

            seconds, peak = self.seconds(gpus, run)
            same = ""
            if self.rank == 0:
                frames = torch.cat(made, dim=1)
                first = frames if first is None else first
                same = "same bits" if torch.equal(first, frames) else f"apart {(first - frames).abs().max():.1e}"
                sizes = [part.shape[1] for part in made]
                same += f"; parts of {min(sizes)} to {max(sizes)}"
            self.say(f"{size[1]}p", f"decode, {name}", f"{gpus} GPUs", f"{seconds:.3f} s", f"{peak:.1f} GiB", same)

    def encode(self, size: Size) -> None:
        """As an image's: a picture and grey frames."""
        video = moving_picture(1, size[1], size[0], self.device)[None]
        video = video.new_zeros(1, 3, size[2], *size[1::-1]).index_copy_(2, video.new_zeros(1).long(), video)
        for gpus in self.arguments.gpus:
            rows = self.shard(gpus, self.latents(size)) if self.rank < gpus else None
            for name, run in (
                ("before", lambda rows=rows: vae_before.encode(self.old, video, rows)),
                ("after", lambda gpus=gpus: self.new[gpus].encode(video)),
            ):
                seconds, peak = self.seconds(gpus, run)
                self.say(f"{size[1]}p", f"encode, {name}", f"{gpus} GPUs", f"{seconds:.3f} s", f"{peak:.1f} GiB")

    def tail(self, size: Size, gpus: int, name: str, preset: tuple[str, int] | None) -> None:
        """Decode and write. `preset` None: before."""
        latents = self.latents(size)
        picture = moving_picture(size[2], size[1], size[0], self.device).to(self.dtype) if self.rank == 0 else None
        path = self.folder / "x.mp4"
        ends = []
        old = preset is None
        before = mock.patch.dict(video.PIXELS, yuv420p=frames_to_rgb)
        h264 = FORMATS[H264]
        speed, crf = preset or ("medium", CRF)
        encoder = tuple(speed if word == "medium" else word for word in h264.encoder)
        settings = {"video_format": dataclasses.replace(h264, encoder=encoder), "crf": crf}
        for _ in range(2):
            self.barrier()
            if self.rank >= gpus:
                continue
            rows = self.shard(gpus, latents)
            parts = vae_before.decode(self.old, latents, rows) if old else self.new[gpus].decode(latents)
            if self.rank > 0:
                for _ in parts:
                    pass
                continue
            start, done = time.perf_counter(), 0
            make = vae_before.Writer if old else video.VideoWriter
            writer = make(path, width=size[0], height=size[1], fps=FPS, **settings)
            with before if old else contextlib.nullcontext(), writer:
                for part in parts:
                    writer.write(picture[:, done : done + part.shape[1]])
                    done += part.shape[1]
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                decoded = time.perf_counter()
            ends.append((time.perf_counter() - decoded, time.perf_counter() - start))
        if self.rank == 0:
            tail, whole = min(ends)
            self.say(
                f"{size[1]}p", f"mp4, {name}", f"{gpus} GPUs", f"{tail:.3f} s after the last frame",
                f"{whole:.3f} s in all", f"{path.stat().st_size / 2**20:.2f} MiB", quality(path, picture),
            )  # fmt: skip
        self.barrier()

    def breakdown(self, size: Size, gpus: int) -> None:
        """The kernels of a decode on the first rank."""
        if self.rank < gpus:
            latents = self.latents(size)
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                for _ in self.new[gpus].decode(latents):
                    pass
                torch.cuda.synchronize()
            kernels = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)
            total = sum(event.self_device_time_total for event in kernels)
            self.say(f"{size[1]}p", f"kernels on {gpus} GPUs", f"{total / 1000:.0f} ms in all")
            for event in kernels[:14]:
                self.say(f"  {event.self_device_time_total / 1000:8.2f} ms", f"{event.count:5d} x", event.key[:90])
        self.barrier()
