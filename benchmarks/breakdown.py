"""Where the time of a forward goes, by torch.profiler, and how far that is from what the kernels alone would take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

KINDS = {
    "attention": ("flash", "fmha", "attention", "attn", "sdpa", "cudnn_generated"),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma", "addmm", "scaled_mm", "mkldnn_linear", "aten::mm", "linear"),
    "communication": ("nccl", "gloo", "all_to_all", "all_gather"),
}
"""Kind of work -> what the names of its kernels hold; everything else is elementwise."""
ATTENTION_TFLOPS = {"exact": 680.0, "fa3-fp8": 880.0, "sage": 441.0}
GEMM_TFLOPS = {"full": 730.0, "fp8": 1470.0}
"""Measured on one H200 at 32,760 and 75,600 tokens: FlashAttention-3 of fa3-fwd 0.0.3, SageAttention 1.0.6, cuBLAS."""


LONGEST_NAME = 80
"""Of a kernel; templates have thousands of characters."""


def work(config: Any, tokens: int) -> tuple[float, float]:
    """FLOPs of one forward in matrix products and in attention; what does not grow with the tokens is left out."""
    linear = 6 * config.dim**2 + 2 * config.dim * config.ffn_dim
    attention = 2 * tokens * config.dim + 2 * 512 * config.dim
    scale = 2.0 * tokens * len(config.block_names)
    return scale * linear, scale * attention


def floor_seconds(config: Any, tokens: int, gpus: int, *, attention: str, precision: str) -> float:
    """Seconds of one forward if each of the GPUs did nothing but these products at the rates above."""
    linear_flops, attention_flops = work(config, tokens)
    rate = ATTENTION_TFLOPS.get(attention, ATTENTION_TFLOPS["exact"])
    return (linear_flops / GEMM_TFLOPS[precision] + attention_flops / rate) / 1e12 / gpus


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    if name.startswith("triton_"):
        # The compiler's kernels are named after all operators around them too.
        return "elementwise"
    # FlashAttention-3's kernels are made with CUTLASS: the first kind that fits counts.
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "elementwise")


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what (start, end) intervals cover together."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered


def block_times(system: Any, layers: int) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Milliseconds per block by kind of work, and idle: no kernel ran. Kinds overlap where kernels do. Then of each
    kernel: its milliseconds and how often it ran, per block, the longest first.

    On a CPU they are operators, and none is idle.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = system.place.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as trace:
        system.forward()
    totals = dict.fromkeys([*KINDS, "elementwise", "idle"], 0.0)
    kernels: dict[str, list[float]] = {}
    intervals = []
    for event in trace.events():
        if event.is_user_annotation:
            # A range around kernels that are events themselves.
            continue
        if cuda and event.device_type == DeviceType.CUDA:
            start, end = event.time_range.start, event.time_range.end
            intervals.append((start, end))
            taken = end - start
        elif not cuda:
            taken = event.self_cpu_time_total
        else:
            continue
        totals[kind_of(event.name)] += taken
        of_kernel = kernels.setdefault(event.name[:LONGEST_NAME], [0.0, 0.0])
        of_kernel[0] += taken / 1000 / layers
        of_kernel[1] += 1 / layers
    if intervals:
        span = max(end for _, end in intervals) - min(start for start, _ in intervals)
        totals["idle"] = span - busy(intervals)
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])
    return (
        {kind: round(microseconds / 1000 / layers, 3) for kind, microseconds in totals.items()},
        {name: [round(milliseconds, 3), round(times, 2)] for name, (milliseconds, times) in longest},
    )
