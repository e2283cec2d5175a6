"""How large the trained models are, and how they are trained, as data."""

from __future__ import annotations

from dataclasses import dataclass

from ...wan.model.config import WanConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Everything that differs between the real training and the trial on a CPU. No defaults."""

    vae_encoder_dim: int
    vae_decoder_dim: int
    text_dim: int
    text_layers: int
    dim: int
    """Of the experts; a head has 128 channels."""
    ffn_dim: int
    layers: int
    lora_rank: int
    vae_batch: int
    """Clips per step."""
    vae_pictures: int
    """Steps at the beginning that see single frames alone."""
    batch: int
    """Clips per step and expert."""
    pool: int
    """Encoded clips that training draws from."""
    block: int
    """Clips that are encoded at a time; `pool` is a multiple."""
    refresh: int
    """Steps after which a block of the pool is drawn anew."""
    trajectories: int
    """Paths of the teacher, for the distillation; a multiple of `block`."""
    substeps: int
    """Of the teacher within one of the four steps."""
    vae_learning_rate: float
    learning_rate: float
    warm_up: int
    """Steps."""

    def expert(self, in_dim: int) -> WanConfig:
        """A transformer with 16 (text to video) or 36 (image to video) channels in."""
        return WanConfig(
            dim=self.dim, ffn_dim=self.ffn_dim, num_heads=self.dim // 128, num_layers=self.layers, in_dim=in_dim,
            out_dim=16, text_dim=self.text_dim, freq_dim=256,
        )  # fmt: skip


FULL = Sizes(
    vae_encoder_dim=8, vae_decoder_dim=16, text_dim=128, text_layers=2, dim=256, ffn_dim=512, layers=4, lora_rank=32,
    vae_batch=32, vae_pictures=1000, batch=256, pool=16384, block=256, refresh=80, trajectories=8192, substeps=6,
    vae_learning_rate=2e-3, learning_rate=1e-3, warm_up=200,
)  # fmt: skip
SMOKE = Sizes(
    vae_encoder_dim=8, vae_decoder_dim=8, text_dim=32, text_layers=1, dim=128, ffn_dim=128, layers=1, lora_rank=4,
    vae_batch=2, vae_pictures=40, batch=8, pool=16, block=8, refresh=20, trajectories=16, substeps=2,
    vae_learning_rate=3e-3, learning_rate=3e-3, warm_up=5,
)  # fmt: skip
