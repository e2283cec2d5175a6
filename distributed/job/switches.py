"""What a user decides of how a job runs, each value by itself: in the config node as in the job."""

from __future__ import annotations

from dataclasses import dataclass

from ...wan.model import attention_kernels
from ...wan.model.config import MAX_LAYERS
from ...wan.model.kernels.choice import OPS
from ...wan.model.precisions import TORCH_NAMES
from .setting import choice, number, numbers

MAX_GPUS = 64
ULYSSES_ENGINES = {
    "packed": ("ulysses", "PackedUlysses"),
    "symmetric": ("symmetric", "SymmetricUlysses"),
    "deepspeed": ("ulysses", "DeepSpeedUlysses"),
}
"""File and class in `distributed/parallel`: as text, for ComfyUI knows the names without torch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Switches:
    """All that needs no knowledge of the machine."""

    use_ulysses: bool = True
    """Split the sequence over the GPUs (Ulysses all-to-all attention)."""
    use_fsdp: bool = False
    """Shard the weights over the GPUs (FSDP2)."""
    offload_model: bool = False
    """Only the expert at work is on the GPU. The other waits in pinned host memory, or in its file for its turn."""
    stream_blocks: bool = False
    """The blocks wait in pinned host memory; each GPU holds the one at work and the next."""
    memory_optimization: bool = False
    """Trade speed for peak memory: chunked feed-forward, no kept cross-attention keys and values."""
    torch_compile: bool = False
    """Compile the per-block segments around attention."""
    mixed_precision: str = choice("bf16", TORCH_NAMES)
    """Matrix products and attention; the residual, modulation and solver stay fp32."""
    linear_precision: str = choice("full", ("full", "fp8", "int8"))
    """full: the large matrix products are in `mixed_precision`. fp8: they are of e4m3 codes, scaled by rows. int8: the
    weights are int8 codes in memory, multiplied as such where comfy-kitchen is installed, or unpacked for each use."""
    attention: str = choice("auto", ("auto", *attention_kernels.KERNELS))
    """The kernel of self-attention; auto: the fastest exact one that the GPU and the installed packages allow."""
    kernels: str = choice("auto", ("auto", *OPS))
    """Of the arithmetic around the matrix products. plain: torch's. triton: fused ones. auto: the fastest measured on
    such a GPU."""
    ulysses_engine: str = choice("auto", ("auto", *ULYSSES_ENGINES))
    """packed: one all-to-all in, one out. symmetric: written into the other GPUs' memory beside the arithmetic, through
    the host's memory without peer access, packed where neither can be. deepspeed: DeepSpeed's DistributedAttention.
    auto: symmetric, or packed where the GPUs' memory is too small for it; packed without GPUs."""
    master_port: int = number(0, 1024, 65535, off="no port")
    """0: rendezvous through memory, no port. Otherwise a TCP port on 127.0.0.1, or on the first of `hosts`."""
    keep_warm_seconds: float = number(0.0, 0, 86400, unit="seconds")
    """How long the processes wait for the next job, its model loaded; 0: they end with the job."""
    start_timeout: float = number(600.0, 1, 86400, unit="seconds")
    """Seconds until every rank must have joined and loaded."""
    stall_timeout: float = number(600.0, 1, 86400, unit="seconds")
    """Seconds without a sign of life from a rank after which the job is ended."""
    sparse_tau: float = number(1.0, 0.1, 3.0, step=0.1)
    """Of `attention` sol: the larger, the fewer keys are attended one by one."""
    quantised_loras: str = choice("beside", ("beside", "merged"))
    """beside: LoRAs of weights that stay in 8 bits are computed beside these, exactly, and a change of strength reads
    no weight. merged: into the weights, rounded to their 8 bits, as all other LoRAs are."""
    exact_steps: int = number(0, 0, 100)
    """So many of a schedule's first steps, and of its last ones, round nothing to 8 bits: attention is exact, and what
    weights in 8 bits are multiplied by is not rounded."""
    exact_blocks: str = numbers(MAX_LAYERS)
    """Blocks that round nothing to 8 bits at any step, and whose weights stay as their file has them: their numbers and
    ranges of them, separated by commas."""

    @property
    def rounds(self) -> bool:
        """Something is computed in 8 bits that is not in the files."""
        known = attention_kernels.KERNELS.get(self.attention)
        return self.linear_precision != "full" or (known is not None and known.eight_bits)
