"""What a rank keeps of what one evaluation brings, for those that name it again."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import TINY, TINY_VACE
from torch import Tensor
from wan_pack.distributed.group.evaluation_request import Evaluation, SentTensor, ToldKeys
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.evaluator import KEPT_AT_LEAST
from wan_pack.distributed.parallel.sequence import SequenceShard
from wan_pack.distributed.planning.gpu_memory import GUIDED_PROMPTS
from wan_pack.distributed.rank import kept_conditions
from wan_pack.distributed.rank.kept_conditions import KeptConditions
from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.patch import patchify
from wan_pack.wan.transformer.camera import Camera

FLF2V = dataclasses.replace(TINY, in_dim=36, parts=frozenset({"img_emb", "emb_pos"}), clip_dim=64)
FUN = dataclasses.replace(TINY, in_dim=52, parts=frozenset({"ref_conv"}))
CAMERA = dataclasses.replace(TINY, in_dim=36, parts=frozenset({"control_adapter"}), camera_dim=128)
SIZE = (3, 4, 6)
SHARD = SequenceShard(length=18)
PICTURE_BYTES = 2 * 64 * 4  # Of a short picture of `Kept`.


class Kept(KeptConditions):
    """Which is told by short names, and sent what it has not been sent yet."""

    def __init__(self, config: WanConfig, *, keeps: bool = True) -> None:
        super().__init__(config, torch.device("cpu"), keeps=keeps)
        self.config, self.sent = config, set()

    def told(
        self, texts: str, pictures: str = "", controls: Sequence[str] = (), strength: float = 1.0,
        size: tuple[int, ...] = SIZE, **changes: Any,
    ) -> Evaluation:  # fmt: skip
        """An evaluation of a sample for each letter."""
        names = [*texts, *pictures, *"".join(controls)]
        new = [name for name in dict.fromkeys(names) if name not in self.sent]
        self.sent |= set(new)
        volumes = {name: self.volume(name) for name in new if name in "".join(controls)}
        rows = {
            name: torch.full((2, self.config.clip_dim if name in pictures else self.config.text_dim), float(ord(name)))
            for name in new if name not in volumes
        }  # fmt: skip
        tensors = [{**rows, **volumes}[name] for name in new]
        sent = [
            SentTensor(key=key(name), shape=tuple(tensor.shape), dtype="float32")
            for name, tensor in zip(new, tensors, strict=True)
        ]
        given = {"picture": pictures, "controls": controls}
        evaluation = Evaluation(
            shape=(len(texts), self.config.in_dim, *size), by_frame=False, texts=tuple(map(key, texts)),
            told=tuple(of_kind(kind, some, strength) for kind, some in given.items() if some), sent=tuple(sent),
        )  # fmt: skip
        self.check(evaluation)
        self.take(evaluation, [tensor.view(-1).view(torch.uint8).numpy().data for tensor in tensors], SHARD)
        return evaluation

    def pictures(self, evaluation: Evaluation) -> list[Any]:
        return [beside.picture for beside in self.besides(evaluation, SHARD)]

    def controls(self, evaluation: Evaluation) -> list[Any]:
        return [beside.controls for beside in self.besides(evaluation, SHARD)]

    def volume(self, name: str) -> Tensor:
        return torch.full((self.config.control_dim, *SIZE), float(ord(name)))


def key(name: str) -> str:
    return f"{ord(name):064x}"


def of_kind(kind: str, names: Sequence[str], strength: float = 1.0) -> ToldKeys:
    """names: of each sample's."""
    keys = tuple(tuple(map(key, some)) for some in names)
    return ToldKeys(kind=kind, keys=keys, strengths=tuple((strength,) * len(some) for some in keys))


def values(contexts: Sequence[Any]) -> str:
    return "".join(chr(int(context.tokens[0, 0])) for context in contexts)


