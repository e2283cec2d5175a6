"""The hidden exchange, its ranks threads of this process that share their memory as GPUs do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import stub_job
from layers import WRITING, attention_on_codes, random_layer
from patience import COMES_UP
from torch import Tensor
from wan_pack.distributed.parallel import opened_memory, symmetric
from wan_pack.distributed.parallel.memory_layout import parts_of
from wan_pack.distributed.parallel.sequence import SequenceShard, split_evenly
from wan_pack.distributed.parallel.symmetric import SymmetricUlysses
from wan_pack.distributed.rank import report
from wan_pack.wan.model.attention import Attention, attention
from wan_pack.wan.model.codes import HeadCodes
from wan_pack.wan.model.ops import PLAIN, Ops
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.self_attention import SelfAttention


class ThreadMemory:
    """`PeerMemory` of threads."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world, timeout=COMES_UP)
        self.world = world
        self.buffers: list[Tensor] = []
        self.own = torch.empty(0)

    def of(self, group: Any, nbytes: int, device: torch.device) -> ThreadMemory:
        """For `symmetric.peer_memory`: the same for all threads, NaN at first; as large as it was at least."""
        if self._barrier.wait() == 0:
            if self.own.nbytes < nbytes:
                self.buffers = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(self.world)]
                self.own = self.buffers[0]
            for buffer in self.buffers:
                buffer.fill_(255)
        self._barrier.wait()
        return self

    def put(self, rank: int, there: Tensor, here: Tensor) -> None:
        assert here.is_contiguous(), "a kernel takes it by where it begins"
        there.copy_(here)

    def arrival(self, incoming: Any) -> None:
        self._barrier.wait()


def exchange(
    monkeypatch: pytest.MonkeyPatch,
    world: int,
    layer: SelfAttention,
    inputs: list[Tensor],
    ops: Ops,
    kernel: Attention,
) -> list[Tensor]:
    """x [length, C] of some videos, one after another -> what all ranks together make of each, [length, H, D]."""
    monkeypatch.setattr(symmetric, "peer_memory", ThreadMemory(world).of)
    monkeypatch.setattr(symmetric, "_layouts", {})

    @torch.no_grad()
    def run(rank: int) -> list[Tensor]:
        group: Any = SimpleNamespace(group_name=f"{id(inputs)} {rank}")
        engine = SymmetricUlysses(group, SequenceShard(length=1, rank=rank, world=world), kernel)
        results = []
        for x in inputs:
            engine.shard = shard = SequenceShard(length=len(x), rank=rank, world=world)
            rope = rope_table((1, 1, len(x)), layer.head_dim, start=shard.start, stop=shard.stop)
            results.append(engine(layer, shard.split(x), rope, ops))
        return results

    with ThreadPoolExecutor(world) as pool:
        ranks = list(pool.map(run, range(world)))
    return [torch.cat(parts)[: len(x)] for x, parts in zip(inputs, zip(*ranks, strict=True), strict=True)]


@torch.no_grad()
def expected(world: int, layer: SelfAttention, x: Tensor, kernel: Attention) -> Tensor:
    """The same products and the same attention, without an exchange."""
    rows = []
    for rank in range(world):
        shard = SequenceShard(length=len(x), rank=rank, world=world)
        rope = rope_table((1, 1, len(x)), layer.head_dim, start=shard.start, stop=shard.stop)
        rotate = PLAIN.rotate_codes if kernel is attention_on_codes else PLAIN.rotate
        q, k, v = layer.queries_keys_values(shard.split(x), rope, rotate)
        if kernel is attention_on_codes:
            # The scales are the norm's, and so the same on every rank.
            (q, q_scale), (k, k_scale) = q, k
        rows.append((q, k, v))
    q, k, v = (torch.cat(parts) for parts in zip(*rows, strict=True))
    if kernel is attention_on_codes:
        k, v = k[: len(x)], v[: len(x)]
        return kernel(HeadCodes(q, q_scale), HeadCodes(k, k_scale), PLAIN.quantise_heads(v))[: len(x)]
    heads = split_evenly(layer.num_heads, world)
    parts = [
        attention(*qkv) for qkv in zip(*(y.split(heads, dim=1) for y in (q, k[: len(x)], v[: len(x)])), strict=True)
    ]
    return torch.cat(parts, dim=1)[: len(x)]


