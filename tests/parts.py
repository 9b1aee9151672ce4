"""What the tests use: the people of a chat, and real parts (the chat as a process,
MongoDB servers, browsers). The fixtures that start them are in ../conftest.py.
"""

import asyncio
import contextlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pymongo
import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer, unused_port
from bson import ObjectId

import chat
from workshop.mongodb import find_mongod

ROOT = Path(__file__).parent.parent
PASSWORD = "correct horse"
KEY = "any text of 32 characters or more"
# aiohttp-session 2.12 still keeps its session under a plain string key. In CI every
# other warning is an error.
WARNINGS = "error," * ("CI" in os.environ) + "ignore:It is recommended to use web"


def need(thing, reason):
    """Return a thing that a test needs; where there is none, skip, or fail in CI."""
    if not thing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return thing


def need_mongod():
    """Return the path of a MongoDB server."""
    return need(find_mongod(), "no mongod: pip install -r .ci/requirements.txt")


def optional(name):
    found = importlib.util.find_spec(name.partition(".")[0])
    return found and importlib.import_module(name)


# --- What people do ---
def form(name, **more):
    return {"login": name, "password": PASSWORD, "password2": PASSWORD} | more


async def sign_in(server, name="ann", **more):
    """Create an account as a browser would and return the visitor who has it."""
    visitor = await server.visitor()
    response = await visitor.post("/signin", data=form(name, **more))
    assert (response.status, response.url.path) == (200, "/")
    return visitor


async def connect(visitor, after=None):
    """Open a WebSocket, read up to `welcome`, and keep both with it."""
    ws = await visitor.ws_connect("/ws" if after is None else f"/ws?after={after}")
    ws.replayed = []
    while (event := await read(ws))["type"] == "message":
        ws.replayed.append(event)
    assert event["type"] == "welcome"
    ws.welcome = event
    return ws


async def read(ws, *types, **more):
    """Return the next event, or the next of one of these types, with these values."""
    while True:
        event = json.loads(await ws.receive_str(timeout=10))
        if (not types or event["type"] in types) and more.items() <= event.items():
            return event


async def send_only(ws, text, nonce):
    await ws.send_json({"type": "message", "text": text, "nonce": nonce})


async def send(ws, text, nonce):
    """Send a message and return the answer to it: a receipt or an error."""
    await send_only(ws, text, nonce)
    return await read(ws, "receipt", "error", nonce=nonce)


async def say(ws, text, nonce=None):
    """Send a new message; wait for its receipt and its broadcast, and return that."""
    nonce = nonce or str(ObjectId())
    await send_only(ws, text, nonce)
    kinds = "receipt", "message", "error"
    answers = [await read(ws, *kinds, nonce=nonce) for _ in range(2)]
    found = {event["type"]: event for event in answers}
    assert found["receipt"]["id"] == found["message"]["id"]
    return found["message"]


async def closed(ws):
    """Read what is left and return the close code."""
    async with asyncio.timeout(30):
        async for _ in ws:
            pass
    return ws.close_code


def shown_ids(page):
    return [int(number) for number in re.findall(r'data-id="(\d+)"', page)]


