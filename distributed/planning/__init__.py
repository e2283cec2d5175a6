"""[ComfyUI] What fits, what is fastest, and what is refused, before a process starts."""
