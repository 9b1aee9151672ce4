"""The tools of tutorial.ipynb: show the chat, serve it, talk to it, break a copy of it.

The notebook teaches `chat.py`; what is here would only stand in its way. The checks of
the exercises come last, so that nobody reads an answer by accident.
"""

import ast
import asyncio
import contextlib
import difflib
import functools
import importlib.util
import inspect
import io
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import fields
from html import escape
from pathlib import Path
from unittest.mock import patch

import aiohttp
import pymongo
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from bson import ObjectId
from IPython.display import HTML, Markdown, display

import chat

HERE = Path(__file__).parent
PASSWORD = "correct horse"
DEFAULTS = {field.name: str(field.default) for field in fields(chat.Settings)}
# Cookies know no ports: one of another chat on this host is no news.
logging.getLogger("aiohttp_session").addHandler(logging.NullHandler())
# One key for all servers of a notebook, and nobody waits who runs a cell ten times.
REPEATABLE = {"SECRET_KEY": secrets.token_hex(), "LOGIN_ATTEMPTS": 1_000_000}


# --- Show ---
SOURCE, SCRIPT = Path(chat.__file__), HERE / "static" / "chat.js"
LOADED = SOURCE.stat().st_mtime


def show(*things) -> None:
    """Show the source of functions, classes or files, as it is."""
    for thing in things:
        if isinstance(thing, Path):
            display_source(thing.name, thing.read_text("utf-8"), thing.suffix)
            continue
        whole = getattr(thing, "whole", thing)
        lines, first = inspect.getsourcelines(whole)
        lines = lines[: getattr(thing, "length", len(lines))]
        title = f"chat.py, lines {first} to {first + len(lines) - 1}"
        if "." in whole.__qualname__:
            title += f", in class {whole.__qualname__.partition('.')[0]}"
        display_source(title, "".join(lines))


def show_constants(*names: str) -> None:
    """Show the assignments to some names of chat.py."""
    source = SOURCE.read_text("utf-8")
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and node.targets[0].id in names:
            found += lines[node.lineno - 1 : node.end_lineno]
    display_source("chat.py, constants", "\n".join(found))


def show_script(*names: str) -> None:
    """Show functions of the page's script."""
    source = SCRIPT.read_text("utf-8")
    pattern = r"^(?:async )?function {}\(.*?^}}\n"
    found = [re.search(pattern.format(name), source, re.M | re.S)[0] for name in names]
    display_source("static/chat.js", "\n".join(found), ".js")


def display_source(title: str, source: str, suffix: str = ".py") -> None:
    if SOURCE.stat().st_mtime != LOADED:
        title += " — chat.py has changed since it was imported: restart the kernel"
    languages = {".py": "python", ".js": "javascript", ".html": "html"}
    language = languages.get(suffix, "bash")
    display(Markdown(f"*{title}*\n````{language}\n{source.rstrip()}\n````"))


class head:
    """Stand for the beginning of a class, up to the first method after `__init__`."""

    def __init__(self, whole: type) -> None:
        lines, first = inspect.getsourcelines(whole)
        methods = [
            method.__code__.co_firstlineno - first
            for name, method in vars(whole).items()
            if inspect.isfunction(method) and name != "__init__"
        ]
        self.whole, self.length = whole, min(methods)
        while lines[self.length - 1].strip()[:1] in ("", "#", "@"):
            self.length -= 1


def frame(server: "Server", path: str = "/", height: int = 480) -> None:
    """Show a page of the chat in the notebook, and a link to it.

    The frame takes the notebook's own host name: for a browser, 127.0.0.1 and localhost
    are two sites, and a session cookie stays at home.
    """
    address = f"http://localhost:{server.port}{path}"
    parts = [f'<p>Open <a href="{address}" target="_blank">{address}</a> as well.</p>']
    if server.host == "0.0.0.0":
        others = f"http://{own_address()}:{server.port}{path}"
        parts.append(f'<p>Others on this network: <a href="{others}">{others}</a></p>')
    # A frame in VS Code belongs to another site than the chat: no cookies.
    if {"VSCODE_PID", "VSCODE_CWD"} & os.environ.keys():
        parts.append("<p>VS Code cannot sign in inside a frame: take the link.</p>")
    else:
        name = f"chat-{secrets.token_hex(4)}"
        parts.append(
            f'<iframe id="{name}" src="{address}" title="The chat" width="100%" '
            f'height="{height}" style="border:1px solid #8888"></iframe><script>'
            "if (/^[0-9.]+$/.test(location.hostname)) "
            f'document.getElementById("{name}").src = "http://" + location.hostname + '
            f'":{server.port}{path}";</script>'
        )
    display(HTML("".join(parts)))


