"""Tests of the page, in real browsers; each name is a claim.

What depends on the engine is tried in Chromium, Firefox and WebKit; the rest in Chromium.
The browsers outlive a test, so these tests share one event loop. An interval that a test
would wait for stands in a `data-` attribute of the page; `hurry` shortens it.
"""

import asyncio
import contextlib
import json

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestServer, unused_port
from bson import ObjectId

import chat
from conftest import BROWSERS, PASSWORD, Chromium, need, optional, until

pytestmark = pytest.mark.asyncio(loop_scope="session")
fixture = pytest_asyncio.fixture(loop_scope="session")

ONLINE = "document.querySelector('#status[data-status=online]') !== null"
TEXTS = (
    "[...document.querySelectorAll('#messages [data-id] p')].map(p => p.textContent)"
)


# --- Real parts ---
class Chat:
    """The chat in this process, and what the tests do to it behind the page's back."""

    def __init__(self, server):
        self.url = str(server.make_url("/"))
        self.port = server.port
        self.room, self.db = server.app[chat.ROOM], server.app[chat.DATABASE]

    async def post(self, text, name="bob"):
        """Let a user say something, and wait until the room has been told."""
        user, nonce = {"_id": ObjectId(), "name": name}, str(ObjectId())
        number = await self.room.post(user, text, nonce)
        await until(lambda: self.room.history.last_broadcast >= number)
        return number

    async def post_many(self, count):
        for number in range(1, count + 1):
            await self.post(f"text {number}")

    def user_id(self, name):
        found = (c.user["_id"] for c in self.room.connections if c.user["name"] == name)
        return next(found)


@fixture
async def serve():
    """A function that serves the chat in this process; all are closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def serve(**settings):
            settings = chat.Settings(_env_file=None, **settings)
            server = TestServer(chat.init_app(settings))
            return Chat(await stack.enter_async_context(server))

        yield serve


@fixture
async def room(serve):
    """The chat with its default settings, in memory."""
    return await serve(MESSAGE_BURST=1_000)


class Proxy:
    """A TCP proxy that can go silent, as a network does: it closes nothing then."""

    def __init__(self, port):
        self.target = port
        self.lines = []  # each may be silenced, and is never heard again
        self.silent = self.hostile = False

    async def handle(self, reader, writer):
        try:
            address = "127.0.0.1", self.target
            far_reader, far_writer = await asyncio.open_connection(*address)
        except ConnectionError:
            return writer.close()
        line = {"silent": self.silent, "writers": [writer, far_writer]}
        self.lines.append(line)
        await asyncio.gather(
            self.pump(line, reader, far_writer), self.pump(line, far_reader, writer)
        )

    async def pump(self, line, reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                if self.hostile and b"upgrade: websocket" in data.lower():
                    break
                if not line["silent"]:
                    writer.write(data)
                    await writer.drain()
        if not line["silent"]:
            self.cut(line)

    def cut(self, line):
        for writer in line["writers"]:
            writer.close()

    def go_silent(self):
        """Forward nothing any more, neither for these connections nor for new ones."""
        self.silent = True
        for line in self.lines:
            line["silent"] = True

    def recover(self):
        """Forward for new connections; the old ones stay as dead as they are."""
        self.silent = False

    def cut_all(self):
        for line in self.lines:
            self.cut(line)


@fixture
async def proxy():
    """A function that puts a proxy before a port; all are closed at the end."""
    servers, proxies = [], []

    async def proxy(port):
        proxies.append(Proxy(port))
        server = await asyncio.start_server(proxies[-1].handle, "127.0.0.1", 0)
        servers.append(server)
        number = server.sockets[0].getsockname()[1]
        proxies[-1].url = f"http://127.0.0.1:{number}/"
        return proxies[-1]

    yield proxy
    for server in servers:
        server.close()
    for each in proxies:
        each.cut_all()


# --- What people do, in any browser ---
@pytest.fixture(params=["chromium", "firefox", "webkit"])
def engine(request):
    """Each of the three engines in turn."""
    found = request.getfixturevalue(request.param)
    return Chromium(found) if request.param == "chromium" else found


@fixture
async def open_window(engine):
    """A function that opens a window; all are closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def open_window(url, name=None):
            window = await stack.enter_async_context(engine.window())
            if name:
                await window.open(f"{url}signin")
                await window.run(f"({CREATE_ACCOUNT})({json.dumps(account(name))})")
            await window.open(url)
            if name:
                await window.wait(ONLINE)
            return window

        yield open_window


CREATE_ACCOUNT = """fields =>
    fetch("/signin", { method: "POST", body: new URLSearchParams(fields) }).then(r => r.status)
"""


def account(name):
    return {"login": name, "password": PASSWORD, "password2": PASSWORD, "email": ""}


async def texts(window):
    """What the log shows: sent messages, in order."""
    return await window.run(TEXTS)


async def hurry(window, **seconds):
    """Shorten intervals of the page."""
    await window.run(
        f"Object.assign(document.querySelector('.room').dataset, {json.dumps(seconds)})"
    )


async def wait_for_text(window, text):
    await window.wait(f"{TEXTS}.includes({json.dumps(text)})")


async def wait_for_status(window, *statuses):
    status = "document.getElementById('status').textContent"
    await window.wait(f"{json.dumps(statuses)}.includes({status})")


async def send(window, text):
    await window.fill("#text", f"{text}\n")


# --- In three engines ---
async def test_two_people_chat_in_two_windows(room, open_window):
    ann = await open_window(room.url, "ann")
    bob = await open_window(room.url, "bob")
    names = "[...document.querySelectorAll('#online li')].map(li => li.textContent)"
    assert await ann.wait(f"{names}.length === 2 && {names}") == ["ann", "bob"]
    await ann.wait("document.querySelector('.notice')?.textContent.includes('bob')")
    await send(ann, "hello, bob")
    await wait_for_text(bob, "hello, bob")
    await bob.fill("#text", "hello, ann")
    await bob.click("#send button")
    await wait_for_text(ann, "hello, ann")
    assert await texts(ann) == await texts(bob) == ["hello, bob", "hello, ann"]
    assert await ann.run("document.querySelectorAll('.own').length") == 1
    assert await bob.run("document.activeElement.id") == "text"
    await bob.open(room.url)
    await bob.wait(ONLINE)
    assert await texts(bob) == ["hello, bob", "hello, ann"]
    await bob.click("#signout button")
    await bob.wait("location.pathname === '/login'")
    await ann.wait("document.body.textContent.includes('bob left')")
    assert await ann.run(names) == ["ann"]


async def test_a_dead_connection_is_noticed_and_replaced(room, proxy, open_window):
    """The network falls silent both ways and closes nothing, as when a laptop slept."""
    between = await proxy(room.port)
    ann = await open_window(between.url, "ann")
    await hurry(ann, answer=1, retry=0.5)
    between.go_silent()
    await send(ann, "into the void")
    await wait_for_status(ann, "connecting", "offline")
    await room.post("meanwhile")
    between.recover()
    await wait_for_text(ann, "into the void")
    await send(ann, "afterwards")
    await wait_for_text(ann, "afterwards")
    assert await texts(ann) == ["meanwhile", "into the void", "afterwards"]
    assert await ann.run("document.querySelectorAll('.pending').length") == 0