def heads_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As kernels whose results lie head by head."""
    return attention(q, k, v).transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("kernel", [attention, attention_on_codes, heads_first], ids=["full", "codes", "heads first"])
@pytest.mark.parametrize("ops", [PLAIN, WRITING], ids=["tensors", "kernel"])
def test_it_changes_no_bit(monkeypatch: pytest.MonkeyPatch, ops: Ops, kernel: Attention):
    """Heads that ranks divide or not, ranks with one or none; videos one after another, also of the same length."""
    for world, heads in product((2, 3), (24, 12, 5, 2)):
        layer = random_layer(heads=heads, channels=8)
        inputs = [
            torch.randn(n, heads * 8, generator=torch.Generator().manual_seed(i)) for i, n in enumerate((16, 16, 45))
        ]
        found = exchange(monkeypatch, world, layer, inputs, ops, kernel)
        for x, out in zip(inputs, found, strict=True):
            assert torch.equal(out, expected(world, layer, x, kernel)), (world, heads, len(x))


@pytest.mark.parametrize("world", [2, 3])
def test_codes_and_full_tensors_take_turns_in_one_memory(monkeypatch: pytest.MonkeyPatch, world: int):
    """From layer to layer, the larger one first or last; none is taken for the other's."""
    layer = random_layer(heads=5, channels=8)
    x = torch.randn(45, 40, generator=torch.Generator().manual_seed(0))
    kernels = {True: attention, False: attention_on_codes}
    for order in ((True, False, False, True, False), (False, True, True, False, True)):
        memory = ThreadMemory(world)
        monkeypatch.setattr(symmetric, "_layouts", {})
        monkeypatch.setattr(symmetric, "peer_memory", memory.of)

        @torch.no_grad()
        def run(rank: int, order: tuple[bool, ...] = order) -> tuple[list[Tensor], Any]:
            group: Any = SimpleNamespace(group_name=f"turns {rank}")
            shard = SequenceShard(length=45, rank=rank, world=world)
            engines = {exact: SymmetricUlysses(group, shard, kernel) for exact, kernel in kernels.items()}
            rope = rope_table((1, 1, 45), 8, start=shard.start, stop=shard.stop)
            out = [engines[exact](layer, shard.split(x), rope, PLAIN) for exact in order]
            return out, symmetric._layouts[group.group_name].by_dtypes

        with ThreadPoolExecutor(world) as pool:
            ranks, layouts = zip(*pool.map(run, range(world)), strict=True)
        for exact, parts in zip(order, zip(*ranks, strict=True), strict=True):
            assert torch.equal(torch.cat(parts)[:45], expected(world, layer, x, kernels[exact])), order
        for rank, by_dtypes in enumerate(layouts):
            # The larger one found room for both, or it came later and the smaller one began anew. While a rank still
            # reads what is returned, others send for the next layer: to other places, whatever its dtypes are.
            ends = []
            for layout in by_dtypes.values():
                returned = [layout._piece(rank, of, part) for of in range(world) for part in layout.parts]
                received = [heads for part in layout.parts for heads in layout.received(part)]
                ends.append(max(piece.data_ptr() + piece.nbytes for piece in returned))
                assert all(heads.data_ptr() >= ends[-1] for heads in received if heads.numel())
            assert len(ends) == 2 and ends[0] == ends[1]


def test_ranks_that_cannot_reach_each_other_exchange_as_packed(monkeypatch: pytest.MonkeyPatch):
    """One that could is told so too."""
    asked = []
    monkeypatch.setattr(symmetric, "peer_memory", lambda *_: asked.append(1))
    monkeypatch.setattr(symmetric, "_layouts", {})
    monkeypatch.setattr(symmetric.PackedUlysses, "__call__", lambda self, *_: "packed")
    group: Any = SimpleNamespace(group_name="far apart")
    engine = SymmetricUlysses(group, SequenceShard(length=16, world=2), attention)
    layer = random_layer(heads=2, channels=8)
    assert [engine(layer, torch.zeros(8, 16), (), PLAIN) for _ in range(2)] == ["packed"] * 2
    # It is found out once.
    assert asked == [1]


def test_a_group_that_is_let_go_finds_its_memory_anew(monkeypatch: pytest.MonkeyPatch):
    """The other one's places stay."""
    known: dict[str, Any] = {"row": 1, "another": 2}
    closed: list[Any] = []
    monkeypatch.setattr(symmetric, "_layouts", known)
    monkeypatch.setattr(symmetric, "close_memory", lambda *of: closed.append(of))
    group: Any = SimpleNamespace(group_name="row")
    for _ in range(2):
        symmetric.let_go(group, torch.device("cpu"))
    assert known == {"another": 2} and closed == [(group, torch.device("cpu"))] * 2


