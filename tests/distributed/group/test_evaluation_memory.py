"""What an evaluation may be, the memory that it goes through, and the bells of both ends."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from wan_pack.distributed.group.evaluation_memory import HEADER, REQUEST, AnsweringEnd, AskingEnd
from wan_pack.distributed.group.evaluation_request import (
    MAX_ROWS,
    MAX_SAMPLES,
    MAX_SENT_BYTES,
    Evaluation,
    Request,
    SentKeys,
    SentTensor,
    ToldKeys,
)
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.evaluator import KEPT_AT_LEAST, KEPT_ROW_BYTES, KEPT_VOLUME_BYTES
from wan_pack.distributed.machine.bell import Bell, BellRope, ring
from wan_pack.distributed.machine.memory_file import MemoryFile, OpenedMemory

KEYS = [f"{number:064x}" for number in range(100)]
TEXT = SentTensor(key=KEYS[0], shape=(3, 4), dtype="bfloat16")
CONTROL = SentTensor(key=KEYS[2], shape=(96, 2, 4, 6), dtype="float32")
ONE = Evaluation(
    shape=(2, 3, 2, 4, 6), by_frame=True, texts=(KEYS[0], KEYS[1]),
    told=(ToldKeys(kind="controls", keys=((KEYS[2], KEYS[3]), (KEYS[2],)), strengths=((1.0, 0.5), (1.0,))),),
    sent=(TEXT, CONTROL),
)  # fmt: skip


def told(kind: str, *keys: Sequence[str], strength: float = 1.0, count: int | None = None) -> dict[str, Any]:
    """As in a request: whose values may be out of bounds."""
    strengths = [[strength] * (len(of_sample) if count is None else count) for of_sample in keys]
    return {"kind": kind, "keys": [list(of_sample) for of_sample in keys], "strengths": strengths}


def of_json(told: dict[str, Any]) -> ToldKeys:
    keys, strengths = (tuple(map(tuple, told[name])) for name in ("keys", "strengths"))
    return ToldKeys(kind=told["kind"], keys=keys, strengths=strengths)


def test_a_request_is_read_as_it_was_written():
    for evaluation in (ONE, None):
        request = Request(number=7, evaluation=evaluation)
        assert Request.from_json(request.to_json()) == request


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (2, 3, 2, 4)}, "shape"),
        ({"shape": (0, 3, 2, 4, 6)}, "samples is 0; it must be 1 to 2"),
        ({"shape": (MAX_SAMPLES + 1, 3, 2, 4, 6)}, "samples is 3"),
        ({"shape": (2, 257, 2, 4, 6)}, "latent channels is 257"),
        ({"shape": (2, 0, 2, 4, 6)}, "latent channels is 0"),
        ({"shape": (2, 3, 1026, 4, 6)}, "latent frames is 1026; it must be 1 to 1025"),
        ({"shape": (2, 3, 2, 5, 6)}, "latent rows or columns is 5; it must be even"),
        ({"shape": (2, 3, 2, 4, 1026)}, "latent rows or columns is 1026"),
        ({"shape": (2, 48, 1025, 1024, 1024)}, "bytes of latents"),
        ({"texts": (KEYS[0],)}, "texts is 1; it must be one for each of 2 samples"),
        ({"told": [told("picture", KEYS[4:5])]}, "picture is 1; it must be one for each of 2 samples, or none"),
        ({"told": [told("controls", KEYS[2:3])]}, "controls is 1"),
        ({"told": [told("reference", *[KEYS[2:3]] * 2)]}, "shape of a reference picture"),
        ({"told": [told("reference", KEYS[2:4], KEYS[2:3])]}, "reference of a sample is 2; it must be 1 to 1"),
        ({"told": [told("sound", *[KEYS[2:3]] * 2)]}, "kind of what is told is 'sound'; it must be one of picture"),
        ({"told": [told("controls", *[KEYS[2:3]] * 2)] * 2}, "kinds of what is told .* each once"),
        ({"told": [told("controls", KEYS[3:20], KEYS[2:3])]}, "controls of a sample is 17; it must be 1 to 16"),
        ({"told": [told("controls", (), KEYS[2:3])]}, "controls of a sample is 0"),
        ({"told": [told("controls", (KEYS[0], KEYS[3]), KEYS[2:3])]}, "others for each kind than for the texts"),
        ({"told": [told("controls", (KEYS[2], "x"), KEYS[2:3])]}, "keys of 64 hexadecimal digits"),
        ({"told": [told("controls", *[KEYS[2:3]] * 2, count=2)]}, "one for each of controls"),
        ({"told": [told("controls", *[KEYS[2:3]] * 2, strength=float("nan"))]}, "finite"),
        ({"told": [told("controls", *[KEYS[2:4]] * 2) | {"strengths": [[1.0, 1.0], [1.0, float("inf")]]}]}, "finite"),
        ({"texts": (KEYS[0], "../../x")}, "keys of 64 hexadecimal digits"),
        ({"sent": (TEXT, TEXT)}, "each once"),
        ({"sent": (dataclasses.replace(TEXT, key=KEYS[5]),)}, "texts and what else is told in this evaluation"),
        ({"sent": (dataclasses.replace(TEXT, shape=(3, 4, 5)),)}, "shape of a text"),
        ({"sent": (dataclasses.replace(TEXT, shape=(MAX_ROWS + 1, 4)),)}, "rows of a text is 8193"),
        ({"sent": (dataclasses.replace(TEXT, shape=(3, 1 << 15)),)}, "channels of a text is 32768"),
        ({"sent": (dataclasses.replace(CONTROL, shape=(96, 3, 4, 6)),)}, "shape of a VACE control"),
        (
            {"sent": (dataclasses.replace(CONTROL, shape=(257, 2, 4, 6)),)},
            r"be 1 to 256 channels.* beside latents of \[2, 4, 6\]",
        ),
        ({"sent": (dataclasses.replace(CONTROL, shape=(3, 4)),)}, "shape of a VACE control"),
        ({"sent": (dataclasses.replace(CONTROL, dtype="bfloat16"),)}, "dtype of a VACE control is 'bfloat16'"),
    ],
)
def test_fault_32_an_evaluation_out_of_bounds_is_refused_at_both_ends(change: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        given = {name: tuple(map(of_json, value)) if name == "told" else value for name, value in change.items()}
        dataclasses.replace(ONE, **given)
    raw = dataclasses.asdict(Request(number=1, evaluation=ONE))
    raw["evaluation"] |= {
        name: [dataclasses.asdict(text) for text in value] if name == "sent" else value
        for name, value in change.items()
    }
    with pytest.raises(JobError, match=words):
        Request.from_json(json.dumps(raw).encode())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (0, 4)}, "from 1"), ({"shape": ()}, "from 1"), ({"shape": (1 << 20, 1 << 20)}, "bytes of what is"),
        ({"dtype": "float64"}, "dtype"), ({"key": "0" * 63}, "key"),
    ],
)  # fmt: skip
def test_fault_32_what_is_sent_out_of_bounds_is_refused(change: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TEXT, **change)


def test_fault_32_all_that_is_sent_at_once_is_bounded():
    controls = [SentTensor(key=key, shape=(96, 40, 256, 256), dtype="float32") for key in KEYS[2:9]]
    with pytest.raises(ValueError, match=f"bytes of what is sent is 7046430720; it must be at most {MAX_SENT_BYTES}"):
        Evaluation(
            shape=(1, 16, 40, 256, 256), by_frame=False, texts=(KEYS[0],),
            told=(ToldKeys(kind="controls", keys=(tuple(KEYS[2:9]),), strengths=((1.0,) * 7,)),), sent=tuple(controls),
        )  # fmt: skip


def test_fault_20_mutated_requests_only_raise_job_error():
    good = Request(number=3, evaluation=ONE).to_json().decode()
    for seed in range(500):
        rng, text = random.Random(seed), good
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(['"', "{", "[", "null", "1e999", "-", "NaN", "true"]) + text[at + 2 :]
        try:
            Request.from_json(text.encode())
        except JobError:
            continue
    for text in ("[" * 60_000, "[]", "null", "1" * 5000):
        with pytest.raises(JobError, match="an evaluation was asked for that this version cannot compute"):
            Request.from_json(text.encode())


def test_what_is_asked_arrives_and_what_is_answered_too():
    asking = AskingEnd()
    answering = AnsweringEnd(asking.path)
    assert (answering.asked, asking.answered) == (0, 0)
    for number, evaluation in enumerate(
        (ONE, dataclasses.replace(ONE, shape=(2, 3, 40, 40, 60), sent=(TEXT,))), start=1
    ):
        latents, timesteps = os.urandom(evaluation.latent_bytes), os.urandom(4 * evaluation.timestep_count)
        sent = [os.urandom(one.nbytes) for one in evaluation.sent]
        asking.ask(Request(number=number, evaluation=evaluation), [latents, timesteps, *sent])
        assert answering.asked == number
        request, digest = answering.read()
        assert request == Request(number=number, evaluation=evaluation) and len(digest) == 32
        there = answering.parts(evaluation)
        assert (bytes(there[0]), bytes(there[1])) == (latents, timesteps)
        assert [bytes(one) for one in there[2]] == sent
        velocity = os.urandom(evaluation.latent_bytes // 3 * 2)
        answering.write(evaluation, 2, velocity)
        assert asking.answered == number - 1
        answering.say_answered(number)
        assert asking.answered == number
        assert asking.velocity(evaluation) == (2, bytearray(velocity))
    asking.close()
    asking.close()
    answering.close()


def test_fault_32_numbers_that_cannot_be_are_refused():
    asking = AskingEnd()
    answering = AnsweringEnd(asking.path)
    asking.ask(
        Request(number=1, evaluation=ONE), [bytes(n) for n in (ONE.latent_bytes, 16, TEXT.nbytes, CONTROL.nbytes)]
    )
    for channels in (0, 4, 1 << 40):
        answering._set(24, channels)
        with pytest.raises(JobError, match="channels; there are at most 3"):
            asking.velocity(ONE)
    asking._set(8, HEADER - REQUEST + 1)
    with pytest.raises(JobError, match="a request has 65473 bytes"):
        answering.read()
    larger = dataclasses.replace(ONE, shape=(2, 3, 1000, 4, 6), sent=())
    with pytest.raises(ValueError, match="a file in memory has"):
        answering.parts(larger)
    asking.close()
    answering.close()


def test_fault_23_only_a_file_in_memory_and_only_a_pipe_are_taken(tmp_path: Path):
    file = tmp_path / "a video"
    file.write_bytes(b"x" * HEADER)
    with pytest.raises(OSError, match="no file in memory"):
        OpenedMemory(file)
    with pytest.raises(OSError, match="no bell"):
        BellRope(file)
    ring(file)
    assert file.read_bytes() == b"x" * HEADER


def test_the_memory_stays_with_who_has_opened_it():
    """Its path may be another file's by then."""
    there = MemoryFile("test")
    there.map(10)[:4] = b"abcd"
    opened = OpenedMemory(there.path)
    there.close()
    assert opened.map(10)[:4] == b"abcd"
    opened.close()
    opened.close()


