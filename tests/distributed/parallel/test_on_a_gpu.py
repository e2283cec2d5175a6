"""What is asked of CUDA and of a group where there is none: calls that are only noted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel import page_locks, shared_reading, split_vae
from wan_pack.distributed.parallel.page_locks import lock_pages, unlock_pages
from wan_pack.distributed.parallel.shared_reading import SharedReading
from wan_pack.distributed.parallel.split_vae import RankVae
from wan_pack.distributed.weights import warm_up
from wan_pack.distributed.weights.warm_up import use_beside

CPU = torch.device("cpu")


@pytest.mark.parametrize("code", [0, 800])
@pytest.mark.parametrize("mapped", [True, False])
def test_memory_is_locked_as_a_whole_and_for_all_streams_where_they_use_single_words(
    code: int, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA keeps of a refusal is taken from it."""
    asked: list[Any] = []
    cudart = SimpleNamespace(
        cudaHostRegister=lambda *given: (asked.append(given), code)[1],
        cudaHostUnregister=lambda *given: (asked.append(given), code)[1],
    )  # fmt: skip
    host = torch.empty(10)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(page_locks.torch, "ones", lambda *given, **how: asked.append((given, how)))
    assert lock_pages(host, mapped=mapped) is (code == 0)
    unlock_pages(host)
    forgotten = [((1,), {"device": "cuda"})] * (code != 0)
    assert asked == [(host.data_ptr(), 40, 3 if mapped else 0), *forgotten, (host.data_ptr(),), *forgotten]


