"""Tests of the page, in real browsers; each name is a claim.

Tests of what depends on the engine run in Chromium, Firefox and WebKit, the others in
Chromium. The browsers outlive a test, so all tests here share one event loop. `hurry`
shortens the page's intervals."""

import asyncio
import contextlib
import json
import re
from datetime import UTC, datetime

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import RawTestServer, TestServer, unused_port
from bson import ObjectId

import chat
from tests import parts
from tests.parts import PASSWORD, ChromiumWindow, form, until

pytestmark = pytest.mark.asyncio(loop_scope="session")
fixture = pytest_asyncio.fixture(loop_scope="session")

STATE = {  # what `sees` can look at
    "online": "document.querySelector('#status[data-status=online]') !== null",
    "path": "location.pathname + location.search",
    "title": "document.title",
    "focus": "document.activeElement.id",
    "texts": "[...document.querySelectorAll('[data-id] p')].map(p => p.textContent)",
    "last": "[...document.querySelectorAll('[data-id] p')].at(-1)?.textContent",
    "names": "[...document.querySelectorAll('#online li')].map(li => li.textContent)",
    "pending": "document.querySelectorAll('.pending').length",
    "box": "document.getElementById('text').value",
    "status": "document.getElementById('status').textContent",
    "reason": "document.getElementById('reason').textContent",
    "problem": "document.getElementById('problem').textContent",
    "note": "document.getElementById('older-note').textContent",
    "older": "document.getElementById('older').checkVisibility()",
    "news": "document.getElementById('new').checkVisibility()",
    "at_end": "Math.abs(log.scrollTop) < 5",
    "empty": "document.getElementById('empty').checkVisibility()",
}


# --- Real parts ---
class Chat:
    """The chat in this process, and what the tests do to it behind the page's back."""

    def __init__(self, server):
        self.url, self.port = str(server.make_url("/")), server.port
        self.room = server.app[chat.ROOM]
        self.db = self.room.db

    async def post(self, *texts, name="bob"):
        """Let a user say something, and wait until the room has been told."""
        for text in texts:
            user = {"_id": ObjectId(), "name": name}
            number = await chat.post(self.room, user, text, str(ObjectId()))
        await until(lambda: self.room.history.last >= number)

    async def post_many(self, count):
        await self.post(*[f"text {number}" for number in range(1, count + 1)])

    async def blank(self, *numbers):
        """Remove messages, as an operator does."""
        for number in numbers:
            change = {"_id": number}, {"$set": {"text": ""}}
            query = self.db.messages.find_one_and_update(*change, return_document=True)
            await self.db.edit("update", query)


@fixture
async def stack():
    """What is entered here is left at the end of the test."""
    async with contextlib.AsyncExitStack() as stack:
        yield stack


@fixture
async def serve(stack):
    """A function that serves the chat in this process."""

    async def serve(host="127.0.0.1", **settings):
        app = chat.init_app(chat.Settings(_env_file=None, **settings))
        return Chat(await stack.enter_async_context(TestServer(app, host=host)))

    return serve


@fixture
async def room(serve):
    """The chat with its default settings, in memory."""
    return await serve(MESSAGE_BURST=1_000)


