"""ComfyUI's own model object around a transformer that is computed elsewhere: what its MODEL sockets carry.

ComfyUI detects the model from its tensors' shapes, and does all that it does with one of its own: noise schedules,
latent formats, conditioning, guidance, patches, wrappers, samplers. Only the transformer itself has no weights here,
and what it would compute is asked of a `Transformer`. Beside host.py and core_vae.py no file imports ComfyUI.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .entry_keys import REFERENCES, TEXT, VACE_FRAMES

if TYPE_CHECKING:
    from torch import Tensor

KEY = "wan_distributed"
"""Of what is ours among the wrappers and attachments of a ComfyUI model."""
NO_WEIGHTS = (
    "the model of Load Diffusion Model (N GPUs) has no weights in ComfyUI: other processes hold them. To save it, to "
    "merge it or to take a LoRA out of it, load it with Load Diffusion Model"
)

OWN_GPUS = (
    "the model of Load Diffusion Model (N GPUs) runs on the GPUs that Wan Video Distributed Config chooses (gpu_ids, "
    "gpu_count). To have a node of ComfyUI's choose them, load it with Load Diffusion Model"
)
OWN_PRECISION = (
    "the model of Load Diffusion Model (N GPUs) computes in mixed_precision of Wan Video Distributed Config. To choose "
    "another precision by a node, or to train a LoRA, load it with Load Diffusion Model"
)


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class AddedPatches:
    """What one node, such as a LoRA loader, adds to the weights. One like another is another: it lives its own time."""

    patches: Mapping[Any, Any]
    """ComfyUI's name of a parameter, alone or with the part that is meant -> how it changes."""
    strength: float
    model_strength: float
    """Factor of the weight itself; 1 for all that only add to it."""


@dataclass(frozen=True, slots=True)
class CoreSampling:
    """One sampling that is about to begin."""

    patcher: Any
    """ComfyUI's ModelPatcher, with what nodes have put on it."""
    conds: Mapping[str, Sequence[Mapping[str, Any]]]
    """By "positive", "negative" or another name: entries with the text and what else came with it."""
    options: Mapping[str, Any]
    """ComfyUI's model_options."""
    shape: tuple[int, ...]
    """Of the latents, [B, C, T, h, w]."""
    sigmas: Tensor
    """[steps + 1], the noise levels."""
    guidance: float | None = None
    """CFG; None for a guider that has none, or several."""

    @property
    def added(self) -> tuple[AddedPatches, ...]:
        """All that nodes have added to the weights, in order."""
        added: tuple[AddedPatches, ...] = self.patcher.attachments.get(KEY, ())
        return added

    @property
    def window(self) -> tuple[int, ...]:
        """As `shape`, of what is evaluated at once: of the whole, or of a context window."""
        handler = self.options.get("context_handler")
        # Of another pack it may be told otherwise; then the whole is counted.
        length, dim = getattr(handler, "context_length", None), getattr(handler, "dim", None)
        return tuple(min(n, length) if length and i == dim else n for i, n in enumerate(self.shape))

    @property
    def controls(self) -> int:
        """Of a VACE model, that one sample has at most: ComfyUI makes an empty one where none is given."""
        counts = (entry.get(VACE_FRAMES) for entries in self.conds.values() for entry in entries)
        return max((len(frames) for frames in counts if frames is not None), default=1)

    @property
    def references(self) -> bool:
        """Whether a picture may be in front of the video."""
        return any(entry.get(REFERENCES) for entries in self.conds.values() for entry in entries)

    @property
    def guided(self) -> bool:
        """Every step evaluates the prompt and the negative prompt, in one call as they have equally many tokens."""
        texts = [[entry.get(TEXT) for entry in self.conds.get(name, ())] for name in ("positive", "negative")]
        counts = {None if text is None else text.shape[1] for side in texts for text in side}
        twice = self.guidance != 1 or bool(self.options.get("disable_cfg1_optimization"))
        return all(texts) and len(counts) == 1 and twice


class Transformer(Protocol):
    """A transformer that is computed elsewhere."""

    def check_parts(self, changed: Sequence[str]) -> None:
        """Called before a sampling and before each evaluation.

        Args:
            changed: parts of ComfyUI's transformer, and methods of it, that are others than those it was made with.
        Raises:
            ValueError: there are some.
        """

    def sample(self, sampling: CoreSampling, run: Callable[[], Tensor]) -> Tensor:
        """Runs one sampling, in which `velocity` is called.

        Args:
            run: ComfyUI's part of it; returns the latents.
        Raises:
            ValueError: something on the model cannot be done elsewhere.
        """

    def velocity(
        self, x: Tensor, timestep: Tensor, context: Tensor, options: Mapping[str, Any], conds: Mapping[str, Any]
    ) -> Tensor:
        """What the transformer predicts.

        Args:
            x: [B, in_dim, T, h, w].
            timestep: [B], or [B, T]; 0 to 1000.
            context: [B, n, text_dim].
            options: ComfyUI's transformer_options of this call.
            conds: what else ComfyUI's model would be given, by its name there.
        Returns:
            [B, out_dim, T, h, w].
        """


def model_without_weights(shapes: Mapping[str, tuple[int, ...]], transformer: Transformer) -> Any:
    """A MODEL of ComfyUI, which holds no memory.

    Args:
        shapes: official tensor name -> shape.
    Raises:
        ValueError: this ComfyUI does not know such a model, or computes more in it than `Transformer` is asked for.
    """
    with of_a_known_comfyui():
        return _model_without_weights(shapes, transformer)


