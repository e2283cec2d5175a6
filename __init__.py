"""Wan2.2 video generation on several GPUs, as ComfyUI nodes."""

if __package__:
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
    from .nodes.host import host, own_folder, warm
    from .nodes.inference.wanted_images import mark_queued

    warm.register()
    host.on_queued(mark_queued)
    own_folder.log_folder()
else:
    # pytest imports this file alone while it collects: there is no package to be relative to.
    NODE_CLASS_MAPPINGS = {}
    NODE_DISPLAY_NAME_MAPPINGS = {}

WEB_DIRECTORY = "./web"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