def own_address() -> str:
    """Return this machine's address on its network. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):
            probe.connect(("192.0.2.1", 9))
        return probe.getsockname()[0]


def picture(html: str, height: int = 300) -> None:
    """Show a page that a server has sent, as a picture: nothing in it can be run."""
    style = (HERE / "static" / "chat.css").read_text("utf-8")
    html = re.sub("<link rel=.icon.*?>|<(no)?script.*?script>| autofocus", "", html)
    html = re.sub(
        "<link rel=.stylesheet.*?>", lambda _: f"<style>{style}</style>", html
    )
    frame = f'<iframe sandbox srcdoc="{escape(html)}" title="A page" width="100%" '
    frame += f'height="{height}" style="border:1px solid #8888"></iframe>'
    display(HTML(f"<div>{frame}</div>"))


def difference(title: str, before: str, after: str) -> None:
    """Show what is another way in a text, with two lines around it."""
    texts = before.splitlines(), after.splitlines()
    colours = {"-": "#ff525233", "+": "#00c85333", "@": "#8882"}
    lines = [
        f'<span style="background:{colours.get(line[0], "none")}">{escape(line)}</span>'
        for line in list(difflib.unified_diff(*texts, n=2, lineterm=""))[2:]
    ]
    display(HTML(f"<p><em>{title}</em></p><pre>{chr(10).join(lines)}</pre>"))


# --- Break a copy ---
copies = tempfile.TemporaryDirectory(prefix="chat-")


def edit(old: str, new: str, file: str = "chat.py", of=chat):
    """Return a copy of the chat with one piece of it replaced, and show the difference.

    `of` may be such a copy. Raises ValueError if the piece is not there exactly once.
    """
    folder = Path(tempfile.mkdtemp(dir=copies.name))
    for name in "chat.py", "templates", "static":
        copy = shutil.copytree if (of.HERE / name).is_dir() else shutil.copy
        copy(of.HERE / name, folder / name)
    before = (folder / file).read_text("utf-8")
    if before.count(old) != 1:
        raise ValueError(f"{file} has {old!r} {before.count(old)} times, not once")
    after = before.replace(old, new)
    (folder / file).write_text(after, "utf-8")
    difference(f"A copy of {file}", before, after)
    spec = importlib.util.spec_from_file_location(folder.name, folder / "chat.py")
    sys.modules[folder.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- Serve ---
class Server:
    """A chat that runs inside the notebook, on the same event loop."""

    def __init__(self, module, app, host: str) -> None:
        self.module, self.app, self.host, self.port = module, app, host, 0
        self.people, self.log = [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def room(self):
        return self.app[self.module.ROOM]

    @property
    def db(self):
        return self.app[self.module.DATABASE]

    async def visitor(self, name: str = "") -> "Person":
        """Return somebody with a browser of their own, who has not signed in."""
        self.people.append(Person(self.url, name))
        return self.people[-1]

    async def join(self, name: str, path: str = "/ws") -> "Person":
        """Return somebody who has signed up, or in, and opened a WebSocket."""
        person = await self.visitor(name)
        await person.sign_in()
        return await person.connect(path)

    async def send_home(self) -> None:
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
        if self.seen:
            print(self.lines[-1])

    def close(self) -> None:
        self.listeners.remove(self)
        for name in self.names:
            logging.getLogger(name).removeHandler(self)
        super().close()


@contextlib.asynccontextmanager
async def serving(
    module=chat, host="127.0.0.1", port=0, change=None, log=False, **replaced
):
    """Serve the chat, or a copy of it, for as long as a `with` block lasts.

    `replaced` are settings, and names of chat.py that get another value while the
    application starts. `change` is called with the application before that. What is
    logged is kept in `server.log`, a line each; with `log` it is printed too.
    """
    settings = {name: replaced.pop(name) for name in DEFAULTS.keys() & replaced.keys()}
    settings = module.Settings(**REPEATABLE | settings)
    routes = [
        (method, path, replaced.get(handler.__name__, handler), name)
        for method, path, handler, name in module.ROUTES
    ]
    async with contextlib.AsyncExitStack() as stack:
        with patch.multiple(module, **{"ROUTES": routes} | replaced):
            app = module.init_app(settings)
            if change:
                change(app)
            server = Server(module, app, host)
            stack.callback(Lines(server.log, log).close)
            runner = web.AppRunner(app, shutdown_timeout=1, access_log=None)
            stack.push_async_callback(runner.cleanup)
            with contextlib.redirect_stdout(io.StringIO()):
                await runner.setup()
        await web.TCPSite(runner, host, port).start()
        server.port = runner.addresses[0][1]
        stack.push_async_callback(server.send_home)
        yield server


live = None  # the server that cells share
memory = chat.AsyncMongoMockClient(tz_aware=True)  # its database, which outlives it


async def serve(*arguments, **changes) -> Server:
    """Serve the chat until `stop`; what was served before is stopped, and replaced.

    Takes what `serving` takes. The port is any that is free, and then stays the same;
    accounts, messages and sessions stay as well, until the kernel stops.
    """
    global live
    shared = {"port": live.port if live else 0, "log": True}
    shared["AsyncMongoMockClient"] = lambda **options: memory
    await stop()
    stack = contextlib.AsyncExitStack()
    live = await stack.enter_async_context(serving(*arguments, **shared | changes))
    live.stop = stack.aclose
    return live


async def stop() -> None:
    """Stop what `serve` has started, with all people in it."""
    global live
    if live:
        server, live = live, None
        await server.stop()


# --- Talk ---
class Person:
    """Somebody who uses the chat from here, by the same doors as a browser."""

    def __init__(self, url: str, name: str = "") -> None:
        self.name, self.heard, self.receipts = name, [], {}
        self.events, self.reader = asyncio.Queue(), None
        self.session = aiohttp.ClientSession(
            url, cookie_jar=aiohttp.CookieJar(unsafe=True)
        )

    async def get(self, path: str, **more) -> str:
        """Return a page."""
        async with self.session.get(path, **more) as response:
            return await response.text()

    async def post(self, path: str, **form) -> tuple[int, str]:
        """Send a form; return the status, before any redirect, and the page."""
        async with self.session.post(path, data=form, allow_redirects=False) as answer:
            return answer.status, await answer.text()

    async def sign_in(self) -> None:
        """Create an account; where there is one already, sign in with it."""
        both = {"login": self.name, "password": PASSWORD}
        status, _ = await self.post("/signin", **both, password2=PASSWORD)
        if status != 303:
            status, _ = await self.post("/login", **both)
        if status != 303:
            raise RuntimeError(f"{self.name} could not sign in: {status}")

    @property
    def cookie(self) -> str:
        """The session, as it is kept in a browser."""
        return next(iter(self.session.cookie_jar)).value

    async def connect(self, path: str = "/ws", **more) -> "Person":
        """Open a WebSocket and wait until it is live."""
        await self.disconnect()
        self.ws = await self.session.ws_connect(path, **more)
        self.reader = asyncio.create_task(self.read())
        await self.next("welcome")
        return self

    async def read(self) -> None:
        async for frame in self.ws:
            event = json.loads(frame.data)
            self.heard.append(event)
            self.events.put_nowait(event)
            receipt = self.receipts.pop(event.get("nonce"), None)
            if receipt and not receipt.done():
                receipt.set_result(event)

    async def next(self, *types: str, seconds: float = 3) -> dict:
        """Return the next event, or the next of some types. Raises TimeoutError."""
        try:
            async with chat.timeout(seconds):
                while True:
                    event = await self.events.get()
                    if not types or event["type"] in types:
                        return event
        except TimeoutError:
            wanted = " or ".join(types) or "event"
            waited = f"{self.name} waited {seconds:g} s for a {wanted}, in vain."
            raise TimeoutError(waited) from None

    async def send(self, **event) -> None:
        await self.ws.send_json(event)

    async def say(self, text: str, nonce: str = "") -> dict:
        """Say something; return the receipt, or the error. Raises TimeoutError."""
        nonce = nonce or str(ObjectId())
        self.receipts[nonce] = asyncio.get_running_loop().create_future()
        await self.send(type="message", text=text, nonce=nonce)
        try:
            return await asyncio.wait_for(self.receipts[nonce], 3)
        except TimeoutError:
            waited = f"{self.name} waited 3 s for the receipt of {text!r}, in vain."
            raise TimeoutError(waited) from None

    def texts(self) -> list[str]:
        """Return all that this person has heard people say."""
        return [event["text"] for event in self.heard if event["type"] == "message"]

    async def disconnect(self) -> None:
        if self.reader:
            await self.ws.close()
            self.reader.cancel()
            await asyncio.gather(self.reader, return_exceptions=True)

    async def close(self) -> None:
        await self.disconnect()
        await self.session.close()

    async def __aenter__(self) -> "Person":
        await self.sign_in()
        return await self.connect()

    async def __aexit__(self, *error) -> None:
        await self.close()


async def quiet(seconds: float = 0.3) -> None:
    """Give everybody time to hear what is on its way."""
    await asyncio.sleep(seconds)


# --- The wire ---
class Wire:
    """A WebSocket by hand: the bytes that go over the wire, and what they say."""

    def __init__(self) -> None:
        self.rows = []

    async def open(self, server: Server, cookie: str, path: str = "/ws") -> "Wire":
        self.streams = await asyncio.open_connection("127.0.0.1", server.port)
        request = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n"
            f"Cookie: AIOHTTP_SESSION={cookie}\r\n\r\n"
        )
        self.streams[1].write(request.encode())
        answer = await self.streams[0].readuntil(b"\r\n\r\n")
        self.rows.append(("to the server", request.encode(), "asks for a WebSocket"))
        self.rows.append(("from the server", answer, "agrees"))
        return self

    def send(self, event: dict) -> None:
        """Send a text frame. A client has to mask its payload: XOR with four bytes."""
        payload, mask = json.dumps(event).encode(), secrets.token_bytes(4)
        masked = bytes(byte ^ mask[n % 4] for n, byte in enumerate(payload))
        size = len(payload)
        length = (
            bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
        )
        frame = b"\x81" + length + mask + masked
        self.rows.append(("to the server", frame, payload.decode()))
        self.streams[1].write(frame)

    async def read(self) -> dict:
        """Read a frame. What a server sends is not masked."""
        reader = self.streams[0]
        start = await asyncio.wait_for(reader.readexactly(2), 5)
        size = start[1]
        if size == 126:
            start += await reader.readexactly(2)
            size = int.from_bytes(start[2:], "big")
        payload = await reader.readexactly(size)
        self.rows.append(("from the server", start + payload, payload.decode()))
        return json.loads(payload)

    async def close(self) -> None:
        self.streams[1].close()
        with contextlib.suppress(ConnectionError):
            await self.streams[1].wait_closed()

    def _repr_html_(self) -> str:
        rows = [
            f'<tr style="white-space:nowrap"><td>{way}</td><td>{len(data)}</td>'
            f"<td><code>{data[:12].hex(' ')}{' …' * (len(data) > 12)}</code></td>"
            '<td style="text-align:left;white-space:normal">'
            f"{escape(meaning)}</td></tr>"
            for way, data, meaning in self.rows
        ]
        titles = "".join(
            f"<th>{name}</th>" for name in ("", "bytes", "the first", "what they say")
        )
        return f"<table><tr>{titles}</tr>{''.join(rows)}</table>"


# --- Processes ---
class Process:
    """`python chat.py`, as somebody would type it, with settings of one's own.

    Ends with its `with` block. (Threads wait for it, because on Windows the notebook's
    event loop cannot.)
    """

    def __init__(self, **settings) -> None:
        self.environment = os.environ | DEFAULTS | {"PORT": "0"} | settings
        self.output, self.port = "", 0

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
        await self.kill()
        self.process.stdout.close()


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


NO_MONGODB = (
    "There is no MongoDB here. Set MONGO_HOST to the URI of a replica set, or see "
    "«Many processes, one room» in the README; then run this cell again."
)


@contextlib.asynccontextmanager
async def mongodb():
    """Give the URI of a replica set: of MONGO_HOST, or one of our own; None if none."""
    if uri := os.environ.get("MONGO_HOST"):
        async with pymongo.AsyncMongoClient(uri, serverSelectionTimeoutMS=3000) as one:
            hello = {}
            with contextlib.suppress(pymongo.errors.PyMongoError):
                hello = await one.admin.command("hello")
        yield uri if hello.keys() & {"setName", "msg"} else None
        return
    if not find_mongod():
        yield None
        return
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        options = ["--replSet", "rs0", "--bind_ip", "127.0.0.1", "--quiet"]
        command = [find_mongod(), *options, "--port", str(port), "--dbpath", folder]
        server = await asyncio.to_thread(
            subprocess.Popen, command, stdout=subprocess.DEVNULL
        )
        members, hello = [{"_id": 0, "host": f"127.0.0.1:{port}"}], {}
        config = {"_id": "rs0", "members": members}
        try:
            client = pymongo.AsyncMongoClient("127.0.0.1", port, directConnection=True)
            async with client:
                await client.admin.command("replSetInitiate", config)
                while not hello.get("isWritablePrimary"):
                    hello = await client.admin.command("hello")
            yield f"mongodb://127.0.0.1:{port}/?replicaSet=rs0"
        finally:
            server.kill()
            await asyncio.to_thread(server.wait)


# --- Blocking and awaiting ---
class Slow:
    """An answer that takes its time and holds its thread, as an old driver does."""

    def __init__(self, seconds: float = 0.1) -> None:
        self.seconds, self.calls, self.inside, self.most = seconds, 0, 0, 0

    def __call__(self) -> str:
        self.calls, self.inside = self.calls + 1, self.inside + 1
        self.most = max(self.most, self.inside)
        time.sleep(self.seconds)
        self.inside -= 1
        return "late, but here"


slow = Slow()


async def ask_at_once(handler, count: int) -> list[tuple[float, float]]:
    """Send requests to a handler at the same time; return when each began and ended.

    In a thread with a loop of its own: who blocks there blocks nobody here.
    """

    async def ask():
        started, times, errors = time.perf_counter(), [], []

        async def timed(request):
            began = time.perf_counter() - started
            try:
                response = await handler(request)
                if not isinstance(response, web.Response):
                    raise TypeError(f"a handler returns a response, not {response!r}")
                return response
            except Exception as error:
                errors.append(error)
                return web.Response(status=500)
            finally:
                times.append((began, time.perf_counter() - started))

        app = web.Application()
        app.router.add_get("/", timed)
        async with TestClient(TestServer(app)) as client:
            await asyncio.gather(*(client.get("/") for _ in range(count)))
        if errors:
            raise errors[0]
        return times

    return await asyncio.to_thread(asyncio.run, ask())


# --- The checks of the exercises ---
class Lacking(Exception):
    """Say what an attempt still lacks."""


def need(condition, sentence: str) -> None:
    if not condition:
        raise Lacking(sentence)


async def empty(): ...
async def empty_generator():
    yield


EMPTY = {function.__code__.co_code for function in (empty, empty_generator)}


def is_stub(attempt) -> bool:
    """Tell a function that does nothing yet, or a class that adds nothing."""
    if isinstance(attempt, type):
        own = [name for name in vars(attempt) if name[0] != "_"]
        own += ["__post_init__"] if "__post_init__" in vars(attempt) else []
        return all(is_stub(vars(attempt)[name]) for name in own)
    code = getattr(attempt, "__code__", None)
    return code is not None and code.co_code in EMPTY


def check(function):
    """Make a check that says how far an attempt has come, and never raises."""

    @functools.wraps(function)
    async def run(*attempts) -> None:
        if all(is_stub(attempt) for attempt in attempts):
            print("○ Not attempted yet.")
            return
        try:
            async with chat.timeout(20):
                await function(*attempts)
        except Lacking as error:
            print(f"✗ Not yet. {error}")
        except TimeoutError as error:
            print(f"✗ Not yet. {error or 'It takes more than 20 s.'}")
        except Exception as error:  # an attempt may raise anything
            print(f"✗ Not yet. It raised {type(error).__name__}: {error}")
        else:
            print("✓ Done.")

    return run


@contextlib.asynccontextmanager
async def trying(*arguments, **replaced):
    """Serve the chat with an attempt in it; what its log says, the attendee reads."""
    async with serving(*arguments, **replaced) as server:
        try:
            yield server
        finally:
            need(not server.log, f"The chat complained: {' '.join(server.log[-1:])}")


async def nothing_left(before: set) -> None:
    """Need that no task of the attendee's, or of a room of theirs, is left."""
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - before:
        frame = None if task.done() else getattr(task.get_coro(), "cr_frame", None)
        theirs = frame and frame.f_globals.get("__name__") in ("__main__", "chat")
        need(not theirs, "The chat has stopped, and a task of yours still runs.")


