"""Machines and videos for the planner's tests."""

from __future__ import annotations

from typing import Any

from wan_pack.benchmarks.released_sizes import WAN_CONFIGS
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.machine.gpus import Gpu
from wan_pack.distributed.planning.gpu_memory import Workload
from wan_pack.distributed.planning.plan import Plan, make_plan
from wan_pack.distributed.planning.policies import Request

GIB = 2**30
KINDS = {
    "t2v-A14B": (28952279296, 702911488, 254_000_000),
    "ti2v-5B": (10136722176, 327387136, 1_410_000_000),
}
"""Bytes of an expert, of one of its blocks and of the VAE, in bf16."""
A14B = KINDS["t2v-A14B"]


class Wires:
    """Every pair of GPUs is linked in the same way, but pairs of neighbours (0 and 1, 2 and 3, ...) may have NVLink."""

    def __init__(self, kind: str, *, pairs: bool = False) -> None:
        self.kind, self.pairs = kind, pairs

    def link(self, index_a: str, index_b: str) -> str:
        return "nvlink" if self.pairs and int(index_a) // 2 == int(index_b) // 2 else self.kind


def workload(kind: str = "t2v-A14B", experts: int = 2, **changes: Any) -> Workload:
    """832x480, 81 frames."""
    expert, block, vae = KINDS[kind]
    settings = {
        "config": WAN_CONFIGS[kind], "width": 832, "height": 480,
        "num_frames": 81, "steps": 40, "experts": (expert,) * experts, "block_bytes": block,
        "outside_bytes": expert - WAN_CONFIGS[kind].num_layers * block, "vae_bytes": vae,
    }  # fmt: skip
    return Workload(**{**settings, **changes})


def machine(*gib: float) -> list[Gpu]:
    """GPUs with so much free memory, of cards that are 1 GiB larger."""
    return [
        Gpu(index=str(i), uuid=f"GPU-{i}", name="GPU", total_bytes=int((size + 1) * GIB), free_bytes=int(size * GIB))
        for i, size in enumerate(gib)
    ]


def request(gpu_count: int = 0, *, cfg_parallel: str = "auto", always_guided: bool = False, **base: Any) -> Request:
    """The nodes' defaults."""
    parallel = Parallel(**{"gpu_count": 1, "use_fsdp": True, **base})
    return Request(base=parallel, gpu_count=gpu_count, cfg_parallel=cfg_parallel, always_guided=always_guided)


def plan(work: Workload, asked: Request, gpus: list[Gpu], wires: str | Wires = "nvlink", **options: Any) -> Plan:
    return make_plan(work, asked, gpus, Wires(wires) if isinstance(wires, str) else wires, **options)


def words(made: Plan) -> str:
    """The decision in short, such as "0,1 cfg ulysses1 fsdp-block offload"."""
    way = made.parallel
    parts = [",".join(way.gpu_ids), *(["cfg"] if way.cfg_parallel else [])]
    parts.append(f"ulysses{way.ulysses_size}" if way.use_ulysses else "whole")
    parts.append("stream" if way.stream_blocks else f"fsdp-{way.gather}" if way.use_fsdp else "resident")
    parts += ["offload"] if way.offload_model and not way.stream_blocks else []
    return " ".join(parts + (["chunked"] if way.memory_optimization else []))
