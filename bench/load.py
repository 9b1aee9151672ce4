"""Start wsload, the load in C (`wsload.c` explains it), and read its figures."""

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("wsload.c")
CORES = sorted(os.sched_getaffinity(0))  # servers: the first; the load: the last
TEXT = "x" * 64
USER = "person-0000"  # as long as every name here

# What a sender sends to the chat, and to a peer, which relays it unchanged. A peer's
# message is as long as the event that the chat makes, so both write the same bytes.
CHAT_MESSAGE = json.dumps({"type": "message", "text": TEXT, "nonce": "%s"})
PEER_MESSAGE = json.dumps(
    {"type": "message", "id": 1000, "user": USER, "text": TEXT}
    | {"time": "2016-01-01T00:00:00.000Z", "nonce": "%s"}
)


class LoadError(Exception):
    """Say what a server did that no server should do."""


@functools.cache
def compiled() -> tempfile.TemporaryDirectory:
    """Compile wsload into a folder that disappears with this process."""
    compiler = shutil.which("cc")
    if not compiler:
        sys.exit("The benchmark needs a C compiler, called cc (Debian: gcc).")
    folder = tempfile.TemporaryDirectory()
    command = [compiler, "-O2", "-o", f"{folder.name}/wsload", SOURCE]
    subprocess.run(command, check=True)
    return folder


class Load:
    """A running wsload; its options are explained in `wsload.c`."""

    def __init__(self, server, cookies=None, **options) -> None:
        words = {"p": server.port, "P": server.process.pid, "m": server.message}
        command = [f"{compiled().name}/wsload"]
        for letter, value in (words | options).items():
            command += [f"-{letter}", str(value)]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen(command, text=True, **pipes)
        os.sched_setaffinity(self.process.pid, CORES[-1:])
        cookies = server.cookies if cookies is None else cookies
        self.process.stdin.write("".join(f"{cookie}\n" for cookie in cookies))
        self.process.stdin.close()
        self.process.stdin = None

    def figures(self) -> dict:
        """Wait for its end. Raises LoadError with its complaint."""
        output, errors = self.process.communicate()
        if self.process.returncode:
            raise LoadError(errors.strip() or "wsload was killed")
        figures = json.loads(output)
        deliveries = figures["deliveries"]
        figures["each"] = figures["cpu"] / deliveries * 1e6 if deliveries else None
        return figures


def run(server, cookies=None, **options) -> dict:
    return Load(server, cookies, **options).figures()


def raise_descriptor_limit() -> None:
    """Let this process, and the servers that it starts, open what the system allows."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