@check
async def check_mended(mended) -> None:
    async def checked(request):
        response = await mended(request)
        is_one = isinstance(response, web.Response)
        need(is_one, f"A handler returns a response, not {response!r}.")
        need(response.text == "late, but here", "What slow() returns is the answer.")
        return response

    slow.calls = slow.most = 0
    await ask_at_once(checked, 10)
    need(slow.calls, "The handler has to call slow(): it stands for a driver as it is.")
    need(slow.calls == 10, "Every request has to get an answer of its own from slow().")
    need(slow.most > 1, "Ten came at once, and still only one was inside at a time.")


@check
async def check_greeting(attempt) -> None:
    def read(**environment):
        with (
            patch.dict(os.environ, DEFAULTS | environment),
            patch.object(chat, "Settings", attempt),
        ):
            return chat.read_settings()

    def refuses(**environment):
        try:
            read(**environment)
        except chat.WrongSetting as error:
            return str(error)
        return ""

    names = [field.name for field in fields(attempt)]
    need("GREETING" in names, "There is no setting GREETING yet.")
    need(attempt().GREETING == "", "Whoever sets nothing should get no greeting.")
    need(read(GREETING="Hi!").GREETING == "Hi!", "The environment is not listened to.")
    need(refuses(PORT="70000"), "The checks that were there before have gone.")
    need(not refuses(GREETING="x" * 100), "A hundred characters are allowed.")
    complaint = refuses(GREETING="x" * 101)
    need(complaint, "A greeting of 101 characters should be refused.")
    need("GREETING" in complaint, "The complaint has to name the setting.")
    need("100" in complaint, "The complaint has to say what is wanted.")


