"""Tries the packages of the environment that it runs in: imports, agreement with the official code, a job to an mp4.

    python tests/versions.py imports golden job

Prints the versions and one line for each of the checks named; exits with 1 if one of them failed.
tests/versions.sh makes environments.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent / "support"
sys.path[:0] = [str(SUPPORT), str(SUPPORT / "jobs")]
from mount import GOLDEN, mount_pack  # noqa: E402

mount_pack()
PACKAGES = (
    "torch", "torchaudio", "diffusers", "transformers", "safetensors", "sentencepiece", "ftfy", "imageio-ffmpeg",
    "deepspeed", "gguf", "numpy",
)  # fmt: skip
LAYOUTS = ("packed", "packed+fsdp", "deepspeed")


def imports() -> str:
    """All that a job imports, in a process like a rank."""
    from wan_pack.distributed.group.installation import installation_problem

    return installation_problem()


def golden() -> str:
    """On one and two processes, two of them also with FSDP and with DeepSpeed's exchange."""
    script = [sys.executable, str(Path(__file__).with_name("golden.py")), str(GOLDEN)]
    for options in (["--ranks", "1"], ["--ranks", "2", "--layouts", *LAYOUTS]):
        ended = subprocess.run([*script, *options], capture_output=True, text=True, timeout=600)
        if ended.returncode:
            return (ended.stdout + ended.stderr)[-2000:]
    return ""


def job() -> str:
    """From a prompt, with UniPC and FSDP on two processes."""
    from jobs import run_tiny, tiny_job
    from wan_pack.demo.tiny_model import write_comfyui_files

    with tempfile.TemporaryDirectory() as folder:
        write_comfyui_files(Path(folder, "models"))
        wanted = tiny_job(Path(folder, "models"), text="a yellow star", solver="unipc", use_fsdp=True)
        result = run_tiny(wanted, Path(folder))
        video = result.folder.video(".mp4").read_bytes()
        frames = result.info["video"]["frames"]
        result.remove()
    return "" if frames == wanted.sampling.num_frames and video[4:8] == b"ftyp" else f"{frames} frames"


CHECKS = {check.__name__: check for check in (imports, golden, job)}


def main() -> int:
    """Returns the exit code."""
    print(f"Python {sys.version.split()[0]}")
    for name in PACKAGES:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} not installed")
    failed = False
    for check in (CHECKS[name] for name in sys.argv[1:]):
        try:
            problem = check()
        # Whatever a library raises: it is the answer.
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        failed |= bool(problem)
        print(f"{check.__name__}: {problem or 'good'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
