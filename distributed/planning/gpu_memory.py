"""How much GPU memory a job takes, before it runs.

The terms follow what the code allocates; the tests hold their sum against the measured peaks of torch's allocator.
In the formulas S = tokens of one rank, C = channels, R = text tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...wan.model.config import PICTURE_ROWS, TEXT_LEN, WanConfig
from ...wan.model.latent_space import FRAMES_AT_ONCE, PATCH_SIZE, WAN21, WAN22, LatentSpace
from ..job.job import FFN_CHUNK, Parallel

GIB = 2**30
GATHERED_BLOCKS = 3
"""The one at work, the next, and the buffer that it arrives in."""
STREAMED_BLOCKS = 2
DECODER_PIXEL_BYTES = {WAN21.channels: (5_600, 1_440, 1), WAN22.channels: (4_620, 1_380, 1)}
"""Per pixel, decoding in bf16, by the latents' channels: what is kept of frames before, for each frame that is computed
on at once, and for each of all frames, their latents. What is alive at once, counted by the tests."""
FRAME_BYTES = 3 * 2
"""Of a pixel of a decoded frame in bf16."""
ENCODER_PIXEL_BYTES = {WAN21.channels: (7_200, 6), WAN22.channels: (3_500, 2)}
"""Encoding: what works on a few frames, and for each of all frames, what the first stages make of it. With one of the
convolutions' results more: that much two GPUs took beyond what is alive, one did not."""
DECODED_FRAMES = 16
"""That exist at once, whole: the last layer's, put in order, gathered, and on their way to the file."""
CONTEXT_BYTES = int(0.6 * GIB)
"""A process's CUDA context and library handles, which torch's peak leaves out."""
NCCL_BYTES = int(0.7 * GIB)
"""Of a process that talks to others."""
GUIDED_PROMPTS = 2
"""The prompt and the negative prompt."""
FACE_BYTES = 6 * 4 * 32 * 512**2 * 4
"""In the motion encoder at its fullest, the first halving of four pictures: six tensors of 32 channels in float32."""
FRAGMENTATION = 0.06
"""Of what is allocated and freed at every step: the allocator's blocks are larger than what they hold."""
VAE_FRAGMENTATION = 0.40
"""Of what a VAE works on: tensors of many sizes, few of which lie where others were. Of TI2V-5B at 1280x704x121 the
11.3 GiB that were alive did not fit into 15.2. And the plain kernels encode with 1.35 times what fused ones take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What has to be computed, whatever it runs on."""

    config: WanConfig
    width: int
    height: int
    num_frames: int
    steps: int
    experts: tuple[int, ...]
    """Bytes of each expert's parameters as they are kept on one GPU."""
    block_bytes: int
    """Of the largest block."""
    outside_bytes: int
    """Of an expert's parameters outside of its blocks."""
    unpacked: bool = False
    """Weights stay in 8 bits and are unpacked for use."""
    vae_bytes: int = 0
    """Of the VAE's parameters in bf16."""
    vae_upscale: int = 1
    """Pixels per row and column that the VAE makes for one of the video."""
    text_bytes: int = 0
    """Of the text encoder, if the job runs it."""
    clip_bytes: int = 0
    """Of CLIP's vision model, if the job runs it."""
    guided: bool = False
    """Steps evaluate the model for the negative prompt too."""
    given_frames: bool = False
    """Some tokens have a timestep of their own (`wan.sampling.denoise.Known`)."""
    decode: bool = True
    encode_frames: int = 0
    """Frames that the VAE encodes at once, of what the video starts from or follows; 0: none."""
    controls: int = 0
    """Control videos that VACE blocks read, each through all of them."""
    references: int = 0
    """Latent frames of pictures in front of the video's."""

    @property
    def latents(self) -> LatentSpace:
        return self.config.variant.latents

    @property
    def tokens(self) -> int:
        _, frames, rows, cols = self.latents.shape(self.width, self.height, self.num_frames)
        return (frames + self.references) * (rows // PATCH_SIZE[1]) * (cols // PATCH_SIZE[2])

    @property
    def block_runs(self) -> int:
        """Blocks that a step computes."""
        return self.config.num_layers + len(self.config.vace_layers) * self.controls

    @property
    def blocks_bytes(self) -> int:
        """Of all blocks of an expert."""
        return max(self.experts) - self.outside_bytes


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes on each GPU at the worst moment of a job."""

    weights: int
    gathered: int
    text: int
    """Cached keys and values of the cross-attention (text and pictures); the text encoder, or CLIP, while it is
    loaded."""
    activations: int
    vae: int
    process: int
    """What `torch.cuda.max_memory_allocated` leaves out: context, NCCL, what other GPUs write to, fragmentation."""

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.text + self.activations + self.vae + self.process


def estimate(work: Workload, parallel: Parallel, free: int | None = None) -> Estimate:
    """The largest of a job's phases: prompts and pictures encoded, video denoised, video decoded.

    Args:
        free: bytes on each GPU; as many frames are decoded at once as fit there. None: as many as ever are.
    """
    warm = parallel.stays
    rest = weights_at_rest(work, parallel)
    waiting = rest if warm else 0
    # What other GPUs write to is taken with the first step, and kept until the processes end.
    shared = peer_bytes(work, parallel)
    before = shared if warm else 0
    phases = [
        ((rest, gathered_bytes(work, parallel), kept_text_bytes(work, parallel), activation_bytes(work, parallel),
          work.vae_bytes), shared, FRAGMENTATION),
        ((waiting, 0, max(work.text_bytes, work.clip_bytes), 0, 0), before, FRAGMENTATION),
    ]  # fmt: skip
    if work.encode_frames:
        phases.append(((waiting, 0, 0, 0, vae_encode_bytes(work, parallel)), before, VAE_FRAGMENTATION))
    estimates = [Estimate(*part, process_bytes(parallel, *part[2:], gaps=gaps) + held) for part, held, gaps in phases]
    if work.decode:
        for at_once in range(FRAMES_AT_ONCE, 0, -1):
            vae = vae_decode_bytes(work, parallel, at_once)
            process = process_bytes(parallel, vae, gaps=VAE_FRAGMENTATION) + shared
            decoding = Estimate(waiting, 0, 0, 0, vae, process)
            if free is None or decoding.total <= free:
                break
        estimates.append(decoding)
    return max(estimates, key=lambda e: e.total)


def evaluation_bytes(work: Workload, parallel: Parallel) -> int:
    """Beyond the weights at rest, of processes that run already."""
    changing = kept_text_bytes(work, parallel) + activation_bytes(work, parallel)
    taken = gathered_bytes(work, parallel) + peer_bytes(work, parallel) + changing
    return taken + int(FRAGMENTATION * changing)


def compute_bytes(parallel: Parallel) -> int:
    """Per element of the matrix products."""
    return 4 if parallel.mixed_precision == "fp32" else 2


def rank_tokens(work: Workload, parallel: Parallel) -> int:
    """S, padding included."""
    return -(-work.tokens // parallel.ulysses_size) if parallel.use_ulysses else work.tokens


def weights_at_rest(work: Workload, parallel: Parallel) -> int:
    """Bytes that stay on each GPU between blocks."""
    if parallel.stream_blocks:
        return work.outside_bytes + STREAMED_BLOCKS * work.block_bytes
    held = max(work.experts) if parallel.offload_model else sum(work.experts)
    return held // (parallel.gpu_count if parallel.use_fsdp else 1)


def parked_bytes(work: Workload, parallel: Parallel) -> int:
    """Bytes of host memory of all ranks together for weights that wait there.

    Where the processes end with the job, an expert is dropped when the other takes over.
    """
    if parallel.stream_blocks:
        return (sum if parallel.stays else max)(work.experts) * parallel.gpu_count
    if not parallel.offload_model or not parallel.stays or len(work.experts) < 2:
        return 0
    return max(work.experts) * (1 if parallel.use_fsdp else parallel.gpu_count)


def gathered_bytes(work: Workload, parallel: Parallel) -> int:
    """Bytes that FSDP gathers from the other ranks at a time."""
    if not parallel.use_fsdp or parallel.gpu_count == 1:
        return 0
    if parallel.gather == "expert":
        return max(work.experts) + work.block_bytes
    return work.outside_bytes + GATHERED_BLOCKS * work.block_bytes


def kept_text_bytes(work: Workload, parallel: Parallel) -> int:
    """Bytes of the cross-attention's keys and values, 2 * L * R * C elements a prompt, and of the pictures'."""
    if parallel.memory_optimization:
        return 0
    prompts = GUIDED_PROMPTS if work.guided and not parallel.cfg_parallel else 1
    config = work.config
    rows = prompts * TEXT_LEN + (config.pictures * PICTURE_ROWS if config.image_branch else 0)
    return 2 * (config.num_layers + len(config.vace_layers)) * rows * config.dim * compute_bytes(parallel)


def activation_bytes(work: Workload, parallel: Parallel) -> int:
    """Bytes at the fullest of a block's three moments, in units of S * C.

    b is an element of the matrix products, 4 one of the fp32 residual. Eager PyTorch keeps every fp32 intermediate of
    a normalisation or rotation; a compiled segment keeps what goes in and what comes out.
    """
    config, b, tokens = work.config, compute_bytes(parallel), rank_tokens(work, parallel)
    # Before the attention: the residual, its modulated copy, q, and k on its way through norm and rotation.
    inputs = 4 + 6 * b if parallel.torch_compile else 24 + 2 * b
    # Around it: q, k, v three times where an all-to-all sends and receives them.
    shared = bool(parallel.exchange)
    attention = 4 + (10 if shared else 4) * b
    # Behind it: the residual before and after, q, k, v, the attention's result, then a norm or the feed-forward.
    chunk = min(FFN_CHUNK / tokens, 1) if parallel.memory_optimization else 1
    hidden = config.ffn_dim / config.dim * chunk * (1 if parallel.torch_compile else 2) * b
    outputs = 8 + 5 * b + max(hidden + (2 * b if chunk < 1 else 0), 0 if parallel.torch_compile else 12 - b)
    if work.given_frames:
        # Modulation by token: six fp32 vectors for each.
        inputs, outputs = inputs + 24, outputs + 24
    unpacked = config.ffn_dim * config.dim * b if work.unpacked else 0
    # Of VACE: the controls' streams beside the main one, and what they were embedded from.
    beside = work.controls * (4 + 4 * config.control_dim * math.prod(PATCH_SIZE) / config.dim)
    if config.camera and not parallel.memory_optimization:
        # What is kept of it for every token.
        beside += b
    rotary = tokens * config.head_dim * 4
    fullest = max(inputs, attention, outputs)
    blocks = int((fullest + beside) * tokens * config.dim) + rotary + unpacked
    # Faces are encoded before the first block, beside the tokens as embedded.
    return max(blocks, FACE_BYTES + 4 * tokens * config.dim) if config.animates else blocks


def peer_bytes(work: Workload, parallel: Parallel) -> int:
    """Bytes that a symmetric exchange holds: q, k, v and the result as they arrive, and q, k and v on their way.

    With peer access k is written to where it belongs at once.
    """
    if parallel.exchange != "symmetric":
        return 0
    # Every rank has room for the heads of the one with most.
    most = -(-work.config.num_heads // parallel.ulysses_size) * parallel.ulysses_size / work.config.num_heads
    # Codes have places of their own on their way, where some blocks or steps send none.
    own = 2 if parallel.rounds and (parallel.exact_steps or parallel.exact_blocks) else 0
    return int((3 * most + 4 + own) * rank_tokens(work, parallel) * work.config.dim * compute_bytes(parallel))


def vae_decode_bytes(work: Workload, parallel: Parallel, at_once: int = FRAMES_AT_ONCE) -> int:
    """Bytes of the VAE and of a chunk of `at_once` frames in it."""
    working = picture_bytes(work.latents, work.width, work.height, work.num_frames, work.vae_upscale, parallel, at_once)
    return work.vae_bytes * vae_width(parallel) // 2 + working


def vae_encode_bytes(work: Workload, parallel: Parallel) -> int:
    """Bytes of the VAE, and of frames in it."""
    working = encoding_bytes(work.latents, work.width, work.height, work.encode_frames, parallel)
    return work.vae_bytes * vae_width(parallel) // 2 + working


def encoding_bytes(latents: LatentSpace, width: int, height: int, frames: int, parallel: Parallel) -> int:
    """Bytes of some frames in the VAE, and of all of them on each rank."""
    some, each = ENCODER_PIXEL_BYTES[latents.channels]
    return rank_pixels(latents, width, height, parallel) * (some + each * frames) * vae_width(parallel) // 2


def vae_width(parallel: Parallel) -> int:
    """Bytes of a number in the VAE."""
    return 2 if parallel.mixed_precision == "bf16" else 4


def rank_pixels(latents: LatentSpace, width: int, height: int, parallel: Parallel) -> int:
    """Of a frame on each rank: rows are split over the ranks if there are rows for all."""
    rows = height // latents.stride
    split = parallel.gpu_count if rows >= parallel.gpu_count else 1
    return width * math.ceil(rows / split) * latents.stride


def picture_bytes(
    latents: LatentSpace, width: int, height: int, frames: int, upscale: int, parallel: Parallel, at_once: int
) -> int:
    """Bytes of a chunk of `at_once` frames in the VAE, and of all latents.

    Args:
        upscale: pixels per row and column that are made for one of the video.
    """
    kept, now, each = DECODER_PIXEL_BYTES[latents.channels]
    pixels = rank_pixels(latents, width, height, parallel)
    made = upscale**2 * DECODED_FRAMES * FRAME_BYTES * width * height
    return (pixels * (kept + now * at_once + each * frames) + made) * vae_width(parallel) // 2


def process_bytes(parallel: Parallel, *changing: int, gaps: float = FRAGMENTATION) -> int:
    """Bytes that nvidia-smi shows beyond torch's peak. changing: what is allocated and freed at every step."""
    return CONTEXT_BYTES + (NCCL_BYTES if parallel.gpu_count > 1 else 0) + int(gaps * sum(changing))
