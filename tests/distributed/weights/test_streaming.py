"""Where the weights wait makes no difference to what is computed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import TINY, TINY_VACE, random_weights, write_official
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.rank.expert import Weights, load_expert, relora_expert
from wan_pack.distributed.weights import streaming
from wan_pack.distributed.weights.streaming import BlockStream
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.conditions import Beside
from wan_pack.wan.transformer.context import Context, pad_text
from wan_pack.wan.transformer.transformer import WanModel
from wan_pack.wan.transformer.vace import Control

CPU = torch.device("cpu")


def config(layers: int) -> WanConfig:
    return WanConfig(**{**{name: getattr(TINY, name) for name in TINY.__slots__}, "num_layers": layers})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Number of blocks -> checkpoint (7: of VACE): even and odd numbers take the two buffers in other ways."""
    folder = tmp_path_factory.mktemp("stream")
    written = {n: str(write_official(folder / str(n), random_weights(config(n)), config(n))) for n in (1, 4, 5)}
    # Five and two others between them.
    return {**written, 7: str(write_official(folder / "vace", random_weights(TINY_VACE, scale=0.3), TINY_VACE))}


def load(folder: str, **settings: bool) -> tuple[WanModel, Weights]:
    files = [str(path) for path in Path(folder).glob("*.safetensors")]
    parallel = Parallel(gpu_count=1, mixed_precision="fp32", **settings)
    held: list[Weights] = []
    model = load_expert(
        files, parallel=parallel, mesh=None, shard=SequenceShard(length=45), device=CPU, on_weights=held.append
    )
    return model, held[0]


def velocity(model: WanModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(45, 4 * model.config.in_dim, generator=generator)
    text = Context(pad_text(torch.randn(9, model.config.text_dim, generator=generator)))
    rope = rope_table((3, 3, 5), model.config.head_dim, start=0, stop=45)
    controls = [Control(torch.randn(45, 4 * 96, generator=generator))] if model.config.vace_layers else []
    told = Beside(controls=controls)
    first, second = (model(tokens, torch.tensor([700.0]), text, rope, beside=told) for _ in range(2))
    assert torch.equal(first, second)
    return first


@pytest.mark.parametrize("layers", [1, 4, 5, 7])
def test_streamed_blocks_give_the_same_video(checkpoints: dict[int, str], layers: int):
    expected = velocity(load(checkpoints[layers])[0])
    model, stream = load(checkpoints[layers], stream_blocks=True)
    assert torch.equal(velocity(model), expected)
    stream.park()
    assert stream.resident_bytes == 0
    stream.fetch()
    assert torch.equal(velocity(model), expected)


def test_only_two_blocks_are_on_the_device(checkpoints: dict[int, str]):
    """At every block of a forward, not only before it."""
    model, stream = load(checkpoints[5], stream_blocks=True)
    assert isinstance(stream, BlockStream)
    whole = load(checkpoints[5])[1].resident_bytes
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: seen.append(stream.resident_bytes))
    velocity(model)
    block_bytes = min(sum(one.nbytes for one in block.parameters()) for block in model.blocks)
    assert len(seen) == 10 and len(set(seen)) == 1
    assert seen[0] < whole - 2 * block_bytes
    # Each of the two forwards copies every block; a block that is still there is not copied again.
    assert stream.copied == 10
    stream.drop()
    assert stream.resident_bytes == 0


def test_the_next_block_is_copied_while_one_computes(checkpoints: dict[int, str]):
    model, stream = load(checkpoints[4], stream_blocks=True)
    assert isinstance(stream, BlockStream)
    copied = []
    for block in model.blocks:
        attention = block.self_attn.attention
        block.self_attn.attention = lambda *qkv, run=attention: (copied.append(stream.copied), run(*qkv))[1]
    velocity(model)
    # Behind the last of an even number of blocks comes the first one of the next forward.
    assert copied == [2, 3, 4, 5, 6, 7, 8, 9]


def test_weights_of_a_streamed_model_can_be_replaced(checkpoints: dict[int, str], tmp_path: Path):
    """As other LoRAs do in a warm group: what is written reaches the blocks that compute."""
    model, stream = load(checkpoints[4], stream_blocks=True)
    before = velocity(model)
    files = [str(path) for path in Path(checkpoints[4]).glob("*.safetensors")]
    with stream.writable():
        for parameter in model.blocks[3].parameters():
            parameter.mul_(1.5)
    changed = velocity(model)
    assert not torch.equal(changed, before)
    with stream.writable():
        assert relora_expert(model, files, (), (), parallel=Parallel(gpu_count=1), device=CPU)
    assert torch.equal(velocity(model), changed)


