"""Names in LoRA files -> modules of the model and what is changed there.

Every trainer writes the same module its own way; "blocks.0.self_attn.q" is, for example,

    diffusion_model.blocks.0.self_attn.q.lora_down.weight           lightx2v, ComfyUI (prefix or none)
    base_model.model.blocks.0.self_attn.q.lora_A.default.weight     PEFT, DiffSynth (pipe.dit.), diffusion-pipe
    transformer.blocks.0.attn1.to_q.lora_A.weight                   diffusers (transformer_2.: low-noise expert)
    lora_unet_blocks_0_self_attn_q.lora_down.weight                 kohya, musubi; lora_unet__ VideoX-Fun; lycoris_

Underscores stand for dots and for themselves, so these names are looked up among the model's own, never parsed.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum

from ..files.diffusers_keys import IN_FACE_BLOCK, to_official


class Role(Enum):
    """What a tensor is to its module."""

    DOWN = "down"
    UP = "up"
    UP_BIAS = "bias of up"
    ALPHA = "alpha"
    DIFF = "diff"
    DIFF_BIAS = "diff_b"
    DIFF_MODULATION = "diff_m"
    MAGNITUDE = "dora_scale"
    HADA_W1_A = "hada_w1_a"
    HADA_W1_B = "hada_w1_b"
    HADA_W2_A = "hada_w2_a"
    HADA_W2_B = "hada_w2_b"
    LOKR_W1 = "lokr_w1"
    LOKR_W1_A = "lokr_w1_a"
    LOKR_W1_B = "lokr_w1_b"
    LOKR_W2 = "lokr_w2"
    LOKR_W2_A = "lokr_w2_a"
    LOKR_W2_B = "lokr_w2_b"
    OFT_BLOCKS = "oft_blocks"
    OFT_RESCALE = "rescale"


# The end of a tensor's name -> its role. An adapter's name ("default") may stand before "weight", which some leave out.
_FACTOR = r"(?:(?:\.[^.]+)?\.weight|(?:\.default)?)$"
_ROLES = (
    (Role.DOWN, re.compile(r"\.(?:lora_down|lora_A|lora\.down|lora_linear_layer\.down)" + _FACTOR)),
    (Role.UP, re.compile(r"\.(?:lora_up|lora_B|lora\.up|lora_linear_layer\.up)" + _FACTOR)),
    (Role.UP_BIAS, re.compile(r"\.(?:lora_up|lora_B|lora\.up)(?:\.[^.]+)?\.bias$")),
    (Role.ALPHA, re.compile(r"\.alpha$")),
    (Role.DIFF, re.compile(r"\.(?:diff|w_norm)$")),
    (Role.DIFF_BIAS, re.compile(r"\.(?:diff_b|b_norm)$")),
    (Role.DIFF_MODULATION, re.compile(r"\.diff_m$")),
    (Role.MAGNITUDE, re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?)$")),
    *(
        (role, re.compile(rf"\.{role.value}(?:\.[^.]+)?$"))
        for role in Role
        if role.value.startswith(("hada_", "lokr_", "oft_", "rescale"))
    ),
)

# Formulas other than W += up @ down + diff, and encodings that a plain cast would read wrongly.
_UNSUPPORTED = (
    ("Tucker-decomposed LoHa or LoKr", re.compile(r"\.(?:hada_t[12]|lokr_t2)")),
    ("BOFT", re.compile(r"\.boft_")),
    # Which series its rotation is, and whether it is bounded, stands outside of the file.
    ("PEFT OFT", re.compile(r"\.oft_(?:R|r)\b")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
    ("(IA)^3", re.compile(r"\.(?:on_input$|ia3_l\b)")),
    ("VeRA", re.compile(r"\.vera_")),
    ("HRA", re.compile(r"\.hra_")),
    ("FourierFT", re.compile(r"\.fourierft_")),
    ("RandLoRA", re.compile(r"\.randlora_")),
    ("VB-LoRA", re.compile(r"\.vblora_")),
    ("Bone or MiSS", re.compile(r"\.(?:bone|miss)_")),
    ("Tucker-decomposed LoCon", re.compile(r"\.lora_mid\.")),
    ("weight-replacing (set_weight)", re.compile(r"\.(?:set_weight|reshape_weight)$")),
    ("scaled LoRA without what is scaled", re.compile(r"\.lora[_.](?:down|up|A|B)\b.*(?:scale_weight|weight_scale)$")),
)

_SCALES = (".scale_weight", ".weight_scale")

# Where diffusers' names have dots; what they stand for is in diffusers_keys.py.
_DIFFUSERS_ROOT = (
    *(f"condition_embedder.{part}_embedder.linear_{i}" for part in ("text", "time") for i in (1, 2)),
    *(f"condition_embedder.image_embedder.{part}" for part in ("norm1", "ff.net.0.proj", "ff.net.2", "norm2")),
    "condition_embedder.time_proj",
    "proj_out",
)
_DIFFUSERS_BLOCK = (
    *(f"{attn}.{part}" for attn in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"{attn}.{part}" for attn in ("attn1", "attn2") for part in ("norm_q", "norm_k")),
    *("attn2.add_k_proj", "attn2.add_v_proj", "attn2.norm_added_k"),
    *("norm2", "ffn.net.0.proj", "ffn.net.2", "proj_in", "proj_out"),
)

_WRAPPERS = re.compile(
    r"^(?:(?:base_model\.model|model|module|diffusion_model|unet|transformer|transformer_2|pipe|dit|dit2"
    r"|generator|generator_ema|denoiser|student|net|wan)\.)*"
    r"(?:lora_unet__?|lora_transformer_|lora_wan_|lora_dit_|lycoris_)?"
)
_SECOND = re.compile(r"(?:^|\.)(?:transformer_2|dit2)\.")
_IMAGE_BRANCH = re.compile(r"k_img|v_img|img_emb|add_[kv]_proj|norm_added_k|image_embedder")
_VACE = re.compile(r"vace_blocks|vace_patch_embedding")
_TEXT_ENCODER = re.compile(r"^(?:lora_te|text_encoder|conditioner|cond_stage_model)")


@dataclass(frozen=True, slots=True)
class LoraModule:
    """What a file holds for one module."""

    spelled: str
    """As in the file, up to the role."""
    second: bool
    """The name says that it is for the second, low-noise transformer."""
    tensors: dict[Role, str] = field(default_factory=dict)
    """Their names in the file."""

    @property
    def path(self) -> str:
        """Without what trainers put before the module's own name."""
        return _WRAPPERS.sub("", self.spelled, count=1)


