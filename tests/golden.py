"""Compares the pack with the official code's recorded inputs and outputs.

    python tests/golden.py tests/data/golden [--ranks 1 2 3 4] [--fsdp] [--engine packed]

Each case goes through the pack's own loading and parallel code, on CPU processes with gloo. Prints one line per case
and number of ranks; exits with 1 if an error is over 1e-4 relative.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent / "support"))
    from mount import mount_pack

    mount_pack()

from forks import fork_ranks
from layouts import Layout, Ranks

LIMIT = 1e-4
"""Largest relative error, ||out - expected|| / ||expected||."""


class GoldenRun:
    """Runs cases as one rank."""

    def __init__(self, ranks: Ranks) -> None:
        import torch
        from peer_files import reach_as_gpus
        from wan_pack.distributed.parallel.mesh import Mesh, init_mesh

        # These ranks have no GPUs, whose memory others could write to.
        reach_as_gpus(ranks.store.parent)
        self.device = torch.device("cpu")
        self.ranks = ranks
        mesh = init_mesh(
            rank=ranks.rank, world=ranks.world, device=self.device, store_file=ranks.store, master_port=0, timeout=120
        )
        self.meshes = {False: mesh}
        if ranks.world % 2 == 0:
            self.meshes[True] = Mesh.of("cpu", ranks.world, cfg=2)

    def use(self, layout: Layout) -> None:
        from wan_pack.distributed.job.job import Parallel

        self.mesh = self.meshes[layout.cfg]
        self.parallel = Parallel(
            gpu_count=self.ranks.world, use_ulysses=True, use_fsdp=layout.fsdp, cfg_parallel=layout.cfg,
            ulysses_engine=layout.engine, mixed_precision="fp32",
        )  # fmt: skip

    @property
    def group(self) -> Any:
        return None if self.mesh is None else self.mesh.group

    def gather(self, tokens: Any, shard: Any) -> Any:
        return shard.gather(tokens, None if self.mesh is None else self.mesh.ulysses_group)

    def shard(self, grid: tuple[int, int, int]) -> Any:
        from wan_pack.distributed.parallel.sequence import SequenceShard

        length = grid[0] * grid[1] * grid[2]
        if self.mesh is None:
            return SequenceShard(length=length)
        return SequenceShard(length=length, rank=self.mesh.ulysses_rank, world=self.mesh.ulysses_size)

    def expert(self, folder: Path, shard: Any, loras: tuple[tuple[str, float], ...] = ()) -> Any:
        from wan_pack.distributed.rank.expert import load_expert
        from wan_pack.wan.checkpoint.checkpoint import checkpoint_files

        files = [str(file) for file in checkpoint_files(folder)]
        return load_expert(files, loras, parallel=self.parallel, mesh=self.mesh, shard=shard, device=self.device)

    def forward(self, folder: Path) -> float:
        """One evaluation of a transformer."""
        import torch
        from wan_pack.wan.model.rope import rope_table
        from wan_pack.wan.transformer.camera import Camera
        from wan_pack.wan.transformer.conditions import Conditions
        from wan_pack.wan.transformer.context import Context, pad_text
        from wan_pack.wan.transformer.reference import Reference
        from wan_pack.wan.transformer.vace import Control

        io = read(folder / "io.safetensors")
        reference = Reference(io["reference_latent"][:, None]) if "reference_latent" in io else None
        stride = io["camera"].shape[-1] // io["x"].shape[-1] if "camera" in io else 0
        conditions = Conditions(
            image=io.get("y"), picture=Context(io["clip_fea"].flatten(0, 1)) if "clip_fea" in io else None,
            reference=reference, camera=Camera(io["camera"], stride) if stride else None,
        )  # fmt: skip
        grid = conditions.grid(tuple(io["x"].shape))
        shard = self.shard(grid)
        model = self.expert(folder / "model", shard)
        rope = rope_table(grid, model.config.head_dim, start=shard.start, stop=shard.stop)
        channels = torch.cat((io["x"], io["y"])) if "y" in io else io["x"]
        tokens = shard.split(conditions.tokens(channels))
        timesteps, which = io["t"].float(), None
        if timesteps.numel() > 1:
            # One per token: the model takes the different ones, and which of them is a token's.
            timesteps, which = timesteps.flatten().unique(return_inverse=True)
            which = shard.split(which[:, None])[:, 0]
        case = json.loads((folder / "case.json").read_text())
        error = 0.0
        for name, strength in case.get("vace_context_scale", {"out": 1.0}).items():
            controls = (Control(io["vace_context"], strength),) if "vace_context" in io else ()
            here = replace(conditions, controls=controls).on_rank(shard.split, shard.length, self.device)
            text = Context(pad_text(io["context"]))
            local = model(tokens, timesteps, text, rope, which, here.beside(keep=True))
            error = max(error, relative_error(conditions.latents(self.gather(local, shard), grid), io[name]))
        return error

    def generate(self, folder: Path) -> float:
        """A whole loop: noise from the seed, two experts, guidance, solver."""
        import torch
        from recorded_controls import recorded_controls
        from wan_pack.distributed.rank.expert import VelocityPredictor
        from wan_pack.wan.model.config import HIGH_NOISE, LOW_NOISE
        from wan_pack.wan.model.patch import patchify, token_grid, unpatchify
        from wan_pack.wan.sampling.conditioning import first_frame_known
        from wan_pack.wan.sampling.denoise import Guidance, Known, denoise, draw_noise
        from wan_pack.wan.sampling.schedule import make_solver
        from wan_pack.wan.transformer.conditions import Conditions
        from wan_pack.wan.transformer.context import Context

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
        picture = Context(io["clip_fea"].flatten(0, 1)) if "clip_fea" in io else None
        conditions = Conditions(image=io.get("y"), picture=picture, controls=recorded_controls(case, io))
        known = None
        if "first_frame" in io:
            latents, mask = first_frame_known(noise, torch.zeros(3, 1, 1), lambda picture: io["first_frame"][None])
            known = Known(shard.split(patchify(latents)), shard.split(patchify(mask.expand_as(latents))))
        predictor = VelocityPredictor(
            models, {True: io["context"], False: io["context_null"]},
            grid=grid, shard=shard, device=self.device, keep_text=True, weights={},
            conditions=conditions.on_rank(shard.split, shard.length, self.device),
            which_timestep=None if known is None else known.which_timestep, mesh=self.mesh,
        )  # fmt: skip
        solver = make_solver(case["solver"], case["steps"], case["shift"])
        if [guidance.expert(t).removesuffix("_noise") for t in solver.timesteps] != case.get(
            "experts", ["low"] * case["steps"]
        ):
            raise ValueError(f"{folder}: the experts run at other steps than recorded")
        tokens = denoise(
            shard.split(patchify(noise)), solver=solver, guidance=guidance, predict=predictor.predict, known=known
        )
        latents = unpatchify(self.gather(tokens, shard), grid)
        return relative_error(latents[:, case.get("references", 0) :], io["latents"])

    def vae(self, folder: Path) -> float:
        """Encoding and decoding as the job does it: split over the ranks, latent frame by latent frame."""
        import torch
        from wan_pack.distributed.parallel.split_vae import RankVae

        io = read(folder / "io.safetensors")
        vae = RankVae(sorted((folder / "vae").iterdir()), dtype=torch.float32, device=self.device, group=self.group)
        error = relative_error(vae.encode(io["video"]), io["encoded"])
        frames = list(vae.decode(io["latents"]))
        if self.ranks.rank == 0:  # the others have no frames
            error = max(error, relative_error(torch.cat(frames, dim=1)[None], io["decoded"]))
        return error

    def text_encoder(self, folder: Path) -> float:
        import torch
        from wan_pack.wan.files.stored_model import open_model
        from wan_pack.wan.text.t5_keys import EXPECTED
        from wan_pack.wan.text.text_encoder import encode_ids, load_umt5

        io = read(folder / "io.safetensors")
        files = open_model(sorted((folder / "text_encoder").iterdir()), EXPECTED)
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
    """Runs the cases as one rank; rank 0 prints. Returns the exit code."""
    import torch
    import torch.distributed as dist

    torch.set_grad_enabled(False)
    golden = GoldenRun(ranks)
    failed = False
    for layout in itertools.chain(*ranks.layouts, ranks.guided):
        golden.use(layout)
        for number, (case, run) in enumerate(cases(folder)):
            if layout not in ranks.of(case.name, number):
                continue
            try:
                error, reason = run(golden, case), ""
            except Exception as exception:  # one broken case must not hide the others
                error, reason = float("nan"), f" {type(exception).__name__}: {exception}"
            bad = not error <= LIMIT
            failed |= bad
            if ranks.rank == 0:
                place = f"{ranks.world} rank{'s' * (ranks.world > 1)} {layout}"
                print(f"{case.name:24} {place:24} {error:.2e} {'FAILED' if bad else 'ok'}{reason}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()
    return int(failed)


def run(
    folder: Path, *, world: int, layouts: Sequence[Sequence[Layout]], guided: Sequence[Layout] = (),
    log: Path | None = None,
) -> int:  # fmt: skip
    """Runs every case, in one of each of `layouts`, and whole loops also in one of `guided`, on `world` processes,
    which print into `log`.

    Returns 0 if all of them passed.
    """
    with tempfile.TemporaryDirectory() as temp:
        ranks = Ranks(
            rank=0, world=world, store=Path(temp, "store"), layouts=tuple(map(tuple, layouts)), guided=tuple(guided)
        )
        return int(any(fork_ranks(functools.partial(_rank_main, folder, ranks), world, log=log)))


def _rank_main(folder: Path, ranks: Ranks, rank: int) -> int:
    return run_rank(folder, replace(ranks, rank=rank))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--fsdp", action="store_true", help="shard the weights as well")
    parser.add_argument("--cfg", action="store_true", help="half of the ranks for each prompt of a guided step")
    parser.add_argument("--engine", default="packed", choices=["packed", "symmetric", "deepspeed"])
    parser.add_argument("--layouts", type=Layout.of, nargs="+", help="such as packed deepspeed+fsdp, in one go")
    arguments = parser.parse_args(words)
    if not any(cases(arguments.folder)):
        parser.error(f"{arguments.folder} holds no golden case; expected folders such as {', '.join(CASES)}")
    layouts = arguments.layouts or [Layout(arguments.engine, arguments.fsdp, arguments.cfg)]
    codes = [run(arguments.folder, world=world, layouts=[[layout] for layout in layouts]) for world in arguments.ranks]
    return int(any(codes))


if __name__ == "__main__":
    raise SystemExit(main())
