"""The seam to ComfyUI: everything that this pack asks of its host, but for its models (core_model.py, core_vae.py).

ComfyUI is imported inside the functions, so that the pack can be imported and tested without it.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from ...wan.files.headers import brief
from .other_pages import comes_from_another_page, refusal
from .request_body import sent_object

WORTH_COLLECTING = 64 << 20
"""Bytes of a GPU that ComfyUI still has once its models have left it: less stays for good, as cuBLAS's workspace."""


def registered_node_ids() -> frozenset[str]:
    """Ids that ComfyUI knows so far; empty where there is no ComfyUI."""
    # Looked up, not imported: without ComfyUI the name could be any `nodes` on sys.path.
    module = sys.modules.get("nodes")
    return frozenset(getattr(module, "NODE_CLASS_MAPPINGS", ()))


# Files


def model_files(key: str) -> list[str]:
    """Names of the files in a model folder such as "diffusion_models", as the user sees them."""
    import folder_paths

    return folder_paths.get_filename_list(key) if key in folder_paths.folder_names_and_paths else []


def model_folders(key: str) -> list[Path]:
    """The folders behind a model folder key."""
    import folder_paths

    if key in folder_paths.folder_names_and_paths:
        return [Path(folder).absolute() for folder in folder_paths.get_folder_paths(key)]
    # A key that no extra_model_paths.yaml defines: the folder of that name beside ComfyUI's other models.
    return [Path(folder_paths.models_dir) / key]


def model_path(key: str, name: str) -> Path:
    """Absolute path of one of `model_files(key)`. Raises ValueError if it is gone."""
    import folder_paths

    path = folder_paths.get_full_path(key, name)
    if path is None:
        folders = " or ".join(str(folder) for folder in model_folders(key))
        raise ValueError(f"{name} is not there any more; it was looked for in {folders}")
    return Path(path).absolute()


def jobs_folder() -> Path:
    """Where running jobs live; ComfyUI wipes it when it starts."""
    import folder_paths

    return Path(folder_paths.get_temp_directory()) / "wan_distributed"


def hostfiles_folder() -> Path:
    """Where whoever runs ComfyUI puts hostfiles; nothing that a browser can send is written there."""
    import folder_paths

    return Path(folder_paths.get_user_directory()) / "wan_distributed" / "hostfiles"


def output_folder() -> Path:
    """Where videos go."""
    import folder_paths

    return Path(folder_paths.get_output_directory())


def failed_folder() -> Path:
    """Where failed jobs are kept; a restart does not wipe it."""
    import folder_paths

    return Path(folder_paths.get_user_directory()) / "wan_distributed" / "failed"


# The video


def save_path(prefix: str, width: int, height: int) -> tuple[Path, str, int, str]:
    """Where ComfyUI puts a file with this prefix: folder, name, next free number, folder below the output folder.

    Raises ValueError if `prefix` is not a place inside the output folder.
    """
    import folder_paths

    try:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory(), width, height
        )
    except OSError as error:
        raise ValueError(f"filename_prefix is {brief(prefix)}; its folder cannot be made: {error.strerror}") from error
    # ComfyUI raises a bare Exception for a prefix that leaves the output folder.
    except Exception as error:
        raise ValueError(f"filename_prefix is {brief(prefix)}; it must stay inside ComfyUI's output folder") from error
    return Path(folder), name, counter, subfolder


def video_input(path: Path) -> Any:
    """A VIDEO for other nodes; nothing is decoded until one asks for frames."""
    from comfy_api.latest import InputImpl

    return InputImpl.VideoFromFile(str(path))


def copy_video(source: Path, target: Path, workflow: Mapping[str, Any]) -> None:
    """Copies a video, with the workflow in its metadata unless the user wants none."""
    from comfy.cli_args import args

    metadata = None if args.disable_metadata else {key: value for key, value in workflow.items() if value is not None}
    video_input(source).save_to(str(target), metadata=metadata or None)


# The server


def _server() -> Any | None:
    """ComfyUI's web server; None where there is none (tests, scripts)."""
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def add_route(method: str, path: str, answer: Callable[[Mapping[str, Any]], Awaitable[Mapping[str, Any]]]) -> None:
    """Answers `method` (GET or POST) on `path` with JSON; `answer` is given the JSON object that was sent, or {}.

    Other web pages' requests are refused. Only while ComfyUI loads its packs: later its routes are fixed.
    """
    server = _server()
    if server is None:
        return
    from aiohttp import web
    from comfy.cli_args import args

    async def handle(request: web.Request) -> web.Response:
        refused = refusal(request.method, request.headers, any_origin=args.enable_cors_header is not None)
        if refused is not None:
            raise web.HTTPForbidden(text=refused)
        return web.json_response(await answer(await sent_object(request)))

    server.routes.route(method, path)(handle)


