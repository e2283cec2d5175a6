"""How a job is spread over GPUs and machines."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import check
from .setting import check_settings, choice, number
from .switches import MAX_GPUS, Switches

_GPU_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9./_-]{0,99}", re.ASCII)
"""An index, a UUID or a MIG slice, as CUDA_VISIBLE_DEVICES takes them."""
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", re.ASCII)


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallel(Switches):
    """How the job is spread over GPUs."""

    gpu_count: int = number(None, 1, MAX_GPUS)
    """Processes, one per GPU (or per CPU process where there is no GPU)."""
    gpu_ids: tuple[str, ...] = ()
    """Physical GPU indices or UUIDs, one per process of a machine; empty on a machine without a GPU."""
    cfg_parallel: bool = False
    """Half of the GPUs compute what the prompt asks for, half what the negative prompt does, at the same time."""
    gather: str = choice("block", ("block", "expert"))
    """What FSDP gathers: block: one block at a time; expert: a whole one, kept until the other expert takes over."""
    hosts: tuple[str, ...] = ()
    """Machines, as ssh takes their names, with equally many of the processes each; empty: this one."""
    more_follow: bool = False
    """Further videos of a batch: the processes stay for them, and after the last one for `keep_warm_seconds`."""

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_hosts()
        check(
            len(self.gpu_ids) in (0, self.gpus_per_host),
            "gpu_ids", self.gpu_ids, f"empty or one per GPU of a machine ({self.gpus_per_host})",
        )  # fmt: skip
        for gpu in self.gpu_ids:
            check(_GPU_ID.fullmatch(gpu) is not None, "gpu_ids", gpu, "indices of nvidia-smi or UUIDs")
        check(len(set(self.gpu_ids)) == len(self.gpu_ids), "gpu_ids", self.gpu_ids, "without repeats")
        check(
            self.linear_precision != "fp8" or self.mixed_precision == "bf16",
            "linear_precision", self.linear_precision, f"'full' or 'int8' with mixed_precision {self.mixed_precision}",
        )  # fmt: skip
        check(
            self.kernels != "triton" or not self.torch_compile,
            "kernels", self.kernels, "'auto' or 'plain' with torch_compile, which makes kernels of its own",
        )  # fmt: skip
        check(
            not (self.stream_blocks and self.use_fsdp and self.gpu_count > 1),
            "stream_blocks", self.stream_blocks, "off with use_fsdp: every GPU streams whole blocks",
        )  # fmt: skip
        check(
            not self.cfg_parallel or self.gpu_count % 2 == 0,
            "cfg_parallel", self.cfg_parallel, f"off with an odd number of GPUs (gpu_count is {self.gpu_count})",
        )  # fmt: skip
        if self.ulysses_size > 1 and not (self.use_ulysses or self.use_fsdp):
            raise ValueError(
                f"gpu_count is {self.gpu_count} with use_ulysses and use_fsdp both off: every GPU would compute "
                "the same video. Turn on use_ulysses (faster), use_fsdp (less memory per GPU), or set gpu_count to 1"
            )

    def _check_hosts(self) -> None:
        for name in self.hosts:
            # As an argument of ssh and pdsh: no option, no list, no user.
            check(_HOST.fullmatch(name) is not None, "hosts", name, "names or IPv4 addresses of machines")
        check(len(set(self.hosts)) == len(self.hosts), "hosts", self.hosts, "without repeats")
        if not self.hosts:
            return
        count = len(self.hosts)
        check(self.gpu_count % count == 0, "gpu_count", self.gpu_count, f"a multiple of the {count} hosts")
        seconds = self.keep_warm_seconds
        check(seconds == 0, "keep_warm_seconds", seconds, "0 with several machines: their processes end with the job")
        check(not self.more_follow, "more_follow", True, "off with several machines: their processes end with the job")

    @property
    def gpus_per_host(self) -> int:
        """Processes on each machine."""
        return self.gpu_count // max(1, len(self.hosts))

    @property
    def stays(self) -> bool:
        """The processes wait for another job."""
        return self.more_follow or self.keep_warm_seconds > 0

    @property
    def parks_experts(self) -> bool:
        """The idle expert leaves the GPU."""
        return self.offload_model or self.stream_blocks

    @property
    def sharded(self) -> bool:
        """Each GPU keeps a part of the weights."""
        return self.use_fsdp and self.gpu_count > 1

    @property
    def weights_are(self) -> tuple[object, ...]:
        """In which values a transformer's weights are, and whether it is blocks that come and go: what one job's are
        made of, another's cannot be made of."""
        # Blocks whose weights are not rounded; where none are, they only compute otherwise.
        exact = self.exact_blocks if self.linear_precision != "full" else ""
        return self.mixed_precision, self.linear_precision, self.quantised_loras, exact, self.stream_blocks

    @property
    def weights_lie(self) -> tuple[object, ...]:
        """Where a transformer's weights are and in which values: those of another job are not of use as they lie."""
        return *self.weights_are, self.sharded

    @property
    def exchange(self) -> str:
        """`ulysses_engine` where ranks exchange tokens; empty where they do not."""
        return self.ulysses_engine if self.use_ulysses and self.ulysses_size > 1 else ""

    @property
    def cfg_size(self) -> int:
        """Groups of GPUs that work on different prompts."""
        return 2 if self.cfg_parallel else 1

    @property
    def ulysses_size(self) -> int:
        """GPUs that share one sequence."""
        return self.gpu_count // self.cfg_size

    @property
    def vae_dtype(self) -> str:
        """bfloat16 decodes three times as fast on a GPU; fp16 and fp32 jobs, and CPUs, decode as the official code."""
        return "bfloat16" if self.gpu_ids and self.mixed_precision == "bf16" else "float32"
