"""What the registry would publish: the files that git knows but for those of .comfyignore, as one archive."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from mount import ROOT
from PIL import Image

MOST_BYTES = 10 << 20
LOAD = """
import importlib, json, sys, types
pack = types.ModuleType("pack"); pack.__path__ = [sys.argv[1]]; sys.modules["pack"] = pack
print(json.dumps(sorted(importlib.import_module("pack.nodes").NODE_CLASS_MAPPINGS)))
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `comfy node publish` makes it. Links would be stored as what they lead to; they are kept as links here."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ignored = [line.rstrip("/") for line in (ROOT / ".comfyignore").read_text().split() if not line.startswith("#")]
    path = tmp_path_factory.mktemp("archive") / "node.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in filter(None, listed.split("\0")):
            if name.split("/")[0] not in ignored and (ROOT / name).is_symlink():
                info = zipfile.ZipInfo(name)
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                packed.writestr(info, "")
            elif name.split("/")[0] not in ignored and (ROOT / name).exists():
                packed.write(ROOT / name, name)
    return path


@pytest.mark.processes
def test_the_archive_holds_sources_and_nothing_else(archive: Path):
    assert archive.stat().st_size < MOST_BYTES
    with zipfile.ZipFile(archive) as packed:
        entries = packed.infolist()
    names = [entry.filename for entry in entries]
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".so", ".safetensors"))]
    assert not [entry.filename for entry in entries if stat.S_ISLNK(entry.external_attr >> 16)]
    assert not {name.split("/")[0] for name in names} & {"tests", "benchmarks", "demo", "findings", ".ci", ".venv"}
    for needed in ("__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "SECURITY.md"):
        assert needed in names
    assert all(len(name) < 120 and name.isascii() for name in names)


@pytest.mark.processes
def test_the_nodes_load_from_the_archive(archive: Path, tmp_path: Path):
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "pack")
    ended = subprocess.run(
        [sys.executable, "-B", "-c", LOAD, str(tmp_path / "pack")], capture_output=True, text=True, timeout=60
    )
    assert "WanVideoDistributedInference" in json.loads(ended.stdout or "[]"), ended.stderr[-2000:]
    # The pages are there with the pictures that they show.
    for page in [tmp_path / "pack" / "README.md", *(tmp_path / "pack" / "web" / "docs").rglob("*.md")]:
        for picture in re.findall(r"!\[[^]]*\]\(([^):]+)\)", page.read_text()):
            assert (page.parent / picture).is_file(), f"{page.name} shows {picture}"


def test_what_the_registry_is_told():
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, comfy = told["project"], told["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{2,99}", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert 20 < len(project["description"]) < 200
    assert (ROOT / project["license"]["file"]).is_file() and (ROOT / project["readme"]).is_file()
    assert comfy["PublisherId"] and comfy["DisplayName"]
    # As the example workflows and the browser tests have it at least.
    assert comfy["requires-comfyui"] == ">=0.3.75"
    with Image.open(ROOT / "web" / "docs" / "images" / "icon.png") as icon:
        assert (icon.format, icon.size) == ("PNG", (400, 400))


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md"])
def test_why_processes_are_started_is_said(page: str):
    """Reviewers and scanners ask: the code starts programs."""
    assert "Why it starts processes" in (ROOT / page).read_text()
