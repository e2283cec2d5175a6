"""Two machines on this one: namespaces of their own for network and processes, a link between them, and a pdsh.

The file system is the same on both, as it is on machines that share one. What stands in for pdsh and ssh behaves as
they do: the remote command is no child of theirs, and when they are killed its standard input closes, no more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from patience import COMES_UP

ADDRESSES = ("10.231.7.1", "10.231.7.2")
PDSH = r"""#!{python}
import socket, sys, threading

arguments = sys.argv[1:]
hosts = arguments[arguments.index("-w") + 1].split(",")
command = " ".join(arguments[arguments.index("-w") + 2 :])
codes = []

def run(number, host):
    here = command.replace("%n", str(number))
    session = socket.socket(socket.AF_UNIX)
    session.connect({server!r})
    session.sendall(f"{{host}}\n{{here}}\n".encode())
    code = 255
    for line in session.makefile("rb"):
        if line.startswith(b"EXIT "):
            code = int(line.split()[1]) % 256
        else:
            print(f"{{host}}: {{line.decode(errors='replace').rstrip()}}", flush=True)
    codes.append(code)
    if code:
        print(f"pdsh@here: {{host}}: ssh exited with exit code {{code}}", flush=True)

threads = [threading.Thread(target=run, args=item) for item in enumerate(hosts)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(max(codes))
"""


class Machines:
    """Machines named by their addresses. `close` removes them and all that runs on them."""

    def __init__(self, tools: Path) -> None:
        self.hosts = ADDRESSES
        self._starters: list[subprocess.Popen[bytes]] = []
        self._pids: list[int] = []
        try:
            for _ in ADDRESSES:
                self._start()
            first, second = self._pids
            # Into its network only: its own pids do not number the other machine.
            inside = ["nsenter", "-t", str(first), "-n"]
            run(*inside, "ip", "link", "add", "wan0", "type", "veth", "peer", "wan0", "netns", str(second))
            for number, address in enumerate(ADDRESSES):
                run(*self.inside(number), "ip", "addr", "add", f"{address}/24", "dev", "wan0")
                for name in ("lo", "wan0"):
                    run(*self.inside(number), "ip", "link", "set", name, "up")
        except BaseException:
            self.close()
            raise
        tools.mkdir()
        self.tools = tools
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(tools / "ssh"))
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()
        (tools / "pdsh").write_text(PDSH.format(python=sys.executable, server=str(tools / "ssh")))
        (tools / "pdsh").chmod(0o755)

    def _serve(self) -> None:
        while True:
            connection, _ = self._server.accept()
            threading.Thread(target=self._session, args=(connection,), daemon=True).start()

    def _session(self, connection: socket.socket) -> None:
        """As sshd does: the command is no child of the client's, has an environment of its own, and nobody ends it."""
        lines = connection.makefile("rb")
        host, command = (lines.readline().decode().rstrip("\n") for _ in range(2))
        if host not in self.hosts:
            connection.sendall(f"ssh: connect to host {host} port 22: No route to host\nEXIT 255\n".encode())
            connection.close()
            return
        session = subprocess.Popen(
            [*self.inside(self.hosts.index(host)), "sh", "-c", command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": os.environ["HOME"]},
        )  # fmt: skip
        assert session.stdin is not None and session.stdout is not None

        def close_input() -> None:
            while lines.read(1):
                pass
            session.stdin.close()

        threading.Thread(target=close_input, daemon=True).start()
        with contextlib.suppress(OSError):
            for line in session.stdout:
                connection.sendall(line)
            connection.sendall(f"EXIT {session.wait()}\n".encode())
            connection.shutdown(socket.SHUT_RDWR)
        # The client may be gone; what the command still says goes nowhere, and it must not wait for that.
        session.stdout.read()
        session.wait()

    def _start(self) -> None:
        # Process 1 of a machine outlives every ssh session: were a session's shell that, the kernel would clean up.
        command = ["unshare", "-n", "-p", "-f", "--mount-proc", "--kill-child", "sleep", "infinity"]
        starter = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        self._starters.append(starter)
        children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children")
        deadline = time.monotonic() + COMES_UP
        while not (found := children.read_text().split()) or "sleep" not in Path(f"/proc/{found[0]}/comm").read_text():
            if starter.poll() is not None or time.monotonic() > deadline:
                raise OSError("namespaces cannot be made here")
            time.sleep(0.01)
        self._pids.append(int(found[0]))

    def inside(self, number: int) -> list[str]:
        """What goes before a command that is to run on a machine."""
        return ["nsenter", "-t", str(self._pids[number]), "-n", "-m", "-p"]

    def cut(self) -> None:
        """The link between them: packets vanish, nothing is closed."""
        run(*self.inside(1), "ip", "link", "set", "wan0", "down")

    def join(self) -> None:
        run(*self.inside(1), "ip", "link", "set", "wan0", "up")

    def processes(self, number: int) -> list[str]:
        """Command lines of what runs on a machine, but for its process 1."""
        namespace = os.readlink(f"/proc/{self._pids[number]}/ns/pid")
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == self._pids[number]:
                continue
            try:
                command = (entry / "cmdline").read_bytes().decode().replace("\0", " ")
                # One that has ended has no command line; its process 1, which is not a real one, does not reap it.
                if command and os.readlink(entry / "ns" / "pid") == namespace:
                    found.append(f"{entry.name} {command}")
            except OSError:
                continue
        return found

    def empty_within(self, seconds: float) -> float:
        """Seconds until nothing runs on any of them. AssertionError after `seconds`."""
        start = time.monotonic()
        while left := [line for number in range(len(self._pids)) for line in self.processes(number)]:
            assert time.monotonic() - start < seconds, "left behind:\n" + "\n".join(left)
            time.sleep(0.02)
        return time.monotonic() - start

    def close(self) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        for starter in self._starters:
            starter.kill()
            starter.wait()


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
