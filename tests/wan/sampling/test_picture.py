"""Pictures and masks of any shape become frames of a video."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from wan_pack.wan.model.variants import VARIANTS
from wan_pack.wan.sampling.picture import fit_image, fit_mask

I2V, TI2V = VARIANTS["I2V"], VARIANTS["TI2V-5B"]


@pytest.mark.parametrize("wide", [True, False])
def test_a_picture_of_nearly_the_frames_shape_is_stretched_over_it(wide: bool):
    """Where the official code would have chosen another frame: up to 31 pixels. Others are cut, and so is TI2V's."""
    for over, variant, stretched in ((31, I2V, True), (32, I2V, False), (31, TI2V, False)):
        picture = torch.rand(*((32, 64 + over) if wide else (32 + over, 64)), 3)
        made = fit_image(picture, 64, 32, variant)
        whole = F.interpolate(picture.permute(2, 0, 1)[None], size=(32, 64), mode="bicubic")[0]
        cut = over // 2
        middle = picture[:, cut : cut + 64] if wide else picture[cut : cut + 32]
        assert torch.equal(made, 2 * (whole if stretched else middle.permute(2, 0, 1)) - 1), (over, variant.name)


def test_pictures_are_resampled_as_the_official_codes_do():
    """Bicubic, which goes beyond the values that it is given, or Lanczos of 8-bit levels, which does not."""
    picture = torch.zeros(64, 128, 3)
    picture[:, 33:] = 1.0
    bicubic, lanczos = (fit_image(picture, 256, 128, variant) for variant in (I2V, TI2V))
    assert bicubic.max() > 1.05 and bicubic.min() < -1.05
    assert lanczos.min() == -1 and lanczos.max() == 1
    levels = (lanczos + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    assert torch.equal(fit_image(3 * picture - 1, 256, 128, TI2V), lanczos)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_frame_is_float32(dtype: torch.dtype):
    assert fit_image(torch.rand(32, 64, 3, dtype=dtype), 64, 32, I2V).dtype == torch.float32


def test_what_is_no_picture_is_refused():
    for shape in ((32, 64), (1, 32, 64, 3), (32, 64, 4), (3, 32, 64)):
        with pytest.raises(
            ValueError, match=rf"the image has shape \[{str(list(shape))[1:-1]}\]; it must be \[H, W, 3"
        ):
            fit_image(torch.zeros(shape), 64, 32, I2V)


def test_a_mask_stays_between_nothing_and_all_of_it():
    mask = torch.full((2, 32, 64), 3.0)
    mask[1] = -1.0
    mask[1, 0, 0] = 0.25
    made = fit_mask(mask, 64, 32)
    assert made[0].eq(1).all() and made[1, 0, 0] == 0.25 and made[1].sum() == 0.25
