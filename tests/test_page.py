"""Tests of the page, in real browsers; each name is a claim.

Tests of what depends on the engine run in Chromium, Firefox and WebKit, the others in
Chromium. The browsers outlive a test, so all these tests share one event loop. The page
has its intervals in `data-` attributes; `hurry` shortens them, so that tests are fast.
"""

import asyncio
import contextlib
import json
import re
import signal
from datetime import UTC, datetime

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port
from bson import ObjectId

import chat
from tests.parts import (
    BROWSERS,
    PASSWORD,
    Chromium,
    ChromiumWindow,
    Window,
    form,
    freeze,
    need,
    optional,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")
fixture = pytest_asyncio.fixture(loop_scope="session")

ONLINE = "document.querySelector('#status[data-status=online]') !== null"
TEXTS = (
    "[...document.querySelectorAll('#messages [data-id] p')].map(p => p.textContent)"
)
FOCUS = "document.activeElement.id"
AT_END = "Math.abs(log.scrollTop) < 5"


# --- Real parts ---
class Chat:
    """The chat in this process, and what the tests do to it behind the page's back."""

    def __init__(self, server):
        self.url, self.port = str(server.make_url("/")), server.port
        self.room, self.db = server.app[chat.ROOM], server.app[chat.DATABASE]

    async def post(self, *texts, name="bob"):
        """Let a user say something, and wait until the room has been told."""
        for text in texts:
            user, nonce = {"_id": ObjectId(), "name": name}, str(ObjectId())
            number = await self.room.post(user, text, nonce)
        await until(lambda: self.room.history.last_broadcast >= number)

    async def post_many(self, count):
        await self.post(*[f"text {number}" for number in range(1, count + 1)])

    async def close_all(self):
        await chat.close(list(self.room.connections), 1001)

    async def blank(self, number):
        await chat.Message(self.db).blank(number)


@fixture
async def serve():
    """A function that serves the chat in this process; all are closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def serve(host="127.0.0.1", **settings):
            settings = chat.Settings(_env_file=None, **settings)
            server = TestServer(chat.init_app(settings), host=host)
            return Chat(await stack.enter_async_context(server))

        yield serve


@fixture
async def room(serve):
    """The chat with its default settings, in memory."""
    return await serve(MESSAGE_BURST=1_000)


class Proxy:
    """A TCP proxy that can go silent, as a network does: it closes nothing then."""

    def __init__(self, port):
        self.target, self.lines = port, []
        self.silent = self.hostile = False
        self.swap = b"", b""  # in what passes

    async def handle(self, reader, writer):
        try:
            far = await asyncio.open_connection("127.0.0.1", self.target)
        except ConnectionError:
            return writer.close()
        line = {"silent": self.silent, "writers": [writer, far[1]]}
        self.lines.append(line)  # each may be silenced, and is never heard again
        pump = self.pump
        await asyncio.gather(pump(line, reader, far[1]), pump(line, far[0], writer))

    async def pump(self, line, reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                if self.hostile and b"upgrade: websocket" in data.lower():
                    break
                if not line["silent"]:
                    writer.write(data.replace(*self.swap) if any(self.swap) else data)
                    await writer.drain()
        if not line["silent"]:
            self.cut(line)

    def cut(self, line):
        for writer in line["writers"]:
            writer.close()

    def cut_all(self):
        for line in self.lines:
            self.cut(line)

    def go_silent(self):
        """Forward nothing any more; `silent = False` is for new connections only."""
        self.silent = True
        for line in self.lines:
            line["silent"] = True


@fixture
async def proxy():
    """A function that puts a proxy before a port; all are closed at the end."""
    servers, proxies = [], []

    async def proxy(port):
        proxies.append(Proxy(port))
        servers.append(await asyncio.start_server(proxies[-1].handle, "127.0.0.1", 0))
        number = servers[-1].sockets[0].getsockname()[1]
        proxies[-1].url = f"http://127.0.0.1:{number}/"
        return proxies[-1]

    yield proxy
    for server, each in zip(servers, proxies, strict=True):
        server.close()
        each.cut_all()


@fixture
async def answering():
    """A function that serves one answer at every address, as a gateway does."""
    async with contextlib.AsyncExitStack() as stack:

        async def answering(answer):
            app = web.Application()
            app.router.add_route("*", "/{any:.*}", answer)
            return await stack.enter_async_context(TestServer(app, host="127.0.0.1"))

        yield answering


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
            return await enter(window, url, name)

        yield open_window


async def enter(window, url, name):
    """Open an address, as somebody who has an account, if there is a name."""
    if name:
        await window.open(f"{url}signin")
        fields = f"new URLSearchParams({json.dumps(form(name))})"
        body = f"{{ method: 'POST', body: {fields} }}"
        await window.run(f"fetch('/signin', {body}).then(() => null)")
    await window.open(url)
    if name:
        await window.wait("!document.getElementById('late')")  # its script has run
    return window


async def texts(window):
    """What the log shows: messages with a number, in order."""
    return await window.run(TEXTS)


async def shown(window, text):
    """Wait until a message with this text is in the log."""
    await window.wait(f"{TEXTS}.includes({json.dumps(text)})")


async def told(window, selector, text):
    """Wait until an element's text has a part."""
    element = f"document.querySelector({json.dumps(selector)})"
    await window.wait(f"{element}?.textContent.includes({json.dumps(text)})")


async def count(window, selector):
    return await window.run(f"document.querySelectorAll({json.dumps(selector)}).length")


async def value(window, selector="#text"):
    return await window.run(f"document.querySelector('{selector}').value")


async def write(window, *texts):
    for text in texts:
        await window.fill("#text", f"{text}\n")


async def hurry(window, **seconds):
    """Shorten intervals of the page."""
    dataset = "document.querySelector('.room').dataset"
    await window.run(f"void Object.assign({dataset}, {json.dumps(seconds)})")


async def read_above(window, number):
    """Scroll a message to the top of the log, and wait until the page has noticed."""
    await window.run(
        f"document.querySelector('[data-id=\"{number}\"]').scrollIntoView()"
    )
    await asyncio.sleep(0.1)


async def frames(window):
    """Wait until the page has drawn what it has: scrolling is noticed then."""
    frame = "requestAnimationFrame(() => requestAnimationFrame(() => done(null)))"
    await window.run(f"new Promise(done => {frame})")


async def top(window, number):
    """Where a message is in the log."""
    item = f"document.querySelector('[data-id=\"{number}\"]')"
    places = [f"{e}.getBoundingClientRect().top" for e in (item, "log")]
    return await window.run(" - ".join(places))


class Frame(Window):
    """The chat in a frame of a window of its own: its size is ours in any browser."""

    def __init__(self, window):
        self.window = window

    async def open(self, url, width, height):
        """Replace the page by a frame; pages of one address may look into each other."""
        size = f"width: {width}, height: {height}, src: {json.dumps(url)}"
        frame = f"Object.assign(document.createElement('iframe'), {{ {size} }})"
        await self.window.run(f"document.body.replaceChildren({frame})")
        await self.wait(ONLINE)
        return self

    async def resize(self, **size):
        await self.window.run(f"void Object.assign(frames[0].frameElement, {size})")
        await asyncio.sleep(0.2)

    async def run(self, script):
        inside = f"with (frames[0]) {{ return {script} }}"
        return await self.window.run(f"(function () {{ {inside} }})()")


# --- What people do, in Chromium ---
@fixture
async def open_page(chromium):
    """A function that opens a page, which must not have had an error at the end."""
    pages = []

    async def open_page(url, name=None, script=None, before="", **options):
        context = await chromium.new_context(**options)
        page = watch(await context.new_page())
        pages.append(page)
        await page.page.add_init_script(before)
        if script:
            page.script = script
            await page.page.route_web_socket("**/ws*", script.accept)
        await enter(
            page, url, name if options.get("java_script_enabled", True) else None
        )
        if name and not (script and script.is_away) and "/?" not in url:
            await page.wait(ONLINE)
        return page

    yield open_page
    for page in pages:
        await page.page.context.close()
    assert [error for page in pages for error in page.errors] == []


def watch(page):
    """Make a window of a page: it collects errors, and counts how often it loads."""
    window = ChromiumWindow(page)
    page.set_default_timeout(15_000)
    window.errors, window.loads, window.sockets = [], 0, []

    def count(_):
        window.loads += "/signin" not in page.url

    def note(message):
        if "Content Security Policy" in message.text:
            window.errors.append(message.text)

    page.on("pageerror", lambda error: window.errors.append(str(error)))
    page.on("console", note)
    page.on("load", count)
    page.on("websocket", lambda socket: window.sockets.append(socket))
    return window


async def second_tab(window, url):
    tab = watch(await window.page.context.new_page())
    await tab.open(url)
    return tab


async def hold_answers(page, pattern):
    """Hold the answers to a page's requests. Return two events: asked, and go on."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def hold(route):
        answer = await route.fetch()
        asked.set()
        await go_on.wait()
        await route.fulfill(response=answer)

    await page.page.route(pattern, hold)
    return asked, go_on


class Script:
    """The server's end of the page's WebSocket, played by a test."""

    def __init__(self, **welcome):
        self.welcome = {"type": "welcome", "user": "ann", "online": ["ann"], "last": 0}
        self.welcome |= welcome
        self.ends, self.received, self.is_away = [], [], False

    def accept(self, end):
        self.ends.append(end)
        end.on_message(lambda frame: self.received.append(json.loads(frame)))
        if not self.is_away:
            self.send(self.welcome)

    def send(self, *events):
        for event in events:
            self.ends[-1].send(json.dumps(event))

    def heartbeat(self, *numbers):
        self.send(*[{"type": "heartbeat", "last": number} for number in numbers])

    def message(self, number, text="", user="bob", nonce=None, time="10:00:00"):
        event = {"type": "message", "id": number, "user": user}
        event |= {"text": text or f"text {number}", "time": f"2026-01-02T{time}Z"}
        self.send(event | {"nonce": nonce or f"nonce {number}"})

    def receipt(self, number, position=-1):
        nonce = self.received[position]["nonce"]
        self.send({"type": "receipt", "nonce": nonce, "id": number})

    def own(self, number, position=-1, text=None):
        """Broadcast what the page has sent."""
        event = self.received[position]
        self.message(number, text or event["text"], "ann", event["nonce"])

    async def sent(self, count):
        await until(lambda: len(self.received) == count)
        return self.received[-1]


# --- In three engines: one conversation ---
async def test_two_people_chat_in_two_windows(room, open_window):
    ann = await open_window(room.url, "ann")
    bob = await open_window(room.url, "bob")
    names = "[...document.querySelectorAll('#online li')].map(li => li.textContent)"
    assert await ann.wait(f"{names}.length === 2 && {names}") == ["ann", "bob"]
    await told(ann, "#messages", "bob joined")
    await write(ann, "hello, bob")
    await shown(bob, "hello, bob")
    await bob.fill("#text", "hello, ann")
    await bob.click("#send button")
    for window in ann, bob:
        await shown(window, "hello, ann")
    assert await texts(ann) == await texts(bob) == ["hello, bob", "hello, ann"]
    assert await count(ann, ".own") == 1
    assert await bob.run(FOCUS) == "text"
    await bob.open(room.url)
    await bob.wait(ONLINE)
    assert await texts(bob) == ["hello, bob", "hello, ann"]
    await bob.click("#signout button")
    await bob.wait("location.pathname === '/login'")
    await told(ann, "#messages", "bob left")
    assert await ann.run(names) == ["ann"]


async def test_a_dead_connection_is_noticed_and_replaced(room, proxy, open_window):
    """The network falls silent both ways and closes nothing, as when a laptop slept."""
    between = await proxy(room.port)
    ann = await open_window(between.url, "ann")
    await ann.wait(ONLINE)
    await hurry(ann, answer=1, retry=0.5)
    between.go_silent()
    await write(ann, "into the void")
    await ann.wait(f"!({ONLINE})")
    await room.post("meanwhile")
    between.silent = False
    await shown(ann, "into the void")
    await write(ann, "afterwards")
    await shown(ann, "afterwards")
    assert await texts(ann) == ["meanwhile", "into the void", "afterwards"]
    assert await count(ann, ".pending") == 0


async def test_what_is_typed_during_a_restart_is_sent_once(start, mongodb, open_window):
    """The process is killed under an open page and started again on its port."""
    environment = on_mongodb(mongodb) | {"PORT": str(unused_port())}
    process = start(**environment).wait_until_ready()
    ann = await open_window(f"{process.url}/", "ann")
    await write(ann, "before")
    await shown(ann, "before")
    process.process.kill()
    await told(ann, "#status", "offline")
    await write(ann, "first", "second")
    await ann.fill("#text", "half a sen")
    start(**environment).wait_until_ready()
    await shown(ann, "second")
    assert await texts(ann) == ["before", "first", "second"]
    assert (await count(ann, ".pending"), await value(ann)) == (0, "half a sen")


def on_mongodb(uri):
    name = f"test-{ObjectId()}"
    return {"MONGO_HOST": uri, "MONGO_DB_NAME": name, "SECRET_KEY": "any text" * 4}


async def test_enter_of_an_input_method_sends_nothing(room, open_window):
    """Safari ends the composition first: only the key code tells then."""
    ann = await open_window(room.url, "ann")
    await ann.fill("#text", "にほん")
    for how in "isComposing: true", "keyCode: 229":
        event = (
            f"new KeyboardEvent('keydown', {{ key: 'Enter', bubbles: true, {how} }})"
        )
        await ann.run(f"document.getElementById('text').dispatchEvent({event})")
    assert await value(ann) == "にほん"
    await ann.type("\n")
    await shown(ann, "にほん")
    assert await texts(ann) == ["にほん"]


async def test_sign_up_errors_stand_beside_their_fields(room, open_window):
    ann = await open_window(f"{room.url}signin")
    email = "ann@bücher.example"  # in a field of type email, Chromium would change it
    wrong = {"login": "a!", "email": email, "password": "short", "password2": "other"}
    for name, text in wrong.items():
        await ann.fill(f"#{name}", text)
    await ann.click("main button")
    await ann.wait("document.querySelector('[aria-invalid]') !== null")
    sentences = {
        "login": "3 to 32",
        "password": "8 to 128",
        "password2": "not the same",
    }
    for name, sentence in sentences.items():
        field = f"document.getElementById('{name}')"
        note = f"document.getElementById({field}.getAttribute('aria-describedby'))"
        assert sentence in await ann.run(f"{note}.textContent")
        assert await ann.run(f"{field}.getAttribute('aria-invalid')") == "true"
    assert await value(ann, "#email") == email
    await ann.wait(f"{FOCUS} === 'login'")
    for name, text in form("ann").items():
        await ann.fill(f"#{name}", text)
    await ann.click("main button")
    await ann.wait(ONLINE)
    await ann.click("#signout button")
    await ann.wait("location.pathname === '/login'")
    for name, text in {"login": email, "password": PASSWORD}.items():
        await ann.fill(f"#{name}", text)  # what was typed signs in
    await ann.click("main button")
    await ann.wait(ONLINE)


# --- In three engines: what a text looks like ---
ADDRESSES = {  # a text, and what is a link in it
    "see https://example.org/a?b=c&d=e#f.": ["https://example.org/a?b=c&d=e#f"],
    "(http://example.org)": ["http://example.org"],
    "https://example.org/Foo_(bar)!": ["https://example.org/Foo_(bar)"],
    "https://пример.рф/путь, 例: https://例え.jp、": [
        "https://пример.рф/путь",
        "https://例え.jp",
    ],
    "Https://a.b/😀?q=ä": ["Https://a.b/😀?q=ä"],
    "www.example.org ann@example.org javascript:alert(1) ftp://a.b https://": [],
    '<https://a.b/"onclick=alert(1)>': ["https://a.b/"],
    "**https://a.b** «https://c.d» 'https://e.f'": [
        "https://a.b",
        "https://c.d",
        "https://e.f",
    ],
    "https://a.b\u202egpj.exe https://a.b\x85c \ufeffhttps://a.b\ufeff": ["https://a.b"]
    * 3,
}


async def test_web_addresses_are_links(room, open_window):
    """In a message that comes, and in one that was in the page."""
    links = """[...document.querySelectorAll('#messages p')].map((p) => [p.textContent,
        [...p.querySelectorAll('a')].map((a) => [a.getAttribute('href'), a.rel, a.target])
    ])"""
    ann = await open_window(room.url, "ann")
    await room.post(*ADDRESSES)
    await ann.wait(f"{TEXTS}.length === {len(ADDRESSES)}")
    rest = ["noopener noreferrer nofollow", "_blank"]
    expected = [
        [text, [[a, *rest] for a in found]] for text, found in ADDRESSES.items()
    ]
    assert await ann.run(links) == expected
    await ann.open(room.url)
    await ann.wait("document.querySelector('#messages a') !== null")
    assert await ann.run(links) == expected


# Where the characters of an element's text stand, from left to right.
PLACES = """((element) => {
    const node = element.firstChild, places = [], range = new Range();
    for (let n = 0; n < node.length; n++) {
        range.setStart(node, n);
        range.setEnd(node, n + 1);
        places.push([node.data[n], range.getBoundingClientRect().left]);
    }
    return places.sort((a, b) => a[1] - b[1]).map(([letter]) => letter).join("");
})"""


async def test_directions_do_not_mix(room, open_window):
    """A link shows where it leads; names leave a sentence in order; so does the box."""
    ann = await open_window(room.url, "ann")
    address = "https://evil.example/moc.elgoog//:sptth"
    await room.post("\u202e" + address, "שלום ann!")
    await shown(ann, "שלום ann!")
    assert await ann.run(f"{PLACES}(document.querySelector('#messages a'))") == address
    assert await count(ann, "mark") == 1  # it is about you
    await open_window(room.url, "סלמה")
    await told(ann, "#messages", "סלמה joined")
    line = "[...document.querySelectorAll('#messages .notice')].at(-1)"
    name, word = f"{line}.querySelector('bdi')", f"{line}.lastChild"
    left = "((node) => { const range = new Range(); range.selectNodeContents(node); "
    left += "return range.getBoundingClientRect().left; })"
    assert await ann.run(f"{left}({name}) < {left}({word})")
    style = "getComputedStyle(document.getElementById('text'))"
    assert await ann.run(f"document.getElementById('text').dir") == "auto"
    assert await ann.run(f"{style}.unicodeBidi") == "plaintext"  # as in a message


async def test_code_is_set_as_code_and_stays_as_it_was_typed(room, open_window):
    ann = await open_window(room.url, "ann")
    code = "```\nfor ann in https://a.b:\n\tpass\n```\n", "    indented\n    more"
    await room.post(f"See:\n{code[0]}So.", f"And:\n{code[1]}", "not ``` here")
    await shown(ann, "not ``` here")
    found = "[...document.querySelectorAll('#messages code')].map(e => e.textContent)"
    assert await ann.run(found) == list(code)
    assert (await texts(ann))[0] == f"See:\n{code[0]}So."
    assert await count(ann, "code a, code mark") == 0


async def test_a_long_text_is_folded_until_somebody_wants_it(serve, open_window):
    room = await serve(MAX_MESSAGE_LENGTH=5_000)
    await room.post("x\n" * 30, "x\n" * 15, "long " * 600)
    ann = await open_window(room.url, "ann")
    await room.post("y\n" * 1_000)
    await ann.wait(f"{TEXTS}.length === 4")
    heights = "[...document.querySelectorAll('#messages p')].map(p => p.offsetHeight)"
    boxes = "[...document.querySelectorAll('#messages li')].map(li => li.offsetHeight)"
    assert await count(ann, "details:not([open])") == 3
    assert max(await ann.run(boxes)) < 600 < 20_000 < max(await ann.run(heights))
    await ann.click("[data-id='1'] summary")
    await ann.wait("document.querySelector('[data-id=\"1\"]').offsetHeight > 700")
    await room.blank(4)  # an operator removes it, so there is nothing to unfold
    await ann.wait("document.querySelectorAll('details').length === 2")


# --- In three engines: your place ---
async def test_what_you_read_stays_where_it_is(room, open_window):
    """Whatever comes, is put in, unfolds or changes its size, above and below."""
    await room.post_many(40)
    await room.post("tall\n" * 40)  # 41
    await room.post(*[f"words {'and more ' * (n % 40)}" for n in range(40)])
    window = await open_window(room.url, "ann")
    ann = await Frame(window).open(room.url, 700, 500)
    await read_above(ann, 41)
    place = await top(ann, 41)

    async def unmoved(number=41):
        await asyncio.sleep(0.2)
        return abs(await top(ann, number) - place) <= 1

    await room.post(*["news " * 30] * 9)
    await told(ann, "#new", "9 new messages")
    assert await unmoved()
    await ann.run("document.getElementById('older').click()")
    await shown(ann, "text 1")
    assert await unmoved()
    await ann.run("document.querySelector('[data-id=\"41\"] summary').click()")
    await ann.wait("document.querySelector('details').open")
    assert await unmoved()
    await ann.resize(height=300)
    assert await unmoved()
    await read_above(ann, 60)  # now long lines above it, which are laid out anew
    place = await top(ann, 60)
    await ann.resize(width=400)
    assert await unmoved(60)
    await ann.run(
        "void document.documentElement.style.setProperty('font-size', '1.2em')"
    )
    assert await unmoved(60)


async def test_a_text_that_unfolds_at_the_end_stays_where_it_is(room, open_window):
    await room.post_many(5)
    await room.post("tall\n" * 40)
    ann = await open_window(room.url, "ann")
    await told(ann, "#messages", "ann joined")
    await ann.run("document.querySelector('summary').focus()")
    await asyncio.sleep(0.2)
    place = await top(ann, 6)
    await ann.click("summary")
    await room.post("news")
    await told(ann, "#new", "1 new message")
    assert abs(await top(ann, 6) - place) <= 1
    assert await ann.run("document.activeElement.localName") == "summary"
    assert await ann.run("document.querySelector('details').open")


async def test_the_end_stays_in_sight_whatever_grows(room, open_window):
    """A window, a font, a translation, the box."""
    await room.post_many(40)
    window = await open_window(room.url, "ann")
    ann = await Frame(window).open(room.url, 700, 500)
    for size in {"height": 300}, {"height": 900}, {"width": 400}:
        await ann.resize(**size)
        assert await ann.run(AT_END)
    for change in (
        "document.documentElement.style.fontSize = '150%'",
        "document.querySelectorAll('p').forEach(p => p.append(' and more'.repeat(9)))",
        "document.getElementById('text').style.height = '9em'",
    ):
        await ann.run(f"void ({change})")
        await asyncio.sleep(0.2)
        assert await ann.run(AT_END)
    await room.post("news")
    await shown(ann, "news")
    await asyncio.sleep(0.1)
    assert await ann.run(AT_END)
    assert await ann.run("document.getElementById('new').hidden")


@pytest.mark.parametrize("size", [16, 24, 32])
async def test_a_small_window_and_a_large_font_leave_all_in_reach(
    room, open_window, size
):
    """320 by 256 is a screen at 400 %: the page scrolls, nothing overlaps, sizes follow."""
    await room.post("hello")
    window = await open_window(room.url, "x" * 32)
    ann = await Frame(window).open(room.url, 20 * size, 16 * size)
    await ann.run(f"void (document.documentElement.style.fontSize = '{size}px')")
    await asyncio.sleep(0.2)
    text = "getComputedStyle(document.querySelector('#messages p')).fontSize"
    assert await ann.run(text) == f"{size}px"
    assert await ann.run("document.getElementById('log').clientHeight") >= 8 * size
    boxes = await ann.run(
        "['h1', '#status', '#user', '#signout button', '#log', '#text', '#send button']"
        ".map(s => document.querySelector(s).getBoundingClientRect())"
        ".map(({ left, right, top, bottom }) => [left, right, top, bottom])"
    )
    for n, (left, right, up, down) in enumerate(boxes):
        assert 0 <= left < right <= 20 * size
        for other in boxes[:n]:
            aside = left >= other[1] or right <= other[0]
            assert aside or up >= other[3] - 1 or down <= other[2] + 1


# --- In three engines: it believes only the chat ---
@pytest.mark.parametrize("status", [302, 401, 200])
async def test_what_a_gateway_answers_is_not_believed(
    room, proxy, answering, open_window, status
):
    """As in a hotel: until you have paid, the network answers in the chat's place."""
    await room.post_many(60)
    between = await proxy(room.port)
    ann = await open_window(between.url, "ann")
    await ann.wait(ONLINE)
    await hurry(ann, answer=2, retry=0.2)

    async def answer(request):
        headers = {"Location": "/login", "WWW-Authenticate": "Cookie realm=hotel"}
        text = "<p>Please pay"
        return web.Response(
            status=status if "login" not in request.path else 200,
            headers=headers,
            text=text,
        )

    gateway = await answering(answer)
    between.target = gateway.port
    between.cut_all()
    sentence = "in the chat's place" if status == 302 else "does not answer"
    await told(ann, "#reason", sentence)
    await ann.run("document.getElementById('older').click()")
    await told(ann, "#older-note", "could not be loaded")
    await asyncio.sleep(1)
    assert await ann.run("location.pathname") == "/"
    between.target = room.port
    between.cut_all()
    await ann.wait(ONLINE)
    assert await ann.run("document.getElementById('reason').textContent") == ""


async def test_signing_out_that_does_not_work_is_a_sentence(
    room, proxy, answering, open_window
):
    """The server is away, or a gateway takes the request."""
    between = await proxy(room.port)
    ann = await open_window(between.url, "ann")

    async def answer(request):
        return web.Response(status=302, headers={"Location": "/pay"})

    gateway = await answering(answer)
    for port in unused_port(), gateway.port:
        await ann.wait(ONLINE)
        between.target = port
        between.cut_all()
        await ann.click("#signout button")
        await told(ann, "#reason", "still signed in")
        between.target = room.port
        between.cut_all()


@pytest.mark.parametrize("missing", ["log.js", "chat.js", "connection.js"])
async def test_a_script_that_does_not_come_is_a_sentence(
    room, proxy, open_window, missing
):
    ann = await open_window(room.url, "ann")
    between = await proxy(room.port)
    between.swap = missing.encode(), b"z" * len(missing)
    await ann.open(between.url)
    style = "getComputedStyle(document.getElementById('late'))"
    late = f"{style}.visibility === 'visible'"
    assert not await ann.run(late)  # not at once: it usually comes
    await ann.wait(late)
    await ann.fill("#text", "lost")
    assert await value(ann) == ""


async def test_a_page_without_a_channel_to_other_tabs_works(room, proxy, open_window):
    between = await proxy(room.port)
    between.swap = b"window.BroadcastChannel", b"window.BroadcastCarrier"
    ann = await open_window(between.url, "ann")
    await write(ann, "hello")
    await shown(ann, "hello")
    await ann.click("#signout button")
    await ann.wait("location.pathname === '/login'")


async def test_the_page_works_at_an_address_of_ipv6(serve, open_window):
    room = await serve(host="::1")
    ann = await open_window(room.url, "ann")
    await write(ann, "hello")
    await shown(ann, "hello")


# --- Alive ---
async def test_a_silent_connection_is_noticed_though_nothing_is_sent(
    room, proxy, open_page
):
    between = await proxy(room.port)
    ann = await open_page(between.url, "ann")
    between.go_silent()
    await hurry(ann, silence=0.5, answer=0.5)
    await told(ann, "#status", "offline")
    assert await count(ann, "#online li") == 0
    await told(ann, "#reason", "does not answer")
    between.silent = False
    await ann.wait(ONLINE)
    assert await ann.run("document.getElementById('reason').textContent") == ""


async def test_waking_up_looks_at_the_clock_at_once(room, proxy, open_page):
    """A laptop that slept for an hour: its timers stood still, its clock did not."""
    between = await proxy(room.port)
    ann = await open_page(between.url, "ann")
    between.go_silent()
    later = "(now => Date.now = () => now + 3_600_000)(Date.now())"
    event = "document.dispatchEvent(new Event('visibilitychange'))"
    await ann.run(f"void ({later}, {event})")
    assert await ann.page.inner_text("#status") == "connecting"


async def test_a_late_close_of_an_old_socket_changes_nothing(room, open_page):
    """A browser takes up to a minute to close a dead socket."""
    slow = """window.WebSocket = class extends WebSocket {
        constructor(...all) { super(...all); (window.sockets ??= []).push(this); }
        close() { window.late = () => this.onclose?.({ code: 1006 }); }
    };"""
    ann = await open_page(room.url, "ann", before=slow)
    await hurry(ann, silence=0.1)
    await ann.wait("sockets.length > 1")
    await hurry(ann, silence=45)
    await ann.wait(ONLINE)
    await ann.run("late()")
    assert await ann.run(ONLINE)


PAUSES = """((setTimeout) => {
    window.pauses = [];
    window.setTimeout = (work, pause) => {
        if (!String(work).includes("connect")) return setTimeout(work, pause);
        window.pauses.push(pause);
        return setTimeout(work, 0);
    };
})(window.setTimeout);"""


@pytest.mark.parametrize("code, longest", [(1001, 750), (1011, 4_500)])
async def test_pauses_grow_to_less_than_five_seconds(room, open_page, code, longest):
    """It welcomes and hangs up again and again: 1001 is what a restart looks like."""
    script = Script()
    ann = await open_page(room.url, "ann", script, before=PAUSES)
    for number in range(9):
        await until(lambda number=number: len(script.ends) == number + 1)
        await ann.wait(ONLINE)
        await script.ends[-1].close(code=code)
        await ann.wait(f"pauses.length === {number + 1}")
    assert longest / 3 <= await ann.run("pauses.at(-1)") <= longest


# --- Nothing without a limit ---
async def test_two_processes_of_which_one_is_held_back(
    start, mongodb, proxy, open_page
):
    """The page comes back to a process that stands still for 10 s, then is behind."""
    environment = on_mongodb(mongodb)
    ahead = start(**environment).wait_until_ready()
    behind = start(**environment).wait_until_ready()
    between = await proxy(ahead.port)
    ann = await open_page(between.url, "ann")
    bob = await open_page(f"{ahead.url}/", "bob")
    await write(ann, "before")
    await shown(ann, "before")
    freeze(behind.process)
    expected = ["before"] + [f"while it stands {number}" for number in range(5)]
    await write(bob, *expected[1:])
    await shown(ann, expected[-1])
    between.target = behind.port
    between.cut_all()
    await write(ann, "typed meanwhile")
    await asyncio.sleep(10)
    await write(bob, "still ahead")
    await shown(bob, "still ahead")
    behind.process.send_signal(signal.SIGCONT)
    await shown(ann, "typed meanwhile")
    await shown(ann, "still ahead")
    await write(bob, "after it all")
    for page in ann, bob:
        await shown(page, "after it all")
    expected += ["still ahead", "typed meanwhile", "after it all"]
    assert await texts(ann) == await texts(bob) == expected
    assert ann.loads == 1


async def test_a_process_that_catches_up_makes_no_page_reload(room, open_page):
    await room.post_many(3)
    ann = await open_page(room.url, "ann", script := Script(last=1))
    script.heartbeat(2)
    for number in range(2, 5):  # what it is behind with; the page knows 2 and 3
        known = room.room.history.events.get(number, {})
        script.message(number, nonce=known.get("nonce"))
    script.heartbeat(4, 4)
    await shown(ann, "text 4")
    assert await texts(ann) == [f"text {number}" for number in range(1, 5)]
    assert ann.loads == 1


async def test_another_history_reloads_the_page_once_a_minute_at_most(room, open_page):
    """The server insists on fewer messages than the page has seen."""
    await room.post_many(3)
    ann = await open_page(room.url, "ann", script := Script(last=1))
    script.heartbeat(1)
    await asyncio.sleep(0.2)
    assert ann.loads == 1
    script.heartbeat(1)
    await until(lambda: ann.loads == 2 and len(script.ends) == 2)
    await ann.wait(ONLINE)
    script.heartbeat(1, 1, 1, 1, 1)
    script.message(9)  # a gap, which also wants a reload
    await shown(ann, "text 9")
    await asyncio.sleep(0.5)
    assert ann.loads == 2


@pytest.mark.parametrize("number", [9, 2])
async def test_a_gap_and_a_replaced_message_reload_the_page(room, open_page, number):
    """A number too far; a number that was another message."""
    await room.post_many(3)
    ann = await open_page(room.url, "ann", script := Script(last=3))
    script.message(number, nonce="another")
    await until(lambda: ann.loads == 2)


async def test_a_page_without_a_server_does_not_reload_until_there_is_one(
    room, open_page
):
    """Otherwise the browser's error page would take the place of the chat."""
    ann = await open_page(room.url, "ann", script := Script())
    await ann.run("void (sessionStorage.left = Date.now())")  # it reloaded just now
    script.message(9)
    script.is_away = True
    await script.ends[-1].close()
    await hurry(ann, reload=0.2)
    await asyncio.sleep(2)
    assert ann.loads == 1
    script.is_away = False
    script.send(script.welcome)
    await until(lambda: ann.loads == 2)


NO_STORAGE = """Object.defineProperty(window, "sessionStorage", {
    get() { throw new DOMException("refused", "SecurityError"); },
});"""
FULL_STORAGE = """Storage.prototype.setItem = () => {
    throw new DOMException("full", "QuotaExceededError");
};"""


async def test_a_page_without_storage_waits_before_it_reloads(room, open_page):
    """It cannot remember when it last did. So it waits until it is a minute old."""
    ann = await open_page(room.url, "ann", script := Script(), NO_STORAGE)
    script.message(9)
    await shown(ann, "text 9")
    script.heartbeat(9)
    await asyncio.sleep(0.5)
    assert ann.loads == 1
    await hurry(ann, reload=0.5)
    await until(lambda: script.heartbeat(9) or ann.loads == 2)


async def test_a_page_without_storage_does_not_reload_over_your_text(room, open_page):
    ann = await open_page(room.url, "ann", script := Script(), FULL_STORAGE)
    await hurry(ann, reload=0.1)
    asked = []
    ann.page.on("dialog", lambda dialog: asked.append(dialog))
    await ann.fill("#text", "half a sen")
    script.message(9)  # a gap
    script.heartbeat(9, 9, 9)
    await asyncio.sleep(0.5)
    assert (ann.loads, await value(ann)) == (1, "half a sen")
    back = "dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))"
    await ann.run(f"void setTimeout(() => {back})")
    await until(lambda: asked)
    await asked[0].dismiss()
    assert await value(ann) == "half a sen"
    await ann.page.fill("#text", "")
    await hurry(ann, answer=0.1)
    await until(lambda: script.heartbeat(9) or ann.loads == 2)


async def test_a_reload_that_is_stopped_leaves_a_page_that_works(room, open_page):
    ann = await open_page(room.url, "ann", script := Script())
    await hurry(ann, answer=1)
    asked = []
    await ann.page.route(room.url, lambda route: asked.append(route))  # no answer
    stop = "setTimeout(() => { window.stop(); document.title = 'stopped'; }, 300)"
    await ann.run(f"addEventListener('beforeunload', () => {stop}, {{ once: true }})")
    script.message(9)  # a gap
    await ann.wait("document.title === 'stopped'")
    assert len(asked) == 1
    await write(ann, "still here")
    await script.sent(1)
    assert await ann.run(ONLINE)
    script.receipt(10)
    await ann.page.unroute(room.url)
    await hurry(ann, reload=0.2)
    await until(lambda: script.heartbeat(9) or ann.loads == 2)  # it tries again


async def test_an_event_that_the_page_does_not_know_is_an_error(room, open_page):
    ann = await open_page(room.url, "ann", script := Script())
    script.send({"type": "from the future"})
    script.message(1)
    await shown(ann, "text 1")
    assert ann.errors == ["unknown event from the future"]
    ann.errors.clear()


# --- Who is speaking ---
async def test_a_page_never_sends_under_the_name_of_another_user(
    room, proxy, open_page
):
    """Bob signs in in Ann's browser while her page is cut off."""
    between = await proxy(room.port)
    ann = await open_page(between.url, "ann")
    bob = await open_page(between.url, "bob")
    cookies = [await each.page.context.cookies() for each in (ann, bob)]
    between.go_silent()
    await hurry(ann, answer=0.5, retry=0.2)
    await write(ann, "typed by ann")
    await ann.fill("#text", "half a sen")
    await told(ann, "#status", "offline")
    await ann.page.context.add_cookies(cookies[1])
    between.silent = False
    between.cut_all()  # the browser must not load a page over a line that is dead
    await ann.page.wait_for_selector(".room[data-user=bob] [data-status=online]")
    assert (await count(ann, ".pending"), await value(ann)) == (0, "")
    await write(ann, "typed by bob")
    await shown(ann, "typed by bob")
    await ann.page.context.add_cookies(cookies[0])
    await ann.page.reload()
    await shown(ann, "typed by ann")
    assert await value(ann) == "half a sen"
    names = await ann.page.locator("[data-id] strong").all_text_contents()
    assert names == ["bob", "ann"]


@pytest.mark.parametrize("path", ["", "?before=9"], ids=["chat", "older messages"])
async def test_signing_out_takes_the_other_tabs_to_the_sign_in(room, open_page, path):
    """From whichever page: the one of older messages has no script."""
    ann = await open_page(room.url, "ann")
    other = await second_tab(ann, room.url + path)
    await other.click("#signout button")
    await other.wait("location.pathname === '/login'")
    await ann.wait("location.href.endsWith('/login?why=ended')")
    assert "session has ended" in await ann.page.inner_text("[role=status]")


async def test_an_end_of_the_connection_is_no_end_of_the_session(room, open_page):
    """1001 means: connect again. Only our 401 leads to the sign-in."""
    ann = await open_page(room.url, "ann")
    await room.close_all()
    await until(lambda: len(ann.sockets) == 1)
    await ann.wait(ONLINE)
    await ann.page.context.clear_cookies()
    await room.close_all()
    await ann.page.wait_for_url("**/login?why=ended")


async def test_a_deleted_account_finds_itself_at_the_sign_in(room, open_page):
    ann = await open_page(room.url, "ann")
    [connection] = room.room.connections
    await chat.User(room.db).delete(connection.user["_id"])
    await ann.page.wait_for_url("**/login?why=ended")
    assert "the account is gone" in await ann.page.inner_text("[role=status]")


async def test_signing_in_again_in_another_tab_is_noticed_at_once(room, open_page):
    """The page has just reloaded, so it waits with the sign-in, and says why."""
    ann = await open_page(room.url, "ann")
    await ann.run("void (sessionStorage.left = Date.now())")
    cookies = await ann.page.context.cookies()
    await ann.page.context.clear_cookies()
    await hurry(ann, retry=1_000)
    await room.close_all()
    await told(ann, "#reason", "session has ended")
    await ann.page.context.add_cookies(cookies)
    await second_tab(ann, room.url)
    await ann.wait(ONLINE)
    assert await ann.page.inner_text("#reason") == ""
    assert ann.loads == 1  # the page is whole, so it stays


# --- The outbox ---
@pytest.mark.parametrize("storage", [NO_STORAGE, FULL_STORAGE], ids=["refused", "full"])
async def test_the_outbox_works_without_storage(room, open_page, storage):
    ann = await open_page(room.url, "ann", before=storage)
    await write(ann, "one", "two")
    await shown(ann, "two")
    assert await texts(ann) == ["one", "two"]


async def test_after_a_restart_in_memory_the_unsent_text_outlives_the_login(
    start, open_page
):
    """The account is gone with the process; what was typed stays in the tab."""
    port = str(unused_port())
    process = start(PORT=port).wait_until_ready()
    url = f"{process.url}/"
    ann = await open_page(url, "ann")
    process.process.kill()
    await told(ann, "#status", "offline")
    await write(ann, "sent while away")
    await ann.fill("#text", "half a sen")
    start(PORT=port).wait_until_ready()
    await ann.page.wait_for_url("**/login?why=ended")
    await enter(ann, url, "ann")
    await shown(ann, "sent while away")
    assert await texts(ann) == ["sent while away"]
    assert await value(ann) == "half a sen"


async def send_in_vain(ann, text):
    """Send a message that the server cannot save."""
    await write(ann, text)
    event = {"type": "error", "code": "not_saved", "text": "The page keeps trying."}
    ann.script.send(event | {"nonce": (await ann.script.sent(1))["nonce"]})
    await told(ann, "#reason", event["text"])


async def test_a_message_that_was_not_saved_is_sent_again(room, open_page):
    ann = await open_page(room.url, "ann", script := Script())
    await send_in_vain(ann, "not yet")
    assert await script.sent(2) == script.received[0]
    assert await count(ann, ".pending") == 1
    script.receipt(1)
    await ann.wait("document.getElementById('reason').textContent === ''")
    script.own(1)
    await shown(ann, "not yet")
    assert await count(ann, ".pending") == 0


async def test_a_message_that_was_saved_after_all_is_not_tried_again(room, open_page):
    """The server's deadline passed, and the write succeeded: its broadcast comes."""
    ann = await open_page(room.url, "ann", script := Script())
    await send_in_vain(ann, "saved")
    script.own(1)
    await ann.wait("document.getElementById('reason').textContent === ''")
    await asyncio.sleep(2.5)
    assert len(script.received) == 1


async def test_one_message_at_a_time_waits_for_its_receipt(room, open_page):
    """The receipt comes after the message, before it, or for a repeated message."""
    ann = await open_page(room.url, "ann", script := Script())
    await write(ann, "one", "two", "three")
    await asyncio.sleep(0.2)
    assert (await script.sent(1))["text"] == "one"
    script.own(1)
    await shown(ann, "one")
    assert len(script.received) == 1
    script.receipt(1)
    await script.sent(2)
    script.receipt(2)
    await script.sent(3)
    assert await count(ann, ".pending") == 2
    script.own(2, position=1)
    script.receipt(1)
    await ann.wait("document.querySelector('.pending') === null")
    assert await texts(ann) == ["one", "two"]


async def test_the_sender_sees_the_text_that_the_server_stored(room, open_page):
    """A server may have commands: it stores "/me waves" as something else."""
    ann = await open_page(room.url, "ann", script := Script())
    await write(ann, "/me waves")
    await script.sent(1)
    script.own(1, text="* ann waves")
    await shown(ann, "* ann waves")
    assert await texts(ann) == ["* ann waves"]


@pytest.mark.parametrize("has_nonce", [True, False])
async def test_a_refused_message_comes_back_and_the_next_one_goes(
    room, open_page, has_nonce
):
    ann = await open_page(room.url, "ann", script := Script())
    await write(ann, "refused", "the next")
    await ann.fill("#text", "half a sen")
    await ann.page.press("#text", "ArrowLeft")
    error = {"type": "error", "code": "bad_event", "text": "Not this."}
    nonce = {"nonce": (await script.sent(1))["nonce"]} if has_nonce else {}
    script.send(error | nonce)
    assert (await script.sent(2))["text"] == "the next"
    assert await value(ann) == "refused\nhalf a sen"
    assert await count(ann, ".pending") == 1
    script.receipt(1)
    script.own(1)
    await shown(ann, "the next")
    assert await ann.page.inner_text("#problem") == "Not this."
    box = "document.getElementById('text')"
    assert await ann.run(f"{box}.value[{box}.selectionStart]") == "n"
    await ann.page.reload()
    assert await value(ann) == "refused\nhalf a sen"


async def test_a_frame_too_big_for_the_server_comes_back(room, open_page):
    ann = await open_page(room.url, "ann", script := Script())
    await write(ann, "too big", "the next")
    await script.sent(1)
    await script.ends[0].close(code=1009)
    assert (await script.sent(2))["text"] == "the next"
    assert await value(ann) == "too big"
    assert "too long" in await ann.page.inner_text("#problem")
    await ann.type("!")
    assert await value(ann) == "too big!"


async def test_a_message_too_long_or_blank_stays_in_the_box(serve, open_page):
    """Spaces of no width: the page takes them for text, the server does not."""
    room = await serve(MAX_MESSAGE_LENGTH=10)
    ann = await open_page(room.url, "ann")
    for text, problem in {"eleven, no?": "at most 10", "\u200b" * 3: " "}.items():
        await write(ann, text)
        await told(ann, "#problem", problem)
        assert (await value(ann), await count(ann, ".pending")) == (text, 0)
    await write(ann, "😀" * 10)
    await shown(ann, "😀" * 10)


async def test_a_user_who_types_too_fast_loses_nothing(serve, open_page):
    room = await serve(MESSAGE_BURST=2, MESSAGES_PER_SECOND=10)
    ann = await open_page(room.url, "ann")
    expected = [f"message {number}" for number in range(6)]
    await write(ann, *expected)
    await shown(ann, expected[-1])
    assert await texts(ann) == expected


async def test_before_its_scripts_run_the_page_takes_no_text(room, open_page):
    """It would be lost: to the draft that is kept, or as a form sent to nowhere."""
    ann = await open_page(room.url, "ann")
    await ann.fill("#text", "half a sen")
    asked, go_on = await hold_answers(ann, "**/log.js")
    await ann.page.reload(wait_until="commit")
    await asked.wait()
    await ann.page.focus("#text")
    await ann.type("lost")
    assert await value(ann) == ""
    go_on.set()
    await ann.wait(ONLINE)
    await ann.type("tence")
    assert await value(ann) == "half a sentence"


async def test_a_tab_with_unsent_messages_asks_before_it_closes(room, open_page):
    ann = await open_page(room.url, "ann", script := Script())
    asked = []

    async def stay(dialog):
        asked.append(dialog.type)
        await dialog.dismiss()

    ann.page.on("dialog", stay)
    await write(ann, "unsent")
    await script.sent(1)
    await ann.page.close(run_before_unload=True)
    await until(lambda: asked == ["beforeunload"])
    script.message(9)  # a gap: the page's own reload asks nothing
    await until(lambda: ann.loads == 2)
    assert asked == ["beforeunload"]


# --- Flat ---
async def test_a_thousand_missed_messages_cost_one_layout(room, proxy, open_page):
    """Added in one task, they are laid out together, and spoken by no screen reader."""
    between = await proxy(room.port)
    ann = await open_page(between.url, "ann")
    await ann.run("""void (window.batches = [], new MutationObserver((changes) => {
        const added = changes.flatMap((c) => [...c.addedNodes]).filter((e) => e.dataset?.id);
        if (added.length) batches.push([added.length, log.ariaBusy]);
    }).observe(document.getElementById("messages"), { childList: true }))""")
    between.go_silent()
    between.cut_all()
    await ann.wait(f"!({ONLINE})")
    await room.post_many(1_000)
    between.silent = False
    await shown(ann, "text 1000")
    [[size, busy]] = await ann.run("batches")
    assert (busy, ann.loads) == ("true", 1)
    newest = [f"text {number}" for number in range(701, 1_001)]
    assert 300 <= size and (await texts(ann))[-300:] == newest


async def test_the_log_stays_flat_and_the_rest_is_behind_older_messages(
    room, open_page
):
    """The newest 300 lines stay, and up to 50 more until they are removed together."""
    await room.post_many(420)
    ann = await open_page(room.url, "ann", script := Script(last=420))
    for number in range(421, 1_421):
        script.message(number)
    await shown(ann, "text 1420")
    assert await count(ann, "#messages > li") < 352
    first = await ann.page.get_attribute("#messages [data-id]", "data-id")
    assert (await ann.page.get_attribute("#older", "href")).endswith(f"?before={first}")
    assert await ann.run(
        "document.querySelector('#messages > .day:first-child') !== null"
    )


@pytest.mark.parametrize("hidden", ["false", "true"])
async def test_while_you_read_above_the_log_stays_flat_too(room, open_page, hidden):
    """You read above, or you have left it there for the night."""
    ann = await open_page(room.url, "ann", script := Script())
    for number in range(1, 51):
        script.message(number)
    await shown(ann, "text 50")
    await read_above(ann, 9)
    place = await top(ann, 9)
    hide = f"Object.defineProperty(document, 'hidden', {{ value: {hidden} }})"
    await ann.run(f"void {hide}")
    for number in range(51, 5_051):
        script.message(number)
    await told(ann, "#new", "5000 new messages")
    assert await ann.page.title() == "(5000) Chat"
    assert await count(ann, "#messages > li") < 700
    assert abs(await top(ann, 9) - place) <= 1
    script.message(5_050, text="changed", nonce="nonce 5050")
    await ann.click("#new")
    await shown(ann, "changed")
    assert (await texts(ann))[-300:-1] == [f"text {n}" for n in range(4_751, 5_050)]
    assert await ann.run(AT_END)


async def test_two_thousand_people_cost_one_item_each(room, open_page):
    names = [f"user{number:04}" for number in range(2_000)]
    script = Script(online=["ann", *names])
    ann = await open_page(room.url, "ann", script)
    await ann.run("""void (window.changes = [],
        new MutationObserver((all) => changes.push(...all)).observe(
            document.getElementById("online"), { childList: true, subtree: true }))""")
    for change in ("joined", "newcomer"), ("left", "user0999"), ("joined", "ann"):
        script.send(dict(zip(("type", "user"), change, strict=True)))
    await ann.wait("changes.length === 2")
    expected = ["ann", "newcomer", *(name for name in names if name != "user0999")]
    assert await ann.page.locator("#online li").all_text_contents() == expected
    assert await ann.page.inner_text("#count") == "2001"


async def test_joins_and_leaves_that_follow_each_other_share_one_line(room, open_page):
    ann = await open_page(room.url, "ann", script := Script())
    for number in range(1_000):
        script.send({"type": "joined", "user": f"user{number:03}"})
    script.send({"type": "left", "user": "user007"})
    line = "996 others came or left · user997 joined · user998 joined · user999 joined"
    await told(ann, "#messages .notice", f"{line} · user007 left")
    assert await count(ann, "#messages .notice") == 1
    script.message(1)
    script.send({"type": "joined", "user": "user007"})
    await told(ann, "[data-id='1'] + .notice", "user007 joined")


async def test_scrolling_back_and_coming_back_to_the_end(room, open_page):
    await room.post_many(420)
    ann = await open_page(room.url, "ann")
    await read_above(ann, 371)
    await ann.run("(older.click(), older.click())")  # one at a time
    await shown(ann, "text 321")
    for first in 271, 221, 171, 121, 71, 21, 1:
        await ann.page.click("#older")
        await shown(ann, f"text {first}")
    assert await texts(ann) == [f"text {n}" for n in range(1, 421)]
    assert not await ann.page.is_visible("#older")
    assert await count(ann, ".day") == 1
    await ann.run("void (log.scrollTop = 0)")
    await asyncio.sleep(0.1)
    await room.post("text 421")
    await ann.wait("messages.children.length <= 302")  # with a day and a notice
    first = int(await ann.page.get_attribute("#messages [data-id]", "data-id"))
    await ann.page.click("#older")
    await shown(ann, f"text {first - 50}")
    assert await texts(ann) == [f"text {n}" for n in range(first - 50, 422)]


async def test_while_older_messages_load_you_go_on(room, open_page):
    """You type, and an operator takes a message back that is on its way."""
    await room.post_many(60)
    ann = await open_page(room.url, "ann")
    asked, go_on = await hold_answers(ann, "**/?before=*")
    await ann.page.click("#older")
    await asked.wait()
    assert await ann.page.inner_text("#older") == "Loading …"
    await ann.page.click("#text")
    await ann.type("hel")
    await room.blank(5)
    await room.blank(60)
    await ann.wait("document.querySelector('.removed') !== null")
    go_on.set()
    await shown(ann, "text 1")
    await ann.type("lo")
    assert await value(ann) == "hello"
    assert "text 5" not in await texts(ann)


async def test_older_messages_open_in_a_tab_of_their_own(room, open_page):
    await room.post_many(60)
    ann = await open_page(room.url, "ann")
    async with ann.page.context.expect_page() as opened:
        await ann.page.click("#older", modifiers=["Control"])
    await (await opened.value).wait_for_url("**/?before=11")
    assert len(await texts(ann)) == 50


async def test_older_messages_that_are_not_kept_are_a_sentence(room, open_page):
    """In memory the chat keeps about a thousand: the page knows of more."""
    await room.post_many(60)
    ann = await open_page(room.url, "ann")
    await room.db.messages.delete_many({})
    await ann.wait("log.ariaBusy === 'false'")
    await ann.page.click("#older")
    await told(ann, "#older-note", "not kept")
    assert await ann.run("log.ariaBusy") == "false"  # or the sentence is not spoken
    assert not await ann.page.is_visible("#older")
    assert await ann.run(FOCUS) == "log"
    await ann.run("void (log.scrollTop = 0)")
    await room.post_many(400)
    await shown(ann, "text 400")
    assert await ann.page.is_visible("#older")  # these are kept
    assert await ann.page.inner_text("#older-note") == ""


async def test_older_messages_that_do_not_come_are_a_sentence(room, open_page):
    await room.post_many(60)
    ann = await open_page(room.url, "ann")
    await ann.page.route("**/?before=*", lambda route: route.abort())
    await ann.page.click("#older")
    await told(ann, "#older-note", "could not be loaded")
    await ann.page.unroute("**/?before=*")
    await ann.page.click("#older")
    await shown(ann, "text 1")
    assert await ann.page.inner_text("#older-note") == ""


# --- What people expect ---
async def test_a_reader_who_scrolled_up_is_told_of_new_messages(room, open_page):
    """A touchpad moves by a few pixels, and a message comes after each move."""
    await room.post_many(50)
    ann = await open_page(room.url, "ann")
    await ann.wait(AT_END)
    await room.post("followed")
    await shown(ann, "followed")
    assert await ann.run(AT_END)
    assert not await ann.page.is_visible("#new")
    for number in range(4):
        await ann.run("void (log.scrollTop -= 9)")
        await frames(ann)
        await room.post(f"news {number}")
        await shown(ann, f"news {number}")
    assert await ann.page.inner_text("#new") == "4 new messages"
    await ann.page.click("#new")
    assert await ann.run(AT_END)
    assert not await ann.page.is_visible("#new")


async def test_a_message_keeps_its_day_and_a_group_its_name(room, open_page):
    """Also when you travel: all times are told again, and agree with their tooltips."""
    await room.post_many(1)
    ann = await open_page(room.url, "ann", script := Script(last=1), locale="en-US")
    client = await ann.page.context.new_cdp_session(ann.page)
    await client.send("Emulation.setTimezoneOverride", {"timezoneId": "UTC"})
    for number, clock in enumerate(["10:00:00", "10:04:00", "10:10:00", "23:30:00"], 2):
        script.message(number, time=clock)
    script.message(6, time="23:31:00", user="carl")
    await shown(ann, "text 6")
    names = (
        "[...document.querySelectorAll('#messages strong')].map(e => e.offsetWidth > 9)"
    )
    assert await ann.run(names) == [True, True, False, True, True, True]
    lines = (
        "[...document.querySelectorAll('.day, time')].map(e => e.innerText).slice(2)"
    )
    clocks = ["Friday, January 2, 2026", "10:00 AM", "10:04 AM", "10:10 AM", "11:30 PM"]
    shown_lines = await ann.run(lines)
    assert [line.replace("\u202f", " ") for line in shown_lines] == [
        *clocks,
        "11:31 PM",
    ]
    await client.send("Emulation.setTimezoneOverride", {"timezoneId": "Asia/Tokyo"})
    script.message(7, time="23:32:00", user="carl")
    await shown(ann, "text 7")
    assert [line.replace("\u202f", " ") for line in await ann.run(lines)] == [
        *["Friday, January 2, 2026", "7:00 PM", "7:04 PM", "7:10 PM"],
        *["Saturday, January 3, 2026", "8:30 AM", "8:31 AM", "8:32 AM"],
    ]
    agree = "[...document.querySelectorAll('time')].every(e => e.title.includes("
    assert await ann.run(agree + "e.innerText.slice(0, -3)))")


async def test_a_removed_message_says_so(room, open_page):
    """An operator blanks it: on an open page, in the history, and for a newcomer."""
    await room.post("fine", "to be removed", "tall\n" * 30)
    ann = await open_page(room.url, "ann")
    await room.blank(2)
    await room.blank(3)
    removed = "This message was removed."
    await ann.wait("document.querySelectorAll('.removed').length === 2")
    assert await texts(ann) == ["fine", removed, removed]
    assert await count(ann, "details") == 0
    await ann.page.reload()
    await ann.wait(ONLINE)
    assert await texts(ann) == ["fine", removed, removed]
    assert await count(ann, ".removed") == 2


async def test_unread_messages_are_counted_in_the_title(room, open_page):
    ann = await open_page(room.url, "ann")
    hide = "Object.defineProperty(document, 'hidden', { value: true, writable: true })"
    await ann.run(f"void {hide}")
    for name in "bob", "bob", "ann":  # one's own are not news
        await room.post("hello", name=name)
    await ann.wait(f"{TEXTS}.length === 3")
    assert await ann.page.title() == "(2) Chat"
    event = "document.dispatchEvent(new Event('visibilitychange'))"
    await ann.run(f"(document.hidden = false, {event})")
    assert await ann.page.title() == "Chat"


async def test_an_empty_room_says_so(room, open_page):
    ann = await open_page(room.url, "ann")
    assert await ann.page.is_visible("text=No messages yet")
    await write(ann, "first")
    await shown(ann, "first")
    assert not await ann.page.is_visible("text=No messages yet")


async def test_marks_stay_inside_their_item(room, open_page):
    await room.post("above")
    ann = await open_page(room.url, "ann")
    await told(ann, "#messages", "ann joined")
    above = ann.page.locator("[data-id='1'] p")
    before = await above.screenshot()
    await room.post("Z" + "\u0301" * 200)
    await ann.wait(f"{TEXTS}.length === 2")
    assert await above.screenshot() == before


async def test_printing_shows_all_that_is_loaded(room, open_page):
    await room.post_many(49)
    await room.post("tall\n" * 40)
    ann = await open_page(room.url, "ann")
    await ann.page.emulate_media(media="print")
    assert await ann.run("log.scrollHeight === log.clientHeight")
    first = await ann.page.locator("[data-id='1']").bounding_box()
    last = await ann.page.locator("[data-id='50']").bounding_box()
    height = await ann.run("document.documentElement.scrollHeight")
    assert 0 <= first["y"] < last["y"] < height
    assert last["height"] > 900
    assert not await ann.page.is_visible("#send")


async def test_a_page_in_a_frame_never_takes_the_focus(room, open_page):
    """As in a notebook, whose keyboard shortcuts would go into the chat."""
    ann = await open_page(room.url, "ann")
    cell = "Object.assign(document.createElement('input'), { id: 'cell' })"
    await ann.run(f"document.querySelector('header').append({cell})")
    await ann.page.focus("#cell")
    frame = "Object.assign(document.createElement('iframe'), { src: '/' })"
    await ann.run(f"document.querySelector('header').append({frame})")
    inside = ann.page.frame_locator("iframe")
    await inside.locator("#status[data-status=online]").wait_for()
    assert await ann.run(FOCUS) == "cell"
    await inside.locator("#text").fill("from the frame")
    await inside.locator("#text").press("Enter")
    await inside.locator("[data-id]", has_text="from the frame").wait_for()


async def test_markup_arrives_as_text(room, open_page):
    ann = await open_page(room.url, "ann")
    bob = await open_page(room.url, "bob")
    markup = "<img src=x onerror=\"document.title='hacked'\"><b>bold</b>\n&amp; 'x'"
    await ann.page.fill("#text", markup)
    await ann.page.press("#text", "Enter")
    for page in ann, bob:
        await shown(page, markup)
    await bob.page.reload()
    assert await texts(bob) == [markup]
    assert await count(bob, "#log img, #log b") == 0
    assert await bob.page.title() == "Chat"


async def test_forms_and_history_work_without_javascript(room, open_page):
    await room.post_many(60)
    bob = await open_page(room.url, java_script_enabled=False)
    await bob.page.context.request.post(f"{room.url}signin", form=form("bob"))
    await bob.open(room.url)
    messages = bob.page.locator("[data-id] p")
    assert (await messages.all_inner_texts())[0] == "text 11"
    box = await messages.last.bounding_box()
    assert 0 < box["y"] < 720  # it begins at the newest
    assert "needs JavaScript" in await bob.page.inner_text("noscript")
    await bob.page.click("#older")
    assert (await messages.all_inner_texts())[0] == "text 1"
    await bob.page.click("text=Sign out")
    await bob.page.wait_for_url("**/login")


# --- It says why ---
async def test_a_browser_that_keeps_no_cookie_is_told(room, proxy, open_page):
    between = await proxy(room.port)
    between.swap = b"Set-Cookie", b"Not-Cookie"  # the browser never gets to see it
    ann = await open_page(f"{between.url}signin")
    for name, text in form("ann").items():
        await ann.page.fill(f"#{name}", text)
    await ann.page.click("main button")
    await told(ann, "[role=status]", "did not keep the cookie")


async def test_too_many_windows_are_told(serve, open_page):
    room = await serve(CONNECTIONS_PER_PERSON=1)
    ann = await open_page(room.url, "ann")
    other = await second_tab(ann, room.url)
    await told(other, "#reason", "too many windows")
    await hurry(other, retry=0.2)
    await ann.page.close()
    await other.wait(ONLINE)
    assert await other.page.inner_text("#reason") == ""


@pytest.mark.parametrize(
    "status, sentence", [(503, "out of service"), (502, "does not answer")]
)
async def test_a_server_that_has_no_time_is_told(room, open_page, status, sentence):
    ann = await open_page(room.url, "ann", script := Script())
    await ann.page.route("**/ws", lambda route: route.fulfill(status=status))
    script.is_away = True
    await script.ends[-1].close()
    await hurry(ann, answer=0.2)  # the next one does not answer
    await told(ann, "#reason", sentence)


async def test_a_proxy_that_passes_no_websockets_is_named(room, proxy, open_page):
    between = await proxy(room.port)
    ann = await open_page(between.url, "ann")
    await hurry(ann, retry=0.2)
    between.hostile = True
    between.cut_all()
    await told(ann, "#reason", "blocks WebSockets")
    assert len(ann.sockets) >= 3  # it did not say so after the first
    between.hostile = False
    await ann.wait(ONLINE)
    assert await ann.page.inner_text("#reason") == ""


# --- For everybody ---
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing(room, open_page, scheme):
    name = "axe_playwright_python.async_playwright"
    axe = need(optional(name), f"no axe: {BROWSERS}").Axe()
    look = {"color_scheme": scheme}
    empty = await open_page(room.url, "bea", **look)
    problems = [await axe.run(empty.page)]
    await room.post("hello ann https://example.org\n    code", "x\n" * 30, "", "hello")
    ann = await open_page(room.url, "ann", **look)
    await write(ann, "mine")
    await shown(ann, "mine")
    await ann.run("void (document.getElementById('reason').textContent = 'A reason.')")
    script = Script(user="carl", online=["carl"])
    waiting = await open_page(room.url, "carl", script, **look)
    await write(waiting, "pending")
    wrong = await open_page(f"{room.url}signin", **look)
    for name, text in {"login": "a!", "password": "x", "password2": "y"}.items():
        await wrong.page.fill(f"#{name}", text)
    await wrong.page.click("main button")
    ended = await open_page(f"{room.url}login?why=ended", **look)
    history = await second_tab(ann, f"{room.url}?before=9")
    problems += [await axe.run(w.page) for w in (ann, waiting, wrong, ended, history)]
    for found in problems:
        assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_placeholder_can_be_read(room, open_page, scheme):
    """axe does not look at it: 4.5 to 1 is what WCAG asks for."""
    ann = await open_page(room.url, "ann", color_scheme=scheme)
    colours = """[getComputedStyle(document.getElementById("text"), "::placeholder").color,
        getComputedStyle(document.getElementById("text")).backgroundColor]"""

    def light(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        parts = [
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        ]
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    dark, bright = sorted(map(light, await ann.run(colours)))
    assert (bright + 0.05) / (dark + 0.05) >= 4.5


async def test_on_a_phone_enter_starts_a_new_line(room, open_page):
    """Its keyboard has no Shift+Enter; the button sends. Everything fits."""
    size = {"width": 360, "height": 560}
    options = {"viewport": size, "is_mobile": True, "has_touch": True}
    ann = await open_page(room.url, "x" * 32, **options)
    await write(ann, "one")
    await ann.type("two")
    assert await value(ann) == "one\ntwo"
    await ann.page.tap("#send button")
    await shown(ann, "one\ntwo")
    assert await ann.page.is_visible("text=starts a new line") is False
    await room.post("long" * 200)
    wrong = await open_page(f"{room.url}signin", **options)
    for page in ann.page, wrong.page:
        assert await page.evaluate("document.documentElement.scrollWidth") == 360
    box = await ann.page.locator("#send button").bounding_box()
    assert box["y"] + box["height"] <= 560


async def test_going_back_to_a_form_that_was_refused_shows_it(room, open_page):
    ann = await open_page(f"{room.url}login")
    for name, text in {"login": "ann", "password": "wrong"}.items():
        await ann.page.fill(f"#{name}", text)
    await ann.page.click("main button")
    await told(ann, ".error", "No account")
    await ann.page.click("text=Create an account")
    await ann.page.wait_for_url("**/signin")
    await ann.page.go_back()
    await told(ann, "h1", "Sign in")


async def test_the_chat_works_by_keyboard_alone(room, open_page):
    ann = await open_page(f"{room.url}signin")
    for text in "ann", "", PASSWORD, PASSWORD:
        await ann.page.keyboard.press("Tab")
        await ann.type(text)
    await ann.page.keyboard.press("Enter")
    await ann.wait(ONLINE)
    await ann.type("one")
    await ann.page.keyboard.press("Shift+Enter")
    await ann.type("two\n")
    await shown(ann, "one\ntwo")
    assert await ann.run(FOCUS) == "text"
    await ann.page.keyboard.press("Shift+Tab")
    assert await ann.run(FOCUS) == "log"


async def test_forced_colours_leave_edges_and_a_mark(room, open_page):
    """High contrast takes the backgrounds away."""
    await room.post("hello")
    ann = await open_page(room.url, "ann", forced_colors="active")
    await write(ann, "mine")
    await shown(ann, "mine")
    width = "e => parseFloat(getComputedStyle(e).borderInlineEndWidth)"
    assert await ann.page.locator("#send button").evaluate(width) >= 1
    other, own = await ann.page.locator("[data-id]").all()
    assert await own.evaluate(width) > await other.evaluate(width)


async def test_the_live_region_changes_once_for_each_message(room, open_page):
    """A screen reader speaks what is added, and text that changes."""
    await room.post("before")
    ann = await open_page(room.url, "ann")
    await told(ann, "#messages", "ann joined")
    await ann.run("""void (window.spoken = [], new MutationObserver((changes) => {
        for (const { addedNodes, type, target } of changes) {
            spoken.push(...[...addedNodes].map((node) => node.textContent));
            if (type === "characterData") spoken.push(target.data);
        }
    }).observe(log, { childList: true, characterData: true, subtree: true }))""")
    await until(lambda: datetime.now(UTC).second < 55)  # or "14:01" becomes "14:02"
    await write(ann, "mine")
    await shown(ann, "mine")
    await room.post("theirs", "theirs, too")  # of a group each has its name
    await shown(ann, "theirs, too")
    spoken = await ann.run("spoken")
    assert [re.sub(r"\d+:.*M", "", text) for text in spoken] == [
        "ann mine",
        "bob theirs",
        "bob theirs, too",
    ]


async def test_a_translator_leaves_names_alone(room, open_page):
    await room.post("hello")
    ann = await open_page(room.url, "ann")
    for selector in "#user", "#online li", "#messages strong":
        found = ann.page.locator(selector).first
        assert await found.get_attribute("translate") == "no"
