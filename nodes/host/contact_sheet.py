"""Several pictures in one: what the videos of a batch are going to be."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

GAP = 2
"""Pixels between two pictures."""


def contact_sheet(jpegs: Sequence[bytes], most: int) -> bytes:
    """The pictures in rows, from the left, as a JPEG: two side by side, four in two rows.

    Args:
        jpegs: at least one, all of one size.
        most: pixels of the longer side.
    """
    from PIL import Image

    pictures = [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]
    width, height = pictures[0].size
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP))
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture, (column * (width + GAP), row * (height + GAP)))
    sheet.thumbnail((most, most))
    written = io.BytesIO()
    sheet.save(written, "JPEG", quality=95)
    return written.getvalue()