@check
async def check_timing(attempt) -> None:
    @web.middleware
    async def sleepy(request, handler):
        await asyncio.sleep(0.05 if request.path == "/login" else 0)
        return await handler(request)

    def change(app):
        app.middlewares[:0] = [attempt, sleepy]

    async with trying(change=change) as server:
        ann = await server.visitor("ann")
        pages = {"/login": "a page", "/": "a redirect", "/nothing": "a page not found"}
        for path, what in pages.items():
            async with ann.session.get(path, allow_redirects=False) as response:
                header = response.headers.get("Server-Timing", "")
            normal = response.status in (200, 303, 404)
            need(normal, f"{what} came as {response.status}.")
            need(header, f"There is no Server-Timing on {what} ({path}).")
            found = re.fullmatch(r"total;dur=(\d+(\.\d+)?)", header)
            need(found, f"The header is {header!r}; it should be like total;dur=1.5")
            least = 50 if path == "/login" else 0
            fits = least <= float(found[1]) < 10_000
            need(fits, f"{what} that takes {least} ms and more has {header!r}.")
        await ann.sign_in()
        await ann.connect()
        need((await ann.say("hello"))["type"] == "message", "The chat has gone silent.")


@check
async def check_search(attempt) -> None:
    texts = ["a dog", "A CAT", "cats and dogs", "1+1=2", "11=2", "50 % off", "c.t"]
    async with trying() as server:
        ann = await server.join("ann")
        for text in texts:
            await ann.say(text)

        async def found(*arguments):
            documents = await attempt(server.db, *arguments)
            need(isinstance(documents, list), "It should return a list of documents.")
            return [document["text"] for document in documents]

        need(await found("cats") == ["cats and dogs"], "It does not find 'cats'.")
        two = await found("cat")
        need(len(two) == 2, "'cat' should find 'A CAT' too: any case will do.")
        expected = ["cats and dogs", "A CAT"]
        need(two == expected, "The newest should come first.")
        need(await found("cat", 1) == expected[:1], "It should keep to `count`.")
        need(await found("zebra") == [], "It finds what nobody has said.")
        literal = await found("1+1") == ["1+1=2"] and await found("c.t") == ["c.t"]
        need(literal, "What people type is text: '1+1' and 'c.t' mean what they say.")


