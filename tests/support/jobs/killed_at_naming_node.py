"""A custom node that kills its ComfyUI when a video gets its name: before or after, by SOAK_KILLED."""

import os
import signal

NODE_CLASS_MAPPINGS = {}
WHEN = os.environ["SOAK_KILLED"]


def killing(name):
    call = getattr(os, name)

    def wrapped(source, target, *args, **named):
        naming = str(target).endswith(".mp4") and not os.path.basename(str(target)).startswith(".")
        if naming and WHEN == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(source, target, *args, **named)
        if naming:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, name, wrapped)


for function in ("link", "rename", "replace"):
    killing(function)
