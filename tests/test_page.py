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
TEXTS = "[...document.querySelectorAll('#messages [data-id] p')].map(p => p.textContent)"
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
    await window.run(f"document.querySelector('[data-id=\"{number}\"]').scrollIntoView()")
    await asyncio.sleep(0.1)


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
        await enter(page, url, name if options.get("java_script_enabled", True) else None)
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
    page.on("websocket", window.sockets.append)
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
        event = f"new KeyboardEvent('keydown', {{ key: 'Enter', bubbles: true, {how} }})"
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
    sentences = {"login": "3 to 32", "password": "8 to 128", "password2": "not the same"}
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
    expected = [[text, [[a, *rest] for a in found]] for text, found in ADDRESSES.items()]
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
    await ann.run("void document.documentElement.style.setProperty('font-size', '1.2em')")
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