@check
async def check_unread(attempt) -> None:
    async with trying(ChatList=attempt) as server:
        ann, bob = await server.visitor("ann"), await server.join("bob")
        await bob.say("one")
        await ann.sign_in()
        page = await ann.get("/")
        need('id="messages"' in page, "The page has lost its messages.")
        need('id="unread"' not in page, "On the first visit nothing is marked.")
        need('id="unread"' not in await ann.get("/"), "Nothing is new yet.")
        await bob.say("two")
        await bob.say("three")
        page = await ann.get("/")
        need(page.count('id="unread"') == 1, "Two messages are new: one mark is due.")
        marked = re.search(
            r'<li data-id="(\d+)">(?:(?!</li>).)*id="unread"', page, re.S
        )
        need(marked, "The mark belongs inside the <li> of a message.")
        need(marked[1] == "2", f"Number 2 is the first unread; {marked[1]} is marked.")
        need('id="unread"' not in await ann.get("/"), "Seen once, it is not new again.")
        older = await ann.get("/?before=3")
        need('id="unread"' not in older, "Older pages need no mark.")


@check
async def check_me(attempt) -> None:
    async with trying(Room=attempt) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        receipt = await ann.say("/me waves")
        need(receipt["type"] == "message", "Ann got an error for her /me.")
        heard = (await bob.next("message"))["text"]
        need(heard == "* ann waves", f"Bob should hear '* ann waves', not {heard!r}.")
        for text in "hello", "what is /me for?", "/method":
            await ann.say(text)
            heard = (await bob.next("message"))["text"]
            need(heard == text, f"{text!r} is an ordinary message, not {heard!r}.")
        stored = await server.db.messages.find_one({"_id": 1})
        need(stored["text"] == "* ann waves", f"It is stored as {stored['text']!r}.")
        once = [await ann.say("/me nods", nonce="same") for _ in range(2)]
        need(once[0]["id"] == once[1]["id"], "Sent again, a /me is stored twice.")


