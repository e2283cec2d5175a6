"""ComfyUI's own workflows in API form, with one of two pairs of loaders: Load Diffusion Model and Load VAE, or ours in
their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from core_sampling import TEXT_DIM
from wan_pack.demo.example import Prompt

OURS, THEIRS = "LoadDiffusionModelDistributed", "UNETLoader"
WIDTH, HEIGHT, FRAMES, STEPS = 64, 48, 9, 4
LORA = "core_lora.safetensors"
Link = list[Any]


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


class Workflow:
    """A prompt in the making, with one pair of loaders."""

    def __init__(self, loader: str, experts: dict[str, str], vae: str, picture: str, config: dict[str, Any]) -> None:
        text = {"tokens": 9, "channels": TEXT_DIM}
        self.loader, self._experts = loader, experts
        self.prompt: Prompt = {
            "config": node("WanVideoDistributedConfig", **config),
            "vae": node("VAELoader", vae_name=vae)
            if loader == THEIRS
            else node("LoadVAEDistributed", vae_name=vae, config=["config", 0]),
            "picture": node("LoadImage", image=picture),
            "positive": node("TestCoreConditioning", seed=1, **text),
            "negative": node("TestCoreConditioning", seed=2, **text),
            "latent": node("EmptyHunyuanLatentVideo", width=WIDTH, height=HEIGHT, length=FRAMES, batch_size=1),
        }

    def add(self, kind: str, **inputs: Any) -> str:
        name = f"{len(self.prompt)} {kind}"
        self.prompt[name] = node(kind, **inputs)
        return name

    def model(self, expert: str, *nodes: tuple[str, dict[str, Any]]) -> Link:
        """A MODEL; `nodes` are put on it, in order."""
        file = self._experts[expert]
        if self.loader == THEIRS:
            link = [self.add(THEIRS, unet_name=file, weight_dtype="default"), 0]
        else:
            link = [self.add(OURS, unet_name=file, config=["config", 0]), 0]
        for kind, inputs in nodes:
            link = [self.add(kind, model=link, **inputs), 0]
        return link

    def sampled(self, model: Link, sampler: str = "euler", **inputs: Any) -> str:
        """KSampler, of the text alone unless told otherwise."""
        given = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
        given |= {"seed": 3, "steps": STEPS, "cfg": 3.0, "scheduler": "simple", "denoise": 1.0, **inputs}
        return self.add("KSampler", model=model, sampler_name=sampler, **given)

    def save(self, graph: str, sampler: str) -> None:
        self.add("SaveLatent", samples=[sampler, 0], filename_prefix=f"{self.loader}/{graph}")


def two_stages(flow: Workflow, kind: str = "T2V", **links: Link) -> str:
    """links: `positive`, `negative` and `latent_image`, where they are not the text alone."""
    shift = ("ModelSamplingSD3", {"shift": 8.0})
    given = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0], **links}
    given |= {"sampler_name": "euler", "scheduler": "simple", "noise_seed": 3, "steps": STEPS, "cfg": 3.5}
    first = flow.add(
        "KSamplerAdvanced", **given, model=flow.model(f"{kind} high", shift),
        add_noise="enable", start_at_step=0, end_at_step=STEPS // 2, return_with_leftover_noise="enable",
    )  # fmt: skip
    return flow.add(
        "KSamplerAdvanced", **{**given, "latent_image": [first, 0]}, model=flow.model(f"{kind} low", shift),
        add_noise="disable", start_at_step=STEPS // 2, end_at_step=10_000, return_with_leftover_noise="disable",
    )  # fmt: skip


def custom(flow: Workflow) -> str:
    model = flow.model("T2V high")
    guider = flow.add("CFGGuider", model=model, positive=["positive", 0], negative=["negative", 0], cfg=3.0)
    sampler = flow.add("KSamplerSelect", sampler_name="dpmpp_2m")
    sigmas = flow.add("BasicScheduler", model=model, scheduler="beta", steps=STEPS, denoise=1.0)
    noise = flow.add("RandomNoise", noise_seed=3)
    links = {"noise": noise, "guider": guider, "sampler": sampler, "sigmas": sigmas, "latent_image": "latent"}
    return flow.add("SamplerCustomAdvanced", **{name: [link, 0] for name, link in links.items()})


def with_pictures(kind: str, *names: str, model: str = "I2V") -> Callable[[Workflow], str]:
    """A model with inputs for pictures, conditioned by ComfyUI's own node."""

    def graph(flow: Workflow) -> str:
        pictures = {name: ["picture", 0] for name in names}
        links = {name: [name, 0] for name in ("positive", "negative", "vae")}
        made = flow.add(kind, width=WIDTH, height=HEIGHT, length=FRAMES, batch_size=1, **links, **pictures)
        return flow.sampled(flow.model(model), positive=[made, 0], negative=[made, 1], latent_image=[made, 2])

    return graph


