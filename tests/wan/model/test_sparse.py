"""Sparse attention: which steps, which order of tokens, and what the kernel is asked."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import stub_job, tiny_job
from tiny import GRID, TINY, random_weights
from torch import Tensor
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.planning import preflight
from wan_pack.distributed.rank import report
from wan_pack.distributed.rank.session import Session
from wan_pack.distributed.rank.video_work import VideoWork
from wan_pack.nodes.settings.spread import WanVideoDistributedConfig
from wan_pack.wan.model.attention import attention
from wan_pack.wan.model.attention_kernels import KERNELS
from wan_pack.wan.model.patch import patchify
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.model.sparse import BLOCK, block_order, sol_attention, sparse_kernel, sparse_steps
from wan_pack.wan.transformer.context import Context, pad_text
from wan_pack.wan.transformer.transformer import meta_model

VIDEO = (21, 30, 52)


def spread(order: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Of every block the mean distance of its tokens from their middle, in tokens."""
    places = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij"), dim=-1).view(-1, 3)[order].float()
    blocks = places[: len(order) // BLOCK * BLOCK].view(-1, BLOCK, 3)
    return (blocks - blocks.mean(1, keepdim=True)).norm(dim=2).mean(1)


@pytest.mark.parametrize("grid", [VIDEO, (21, 45, 80), (1, 4, 4), (3, 5, 7), (2, 8, 4), (1, 1, 65)])
def test_blocks_are_neighbours_and_hold_every_token_once(grid: tuple[int, int, int]):
    order = block_order(grid)
    assert order.sort().values.equal(torch.arange(grid[0] * grid[1] * grid[2]))
    if grid == VIDEO:
        # A cube of 64 has 1.94; a row of them 13.
        assert spread(order, grid).mean() < 2.5 and spread(order, grid).max() < 5
        assert spread(torch.arange(len(order)), grid).mean() > 12


def test_a_video_in_another_order_is_the_same_video():
    """Split over ranks and gathered: tokens, their positions, and padding."""
    generator = torch.Generator().manual_seed(0)
    tokens = patchify(torch.randn(16, 3, 6, 10, generator=generator))
    order = torch.randperm(len(tokens), generator=generator)
    whole = SequenceShard(length=len(tokens), order=order)
    assert torch.equal(whole.gather(whole.split(tokens), None), tokens)
    rope, mixed = rope_table(GRID, TINY.head_dim), rope_table(GRID, TINY.head_dim, order=order)
    shards = [SequenceShard(length=len(tokens), rank=rank, world=4, order=order) for rank in range(4)]
    assert torch.equal(torch.cat([shard.split(tokens) for shard in shards])[: len(tokens)], tokens[order])
    parts = [rope_table(GRID, TINY.head_dim, start=s.start, stop=s.stop, order=order) for s in shards]
    for index in (0, 1):
        whole_table = torch.cat([part[index] for part in parts])
        assert torch.equal(whole_table[: len(tokens)], rope[index][order])
        assert torch.equal(mixed[index], rope[index][order])
    assert whole_table.shape[0] > len(tokens) and not whole_table[len(tokens) :].any()
    model = meta_model(TINY, torch.float32)
    model.load_state_dict(random_weights(), assign=True)

    def velocity(rows: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        return model(rows, torch.tensor([700.0]), Context(pad_text(torch.ones(2, TINY.text_dim))), table)

    with torch.no_grad():
        found = whole.gather(velocity(whole.split(tokens), mixed), None)
        torch.testing.assert_close(found, velocity(tokens, rope), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("steps", "of", "tokens", "sparse"),
    [
        (range(20), 20, 32_760, range(4, 20)),
        (range(4), 4, 32_760, range(1, 4)),
        (range(10, 20), 20, 32_760, range(10, 20)),
        (range(2), 20, 32_760, range(2, 2)),
        (range(20), 20, 12_287, range(20, 20)),
        (range(20), 20, 12_288, range(4, 20)),
    ],
)
def test_the_first_steps_and_short_videos_are_dense(steps: range, of: int, tokens: int, sparse: range):
    assert sparse_steps(steps, of, tokens) == sparse


def fake_kitchen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """comfy-kitchen whose sparse attention is dense. Returns the tau of each call."""
    asked: list[float] = []

    def sol_attn(q: Tensor, k: Tensor, v: Tensor, *, tau: float) -> Tensor:
        assert q.shape == k.shape == v.shape
        asked.append(tau)
        return attention(q[0], k[0], v[0])[None]

    fake: Any = types.ModuleType("comfy_kitchen")
    fake.sol_attn = sol_attn
    monkeypatch.setitem(sys.modules, "comfy_kitchen", fake)
    return asked


def test_the_package_gets_no_padding(monkeypatch: pytest.MonkeyPatch):
    asked = fake_kitchen(monkeypatch)
    q, k, v = torch.randn(3, 10, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    out = sol_attention(q, k[:7], v[:7], tau=0.5)
    assert torch.equal(out[:7], attention(q[:7], k[:7], v[:7])) and out.shape == q.shape and not out[7:].any()
    assert torch.equal(sol_attention(q, k, v, tau=0.5), attention(q, k, v))
    assert sol_attention(q[:, :0], k[:, :0], v[:, :0], tau=0.5).shape == (10, 0, 8)
    assert asked == [0.5, 0.5]


def test_a_job_is_sparse_in_its_later_steps_and_says_so(monkeypatch: pytest.MonkeyPatch):
    asked = fake_kitchen(monkeypatch)
    kernel = sparse_kernel(KERNELS["sol"], KERNELS["cpu"], 1.5)
    session = Session(rank=0, world=1, device=torch.device("cpu"), kernel=kernel, ops="plain", vae_ops="plain")
    job = stub_job(gpu_count=1, attention="sol", sparse_tau=1.5)
    steps = job.sampling.step_range
    shard = session.shard(job, VIDEO)
    assert torch.equal(shard.order, block_order(VIDEO))
    first = sparse_steps(steps, job.sampling.schedule_steps, shard.length).start
    assert 0 < first < len(steps)
    q, k, v = torch.randn(3, 10, 2, 8).unbind()
    for step in steps:
        if step:
            session.sparse.enter(step)
        kernel.run(q, k, v)
    assert asked == [1.5] * (len(steps) - first)
    assert report.settings_of(job, session)["attention"] == (
        "sol (sparse attention in the later steps, which changes the video; else cpu), tau 1.5, in "
        f"{len(steps) - first} of {len(steps)} steps"
    )
    # The next one is short.
    assert session.shard(job, (1, 4, 4)).order is None
    kernel.run(q, k, v)
    assert len(asked) == len(steps) - first


def test_tau_is_one_of_the_nodes_inputs_and_is_checked():
    optional = WanVideoDistributedConfig.INPUT_TYPES()["optional"]
    assert list(optional)[-4:] == ["sparse_tau", "quantised_loras", "exact_steps", "exact_blocks"]
    assert optional["sparse_tau"][1]["default"] == Parallel(gpu_count=1).sparse_tau
    with pytest.raises(ValueError, match=r"sparse_tau is 3.5; it must be 0.1 to 3"):
        Parallel(gpu_count=1, sparse_tau=3.5)


def test_a_model_with_other_heads_is_refused_before_it_starts(tiny_models: Path, monkeypatch: pytest.MonkeyPatch):
    job, shapes = tiny_job(tiny_models, gpu_count=1, attention="sol"), {"context": (3, 64), "context_null": (3, 64)}
    # Neither is it for machines without a GPU.
    monkeypatch.setattr(preflight, "check_switches", lambda parallel: None)
    preflight.check_job(job, shapes)
    monkeypatch.setattr(preflight, "SPARSE_HEAD_DIM", 64)
    with pytest.raises(ValueError, match="which is for heads of 64 channels; this model's have 128"):
        preflight.check_job(job, shapes)


def test_a_rank_tells_the_kernel_of_every_step():
    """By its number in the schedule, of which a job may run a part."""
    entered: list[int] = []
    session: Any = SimpleNamespace(
        rank=0, device=torch.device("cpu"), sparse=SimpleNamespace(enter=entered.append),
        experts=SimpleNamespace(check_pending=lambda: None), check_stop=lambda *_: None,
    )  # fmt: skip
    files: Any = SimpleNamespace(progress=lambda *_, **__: None)
    worker = VideoWork(stub_job(gpu_count=1), None, None, files, session)
    worker.steps, worker._step_start = range(3, 6), 0.0
    for done in (1, 2, 3):
        worker.on_step(done)
    # Past the last one nothing is evaluated.
    assert entered == [4, 5, 6]