@pytest.mark.parametrize("compiles", [True, False])
def test_what_is_used_first_is_used_on_the_ranks_own_gpu(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread starts on the first one."""
    happens: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", happens.append)
    gpu = torch.device("cuda", 1)
    use_beside(lambda: None, lambda: happens.append("used"), device=gpu, alone=True, compiles=compiles)
    assert happens == [gpu, "used"]
    happens.clear()
    use_beside(lambda: None, lambda: happens.append("used"), device=CPU, alone=True, compiles=compiles)
    assert happens == ["used"]


def test_a_kernels_module_is_imported_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(warm_up.importlib, "import_module", imported.append)
    monkeypatch.setattr(warm_up, "use_beside", lambda *given, **how: None)
    parallel = SimpleNamespace(stream_blocks=False, use_fsdp=False, torch_compile=False)
    spans: list[str] = []

    @contextmanager
    def span(name: str) -> Iterator[None]:
        spans.append(name)
        yield

    gpu = torch.device("cuda", 0)
    for module in ("flash_attn", ""):
        warm_up.get_ready(
            "model", parallel, "shard", mesh=None, device=gpu, kernel=SimpleNamespace(module=module), span=span
        )  # type: ignore[arg-type]
    assert imported == ["flash_attn"] and spans == ["import of attention"], "one has none of its own"


@pytest.mark.parametrize(("reach", "disabled", "shared"), [
    (True, "0", True), (True, "", True), (True, None, True), (False, "0", False), (True, "2", False),
])  # fmt: skip
def test_gpus_share_the_reading_where_each_reaches_the_others(
    reach: bool, disabled: str | None, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both directions: here the second does not reach the first."""
    mesh: Any = SimpleNamespace(group="all")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: reach or (a, b) != (1, 0))
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    if disabled is not None:
        monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    found = SharedReading.of(Parallel(gpu_count=2, gpu_ids=("0", "1")), mesh, torch.device("cuda", 0))
    assert (found.group == "all") is shared


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, size in (("a", 8), ("b", 2), ("c", 6)):
            self.register_parameter(name, nn.Parameter(torch.zeros(size, 2, dtype=torch.bfloat16)))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_weight_is_sent_as_bytes_by_the_rank_that_reads_it(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    happens: list[Any] = []
    model, group = Weights(), SimpleNamespace(rank=lambda: rank, size=lambda: 2)
    monkeypatch.setattr(shared_reading, "read_weights", lambda *given, **how: happens.append((*given, how)))

    def broadcast(data: Tensor, *, group: Any, group_src: int, async_op: bool) -> Any:
        assert data.dtype == torch.uint8 and data.dim() == 1 and async_op and group is sharing.group
        name = next(name for name, p in model.named_parameters() if p.data_ptr() == data.data_ptr())
        happens.append((name, data.numel(), group_src))
        return SimpleNamespace(wait=lambda: happens.append("waited"))

    monkeypatch.setattr(shared_reading.dist, "broadcast", broadcast)
    sharing = SharedReading(group)  # type: ignore[arg-type]
    sharing.read(model, "checkpoint", ["a"], device=CPU)  # type: ignore[arg-type]
    assert happens.pop() == (model, "checkpoint", ["a"], {"part": rank, "parts": 2, "device": CPU})
    sharing.send(model, on_send=lambda: happens.append("sends"))
    assert happens == ["sends", ("a", 32, 0), ("b", 8, 1), ("c", 24, 1), *["waited"] * 3]
    happens.clear()
    sharing.send(model, ["c"])
    assert happens == [("c", 24, 0), "waited"]
    happens.clear()
    alone = SharedReading(None)
    alone.send(model, on_send=lambda: happens.append("sends"))
    alone.read(model, "checkpoint", device=CPU)  # type: ignore[arg-type]
    assert happens == [(model, "checkpoint", None, {"part": 0, "parts": 1, "device": CPU})]


class Rows:
    """In the place of an ImageShard."""

    def split(self, whole: Tensor) -> Tensor:
        return whole[..., :1, :]

    def gather(self, mine: Tensor) -> Any:
        return "gathered", mine.shape[-2]

    def gather_to_first(self, frames: Any) -> Any:
        return "shown", frames


@pytest.mark.parametrize(("group", "world", "rows", "split"), [
    (None, 1, 4, False), ("all", 1, 4, False), ("all", 4, 4, True), ("all", 4, 3, False),
])  # fmt: skip
def test_a_picture_is_split_where_every_rank_has_a_row(
    group: Any, world: int, rows: int, split: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Latent rows, of which each is eight of the picture."""
    seen: dict[str, Any] = {}
    model = SimpleNamespace(config={"scale_factor_spatial": 8})
    monkeypatch.setattr(split_vae, "load_vae", lambda files, **how: (seen.update(load=(files, how)), model)[1])
    monkeypatch.setattr(split_vae, "channels_last", lambda vae: seen.update(last=vae))
    monkeypatch.setattr(split_vae, "upscale", lambda vae: 2)
    monkeypatch.setattr(split_vae, "check_video", lambda vae, video: seen.update(checked=(vae, video)))
    monkeypatch.setattr(split_vae.dist, "get_world_size", lambda of: world if of == "all" else 1 / 0)
    monkeypatch.setattr(split_vae.dist, "get_rank", lambda of: 0)
    monkeypatch.setattr(split_vae.ImageShard, "of", lambda count, of: (seen.update(shard=(count, of)), Rows())[1])

    def encode(vae: Any, video: Tensor, **how: Any) -> Tensor:
        seen["encode"] = how
        return video

    def decode(vae: Any, latents: Tensor, **how: Any) -> list[Any]:
        seen["decode"] = how
        return [latents.shape[-2]]

    monkeypatch.setattr(split_vae, "encode", encode)
    monkeypatch.setattr(split_vae, "decode_frames", decode)
    vae = RankVae(["f"], dtype=torch.bfloat16, device=CPU, group=group, ops="own")
    assert seen["load"] == (["f"], {"dtype": torch.bfloat16, "device": CPU}) and seen["last"] is model
    assert vae.upscale == 2 and vae.splits(rows) is (group is None or rows >= world)
    video = torch.zeros(1, 3, 5, 8 * rows, 16)
    with caplog.at_level("INFO"):
        made = vae.encode(video)
    assert seen["checked"][1] is video
    found = list(vae.decode(torch.zeros(1, 16, 2, rows, 2), clamp=False, at_once=3))
    how = {"ops": "own", "clamp": False, "at_once": 3}
    if split:
        assert made == ("gathered", 1) and found == [("shown", 1)] and seen["shard"] == (rows, "all")
        assert isinstance(seen["encode"]["rows"], Rows) and seen["encode"]["ops"] == "own"
        assert {**seen["decode"], "rows": 0} == {**how, "rows": 0}
    else:
        assert made is video and found == [rows] and seen["encode"] == {"ops": "own"} and seen["decode"] == how
    few = ["the VAE is not split: 3 latent rows are fewer than 4 ranks"]
    assert caplog.messages == (few if rows < world else [])
