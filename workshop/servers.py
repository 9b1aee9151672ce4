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
DEFAULTS = {name: one.default for name, one in chat.Settings.model_fields.items()}
# Cookies are per host, not per port: don't warn about another chat's cookie.
logging.getLogger("aiohttp_session").setLevel(logging.ERROR)
PEOPLE = "ann", "bob", "eve", "mallory"
# One key for all servers of a notebook. Allow many sign-ins: a cell may be run again.
REPEATABLE = {"SECRET_KEY": secrets.token_hex(), "LOGIN_ATTEMPTS": 1_000_000}


# --- Inside the notebook ---
class Server:
    """A chat that runs inside the notebook, on the same event loop."""

    def __init__(self, app, host: str, port: int) -> None:
        self.app, self.host, self.port = app, host, port
        self.url = f"http://127.0.0.1:{port}"
        self.room, self.db = app[chat.ROOM], app[chat.ROOM].db
        self.people, self.log = [], []
        self.shared = False  # by cells, which may be run again

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

    async def edit(self, operation: str, query) -> None:
        """Await an operator's edit. In memory, the chat has to be told."""
        await (query if self.db.shared else self.db.edit(operation, query))

    @staticmethod
    def sentences(html: str) -> list[str]:
        """Return what a page says beside its fields."""
        return re.findall(r'class="error"[^>]*>([^<]*)', html)

    async def end(self) -> None:
        """Close everyone's connections."""
        for person in self.people:
            await person.close()


class Lines(logging.Handler):
    """Keep what is logged, a line each, and print it if it should be seen at once.

    The log belongs to the whole process: of several servers, the newest one listens.
    """

    listeners = []

    def __init__(self, lines: list, seen: bool) -> None:
        super().__init__(logging.WARNING)
        self.lines, self.seen = lines, seen
        self.listeners.append(self)
        logging.getLogger().addHandler(self)

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
        logging.getLogger().removeHandler(self)
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
        routes = [(p, replaced.get(v.__name__, v), n) for p, v, n in chat.ROUTES]
        with patch.multiple(chat, **{"ROUTES": routes} | replaced):
            app, lines = chat.init_app(settings), []
            for name in chat.LOGGERS:  # a filter would say a line once a minute
                logging.getLogger(name).filters.clear()
            if change:
                change(app)
            stack.callback(Lines(lines, log).close)
            runner = web.AppRunner(app, shutdown_timeout=1, access_log=None)
            stack.push_async_callback(runner.cleanup)
            with contextlib.redirect_stdout(io.StringIO()):
                await runner.setup()
        server = Server(app, host, port)
        server.log = lines
        await web.SockSite(runner, listener).start()
        stack.push_async_callback(server.end)
        yield server


def in_memory() -> dict:
    """Return what gives one server after the other the same database in memory."""
    opened, open_database = [], chat.open_database

    async def open_once(settings):
        if not opened:
            opened.append(await open_database(settings))
        return opened[0]

    return {"open_database": open_once}


live = None  # the server that cells share
memory = in_memory()  # its database, which outlives it


async def serve(*arguments, **changes) -> Server:
    """Serve the chat until `stop`; what was served before is stopped, and replaced.

    Takes what `serving` takes. The port stays the same, and accounts, messages and
    sessions stay until the kernel stops. The notebook's people come over.
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
        if person.reader:  # else she has not come yet, or has left
            last = max((message["id"] for message in person.messages()), default=0)
            with contextlib.suppress(OSError, aiohttp.ClientError, TimeoutError):
                await person.come_back(last)
    for name in PEOPLE:  # create their accounts, before you can take their names
        if not await live.db.users.find_one({"name_key": name}):
            hashed = await asyncio.to_thread(chat.hash_password, PASSWORD)
            await chat.create_user(live.db, name, "", hashed)
    return live


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
    hosts = ["localhost"] + [own_address()] * (server.host == "0.0.0.0")
    addresses = [f"http://{host}:{server.port}{paths[0]}" for host in hosts]
    link = '<a href="{}" target="_blank">{}</a>'
    links = [link.format(one, one.partition("?")[0]) for one in addresses]
    shown = frames(server, paths, height)
    if {"VSCODE_PID", "VSCODE_CWD"} & os.environ.keys():  # there it gets no cookies
        shown = "<p>VS Code cannot sign in inside a frame: use the link.</p>"
    display(HTML(f"<p>In a window of its own: {' or '.join(links)}</p>{shown}"))


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
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with udp as probe, contextlib.suppress(OSError):
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
        self.output, self.url, self.exit_code, self.people = "", "", None, []

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
        )
        while "CTRL+C" not in self.output and (line := self.process.stdout.readline()):
            self.output += line
        if found := re.search(r"http://\S+:\d+", self.output):
            self.url = found[0]
        else:
            self.exit_code = self.process.wait()

    async def join(self, name: str) -> Person:
        """Return a person who has signed up, or in, and opened a WebSocket."""
        self.people.append(Person(self.url, name))
        await self.people[-1].sign_in()
        return await self.people[-1].connect()

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
        name, key = f"tutorial-{ObjectId()}", secrets.token_hex()
        settings = {"MONGO_HOST": uri, "MONGO_DB_NAME": name, "SECRET_KEY": key}
        client = await stack.enter_async_context(AsyncMongoClient(uri))
        stack.push_async_callback(client.drop_database, name)
        processes = [Process(**settings), Process(**settings)]
        await asyncio.gather(*map(stack.enter_async_context, processes))
        if not all(process.url for process in processes):
            print(processes[0].output)
            processes = None, None
        yield processes
