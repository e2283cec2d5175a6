"""Who computes a forward in forward.py: this pack, diffusers, and the official code from a checkout.

Every system gets the same random weights, drawn per tensor from its official name. A new one is an entry in `SYSTEMS`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import types
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from unsplit_vace import Unsplit, controls_for

TIMESTEP = 700.0
TEXT_ROWS = 512
_ENDS = re.compile(r"(steps|blocks)([0-9]+)")


@dataclass(frozen=True, slots=True)
class Place:
    """One rank."""

    rank: int
    world: int
    device: torch.device
    mesh: Any
    """`distributed.parallel.mesh.Mesh`; None for one rank."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


def random_weight(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """Float32, the same for a name on every rank and in every system; with the statistics of an initialised network."""
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if "norm" in name:
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device).mul_(0.02)


class System(ABC):
    """A transformer on the device, ready to be timed."""

    def __init__(self, config: Any, place: Place, option: str) -> None:
        self.config, self.place, self.option = config, place, option
        self.precision = "full"
        """Of the large matrix products."""

    @abstractmethod
    def prepare(self, latents: Tensor, text: Tensor) -> None:
        """latents: [C, T, h, w] float32; text: [512, text_dim]."""

    @abstractmethod
    def forward(self) -> Tensor:
        """One evaluation of what was prepared; any part of the output."""

    @abstractmethod
    def whole(self, output: Tensor) -> Tensor:
        """The whole velocity [C, T, h, w] float32, on every rank."""


