"""The video VAE, what latents mean to it, and the mp4 that comes out."""