def test_of_texts_the_two_that_were_used_last_keep_what_is_derived_of_them() -> None:
    kept = Kept(TINY)
    assert GUIDED_PROMPTS == 2
    first = kept.texts(kept.told("ab"))
    assert all(context.keep for context in first) and values(first) == "ab"
    again = kept.texts(kept.told("ba"))
    assert again[0] is first[1] and again[1] is first[0]
    (third,) = kept.texts(kept.told("c"))
    assert third.keep and kept.texts(kept.told("c")) == [third]
    # b was used before a.
    assert kept.texts(kept.told("a"))[0] is first[0] and kept.texts(kept.told("b"))[0] is not first[1]
    same = kept.texts(kept.told("dd"))
    assert same[0] is same[1] and values(same) == "dd"


def test_with_memory_optimization_nothing_is_kept_of_texts_and_pictures() -> None:
    kept = Kept(FLF2V, keeps=False)
    before = kept.pictures(told := kept.told("ab", "xx"))
    assert not any(context.keep for context in kept.texts(told) + before)
    kept.pictures(kept.told("ab", "yy"))
    assert kept.texts(told)[0] is not kept.texts(told)[0] and kept.pictures(told)[0] is not before[0]


def test_pictures_are_kept_while_they_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_conditions, "KEPT_TOLD_BYTES", PICTURE_BYTES - 1)
    kept = Kept(FLF2V)
    first = kept.pictures(kept.told("cc", "ab"))
    again = kept.pictures(kept.told("cc", "ba"))
    assert again[0] is first[1] and again[1] is first[0] and first[0].keep and values(first) == "ab"
    kept.pictures(kept.told("c", "d"))
    assert kept.pictures(kept.told("c", "a"))[0] is not first[0]


def test_where_evaluations_take_turns_what_is_small_is_kept_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_conditions, "KEPT_TOLD_BYTES", 2 * PICTURE_BYTES)
    kept = Kept(FLF2V)
    first = {name: kept.pictures(kept.told("t", name))[0] for name in "abc"}
    for name in "abcbac":
        assert kept.pictures(kept.told("t", name))[0] is first[name]
    # A fourth has the one go that was used before all others.
    kept.pictures(kept.told("t", "d"))
    assert kept.pictures(kept.told("t", "c"))[0] is first["c"] and kept.pictures(kept.told("t", "a"))[0] is first["a"]
    assert kept.pictures(kept.told("t", "b"))[0] is not first["b"]
    # One that has grown too large is no reason to let a small one go.
    (large,) = kept.pictures(kept.told("t", "e"))
    large.embedded(lambda tokens: torch.zeros(9, PICTURE_BYTES))
    assert kept.pictures(kept.told("t", "a"))[0] is first["a"]
    assert kept.pictures(kept.told("t", "e"))[0] is not large


def test_what_is_told_goes_with_what_it_was_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_conditions, "KEPT_ROW_BYTES", 4 * KEPT_AT_LEAST)
    kept = Kept(FLF2V)
    there = weakref.ref(kept.pictures(kept.told("t", "a"))[0].tokens)
    kept.pictures(kept.told("t", "b"))
    assert there() is not None
    for name in "cde":
        kept.pictures(kept.told("t", name))
    assert there() is None


def test_controls_are_kept_with_the_strengths_of_each_evaluation() -> None:
    kept = Kept(TINY_VACE)
    for strength in (0.8, 0.3):
        (one, other) = kept.controls(kept.told("ab", controls=("xy", "x"), strength=strength))
        assert [control.strength for control in one] == [strength] * 2 and one[0].values is other[0].values
        assert torch.equal(one[1].values, patchify(kept.volume("y")))
    assert kept.controls(kept.told("a", controls=("x",)))[0][0].values is one[0].values