def factor_scales(names: Collection[str]) -> dict[str, str]:
    """Matrix of a LoRA in fp8 or int8 -> the tensor that holds its scale."""
    found = {}
    for name in names:
        for ending in _SCALES:
            matrix = f"{name.removesuffix(ending)}.weight"
            if name.endswith(ending) and matrix in names:
                found[matrix] = name
    return found


def lora_modules(names: Collection[str]) -> tuple[list[LoraModule], list[str]]:
    """Groups tensor names by module. Returns the modules, and the names that have no role.

    Raises:
        ValueError: the file is of a kind that cannot be merged, or holds two adapters.
    """
    modules: dict[str, LoraModule] = {}
    rest = []
    for name in names:
        for kind, pattern in _UNSUPPORTED:
            if pattern.search(name):
                raise ValueError(
                    f"it is a {kind} file ({name}); supported are LoRA, DoRA, LoHa, LoKr, LyCORIS' OFT and weight "
                    "differences"
                )
        role, end = next(((role, m.start()) for role, pattern in _ROLES if (m := pattern.search(name))), (None, 0))
        if role is None:
            rest.append(name)
            continue
        spelled = name[:end]
        module = modules.setdefault(spelled, LoraModule(spelled, second=_SECOND.search(spelled) is not None))
        if role in module.tensors:
            raise ValueError(f"it holds two adapters: {module.tensors[role]} and {name}; one file may hold one")
        module.tensors[role] = name
    # An alpha without matrices changes nothing.
    rest += [m.tensors[Role.ALPHA] for m in modules.values() if set(m.tensors) == {Role.ALPHA}]
    return [m for m in modules.values() if set(m.tensors) != {Role.ALPHA}], rest


class ModuleNames:
    """Finds a model's modules by what any trainer calls them.

    Args:
        parameters: official names of the model's parameters.
    """

    def __init__(self, parameters: Collection[str]) -> None:
        modules = {re.sub(r"\.(?:weight|bias)$", "", name) for name in parameters}
        # A difference to "blocks.0.modulation" is written at its owner, blocks.0, or at itself.
        self._modules = modules | {name.removesuffix(".modulation") for name in modules}
        blocks = {
            ".".join(name.split(".")[:2]) for name in self._modules if name.startswith(("blocks.", "vace_blocks."))
        }
        in_diffusers = [f"{block}.{name}" for block in blocks for name in _DIFFUSERS_BLOCK]
        faces = {name.split(".")[2] for name in modules if name.startswith("face_adapter.fuser_blocks.")}
        in_diffusers += [f"face_adapter.{number}.{name}" for number in faces for name in IN_FACE_BLOCK]
        self._underscored = {name.replace(".", "_"): name for name in self._modules}
        self._underscored |= {name.replace(".", "_"): to_official(name) for name in (*_DIFFUSERS_ROOT, *in_diffusers)}

    def find(self, path: str) -> str | None:
        """The official name, None for a module that the model does not have."""
        for name in (path, to_official(path), self._underscored.get(path)):
            if name in self._modules:
                return name
        return None


def skip_reason(module: LoraModule) -> str:
    """Why a module that the model does not have may be left out."""
    if _IMAGE_BRANCH.search(module.path):
        return "of the image branch of Wan2.1 I2V"
    if _VACE.search(module.path):
        return "of VACE's own blocks"
    if _TEXT_ENCODER.search(module.spelled):
        return "of a text encoder"
    return "of modules that the model does not have"
