"""Serve the chat inside the notebook, or as a process of its own."""

import asyncio
import contextlib
import io
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import aiohttp
import psutil
from aiohttp import web
from bson import ObjectId
from IPython.display import HTML, display
from pymongo import AsyncMongoClient

import chat
from workshop.mongodb import NO_MONGODB, replica_set
from workshop.people import PASSWORD, Person

# Where cells serve: "0.0.0.0" is for a notebook that is opened by another machine.
HOST = os.environ.get("WORKSHOP_HOST", "127.0.0.1")
FRAMES = Path(__file__).with_name("frames.html").read_text("utf-8")
FIELDS = chat.Settings.model_fields
DEFAULTS = {name: field.default for name, field in FIELDS.items()}
# Cookies are per host, not per port: don't warn about another chat's cookie.
logging.getLogger("aiohttp_session").addHandler(logging.NullHandler())
PEOPLE = "ann", "bob", "eve", "mallory", "robot"
# One key for all servers of a notebook. Allow many sign-ins: a cell may be run again.
REPEATABLE = {"SECRET_KEY": secrets.token_hex(), "LOGIN_ATTEMPTS": 1_000_000}


# --- Inside the notebook ---
class Server:
    """A chat that runs inside the notebook, on the same event loop."""

    def __init__(self, app, host: str) -> None:
        self.app, self.host, self.port = app, host, 0
        self.people, self.log, self.tasks = [], [], []
        self.shared = False  # by cells, which may be run again

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def room(self):
        return self.app[chat.ROOM]

    @property
    def db(self):
        return self.app[chat.DATABASE]

    async def visitor(self, name: str = "") -> Person:
        """Return a person with a browser of their own, who has not signed in."""
        self.people.append(Person(self.url, name))
        return self.people[-1]

    async def join(self, name: str, path: str = "/ws") -> Person:
        """Return a person who has signed up, or in, and opened a WebSocket.

        On a server that cells share, each is there once.
        """
        for person in self.people if self.shared else ():
            if person.name == name and person.is_connected:
                return person
        person = await self.visitor(name)
        await person.sign_in()
        return await person.connect(path)

    async def edit(self, name: str, key, update: dict | None) -> None:
        """Update a document, or delete it (None), as an operator does."""
        if not self.db.shared:  # in memory, the chat has to be told
            return await self.db.edit(name, key, update)
        collection = self.db.mongo[name]
        if update is None:
            return await collection.delete_one({"_id": key})
        return await collection.update_one({"_id": key}, update)

    @contextlib.contextmanager
    def failing(self, error: Exception):
        """Let every insert of a message fail."""

        async def fail(message):
            raise error

        with patch.object(self.db, "insert", fail):
            yield

    @staticmethod
    def sentences(html: str) -> list[str]:
        """Return what a page says beside its fields."""
        return re.findall(r'class="error"[^>]*>([^<]*)', html)

    def run(self, work) -> None:
        """Run a coroutine beside the chat, until it ends or the chat does."""
        self.tasks.append(asyncio.create_task(work))

    async def end(self) -> None:
        """Stop what runs beside the chat, and close everyone's connections."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for person in self.people:
            await person.close()


class Lines(logging.Handler):
    """Keep what is logged, a line each, and print it if it should be seen at once.

    Loggers belong to the whole process: of several servers, the newest one listens.
    """

    names = "chat", "aiohttp.server"
    listeners = []

    def __init__(self, lines: list, seen: bool) -> None:
        super().__init__(logging.WARNING)
        self.lines, self.seen = lines, seen
        self.listeners.append(self)
        for name in self.names:
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if self is not self.listeners[-1]:
            return
        error = record.exc_info and record.exc_info[1]
        cause = f": {type(error).__name__}: {error}" if error else ""
        self.lines.append(record.getMessage() + cause)
        record.exc_info = None  # it holds all that the frames of a traceback hold
        if self.seen:
            print(self.lines[-1])

    def close(self) -> None:
        self.listeners.remove(self)
        for name in self.names:
            logging.getLogger(name).removeHandler(self)
        super().close()


@contextlib.asynccontextmanager
async def serving(host=HOST, port=0, change=None, log=False, **replaced):
    """Serve the chat for as long as a `with` block lasts.

    `replaced` are settings, and names of chat.py that get another value while the
    application starts: `Room=MyRoom`. `change` is called with the application before
    that. What is logged is kept in `server.log`, a line each; with `log` it is printed.
    """
    Settings = replaced.pop("Settings", chat.Settings)
    names = Settings.model_fields.keys() & replaced.keys()
    settings = {name: replaced.pop(name) for name in names}
    listener = socket.create_server((host, port))
    port = listener.getsockname()[1]  # the cookie is named by it
    settings = DEFAULTS | REPEATABLE | {"PORT": port} | settings
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(listener.close)
        settings = Settings(_env_file=None, **settings)  # whatever the environment says
        routes = [
            (path, replaced.get(view.__name__, view), name)
            for path, view, name in chat.ROUTES
        ]
        with patch.multiple(chat, **{"ROUTES": routes} | replaced):
            app = chat.init_app(settings)
            for name in Lines.names:  # a filter would say a line once a minute
                logging.getLogger(name).filters.clear()
            if change:
                change(app)
            server = Server(app, host)
            stack.callback(Lines(server.log, log).close)
            runner = web.AppRunner(app, shutdown_timeout=1, access_log=None)
            stack.push_async_callback(runner.cleanup)
            with contextlib.redirect_stdout(io.StringIO()):
                await runner.setup()
        await web.SockSite(runner, listener).start()
        server.port = port
        stack.push_async_callback(server.end)
        yield server


def in_memory() -> dict:
    """Return what gives several servers, one after the other, one database in memory."""
    client = chat.AsyncMongoMockClient(tz_aware=True)
    made = []

    async def create_once(collection, *fields: str) -> None:
        # The second time, mongomock treats missing emails as equal.
        if fields not in made:
            await chat_creates(collection, *fields)
            made.append(fields)

    chat_creates = chat.create_unique_index
    return {
        "AsyncMongoMockClient": lambda **options: client,
        "create_unique_index": create_once,
    }


live = None  # the server that cells share
memory = in_memory()  # its database, which outlives it


async def serve(*arguments, **changes) -> Server:
    """Serve the chat until `stop`; what was served before is stopped, and replaced.

    Takes what `serving` takes. The port is any that is free, and then stays the same.
    Accounts, messages and sessions stay as well, until the kernel stops. The notebook's
    people come over to the new server.
    """
    global live
    shared = {"port": live.port if live else 0, "log": True} | memory
    people = live.people if live else []
    if live:
        live.people = []  # they stay connected for as long as the old server runs
    await stop()
    stack = contextlib.AsyncExitStack()
    live = await stack.enter_async_context(serving(*arguments, **shared | changes))
    live.stop, live.shared, live.people = stack.aclose, True, people
    for person in people:
        with contextlib.suppress(OSError, aiohttp.ClientError, TimeoutError):
            await person.come_over()
    await reserve_names(live)
    return live


async def reserve_names(server: Server) -> None:
    """Create the accounts of the notebook's people, before you can take their names."""
    for name in PEOPLE:
        if not await server.db.users.find_one({"name_key": name}):
            hashed = await asyncio.to_thread(chat.hash_password, PASSWORD)
            await chat.User(server.db).create(name, "", hashed)