# --- Waiting ---
def can_connect(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True


def wait_for(claim, seconds=20):
    """Wait until a claim holds and return what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := claim()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


async def until(claim, seconds=20):
    """Wait, while the chat in this process goes on, until a claim or a query holds."""
    deadline, pause = time.monotonic() + seconds, 0.01  # longer each time: asking costs
    while True:
        found = claim()
        if inspect.isawaitable(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(pause)
        pause = min(1.3 * pause, 0.1)


# --- Real parts: MongoDB ---
def freeze(process):
    """Stop a child process, and wait until all its threads have stopped."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


class Mongod:
    """A real MongoDB server that can be frozen, killed and started again."""

    def __init__(self, folder, *options):
        self.port, self.folder, self.options = unused_port(), folder, options
        self.uri = f"mongodb://127.0.0.1:{self.port}"
        folder.mkdir()
        self.start()

    def start(self):
        address = ["--bind_ip", "127.0.0.1", "--port", str(self.port)]
        store = ["--dbpath", self.folder, "--wiredTigerCacheSizeGB", "0.25"]
        command = [need_mongod(), *address, *store, "--quiet", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.command("ping")

    def command(self, *command, **more):
        with pymongo.MongoClient(self.uri, directConnection=True) as client:
            return client.admin.command(*command, **more)

    def freeze(self):
        freeze(self.process)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()


class ReplicaSet:
    """Real servers that hold the same data and elect one of them to take writes."""

    def __init__(self, folder, size):
        options = "--replSet", "rs0"
        self.members = [Mongod(folder / str(n), *options) for n in range(size)]
        hosts = [f"127.0.0.1:{member.port}" for member in self.members]
        config = {"_id": "rs0", "settings": {"electionTimeoutMillis": 2000}}
        config["members"] = [{"_id": n, "host": host} for n, host in enumerate(hosts)]
        self.members[0].command("replSetInitiate", config)
        self.uri = f"mongodb://{','.join(hosts)}/?replicaSet=rs0"
        self.primary()

    def primary(self):
        """Return the member that takes writes, as soon as there is one."""
        with pymongo.MongoClient(self.uri) as client:
            port = wait_for(lambda: client.primary)[1]
        return next(member for member in self.members if member.port == port)

    def kill(self):
        for member in self.members:
            member.kill()


def on(uri, **more):
    """Settings for a database of one's own at a URI."""
    more |= {"MONGO_DB_NAME": f"test-{ObjectId()}", "SECRET_KEY": KEY}
    return chat.Settings(MONGO_HOST=uri, **more)


# --- Real parts: the chat, here or in a process of its own ---
class Server(TestServer):
    """Serve as `web.run_app` does: handlers go on when their client has hung up."""

    async def _make_runner(self, **options):
        return await super()._make_runner(**options | {"handler_cancellation": False})


class Process:
    """`python chat.py`, as a user starts it, or another script that runs the chat.

    Its output goes through a pipe: unless each line leaves at once, nothing starts.
    """

    def __init__(self, script=ROOT / "chat.py", *before, **environment):
        defaults = {"PORT": "0", "PYTHONWARNINGS": WARNINGS, "PYTHONPATH": str(ROOT)}
        self.lines = []
        self.process = subprocess.Popen(
            [*before, sys.executable, script],
            env=clean_environment() | defaults | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_ready(self, seconds=60):
        """Read what it says until it serves; kill it if it does not say so in time."""
        deadline = threading.Timer(seconds, self.process.kill)
        deadline.start()
        while "CTRL+C" not in "".join(self.lines):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.lines.append(line)
        deadline.cancel()
        self.port = int(re.search(r"http://\S+:(\d+)", "".join(self.lines))[1])
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def stop(self, number=signal.SIGINT, seconds=20):
        """Stop it; return its exit code, what it said and what it complained of."""
        self.process.send_signal(number)
        return self.end(seconds)

    def end(self, seconds=20):
        """Wait until it ends by itself."""
        output, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, "".join(self.lines) + output, errors


def clean_environment():
    names = {*chat.Settings.model_fields, "PYTHONUNBUFFERED"}
    return {key: value for key, value in os.environ.items() if key not in names}


# --- Real parts: browsers ---
ENTER = "\ue007"  # the key, as WebDriver names it
BROWSERS = "install it with .ci/requirements.txt and .ci/run's list of Debian packages"
MINIBROWSER = next(Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"), None)
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--force-color-profile=srgb"]
CHROMIUM_FLAGS += ["--disable-background-networking"]


def program(*names):
    """Return the path of a program that a test needs."""
    found = filter(None, map(shutil.which, names))
    return need(next(found, None), f"no {names[0]}: {BROWSERS}")


@contextlib.asynccontextmanager
async def launch_chromium():
    playwright = need(optional("playwright.async_api"), f"no playwright: {BROWSERS}")
    # Chromium without a window around its pages: each costs a third.
    names = "chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"
    async with playwright.async_playwright() as driver:
        options = {"executable_path": program(*names), "args": CHROMIUM_FLAGS}
        async with await driver.chromium.launch(**options) as browser:
            yield browser


@contextlib.contextmanager
def running(*command, **options):
    """A program that runs in the background and is killed at the end."""
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


class Window:
    """A window with cookies of its own, in any browser. Subclasses speak to theirs."""

    async def wait(self, script, seconds=20):
        """Wait until a JavaScript expression is true, and return its value."""

        async def value():
            with contextlib.suppress(Exception):  # another page is loading
                return await self.run(script)

        return await until(value, seconds)

    async def click(self, selector):
        await self.run(f"{await self.find(selector)}.click()")

    async def find(self, selector):
        element = f"document.querySelector({json.dumps(selector)})"
        await self.wait(f"{element} !== null")
        return element

    async def fill(self, selector, text):
        element = await self.find(selector)
        await self.run(f"{element}.focus(), {element}.select()")
        await self.type(text)


class ChromiumWindow(Window):
    def __init__(self, page):
        self.page = page

    async def open(self, url):
        await self.page.goto(url)

    async def run(self, script):
        return await self.page.evaluate(f"() => ({script})")

    async def type(self, text):
        await self.page.keyboard.type(text)


class Chromium:
    def __init__(self, browser):
        self.browser = browser

    @contextlib.asynccontextmanager
    async def window(self):
        async with await self.browser.new_context() as context:
            yield ChromiumWindow(await context.new_page())


class FirefoxWindow(Window):
    def __init__(self, browser, context):
        self.command, self.context = browser.command, context

    async def open(self, url):
        options = {"context": self.context, "url": url, "wait": "complete"}
        await self.command("browsingContext.navigate", **options)

    async def run(self, script):
        script = f"(async () => JSON.stringify(await ({script})))()"
        options = {"target": {"context": self.context}, "awaitPromise": True}
        answer = await self.command("script.evaluate", expression=script, **options)
        assert answer["type"] == "success", answer
        return json.loads(answer["result"].get("value", "null"))

    async def type(self, text):
        letters, kinds = text.replace("\n", ENTER), ("keyDown", "keyUp")
        strokes = [{"type": kind, "value": key} for key in letters for kind in kinds]
        keys = {"type": "key", "id": "keyboard", "actions": strokes}
        await self.command("input.performActions", actions=[keys], context=self.context)


class Firefox:
    """Firefox, driven by WebDriver BiDi: JSON commands and answers on one WebSocket."""

    def __init__(self, ws):
        self.ws, self.number = ws, 0

    async def command(self, method, **params):
        self.number += 1
        await self.ws.send_json({"id": self.number, "method": method, "params": params})
        answer = {}
        while answer.get("id") != self.number:  # or an event, such as a loaded page
            answer = await self.ws.receive_json(timeout=60)
        assert answer["type"] == "success", answer
        return answer["result"]

    @contextlib.asynccontextmanager
    async def window(self):
        user = await self.command("browser.createUserContext")
        window = await self.command("browsingContext.create", type="window", **user)
        yield FirefoxWindow(self, window["context"])
        await self.command("browser.removeUserContext", **user)


class WebKitWindow(Window):
    def __init__(self, session):
        self.session = session

    async def open(self, url):
        await self.session("/url", url=url)

    async def run(self, script):
        return await self.session("/execute/sync", script=f"return {script}", args=[])

    async def type(self, text):
        [element] = (await self.run("document.activeElement")).values()
        await self.session(f"/element/{element}/value", text=text.replace("\n", ENTER))


class WebKit:
    """WebKit (the engine of Safari), driven by WebDriver: JSON commands over HTTP."""

    def __init__(self, client, environment):
        self.client, self.environment = client, environment

    @contextlib.asynccontextmanager
    async def window(self):
        """Start a driver and a browser for it: a driver has one session at a time."""
        port = unused_port()
        driver = program("WebKitWebDriver"), f"--port={port}"
        options = {"binary": str(MINIBROWSER), "args": ["--automation"]}
        wanted = {"alwaysMatch": {"webkitgtk:browserOptions": options}}
        address = f"http://127.0.0.1:{port}/session"

        async def session(path="", method="POST", **body):
            async with self.client.request(method, address + path, json=body) as answer:
                value = (await answer.json())["value"]
                assert answer.status == 200, value
                return value

        with running(*driver, env=self.environment):
            await until(lambda: can_connect(port))
            address += "/" + (await session(capabilities=wanted))["sessionId"]
            yield WebKitWindow(session)
            await session(method="DELETE")


@contextlib.asynccontextmanager
async def launch_firefox(profile):
    port = unused_port()
    options = ["--headless", "--no-remote", f"--remote-debugging-port={port}"]
    options += ["--profile", profile, "about:blank"]
    with running(program("firefox-esr", "firefox"), *options):
        await until(lambda: can_connect(port), seconds=60)
        options = {"url": f"ws://127.0.0.1:{port}/session", "max_msg_size": 0}
        async with ClientSession() as client, client.ws_connect(**options) as ws:
            browser = Firefox(ws)
            await browser.command("session.new", capabilities={})
            yield browser
            await browser.command("session.end")


@contextlib.asynccontextmanager
async def launch_webkit():
    need(MINIBROWSER and program("WebKitWebDriver"), f"no WebKit: {BROWSERS}")
    with running(program("Xvfb"), "-displayfd", "1", stdout=subprocess.PIPE) as screen:
        display = f":{int(screen.stdout.readline())}"
        async with ClientSession() as client:
            yield WebKit(client, os.environ | {"DISPLAY": display})
