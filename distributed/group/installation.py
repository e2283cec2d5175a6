"""Whether the packages that a job imports can be imported: asked in a process like a rank, before there are any."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..job.errors import JobError
from ..job.job import Parallel
from ..job.json_files import read_json, write_json
from ..machine.import_paths import handed_on
from ..machine.programs import ask_program
from .environment import cache_folder, child_environment

PACKAGES = {
    "torch": "torch",
    "safetensors": "safetensors",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "sentencepiece": "sentencepiece",
    "ftfy": "ftfy",
    "imageio_ffmpeg": "imageio-ffmpeg",
}
"""Module that a job imports -> the name under which pip installs it."""
ENCODER_ONLY = ("transformers", "sentencepiece", "ftfy")
"""Of these, what only encoding a prompt needs; the first of them CLIP too."""
DISTRIBUTED = Path(__file__).parent.parent
TIMEOUT = 180.0
"""Seconds to import all of them from a cold disk."""
INSTALLATIONS = 16
"""That are remembered. Programs of one Python, such as ComfyUI and the doctor, may have packages in different places:
neither makes the other one's be forgotten."""
_good: dict[str, set[str]] = {}
"""Installation -> what was imported from it, while this process lives."""


def check_installation(*, encodes: bool, decodes: bool, looks: bool = False) -> None:
    """Raises JobError with what a job could not import, and the command that installs it.

    Args:
        encodes: whether the job encodes prompts.
        decodes: whether it writes a video.
        looks: whether it runs CLIP.
    """
    unneeded = {*(() if encodes else ENCODER_ONLY[looks:]), *(() if decodes else ("imageio_ffmpeg",))}
    if problem := installation_problem([module for module in PACKAGES if module not in unneeded]):
        raise JobError(problem)


def installation_problem(modules: Sequence[str] = tuple(PACKAGES), source: Mapping[str, str] = os.environ) -> str:
    """What ranks could not import; empty if they can import all. What was good is not asked again while nothing is
    installed or removed: the imports take seconds.

    Args:
        source: ComfyUI's environment.
    """
    key, stamp = _installation(source), _stamp(source)
    good = _good.setdefault(key, _remembered(stamp, key))
    open_questions = [module for module in modules if module not in good]
    if not open_questions:
        return ""
    answers = _ask(open_questions, source)
    good |= {module for module, answer in answers.items() if not any(answer.values())}
    if stamp is not None:
        _remember(stamp, key, good)
    return _sentence(answers)


def _ask(modules: Sequence[str], source: Mapping[str, str]) -> dict[str, dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="wan-imports-", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-u", str(DISTRIBUTED), "imports", *modules]
        environment = child_environment(Parallel(gpu_count=1), Path(folder), source)
        try:
            ended = ask_program(command, timeout=TIMEOUT, environment=environment, folder=Path(folder))
        except subprocess.TimeoutExpired:
            raise JobError(
                f"{', '.join(modules)} could not be imported within {TIMEOUT:g} s: look at the disk that they are on"
            ) from None
    answers = {}
    for line in ended.stdout.decode(errors="replace").splitlines():
        # Libraries print of their own.
        if line.startswith('{"module"'):
            answer = json.loads(line)
            answers[answer.pop("module")] = answer
    left = [module for module in modules if module not in answers]
    if left:
        said = ended.stderr.decode(errors="replace").strip()[-500:]
        answers[left[0]] = {"error": f"the process that imported it ended with exit code {ended.returncode}: {said}"}
    return answers


def _sentence(answers: Mapping[str, Mapping[str, str]]) -> str:
    missing = [PACKAGES[module] for module, answer in answers.items() if answer.get("missing")]
    if missing:
        here = [(module, folder) for module in answers if answers[module].get("missing") and (folder := _found(module))]
        elsewhere = "".join(
            f". ComfyUI itself finds {module} in {folder}, which is no absolute path of a folder outside of its own"
            for module, folder in here[:1]
        )
        return (
            f"not installed in ComfyUI's Python: {', '.join(missing)}; run {sys.executable} -m pip install "
            f"{' '.join(missing)}{elsewhere}"
        )
    for module, answer in answers.items():
        if answer.get("error"):
            because = answer.get("because") or f"install {PACKAGES[module]} again, or another version of it"
            return f"{PACKAGES[module]} is installed, but cannot be imported: {because} ({answer['error'][:500]})"
    return ""


def _found(module: str) -> str:
    """The folder that it is in for this process; empty if it is not found here either."""
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:
        return ""
    if spec is None or not spec.origin:
        return ""
    place = Path(spec.origin).parent
    return str(place.parent if spec.submodule_search_locations else place)


def _installation(source: Mapping[str, str]) -> str:
    """Changes with every package that is installed or removed where one of `PACKAGES` is, and with the places."""
    folders = sorted({folder for module in PACKAGES if (folder := _found(module))})
    times = [(folder, os.stat(folder).st_mtime_ns) for folder in folders if os.path.isdir(folder)]
    return hashlib.sha256(repr((sys.executable, handed_on(source), times)).encode()).hexdigest()


def _stamp(source: Mapping[str, str]) -> Path | None:
    """What a ComfyUI with this Python has found good; None where there is no place for it."""
    folder = cache_folder(source)
    return folder / f"imports-{hashlib.sha256(sys.executable.encode()).hexdigest()[:12]}.json" if folder else None


def _remembered(stamp: Path | None, key: str) -> set[str]:
    good = _kept(stamp).get(key)
    return set(good) & set(PACKAGES) if isinstance(good, list) else set()


def _remember(stamp: Path, key: str, good: set[str]) -> None:
    kept = _kept(stamp)
    kept.pop(key, None)
    newest = dict([*kept.items(), (key, [*good])][-INSTALLATIONS:])
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        write_json(stamp, {"good": newest})
    except OSError:
        # It is asked again next time.
        return


def _kept(stamp: Path | None) -> dict[str, object]:
    """Installation -> what was imported from it; nothing of a file that is damaged or from another version."""
    try:
        kept = None if stamp is None else read_json(stamp).get("good")
    except JobError:
        return {}
    return kept if isinstance(kept, dict) else {}