async def stop() -> None:
    """Stop what `serve` has started, with all people in it."""
    global live
    if live:
        server, live = live, None
        await server.stop()


def look(server, *paths: str, height: int = 300) -> None:
    """Show pages of the chat in the notebook, side by side, and a link to the first.

    The frame takes the notebook's own host name: for a browser, 127.0.0.1 and localhost
    are two sites, and a session cookie stays at home.
    """
    paths = paths or ("/",)
    link = '<p>{}: <a href="{}" target="_blank">{}</a></p>'
    address = f"http://localhost:{server.port}{paths[0]}"
    parts = [link.format("In a window of its own", address, address)]
    if server.host == "0.0.0.0":
        address = f"http://{own_address()}:{server.port}{paths[0]}"
        parts.append(link.format("From other machines", address, address))
    # A frame in VS Code belongs to another site than the chat: no cookies.
    if {"VSCODE_PID", "VSCODE_CWD"} & os.environ.keys():
        parts.append("<p>VS Code cannot sign in inside a frame: use the link.</p>")
    else:
        parts.append(frames(server, paths, height))
    display(HTML("".join(parts)))


def frames(server, paths, height: int) -> str:
    """Return frames side by side, on the host name that the notebook is opened by."""
    frame = '<iframe data-path="{}" title="The chat" height="{}"></iframe>'
    parts = {
        "FRAMES": "".join(frame.format(path, height) for path in paths),
        "NAME": f"chat-{secrets.token_hex(4)}",
        "PORT": str(server.port),
        "OPEN": "true" if server.host == "0.0.0.0" else "false",
    }
    return re.sub("|".join(parts), lambda match: parts[match[0]], FRAMES)