@check
async def check_typing(attempt) -> None:
    settings = {"MESSAGE_BURST": 3, "MESSAGES_PER_SECOND": 1}
    async with trying(WebSocket=attempt, **settings) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        await ann.send(type="typing", user="bob")
        event = await bob.next("typing", "error")
        need(event.get("user") == "ann", f"Ann is typing, and Bob gets {event}.")
        need(set(event) == {"type", "user"}, "The event needs its type and user only.")
        await quiet()
        need(not [e for e in ann.heard if e["type"] == "error"], "Ann got an error.")
        need(server.room.last == 0, "A notice is no message: nothing is to be stored.")
        need(
            (await ann.say("hi"))["type"] == "message", "Messages have stopped working."
        )
        for _ in range(5):
            await ann.send(type="typing")
        await quiet()
        codes = [event["code"] for event in ann.heard if event["type"] == "error"]
        need("too_fast" in codes, "The rate limit is for notices as well.")


@check
async def check_private(attempt) -> None:
    async with trying(Room=attempt) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        eve, tab = await server.join("eve"), await server.join("bob")
        receipt = await ann.say("/msg bob meet me at noon", nonce="secret")
        need(receipt["type"] == "message", "Ann got an error.")
        need(receipt["id"] <= server.room.last, "The receipt's id is a new one.")
        need(receipt.get("user") == "ann", "The receipt does not say whose it is.")
        for person in bob, tab, ann:
            event = await person.next("private")
            need(event.get("user") == "ann", "One cannot see who wrote.")
            need(event.get("to") == "bob", "One cannot see to whom.")
            need(event.get("text") == "meet me at noon", "It is not the text alone.")
        await quiet()
        need("noon" not in str(eve.heard), "Eve has heard it as well.")
        stored = await server.db.messages.find().to_list(length=None)
        need(not stored, "It is stored, so /?before=… shows it to everybody.")
        wrong = await ann.say("/msg zoe are you there?")
        need(wrong["type"] == "error", "Zoe is not here: Ann should get an error.")
        need((await ann.say("hello"))["id"] == 1, "Ordinary messages do not work.")
        heard = (await eve.next("message"))["text"]
        need(heard == "hello", "Ordinary messages do not reach everybody.")


