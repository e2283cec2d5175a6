"""The port of a ComfyUI that the demo and the tests start: it stays that server's from the choice to the end."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
from wan_pack.demo.comfyui import Server, reserve_port
from wan_pack.demo.example import ROOT

MAIN = """
import sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass

Path("starts").touch()
while not Path("may listen").exists():
    time.sleep(0.01)
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Answers).serve_forever()
"""


def test_a_reserved_port_is_a_listeners_and_nobody_elses():
    with reserve_port() as reserved, reserve_port() as other, socket.socket() as listener, socket.socket() as late:
        assert reserved.getsockname() != other.getsockname()
        with pytest.raises(OSError, match="in use"):
            late.bind(reserved.getsockname())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(reserved.getsockname())
        listener.listen()
        socket.create_connection(reserved.getsockname()).close()


@pytest.mark.processes
def test_nobody_gets_the_port_between_its_choice_and_the_servers_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "comfyui").mkdir()
    (tmp_path / "comfyui" / "main.py").write_text(MAIN)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "comfyui"))
    base = tmp_path / "base"
    base.mkdir()
    refused: list[bool] = []

    def take_the_port() -> None:
        """While the server imports what it needs."""
        while not (base / "starts").exists():
            time.sleep(0.01)
        with socket.socket() as another:
            try:
                another.bind(("127.0.0.1", server.port))
            except OSError:
                refused.append(True)
        (base / "may listen").touch()

    server = Server(base, pack=ROOT)
    thread = threading.Thread(target=take_the_port, daemon=True)
    thread.start()
    with server:
        thread.join()
        assert refused == [True]
        assert server.request("/system_stats") == {}
