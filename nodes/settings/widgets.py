"""The inputs of nodes that stand for settings of a job."""

from __future__ import annotations

from typing import Any

from ...distributed.job.setting import Choice, Number, default_of, setting_of

INPUT_NAMES = {"steps": "sample_steps", "solver": "scheduler"}
"""Settings whose inputs have another name."""


def widget(kind: type, name: str, tooltip: str, **more: Any) -> tuple[Any, dict[str, Any]]:
    """The declaration, for INPUT_TYPES, of the input for a dataclass's field.

    Args:
        more: options that are the input's alone.
    """
    setting, default = setting_of(kind, name), default_of(kind, name)
    if isinstance(setting, Choice):
        return list(setting.names), {"default": default, **more, "tooltip": tooltip}
    if not isinstance(setting, Number):
        return "BOOLEAN" if isinstance(default, bool) else "STRING", {"default": default, **more, "tooltip": tooltip}
    whole = not isinstance(setting.step, float)
    least = 0 if setting.off else setting.least + (setting.step or 0) * setting.open
    default, least, most = ((int if whole else float)(value) for value in (default, least, setting.most))
    step = {} if setting.step is None else {"step": setting.step}
    return "INT" if whole else "FLOAT", {
        "default": default, "min": least, "max": most, **step, **more, "tooltip": tooltip
    }  # fmt: skip