def test_what_was_never_sent_or_is_let_go_is_not_computed_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_conditions, "KEPT_VOLUME_BYTES", 3 * KEPT_AT_LEAST)
    kept = Kept(TINY_VACE)
    kept.told("a", controls=("x",))
    for number in range(3):
        kept.told("a", controls=(chr(1000 + number),))
    with pytest.raises(JobError, match=f"{key('x')} is asked for, but was never sent"):
        kept.told("a", controls=("x",))
    kept.sent.add("b")
    with pytest.raises(JobError, match=f"{key('b')} is asked for, but was never sent"):
        kept.told("b", controls=(chr(1000),))


def test_a_control_is_of_the_size_of_the_latents() -> None:
    kept = Kept(TINY_VACE)
    kept.told("a", controls=("x",))
    with pytest.raises(JobError, match=r"a VACE control is of .*3, 4, 6.*; the latents are .*3, 4, 8"):
        kept.told("a", controls=("x",), size=(3, 4, 8))


def test_a_picture_in_front_is_sent_once_and_is_one_frame() -> None:
    kept = KeptConditions(FUN, torch.device("cpu"), keeps=True)
    picture = torch.randn(16, 1, *SIZE[1:])
    sent = SentTensor(key=key("x"), shape=tuple(picture.shape), dtype="float32")
    text = SentTensor(key=key("a"), shape=(1, FUN.text_dim), dtype="float32")
    evaluation = Evaluation(
        shape=(1, 52, *SIZE), by_frame=False, texts=(key("a"),), told=(of_kind("reference", "x"),), sent=(text, sent)
    )
    kept.check(evaluation)
    views = [tensor.view(-1).view(torch.uint8).numpy().data for tensor in (torch.zeros(1, FUN.text_dim), picture)]
    kept.take(evaluation, views, SHARD)
    shard = SequenceShard(length=4 * 6, rank=1, world=5)
    again = dataclasses.replace(evaluation, sent=())
    kept.take(again, [], SHARD)
    (reference,) = (beside.reference for beside in kept.besides(again, shard))
    # Of six tokens in front rank 1 of five has the last one, first of its five.
    assert reference is not None and reference.rows is not None and reference.rows.tolist() == [0]
    assert torch.equal(reference.values, patchify(picture)[5:])
    with pytest.raises(JobError, match="has no place for one"):
        KeptConditions(TINY, torch.device("cpu"), keeps=True).check(again)
    with pytest.raises(JobError, match="timesteps by frame; no model takes both"):
        kept.check(dataclasses.replace(again, by_frame=True))


def of_camera(rays: torch.Tensor, config: WanConfig = CAMERA) -> tuple[Evaluation, list[memoryview]]:
    text = torch.zeros(1, config.text_dim)
    sent = tuple(
        SentTensor(key=key(name), shape=tuple(tensor.shape), dtype="float32")
        for name, tensor in (("a", text), ("x", rays))
    )
    evaluation = Evaluation(
        shape=(1, config.in_dim, *SIZE), by_frame=False, texts=(key("a"),), told=(of_kind("camera", "x"),), sent=sent
    )
    return evaluation, [tensor.view(-1).view(torch.uint8).numpy().data for tensor in (text, rays)]


