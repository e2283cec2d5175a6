"""Our engine behind ComfyUI's own MODEL socket: the loader, and what stands in for the weights."""
