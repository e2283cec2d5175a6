"""The doctor: what it says of machines that this one is not, and that nothing keeps it from answering."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_machine import SMI, pretend, texts
from mount import ROOT
from patience import COMES_UP
from tiny import random_weights, write_official
from wan_pack.distributed.doctor import examine as doctor
from wan_pack.distributed.doctor import gpu_findings as doctor_gpus
from wan_pack.distributed.doctor import libraries as doctor_libraries
from wan_pack.distributed.doctor import library_process as doctor_process
from wan_pack.distributed.doctor import system as doctor_system
from wan_pack.distributed.doctor.examine import Probe, examine
from wan_pack.distributed.doctor.findings import NOTE, OK, WRONG, Finding, Report
from wan_pack.distributed.job.errors import JobCancelled, JobError
from wan_pack.distributed.machine import nvidia_smi


def test_a_machine_of_two_consumer_gpus(smi: Any):
    smi(SMI)
    assert texts(doctor_gpus.driver_findings()) == "ok driver: NVIDIA 580.65.06 / "
    said = texts(doctor_gpus.gpu_findings())
    assert "ok GPU 0: 0 NVIDIA RTX 4090 (23 of 24 GiB free)" in said
    assert "note GPU 1: 1 NVIDIA RTX 4090 (1 of 24 GiB free)" in said
    assert "GPU 1: used by process 4242 (/usr/bin/blender, 19.5 GiB)" in said
    assert "ok links: host: 0-1" in said
    assert "note peer to peer: not possible between 0-1" in said


def test_gpus_with_nvlink_that_cannot_reach_each_other_are_wrong(smi: Any):
    smi(SMI.replace("PHB", "NV4"))
    assert "wrong peer to peer: not possible" in texts(doctor_gpus.gpu_findings())
    smi(SMI.replace("PHB", "NV4").replace("CNS", "OK"))
    assert "ok peer to peer: possible" in texts(doctor_gpus.gpu_findings())


def test_one_gpu_and_none(smi: Any):
    smi(SMI.replace("\\n1, GPU-b, NVIDIA RTX 4090, 24564, 1000", ""))
    assert "note GPUs: one GPU: there is nobody to share work with" in texts(doctor_gpus.gpu_findings())
    assert doctor_gpus.exchange_findings() == []
    smi("#!/bin/sh\necho No devices were found\n")
    assert "note GPUs: none found; jobs run on CPU processes" in texts(doctor_gpus.gpu_findings())


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "note driver: nvidia-smi is not there: no NVIDIA driver"),
        ("#!/bin/sh\nexec sleep 600\n", "wrong driver: nvidia-smi did not answer within 0.3 s / The driver hangs"),
        ("#!/bin/sh\necho version mismatch >&2; exit 9\n", "wrong driver: nvidia-smi fails: version mismatch"),
        ("#!/bin/sh\nhead -c 3000 /dev/urandom\n", "driver: NVIDIA"),
    ],
    ids=["missing", "sleeps", "fails", "garbage"],
)
def test_a_bad_nvidia_smi_is_a_line_of_the_report(
    smi: Any, monkeypatch: pytest.MonkeyPatch, script: str | None, words: str
):
    if script is not None:
        smi(script)
    monkeypatch.setattr(nvidia_smi, "TIMEOUT", 0.3 if "sleep" in (script or "") else COMES_UP)
    started = time.monotonic()
    probes = [Probe("driver", doctor_gpus.driver_findings, COMES_UP), Probe("GPUs", doctor_gpus.gpu_findings, COMES_UP)]
    report = examine(probes)
    assert words in texts(report.findings)
    assert all(len(finding.text) <= 600 for finding in report.findings)
    assert time.monotonic() - started < 300


def test_a_probe_that_hangs_or_fails_costs_only_its_own_answer():
    over = threading.Event()

    def hang() -> list[Finding]:
        over.wait(600)
        return []

    def fail() -> list[Finding]:
        raise PermissionError(13, "no")

    started = time.monotonic()
    report = examine(
        [
            Probe("disk", hang, 0.2),
            Probe("driver", fail, COMES_UP),
            Probe("torch", lambda: [Finding("torch", "2.9")], COMES_UP),
        ]
    )
    over.set()
    assert time.monotonic() - started < 300
    assert [finding.level for finding in report.findings] == [WRONG, WRONG, OK]
    assert report.findings[0].text == "no answer within 0.2 s"
    assert "could not be asked: PermissionError" in report.findings[1].text


def test_verdict_and_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    good = [Finding("torch", "2.9"), Finding("memory", "little", NOTE, "Add some")]
    assert Report(good).verdict() == ["Ready to make videos", "! memory: little. Add some"]
    assert Report([*good, Finding("driver", "hangs", WRONG)]).verdict()[:2] == [
        "1 thing must be put right",
        "X driver: hangs",
    ]
    for findings, code in ((good, 0), ([Finding("driver", "hangs", WRONG)], 1)):
        monkeypatch.setattr(doctor, "probes", lambda findings=findings, **_: [Probe("x", lambda: findings, 5)])
        assert doctor.main(["--json"]) == code
        assert json.loads(capsys.readouterr().out)["healthy"] == (code == 0)
        assert doctor.main([]) == code
        assert findings[-1].text in capsys.readouterr().out


# Libraries, model, system


@pytest.mark.parametrize(
    ("built", "runs"),
    [
        (["sm_80", "sm_90"], False),
        (["sm_90", "sm_120"], True),
        (["sm_100", "compute_100"], True),
        (["sm_90", "sm_90a", "compute_90"], True),
        (["sm_100a"], False),
    ],
)
def test_whether_torch_has_code_for_a_gpu(built: list[str], runs: bool):
    found = list(doctor_libraries.architecture_findings([(12, 0), (12, 0)], built))
    assert len(found) == (0 if runs else 1)
    assert runs or "no code for GPUs of compute capability 12.0" in found[0].text


def test_gpus_for_a_model(tmp_path: Path):
    folder = write_official(tmp_path / "wan" / "transformer", random_weights(), shards=2)
    shards = sorted(map(str, folder.glob("*.safetensors")))
    for model in ([str(folder)], [str(folder.parent)], shards):
        (found,) = doctor_libraries.model_findings(model)
        assert found.level == OK and "4 heads. GPUs that share one video evenly: 1, 2, 4;" in found.text
    assert "evenly: 1, 2, 4, 5, 8, 10, 20, 40;" in doctor_libraries.heads_finding("A14B", 40).text
    (found,) = doctor_libraries.model_findings([str(tmp_path / "gone.safetensors")])
    assert found.level == WRONG and "gone.safetensors" in found.text


def test_an_attention_kernel_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "sageattention.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {finding.topic: finding for finding in doctor_libraries._kernel_findings(gpu=True)}
    assert found["sageattention"].level == WRONG and "undefined symbol" in found["sageattention"].text
    assert found["flash-attn"].text == "not installed (optional)"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("""echo '{"topic": "torch", "text": "2.9"}'; exec sleep 600""", "not imported within 2 s after torch"),
        (
            """echo '{"topic": "torch", "text": "2.9"}'; echo boom >&2; kill -SEGV $$""",
            "ended with -11 after torch: boom",
        ),
        ("""echo '{"topic": "torch", "text": "2.9"}'; sleep 3 & exit 3""", "ended with 3 after torch"),
    ],
    ids=["hangs", "crashes", "leaves a process behind"],
)
def test_fault_33_libraries_that_hang_or_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, words: str):
    pretend(monkeypatch, tmp_path, script)
    monkeypatch.setattr(doctor, "LIBRARIES_TIMEOUT", 2.0 if "exec sleep" in script else COMES_UP)
    found = doctor.library_findings([])
    assert found[0] == Finding("torch", "2.9")
    assert words in found[1].text and found[1].level == WRONG


def test_variables_that_hurt():
    given = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync", "NCCL_NVLS_ENABLE": "1", "NCCL_P2P_DISABLE": "1"}
    said = texts(doctor_system.variable_findings(given))
    assert "ok PYTORCH_CUDA_ALLOC_CONF: backend:cudaMallocAsync: taken out for jobs" in said
    assert "note NCCL_NVLS_ENABLE" in said and "note NCCL_P2P_DISABLE" in said
    assert (
        texts(doctor_system.variable_findings({"NCCL_NVLS_ENABLE": "0"})) == "ok environment: no variable that hurts / "
    )


def test_a_containers_small_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    usage = doctor_system.shutil._ntuple_diskusage(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(doctor_system.shutil, "disk_usage", lambda _: usage)
    said = texts(doctor_system.memory_findings(2, tmp_path))
    assert "wrong shared memory" in said and "--shm-size=8g" in said
    assert "wrong" not in texts(doctor_system.memory_findings(1, tmp_path))


def test_folders(tmp_path: Path):
    said = texts(doctor_system.disk_findings({"output": tmp_path, "temp": tmp_path / "gone"}))
    assert "ok output" in said and "GiB free" in said and "wrong temp" in said


@pytest.mark.parametrize("name", ["wan distributed", "wan.v2"])
def test_a_folder_whose_name_the_page_cannot_use(name: str):
    said = texts(doctor_system.folder_findings(name))
    assert said.startswith("note folder: the pack's folder is called ") and name in said
    assert doctor_system.folder_findings("wan-distributed") == []


# From ComfyUI


def doctor_from_comfyui(tmp_path: Path, cancelled: Any = lambda: False) -> dict[str, Any]:
    return doctor_process.run_doctor(model=[], output=tmp_path, temp=tmp_path, folder="wan", cancelled=cancelled)


@pytest.mark.processes
def test_cancel_ends_the_doctor_and_what_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pretend(monkeypatch, tmp_path, f"cd {tmp_path}; touch $TMPDIR/left; sleep 60 & echo $! > {tmp_path}/pid; wait")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with pytest.raises(JobCancelled):
        doctor_from_comfyui(
            tmp_path, cancelled=lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text())
        )
    # That no process is left is looked at after every test.
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.processes
def test_a_doctor_without_a_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pretend(monkeypatch, tmp_path, "echo Traceback >&2; exit 1")
    with pytest.raises(JobError, match="exit code 1 and no report:\nTraceback"):
        doctor_from_comfyui(tmp_path)


def test_the_node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from wan_pack.nodes import doctor as node

    data = Report([Finding("torch", "2.9"), Finding("memory", "little", NOTE)]).data()
    given: dict[str, Any] = {}
    shown: list[str] = []

    def run_doctor(**settings: Any) -> dict[str, Any]:
        given.update(settings)
        return data

    fakes = {
        "send": lambda event, content: shown.append(content["text"]),
        "output_folder": lambda: tmp_path,
        "jobs_folder": lambda: tmp_path / "temp" / "x",
        "visible_gpus": lambda: None,
        "interrupted": lambda: False,
        "comfyui_version": lambda: "0.3.75",
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(node.host, name, fake)
    monkeypatch.setattr(node, "run_doctor", run_doctor)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    answer = node.WanVideoDistributedDoctor().examine(unique_id="1")
    (text,) = answer["result"]
    assert text.startswith("ComfyUI 0.3.75") and text.endswith("! memory: little")
    assert answer["ui"] == {"text": (text,)}
    assert shown[-1] == "Ready to make videos\n! memory: little"
    assert given["model"] == [] and given["temp"] == tmp_path / "temp"
    assert given["folder"] == ROOT.name
    # ComfyUI's own, by which it places itself.
    assert "CUDA_VISIBLE_DEVICES" not in given["environment"]
    once = node.WanVideoDistributedDoctor.IS_CHANGED()
    assert once != once


@pytest.mark.processes
def test_the_command_line_names_its_roles():
    pack = Path(doctor.__file__).resolve().parent.parent
    ended = subprocess.run([sys.executable, str(pack), "agent"], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "doctor" in ended.stderr
