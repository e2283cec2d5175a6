"""What a job may hold: every bound is allowed, the next value is not, and the message says which is which."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from jobs import stub_job
from wan_pack.distributed.job.errors import check_text, counted, is_unicode, listed
from wan_pack.distributed.job.job import (
    FileIdentity,
    ForwardsJob,
    Job,
    JobError,
    LoraFile,
    ModelFiles,
    Parallel,
    Sampling,
    Text,
    VaeJob,
)
from wan_pack.distributed.job.sampling import RoundedTimesteps
from wan_pack.wan.model.selection import Selection

FILE = FileIdentity(path="/models/a.safetensors", size=1, mtime_ns=1)
LORA = LoraFile(file=FILE, strength=1.0)
ONE = Parallel(gpu_count=1)
MODEL = ModelFiles(high_noise=(FILE,), low_noise=(FILE,), vae=(FILE,))
FORWARDS = ForwardsJob(id="0f", model=(FILE,), parallel=ONE)
VAE = VaeJob(id="0f", vae=(FILE,), encode=False, given=(2, 16, 3, 6, 8), made=(2, 3, 9, 48, 64), parallel=ONE)
LARGEST = (1, 16, 2**10, 2**10, 2**10)
"""Of 64 GiB in float32."""


def selected(**selection: Any) -> LoraFile:
    return dataclasses.replace(LORA, selection=Selection(**selection))


def of(base: Any, field: str) -> Callable[[Any], Any]:
    return lambda value: dataclasses.replace(base, **{field: value})


@pytest.mark.parametrize(
    ("make", "allowed", "refused", "words"),
    [
        *((of(MODEL, name), (FILE,) * 256, (FILE,) * 257, f"model.{name} is 257; it must be at most 256 files")
          for name in ("high_noise", "low_noise", "vae", "text_encoder", "tokenizer", "clip_vision")),
        *((of(MODEL, f"{name}_loras"), (LORA,) * 64, (LORA,) * 65,
           f"model.{name}_loras holds 65 LoRAs; it must hold at most 64 LoRAs per expert")
          for name in ("high_noise", "low_noise")),
        (of(FORWARDS, "model"), (FILE,) * 256, (FILE,) * 257, "model is 257; it must be at most 256 files"),
        (of(FORWARDS, "model"), (FILE,), (), r"model is \[?.*; it must be at least one file"),
        (of(FORWARDS, "loras"), (LORA,) * 64, (LORA,) * 65, "loras holds 65 LoRAs"),
        (of(VAE, "vae"), (FILE,) * 256, (FILE,) * 257, "vae is 257; it must be at most 256 files"),
        (of(VAE, "vae"), (FILE,), (), "vae is .*; it must be at least one file"),
        (of(FORWARDS, "id"), "0123456789abcdef" * 4, "0" * 65, "id is .*; it must be hexadecimal"),
        (of(FORWARDS, "id"), "f", "0g", "id is '0g'; it must be hexadecimal"),
        (lambda blocks: selected(blocks=tuple(blocks)), [0] * 1000, [0] * 1001, "at most 1000 numbers under 1000"),
        (lambda blocks: selected(blocks=tuple(blocks)), [0, 999], [0, -1], "at most 1000 numbers under 1000"),
        (lambda blocks: selected(blocks=tuple(blocks)), [], [0, 1000], "at most 1000 numbers under 1000"),
        (lambda parts: selected(without=tuple(parts)), ["a"] * 64, ["a"] * 65, "at most 64 parts of names"),
        (lambda parts: selected(without=tuple(parts)), ["a" * 200], ["b", "a" * 201], "of 1 to 200 characters"),
        (lambda parts: selected(without=tuple(parts)), [], ["b", ""], "of 1 to 200 characters"),
        (of(LORA, "strength"), 100.0, 100.1, r"strength is 100\.1; it must be -100 to 100"),
        (of(LORA, "strength"), -100.0, float("nan"), "strength is nan; it must be -100 to 100"),
        (of(Text(prompt="fox"), "prompt"), "x" * 100_000, "x" * 100_001, "prompt has 100001 characters; .* 100000"),
        (of(Text(prompt="fox"), "negative_prompt"), "x" * 100_000, "x" * 100_001, "negative_prompt has 100001"),
        (of(Text(prompt="fox"), "prompt"), "\ud7ff\ue000", "fox\udfff", "prompt is .*half of a character"),
        (of(RoundedTimesteps(), "below"), 1e6, 1000001.0, r"below is 1000001\.0; it must be -1 to 1,000,000"),
        (of(RoundedTimesteps(), "above"), -1.0, -1.5, r"above is -1\.5; it must be -1 to 1,000,000"),
        (of(ONE, "exact_blocks"), ",".join(["0"] * 1000), ",".join(["0"] * 1001), "exact_blocks is .* all below 1000"),
    ],
)  # fmt: skip
def test_a_bound_is_allowed_and_more_is_not(make: Callable[[Any], Any], allowed: Any, refused: Any, words: str):
    make(allowed)
    with pytest.raises(ValueError, match=words):
        make(refused)


@pytest.mark.parametrize(
    ("frames", "nearest"),
    [(80, "77 and 81"), (82, "81 and 85"), (83, "81 and 85"), (84, "81 and 85"), (4, "1 and 5"), (2, "1 and 5"),
     (0, "1 and 5"), (-3, "1 and 5"), (-4, "1 and 5")],
)  # fmt: skip
def test_the_nearest_numbers_of_frames_are_named(frames: int, nearest: str):
    with pytest.raises(ValueError, match=rf"num_frames is {frames}; it must be 4n \+ 1 \(the nearest are {nearest}\)"):
        Sampling(width=64, height=48, num_frames=frames, steps=4, seed=1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"given": (2, 16, 3, 6)}, r"given is \[2, 16, 3, 6\]; it must be five sizes of 1 and more"),
        ({"given": (2, 16, 0, 6, 8)}, r"given is \[2, 16, 0, 6, 8\]; it must be five sizes"),
        ({"made": (2, 3, 9, 48, 0)}, r"made is \[2, 3, 9, 48, 0\]; it must be five sizes"),
        ({"made": (1, 3, 9, 48, 64)}, r"made is \[1, 3, 9, 48, 64\]; it must be of 2 videos, as given"),
        ({"given": (1, 17, 2**10, 2**10, 2**10)}, f"given is .* at most {64 << 30} bytes together"),
        ({"parallel": Parallel(gpu_count=2, hosts=("a", "b"))}, "hosts is .*; it must be empty for VAE nodes"),
    ],
)
def test_a_vaes_job_has_two_videos_of_five_sizes(changes: dict[str, Any], words: str):
    dataclasses.replace(VAE, given=LARGEST, made=LARGEST)
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(VAE, **changes)


def test_what_a_vae_is_given_lies_before_what_it_makes():
    """Float32 but for frames that it takes in bf16; what is made begins where a float32 number can."""
    latents, frames = 2 * 16 * 3 * 6 * 8, 2 * 3 * 9 * 48 * 64
    assert VAE.memory == (slice(0, 4 * latents), slice(4 * latents, 4 * (latents + frames)))
    on_gpu = Parallel(gpu_count=1, gpu_ids=("0",))
    encoding = {"encode": True, "given": (1, 3, 1, 3, 3), "made": (1, 16, 1, 1, 1), "parallel": on_gpu}
    odd = dataclasses.replace(VAE, **encoding)
    assert (odd.given_dtype, odd.memory) == ("bfloat16", (slice(0, 54), slice(56, 56 + 64)))
    wide = dataclasses.replace(odd, parallel=ONE)
    assert (wide.given_dtype, wide.memory) == ("float32", (slice(0, 108), slice(108, 108 + 64)))
    assert dataclasses.replace(VAE, parallel=on_gpu).given_dtype == "float32", "latents"


def test_what_kinds_of_jobs_are():
    video = stub_job()
    assert (VAE.files, VAE.transformer, VAE.shared) == ((FILE,), (), FORWARDS.shared)
    assert (FORWARDS.transformer, video.transformer, video.vae) == ((FILE,), video.model.high_noise, video.model.vae)
    for job in (VAE, FORWARDS):
        assert not job.encodes and not job.looks and job.file_format is None and job.made_bytes() == 0
    assert video.file_format == video.sampling.file_format
    assert dataclasses.replace(video, decode=False).file_format is None


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ({}, {"gpus_per_host": 2, "parks_experts": False, "sharded": False, "exchange": "auto", "cfg_size": 1}),
        ({"hosts": ("a", "b")}, {"gpus_per_host": 1}),
        ({"offload_model": True}, {"parks_experts": True}),
        ({"stream_blocks": True}, {"parks_experts": True}),
        ({"use_fsdp": True}, {"sharded": True}),
        ({"use_fsdp": True, "gpu_count": 1}, {"sharded": False}),
        ({"cfg_parallel": True}, {"exchange": "", "cfg_size": 2, "ulysses_size": 1}),
        ({"use_ulysses": False, "use_fsdp": True}, {"exchange": "", "ulysses_size": 2}),
        ({"gpu_ids": ("0", "1")}, {"vae_dtype": "bfloat16"}),
        ({"gpu_ids": ("0", "1"), "mixed_precision": "fp16"}, {"vae_dtype": "float32"}),
        ({}, {"vae_dtype": "float32"}),
    ],
)
def test_what_follows_from_a_layout(layout: dict[str, Any], expected: dict[str, Any]):
    parallel = Parallel(**{"gpu_count": 2, **layout})
    assert {name: getattr(parallel, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("change", "made", "lies"),
    [
        ({"mixed_precision": "fp16"}, True, True), ({"linear_precision": "int8"}, True, True),
        ({"quantised_loras": "merged"}, True, True), ({"stream_blocks": True}, True, True),
        ({"use_fsdp": True}, False, True), ({"exact_blocks": "3"}, False, False), ({"attention": "fa3"}, False, False),
        ({"linear_precision": "int8", "exact_blocks": "3"}, True, True),
    ],
)  # fmt: skip
def test_weights_of_one_job_are_of_use_to_another(change: dict[str, Any], made: bool, lies: bool):
    first, other = Parallel(gpu_count=2), Parallel(gpu_count=2, **change)
    assert (first.weights_are != other.weights_are, first.weights_lie != other.weights_lie) == (made, lies)
    if "exact_blocks" in change and made:
        assert other.weights_are != Parallel(gpu_count=2, linear_precision="int8").weights_are


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hosts": ("a", "-b")}, "hosts is '-b'; it must be names or IPv4 addresses"),
        ({"hosts": ("a", "a")}, "hosts is .* without repeats"),
        ({"hosts": ("a", "b"), "gpu_count": 3}, "gpu_count is 3; it must be a multiple of the 2 hosts"),
        ({"hosts": ("a", "b"), "keep_warm_seconds": 1.0}, r"keep_warm_seconds is 1\.0; it must be 0 with several"),
        ({"hosts": ("a", "b"), "more_follow": True}, "more_follow is True; it must be off with several machines"),
        ({"gpu_ids": ("0",)}, r"gpu_ids is .*; it must be empty or one per GPU of a machine \(2\)"),
        ({"hosts": ("a", "b"), "gpu_ids": ("0", "1")}, r"one per GPU of a machine \(1\)"),
        ({"linear_precision": "fp8", "mixed_precision": "fp16"}, "'full' or 'int8' with mixed_precision fp16"),
        ({"kernels": "triton", "torch_compile": True}, "kernels is 'triton'; it must be 'auto' or 'plain'"),
        ({"stream_blocks": True, "use_fsdp": True}, "stream_blocks is True; it must be off with use_fsdp"),
        ({"cfg_parallel": True, "gpu_count": 3}, r"off with an odd number of GPUs \(gpu_count is 3\)"),
        ({"use_ulysses": False, "gpu_count": 4}, "gpu_count is 4 with use_ulysses and use_fsdp both off"),
    ],
)
def test_layouts_that_cannot_be(change: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        Parallel(**{"gpu_count": 2, **change})


@pytest.mark.parametrize(
    "layout",
    [
        {"gpu_count": 1, "stream_blocks": True, "use_fsdp": True}, {"gpu_count": 2, "kernels": "triton"},
        {"gpu_count": 1, "torch_compile": True},
        {"gpu_count": 1, "linear_precision": "int8", "mixed_precision": "fp16"},
        {"gpu_count": 2, "cfg_parallel": True, "use_ulysses": False}, {"gpu_count": 2, "hosts": ("a", "b.example")},
        {"gpu_count": 2, "gpu_ids": ("GPU-1f", "MIG-a/1/0")}, {"gpu_count": 2, "hosts": ("a" * 253, "1")},
    ],
)  # fmt: skip
def test_layouts_that_can(layout: dict[str, Any]):
    Parallel(**layout)


def test_a_job_of_another_shape_is_named():
    raw = json.loads(stub_job().to_json())
    for changes, words in (
        ({f"x{i}": 1 for i in range(6)}, r"job\.json has unknown fields \['x0', 'x1', 'x2', 'x3', 'x4'\]$"),
        ({"parallel": {**raw["parallel"], "sparse_tau": True}}, r"parallel\.sparse_tau is bool; it must be float"),
        ({"parallel": {**raw["parallel"], "sparse_tau": 2**53}}, r"parallel\.sparse_tau is int; it must be float"),
        ({"parallel": {**raw["parallel"], "stall_timeout": -(2**53)}}, r"stall_timeout is int; it must be float"),
        ({"text": 3}, r"job\.json\.text is int; it must be an object"),
        ({"warnings": ["a", 1]}, r"job\.json\.warnings\[1\] is int; it must be str"),
    ):
        with pytest.raises(JobError, match=words):
            Job.from_json(json.dumps({**raw, **changes}))
    for name, value in (("stall_timeout", 60), ("start_timeout", 1)):
        job = Job.from_json(json.dumps({**raw, "parallel": {**raw["parallel"], name: value}}))
        assert type(getattr(job.parallel, name)) is float
    for text, words in (("[" * 100_000, "is not a job this version can run"), ("[1]", "is list; it must be an object")):
        with pytest.raises(JobError, match=words):
            Job.from_json(text)
    with pytest.raises(JobError, match=r"lacks \['id', 'model', 'parallel', 'sampling'\]"):
        Job.from_json(json.dumps({"kind": "video"}))


def test_words_of_messages():
    assert listed(["a", "b c", 3]) == "a, b c, 3"
    assert listed(str(n) for n in range(20)) == ", ".join(str(n) for n in range(20))
    assert listed(str(n) for n in range(22)).endswith(", 18, 19 and 2 more")
    assert listed(["x" * 120]) == "x" * 120 and listed(["x" * 121]) != "x" * 121 and listed(["a\nb"]) == r"'a\nb'"
    assert (counted(1, "frame"), counted(2, "frame"), counted(0, "frame")) == ("1 frame", "2 frames", "0 frames")
    assert (counted(1, "process", "processes"), counted(3, "process", "processes")) == ("1 process", "3 processes")
    assert is_unicode("a\ud7ff\ue000") and not is_unicode("a\ud800") and not is_unicode("\udfffa")
    check_text("prompt", "four", 4)
    with pytest.raises(ValueError, match="prompt has 4 characters; it must have at most 3"):
        check_text("prompt", "four", 3)
