"""Which folders of packages are handed on to the processes of a job, and where they stand there."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from mount import ROOT
from wan_pack.distributed.machine import import_paths
from wan_pack.distributed.machine.import_paths import VARIABLE, handed_on, take_on, usable


def test_only_absolute_folders_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packages").mkdir()
    (tmp_path / "file").touch()
    good = str(tmp_path / "packages")
    assert usable(["", ".", "packages", good, str(tmp_path / "gone"), str(tmp_path / "file"), good]) == [good]


def test_neither_this_pack_nor_the_running_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Their modules have names that are anybody's: nodes, utils, server."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "main.py"), raising=False)
    (tmp_path / "link").symlink_to(ROOT)
    assert usable([str(tmp_path), str(ROOT), str(ROOT / "distributed"), str(tmp_path / "link")]) == []
    (tmp_path / "scripts").mkdir()
    (tmp_path / "main.py").touch()
    (tmp_path / "scripts" / "main.py").symlink_to(tmp_path / "main.py")
    # Python puts the folder in front that the script is really in.
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "scripts" / "main.py"), raising=False)
    assert usable([str(tmp_path), str(tmp_path / "scripts")]) == [str(tmp_path / "scripts")]


def test_a_pack_that_is_a_link_is_still_this_pack(tmp_path: Path):
    """As in most ComfyUIs of people who work on it."""
    (tmp_path / "link").symlink_to(ROOT)
    spec = spec_from_file_location("linked", tmp_path / "link" / "distributed" / "machine" / "import_paths.py")
    assert spec is not None and spec.loader is not None
    linked = module_from_spec(spec)
    spec.loader.exec_module(linked)
    assert linked.usable([str(ROOT), str(tmp_path / "link" / "distributed"), str(tmp_path)]) == [str(tmp_path)]


def test_pythonpath_comes_first_and_what_else_was_added_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = ["before", "added", "own", "both"]
    for name in names:
        (tmp_path / name).mkdir()
    before, added, own, both = (str(tmp_path / name) for name in names)
    monkeypatch.setattr(sys, "path", [added, before, both, own])
    value = handed_on({"PYTHONPATH": f"{before}:{both}::relative"})
    assert json.loads(value) == {"first": [before, both], "last": [added, own]}
    monkeypatch.setenv(VARIABLE, value)
    monkeypatch.setattr(sys, "path", [own, both])
    take_on()
    assert sys.path == [before, both, own, added]
    take_on()
    assert sys.path == [before, both, own, added]


def test_what_is_handed_on_is_checked_again_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", ["/usr"])
    monkeypatch.setenv(VARIABLE, json.dumps({"first": ["", "relative"], "last": [str(tmp_path / "gone")]}))
    take_on()
    assert sys.path == ["/usr"]
    monkeypatch.delenv(VARIABLE)
    take_on()
    assert sys.path == ["/usr"] and import_paths.PACK == ROOT
