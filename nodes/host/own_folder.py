"""The pack's own folder, whose name is a part of its addresses."""

from __future__ import annotations

import logging
from pathlib import Path

from ...distributed.machine.pack_folder import REMEDY, folder_problem


def pack_folder() -> str:
    """The name of the pack's folder in custom_nodes, which may be a link."""
    return Path(__file__).absolute().parents[2].name


def log_folder() -> None:
    """Says at the start what does not work in a folder of this name."""
    if problem := folder_problem(pack_folder()):
        logging.getLogger("wan_distributed").warning("%s. %s", problem, REMEDY)
