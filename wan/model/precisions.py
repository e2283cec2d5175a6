"""What matrix products are computed in, by the names that a job gives them, and where that can be.

Loads without torch.
"""

from __future__ import annotations

TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""`mixed_precision` -> torch's name of the dtype."""
FP8_CAPABILITY = (8, 9)
"""The oldest GPUs that multiply fp8 matrices."""


def check_precision(capability: tuple[int, int] | None, precision: str) -> None:
    """Raises ValueError if a GPU cannot multiply in `precision`. Without a GPU (None) the arithmetic is emulated."""
    if precision == "fp8" and capability is not None and capability < FP8_CAPABILITY:
        have, need = (".".join(map(str, pair)) for pair in (capability, FP8_CAPABILITY))
        raise ValueError(
            f"linear_precision is 'fp8', which needs a GPU of compute capability {need} or newer; this one has {have}. "
            "Choose 'full'"
        )
