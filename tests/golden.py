"""Compares the pack with the official code's recorded inputs and outputs.

    python tests/golden.py tests/data/golden [--ranks 1 2 3 4] [--fsdp] [--engine packed]

Each case goes through the pack's own loading and parallel code, on CPU processes with gloo. Prints one line per case
and number of ranks; exits with 1 if an error is over 1e-4 relative.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1e-4
"""Largest relative error, ||out - expected|| / ||expected||."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """This process among the ranks of one run."""

    rank: int
    world: int
    store: Path
    fsdp: bool
    engine: str


def mount_pack() -> None:
    """Makes the pack importable as `wan_pack`, whatever its folder is called, without running its __init__."""
    if "wan_pack" not in sys.modules:
        package = types.ModuleType("wan_pack")
        package.__path__ = [str(ROOT)]
        sys.modules["wan_pack"] = package


class GoldenRun:
    """Runs cases as one rank."""

    def __init__(self, ranks: Ranks) -> None:
        import torch
        from wan_pack.distributed.job import Parallel
        from wan_pack.distributed.mesh import init_mesh

        self.device = torch.device("cpu")
        self.ranks = ranks
        self.parallel = Parallel(
            gpu_count=ranks.world, use_ulysses=True, use_fsdp=ranks.fsdp, ulysses_engine=ranks.engine,
            mixed_precision="fp32",
        )  # fmt: skip
        self.mesh = init_mesh(
            rank=ranks.rank, world=ranks.world, device=self.device, store_file=ranks.store, master_port=0, timeout=120
        )

    def gather(self, tokens: Any, shard: Any) -> Any:
        return shard.gather(tokens, None if self.mesh is None else self.mesh.get_group())

    def shard(self, grid: tuple[int, int, int]) -> Any:
        from wan_pack.distributed.sequence import SequenceShard

        return SequenceShard(length=grid[0] * grid[1] * grid[2], rank=self.ranks.rank, world=self.ranks.world)

    def expert(self, folder: Path, shard: Any, loras: tuple[tuple[str, float], ...] = ()) -> Any:
        from wan_pack.distributed.experts import load_expert
        from wan_pack.wan.checkpoint import checkpoint_files

        files = [str(file) for file in checkpoint_files(folder)]
        return load_expert(files, loras, parallel=self.parallel, mesh=self.mesh, shard=shard, device=self.device)

    def forward(self, folder: Path) -> float:
        """One evaluation of a transformer."""
        import torch
        from wan_pack.wan.model import TextContext, pad_text
        from wan_pack.wan.patch import patchify, token_grid, unpatchify
        from wan_pack.wan.rope import rope_table

        io = read(folder / "io.safetensors")
        grid = token_grid(tuple(io["x"].shape))
        shard = self.shard(grid)
        model = self.expert(folder / "model", shard)
        rope = rope_table(grid, model.config.head_dim, start=shard.start, stop=shard.stop)
        channels = torch.cat((io["x"], io["y"])) if "y" in io else io["x"]
        tokens = shard.split(patchify(channels))
        timesteps, rows = io["t"].float(), None
        if timesteps.numel() > 1:
            # One per token: the model takes the different ones, and which of them is a token's.
            timesteps, rows = timesteps.flatten().unique(return_inverse=True)
            rows = shard.split(rows[:, None])[:, 0]
        local = model(tokens, timesteps, TextContext(pad_text(io["context"])), rope, rows)
        return relative_error(unpatchify(self.gather(local, shard), grid), io["out"])

    def generate(self, folder: Path) -> float:
        """A whole loop: noise from the seed, two experts, guidance, solver."""
        import torch
        from wan_pack.distributed.experts import Experts
        from wan_pack.wan.conditioning import first_frame_known
        from wan_pack.wan.denoise import HIGH_NOISE, LOW_NOISE, Guidance, Known, denoise, draw_noise
        from wan_pack.wan.patch import patchify, token_grid, unpatchify
        from wan_pack.wan.schedule import make_solver

        case = json.loads((folder / "case.json").read_text())
        io = read(folder / "io.safetensors")
        noise = draw_noise(tuple(io["noise"].shape), case["seed"])
        if not torch.equal(noise, io["noise"]):
            raise ValueError(f"{folder}: the noise of seed {case['seed']} differs from the recorded one")
        grid = token_grid(tuple(noise.shape))
        shard = self.shard(grid)
        models = {}
        for name in (HIGH_NOISE, LOW_NOISE):
            model = folder / f"{name}_model"
            if model.is_dir():
                lora = sorted((folder / f"lora_{name.removesuffix('_noise')}").glob("*.safetensors"))
                models[name] = self.expert(model, shard, tuple((str(file), 1.0) for file in lora))
        if not models:
            models[LOW_NOISE] = self.expert(folder / "model", shard)
        low, high = case["guidance_low_high"] if "guidance_low_high" in case else (case["guidance"],) * 2
        guidance = Guidance(
            low=low, high=high, boundary=case.get("boundary", 0.0),
            only=next(iter(models)) if len(models) == 1 else None,
        )  # fmt: skip
        image = shard.split(patchify(io["y"])) if "y" in io else None
        known = None
        if "first_frame" in io:
            latents, mask = first_frame_known(noise, torch.zeros(3, 1, 1), lambda picture: io["first_frame"][None])
            known = Known(shard.split(patchify(latents)), shard.split(patchify(mask.expand_as(latents))))
        experts = Experts(
            models, {True: io["context"], False: io["context_null"]},
            grid=grid, shard=shard, device=self.device, keep_text=True, parkings={},
            image=image, timestep_rows=None if known is None else known.timestep_rows,
        )  # fmt: skip
        solver = make_solver(case["solver"], case["steps"], case["shift"])
        if [guidance.expert(t).removesuffix("_noise") for t in solver.timesteps] != case.get(
            "experts", ["low"] * case["steps"]
        ):
            raise ValueError(f"{folder}: the experts run at other steps than recorded")
        tokens = denoise(
            shard.split(patchify(noise)), solver=solver, guidance=guidance, predict=experts.predict, known=known
        )
        return relative_error(unpatchify(self.gather(tokens, shard), grid), io["latents"])

    def vae(self, folder: Path) -> float:
        """Decoding as the job does it, latent frame by latent frame, and encoding."""
        import torch
        from wan_pack.wan.vae import decode_frames, encode, load_vae

        io = read(folder / "io.safetensors")
        files = sorted((folder / "vae").iterdir())
        vae = load_vae(files)
        decoded = torch.cat(list(decode_frames(vae, io["latents"])), dim=1)[None]
        return max(relative_error(decoded, io["decoded"]), relative_error(encode(vae, io["video"]), io["encoded"]))

    def text_encoder(self, folder: Path) -> float:
        import torch
        from wan_pack.wan.t5_keys import EXPECTED
        from wan_pack.wan.tensor_files import TensorFiles
        from wan_pack.wan.text_encoder import encode_ids, load_umt5

        io = read(folder / "io.safetensors")
        files = TensorFiles(sorted((folder / "text_encoder").iterdir()), expected=EXPECTED)
        ids = io["ids"][io["mask"].bool()].tolist()
        return relative_error(encode_ids(load_umt5(files, dtype=torch.float32), ids)[None], io["out"])


CASES: dict[str, Callable[[GoldenRun, Path], float]] = {
    "dit_": GoldenRun.forward,
    "gen_": GoldenRun.generate,
    "vae_": GoldenRun.vae,
    "t5_encoder": GoldenRun.text_encoder,
}
"""Start of a case's folder name -> how it runs."""


