"""The video VAE, and what latents mean to it."""
