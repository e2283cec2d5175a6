"""Takes the place of the agent: does what inputs.safetensors says, at once, with the standard library only."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from pathlib import Path


def write_result(folder: Path, **changes: object) -> None:
    job = json.loads((folder / "job.json").read_text())
    header = json.dumps({"samples": {"dtype": "F32", "shape": [1, 16, 2, 6, 8], "data_offsets": [0, 6144]}}).encode()
    (folder / "latents.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(6144))
    (folder / "video.mp4").write_bytes(b"video")
    latents = {"shape": [1, 16, 2, 6, 8], "dtype": "float32"}
    result = {"id": job["id"], "version": job["version"], "latents": latents, **changes}
    (folder / "result.json").write_text(json.dumps(result))


def main() -> int:
    group = Path(sys.argv[2])
    while not (request := group / "request-000001.json").exists():
        time.sleep(0.01)
    folder = Path(json.loads(request.read_text())["folder"])
    mode = (folder / "inputs.safetensors").read_text()
    if mode == "sleep":
        time.sleep(600)
    if mode == "good":
        write_result(folder)
    if mode == "other id":
        write_result(folder, id="00")
    if mode == "wrong shape":
        write_result(folder, latents={"shape": [1, 16, 9, 9, 9], "dtype": "float32"})
    if mode == "half a tensor":
        write_result(folder)
        os.truncate(folder / "latents.safetensors", 3000)
    if mode == "good, then fail":
        write_result(folder)
        return 1
    if mode == "no video":
        write_result(folder)
        (folder / "video.mp4").unlink()
    if mode == "flood":
        write_result(folder)
        (folder / "logs" / "rank0.log").write_bytes(b"")
        with (folder / "logs" / "rank0.log").open("ab") as log:
            for _ in range(200):
                log.write((b"\xff\xfe binary " + b"x" * 100 + b"\r 50%\r 100%\n") * 8192)
        with (folder / "logs" / "rank0.log").open("ab") as log:
            log.write(b"the end without a newline")
    if mode == "fail":
        return 1
    if mode == "die":
        os.kill(os.getpid(), 9)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