def known_frame(flow: Workflow) -> str:
    return flow.sampled(flow.model("TI2V-5B"), "uni_pc", latent_image=[flow.add("TestKnownFrame", seed=4), 0])


def cached(flow: Workflow) -> str:
    settings = {"reuse_threshold": 1.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    return flow.sampled(flow.model("T2V high", ("EasyCache", settings)), steps=8)


def windows(flow: Workflow) -> str:
    settings = {"context_length": 5, "context_overlap": 4, "context_schedule": "standard_static", "context_stride": 1}
    settings |= {"closed_loop": False, "fuse_method": "pyramid"}
    # Of newer ones, which want all of them.
    settings |= {"freenoise": True, "retain_first_frame": False, "split_conds_to_windows": False}
    return flow.sampled(flow.model("T2V high", ("WanContextWindowsManual", settings)))


def decoded(kind: str = "VAEDecode", **settings: int) -> Callable[[Workflow], str]:
    """The frames."""

    def graph(flow: Workflow) -> str:
        made = flow.sampled(flow.model("T2V high"))
        frames = flow.add(kind, samples=[made, 0], vae=["vae", 0], **settings)
        return flow.add("TestFramesAsLatent", images=[frames, 0])

    return graph


def encoded(flow: Workflow) -> str:
    """The latents of frames, of which the last is one too many."""
    made = flow.sampled(flow.model("T2V high"))
    frames = flow.add("VAEDecode", samples=[made, 0], vae=["vae", 0])
    more = flow.add("ImageBatch", image1=[frames, 0], image2=["picture", 0])
    return flow.add("VAEEncode", pixels=[more, 0], vae=["vae", 0])


def with_lora(flow: Workflow, strength: float = 0.8, **inputs: Any) -> str:
    loader = ("LoraLoaderModelOnly", {"lora_name": LORA, "strength_model": strength})
    return flow.sampled(flow.model("T2V high", loader), "res_multistep", **inputs)


def following(flow: Workflow, *, experts: bool = False) -> str:
    """A chain of two controls with masks and a reference, whose frame is in front; experts: in two stages, as Fun's."""
    links = {"positive": ["positive", 0], "negative": ["negative", 0]}
    for strength in (1.0, 0.6):
        made = flow.add(
            "WanVaceToVideo", width=WIDTH, height=HEIGHT, length=FRAMES, batch_size=1, strength=strength,
            vae=["vae", 0], control_video=["picture", 0], control_masks=["picture", 1],
            reference_image=["picture", 0], **links,
        )  # fmt: skip
        links = {"positive": [made, 0], "negative": [made, 1]}
    links |= {"latent_image": [made, 2]}
    sampler = two_stages(flow, "VACE", **links) if experts else flow.sampled(flow.model("VACE high"), **links)
    return flow.add("TrimVideoLatent", samples=[sampler, 0], trim_amount=[made, 3])


TILES = {"tile_size": 64, "overlap": 16, "temporal_size": 8, "temporal_overlap": 4}
GRAPHS: dict[str, Callable[[Workflow], str]] = {
    "euler": lambda flow: flow.sampled(flow.model("T2V high")),
    "one prompt": lambda flow: flow.sampled(flow.model("T2V high"), cfg=1.0),
    "two stages": two_stages,
    "custom": custom,
    "image to video": with_pictures("WanImageToVideo", "start_image"),
    "first and last frame": with_pictures("WanFirstLastFrameToVideo", "start_image", "end_image"),
    "Fun InP": with_pictures("WanFunInpaintToVideo", "start_image", "end_image"),
    "Fun Control": with_pictures("Wan22FunControlToVideo", "ref_image", "control_video", model="Fun Control"),
    "known frame": known_frame,
    "VACE": following,
    "VACE Fun": lambda flow: following(flow, experts=True),
    "EasyCache": cached,
    "context windows": windows,
    "LoRA": with_lora,
    "frames": decoded(),
    "frames in tiles": decoded("VAEDecodeTiled", **TILES),
    "latents of frames": encoded,
}