def cases(folder: Path) -> Iterator[tuple[Path, Callable[[GoldenRun, Path], float]]]:
    """The cases of a golden folder that this version runs."""
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        for start, run in CASES.items():
            if case.name.startswith(start):
                yield case, run


def read(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


def relative_error(out: Any, expected: Any) -> float:
    if out.shape != expected.shape:
        raise ValueError(f"shape is {tuple(out.shape)}; expected {tuple(expected.shape)}")
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def run_rank(folder: Path, ranks: Ranks) -> int:
    """Runs every case as one rank; rank 0 prints. Returns the exit code."""
    mount_pack()
    import torch
    import torch.distributed as dist

    torch.set_grad_enabled(False)
    golden = GoldenRun(ranks)
    failed = False
    for case, run in cases(folder):
        try:
            error, reason = run(golden, case), ""
        except Exception as exception:  # one broken case must not hide the others
            error, reason = float("nan"), f" {type(exception).__name__}: {exception}"
        bad = not error <= LIMIT
        failed |= bad
        if ranks.rank == 0:
            layout = f"{ranks.world} rank{'s' * (ranks.world > 1)} {ranks.engine}{' fsdp' if ranks.fsdp else ''}"
            print(f"{case.name:24} {layout:24} {error:.2e} {'FAILED' if bad else 'ok'}{reason}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(failed)


def run(folder: Path, *, world: int, fsdp: bool, engine: str) -> int:
    """Runs every case on `world` processes. Returns 0 if all of them passed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as temp:
        command = [sys.executable, __file__, str(folder), "--ranks", str(world), "--engine", engine]
        command += ["--fsdp"] * fsdp + ["--store", f"{temp}/store", "--rank"]
        processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(world)]
        try:
            return max(abs(process.wait()) for process in processes)
        finally:
            for process in processes:
                process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--fsdp", action="store_true", help="shard the weights as well")
    parser.add_argument("--engine", default="packed", choices=["packed", "deepspeed"])
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not any(cases(arguments.folder)):
        parser.error(f"{arguments.folder} holds no golden case; expected folders such as {', '.join(CASES)}")
    if arguments.rank is not None:
        ranks = Ranks(
            rank=arguments.rank, world=arguments.ranks[0], store=arguments.store, fsdp=arguments.fsdp,
            engine=arguments.engine,
        )  # fmt: skip
        return run_rank(arguments.folder, ranks)
    codes = [run(arguments.folder, world=w, fsdp=arguments.fsdp, engine=arguments.engine) for w in arguments.ranks]
    return int(any(codes))


if __name__ == "__main__":
    raise SystemExit(main())
