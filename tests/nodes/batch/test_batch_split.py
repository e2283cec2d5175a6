"""What a batch is asked for, and how its GPUs are shared out."""

from __future__ import annotations

from typing import Any

import pytest
from wan_pack.distributed.job.job import FileIdentity, ModelFiles
from wan_pack.distributed.machine import gpus
from wan_pack.distributed.machine.gpus import Gpu
from wan_pack.nodes.batch.requests import MAX_SEED, Request, requests_of, split_prompts
from wan_pack.nodes.batch.split import fewest_gpus, splits
from wan_pack.nodes.host.status import Status
from wan_pack.nodes.settings.spread import DistributedConfig


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a fox\n\n  a cat  \n", ["a fox", "a cat"]),
        ("a fox\nin snow\n---\na cat", ["a fox\nin snow", "a cat"]),
        ("---\na fox\nin snow\n ---\n---\n", ["a fox\nin snow"]),
        (" a fox\n in snow\n --- \n a cat", ["a fox\n in snow", "a cat"]),
        ("a --- fox\n----", ["a --- fox", "----"]),
        (" \n", []),
    ],
)
def test_prompts_are_lines_or_what_lies_between_lines_of_dashes(text: str, prompts: list[str]) -> None:
    assert split_prompts(text) == prompts


def test_every_prompt_gets_every_seed() -> None:
    found = requests_of("a fox\na cat", 5, 2, embeds_connected=False)
    assert found == [Request("a fox", 5), Request("a fox", 6), Request("a cat", 5), Request("a cat", 6)]
    assert requests_of("has no effect", 5, 2, embeds_connected=True) == [Request("", 5), Request("", 6)]


def test_requests_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="prompts is empty and text_embeds is not connected"):
        requests_of(" \n", 0, 1, embeds_connected=False)
    assert requests_of("a fox", MAX_SEED, 1, embeds_connected=False)[0].seed == MAX_SEED
    with pytest.raises(ValueError, match=f"seed is {MAX_SEED} and batch_count 2"):
        requests_of("a fox", MAX_SEED, 2, embeds_connected=False)
    assert len(requests_of("fox\n" * 10, 0, 100, embeds_connected=False)) == 1000
    words = "11 prompts and batch_count 91 make 1001 videos; a batch makes at most 1000"
    with pytest.raises(ValueError, match=words):
        requests_of("fox\n" * 11, 0, 91, embeds_connected=False)


def test_long_prompts_are_cut_in_the_status() -> None:
    assert str(Request("a fox\nin  snow", 3)) == "seed 3, a fox in snow"
    assert str(Request("", 3)) == "seed 3"
    assert str(Request("x" * 80, 3)) == f"seed 3, {'x' * 80}"
    assert str(Request("x" * 81, 3)) == f"seed 3, {'x' * 77}..."


GIB = 2**30


def shared_out(
    monkeypatch: pytest.MonkeyPatch, *, machine: int, videos: int, per_video: int = 0, memory: int = 80, **config: Any
) -> tuple[list[tuple[int, str]], list[str]]:
    """(GPUs, their ids) of each group on a machine of so many GPUs, and what the status says. The experts have 2 x 28
    GiB."""
    listing = [
        Gpu(index=str(i), uuid=f"GPU-{i}", name="any", total_bytes=memory * GIB, free_bytes=0) for i in range(machine)
    ]
    monkeypatch.setattr(gpus, "list_gpus", lambda: listing)
    expert = (FileIdentity(path="/expert.safetensors", size=28 * GIB, mtime_ns=1),)
    model = ModelFiles(high_noise=expert, low_noise=expert, vae=expert)
    chosen = DistributedConfig(
        **{"gpu_count": 0, "use_ulysses": True, "use_fsdp": True, "offload_model": False, **config}
    )
    status = Status()
    groups = next(splits(chosen, videos, per_video, model=model, visible=None, status=status))
    return [(group.gpu_count, group.gpu_ids) for group in groups], status.warnings


