"""The training loop of every part: AdamW, averaged weights, a time budget, and a state that a later call goes on from.

What a step draws depends on its number alone, so a run that was cut into calls ends as an uncut one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .curves import read_curve, write_curves

AVERAGE = 0.999
"""Of the weights: the share that a step keeps."""
REPORT_STEPS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """When a call ends: whichever comes first."""

    seconds: float
    steps: int | None
    """Of the part, those of earlier calls included."""
    finish: bool = False
    """The learning rate falls to 0 towards the end of the seconds."""
    save_seconds: float = 90.0
    """Between two saved states."""
    begun: float = field(default_factory=time.monotonic)

    def rate(self) -> float:
        """Share of the learning rate."""
        return max(0.0, 1 - (time.monotonic() - self.begun) / self.seconds) if self.finish else 1.0

    def over(self, step: int) -> bool:
        return time.monotonic() - self.begun >= self.seconds or (self.steps is not None and step >= self.steps)


def fit(
    part: str,
    module: nn.Module,
    losses: Callable[[int], dict[str, Tensor]],
    *,
    folder: Path,
    budget: Budget,
    learning_rate: float,
    warm_up: int,
) -> list[tuple[int, dict[str, float]]]:
    """Trains `module` in place, and leaves its averaged weights in it.

    Args:
        losses: step -> named losses; their sum is minimised.
        folder: for state/<part>.pt and curves/<part>.csv and .svg. Without the state, which is too large to keep, a
            later call goes on from the curve's last step.
        warm_up: steps until the learning rate is reached.
    Returns:
        the loss curve: step -> means since the one before.
    """
    state = folder / "state" / f"{part}.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    fused = parameters[0].is_cuda
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)
    # The step at which the optimiser began, from which the learning rate rises.
    step, fresh, curve = 0, 0, []
    if state.exists():
        saved = torch.load(state, map_location=parameters[0].device, weights_only=True)
        step, fresh, curve = saved["step"], saved["fresh"], saved["curve"]
        with torch.no_grad():
            for values, into in ((saved["parameters"], parameters), (saved["average"], average)):
                torch._foreach_copy_(into, values)
        optimiser.load_state_dict(saved["optimiser"])
    elif curve := read_curve(folder / "curves", part):
        # The weights were read from their files; the optimiser begins anew.
        step = fresh = curve[-1][0]
    print(f"{part}: begins at step {step}", flush=True)

    def save() -> None:
        state.parent.mkdir(parents=True, exist_ok=True)
        partial = state.with_suffix(".tmp")
        values = {"step": step, "fresh": fresh, "curve": curve, "optimiser": optimiser.state_dict(), "average": average}
        torch.save(values | {"parameters": [p.detach() for p in parameters]}, partial)
        os.replace(partial, state)

    sums: dict[str, Tensor] = {}
    last_save = last_report = time.monotonic()
    since = step
    while not budget.over(step):
        rate = learning_rate * budget.rate() * min(1.0, (step - fresh + 1) / warm_up)
        for group in optimiser.param_groups:
            group["lr"] = rate
        with torch.enable_grad(), autocast(parameters[0].device):
            named = losses(step)
            total = torch.stack(list(named.values())).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        keep = min(AVERAGE, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - keep)
        step += 1
        for name, loss in named.items():
            sums[name] = sums.get(name, 0) + loss.detach()
        if step % REPORT_STEPS == 0:
            means = {name: (value / REPORT_STEPS).item() for name, value in sums.items()}
            # A call may begin between two reports; what it has not summed is not reported.
            if step - since >= REPORT_STEPS:
                curve.append((step, means))
            sums = {}
            now = time.monotonic()
            if now - last_report > 10:
                words = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
                print(f"{part} step {step} ({(step - since) / (now - budget.begun):.1f} a second): {words}", flush=True)
                last_report = now
            if now - last_save > budget.save_seconds:
                save()
                last_save = time.monotonic()
    save()
    write_curves(folder / "curves", part, curve)
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    return curve


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 products on a GPU; CPUs are slow at it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def generator(device: torch.device, *numbers: int) -> torch.Generator:
    """Of a step's random numbers: the same for the same numbers, whatever was drawn before."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (1 << 62)
    return torch.Generator(device).manual_seed(seed)