@pytest.mark.parametrize(
    ("places", "variables", "found"),
    [
        ([[7, 0], [7, 1]], {}, ""),
        ([[7, 0], [7, 2]], {}, "GPU 0 has no peer access to 2"),
        ([[7, 0], [8, 1]], {}, "the ranks are on several machines"),
        ([[7, 0], [7, 1]], {"NCCL_P2P_DISABLE": "1"}, "NCCL_P2P_DISABLE is set"),
        ([[7, -1], [7, -1]], {}, "no GPU"),
    ],
)
def test_what_keeps_ranks_from_each_others_memory(
    monkeypatch: pytest.MonkeyPatch, places: list[list[int]], variables: dict[str, str], found: str
):
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda one, other: {one, other} == {0, 1})
    assert opened_memory.obstacle(places, 0) == found


@pytest.mark.parametrize(
    ("reasons", "status"),
    [
        ({"another": ["no GPU"]}, "symmetric"),
        ({"row": ["no GPU"]}, "relayed through the host's memory (no GPU)"),
        (
            {"row": ["no GPU", "the ranks are on several machines"]},
            "packed (no GPU; the ranks are on several machines)",
        ),
        ({"row": ["the ranks are on several machines"] * 2}, "packed (the ranks are on several machines)"),
    ],
)
def test_the_status_says_which_exchange_ran(monkeypatch: pytest.MonkeyPatch, reasons: dict[str, Any], status: str):
    monkeypatch.setattr(opened_memory, "_reasons", reasons)
    session: Any = SimpleNamespace(
        mesh=SimpleNamespace(ulysses_group=SimpleNamespace(group_name="row")), device=torch.device("cpu")
    )
    job = stub_job(gpu_count=2, ulysses_engine="symmetric")
    assert report._sequence(job, session) == f"Ulysses over 2 GPUs, {status}"
    # Without a GPU nothing is gained by it.
    for engine in ("packed", "auto"):
        job = stub_job(gpu_count=2, ulysses_engine=engine)
        assert report._sequence(job, session) == "Ulysses over 2 GPUs, packed"
    session.device = torch.device("cuda")
    assert report._sequence(job, session) == f"Ulysses over 2 GPUs, {status}"


def test_one_reason_against_both_ways_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(opened_memory, "_places", lambda group, device: [[7, 0], [8, 0]])
    monkeypatch.setattr(opened_memory, "everywhere", lambda holds, group, device: holds)
    monkeypatch.setattr(opened_memory, "_reasons", {})
    group: Any = SimpleNamespace(group_name="row", rank=lambda: 0)
    with caplog.at_level("INFO"):
        assert opened_memory._open(group, 1 << 20, torch.device("cpu")) is None
    assert caplog.messages == ["not through memory: the ranks are on several machines"]
    assert opened_memory.way_of(group) == "packed (the ranks are on several machines)"


@pytest.mark.parametrize(
    ("heads", "most", "parts"),
    [
        (20, 20, [2, 4, 6, 6, 2]),
        (10, 10, [2, 4, 2, 2]),
        (13, 14, [2, 4, 6, 1]),
        (14, 14, [2, 4, 6, 2]),
        (1, 2, [1]),
        (0, 1, [0]),
        (5, 5, [2, 3]),
    ],
)
def test_parts_of_the_heads(heads: int, most: int, parts: list[int]):
    """As many for a rank with fewer heads."""
    assert parts_of(heads, most) == parts


@pytest.mark.parametrize(
    ("places", "found"),
    [([[7, 0], [7, 1]], ""), ([[7, -1], [7, -1]], ""), ([[7, 0], [8, 0]], "the ranks are on several machines")],
)
def test_what_keeps_ranks_from_relaying(places: list[list[int]], found: str):
    assert opened_memory.relay_obstacle(places, 0, 1 << 20) == found


@pytest.mark.parametrize(
    ("available", "found"), [(2 << 30, ""), (None, ""), ((2 << 30) - 1, "2.0 GiB of the host's memory are not free")]
)
def test_a_relay_needs_room_in_the_hosts_memory(monkeypatch: pytest.MonkeyPatch, available: int | None, found: str):
    monkeypatch.setattr(opened_memory, "available_bytes", lambda: available)
    assert opened_memory.relay_obstacle([[7, 0], [7, 1]], 0, 1 << 30) == found