class Ours(System):
    """This pack. Options, joined by +: compiled, triton, symmetric (exchange), fp8 (linears), and the name of an
    attention kernel; sol is sparse at tau 1. stepsN and blocksN: the first and last N of the steps and of the blocks
    round nothing to 8 bits. A VACE model follows one control; unsplit: every GPU computes all of its VACE blocks'
    tokens.

    Raises:
        ValueError: an option is unknown, or cannot run here.
    """

    def __init__(self, config: Any, place: Place, option: str) -> None:
        super().__init__(config, place, option)
        from wan_pack.distributed.parallel.parallelize import parallelize_wan
        from wan_pack.distributed.parallel.sequence import SequenceShard
        from wan_pack.wan.checkpoint.keeping import Keeping
        from wan_pack.wan.model.attention_kernels import KERNELS, choose_kernel
        from wan_pack.wan.model.eight_bits import E4M3, KeptWeight, quantise_rows
        from wan_pack.wan.model.kernels.choice import check_kernels
        from wan_pack.wan.model.precisions import check_precision
        from wan_pack.wan.model.sparse import SparseAttention, sparse_kernel
        from wan_pack.wan.transformer.transformer import meta_model

        options = set(option.split("+")) - {""}
        ends = {match[1]: int(match[2]) for match in map(_ENDS.fullmatch, options) if match}
        options -= {f"{what}{count}" for what, count in ends.items()}
        self.exact_steps, blocks = ends.get("steps", 0), range(config.num_layers)
        exact_blocks = tuple(i for i in blocks if min(i, blocks[-1] - i) < ends.get("blocks", 0))
        names = options & set(KERNELS)
        unknown = options - names - {"compiled", "triton", "symmetric", "fp8", "unsplit"}
        if unknown or len(names) > 1:
            raise ValueError(
                f"option {option!r}: it must join some of compiled, triton, symmetric, fp8, unsplit, stepsN, blocksN, "
                f"{list(KERNELS)}"
            )
        capability = torch.cuda.get_device_capability(place.device) if place.device.type == "cuda" else None
        if options & {"symmetric", "unsplit"} and place.world == 1:
            raise ValueError("one GPU has nothing to send")
        self.unsplit = "unsplit" in options
        if self.unsplit and not config.vace_layers:
            raise ValueError("unsplit is about VACE's blocks, which this model does not have")
        self.kernel = choose_kernel(capability, place.dtype, *names)
        if self.kernel.sparse:
            self.kernel = sparse_kernel(self.kernel, choose_kernel(capability, place.dtype), 1.0)
            assert isinstance(self.kernel.run, SparseAttention)
            self.kernel.run.steps = range(1)
            self.kernel.run.enter(0)
        self.precision = "fp8" if "fp8" in options else "full"
        check_precision(capability, self.precision)
        kernels = "triton" if "triton" in options else "plain"
        check_kernels(capability, kernels)
        layers = Keeping(self.precision, exact_blocks=exact_blocks).fp8_products(config)
        fp8 = {f"{layer}.weight": KeptWeight(E4M3, scaled=True) for layer in layers}
        self.model = meta_model(config, place.dtype, fp8, fp8_products=layers)
        parallelize_wan(
            self.model, place.mesh, shard=SequenceShard(length=1, rank=place.rank, world=place.world),
            attention=self.kernel.run, use_fsdp=False,
            ulysses_engine="symmetric" if "symmetric" in options else "packed",
            torch_compile="compiled" in options, memory_optimization=False, ops=kernels,
            exact_attention=choose_kernel(capability, place.dtype).run if self.kernel.eight_bits else None,
            exact_blocks=exact_blocks,
        )  # fmt: skip
        self.model.to_empty(device=place.device)
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            if name.removesuffix("_scale") in fp8 and name not in fp8:
                continue
            values = random_weight(name, parameter.shape, place.device)
            if name in fp8:
                values, scale = quantise_rows(values, E4M3)
                parameters[f"{name}_scale"].data.copy_(scale)
            parameter.data.copy_(values)

    def prepare(self, latents: Tensor, text: Tensor) -> None:
        from wan_pack.distributed.parallel.parallelize import set_shard
        from wan_pack.distributed.parallel.sequence import SequenceShard
        from wan_pack.wan.model.patch import patchify, token_grid
        from wan_pack.wan.model.rope import rope_table
        from wan_pack.wan.model.sparse import block_order
        from wan_pack.wan.transformer.conditions import Beside
        from wan_pack.wan.transformer.context import Context

        place = self.place
        self.grid = token_grid(tuple(latents.shape))
        order = block_order(self.grid) if self.kernel.sparse else None
        self.shard = SequenceShard(length=math.prod(self.grid), rank=place.rank, world=place.world, order=order)
        set_shard(self.model, self.shard)
        whole = patchify(latents)
        self.tokens = self.shard.split(whole)
        self.text = Context(text)
        controls = controls_for(self.config, self.grid, place.device)
        split = [dataclasses.replace(one, values=self.shard.split(one.values)) for one in controls]
        self.beside = Beside(controls=split)
        self.rope = rope_table(
            self.grid, self.config.head_dim, start=self.shard.start, stop=self.shard.stop, device=place.device,
            order=order,
        )  # fmt: skip
        self.timestep = torch.tensor([TIMESTEP], device=place.device)
        if self.unsplit:
            rope = rope_table(self.grid, self.config.head_dim, device=place.device)
            Unsplit(self.model, self.kernel.run, self.shard, whole, controls, rope)

    def enter(self, step: int, of: int) -> None:
        """What follows belongs to that step, of so many."""
        self.model.compute_exactly(min(step, of - 1 - step) < self.exact_steps)

    def forward(self) -> Tensor:
        with self.kernel.activate():
            return self.model(self.tokens, self.timestep, self.text, self.rope, beside=self.beside)

    def whole(self, output: Tensor) -> Tensor:
        from wan_pack.wan.model.patch import unpatchify

        group = None if self.place.mesh is None else self.place.mesh.ulysses_group
        return unpatchify(self.shard.gather(output.float(), group), self.grid)