@pytest.mark.parametrize("named", [True, False])
def test_a_ring_wakes_at_once_and_one_before_the_wait_is_not_lost(named: bool, tmp_path: Path):
    with Bell(tmp_path / "bell" if named else None) as bell:
        rope = BellRope(bell.path)
        started = time.monotonic()
        threading.Timer(0.1, rope.ring).start()
        bell.wait(600)
        assert 0.05 < time.monotonic() - started < 300
        for _ in range(100_000):
            # Nobody empties it; a full pipe is no error.
            rope.ring()
        bell.wait(600)
        rope.close()
    assert time.monotonic() - started < 300
    ring(bell.path)


def sent(keys: Sequence[str], mib: int = 1) -> list[SentTensor]:
    return [SentTensor(key=key, shape=(mib, 1 << 18), dtype="float32") for key in dict.fromkeys(keys)]


@pytest.mark.parametrize("most", [KEPT_ROW_BYTES >> 20, KEPT_VOLUME_BYTES >> 20, 4])
def test_both_ends_count_what_was_sent_alike(most: int):
    """In MiB. Those of one evaluation are kept, however large they are."""
    here, there = SentKeys(most << 20), SentKeys(most << 20)
    assert here.missing([KEYS[0], KEYS[1], KEYS[0]]) == [KEYS[0], KEYS[1]]
    rng, kept = random.Random(1), set()
    sizes = {key: rng.choice([1, 2, most // 3 + 1]) for key in KEYS}

    def size(keys: set[str]) -> int:
        return sum(sizes[key] for key in keys)

    for _ in range(300):
        used = rng.choices(KEYS, k=rng.randint(1, 9))
        missing = here.missing(used)
        assert set(missing) == set(used) - kept
        new = [one for key in missing for one in sent([key], sizes[key])]
        dropped = here.use(used, new)
        assert dropped == there.use(used, new)
        assert not set(used) & set(dropped), "no text of an evaluation makes room for another one of it"
        kept = (kept | set(used)) - set(dropped)
        assert set(used) <= kept and size(kept) <= max(most, size(set(used)))
        assert not dropped or size(kept) + sizes[dropped[-1]] > most, "none goes that there is room for"


def test_what_an_evaluation_is_told_is_counted_by_sample_and_kind():
    assert (ONE.count("controls"), ONE.count("reference"), ONE.in_front) == (2, 0, 0)
    assert ONE.rows == (KEYS[0], KEYS[1]) and ONE.volumes == (KEYS[2], KEYS[3])
    assert (ONE.latent_bytes, ONE.timestep_count) == (2 * 3 * 2 * 4 * 6 * 4, 4)
    assert dataclasses.replace(ONE, by_frame=False).timestep_count == 2


def test_what_was_used_longest_ago_makes_room():
    texts = SentKeys(50 << 20)
    assert texts.use(KEYS[:50], sent(KEYS[:50])) == []
    # Used again, the first one is the last to go.
    assert texts.use([KEYS[0]], []) == []
    assert texts.use(KEYS[50:52], sent(KEYS[50:52])) == [KEYS[1], KEYS[2]]
    assert texts.missing(KEYS[:52]) == [KEYS[1], KEYS[2]]


def test_small_ones_are_bounded_in_number():
    texts = SentKeys(2 * KEPT_AT_LEAST)
    assert texts.use([KEYS[0]], [TEXT]) == []
    assert texts.use(KEYS[1:3], [dataclasses.replace(TEXT, key=key) for key in KEYS[1:3]]) == [KEYS[0]]
