"""What is used for the first time while weights are read: it changes nothing, and delays nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import COMES_UP
from ranks import run_ranks
from tiny import TINY, TINY_VACE, random_weights, write_official
from wan_pack.distributed.group.signs_of_life import Seen, find_suspect
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.machine.processes import Process
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.weights import warm_up
from wan_pack.distributed.weights.warm_up import first_evaluation, use_beside
from wan_pack.wan.model.attention_kernels import KERNELS
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.rope import rope_table
from wan_pack.wan.transformer.conditions import Beside
from wan_pack.wan.transformer.context import Context
from wan_pack.wan.transformer.transformer import WanModel
from wan_pack.wan.transformer.vace import Control

CPU = torch.device("cpu")
PICTURED = dataclasses.replace(TINY, in_dim=36, parts=frozenset({"img_emb"}))
"""Wan2.1's I2V."""


def filled(model: WanModel) -> WanModel:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.requires_grad_(False)


def evaluated(model: WanModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    config = model.config
    beside = Beside(
        picture=Context(torch.randn(257, config.clip_dim, generator=generator)) if config.image_branch else None,
        controls=[Control(torch.randn(12, 4 * config.control_dim, generator=generator))] if config.vace_layers else (),
    )
    tokens = torch.randn(12, 4 * config.in_dim, generator=generator)
    text = Context(torch.randn(512, config.text_dim, generator=generator))
    rope = rope_table((3, 2, 2), config.head_dim)
    return model(tokens, torch.tensor([500.0]), text, rope, None, beside)


@pytest.mark.parametrize("config", [TINY, TINY_VACE, PICTURED], ids=["T2V", "VACE", "image branch"])
def test_the_first_block_alone_runs_and_nothing_of_the_model_changes(config: WanConfig):
    model = filled(WanModel(config))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    expected = evaluated(model)
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    first_evaluation(model, SequenceShard(length=12), None, CPU)
    blocks = {name for name in ran if name.count(".") == 1 and "blocks" in name}
    assert blocks == {"blocks.0", *(["vace_blocks.0"] if model.config.vace_layers else [])}
    assert {"patch_embedding", "text_embedding", "time_projection", "head"} <= set(ran)
    assert len(model.blocks) == model.config.num_layers
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert torch.equal(evaluated(model), expected)


def test_weights_may_be_anything_yet():
    model = filled(WanModel(TINY))
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    first_evaluation(model, SequenceShard(length=12), None, CPU)


@pytest.mark.processes
@pytest.mark.parametrize("engine", ["packed", "symmetric"])
def test_ranks_that_exchanged_before_compute_the_same(tmp_path: Path, engine: str):
    folder = write_official(tmp_path / "tiny", random_weights())
    run_ranks("warmed_up_equals_fresh", 4, folder=str(folder), engine=engine)


def test_imports_and_first_uses_run_at_the_same_time():
    imports, use = threading.Event(), threading.Event()

    def meet(mine: threading.Event, other: threading.Event) -> None:
        mine.set()
        assert other.wait(COMES_UP), "one waits for the other's end"

    use_beside(lambda: meet(imports, use), lambda: meet(use, imports), device=CPU, alone=False, compiles=False)


def test_the_compiler_is_imported_by_one_at_a_time():
    order: list[str] = []
    use_beside(
        lambda: order.append("imports"), lambda: order.append("use"), device=CPU, alone=True, compiles=True
    )  # fmt: skip
    assert order == ["imports", "use"]


@pytest.mark.parametrize("compiles", [False, True])
def test_what_goes_wrong_is_left_to_the_step_unless_others_wait(compiles: bool, caplog: pytest.LogCaptureFixture):
    def fail() -> None:
        raise RuntimeError("no kernel for this")

    with caplog.at_level(logging.WARNING):
        use_beside(lambda: None, fail, device=CPU, alone=True, compiles=compiles)
    assert "kernels are used first in the first step" in caplog.text and "no kernel for this" in caplog.text
    with pytest.raises(RuntimeError, match="no kernel for this"):
        use_beside(lambda: None, fail, device=CPU, alone=False, compiles=compiles)


def test_what_is_measured_has_its_names():
    seen: list[str] = []

    @contextmanager
    def span(name: str) -> Iterator[None]:
        seen.append(name)
        yield

    use_beside(lambda: None, lambda: None, device=CPU, alone=True, compiles=False, span=span)
    assert seen == ["first use of kernels"]


@pytest.mark.parametrize(
    ("settings", "used"),
    [
        ({}, True),
        ({"use_fsdp": True}, False),
        ({"stream_blocks": True}, False),
        ({"use_fsdp": True, "gpu_count": 1}, True),
        ({"torch_compile": True}, True),
    ],
)
def test_while_weights_are_read_a_gpu_uses_what_steps_use(
    settings: dict[str, Any], used: bool, monkeypatch: pytest.MonkeyPatch
):
    """Not where blocks come and go with their weights; on a CPU nothing, for which it has no core."""
    parallel = Parallel(**{"gpu_count": 2, **settings})
    seen: list[Any] = []
    monkeypatch.setattr(warm_up, "import_diffusers", lambda: seen.append("imports"))
    monkeypatch.setattr(warm_up, "first_evaluation", lambda *given: seen.append(given))
    shard, spans = SequenceShard(length=4), []
    model, mesh = object(), None if parallel.gpu_count == 1 else object()

    def beside(imports: Any, use: Any, **how: Any) -> None:
        imports()
        with how["span"]("what is beside it"):
            use()
        assert (how["compiles"], how["alone"]) == (parallel.torch_compile, mesh is None)
        assert how["device"] == torch.device("cuda")

    def get_ready(kind: str, tokens: Any, kernel: Any) -> None:
        warm_up.get_ready(
            model, parallel, tokens, mesh=mesh, device=torch.device(kind), kernel=kernel,
            span=lambda name: contextlib.nullcontext(spans.append(name)),
        )  # fmt: skip

    monkeypatch.setattr(warm_up, "use_beside", beside)
    get_ready("cpu", shard, KERNELS["flash"])
    assert not seen and not spans
    get_ready("cuda", shard, KERNELS["flash"])
    assert seen == ["imports", *([(model, shard, mesh, torch.device("cuda"))] if used else [])]
    assert spans == ["import of diffusers", *(["what is beside it"] if used else [])]
    seen.clear()
    get_ready("cuda", None, KERNELS["flash"])
    assert seen == ["imports"], "tokens that are not known yet"
    get_ready("cuda", shard, None)
    assert seen == ["imports"] * 2, "a kernel that looks at what it computes"


@pytest.mark.parametrize("stands_in", ["imports", "use"])
def test_a_rank_counts_as_waiting_only_where_its_imports_are_over(tmp_path, stands_in):
    """A rank that hangs in an import is the one to be named, not the first of those that wait for it."""
    go, reached = threading.Event(), threading.Event()

    def stand() -> None:
        reached.set()
        go.wait()

    imports, use = (stand, lambda: None) if stands_in == "imports" else (lambda: None, stand)
    rank = threading.Thread(
        target=lambda: use_beside(imports, use, device=torch.device("cpu"), alone=False, compiles=False), daemon=True
    )
    rank.start()
    try:
        assert reached.wait(COMES_UP)
        at_load = Seen(process=Process.of(os.getpid()), phase="load", step=0)
        waits = False
        deadline = time.monotonic() + (0.3 if stands_in == "imports" else COMES_UP)
        while not waits and time.monotonic() < deadline:
            with (tmp_path / "stacks").open("w+") as file:
                faulthandler.dump_traceback(file, all_threads=True)
                file.seek(0)
                threads = file.read().split("\n\n")
            [stack] = [text for text in threads if "in use_beside" in text]
            waits = find_suspect({0: at_load, 1: at_load}, {0: stack}, 2) == 1
            time.sleep(0.01)
        assert waits == (stands_in == "use")
    finally:
        go.set()
        rank.join()