def own_address() -> str:
    """Return this machine's address, also on a network without a way out of it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):
            probe.connect(("192.0.2.1", 9))  # sends nothing: the system picks a route
            return probe.getsockname()[0]
    found = [a.address for card in psutil.net_if_addrs().values() for a in card]
    return next((a for a in found if re.fullmatch(r"(?!127)[\d.]+", a)), "127.0.0.1")


# --- In a process of its own ---
class Process:
    """`python chat.py`, as you would type it, with settings of its own.

    Ends with its `with` block. (Threads wait for it, because on Windows the notebook's
    event loop cannot.)
    """

    def __init__(self, **settings) -> None:
        defaults = {name: str(value) for name, value in DEFAULTS.items()}
        self.environment = os.environ | defaults | {"PORT": "0"} | settings
        self.output, self.port, self.people = "", 0, []

    async def __aenter__(self) -> "Process":
        await asyncio.to_thread(self.start)
        return self

    def start(self) -> None:
        """Start it, and read what it says until it listens, or has ended."""
        self.process = subprocess.Popen(
            [sys.executable, "-u", chat.__file__],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
        while "CTRL+C" not in self.output and (line := self.process.stdout.readline()):
            self.output += line
        if found := re.search(r"http://\S+:(\d+)", self.output):
            self.port = int(found[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def join(self, name: str) -> Person:
        """Return a person who has signed up, or in, and opened a WebSocket."""
        self.people.append(Person(self.url, name))
        return await self.people[-1].__aenter__()

    async def end(self) -> tuple[int, str]:
        """Stop it as a host would; return its exit code and all that it has said."""
        self.process.terminate()
        self.output += await asyncio.to_thread(self.process.stdout.read)
        return await asyncio.to_thread(self.process.wait), self.output

    async def kill(self) -> None:
        """End it without a warning, as a power cut would."""
        self.process.kill()
        await asyncio.to_thread(self.process.wait)

    async def __aexit__(self, *error) -> None:
        for person in self.people:
            await person.close()
        await self.kill()
        self.process.stdout.close()


@contextlib.asynccontextmanager
async def two_processes():
    """Start two processes on one MongoDB; where there is none, say so and give None."""
    async with contextlib.AsyncExitStack() as stack:
        uri = await stack.enter_async_context(replica_set())
        if not uri:
            print(NO_MONGODB)
            yield None, None
            return
        name = f"tutorial-{ObjectId()}"
        settings = {
            "MONGO_HOST": uri,
            "MONGO_DB_NAME": name,
            "SECRET_KEY": secrets.token_hex(),
        }
        client = await stack.enter_async_context(AsyncMongoClient(uri))
        stack.push_async_callback(client.drop_database, name)
        processes = [Process(**settings), Process(**settings)]
        both = map(stack.enter_async_context, processes)
        yield await asyncio.gather(*both)