def on_queued(look: Callable[[Any], None]) -> None:
    """Calls `look` with what is sent to POST /prompt, before ComfyUI reads it; it may change that."""
    server = _server()
    if server is None:
        return

    def handle(queued: Any) -> Any:
        look(queued)
        return queued

    server.add_on_prompt_handler(handle)


def on_free_memory(react: Callable[[], Awaitable[Any]]) -> None:
    """Calls `react` when somebody, but no other web page, asks ComfyUI to unload models or to free memory.

    ComfyUI itself only sets a flag, for after the next prompt, and tells nobody.
    """
    server = _server()
    if server is None:
        return
    from comfy.cli_args import args

    async def look(request: Any, response: Any) -> None:
        # With another status ComfyUI has not taken the body, which may be anything.
        taken = request.method == "POST" and request.path in ("/free", "/api/free") and response.status == 200
        if taken and not comes_from_another_page(request.headers, any_origin=args.enable_cors_header is not None):
            asked = await request.json()
            if asked.get("unload_models") or asked.get("free_memory"):
                await react()

    server.app.on_response_prepare.append(look)


# The run


def progress_bar(total: int, node_id: str | None) -> Any:
    """ComfyUI's own, whose `update_absolute` raises InterruptProcessingException after a cancel."""
    from comfy.utils import ProgressBar

    return ProgressBar(total, node_id=node_id)


def preview_size() -> int:
    """Pixels of a preview's longer side, as --preview-size says."""
    from comfy.cli_args import args

    return args.preview_size


def send(event: str, content: Mapping[str, Any]) -> None:
    """To the page that queued what runs now, if there is one."""
    server = _server()
    if server is not None and server.client_id is not None:
        server.send_sync(event, dict(content), server.client_id)


def comfyui_version() -> str:
    """Such as 0.3.75; "unknown" for a ComfyUI that does not say."""
    # Looked up, not imported: it is ComfyUI's own once it runs.
    module = sys.modules.get("comfyui_version")
    return str(getattr(module, "__version__", "unknown"))


def log(line: str) -> None:
    """One line into ComfyUI's log and the page's console."""
    logging.getLogger("wan_distributed").info("%s", line)


def verbose() -> bool:
    """Whether ComfyUI was started with --verbose DEBUG."""
    return logging.getLogger().isEnabledFor(logging.DEBUG)


def interrupted() -> bool:
    """Whether the user pressed cancel."""
    from comfy import model_management

    return model_management.processing_interrupted()


def interruption() -> Exception:
    """Clears the cancel flag and gives the exception that tells ComfyUI so."""
    from comfy import model_management

    model_management.interrupt_current_processing(False)
    return model_management.InterruptProcessingException()


def is_interruption(error: BaseException) -> bool:
    """Whether it is the one that tells ComfyUI of a cancel."""
    # Looked up, not imported: without ComfyUI there is none.
    module = sys.modules.get("comfy.model_management")
    return isinstance(error, getattr(module, "InterruptProcessingException", ()))


def out_of_memory(message: str) -> Exception:
    """The exception for which ComfyUI shows its advice and unloads its models."""
    from comfy import model_management

    return model_management.OOM_EXCEPTION(message)


def free_memory() -> None:
    """Takes ComfyUI's own models off the GPU, which the job needs."""
    import torch
    from comfy import model_management

    model_management.unload_all_models()
    # Only for something: it stops every thread of ComfyUI, the one that takes a cancel too, for half a second where
    # the processors are busy; and a sampler or VAE node of the pack comes here each time.
    gpus = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    if any(torch.cuda.memory_allocated(gpu) > WORTH_COLLECTING for gpu in gpus):
        gc.collect()
    model_management.soft_empty_cache()


def device() -> Any:
    """The torch device that ComfyUI computes on."""
    from comfy import model_management

    return model_management.get_torch_device()


def visible_gpus() -> str | None:
    """The user's own CUDA_VISIBLE_DEVICES, or None if every GPU of the machine may be used.

    ComfyUI's --cuda-device and --default-device write that variable too, to place ComfyUI itself; the job's
    processes have their own.
    """
    from comfy.cli_args import args

    if args.cuda_device is not None or getattr(args, "default_device", None) is not None:
        return None
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def blocked_output(why: str | None = None) -> Any:
    """An output that keeps the nodes behind it from running; with an error that says `why`, where that is given."""
    from comfy_execution.graph import ExecutionBlocker

    return ExecutionBlocker(why)