def test_of_a_camera_a_rank_keeps_the_frames_of_its_tokens() -> None:
    rays = torch.randn(2, 3, 32, 48)
    evaluation, views = of_camera(rays)
    shard = SequenceShard(length=18, rank=1, world=4)
    kept = KeptConditions(CAMERA, torch.device("cpu"), keeps=True)
    kept.check(evaluation)
    kept.take(evaluation, views, shard)
    (camera,) = (beside.camera for beside in kept.besides(evaluation, shard))
    assert camera is not None and camera.keep and camera.rows is not None
    # Tokens 5 to 9 of three frames of six.
    assert camera.values.shape == (2, 2, 3, 4 * 128) and camera.rows.tolist() == [5, 6, 7, 8, 9]
    whole = Camera(rays, 8).on_rank(lambda tokens: tokens, 18)
    assert torch.equal(camera.values, whole.values[:2])
    # The memory that it came in is overwritten.
    rays.zero_()
    assert camera.values.any()
    again = dataclasses.replace(evaluation, sent=())
    kept.take(again, [], shard)
    assert kept.besides(again, shard)[0].camera is camera
    with pytest.raises(JobError, match=r"a camera is of .*3, 4, 6.*; the latents are .*3, 4, 8"):
        kept.take(dataclasses.replace(again, shape=(1, 36, 3, 4, 8)), [], shard)
    with pytest.raises(JobError, match=r"a camera, and this model \(T2V\) has no place for one"):
        KeptConditions(TINY, torch.device("cpu"), keeps=True).check(again)
    other = KeptConditions(dataclasses.replace(CAMERA, camera_dim=24 * 64), torch.device("cpu"), keeps=True)
    with pytest.raises(JobError, match="the camera is of 2 channels; this model takes 24"):
        other.take(evaluation, views, shard)


def test_rays_are_of_the_latents_pixels() -> None:
    with pytest.raises(
        ValueError, match=r"shape of a camera is \[2, 3, 32, 40\]; it must be .* beside latents of \[3, 4, 6\]"
    ):
        of_camera(torch.zeros(2, 3, 32, 40))


@pytest.mark.parametrize(
    ("config", "told", "words"),
    [
        (TINY, {"controls": ("x",)}, r"a VACE control, and this model \(T2V\) has no place for one"),
        (TINY_VACE, {}, "the model is a VACE model: connect WanVaceToVideo"),
        (TINY, {"pictures": "x"}, "a picture as CLIP sees it, and this model .* has no place"),
        (FLF2V, {}, "connect CLIP Vision Encode"),
    ],
)
def test_what_the_model_looks_at_is_there_and_nothing_else(config: WanConfig, told: Any, words: str) -> None:
    with pytest.raises(JobError, match=words):
        Kept(config).told("a", **told)


@pytest.mark.parametrize(
    ("other", "told", "words"),
    [
        (dataclasses.replace(TINY_VACE, text_dim=7), {}, "the text is of 7 channels; this model takes"),
        (dataclasses.replace(TINY_VACE, control_dim=7), {}, "the VACE control is of 7 channels; this model takes 96"),
    ],
)
def test_what_is_of_another_model_is_refused(other: WanConfig, told: Any, words: str) -> None:
    kept = Kept(TINY_VACE)
    kept.config = other
    with pytest.raises(JobError, match=words):
        kept.told("a", controls=("x",))


def test_what_is_kept_is_no_part_of_the_memory_that_it_came_in():
    """The next request overwrites that. Nor is it a part of the whole video's."""
    config, memory = TINY_VACE, torch.full((TINY_VACE.control_dim, *SIZE), 7.0)
    kept = KeptConditions(config, torch.device("cpu"), keeps=True)
    row = torch.full((2, config.text_dim), 3.0)
    sent = tuple(
        SentTensor(key=key(name), shape=tuple(tensor.shape), dtype="float32")
        for name, tensor in (("t", row), ("c", memory))
    )
    evaluation = Evaluation(
        shape=(1, config.in_dim, *SIZE), by_frame=False, texts=(key("t"),),
        told=(of_kind("controls", ["c"]),), sent=sent,
    )  # fmt: skip
    views = [tensor.view(-1).view(torch.uint8).numpy().data for tensor in (row, memory)]
    kept.take(evaluation, views, SequenceShard(length=18, rank=0, world=2))
    memory.zero_()
    row.zero_()
    ((control,),) = (beside.controls for beside in kept.besides(evaluation, SequenceShard(length=18, rank=0, world=2)))
    assert control.values.unique().tolist() == [7.0]
    assert control.values.untyped_storage().nbytes() == control.values.nbytes
    assert kept.texts(evaluation)[0].tokens.unique().tolist() == [3.0]
