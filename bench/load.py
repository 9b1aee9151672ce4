"""Start wsload, the load in C (`wsload.c` says what it does), and read its figures."""

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
CORES = sorted(
    os.sched_getaffinity(0)
)  # servers run on the first, the load on the last
TEXT = "x" * 64
USER = "sender-0"  # as long as the names of those who talk


class LoadError(Exception):
    """Say what the server did that no server should."""


# What a sender says to the chat, and to a peer, which relays it as it is: a peer's
# message is as long as what the chat makes of its own. Like is compared with like.
CHAT_MESSAGE = json.dumps({"type": "message", "text": TEXT, "nonce": "%s"})
PEER_MESSAGE = json.dumps(
    {"type": "message", "id": 1000, "user": USER, "text": TEXT}
    | {"time": "2016-01-01T00:00:00.000Z", "nonce": "%s"}
)


@functools.cache
def compiled() -> tempfile.TemporaryDirectory:
    """Compile wsload into a folder that goes away with this process."""
    compiler = shutil.which("cc")
    if not compiler:
        sys.exit("The benchmark needs a C compiler, called cc (Debian: gcc).")
    folder = tempfile.TemporaryDirectory()
    command = [compiler, "-O2", "-o", f"{folder.name}/wsload", SOURCE]
    subprocess.run(command, check=True)
    return folder


class Load:
    """A running wsload; its options are in `wsload.c`."""

    def __init__(self, server, cookies=None, **options) -> None:
        words = {"p": server.port, "P": server.process.pid, "m": server.message}
        command = [f"{compiled().name}/wsload"]
        for letter, value in (words | options).items():
            command += [f"-{letter}", str(value)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.sched_setaffinity(self.process.pid, CORES[-1:])
        cookies = server.cookies if cookies is None else cookies
        self.process.stdin.write("".join(f"{cookie}\n" for cookie in cookies))
        self.process.stdin.close()
        self.process.stdin = None

    def figures(self) -> dict:
        """Wait for its end. Raises LoadError with what it complains of."""
        output, errors = self.process.communicate()
        if self.process.returncode:
            raise LoadError(errors.strip() or "wsload ended without a word")
        figures = json.loads(output)
        deliveries = figures["deliveries"]
        figures["each"] = figures["cpu"] / deliveries * 1e6 if deliveries else None
        return figures


def run(server, cookies=None, **options) -> dict:
    return Load(server, cookies, **options).figures()


def run_whole(server, cookies=None, **options) -> dict:
    """Do the same. Raises LoadError if a message is missing."""
    figures = run(server, cookies, **options)
    if figures["missing"] or figures["closed"]:
        raise LoadError(f"{figures['missing']:,} deliveries are missing")
    return figures


def raise_file_limit() -> None:
    """Let this process, and the servers that it starts, open what the system allows."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
