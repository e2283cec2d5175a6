"""The Wan video diffusion transformer: its layers, and those that only some variants have."""
