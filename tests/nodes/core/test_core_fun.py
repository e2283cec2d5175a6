"""Fun-Control models behind ComfyUI's MODEL socket: control video, first frame and a reference picture in front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core_sampling import Modules, TwoModels, empty_latents, text
from wan_pack.demo.tiny_vae import vae as tiny_vae

LIMIT = 1e-4
WIDTH, HEIGHT, FRAMES = 64, 48, 9


def controlled(core: Modules, kind: str, *, reference: bool) -> dict[str, Any]:
    """What ComfyUI's node gives KSampler."""
    nodes, vae = core["comfy_extras.nodes_wan"], core["comfy.sd"].VAE(sd=tiny_vae(2), dtype=torch.float32)
    video = torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(1))
    given = {"start_image": video[:1].flip(1), "control_video": video}
    given |= {"ref_image": video[4:5].flip(2)} if reference else {}
    node = nodes.Wan22FunControlToVideo
    positive, negative, latent = node.execute(text(1), text(2), vae, WIDTH, HEIGHT, FRAMES, 1, **given).result
    if kind == "Fun V1.1":
        # That model has no mask among its channels, and looks at a picture through CLIP.
        seen = core["comfy.clip_vision"].Output()
        seen.penultimate_hidden_states = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(2))
        for entry in (*positive, *negative):
            del entry[1]["concat_mask"], entry[1]["concat_mask_index"]
            entry[1]["clip_vision_output"] = seen
    return {"positive": positive, "negative": negative, "latent_image": latent}


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("kind", ["Fun", "Fun V1.1"])
def test_same_latents(core: Modules, expert_files: dict[str, Path], tmp_path: Path, kind: str, reference: bool) -> None:
    fun = TwoModels(core, expert_files[kind], tmp_path)
    given = controlled(core, kind, reference=reference)
    made = fun.same(lambda core, model: core["sampled"](model, **given), limit=LIMIT)
    without = controlled(core, kind, reference=False)
    changed = (made - core["sampled"](fun.ours, **without)).abs().max()
    assert bool(changed > 0.01) is reference, "the picture counts"


def test_a_picture_of_another_size_is_refused(core: Modules, expert_files: dict[str, Path], tmp_path: Path) -> None:
    fun = TwoModels(core, expert_files["Fun"], tmp_path)
    given = controlled(core, "Fun", reference=True) | {"latent_image": empty_latents(rows=8)}
    with pytest.raises(ValueError, match=r"the reference picture is of \[6, 8\].*and what is sampled of \[8, 8\]"):
        core["sampled"](fun.ours, **given)


def test_a_model_without_a_place_for_it_passes_it_over_as_in_core(t2v: TwoModels) -> None:
    prompt = [[rows, {**rest, "reference_latents": [torch.ones(1, 16, 1, 6, 8)]}] for rows, rest in text(1)]
    t2v.same(lambda core, model: core["sampled"](model, positive=prompt), limit=LIMIT)