@check
async def check_rooms(chat_list, web_socket, run_rooms) -> None:
    def change(app):
        app.cleanup_ctx.append(run_rooms)

    views, before = (
        {"ChatList": chat_list, "WebSocket": web_socket},
        asyncio.all_tasks(),
    )
    async with trying(change=change, **views) as server:
        ann = await server.join("ann")
        bob = await server.join("bob", "/ws?room=kitchen")
        eve = await server.join("eve", "/ws?room=kitchen")
        need((await ann.say("lobby talk"))["id"] == 1, "The lobby counts from 1.")
        need((await bob.say("tea?"))["id"] == 1, "Each room counts from 1.")
        need((await eve.next("message"))["text"] == "tea?", "Eve does not hear Bob.")
        await quiet()
        need(ann.texts() == ["lobby talk"], "Ann, in the lobby, hears the kitchen.")
        need(eve.texts() == ["tea?"], "Eve, in the kitchen, hears the lobby.")
        need("tea?" in await ann.get("/?room=kitchen"), "The kitchen's page lacks it.")
        need("tea?" not in await ann.get("/"), "The lobby's page shows the kitchen.")
        async with ann.session.get("/?room=attic") as response:
            need(response.status == 404, "There is no attic: that is a 404.")
        try:
            await ann.session.ws_connect("/ws?room=attic")
            raise Lacking("There is no attic: /ws?room=attic is a 404 as well.")
        except aiohttp.WSServerHandshakeError as refusal:
            need(refusal.status == 404, f"/ws?room=attic gives {refusal.status}.")
    await nothing_left(before)


