"""Find a real MongoDB server, and run one for as long as it is needed."""

from __future__ import annotations  # for a Python that the set-up check calls too old

import asyncio
import contextlib
import importlib.util
import os
import shutil
import socket
import stat
import subprocess
import tempfile
from pathlib import Path

NO_MONGODB = (
    "There is no MongoDB here. Install one (docs/teaching.md), or set "
    "os.environ['MONGO_HOST'] to the URI of a replica set, and run this cell again."
)


def find_mongod() -> str | None:
    """Find a MongoDB server: one on the PATH, or the one that pip can install."""
    if path := shutil.which("mongod"):
        return path
    spec = importlib.util.find_spec("fiftyone")
    for folder in spec.submodule_search_locations if spec else ():
        path = Path(folder, "db", "bin", "mongod")
        if path.exists():
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
            return str(path)
    return None


@contextlib.asynccontextmanager
async def replica_set():
    """Give the URI of a replica set: of MONGO_HOST, or one of our own; None if none."""
    import pymongo  # here, so that looking for a server does not load the driver

    uri = os.environ.get("MONGO_HOST")
    if uri or not find_mongod():
        yield uri
        return
    with tempfile.TemporaryDirectory() as folder:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        options = ["--replSet", "rs0", "--bind_ip", "127.0.0.1", "--quiet"]
        command = [find_mongod(), *options, "--port", str(port), "--dbpath", folder]
        # No asyncio: the event loop of a notebook on Windows starts no processes.
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: ASYNC220
        config = {"_id": "rs0", "members": [{"_id": 0, "host": f"127.0.0.1:{port}"}]}
        try:
            hello = {}
            client = pymongo.AsyncMongoClient("127.0.0.1", port, directConnection=True)
            async with client:
                await client.admin.command("replSetInitiate", config)
                while not hello.get("isWritablePrimary"):
                    hello = await client.admin.command("hello")
            yield f"mongodb://127.0.0.1:{port}/?replicaSet=rs0"
        finally:
            server.kill()
            await asyncio.to_thread(server.wait)


def is_free(host: str, port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        if os.name == "posix":  # on Windows it would find a taken port free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return True
    return False
