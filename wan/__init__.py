"""Wan2.2 models: transformer, VAE, text encoder, sampling. No distributed code, nothing of ComfyUI."""