def test_a_model_takes_the_hosts_memory_of_another(checkpoints: dict[int, str]):
    """As far as it is of the size; what is over is given back. The other one can be dropped then, or before."""
    first, stream = load(checkpoints[4], stream_blocks=True)
    expected = velocity(load(checkpoints[5])[0])
    velocity(first)
    slabs = stream.hand_over()
    wrong = torch.empty(slabs[0].numel() + 1, dtype=torch.uint8)
    stream.drop()
    assert len(slabs) == 4 and all(slab.untyped_storage().nbytes() for slab in slabs)
    files = [str(path) for path in Path(checkpoints[5]).glob("*.safetensors")]
    held: list[Weights] = []
    second = load_expert(
        files, parallel=Parallel(gpu_count=1, mixed_precision="fp32", stream_blocks=True), mesh=None,
        shard=SequenceShard(length=45), device=CPU, on_weights=held.append, slabs=[wrong, *slabs],
    )  # fmt: skip
    places = {slab.untyped_storage().data_ptr() for slab in slabs}
    assert torch.equal(velocity(second), expected)
    assert wrong.untyped_storage().nbytes() == 0
    held[0].park()
    now = {parameter.untyped_storage().data_ptr() for block in second.blocks for parameter in block.parameters()}
    assert len(now) == 5 and places < now
    held[0].drop()
    assert not any(slab.untyped_storage().nbytes() for slab in slabs)


def test_blocks_of_several_sizes_take_the_memory_of_their_own(
    checkpoints: dict[int, str], monkeypatch: pytest.MonkeyPatch
):
    """In whatever order it comes: a small block in a large one's memory would leave that one without."""
    first, stream = load(checkpoints[7], stream_blocks=True)
    expected = velocity(first)
    slabs = sorted(stream.hand_over(), key=lambda slab: -slab.numel())
    assert len({slab.numel() for slab in slabs}) == 3
    stream.drop()
    monkeypatch.setattr(streaming, "take_host", lambda size, *, locked: pytest.fail("there is memory for all of them"))
    files = [str(path) for path in Path(checkpoints[7]).glob("*.safetensors")]
    second = load_expert(
        files, parallel=Parallel(gpu_count=1, mixed_precision="fp32", stream_blocks=True), mesh=None,
        shard=SequenceShard(length=45), device=CPU, slabs=slabs,
    )  # fmt: skip
    assert torch.equal(velocity(second), expected)


def test_memory_of_no_use_goes_before_more_is_taken(checkpoints: dict[int, str], monkeypatch: pytest.MonkeyPatch):
    """Or the host would hold two models whose blocks are of other sizes, where one was planned for."""
    slabs = [torch.empty(size, dtype=torch.uint8) for size in (7, 9, 11)]
    left: list[list[int]] = []
    take = BlockStream._take

    def watch(stream: BlockStream, size: int, offered: list[torch.Tensor]) -> torch.Tensor:
        left.append([slab.untyped_storage().nbytes() for slab in slabs])
        return take(stream, size, offered)

    monkeypatch.setattr(BlockStream, "_take", watch)
    files = [str(path) for path in Path(checkpoints[4]).glob("*.safetensors")]
    load_expert(
        files, parallel=Parallel(gpu_count=1, mixed_precision="fp32", stream_blocks=True), mesh=None,
        shard=SequenceShard(length=45), device=CPU, slabs=slabs,
    )  # fmt: skip
    assert left == [[0, 0, 0]] * 4


def test_weights_outside_of_the_blocks_can_be_replaced_while_the_model_is_parked(checkpoints: dict[int, str]):
    """As a LoRA does that changes them, of the expert that waits."""
    model, stream = load(checkpoints[4], stream_blocks=True)
    before = velocity(model)
    stream.park()
    with stream.writable():
        assert stream.resident_bytes > 0
        model.head.head.weight.mul_(2)
        model.head.head.bias.mul_(2)
    torch.testing.assert_close(velocity(model), 2 * before)


def test_compiled_segments_read_the_buffers(checkpoints: dict[int, str], monkeypatch: pytest.MonkeyPatch):
    """They hold no weights of their own, which would be those of another block."""
    # What is captured, and when it is captured again, is the same without the code generator, which takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    expected = velocity(load(checkpoints[4])[0])
    model, _ = load(checkpoints[4], stream_blocks=True, torch_compile=True)
    torch.testing.assert_close(velocity(model), expected, rtol=1e-5, atol=1e-5)


def test_an_expert_gathered_once_gives_the_same_video(checkpoints: dict[int, str]):
    """On two ranks: nothing is gathered again in the second forward, and nothing is left after the release."""
    for result in run_ranks("gathered_expert", 2, folder=checkpoints[4]):
        assert result["gathers"] == {"block": [5, 5], "expert": [5, 0]}
        assert result["kept"] == {"block": False, "expert": True}


def test_streaming_and_sharding_exclude_each_other():
    with pytest.raises(ValueError, match="stream_blocks is True; it must be off with use_fsdp"):
        Parallel(gpu_count=2, use_fsdp=True, stream_blocks=True)
    with pytest.raises(ValueError, match="gather is 'all'; it must be one of block, expert"):
        Parallel(gpu_count=2, gather="all")
