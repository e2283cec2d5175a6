"""Switches that cannot run on a machine are refused before a process starts, and nothing else is."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from jobs import run_stub, stub_job, tiny_job
from wan_pack.distributed.doctor.libraries import switch_findings
from wan_pack.distributed.hosts import host_check
from wan_pack.distributed.job.errors import JobError
from wan_pack.distributed.job.job import Parallel
from wan_pack.distributed.job.needs import every_value
from wan_pack.distributed.job.switches import Switches
from wan_pack.distributed.launch import launcher
from wan_pack.distributed.machine.gpus import compute_capabilities
from wan_pack.distributed.machine.prerequisites import check_prerequisites, check_switches
from wan_pack.distributed.planning.preflight import check_job
from wan_pack.distributed.rank.session import Session
from wan_pack.wan.model import attention_kernels
from wan_pack.wan.model.attention_kernels import KERNELS
from wan_pack.wan.model.kernels import choice

OPTIONAL = {kernel.module for kernel in KERNELS.values()} - {""} | {"triton", "deepspeed"}
MACHINES: dict[str, tuple[str, bool, set[str]]] = {
    # Compute capability, whether the packages and compilers are there, what is refused.
    "no GPU, bare": (
        "",
        False,
        {
            *(f"attention {name}" for name in KERNELS if name != "cpu"),
            "kernels triton", "torch_compile True", "ulysses_engine deepspeed",
        },
    ),
    "no GPU, all packages": (
        "",
        True,
        {*(f"attention {name}" for name in KERNELS if name != "cpu"), "kernels triton"},
    ),
    "Turing, all packages": (
        "7.5",
        True,
        {*(f"attention {name}" for name in KERNELS if name != "flash"), "linear_precision fp8"},
    ),
    "Ampere, bare": (
        "8.6",
        False,
        {
            *(f"attention {name}" for name in KERNELS if name not in ("flash", "cudnn")),
            "linear_precision fp8", "kernels triton", "torch_compile True", "ulysses_engine deepspeed",
        },
    ),
    "Ada, all packages": ("8.9", True, {"attention fa3", "attention fa3-fp8", "attention cpu"}),
    "Hopper, all packages": ("9.0", True, {"attention cpu"}),
    "Hopper, bare": (
        "9.0",
        False,
        {
            *(f"attention {name}" for name in KERNELS if name not in ("flash", "cudnn")),
            "kernels triton", "torch_compile True", "ulysses_engine deepspeed",
        },
    ),
    "Blackwell, all packages": ("12.0", True, {"attention fa3", "attention fa3-fp8", "attention cpu"}),
}  # fmt: skip


def parallel_with(gpu_ids: tuple[str, ...], **switches: Any) -> Parallel:
    """On two processes; with use_ulysses off something else must share the work."""
    base: dict[str, Any] = {"gpu_count": 2, "gpu_ids": gpu_ids}
    if switches.get("use_ulysses") is False:
        base["use_fsdp"] = True
    return Parallel(**base | switches)


@pytest.fixture
def machine(smi: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this machine one of two GPUs of a kind or of none, with all optional packages and compilers or without."""
    find = importlib.util.find_spec
    monkeypatch.setattr(attention_kernels, "version", lambda package: "9.9.9")

    def pretend(capability: str, packages: bool) -> tuple[str, ...]:
        spec = importlib.machinery.ModuleSpec("there", None) if packages else None
        monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: spec if n in OPTIONAL else find(n, *a))
        monkeypatch.setattr(choice, "_lacks", lambda *_: "" if packages else "a compiler")
        smi(
            f"#!/bin/sh\nprintf '0, GPU-a, {capability}\\n1, GPU-b, {capability}\\n'\n"
            if capability
            else "#!/bin/sh\nexit 9\n"
        )
        return ("0", "GPU-b") if capability else ()

    return pretend


@pytest.mark.parametrize("name", MACHINES)
def test_every_value_of_every_switch(name: str, machine: Any):
    capability, packages, expected = MACHINES[name]
    gpu_ids = machine(capability, packages)
    refused = {}
    for switch, value in every_value():
        try:
            check_switches(parallel_with(gpu_ids, **{switch: value}))
        except ValueError as error:
            refused[f"{switch} {value}"] = str(error)
    assert set(refused) == expected
    for what, words in refused.items():
        assert words.startswith(f"{what.split()[0]} is "), words
        assert "choose" in words or "Choose" in words or "here it may be" in words or "turn it off" in words, words