class Proxy:
    """A TCP proxy that can go silent, as a network does: it closes nothing then."""

    def __init__(self, port):
        self.target, self.writers, self.silenced = port, set(), set()
        self.silent, self.swap = False, (b"", b"")  # in what passes

    async def handle(self, reader, writer):
        with contextlib.suppress(ConnectionError):
            far_reader, far_writer = await asyncio.open_connection(None, self.target)
            self.writers |= {writer, far_writer}
            if self.silent:
                self.go_silent()
            there, back = self.pump(reader, far_writer), self.pump(far_reader, writer)
            await asyncio.wait(map(asyncio.ensure_future, (there, back)))
        writer.close()

    async def pump(self, reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                if writer not in self.silenced:
                    writer.write(data.replace(*self.swap) if any(self.swap) else data)
        if writer not in self.silenced:
            writer.close()

    def connect_to(self, port):
        """End what is connected; new connections go to another port."""
        self.target = port
        for writer in self.writers:
            writer.close()

    def go_silent(self):
        """Forward nothing any more; `silent = False` is for new connections only."""
        self.silent = True
        self.silenced |= self.writers


@fixture
async def between(room, stack):
    """A proxy before the chat."""
    between = Proxy(room.port)
    server = await asyncio.start_server(between.handle, "127.0.0.1", 0)
    between.url = "http://{}:{}/".format(*server.sockets[0].getsockname())
    stack.callback(server.close)
    stack.callback(between.connect_to, room.port)
    return between


# --- What people do, in any browser ---
@pytest.fixture(params=["chromium", "firefox", "webkit"], scope="session")
def engine(request):
    """Each of the three engines: first all tests in one, then all in the next."""
    found = request.getfixturevalue(request.param)
    return parts.Chromium(found) if request.param == "chromium" else found


@fixture
async def open_window(engine, stack):
    """A function that opens a form in a window of an engine, or a user's chat."""

    async def open_window(url, name=None):
        window = await stack.enter_async_context(engine.window())
        await window.open(f"{url}signin")
        if name:
            fields = f"new URLSearchParams({json.dumps(form(name))})"
            body = f"{{ method: 'POST', body: {fields} }}"
            await window.run(f"fetch('/signin', {body}).then(() => null)")
            await window.open(url)
            await sees(window, online=True)
        return window

    return open_window


async def sees(window, **expected):
    """Wait until the page shows all of this."""
    script = ", ".join(f"{name}: {STATE[name]}" for name in expected)
    seen = {}

    async def look():
        with contextlib.suppress(Exception):  # another page is loading
            seen.update(await window.run(f"({{ {script} }})"))
        return seen == expected

    with contextlib.suppress(AssertionError):
        await until(look)
    assert seen == expected


def element(selector):
    selector = f"[data-id='{selector}']" if isinstance(selector, int) else selector
    return f"document.querySelector({json.dumps(selector)})"


async def told(window, selector, text):
    """Wait until the text of an element, or of a message, has a part."""
    await window.wait(f"{element(selector)}?.textContent.includes({json.dumps(text)})")


async def count(window, selector):
    return await window.run(f"document.querySelectorAll({json.dumps(selector)}).length")


async def write(window, *texts):
    for text in texts:
        await window.fill("#text", f"{text}\n")


async def fill(window, **fields):
    for name, text in fields.items():
        await window.fill(f"#{name}", text)
    await window.click("main button")


async def hurry(window, **seconds):
    """Shorten intervals of the page."""
    await window.run(f"void Object.assign({element('.room')}.dataset, {seconds})")


async def drawn(window, script="null"):
    """Run a script, and wait until the page has drawn what it does."""
    frame = "requestAnimationFrame(() => requestAnimationFrame(() => done(null)))"
    await window.run(f"new Promise((done) => {{ {script}; {frame}; }})")
    await asyncio.sleep(0.05)


async def place(window, number):
    """Where a message is in the log."""
    places = [f"{e}.getBoundingClientRect().top" for e in (element(number), "log")]
    return await window.run(" - ".join(places))


class Frame(parts.Window):
    """The chat in a frame of a window of its own: its size is ours in any browser."""

    def __init__(self, window):
        self.window = window

    async def open(self, url, width, height):
        """Replace the page by a frame: pages of one origin may look into each other."""
        size = f"width: {width}, height: {height}, src: {json.dumps(url)}"
        frame = f"Object.assign(document.createElement('iframe'), {{ {size} }})"
        await self.window.run(f"document.body.replaceChildren({frame})")
        await sees(self, online=True)
        outside = await self.window.run("document.activeElement.localName")
        assert outside == "body"  # it takes no focus: a notebook keeps its keyboard
        return self

    async def run(self, script):
        inside = f"with (frames[0]) {{ return {script} }}"
        return await self.window.run(f"(function () {{ {inside} }})()")


# --- What people do, in Chromium ---
@fixture
async def open_page(chromium, stack):
    """A function that opens a page, which must not have had an error at the end."""

    async def open_page(url, name=None, script=None, before="", **options):
        context = await stack.enter_async_context(await chromium.new_context(**options))
        page = watch(await context.new_page())
        stack.callback(lambda: page.errors and pytest.fail(str(page.errors)))
        await page.page.add_init_script(before)
        if script:
            await page.page.route_web_socket("**/ws*", script.accept)
        if name:
            await context.request.post(f"{url}signin", form=form(name))
        await page.open(url)
        if name:
            await sees(page, online=True)
        return page

    return open_page


@fixture
async def scripted(room, open_page):
    """A function that opens Ann's page, with a server whose sockets the test plays."""

    async def scripted(before="", **welcome):
        script = Script(**welcome)
        return await open_page(room.url, "ann", script, before), script

    return scripted


def watch(page):
    """Make a window of a page: it collects errors, dialogs, and its loads."""
    window = ChromiumWindow(page)
    window.errors, window.asked, window.loads = [], [], []
    page.on("load", lambda page: window.loads.append(page))
    page.on("dialog", lambda dialog: window.asked.append(dialog))
    page.on("pageerror", lambda error: window.errors.append(str(error)))
    refused = re.compile("Content Security Policy").search
    page.on("console", lambda m: window.errors.extend(filter(refused, [m.text])))
    return window


class Script:
    """The server's end of the page's WebSocket, played by a test."""

    def __init__(self, **welcome):
        self.welcome = {"user": "ann", "online": ["ann"], "last": 0} | welcome
        self.ends, self.received, self.is_away = [], [], False

    def accept(self, end):
        self.ends.append(end)
        end.on_message(lambda frame: self.received.append(json.loads(frame)))
        if not self.is_away:
            self.send("welcome", **self.welcome)

    def send(self, kind, **event):
        self.ends[-1].send(json.dumps({"type": kind} | event))

    def heartbeat(self, *numbers):
        for number in numbers:
            self.send("heartbeat", last=number)

    def message(self, number, text="", user="bob", nonce=None, clock="10:00"):
        event = {"id": number, "user": user, "nonce": nonce or f"nonce {number}"}
        event |= {"text": text or f"text {number}", "time": f"2026-01-02T{clock}:00Z"}
        self.send("message", **event)

    def receipt(self, number, position=-1):
        self.send("receipt", nonce=self.received[position]["nonce"], id=number)

    def own(self, number, position=-1, text=None):
        """Broadcast what the page has sent."""
        event = self.received[position]
        self.message(number, text or event["text"], "ann", event["nonce"])

    async def sent(self, count):
        """Wait until the page has sent so many messages; return the last."""
        await until(lambda: len(self.received) == count)
        return self.received[-1]


# --- In three engines: one conversation ---
async def test_two_people_chat_in_two_windows(room, open_window):
    ann = await open_window(room.url, "ann")
    await sees(ann, empty=True)
    bob = await open_window(room.url, "bob")
    await sees(ann, names=["ann", "bob"])
    await told(ann, "#messages", "bob joined")
    await write(ann, "hello, bob")
    await sees(bob, texts=["hello, bob"], empty=False)
    await bob.fill("#text", "<b>hello</b>, &amp;")
    await bob.click("#send button")
    await sees(bob, focus="text", box="")
    for window in ann, bob:
        await sees(window, texts=["hello, bob", "<b>hello</b>, &amp;"])
    assert (await count(ann, ".own"), await count(ann, "#log b")) == (1, 0)
    await bob.open(room.url)
    await sees(bob, online=True, texts=["hello, bob", "<b>hello</b>, &amp;"])
    await bob.click("#signout button")
    await sees(bob, path="/login")
    await told(ann, "#messages", "bob left")
    await sees(ann, names=["ann"])
    names = "#user, #online li, #messages strong"  # for a translator
    assert await count(ann, f":is({names}):not([translate=no])") == 0


async def test_a_dead_connection_is_noticed_and_replaced(room, between, open_window):
    """The network falls silent both ways and closes nothing, as when a laptop slept."""
    ann = await open_window(between.url, "ann")
    await hurry(ann, answer=1, retry=0.5)
    between.go_silent()
    await write(ann, "into the void")
    await sees(ann, online=False, names=[])
    await told(ann, "#reason", "does not answer")
    await room.post("meanwhile")
    between.silent = False
    await sees(ann, last="into the void")
    await write(ann, "afterwards")
    texts = ["meanwhile", "into the void", "afterwards"]
    await sees(ann, texts=texts, pending=0, reason="")


async def test_what_is_typed_during_a_restart_is_sent_once(start, mongodb, open_window):
    """The process is killed under an open page and started again on its port."""
    environment = {"MONGO_HOST": mongodb, "MONGO_DB_NAME": f"test-{ObjectId()}"}
    environment |= {"SECRET_KEY": parts.KEY, "PORT": str(unused_port())}
    process = start(**environment).wait_until_ready()
    ann = await open_window(f"{process.url}/", "ann")
    await write(ann, "before")
    await sees(ann, last="before")
    process.process.kill()
    await sees(ann, status="offline")
    await write(ann, "first", "second")
    await ann.fill("#text", "half a sen")
    start(**environment).wait_until_ready()
    await sees(ann, texts=["before", "first", "second"], pending=0, box="half a sen")


async def test_enter_of_an_input_method_sends_nothing(room, open_window):
    """Safari ends the composition first: only the key code tells then."""
    ann = await open_window(room.url, "ann")
    await ann.fill("#text", "にほん")
    for how in "isComposing: true", "keyCode: 229":
        event = f"'keydown', {{ key: 'Enter', bubbles: true, {how} }}"
        await ann.run(f"{element('#text')}.dispatchEvent(new KeyboardEvent({event}))")
    await sees(ann, box="にほん")
    await ann.type("\n")
    await sees(ann, texts=["にほん"])


async def test_a_form_says_what_is_wrong_and_takes_what_was_typed(room, open_window):
    ann = await open_window(room.url)
    email = "ann@bücher.example"  # in a field of type email, Chromium would change it
    await fill(ann, login="a!", email=email, password="short", password2="other")
    await sees(ann, focus="login")  # the answer has come
    notes = {"login": "3 to 32", "password": "8 to 128", "password2": "not the same"}
    for name, sentence in notes.items():
        await told(ann, f"#{name}-note", sentence)
        field = f"#{name}[aria-describedby={name}-note][aria-invalid=true]"
        assert await count(ann, field) == 1
    assert await ann.run(f"{element('#email')}.value") == email
    await fill(ann, **form("ann"))
    await sees(ann, online=True)
    await ann.click("#signout button")
    await sees(ann, path="/login")
    await fill(ann, login=email, password=PASSWORD)
    await sees(ann, online=True)


# --- In three engines: what a text looks like ---
ADDRESSES = {  # a text, and what is a link in it
    "(https://example.org/a?b=c&d=e#f.)": "https://example.org/a?b=c&d=e#f",
    "https://example.org/Foo_(bar)!": "https://example.org/Foo_(bar)",
    "https://пример.рф/, 例: https://例え.jp、": "https://пример.рф/ https://例え.jp",
    "www.example.org ann@example.org javascript:alert(1) ftp://a.b https://": "",
    '<Https://a.b/"onclick=alert(1)> **https://a.b**': "Https://a.b/ https://a.b",
    "https://a.b\u202egpj https://a.b\x85c \ufeffhttps://a.b\ufeff": 3 * "https://a.b ",
}
CODE = "```\nfor ann in https://a.b:\n\tpass\n```\n", "    indented\n    more"
TEXTS = [*ADDRESSES, f"See:\n{CODE[0]}So.", f"And:\n{CODE[1]}"]
TEXTS += ["Ann, @ann! Not joann, ``` or ann-"]


async def test_addresses_code_and_your_name_are_marked(room, open_window):
    """In a message that comes, and in one that was in the page."""
    ann = await open_window(room.url, "ann")
    await room.post(*TEXTS)
    for _ in range(2):
        await sees(ann, online=True, texts=TEXTS)
        links = "[...document.querySelectorAll('#messages a')].map(a => [a.target, "
        links = await ann.run(f"{links} a.rel, a.getAttribute('href'), a.innerText])")
        rest = "_blank", "noopener noreferrer nofollow"
        found = " ".join(ADDRESSES.values()).split()
        assert links == [[*rest, address, address] for address in found]
        found = "[...document.querySelectorAll('code, mark')].map(e => e.textContent)"
        assert await ann.run(found) == [*CODE, "Ann", "@ann"]
        await ann.open(room.url)


# The characters of a text as they stand, from left to right.
AS_SEEN = """((node) => [...node.textContent].map((letter, n) => {
    const range = new Range();
    range.setStart(node, n);
    range.setEnd(node, n + 1);
    return [letter, range.getBoundingClientRect().left];
}).sort((a, b) => a[1] - b[1]).map(([letter]) => letter).join(""))"""


async def test_directions_do_not_mix(room, open_window):
    """A link shows where it leads. A name leaves its sentence in order."""
    ann = await open_window(room.url, "ann")
    address = "https://evil.example/moc.elgoog//:sptth"
    await room.post("\u202e" + address)
    await sees(ann, last="\u202e" + address)
    assert await ann.run(f"{AS_SEEN}({element('#messages a')}.firstChild)") == address
    await told(ann, "#messages", "ann joined")
    chat.broadcast(room.room, {"type": "joined", "user": "דנה_"})
    await told(ann, "#messages", "דנה_ joined")
    name = "[...document.querySelectorAll('.notice bdi')].at(-1).firstChild"
    assert await ann.run(f"{AS_SEEN}({name})") == "_הנד"
    box = element("#text")
    direction = await ann.run(f"[{box}.dir, getComputedStyle({box}).unicodeBidi]")
    assert direction == ["auto", "plaintext"]  # as in a message


async def test_a_long_text_is_folded_and_unfolds_where_it_stands(serve, open_window):
    room = await serve(MAX_MESSAGE_LENGTH=5_000)
    await room.post("y\n" * 1_000, "x\n" * 15, "long " * 600)
    ann = await open_window(room.url, "ann")
    await told(ann, "#messages", "ann joined")
    await room.post("tall\n" * 40)
    await ann.wait("document.querySelectorAll('details:not([open])').length === 3")
    heights = "[...document.querySelectorAll('#messages {}')].map(e => e.offsetHeight)"
    assert max(await ann.run(heights.format("li"))) < 600
    assert max(await ann.run(heights.format("p"))) > 20_000
    summary = element("[data-id='4'] summary")
    await drawn(ann, f"{summary}.focus()")
    before = await place(ann, 4)
    await drawn(ann, f"{summary}.click()")
    await room.post("news")
    await sees(ann, news=True, at_end=False)
    await drawn(ann)
    assert abs(await place(ann, 4) - before) <= 1
    assert await ann.run(f"document.activeElement === {summary}")
    assert await ann.run(f"{element(4)}.offsetHeight") > 900
    await room.blank(1, 3)  # an operator removes them, so there is nothing to unfold
    await ann.wait("document.querySelectorAll('details').length === 1")
    await ann.open(room.url)
    await sees(ann, online=True, last="news")
    assert (await count(ann, ".removed"), await count(ann, "details")) == (2, 1)


# --- In three engines: your place ---
async def test_what_you_read_stays_where_it_is(room, open_window):
    """Whatever comes, is put in, unfolds or changes its size, above and below."""
    await room.post_many(40)
    await room.post("tall\n" * 40, *[f"words {'and ' * (n % 40)}" for n in range(40)])
    ann = await Frame(await open_window(room.url, "ann")).open(room.url, 700, 500)
    await drawn(ann, f"{element(41)}.scrollIntoView()")
    before = await place(ann, 41)
    await room.post(*["news " * 30] * 9)
    await told(ann, "#new", "9 new messages")
    unfold = element("[data-id='41'] summary") + ".click()"
    smaller = "frameElement.height = 300, log.dispatchEvent(new Event('scroll'))"
    for change in "older.click()", unfold, smaller:
        await drawn(ann, change)
        await sees(ann, older=False)
        await drawn(ann)
        assert abs(await place(ann, 41) - before) <= 1
    await drawn(ann, f"{element(60)}.scrollIntoView()")  # long lines are above it
    before = await place(ann, 60)
    changes = "frameElement.width = 400", "document.body.style.font = '1.2em serif'"
    for change in changes:
        await drawn(ann, change)
        assert abs(await place(ann, 60) - before) <= 1


async def test_the_end_stays_in_sight_whatever_grows(room, open_window):
    """A window, a font, a translation, the box."""
    await room.post_many(40)
    ann = await Frame(await open_window(room.url, "ann")).open(room.url, 700, 500)
    for change in (
        "frameElement.height = 300",
        "frameElement.height = 900",
        "frameElement.width = 400",
        "document.documentElement.style.fontSize = '150%'",
        "document.querySelectorAll('p').forEach(p => p.append(' and more'.repeat(9)))",
        f"{element('#text')}.style.height = '9em'",
    ):
        await drawn(ann, change)
        await sees(ann, at_end=True)
    await room.post("news")
    await sees(ann, last="news", at_end=True, news=False)


@pytest.mark.parametrize("size", [16, 32])
async def test_all_is_in_reach_in_a_small_window(room, open_window, size):
    """320 by 256 is a screen at 400 %. Sizes follow your font; nothing overlaps."""
    await room.post("hello")
    ann = Frame(await open_window(room.url, "x" * 32))
    await ann.open(room.url, 20 * size, 16 * size)
    await drawn(ann, f"document.documentElement.style.fontSize = '{size}px'")
    font = await ann.run(f"getComputedStyle({element('#messages p')}).fontSize")
    assert (font, await ann.run("log.clientHeight >= 128")) == (f"{size}px", True)
    found = "h1", "#status", "#user", "#signout button", "#log", "#text", "#send button"
    rects = ", ".join(f"{element(each)}.getBoundingClientRect()" for each in found)
    sides = "({ left, right, top, bottom }) => [left, right, top, bottom]"
    boxes = await ann.run(f"[{rects}].map({sides})")
    for n, (left, right, high, low) in enumerate(boxes):
        assert 0 <= left < right <= 20 * size
        for other in boxes[:n]:
            beside = left >= other[1] or right <= other[0]
            assert beside or high >= other[3] - 1 or low <= other[2] + 1


# --- In three engines: it believes only the chat, and needs nothing else ---
@pytest.mark.parametrize("status", [302, 401, 200])
async def test_a_gateway_is_not_believed(room, between, stack, open_window, status):
    """As in a hotel: until you have paid, the network answers in the chat's place."""
    await room.post_many(60)
    ann = await open_window(between.url, "ann")
    await hurry(ann, answer=2, retry=0.2)

    async def answer(request):
        headers = {"Location": "/pay", "WWW-Authenticate": "Cookie realm=hotel"}
        own = 200 if request.path == "/pay" else status
        return web.Response(status=own, headers=headers, text="<p>Please pay")

    gateway = await stack.enter_async_context(RawTestServer(answer))
    between.connect_to(gateway.port)
    await told(ann, "#reason", "chat's place" if status == 302 else "does not answer")
    await ann.click("#older")
    await told(ann, "#older-note", "could not be loaded")
    await ann.run("""void (window.said = [], new MutationObserver(() =>
        said.push(reason.textContent)).observe(reason, { childList: true }))""")
    await ann.click("#signout button")
    await ann.wait("said.some((text) => text.includes('still signed in'))")
    await sees(ann, path="/")
    between.connect_to(room.port)
    await ann.run("dispatchEvent(new Event('online'))")
    await sees(ann, online=True, reason="")


async def test_a_missing_script_is_a_sentence(room, between, open_window):
    """The page loads chat.js, which imports the others: so all are needed."""
    ann = await open_window(room.url, "ann")
    between.swap = b"connection.js", b"correction.js"
    await ann.open(between.url)
    for seen in "hidden", "visible":  # not at once: it usually comes
        await ann.wait(f"getComputedStyle(late).visibility === '{seen}'")
    await ann.fill("#text", "lost")
    await sees(ann, box="")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_the_page_needs_little(serve, between, open_window, host):
    """An old browser has no BroadcastChannel; an address may be one of IPv6."""
    room = await serve(host)
    between.connect_to(room.port)
    between.swap = b"window.BroadcastChannel", b"window.BroadcastCarrier"
    ann = await open_window(between.url if host == "127.0.0.1" else room.url, "ann")
    await write(ann, "hello")
    await sees(ann, texts=["hello"])
    await ann.click("#signout button")
    await sees(ann, path="/login")


# --- Alive ---
async def test_silence_is_noticed_by_the_clock(room, between, open_page):
    """Nothing is sent. Then a laptop sleeps for an hour, and its timers stand still."""
    late = """window.WebSocket = class extends WebSocket {
        close() { (window.late ??= []).push(() => this.onclose?.({ code: 1006 })); }
    };"""
    ann = await open_page(between.url, "ann", before=late)
    await hurry(ann, silence=0.1)
    await ann.wait("window.late?.length > 0")
    await hurry(ann, silence=45)
    await sees(ann, online=True)
    await ann.run("late.forEach((close) => close())")  # a browser takes up to a minute
    assert await ann.run(STATE["status"]) == "online"
    between.go_silent()
    later = "(now => Date.now = () => now + 3_600_000)(Date.now())"
    event = "document.dispatchEvent(new Event('visibilitychange'))"
    await ann.run(f"void ({later}, {event})")
    assert await ann.run(STATE["status"]) == "connecting"


PAUSES = """((setTimeout) => {
    window.pauses = [];
    window.setTimeout = (work, pause) => {
        if (!String(work).includes("connect")) return setTimeout(work, pause);
        window.pauses.push(pause);
        return setTimeout(work, 0);
    };
})(window.setTimeout);"""


@pytest.mark.parametrize("code, longest", [(1001, 750), (1011, 4_500)])
async def test_pauses_grow_to_less_than_five_seconds(scripted, code, longest):
    """It welcomes and hangs up again and again: 1001 is what a restart looks like."""
    ann, script = await scripted(PAUSES)
    for number in range(1, 10):
        await sees(ann, online=True)
        await script.ends[-1].close(code=code)
        await until(lambda number=number: len(script.ends) > number)
    assert longest / 3 <= await ann.run("pauses.at(-1)") <= longest


# --- Nothing without a limit ---
OTHER_HISTORIES = {
    "fewer messages": lambda script: script.heartbeat(1, 1, 1),
    "a gap": lambda script: script.message(9),
    "another message": lambda script: script.message(2, nonce="another"),
}


@pytest.mark.parametrize("how", OTHER_HISTORIES)
async def test_another_history_reloads_once_a_minute_at_most(room, scripted, how):
    """A process may be behind for a while, or newer: that makes no page reload."""
    await room.post_many(3)
    nonces = [event["nonce"] for event in room.room.history.events.values()]
    ann, script = await scripted(last=1)
    script.heartbeat(1)
    script.message(2, nonce=nonces[1])  # which the page knows
    script.send("from the future")
    script.message(4, "new")
    script.heartbeat(4)
    await sees(ann, texts=["text 1", "text 2", "text 3", "new"])
    assert (len(ann.loads), ann.errors) == (1, ["unknown event from the future"])
    ann.errors.clear()
    OTHER_HISTORIES[how](script)
    await until(lambda: len(ann.loads) == 2 and len(script.ends) == 2)
    await sees(ann, online=True)
    script.heartbeat(1, 1, 1, 1, 1)
    script.message(9)
    await sees(ann, last="text 9")
    await asyncio.sleep(0.5)
    assert len(ann.loads) == 2


NO_STORAGE = "Object.defineProperty(window, 'sessionStorage', { get() { throw 1; } });"
FULL_STORAGE = "Storage.prototype.setItem = () => { throw 1; };"


@pytest.mark.parametrize("storage", [NO_STORAGE, FULL_STORAGE], ids=["refused", "full"])
async def test_a_page_without_storage_never_reloads_over_your_text(scripted, storage):
    """It cannot remember its last reload, so it waits until it is a minute old."""
    ann, script = await scripted(storage)
    script.message(9)  # a gap
    script.heartbeat(9, 9)
    await ann.fill("#text", "half a sen")
    await hurry(ann, reload=0.1, answer=0.1)
    script.heartbeat(9, 9)
    await asyncio.sleep(0.5)
    assert (len(ann.loads), ann.asked) == (1, [])
    back = "dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))"
    await ann.run(f"void setTimeout(() => {back})")
    await until(lambda: ann.asked)
    await ann.asked[0].dismiss()
    await ann.type("\n")
    assert (await script.sent(1))["text"] == "half a sen"
    script.receipt(1)
    await until(lambda: script.heartbeat(9) or len(ann.loads) == 2)


async def test_a_reload_is_tried_again_as_soon_as_there_is_a_server(room, scripted):
    """One that is stopped leaves a page that works. No error page takes its place."""
    ann, script = await scripted()
    await hurry(ann, answer=1)
    asked = []
    await ann.page.route(room.url, lambda route: asked.append(route))  # no answer
    stop = "setTimeout(() => { window.stop(); document.title = 'stopped'; }, 300)"
    await ann.run(f"addEventListener('beforeunload', () => {stop}, {{ once: true }})")
    script.message(9)  # a gap
    await sees(ann, title="stopped", online=True)
    await write(ann, "still here")
    await script.sent(1)
    script.receipt(10)
    script.is_away = True
    await hurry(ann, answer=0.2, reload=0.2, retry=0.2)
    await script.ends[-1].close()
    await until(lambda: len(script.ends) == 4)  # it connects again and again
    assert (len(asked), len(ann.loads)) == (1, 1)
    await ann.page.unroute(room.url)
    script.is_away = False
    await until(lambda: len(ann.loads) == 2)


# --- Who is speaking ---
async def test_a_page_never_sends_under_another_name(room, between, open_page):
    """Bob signs in in Ann's browser while her page is cut off."""
    ann = await open_page(between.url, "ann")
    bob = await open_page(between.url, "bob")
    cookies = [await each.page.context.cookies() for each in (ann, bob)]
    between.go_silent()
    await hurry(ann, answer=0.5, retry=0.2)
    await write(ann, "typed by ann")
    await ann.fill("#text", "half a sen")
    await sees(ann, status="offline")
    await ann.page.context.add_cookies(cookies[1])
    await asyncio.sleep(2)  # the attempt that is under way has the old one
    between.silent = False
    between.connect_to(room.port)  # or a page is loaded over a dead line
    await ann.page.wait_for_selector(".room[data-user=bob] [data-status=online]")
    await sees(ann, pending=0, box="")
    await write(ann, "typed by bob")
    await sees(ann, last="typed by bob")
    await ann.page.context.add_cookies(cookies[0])
    await ann.page.reload()
    await sees(ann, texts=["typed by bob", "typed by ann"], box="half a sen")
    names = await ann.page.locator("[data-id] strong").all_text_contents()
    assert names == ["bob", "ann"]


@pytest.mark.parametrize("path", ["", "?before=9"], ids=["chat", "older messages"])
async def test_signing_out_takes_the_other_tabs_to_the_sign_in(room, open_page, path):
    """From whichever page: the one of older messages has no script."""
    ann = await open_page(room.url, "ann")
    other = watch(await ann.page.context.new_page())
    await other.open(room.url + path)
    await other.click("#signout button")
    await sees(other, path="/login")
    await sees(ann, path="/login?why=ended")
    await told(ann, "[role=status]", "session has ended")


async def test_only_the_end_of_a_session_leads_to_the_sign_in(room, open_page):
    """1001 means: connect again. Our 401 means: sign in. So does a deleted account."""
    ann = await open_page(room.url, "ann")
    bob = await open_page(room.url, "bob")
    await chat.close(room.room, lambda socket: True)
    await sees(ann, online=False)
    await sees(ann, online=True, path="/")
    cookies = await ann.page.context.cookies()
    await ann.page.context.clear_cookies()
    await ann.run("sessionStorage.left = Date.now()")  # it left just now: it waits
    await chat.close(room.room, lambda socket: True)
    await told(ann, "#reason", "session has ended")
    await hurry(ann, retry=1_000)
    await ann.page.context.add_cookies(cookies)
    tab = watch(await ann.page.context.new_page())
    await tab.open(room.url)  # you sign in there
    await sees(ann, online=True, reason="")
    assert len(ann.loads) == 1
    await ann.page.context.clear_cookies()
    await chat.close(room.room, lambda socket: True)
    await sees(tab, path="/login?why=ended")
    await sees(bob, online=True)
    query = room.db.users.find_one_and_delete({"name": "bob"})
    await room.db.edit("delete", query)
    await sees(bob, path="/login?why=ended")


# --- The outbox ---
@pytest.mark.parametrize("was_saved", [False, True])
async def test_a_message_that_was_not_saved_is_sent_again(scripted, was_saved):
    """Unless it was saved after all: the deadline passed, and the write succeeded."""
    ann, script = await scripted()
    await write(ann, "not yet")
    nonce = (await script.sent(1))["nonce"]
    script.send("error", code="not_saved", text="It goes on.", nonce=nonce)
    await sees(ann, reason="It goes on.", pending=1)
    if was_saved:
        script.own(1)
        await asyncio.sleep(2.5)
        assert len(script.received) == 1
    else:
        assert await script.sent(2) == script.received[0]
        script.receipt(1)
        await sees(ann, reason="", pending=1)
        script.own(1)
    await sees(ann, texts=["not yet"], pending=0, reason="")


async def test_one_message_at_a_time_waits_for_its_receipt(scripted):
    """The receipt comes after the message, before it, or for a repeated message."""
    ann, script = await scripted()
    await write(ann, "one", "two", "three")
    await asyncio.sleep(0.2)
    assert (await script.sent(1))["text"] == "one"
    script.own(1, text="* one")  # a server may have commands, and store another text
    await sees(ann, texts=["* one"], pending=2)
    assert len(script.received) == 1
    script.receipt(1)
    await script.sent(2)
    script.receipt(2)
    await script.sent(3)
    await sees(ann, pending=2)
    script.own(2, position=1)
    script.receipt(1)
    await sees(ann, texts=["* one", "two"], pending=0)


@pytest.mark.parametrize("how", ["with a nonce", "without", "too big"])
async def test_a_refused_message_comes_back_and_the_next_one_goes(scripted, how):
    """Too big it is for a proxy, or a server with another limit."""
    ann, script = await scripted()
    await write(ann, "refused", "the next")
    await ann.fill("#text", "half a sen")
    await ann.page.press("#text", "ArrowLeft")
    nonce = {"nonce": (await script.sent(1))["nonce"]} if how == "with a nonce" else {}
    if how == "too big":
        await script.ends[0].close(code=1009)
    else:
        script.send("error", code="bad_event", text="It is too long.", **nonce)
    assert (await script.sent(2))["text"] == "the next"
    await sees(ann, box="refused\nhalf a sen", pending=1)
    script.receipt(1)
    script.own(1)
    await sees(ann, last="the next")
    await told(ann, "#problem", "is too long.")
    await ann.type("?")
    await ann.page.reload()
    await sees(ann, box="refused\nhalf a se?n", problem="")


async def test_a_message_too_long_or_blank_stays_in_the_box(serve, open_page):
    """A space of no width: the page takes it for text, the server does not."""
    room = await serve(MAX_MESSAGE_LENGTH=10, MESSAGE_BURST=2, MESSAGES_PER_SECOND=10)
    ann = await open_page(room.url, "ann")
    for text, problem in {"eleven, no?": "at most 10", "\u200b": "needs some"}.items():
        await write(ann, text)
        await told(ann, "#problem", problem)
        await sees(ann, box=text, pending=0)
    texts = [number * "😀" for number in range(5, 11)]  # faster than the limit
    await write(ann, *texts)
    await sees(ann, texts=texts)


async def test_a_tab_with_unsent_messages_asks_before_it_closes(scripted):
    ann, script = await scripted()
    await write(ann, "unsent")
    await script.sent(1)
    await ann.page.close(run_before_unload=True)
    await until(lambda: ann.asked)
    await ann.asked[0].dismiss()
    script.message(9)  # a gap: the page's own reload asks nothing
    await until(lambda: len(ann.loads) == 2)
    assert [dialog.type for dialog in ann.asked] == ["beforeunload"]


# --- Flat ---
async def test_a_thousand_missed_messages_cost_one_layout(room, between, open_page):
    """Added in one task, they are laid out together, and spoken by no screen reader.
    The newest 300 lines stay, and up to 50 more until they are removed together.
    """
    ann = await open_page(between.url, "ann")
    await ann.run("""void (window.batches = [], new MutationObserver((changes) => {
        const added = changes.flatMap((change) => [...change.addedNodes]);
        const size = added.filter((node) => node.dataset?.id).length;
        if (size) batches.push([size, log.ariaBusy]);
    }).observe(messages, { childList: true }))""")
    between.go_silent()
    between.connect_to(room.port)
    await sees(ann, online=False)
    await room.post_many(1_000)
    between.silent = False
    await sees(ann, last="text 1000")
    [[size, busy]] = await ann.run("batches")
    assert (size >= 300, busy, len(ann.loads)) == (True, "true", 1)
    await room.post_many(120)
    await sees(ann, last="text 120")
    assert 300 <= await count(ann, "#messages > li") < 352
    assert await count(ann, ".day:first-child + [data-id]") == 1
    first = await ann.page.get_attribute("#messages [data-id]", "data-id")
    assert await count(ann, f"#older[href$='?before={first}']") == 1


@pytest.mark.parametrize("hidden", ["false", "true"])
async def test_while_you_read_above_the_log_stays_flat_too(scripted, hidden):
    """You read above, or you have left it there for the night."""
    ann, script = await scripted()
    for number in range(1, 51):
        script.message(number)
    await sees(ann, last="text 50")
    await drawn(ann, f"{element(9)}.scrollIntoView()")
    before = await place(ann, 9)
    await ann.run(f"document.__defineGetter__('hidden', () => {hidden})")
    for number in range(51, 1_551):
        script.message(number)
    await sees(ann, title="(1500) Chat")
    assert await count(ann, "#messages > li") < 700
    assert abs(await place(ann, 9) - before) <= 1
    script.message(1_550, text="changed", nonce="nonce 1550")  # by an operator
    await ann.click("#new")
    await sees(ann, last="changed", at_end=True, title="Chat", focus="text")
    newest = [f"text {number}" for number in range(1_251, 1_550)]
    assert (await ann.run(STATE["texts"]))[-300:-1] == newest


async def test_a_crowd_costs_one_item_each_and_one_line(scripted):
    names = [f"user{number:04}" for number in range(2_000)]
    ann, script = await scripted(online=["ann", *names])
    await ann.run(f"""void (window.changes = [],
        new MutationObserver((all) => changes.push(...all)).observe(
            {element("#online")}, {{ childList: true, subtree: true }}))""")
    for what, name in ("joined", "zoe"), ("left", "user0999"), ("joined", "ann"):
        script.send(what, user=name)
    await ann.wait("changes.length === 2")
    names.remove("user0999")
    await sees(ann, names=["ann", *names, "zoe"])
    await told(ann, "#count", "2001")
    for number in range(500):
        script.send("left", user=f"user{number:04}")
    await told(ann, "#messages .notice", "499 others came or left · user0496 left · ")
    script.message(1)
    script.send("joined", user="user0008")
    await told(ann, "[data-id='1'] + .notice", "user0008 joined")
    assert await count(ann, "#messages .notice") == 2


async def test_scrolling_back_and_coming_back_to_the_end(room, open_page):
    await room.post_many(420)
    ann = await open_page(room.url, "ann")
    await drawn(ann, f"{element(371)}.scrollIntoView()")
    await ann.run("(older.click(), older.click())")  # one at a time
    for first in 321, 271, 221, 171, 121, 71, 21, 1:
        await told(ann, "[data-id]", f"text {first}")
        await ann.run("older.click()")
    await sees(ann, texts=[f"text {n}" for n in range(1, 421)], older=False)
    assert await count(ann, ".day") == 1
    await drawn(ann, "log.scrollTop = 0")
    await room.post("text 421")
    await ann.wait("messages.children.length <= 302")  # with a day and a notice
    first = int(await ann.page.get_attribute("#messages [data-id]", "data-id"))
    await ann.click("#older")
    await sees(ann, texts=[f"text {n}" for n in range(first - 50, 422)])


async def test_older_messages_come_or_say_why_not(room, open_page):
    """The network fails. While they load, you type, and an operator takes one back. In
    memory they are not kept. They open in a tab of their own.
    """
    await room.post_many(110)
    ann, held = await open_page(room.url, "ann"), asyncio.Queue()

    async def hold(route):
        held.put_nowait((route, await route.fetch()))

    async with ann.page.context.expect_page() as opened:
        await ann.page.click("#older", modifiers=["Control"])
    await (await opened.value).wait_for_url("**/?before=61")
    await ann.page.route("**/?before=*", lambda route: route.abort())
    await ann.page.click("#older")
    await told(ann, "#older-note", "could not be loaded")
    await ann.page.route("**/?before=*", hold)
    await ann.page.click("#older")
    route, answer = await held.get()
    await told(ann, "#older", "Loading …")
    await ann.page.click("#text")
    await ann.type("hel")
    await room.blank(15, 110)
    await told(ann, 110, "This message was removed.")
    await route.fulfill(response=answer)
    await told(ann, 11, "text 11")
    await ann.type("lo")
    await told(ann, 15, "This message was removed.")
    await sees(ann, box="hello", note="")
    await ann.page.unroute("**/?before=*")
    room.room.history.events.clear()
    await room.db.messages.drop()
    await ann.wait("log.ariaBusy === 'false'")
    await ann.page.click("#older")
    await sees(ann, note="Older messages are not kept.", older=False, focus="log")
    assert await ann.run("log.ariaBusy") == "false"  # or the sentence is not spoken
    await drawn(ann, "log.scrollTop = 0")
    await room.post_many(400)
    await sees(ann, last="text 400", older=True, note="")  # these are kept


# --- What people expect ---
async def test_what_you_have_not_seen_is_counted(room, open_page):
    """A touchpad moves by a few pixels; a page is hidden; one's own are not news."""
    await room.post_many(50)
    ann = await open_page(room.url, "ann")
    for number in range(1, 4):
        await drawn(ann, "log.scrollTop -= 9")
        await room.post("news")
        await told(ann, "#new", f"{number} new message")
    await ann.click("#new")
    await sees(ann, at_end=True, news=False)
    hide = "document.__defineGetter__('hidden', () => {})"
    await ann.run(hide.format("true"))
    await room.post("hello")
    await room.post("mine", name="ann")
    await sees(ann, last="mine", title="(1) Chat")
    event = "document.dispatchEvent(new Event('visibilitychange'))"
    await ann.run(f"({hide.format('false')}, {event})")
    await sees(ann, title="Chat")


async def test_a_message_keeps_its_day_and_a_group_its_name(room, open_page):
    """Also when you travel: all times are told again, and agree with their tooltips."""
    ann = await open_page(room.url, "ann", script := Script(), locale="en-GB")
    client = await ann.page.context.new_cdp_session(ann.page)
    zone = "Emulation.setTimezoneOverride"
    await client.send(zone, {"timezoneId": "UTC"})
    for number, clock in enumerate(["10:00", "10:04", "10:10", "23:30"], 1):
        script.message(number, clock=clock)
    script.message(5, clock="23:31", user="carl")
    lines = "[...document.querySelectorAll('.day, time')].map(e => e.innerText)"
    await sees(ann, last="text 5")
    day, next_day = "Friday, 2 January 2026", "Saturday, 3 January 2026"
    assert await ann.run(lines) == [day, "10:00", "10:04", "10:10", "23:30", "23:31"]
    seen = "[...document.querySelectorAll('strong')].map(e => e.offsetWidth > 9)"
    assert await ann.run(seen) == [True, False, True, True, True]
    await client.send(zone, {"timezoneId": "Asia/Tokyo"})
    script.message(6, clock="23:32", user="carl")
    await sees(ann, last="text 6")
    expected = [day, "19:00", "19:04", "19:10", next_day, "08:30", "08:31", "08:32"]
    assert await ann.run(lines) == expected
    agree = "[...document.querySelectorAll('time')].every(e => e.title.includes("
    assert await ann.run(f"{agree}e.innerText))")


async def test_ink_edges_and_paper(room, open_page):
    """Ink stays in its item. Edges are left without backgrounds. Paper has it all."""
    await room.post("above")
    ann = await open_page(room.url, "ann", forced_colors="active")
    await told(ann, "#messages", "ann joined")
    before = await ann.page.locator("[data-id='1'] p").screenshot()
    await room.post("Z" + "\u0301" * 200)
    await told(ann, 2, "Z")
    assert await ann.page.locator("[data-id='1'] p").screenshot() == before
    await room.post_many(46)
    await room.post("tall\n" * 40)
    await write(ann, "mine")
    await sees(ann, last="mine")
    width = "parseFloat(getComputedStyle({}).borderInlineEndWidth)"
    parts = ", ".join(width.format(element(e)) for e in ("#send button", 49, 50))
    button, other, own = await ann.run(f"[{parts}]")
    assert button >= 1 and own > other
    await ann.page.emulate_media(media="print")
    assert await ann.run("log.scrollHeight === log.clientHeight")
    assert await ann.run(f"{element(49)}.offsetHeight > 900")
    assert await ann.run("scrollY + document.body.scrollHeight > 3_000")
    assert not await ann.page.is_visible("#send")


async def test_forms_and_history_work_without_javascript(room, open_page):
    await room.post_many(60)
    bob = await open_page(f"{room.url}signin", java_script_enabled=False)
    await bob.page.context.request.post(f"{room.url}signin", form=form("bob"))
    await bob.open(room.url)
    messages = bob.page.locator("[data-id] p")
    assert (await messages.all_inner_texts())[0] == "text 11"
    newest = await messages.last.bounding_box()
    assert 0 < newest["y"] < 720  # it begins there
    assert "needs JavaScript" in await bob.page.inner_text("noscript")
    await bob.page.click("#older")
    assert (await messages.all_inner_texts())[0] == "text 1"
    await bob.page.click("text=Sign out")
    await bob.page.wait_for_url("**/login")


REASONS = {400: "blocks WebSockets", 429: "too many windows", 503: "out of service"}


@pytest.mark.parametrize("status", REASONS)
async def test_the_page_says_why_it_cannot_connect(scripted, status):
    """A proxy passes no WebSockets; you have many tabs; the server has no time."""
    ann, script = await scripted()
    await ann.page.route("**/ws", lambda route: route.fulfill(status=status))
    script.is_away = True
    await hurry(ann, answer=0.2, retry=0.2)
    await script.ends[-1].close()
    await told(ann, "#reason", REASONS[status])
    assert status != 400 or len(script.ends) >= 3  # it did not say so after the first
    script.is_away = False
    await sees(ann, online=True, reason="")


# --- For everybody ---
async def test_axe_finds_nothing(room, open_page):
    name = "axe_playwright_python.async_playwright"
    axe = parts.need(parts.optional(name), f"no axe: {parts.BROWSERS}").Axe()
    found, empty = [], await open_page(room.url, "bea")
    for scheme in "light", "dark":
        await empty.page.emulate_media(color_scheme=scheme)
        found.append(await axe.run(empty.page))
    await room.post("hello ann https://example.org\n    code", "x\n" * 30, "", "hello")
    ann = await open_page(room.url, "ann")
    await write(ann, "mine")
    await sees(ann, last="mine")
    await ann.run(f"{element('#reason')}.textContent = 'A reason.'")
    waiting = await open_page(room.url, "carl", Script(user="carl"))
    await write(waiting, "pending")
    wrong = await open_page(f"{room.url}signin")
    await fill(wrong, login="a!", password="x", password2="y")
    await told(wrong, ".error", "3 to 32")
    ended = await open_page(f"{room.url}login?why=ended")
    history = watch(await ann.page.context.new_page())
    await history.open(f"{room.url}?before=9")
    item, box = element(":not(.own) > time"), element("#text")
    style = "[getComputedStyle({}).color, getComputedStyle({}).backgroundColor]"
    written = style.format(f"{box}, '::placeholder'", box)
    checked = style.format(item, f"{item}.parentElement")  # by axe
    for scheme in "light", "dark":
        for window in ann, waiting, wrong, ended, history:
            await window.page.emulate_media(color_scheme=scheme)
            found.append(await axe.run(window.page))
        assert await ann.run(written) == await ann.run(checked)
    assert [f.generate_report() for f in found if f.violations_count] == []


async def test_on_a_phone_enter_starts_a_new_line(room, open_page):
    """Its keyboard has no Shift+Enter; the button sends. Everything fits."""
    size = {"width": 360, "height": 560}
    options = {"viewport": size, "is_mobile": True, "has_touch": True}
    ann = await open_page(room.url, "x" * 32, **options)
    await write(ann, "one")
    await ann.type("two")
    await sees(ann, box="one\ntwo")
    assert not await ann.page.is_visible("text=starts a new line")
    await ann.page.tap("#send button")
    await room.post("long" * 200)
    await sees(ann, texts=["one\ntwo", "long" * 200])
    box = await ann.page.locator("#send button").bounding_box()
    assert box["y"] + box["height"] <= 560
    for page in ann, await open_page(f"{room.url}signin", **options):
        assert await page.run("document.documentElement.scrollWidth") == 360


async def test_going_back_to_a_form_that_was_refused_shows_it(room, open_page):
    ann = await open_page(f"{room.url}login")
    await fill(ann, login="ann", password="wrong")
    await told(ann, ".error", "No account")
    await ann.open(f"{room.url}signin")
    await ann.page.go_back()
    await told(ann, "h1", "Sign in")


async def test_the_chat_works_by_keyboard_alone(room, open_page):
    ann = await open_page(f"{room.url}signin")
    for text in "ann", "", PASSWORD, f"{PASSWORD}\n":
        await ann.page.keyboard.press("Tab")
        await ann.type(text)
    await sees(ann, online=True)
    await ann.type("one")
    await ann.page.keyboard.press("Shift+Enter")
    await ann.type("two\n")
    await sees(ann, texts=["one\ntwo"], focus="text")
    await ann.page.keyboard.press("Shift+Tab")
    await sees(ann, focus="log")


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
    await sees(ann, last="mine")
    await room.post("theirs", "theirs, too")  # in a group, too, each has its name
    await sees(ann, last="theirs, too")
    spoken = [re.sub(r"\d+:.*M", "", text) for text in await ann.run("spoken")]
    assert spoken == ["ann mine", "bob theirs", "bob theirs, too"]