@contextlib.contextmanager
def of_a_known_comfyui() -> Iterator[None]:
    """Says it in the user's words if what is built on has another name or signature. Raises ValueError."""
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"this ComfyUI is not one that the loaders for N GPUs know: {error}. They have run with ComfyUI 0.3.75; "
            "load this one with Load Diffusion Model or Load VAE, or use Wan Video Distributed Inference"
        ) from error


def _model_without_weights(shapes: Mapping[str, tuple[int, ...]], transformer: Transformer) -> Any:
    import torch
    from comfy import model_detection
    from comfy.ldm.wan.model import CameraWanModel, VaceWanModel, WanModel
    from comfy.ldm.wan.model_animate import AnimateWanModel
    from comfy.patcher_extension import WrappersMP

    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    config = model_detection.model_config_from_unet(tensors, "")
    if config is None:
        raise ValueError("this ComfyUI does not know such a transformer; update ComfyUI")
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model(tensors, "", device="meta")
    inner = model.diffusion_model
    if type(inner) not in (WanModel, VaceWanModel, CameraWanModel, AnimateWanModel):
        raise ValueError("such a transformer runs in Wan Video Distributed Inference only; it cannot be a MODEL yet")
    # What is computed elsewhere takes no memory here.
    model.memory_usage_factor = 0.0
    # Called on the model, past its patcher, by the nodes that save.
    model.state_dict_for_saving = _refuse
    made = dict(inner.named_modules())

    def forward(
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Any = None,
        time_dim_concat: Any = None,
        transformer_options: Mapping[str, Any] = {},
        **conds: Any,
    ) -> Tensor:
        transformer.check_parts(_replaced_methods(inner))
        # As there, one without a part for it does not look at a picture.
        seen = None if inner.img_emb is None else clip_fea
        given = {"clip_fea": seen, "time_dim_concat": time_dim_concat, **conds}
        if inner.ref_conv is None:
            given.pop("reference_latent", None)
        return transformer.velocity(x, timestep, context, transformer_options, given)

    def around(executor: Any, noise: Tensor, latent_image: Any, sampler: Any, sigmas: Tensor, *rest: Any, **more: Any):
        transformer.check_parts([*_replaced_methods(inner), *_changed_modules(inner, made)])
        guider = executor.class_obj
        patcher, options = guider.model_patcher, guider.model_options
        # One with several has ComfyUI's default there.
        cfg = getattr(guider, "cfg", None) if guider.conds.keys() <= {"positive", "negative"} else None
        sampling = CoreSampling(patcher, guider.conds, options, tuple(noise.shape), sigmas, cfg)
        return transformer.sample(sampling, lambda: executor(noise, latent_image, sampler, sigmas, *rest, **more))

    # Inside of ComfyUI's own `forward`, which runs the wrappers of other nodes around it.
    inner._forward = forward
    cpu = torch.device("cpu")
    patcher = patcher_class()(model, load_device=cpu, offload_device=cpu)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, around)
    return patcher


def _replaced_methods(inner: Any) -> list[str]:
    """Of the transformer itself, as nodes replace them for a call or for good; `_forward` is ours."""
    return [name for name in vars(inner) if name != "_forward" and callable(getattr(type(inner), name, None))]


def _changed_modules(inner: Any, made: Mapping[str, Any]) -> list[str]:
    """Modules below it that were replaced, added, hooked or given another `forward`."""
    now = dict(inner.named_modules())
    changed = [name for name, module in now.items() if _is_changed(module) or made.get(name) is not module]
    return [name or "the whole" for name in (*changed, *(made.keys() - now.keys()))]


def _is_changed(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _refuse(*_: Any, **__: Any) -> Any:
    raise ValueError(NO_WEIGHTS)


@functools.cache
def patcher_class() -> type[Any]:
    """Made when ComfyUI is there: its ModelPatcher for a model without weights."""
    from comfy.model_patcher import ModelPatcher
    from comfy.patcher_extension import CallbacksMP

    class WeightlessPatcher(ModelPatcher):
        """Tells ComfyUI's memory management that there is nothing to move, and keeps what nodes add to the weights.

        ComfyUI makes clones of it by its constructor; it has no state of its own but in `attachments`.
        """

        def model_size(self) -> int:
            return 0

        def add_patches(self, patches: Mapping[Any, Any], strength_patch: float = 1.0, strength_model: float = 1.0):
            taken = super().add_patches(patches, strength_patch, strength_model)
            added = AddedPatches({key: patches[key] for key in taken}, strength_patch, strength_model)
            self.attachments[KEY] = (*self.attachments.get(KEY, ()), added)
            return taken

        def load(
            self,
            device_to: Any = None,
            lowvram_model_memory: float = 0,
            force_patch_weights: bool = False,
            full_load: bool = False,
        ) -> None:
            self.model.device = device_to
            for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
                callback(self, device_to, lowvram_model_memory, force_patch_weights, full_load)

        def unpatch_model(self, device_to: Any = None, unpatch_weights: bool = True) -> None:
            # Of objects, such as the noise schedule; weights are none.
            super().unpatch_model(None, unpatch_weights=False)

        def partially_unload(self, *_: Any, **__: Any) -> int:
            return 0

        def clone(self, *given: Any, force_deepcopy: bool = False, **settings: Any) -> Any:
            if force_deepcopy:
                raise ValueError(NO_WEIGHTS)
            return super().clone(*given, **settings)

        def deepclone_multigpu(self, *_: Any, **__: Any) -> Any:
            raise ValueError(OWN_GPUS)

        def set_model_compute_dtype(self, dtype: Any) -> None:
            if dtype is not None:
                raise ValueError(OWN_PRECISION)

        get_key_patches = model_state_dict = state_dict_for_saving = model_state_dict_for_saving = _refuse

    return WeightlessPatcher