def test_every_switch_is_asked_with_every_value():
    """But for numbers; a switch of another kind would be left out."""
    numbers = {
        "master_port", "keep_warm_seconds", "start_timeout", "stall_timeout", "sparse_tau", "exact_steps",
        "exact_blocks",
    }  # fmt: skip
    assert {switch for switch, _ in every_value()} | numbers == set(Switches.__dataclass_fields__)
    assert [value for switch, value in every_value() if switch == "linear_precision"] == ["full", "fp8", "int8"]


def test_the_doctor_says_the_same(machine: Any):
    for capability, packages, expected in MACHINES.values():
        machine(capability, packages)
        (found,) = switch_findings(sorted(compute_capabilities().values()))
        groups = re.findall(r"([^();:]+) \((?:needs|is|makes) [^()]+\)", found.text.partition(":")[2])
        listed = ", ".join(group.strip() for group in groups).replace("torch_compile", "torch_compile True")
        assert set(listed.split(", ")) == expected


def test_the_doctor_says_why(machine: Any, monkeypatch: pytest.MonkeyPatch):
    machine("9.0", packages=True)
    (found,) = switch_findings([(9, 0), (9, 0)])
    assert found.text == "cannot run here: attention cpu (is for machines without a GPU)"
    by_capability = [found.text for found in switch_findings([(9, 0), (7, 5)])]
    assert by_capability[0].startswith("cannot run here, on compute capability 7.5: linear_precision fp8 (needs a GPU ")
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == "comfy_kitchen" else find(n, *a))
    (found,) = switch_findings([(9, 0)])
    assert found.text == (
        "cannot run here: attention sol (needs the package comfy-kitchen, which is not installed); "
        "attention cpu (is for machines without a GPU)"
    )


def test_an_engine_that_exchanges_nothing_may_be_missing(machine: Any):
    machine("", packages=False)
    check_switches(Parallel(gpu_count=1, ulysses_engine="deepspeed"))
    check_switches(parallel_with((), ulysses_engine="deepspeed", use_ulysses=False))


def test_several_machines_need_deepspeed(machine: Any):
    over_hosts = Parallel(gpu_count=2, hosts=("a", "b"))
    machine("", packages=True)
    check_prerequisites(over_hosts, file_format=None)
    machine("", packages=False)
    with pytest.raises(JobError, match=r"^several machines are reached with DeepSpeed; run .* deepspeed$"):
        check_prerequisites(over_hosts, file_format=None)


def test_what_nvidia_smi_does_not_tell_is_left_to_the_ranks(smi: Any):
    smi("#!/bin/sh\nprintf '0, GPU-a, [N/A]\\nError, unknown\\n'\n")
    check_switches(Parallel(gpu_count=1, gpu_ids=("0",), attention="sage"))
    check_switches(Parallel(gpu_count=1, gpu_ids=("MIG-1",), attention="sage"))


def test_the_slowest_card_counts(smi: Any):
    smi("#!/bin/sh\nprintf '0, GPU-a, 9.0\\n1, GPU-b, 8.0\\n'\n")
    check_switches(Parallel(gpu_count=1, gpu_ids=("0",), linear_precision="fp8"))
    with pytest.raises(ValueError, match=r"this one has 8\.0"):
        check_switches(Parallel(gpu_count=2, gpu_ids=("0", "1"), linear_precision="fp8"))


def test_nothing_starts(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By each way to a job: the node's check, the launcher's, a machine of a hostfile's, and last the rank's."""
    monkeypatch.setattr(launcher, "JobDir", None)
    wanted = {"attention": "fa3"}
    for check in (
        lambda: check_job(tiny_job(tiny_models, **wanted), {"context": (3, 64), "context_null": (3, 64)}),
        lambda: run_stub(tmp_path, stub_job(**wanted)),
        lambda: host_check.check_host(stub_job(**wanted), host_check.versions()),
    ):
        monkeypatch.setattr(host_check, "_check_file", lambda file: None)
        with pytest.raises(
            (ValueError, JobError), match="attention is 'fa3', which needs a GPU; here it may be auto, cpu"
        ):
            check()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for switches in ({"attention": "fa3"}, {"kernels": "triton"}):
        with pytest.raises(JobError, match="needs a GPU"):
            Session.of(stub_job(**switches))
