"""What ComfyUI's nodes call what they set beside a text, in the dict of a conditioning and in a sampler's prompts.

What is one tensor with a batch in front is a row of `wan.sampling.told` instead.
"""

from __future__ import annotations

TEXT = "cross_attn"
"""In a sampler's prompts."""
PICTURE, PICTURE_MASK, PICTURE_MASK_INDEX = "concat_latent_image", "concat_mask", "concat_mask_index"
"""Latents behind those that are sampled, what of them is known, and how many channels are in front of that."""
SEEN = "clip_vision_output"
"""Of CLIP Vision Encode."""
HIDDEN_STATES = "penultimate_hidden_states"
"""Of that."""
REFERENCES = "reference_latents"
"""A list of latents."""
VACE_FRAMES, VACE_MASKS, VACE_STRENGTHS = VACE_KEYS = ("vace_frames", "vace_mask", "vace_strength")
"""Lists of latents, masks and strengths, one for each control."""