@check
async def check_clock(attempt) -> None:
    before = asyncio.all_tasks()
    async with trying(change=lambda app: app.cleanup_ctx.append(attempt)) as server:
        ann = await server.join("ann", "/ws?after=0")
        early = [event for event in ann.heard if event["type"] == "message"]
        need(early, "It should speak as soon as the chat has started.")
        heard = early[-1]
        need(heard["user"] == "clock", "It should speak as the user `clock`.")
        again = await ann.next("message")
        need(again["id"] == heard["id"] + 1, "It should speak every second.")
        need(again["nonce"] != heard["nonce"], "Each message needs a nonce of its own.")
        start = time.monotonic()
        await ann.next("message")
        passed = time.monotonic() - start
        need(0.5 < passed < 2, f"Between two messages {passed:.1f} s passed, not one.")
        stored = await server.db.messages.count_documents({"user": "clock"})
        need(stored >= 2, "What it says should be stored, like all messages.")
    await nothing_left(before)


@check
async def check_pymongo(database, run_database) -> None:
    async with mongodb() as uri:
        need(uri, NO_MONGODB)
        place = {"MONGO_HOST": uri, "MONGO_DB_NAME": f"exercise-{ObjectId()}"}
        with patch.object(chat, "AsyncIOMotorClient", None):
            async with trying(run_database=run_database, **place) as server:
                need(
                    isinstance(server.db, database),
                    "The chat runs on another Database.",
                )
                client = server.db.db.client
                need(
                    isinstance(client, pymongo.AsyncMongoClient), "It is not PyMongo's."
                )
                options = server.db.db.messages
                majority = options.write_concern.document.get("w") == "majority"
                need(majority, "Without CLIENT_OPTIONS, a failover could take back.")
                ann, bob = await server.join("ann"), await server.join("bob")
                need((await ann.say("hello"))["id"] == 1, "Nothing was stored.")
                need(
                    (await bob.next("message"))["text"] == "hello", "Bob hears nothing."
                )
                names = set(await server.db.messages.index_information())
                need("user_id_1_nonce_1" in names, "The indexes are missing.")
                await client.drop_database(place["MONGO_DB_NAME"])
        with contextlib.suppress(pymongo.errors.InvalidOperation):
            await client.admin.command("ping")
            raise Lacking("The chat has stopped, and the client is still open.")


@check
async def check_health(attempt) -> None:
    def change(app):
        app.router.add_get("/health", attempt, name="health")

    public = patch.object(chat, "PUBLIC", chat.PUBLIC | {"health"})
    with public:
        async with trying(change=change) as server:
            visitor = await server.visitor()
            async with visitor.session.get("/health", allow_redirects=False) as answer:
                need(answer.status == 200, f"All is well, and it says {answer.status}.")

            class Away:
                def __getattr__(self, name):
                    raise pymongo.errors.AutoReconnect("the database is away")

            names = "db", "users", "messages", "online"
            with patch.multiple(server.db, **dict.fromkeys(names, Away())):
                async with visitor.session.get("/health") as answer:
                    need(answer.status == 503, "The database is away: that is a 503.")
            server.log.clear()