@pytest.mark.parametrize(
    ("machine", "videos", "values", "groups"),
    [
        (4, 2, {}, ["0,1", "2,3"]),
        (4, 1, {}, ["0,1,2,3"]),
        (4, 3, {}, ["0,1", "2,3"]),
        (4, 6, {"memory": 141}, ["0", "1", "2", "3"]),
        (4, 6, {"memory": 80}, ["0,1", "2,3"]),  # 56 GiB of weights are more than 60 % of one
        (4, 6, {"memory": 24}, ["0,1,2,3"]),
        (4, 6, {"memory": 0}, ["0", "1", "2", "3"]),  # nvidia-smi does not tell
        (4, 6, {"memory": 16}, ["0,1,2,3"]),  # not enough anyway: what fits is not for this to say
        (4, 6, {"memory": 80, "offload_model": True}, ["0", "1", "2", "3"]),
        (4, 6, {"memory": 24, "use_fsdp": False}, ["0", "1", "2", "3"]),  # more GPUs would not help
        (3, 2, {}, ["0,1,2"]),
        (8, 6, {"gpu_ids": "7,6,5,4"}, ["7,6", "5,4"]),
        (8, 6, {"gpu_count": 2}, ["0,1"]),
        (8, 9, {"per_video": 3, "gpu_count": 6}, ["0,1,2", "3,4,5"]),
        (8, 1, {"per_video": 8}, ["0,1,2,3,4,5,6,7"]),
    ],
)
def test_as_few_gpus_per_video_as_keep_all_busy(
    monkeypatch: pytest.MonkeyPatch, machine: int, videos: int, values: dict[str, Any], groups: list[str]
) -> None:
    found, notes = shared_out(monkeypatch, machine=machine, videos=videos, **values)
    assert found == [(len(ids.split(",")), ids) for ids in groups]
    assert notes == []


@pytest.mark.parametrize(
    ("settings", "memory", "fewest"),
    [
        # 60 % of the smallest GPU: 18 GiB, of which 10 and 30 take three, and the larger alone two.
        ({}, (30, 80, 80, 80), 3), ({"offload_model": True}, (80, 30, 80, 80), 2), ({}, (30, 30), 2),
        ({"use_fsdp": False}, (30, 80, 80, 80), 1), ({}, (30, 0, 80), 1), ({}, (), 1), ({}, (70,), 1),
    ],
)  # fmt: skip
def test_the_fewest_gpus_that_hold_the_weights(settings: dict[str, Any], memory: tuple[int, ...], fewest: int) -> None:
    high, low = ((FileIdentity(path="/e", size=size * GIB, mtime_ns=1),) for size in (10, 30))
    model = ModelFiles(high_noise=high, low_noise=low, vae=low)
    chosen = DistributedConfig(**{"gpu_count": 0, "use_fsdp": True, **settings})
    cards = [Gpu(index=str(i), uuid="", name="", total_bytes=size * GIB, free_bytes=0) for i, size in enumerate(memory)]
    assert fewest_gpus(model, chosen, cards) == fewest


def test_gpus_that_are_not_the_batchs_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [10, 141, 141]
    listing = [
        Gpu(index=str(i), uuid=f"GPU-{i}", name="any", total_bytes=size * GIB, free_bytes=0)
        for i, size in enumerate(sizes)
    ]
    expert = (FileIdentity(path="/expert.safetensors", size=28 * GIB, mtime_ns=1),)
    monkeypatch.setattr(gpus, "list_gpus", lambda: listing)
    chosen = DistributedConfig(gpu_count=0, use_fsdp=True, gpu_ids="1,2")
    model = ModelFiles(high_noise=expert, low_noise=expert, vae=expert)
    ways = list(splits(chosen, 2, 0, model=model, visible=None, status=Status()))
    assert [[group.gpu_ids for group in way] for way in ways] == [["1", "2"], ["1,2"]]


@pytest.mark.parametrize(
    ("count", "videos", "per_video", "sizes"), [(4, 3, 0, [2, 2]), (0, 2, 0, [1]), (4, 9, 1, [1] * 4)]
)
def test_processes_are_shared_out_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, count: int, videos: int, per_video: int, sizes: list[int]
) -> None:
    found, _ = shared_out(monkeypatch, machine=0, videos=videos, per_video=per_video, gpu_count=count)
    assert found == [(size, "") for size in sizes]


def test_idle_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found, notes = shared_out(monkeypatch, machine=8, videos=9, per_video=3)
    assert found == [(3, "0,1,2"), (3, "3,4,5")]
    assert notes == ["batch: 2 groups of 3 leave nothing to do for GPU 6, 7"]
    _, notes = shared_out(monkeypatch, machine=0, videos=1, per_video=1, gpu_count=2)
    assert notes == ["batch: 1 groups of 1 leave nothing to do for processes beyond 1"]


def test_what_cannot_be_shared_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"gpus_per_video is 5; it must be 0 \(auto\) to 4"):
        shared_out(monkeypatch, machine=4, videos=2, per_video=5)
    with pytest.raises(ValueError, match="master_port is 29500, and 2 videos are made at a time"):
        shared_out(monkeypatch, machine=4, videos=2, master_port=29500)
    assert len(shared_out(monkeypatch, machine=4, videos=1, master_port=29500)[0]) == 1
    with pytest.raises(ValueError, match="hostfile is 'cluster'; a batch runs on this machine only"):
        shared_out(monkeypatch, machine=4, videos=2, hostfile="cluster")
