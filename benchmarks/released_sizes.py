"""Sizes of the released transformers, which the pack itself reads off their files."""

from __future__ import annotations

from wan_pack.wan.model.config import WanConfig
from wan_pack.wan.model.variants import VARIANTS

WAN_CONFIGS: dict[str, WanConfig] = {
    "t2v-A14B": WanConfig(
        dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16, text_dim=4096, freq_dim=256
    ),
    "i2v-A14B": WanConfig(
        dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, out_dim=16, text_dim=4096, freq_dim=256
    ),
    "vace-14B": WanConfig(
        dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=16, out_dim=16, text_dim=4096, freq_dim=256,
        parts=frozenset({"vace_blocks"}), vace_layers=tuple(range(0, 40, 5)),
    ),
    "animate-14B": WanConfig(
        dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, in_dim=36, out_dim=16, text_dim=4096, freq_dim=256,
        parts=VARIANTS["Animate"].parts, face_blocks=8,
    ),
    "ti2v-5B": WanConfig(
        dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48, text_dim=4096, freq_dim=256
    ),
    "t2v-1.3B": WanConfig(
        dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16, text_dim=4096, freq_dim=256
    ),
    "vace-1.3B": WanConfig(
        dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, in_dim=16, out_dim=16, text_dim=4096, freq_dim=256,
        parts=frozenset({"vace_blocks"}), vace_layers=tuple(range(0, 30, 2)),
    ),
}  # fmt: skip
