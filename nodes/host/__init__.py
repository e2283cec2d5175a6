"""ComfyUI as the pack sees it: the one file that imports it, what arrives, and what its users are shown."""
