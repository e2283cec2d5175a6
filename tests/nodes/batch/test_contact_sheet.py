"""Several pictures in one."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from wan_pack.nodes.host.contact_sheet import GAP, contact_sheet


def jpeg(level: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 16), (level, level, level)).save(file, format="JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 2, 2), (5, 3, 2), (8, 3, 3)]
)
def test_pictures_stand_in_rows_from_the_left(count: int, columns: int, rows: int):
    sheet = Image.open(io.BytesIO(contact_sheet([jpeg(20 + 20 * index) for index in range(count)], 512)))
    assert sheet.size == (columns * (32 + GAP) - GAP, rows * (16 + GAP) - GAP)
    middles = [((32 + GAP) * (i % columns) + 16, (16 + GAP) * (i // columns) + 8) for i in range(columns * rows)]
    levels = [sheet.getpixel(middle)[0] for middle in middles]
    assert levels == pytest.approx([20 + 20 * index for index in range(count)] + [0] * (columns * rows - count), abs=4)


def test_pictures_are_at_most_of_the_size_that_comfyui_is_told():
    assert Image.open(io.BytesIO(contact_sheet([jpeg(200)] * 4, 33))).size == (33, 17)