class Diffusers(System):
    """diffusers with Ulysses context parallelism. Option "compiled": `compile_repeated_blocks`."""

    def __init__(self, config: Any, place: Place, option: str) -> None:
        super().__init__(config, place, option)
        from diffusers import ContextParallelConfig
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
        from wan_pack.wan.files.diffusers_keys import to_official

        with torch.device("meta"):
            model = WanTransformer3DModel(
                num_attention_heads=config.num_heads, attention_head_dim=config.head_dim, in_channels=config.in_dim,
                out_channels=config.out_dim, text_dim=config.text_dim, freq_dim=config.freq_dim,
                ffn_dim=config.ffn_dim, num_layers=config.num_layers,
            ).to(place.dtype)  # fmt: skip
        self.model = model.to_empty(device=place.device).eval().requires_grad_(False)
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(random_weight(to_official(name), tensor.shape, place.device))
        # Computed when a model is made, so empty in one made on the meta device.
        self.model.rope = type(self.model.rope)(config.head_dim, (1, 2, 2), 1024).to(place.device)
        if place.device.type == "cuda":
            self.model.set_attention_backend("_native_cudnn")
        if place.world > 1:
            self.model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=place.world))
        if option == "compiled":
            self.model.compile_repeated_blocks(fullgraph=place.world == 1)

    def prepare(self, latents: Tensor, text: Tensor) -> None:
        self.inputs = {
            "hidden_states": latents[None].to(self.place.dtype),
            "timestep": torch.tensor([TIMESTEP], device=self.place.device),
            "encoder_hidden_states": text[None].to(self.place.dtype),
        }

    def forward(self) -> Tensor:
        return self.model(**self.inputs, return_dict=False)[0]

    def whole(self, output: Tensor) -> Tensor:
        return output[0].float()


class Official(System):
    """The official code in the checkout that the option names, on one GPU or with its Ulysses attention."""

    def __init__(self, config: Any, place: Place, option: str) -> None:
        super().__init__(config, place, option)
        if not (Path(option) / "wan" / "modules" / "model.py").is_file():
            raise ValueError(f"official is {option!r}; it must be the folder of a Wan2.2 checkout")
        # The package's own __init__ imports pipelines with more dependencies than the model has.
        package = types.ModuleType("wan")
        package.__path__ = [str(Path(option) / "wan")]
        sys.modules.setdefault("wan", package)
        from wan.modules import model as official_model

        # Its own kernels are packages to build; torch's cuDNN kernel is what diffusers is given here too.
        official_model.flash_attention = _cudnn_attention
        WanModel = official_model.WanModel
        with torch.device("meta"):
            self.model = WanModel(
                model_type="t2v", dim=config.dim, ffn_dim=config.ffn_dim, freq_dim=config.freq_dim,
                text_dim=config.text_dim, num_heads=config.num_heads, num_layers=config.num_layers,
                in_dim=config.in_dim, out_dim=config.out_dim,
            ).to(place.dtype)  # fmt: skip
        freqs = WanModel(model_type="t2v", dim=config.dim, num_heads=config.num_heads, num_layers=1, ffn_dim=8).freqs
        self.model.to_empty(device=place.device).eval().requires_grad_(False)
        self.model.freqs = freqs
        for name, parameter in self.model.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape, place.device))
        if place.world > 1:
            from wan.distributed import ulysses
            from wan.distributed.sequence_parallel import sp_attn_forward, sp_dit_forward

            ulysses.flash_attention = _cudnn_attention
            for block in self.model.blocks:
                block.self_attn.forward = types.MethodType(sp_attn_forward, block.self_attn)
            self.model.forward = types.MethodType(sp_dit_forward, self.model)

    def prepare(self, latents: Tensor, text: Tensor) -> None:
        length = latents[0].numel() // 4
        self.inputs = {
            "x": [latents],
            "t": torch.tensor([TIMESTEP], device=self.place.device),
            "context": [text.to(self.place.dtype)],
            "seq_len": -(-length // self.place.world) * self.place.world,
        }

    def forward(self) -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=self.place.device.type == "cuda"):
            return self.model(**self.inputs)[0]

    def whole(self, output: Tensor) -> Tensor:
        return output.float()


def _cudnn_attention(q: Tensor, k: Tensor, v: Tensor, *, k_lens: Tensor | None = None, **_: Any) -> Tensor:
    """q: [1, S, H, D]; k, v: [1, K, H, D], of which the first `k_lens` count -> [1, S, H, D]."""
    dtype = torch.bfloat16 if q.is_cuda else q.dtype
    length = k.shape[1] if k_lens is None else int(k_lens[0])
    q_, k_, v_ = (x.transpose(1, 2).to(dtype) for x in (q, k[:, :length], v[:, :length]))
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        return F.scaled_dot_product_attention(q_, k_, v_).transpose(1, 2).to(q.dtype)


SYSTEMS: dict[str, type[System]] = {"ours": Ours, "diffusers": Diffusers, "official": Official}
