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
        user = {"_id": ObjectId(), "name": "bob"}
        for number in range(1, count + 1):
            last = await self.room.post(user, f"text {number}", str(number))
        await until(lambda: self.room.history.last_broadcast >= last)

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
        self.swap = b"", b""

    async def handle(self, reader, writer):
        try:
            address = "127.0.0.1", self.target
            far_reader, far_writer = await asyncio.open_connection(*address)
        except ConnectionError:
            writer.close()
            return
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
                    writer.write(data.replace(*self.swap) if any(self.swap) else data)
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


@fixture
async def around():
    """A function that serves a page with an address in a frame, as a notebook does."""
    async with contextlib.AsyncExitStack() as stack:

        async def around(url):
            async def show(request):
                html = f"<input id=cell autofocus><iframe src='{url}'></iframe>"
                return web.Response(text=html, content_type="text/html")

            app = web.Application()
            app.router.add_get("/", show)
            server = await stack.enter_async_context(TestServer(app))
            return str(server.make_url("/"))

        yield around


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


CREATE_ACCOUNT = """async fields => {
    const body = new URLSearchParams(fields);
    return (await fetch("/signin", { method: "POST", body })).status;
}"""


def account(name):
    return {"login": name, "password": PASSWORD, "password2": PASSWORD}


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


# --- What people do, in Chromium ---
@fixture
async def open_page(chromium):
    """A function that opens a page, which must not have had an error at the end."""
    pages = []

    async def open_page(url, name=None, prepare=None, **options):
        context = await chromium.new_context(**options)
        page = watch(await context.new_page())
        pages.append(page)
        if prepare:
            await prepare(page)
        if name:
            await context.request.post(f"{url}signin", form=account(name))
        await page.goto(url)
        if name and not prepare and options.get("java_script_enabled", True):
            await wait(page, ONLINE)
        return page

    yield open_page
    for page in pages:
        await page.context.close()
    assert [error for page in pages for error in page.errors] == []


def watch(page):
    """Collect the errors of a page, and count how often it loads."""
    page.set_default_timeout(15_000)
    page.errors, page.loads = [], 0

    def count(_):
        page.loads += 1

    def note(text):
        if "Content Security Policy" in text:
            page.errors.append(text)

    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: note(message.text))
    page.on("load", count)
    return page


async def second_tab(page, url):
    tab = watch(await page.context.new_page())
    await tab.goto(url)
    await wait(tab, ONLINE)
    return tab


async def write(page, text):
    await page.fill("#text", text)
    await page.press("#text", "Enter")


async def shown(page, text):
    """Wait until a message with this text is in the log."""
    await wait_for_text(ChromiumWindow(page), text)


async def wait(page, script):
    """Wait for a script to be true. (Playwright's own way needs eval, see the CSP.)"""
    await ChromiumWindow(page).wait(script)


async def scroll(page, top):
    """Scroll the log, and wait until the page has noticed: it takes a frame."""
    frames = "requestAnimationFrame(() => requestAnimationFrame(done))"
    await page.evaluate(
        f"() => {{ log.scrollTop = {top}; return new Promise((done) => {frames}); }}"
    )


class Script:
    """The server's end of the page's WebSocket, played by a test."""

    def __init__(self, **welcome):
        self.welcome = {"type": "welcome", "user": "ann", "online": ["ann"], "last": 0}
        self.welcome |= welcome
        self.ends, self.received, self.is_away = [], [], False

    async def prepare(self, page):
        await page.route_web_socket("**/ws*", self.accept)

    def accept(self, end):
        self.ends.append(end)
        end.on_message(lambda frame: self.received.append(json.loads(frame)))
        if not self.is_away:
            self.send(self.welcome)

    def send(self, *events):
        for event in events:
            self.ends[-1].send(json.dumps(event))

    def send_message(self, number, text="", user="bob", nonce=None):
        event = {"type": "message", "id": number, "user": user}
        event |= {"text": text or f"text {number}", "time": "2026-01-02T10:00:00Z"}
        self.send(event | {"nonce": nonce or f"nonce {number}"})


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
    for window in ann, bob:
        await wait_for_text(window, "hello, ann")
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


async def test_what_is_typed_during_a_restart_is_sent_once(start, mongodb, open_window):
    """The process is killed under an open page and started again on its port."""
    environment = {
        "MONGO_HOST": mongodb,
        "MONGO_DB_NAME": f"test-{ObjectId()}",
        "SECRET_KEY": "any text",
        "PORT": str(unused_port()),
    }
    process = start(**environment).wait_until_ready()
    ann = await open_window(f"{process.url}/", "ann")
    await send(ann, "before")
    await wait_for_text(ann, "before")
    process.process.kill()
    await wait_for_status(ann, "offline")
    for text in "first", "second":
        await send(ann, text)
    await ann.fill("#text", "half a sen")
    start(**environment).wait_until_ready()
    await wait_for_text(ann, "second")
    assert await texts(ann) == ["before", "first", "second"]
    assert await ann.run("document.querySelectorAll('.pending').length") == 0
    assert await ann.run("document.getElementById('text').value") == "half a sen"


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
LINKS = """[...document.querySelectorAll('#messages p')].map((p) => [p.textContent,
    [...p.querySelectorAll('a')].map((a) => [a.getAttribute('href'), a.rel, a.target])
])"""


async def test_web_addresses_are_links_by_script_and_by_template(room, open_window):
    ann = await open_window(room.url, "ann")
    for text in ADDRESSES:
        await room.post(text)
    await ann.wait(f"{TEXTS}.length === {len(ADDRESSES)}")
    expected = [
        [text, [[link, "noopener noreferrer nofollow", "_blank"] for link in links]]
        for text, links in ADDRESSES.items()
    ]
    assert await ann.run(LINKS) == expected
    await ann.open(room.url)
    assert await ann.run(LINKS) == expected


async def test_enter_of_an_input_method_sends_nothing(room, open_window):
    """Safari ends the composition first: only the key code tells then."""
    ann = await open_window(room.url, "ann")
    await ann.fill("#text", "にほん")
    press = (
        "document.getElementById('text').dispatchEvent(new KeyboardEvent('keydown', "
    )
    for how in "isComposing: true", "keyCode: 229":
        await ann.run(f"{press}{{ key: 'Enter', bubbles: true, {how} }}))")
    assert await ann.run("document.getElementById('text').value") == "にほん"
    await ann.type("\n")
    await wait_for_text(ann, "にほん")
    assert await texts(ann) == ["にほん"]


async def test_sign_up_errors_stand_beside_their_fields(room, open_window):
    ann = await open_window(f"{room.url}signin")
    wrong = {"login": "a!", "email": "ann@example.org", "password": "short"}
    for name, value in (wrong | {"password2": "different"}).items():
        await ann.fill(f"#{name}", value)
    await ann.click("main button")
    await ann.wait("document.querySelector('[aria-invalid]') !== null")
    for name, sentence in {
        "login": "3 to 32",
        "password": "8 to 128",
        "password2": "not the same",
    }.items():
        field = f"document.getElementById('{name}')"
        note = f"document.getElementById({field}.getAttribute('aria-describedby'))"
        assert sentence in await ann.run(f"{note}.textContent")
        assert await ann.run(f"{field}.getAttribute('aria-invalid')") == "true"
    assert await ann.run("document.getElementById('email').value") == "ann@example.org"
    await ann.wait("document.activeElement.id === 'login'")
    for name, value in account("ann").items():
        await ann.fill(f"#{name}", value)
    await ann.click("main button")
    await ann.wait(ONLINE)


# --- Alive ---
async def hurry_page(page, **seconds):
    await page.evaluate(
        "seconds => Object.assign(document.querySelector('.room').dataset, seconds)",
        {name: str(value) for name, value in seconds.items()},
    )


async def test_a_silent_connection_is_noticed_though_nothing_is_sent(
    room, proxy, open_page
):
    between = await proxy(room.port)
    ann = await open_page(between.url, "ann")
    between.go_silent()
    await hurry_page(ann, silence=0.5, answer=0.5)
    await ann.wait_for_selector("#status[data-status=offline]")
    assert await ann.inner_text("#online") == ""
    await ann.locator("#reason", has_text="does not answer").wait_for()
    between.recover()
    await wait(ann, ONLINE)
    assert await ann.inner_text("#reason") == ""


async def test_waking_up_looks_at_the_clock_at_once(room, proxy, open_page):
    """A laptop that slept for an hour: its timers stood still, its clock did not."""
    between = await proxy(room.port)
    ann = await open_page(between.url, "ann")
    between.go_silent()
    await ann.evaluate("""() => {
        const now = Date.now();
        Date.now = () => now + 3_600_000;
        document.dispatchEvent(new Event("visibilitychange"));
    }""")
    assert await ann.inner_text("#status") == "connecting"


async def test_a_late_close_of_an_old_socket_changes_nothing(room, open_page):
    """A browser takes up to a minute to close a dead socket."""

    async def prepare(page):
        await page.add_init_script("""
            window.sockets = [];
            window.WebSocket = class extends WebSocket {
                constructor(...all) { super(...all); window.sockets.push(this); }
                close() { window.late = () => this.onclose?.({ code: 1006 }); }
            };
        """)

    ann = await open_page(room.url, "ann", prepare)
    await wait(ann, ONLINE)
    await hurry_page(ann, silence=0.1)
    await wait(ann, "sockets.length > 1")
    await hurry_page(ann, silence=45)
    await wait(ann, ONLINE)
    await ann.evaluate("late()")
    assert await ann.inner_text("#status") == "online"


# --- Nothing without a limit ---
async def test_two_processes_of_which_one_is_held_back(
    start, mongodb, proxy, open_page
):
    """The page comes back to a process that stands still for 10 s, then is behind."""
    environment = {
        "MONGO_HOST": mongodb,
        "MONGO_DB_NAME": f"test-{ObjectId()}",
        "SECRET_KEY": "any text",
    }
    ahead = start(**environment).wait_until_ready()
    behind = start(**environment).wait_until_ready()
    between = await proxy(ahead.port)
    ann = await open_page(between.url, "ann")
    bob = await open_page(f"{ahead.url}/", "bob")
    await write(ann, "before")
    await shown(ann, "before")
    freeze(behind.process)
    expected = ["before"] + [f"while it stands {number}" for number in range(5)]
    for text in expected[1:]:
        await write(bob, text)
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
    assert await ann.evaluate(TEXTS) == await bob.evaluate(TEXTS) == expected
    assert ann.loads == 1


async def open_scripted(open_page, room, **welcome):
    script = Script(**welcome)
    page = await open_page(room.url, "ann", script.prepare)
    return page, script


def heartbeat(last):
    return {"type": "heartbeat", "last": last}


async def test_a_process_that_catches_up_makes_no_page_reload(room, open_page):
    await room.post_many(3)
    ann, script = await open_scripted(open_page, room, last=1)
    await wait(ann, ONLINE)
    script.send(heartbeat(2))
    for number in range(2, 5):  # what it is behind with; the page knows 2 and 3
        script.send_message(
            number, nonce=room.room.history.events.get(number, {}).get("nonce")
        )
    script.send(heartbeat(4), heartbeat(4))
    await shown(ann, "text 4")
    assert await ann.evaluate(TEXTS) == [f"text {number}" for number in range(1, 5)]
    assert ann.loads == 1


async def test_another_history_reloads_the_page_once_a_minute_at_most(room, open_page):
    """The server insists on fewer messages than the page has seen."""
    await room.post_many(3)
    ann, script = await open_scripted(open_page, room, last=1)
    await wait(ann, ONLINE)
    script.send(heartbeat(1))
    await asyncio.sleep(0.2)
    assert ann.loads == 1
    script.send(heartbeat(1))
    await until(lambda: ann.loads == 2 and len(script.ends) == 2)
    await wait(ann, ONLINE)
    script.send(*[heartbeat(1)] * 5)
    script.send_message(9)  # a gap, which also wants a reload
    await shown(ann, "text 9")
    await asyncio.sleep(0.5)
    assert ann.loads == 2


PAUSES = """
    const { setTimeout } = window;
    window.pauses = [];
    window.setTimeout = (work, pause) => {
        if (!String(work).includes("connect")) return setTimeout(work, pause);
        window.pauses.push(pause);
        return setTimeout(work, 0);
    };
"""


@pytest.mark.parametrize("code, longest", [(1001, 750), (1011, 12_000)])
async def test_pauses_grow_unless_the_server_says_that_it_stops(
    room, open_page, code, longest
):
    """It welcomes and hangs up five times: 1001 is what a restart looks like."""
    script = Script()

    async def prepare(page):
        await page.add_init_script(PAUSES)
        await script.prepare(page)

    ann = await open_page(room.url, "ann", prepare)
    for number in range(5):
        await until(lambda number=number: len(script.ends) == number + 1)
        await wait(ann, ONLINE)
        await script.ends[-1].close(code=code)
        await wait(ann, f"pauses.length === {number + 1}")
    assert longest / 3 <= await ann.evaluate("pauses.at(-1)") <= longest


async def test_a_gap_and_a_replaced_message_reload_the_page(room, open_page):
    await room.post_many(3)
    for number in 9, 2:  # a number too far; a number that was another message
        ann, script = await open_scripted(open_page, room, last=3)
        await wait(ann, ONLINE)
        script.send_message(number, nonce="another")
        await until(lambda page=ann: page.loads == 2)


async def test_a_page_without_a_server_does_not_reload_until_there_is_one(
    room, open_page
):
    """Otherwise the browser's error page would take the place of the chat."""
    ann, script = await open_scripted(open_page, room)
    await wait(ann, ONLINE)
    script.send_message(9)
    await until(lambda: ann.loads == 2)
    await wait(ann, ONLINE)
    await hurry_page(ann, reload=1)
    await ann.evaluate("sessionStorage.left = Date.now()")  # it reloaded just now
    script.send_message(9)
    script.is_away = True
    await script.ends[-1].close()
    await asyncio.sleep(2)
    assert ann.loads == 2
    script.is_away = False
    script.send(script.welcome)
    await until(lambda: ann.loads == 3)


async def test_a_page_without_storage_waits_before_it_reloads(room, open_page):
    """It cannot remember when it last did. So it waits until it is a minute old."""
    script = Script(last=0)

    async def prepare(page):
        await script.prepare(page)
        await page.add_init_script(NO_STORAGE)

    ann = await open_page(room.url, "ann", prepare)
    await wait(ann, ONLINE)
    await hurry_page(ann, reload=1)
    script.send_message(9)
    await until(lambda: ann.loads == 2)
    await wait(ann, ONLINE)
    script.send_message(9)
    await shown(ann, "text 9")
    await asyncio.sleep(0.5)
    assert ann.loads == 2


async def test_an_event_that_the_page_does_not_know_is_an_error(room, open_page):
    ann, script = await open_scripted(open_page, room)
    await wait(ann, ONLINE)
    script.send({"type": "from the future"})
    script.send_message(1)
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
    cookies = await ann.context.cookies(), await bob.context.cookies()
    between.go_silent()
    await hurry_page(ann, answer=0.5, retry=0.2)
    await write(ann, "typed by ann")
    await ann.fill("#text", "half a sen")
    await ann.wait_for_selector("#status[data-status=offline]")
    await ann.context.add_cookies(cookies[1])
    between.recover()
    between.cut_all()  # the browser must not load a page over a line that is dead
    await ann.wait_for_selector(".room[data-user=bob] #status[data-status=online]")
    assert await ann.locator(".pending").count() == 0
    assert await ann.input_value("#text") == ""
    await write(ann, "typed by bob")
    await shown(ann, "typed by bob")
    await ann.context.add_cookies(cookies[0])
    await ann.reload()
    await shown(ann, "typed by ann")
    assert await ann.input_value("#text") == "half a sen"
    who = "[...document.querySelectorAll('[data-id] strong')].map(e => e.textContent)"
    assert await ann.evaluate(who) == ["bob", "ann"]


async def test_signing_out_takes_the_other_tabs_to_the_sign_in(room, open_page):
    ann = await open_page(room.url, "ann")
    other = await second_tab(ann, room.url)
    await ann.click("#signout button")
    await ann.wait_for_url("**/login")
    await other.wait_for_url("**/login?why=ended")
    assert "session has ended" in await other.inner_text("[role=status]")
    assert other.errors == []


async def test_a_deleted_account_finds_itself_at_the_sign_in(room, open_page):
    ann, sockets = await open_page(room.url, "ann"), []
    ann.on("websocket", lambda socket: sockets.append(socket))
    await chat.User(room.db).delete(room.user_id("ann"))
    await ann.wait_for_url("**/login?why=ended")
    assert sockets == []  # it need not try again to find out
    assert "the account is gone" in await ann.inner_text("[role=status]")


async def test_a_session_that_ended_meanwhile_leads_to_the_sign_in(room, open_page):
    ann = await open_page(room.url, "ann")
    await ann.context.clear_cookies()
    await chat.close(list(room.room.connections), 1001)
    await ann.wait_for_url("**/login?why=ended")


async def test_signing_in_again_in_another_tab_is_noticed_at_once(room, open_page):
    """The page has just reloaded, so it waits with the sign-in, and says why."""
    ann = await open_page(room.url, "ann")
    await ann.evaluate("sessionStorage.left = Date.now()")
    cookies = await ann.context.cookies()
    await ann.context.clear_cookies()
    await chat.close(list(room.room.connections), 1001)
    await ann.locator("#reason", has_text="session has ended").wait_for()
    await ann.context.add_cookies(cookies)
    await hurry_page(ann, reload=1)
    await second_tab(ann, room.url)
    await wait(ann, ONLINE)
    assert await ann.inner_text("#reason") == ""
    await asyncio.sleep(1.5)
    assert ann.loads == 1  # the page is whole, so it stays


# --- The outbox ---
NO_STORAGE = """Object.defineProperty(window, "sessionStorage", {
    get() { throw new DOMException("refused", "SecurityError"); },
});"""
FULL_STORAGE = """Storage.prototype.setItem = () => {
    throw new DOMException("full", "QuotaExceededError");
};"""


@pytest.mark.parametrize("storage", [NO_STORAGE, FULL_STORAGE], ids=["refused", "full"])
async def test_the_outbox_works_without_storage(room, open_page, storage):
    async def prepare(page):
        await page.add_init_script(storage)

    ann = await open_page(room.url, "ann", prepare)
    await wait(ann, ONLINE)
    for text in "one", "two":
        await write(ann, text)
    await shown(ann, "two")
    assert await ann.evaluate(TEXTS) == ["one", "two"]


async def test_after_a_restart_in_memory_the_unsent_text_outlives_the_login(
    start, open_page
):
    """The account is gone with the process; what was typed stays in the tab."""
    port = str(unused_port())
    process = start(PORT=port).wait_until_ready()
    url = f"{process.url}/"
    ann = await open_page(url, "ann")
    process.process.kill()
    await ann.wait_for_selector("#status[data-status=offline]")
    await write(ann, "sent while away")
    await ann.fill("#text", "half a sen")
    start(PORT=port).wait_until_ready()
    await ann.wait_for_url("**/login?why=ended")
    await ann.context.request.post(f"{url}signin", form=account("ann"))
    await ann.goto(url)
    await shown(ann, "sent while away")
    assert await ann.evaluate(TEXTS) == ["sent while away"]
    assert await ann.input_value("#text") == "half a sen"


async def open_with_a_message_not_saved(open_page, room, text):
    ann, script = await open_scripted(open_page, room)
    await wait(ann, ONLINE)
    await write(ann, text)
    await until(lambda: script.received)
    nonce, sentence = script.received[0]["nonce"], "The page keeps trying."
    script.send(
        {"type": "error", "code": "not_saved", "text": sentence, "nonce": nonce}
    )
    await ann.locator("#reason", has_text=sentence).wait_for()
    return ann, script, nonce


async def test_a_message_that_was_not_saved_is_sent_again(room, open_page):
    ann, script, nonce = await open_with_a_message_not_saved(open_page, room, "not yet")
    await until(lambda: len(script.received) == 2)
    assert script.received[1] == script.received[0]
    assert await ann.locator(".pending").count() == 1
    script.send({"type": "receipt", "nonce": nonce, "id": 1})
    await wait(ann, "document.getElementById('reason').textContent === ''")
    script.send_message(1, "not yet", "ann", nonce)
    await shown(ann, "not yet")
    assert await ann.locator(".pending").count() == 0


async def test_a_message_that_was_saved_after_all_is_not_tried_again(room, open_page):
    """The server's deadline passed, and the write succeeded: its broadcast comes."""
    ann, script, nonce = await open_with_a_message_not_saved(open_page, room, "saved")
    script.send_message(1, "saved", "ann", nonce)
    await wait(ann, "document.getElementById('reason').textContent === ''")
    await asyncio.sleep(2.5)
    assert len(script.received) == 1


async def test_one_message_at_a_time_waits_for_its_receipt(room, open_page):
    """The receipt comes after the message, before it, or for a repeated message."""
    ann, script = await open_scripted(open_page, room)
    await wait(ann, ONLINE)
    for text in "one", "two", "three":
        await write(ann, text)
    await until(lambda: script.received)
    await asyncio.sleep(0.2)
    assert [event["text"] for event in script.received] == ["one"]
    script.send_message(1, "one", "ann", script.received[0]["nonce"])
    await shown(ann, "one")
    assert len(script.received) == 1
    script.send({"type": "receipt", "nonce": script.received[0]["nonce"], "id": 1})
    await until(lambda: len(script.received) == 2)
    script.send({"type": "receipt", "nonce": script.received[1]["nonce"], "id": 2})
    await until(lambda: len(script.received) == 3)
    assert await ann.locator(".pending").count() == 2
    script.send_message(2, "two", "ann", script.received[1]["nonce"])
    script.send({"type": "receipt", "nonce": script.received[2]["nonce"], "id": 1})
    await wait(ann, "document.querySelector('.pending') === null")
    assert await ann.evaluate(TEXTS) == ["one", "two"]


async def test_the_sender_sees_the_text_that_the_server_stored(room, open_page):
    """A server may have commands: it stores "/me waves" as something else."""
    ann, script = await open_scripted(open_page, room)
    await wait(ann, ONLINE)
    await write(ann, "/me waves")
    await until(lambda: script.received)
    script.send_message(1, "* ann waves", "ann", script.received[0]["nonce"])
    await shown(ann, "* ann waves")
    assert await ann.evaluate(TEXTS) == ["* ann waves"]


REFUSALS = {
    "with its nonce": lambda nonce: {"nonce": nonce},
    "without a nonce": lambda nonce: {},
}


@pytest.mark.parametrize("how", REFUSALS)
async def test_a_refused_message_comes_back_and_the_next_one_goes(room, open_page, how):
    ann, script = await open_scripted(open_page, room)
    await wait(ann, ONLINE)
    for text in "refused", "the next":
        await write(ann, text)
    await ann.fill("#text", "half a sen")
    await ann.press("#text", "ArrowLeft")
    await until(lambda: script.received)
    reason = {"type": "error", "code": "bad_event", "text": "Not this."}
    script.send(reason | REFUSALS[how](script.received[0]["nonce"]))
    await until(lambda: len(script.received) == 2)
    assert script.received[1]["text"] == "the next"
    assert await ann.inner_text("#problem") == "Not this."
    assert await ann.input_value("#text") == "refused\nhalf a sen"
    assert await ann.locator(".pending").count() == 1
    script.send({"type": "receipt", "nonce": script.received[1]["nonce"], "id": 1})
    script.send_message(1, "the next", "ann", script.received[1]["nonce"])
    await shown(ann, "the next")
    assert await ann.inner_text("#problem") == "Not this."
    box = "document.getElementById('text')"
    assert await ann.evaluate(f"{box}.value[{box}.selectionStart]") == "n"
    await ann.reload()
    assert await ann.input_value("#text") == "refused\nhalf a sen"


async def test_a_frame_too_big_for_the_server_comes_back(room, open_page):
    ann, script = await open_scripted(open_page, room)
    await wait(ann, ONLINE)
    for text in "too big", "the next":
        await write(ann, text)
    await until(lambda: script.received)
    await script.ends[0].close(code=1009)
    await until(lambda: len(script.received) == 2)
    assert script.received[1]["text"] == "the next"
    assert await ann.input_value("#text") == "too big"
    assert "too long" in await ann.inner_text("#problem")
    await ann.keyboard.type("!")
    assert await ann.input_value("#text") == "too big!"


async def test_a_message_too_long_stays_in_the_box(serve, open_page):
    room = await serve(MAX_MESSAGE_LENGTH=10)
    ann = await open_page(room.url, "ann")
    await write(ann, "eleven, no?")
    await ann.locator("#problem", has_text="at most 10 characters").wait_for()
    assert await ann.input_value("#text") == "eleven, no?"
    await write(ann, "😀" * 10)
    await shown(ann, "😀" * 10)


async def test_a_blank_message_comes_back_with_the_reason(room, open_page):
    """Three spaces of no width: the page takes them for text, the server does not."""
    ann = await open_page(room.url, "ann")
    await write(ann, "\u200b" * 3)
    await wait(ann, "document.getElementById('problem').textContent !== ''")
    assert await ann.input_value("#text") == "\u200b" * 3
    assert await ann.locator(".pending").count() == 0


async def test_a_user_who_types_too_fast_loses_nothing(serve, open_page):
    room = await serve(MESSAGE_BURST=2, MESSAGES_PER_SECOND=10)
    ann = await open_page(room.url, "ann")
    expected = [f"message {number}" for number in range(6)]
    for text in expected:
        await write(ann, text)
    await shown(ann, expected[-1])
    assert await ann.evaluate(TEXTS) == expected


async def test_before_its_scripts_run_the_page_takes_no_text(room, open_page):
    """It would be lost: to the draft that is kept, or as a form sent to nowhere."""
    ann = await open_page(room.url, "ann")
    await ann.fill("#text", "half a sen")
    asked, go_on = await hold_answers(ann, "**/log.js")
    await ann.reload(wait_until="commit")
    await asked.wait()
    await ann.focus("#text")
    await ann.keyboard.type("lost")
    assert await ann.input_value("#text") == ""
    go_on.set()
    await wait(ann, ONLINE)
    await ann.keyboard.type("tence")
    assert await ann.input_value("#text") == "half a sentence"


async def test_a_page_without_storage_does_not_reload_over_your_text(room, open_page):
    script = Script()

    async def prepare(page):
        await page.add_init_script(FULL_STORAGE)
        await script.prepare(page)

    ann = await open_page(room.url, "ann", prepare)
    await wait(ann, ONLINE)
    await hurry_page(ann, reload=0.2)
    asked = []
    ann.on("dialog", lambda dialog: asked.append(dialog))
    await ann.click("#text")
    await ann.keyboard.type("half a sen")
    script.send_message(9)  # a gap
    await asyncio.sleep(1)
    assert (ann.loads, await ann.input_value("#text")) == (1, "half a sen")
    back = "void dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))"
    await ann.evaluate(f"setTimeout(() => {back})")
    await until(lambda: asked)
    await asked[0].dismiss()
    assert await ann.input_value("#text") == "half a sen"
    await ann.fill("#text", "")
    await until(lambda: script.send(heartbeat(9)) or ann.loads == 2)


async def test_a_reload_that_is_stopped_leaves_a_page_that_works(room, open_page):
    ann, script = await open_scripted(open_page, room)
    await wait(ann, ONLINE)
    await hurry_page(ann, answer=1)
    asked = []
    await ann.route(room.url, lambda route: asked.append(route))  # no answer
    await ann.evaluate(
        """() => addEventListener("beforeunload", () => setTimeout(() => {
            window.stop();
            document.title = "stopped";
        }, 300), { once: true })"""
    )
    script.send_message(9)  # a gap
    await wait(ann, "document.title === 'stopped'")
    assert len(asked) == 1
    await write(ann, "still here")
    await until(lambda: script.received)
    assert await ann.evaluate(ONLINE)
    await ann.unroute(room.url)
    await hurry_page(ann, reload=0.2)
    await until(lambda: script.send(heartbeat(9)) or ann.loads == 2)  # it tries again


async def test_a_tab_with_unsent_messages_asks_before_it_closes(room, open_page):
    ann, script = await open_scripted(open_page, room)
    await wait(ann, ONLINE)
    asked = []

    async def stay(dialog):
        asked.append(dialog.type)
        await dialog.dismiss()

    ann.on("dialog", stay)
    await write(ann, "unsent")
    await until(lambda: script.received)
    await ann.close(run_before_unload=True)
    await until(lambda: asked == ["beforeunload"])
    script.send_message(9)  # a gap: the page's own reload asks nothing
    await until(lambda: ann.loads == 2)
    assert asked == ["beforeunload"]


# --- Flat ---
COUNT_BATCHES = """() => {  // what is added in one task is laid out together
    window.batches = [];
    new MutationObserver((changes) => window.batches.push(
        changes.flatMap((c) => [...c.addedNodes]).filter((e) => e.dataset?.id).length
    )).observe(document.getElementById("messages"), { childList: true });
}"""


async def test_a_thousand_missed_messages_cost_one_layout(room, proxy, open_page):
    between = await proxy(room.port)
    ann = await open_page(between.url, "ann")
    await ann.evaluate(COUNT_BATCHES)
    between.go_silent()
    between.cut_all()
    await ann.wait_for_selector("#status:not([data-status=online])")
    await room.post_many(1_000)
    between.recover()
    await shown(ann, "text 1000")
    assert await ann.evaluate("batches.filter((size) => size > 0)") == [1_000]
    assert ann.loads == 1


async def test_the_log_stays_flat_and_the_rest_is_behind_older_messages(
    room, open_page
):
    """The newest 300 lines stay, and up to 50 more until they are removed together."""
    await room.post_many(420)
    ann, script = await open_scripted(open_page, room, last=420)
    await wait(ann, ONLINE)
    for number in range(421, 1_421):
        script.send_message(number)
    await shown(ann, "text 1420")
    assert (
        await ann.evaluate("document.querySelectorAll('#messages > li').length") < 350
    )
    first = await ann.get_attribute("#messages [data-id]", "data-id")
    assert (await ann.get_attribute("#older", "href")).endswith(f"?before={first}")
    assert (
        await ann.locator(".day").first.evaluate("e => e.previousElementSibling")
        is None
    )


async def test_a_page_that_nobody_looks_at_stays_flat_too(room, open_page):
    """Its reader scrolled up, and left it for the night."""
    ann, script = await open_scripted(open_page, room)
    await wait(ann, ONLINE)
    for number in range(1, 51):
        script.send_message(number)
    await shown(ann, "text 50")
    await scroll(ann, "10")
    await ann.evaluate("Object.defineProperty(document, 'hidden', { value: true })")
    for number in range(51, 1_051):
        script.send_message(number)
        if number % 200 == 0:
            await shown(ann, f"text {number}")
    await shown(ann, "text 1050")
    assert await ann.evaluate("messages.children.length") < 600


async def test_two_thousand_people_cost_one_item_each(room, open_page):
    names = [f"user{number:04}" for number in range(2_000)]
    ann, script = await open_scripted(open_page, room, online=["ann", *names])
    await wait(ann, ONLINE)
    await ann.evaluate("""() => {
        window.changes = [];
        const observer = new MutationObserver((all) => window.changes.push(...all));
        const online = document.getElementById("online");
        observer.observe(online, { childList: true, subtree: true });
    }""")
    script.send(
        {"type": "joined", "user": "newcomer"}, {"type": "left", "user": "user0999"}
    )
    await wait(ann, "changes.length === 2")
    expected = ["ann", "newcomer", *(name for name in names if name != "user0999")]
    assert await ann.locator("#online li").all_text_contents() == expected
    assert await ann.inner_text("#count") == "2001"


async def test_joins_and_leaves_that_follow_each_other_share_one_line(room, open_page):
    ann, script = await open_scripted(open_page, room)
    await wait(ann, ONLINE)
    script.send(*[{"type": "joined", "user": f"user{n:03}"} for n in range(1_000)])
    script.send({"type": "left", "user": "user007"})
    line = "user000, user001, user002, 996 others joined · user007 left"
    await ann.locator(".notice", has_text=line).wait_for()
    assert await ann.locator(".notice").count() == 1
    script.send_message(1)
    script.send({"type": "joined", "user": "user007"})
    await ann.locator(".notice >> nth=1", has_text="user007 joined").wait_for()


async def test_scrolling_back_and_coming_back_to_the_end(room, open_page):
    await room.post_many(420)
    ann = await open_page(room.url, "ann")
    top = """() => {
        const item = document.querySelector("[data-id='371']");
        return item && Math.round(item.getBoundingClientRect().top);
    }"""
    await scroll(ann, "0")
    before = await ann.evaluate(top)
    await ann.evaluate("older.click(), older.click()")  # one at a time
    await shown(ann, "text 321")
    assert abs(await ann.evaluate(top) - before) <= 1
    for first in 271, 221, 171, 121, 71, 21, 1:
        await ann.click("#older")
        await shown(ann, f"text {first}")
    assert await ann.evaluate(TEXTS) == [f"text {n}" for n in range(1, 421)]
    assert not await ann.is_visible("#older")
    assert await ann.locator(".day").count() == 1
    await scroll(ann, "log.scrollHeight")
    await room.post("text 421")
    await shown(ann, "text 421")
    assert await ann.evaluate("messages.children.length") == 300
    await scroll(ann, "0")
    first = int(await ann.get_attribute("#messages [data-id]", "data-id"))
    await ann.click("#older")
    await shown(ann, f"text {first - 50}")
    assert await ann.evaluate(TEXTS) == [f"text {n}" for n in range(first - 50, 422)]


async def hold_answers(page, pattern):
    """Hold the answers to a page's requests. Return two events: asked, and go on."""
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def hold(route):
        answer = await route.fetch()
        asked.set()
        await go_on.wait()
        await route.fulfill(response=answer)

    await page.route(pattern, hold)
    return asked, go_on


async def test_while_older_messages_load_you_go_on(room, open_page):
    """You type, and an operator takes a message back that is on its way."""
    await room.post_many(60)
    ann = await open_page(room.url, "ann")
    asked, go_on = await hold_answers(ann, "**/?before=*")
    await scroll(ann, "0")
    top = """Math.round(
        document.querySelector("[data-id='11']").getBoundingClientRect().top)"""
    before = await ann.evaluate(top)
    await ann.click("#older")
    await asked.wait()
    assert await ann.inner_text("#older") == "Loading …"
    await ann.click("#text")
    await ann.keyboard.type("hel")
    await chat.Message(room.db).blank(5)
    await chat.Message(room.db).blank(60)
    await wait(ann, "document.querySelector('.removed') !== null")
    go_on.set()
    await shown(ann, "text 1")
    await ann.keyboard.type("lo")
    assert await ann.input_value("#text") == "hello"
    assert "text 5" not in await ann.evaluate(TEXTS)
    assert abs(await ann.evaluate(top) - before) <= 1


async def test_older_messages_open_in_a_tab_of_their_own(room, open_page):
    await room.post_many(60)
    ann = await open_page(room.url, "ann")
    async with ann.context.expect_page() as opened:
        await ann.click("#older", modifiers=["Control"])
    await (await opened.value).wait_for_url("**/?before=11")
    assert len(await ann.evaluate(TEXTS)) == 50


async def test_older_messages_that_are_not_kept_are_a_sentence(room, open_page):
    """In memory the chat keeps about a thousand: the page knows of more."""
    await room.post_many(60)
    ann = await open_page(room.url, "ann")
    await room.db.messages.delete_many({})
    await ann.wait_for_selector("#log[aria-busy=false]")
    await ann.click("#older")
    await ann.locator("#older-note", has_text="not kept").wait_for()
    busy = await ann.get_attribute("#log", "aria-busy")
    assert busy == "false"  # or the sentence is not spoken
    assert not await ann.is_visible("#older")
    assert await ann.evaluate("document.activeElement.id") == "log"
    await scroll(ann, "log.scrollHeight")
    await room.post_many(400)
    await shown(ann, "text 400")
    assert await ann.is_visible("#older")  # these are kept
    assert await ann.inner_text("#older-note") == ""


async def test_signing_out_that_does_not_work_is_a_sentence(room, open_page):
    ann = await open_page(room.url, "ann")
    await ann.route("**/signout", lambda route: route.abort())
    await ann.click("#signout button")
    await ann.locator("#reason", has_text="still signed in").wait_for()


async def test_older_messages_that_do_not_come_are_a_sentence(room, open_page):
    await room.post_many(60)
    ann = await open_page(room.url, "ann")
    await ann.route("**/?before=*", lambda route: route.abort())
    await ann.click("#older")
    await ann.locator("#older-note", has_text="could not be loaded").wait_for()
    await ann.unroute("**/?before=*")
    await ann.click("#older")
    await shown(ann, "text 1")
    assert await ann.inner_text("#older-note") == ""


# --- What people expect ---
AT_END = "log.scrollHeight - log.scrollTop - log.clientHeight < 5"


async def test_a_reader_who_scrolled_up_is_told_of_new_messages(room, open_page):
    await room.post_many(50)
    ann = await open_page(room.url, "ann")
    assert await ann.evaluate(AT_END)
    await room.post("followed")
    await shown(ann, "followed")
    assert await ann.evaluate(AT_END)
    assert not await ann.is_visible("#new")
    await scroll(ann, "10")
    for text in "one", "two":
        await room.post(text)
    await ann.locator("#new", has_text="2 new messages").wait_for()
    assert await ann.evaluate("log.scrollTop") == 10
    await ann.click("#new")
    assert await ann.evaluate(AT_END)
    assert not await ann.is_visible("#new")


async def test_the_end_stays_in_sight_when_the_log_changes_its_height(room, open_page):
    await room.post_many(10)
    size = {"width": 1000, "height": 400}
    ann = await open_page(room.url, "ann", viewport=size)
    await scroll(ann, "0")
    await ann.set_viewport_size(size | {"height": 1600})  # all is in sight
    await ann.route("**/?before=*", lambda route: route.abort())
    await ann.evaluate("older.click()")
    await ann.locator("#older-note", has_text="could not be loaded").wait_for()
    await room.post("news")
    await shown(ann, "news")
    assert not await ann.is_visible("#new")
    await ann.evaluate("""() => {  // a phone's keyboard, and a scroll event before all
        document.querySelector(".room").style.height = "400px";
        log.dispatchEvent(new Event("scroll"));
    }""")
    await room.post("more news")
    await shown(ann, "more news")
    await wait(ann, AT_END)
    assert not await ann.is_visible("#new")


async def test_a_reader_scrolls_up_slowly_in_a_busy_room(room, open_page):
    """A touchpad moves by a few pixels, and a message comes after each move."""
    await room.post_many(50)
    ann = await open_page(room.url, "ann")
    for number in range(4):
        await scroll(ann, "log.scrollTop - 9")
        await room.post(f"news {number}")
        await shown(ann, f"news {number}")
    assert await ann.inner_text("#new") == "4 new messages"


async def test_a_removed_message_says_so(room, open_page):
    """An operator blanks it: on an open page, in the history, and for a newcomer."""
    for text in "fine", "to be removed", "tall\n" * 30:
        await room.post(text)
    ann = await open_page(room.url, "ann")
    for number in 2, 3:
        await chat.Message(room.db).blank(number)
    removed = "This message was removed."
    await wait(ann, "document.querySelectorAll('.removed').length === 2")
    assert await ann.evaluate(TEXTS) == ["fine", removed, removed]
    assert await ann.locator(".folded, #messages button").count() == 0
    await ann.reload()
    assert await ann.evaluate(TEXTS) == ["fine", removed, removed]
    assert await ann.locator(".removed").count() == 2


async def test_a_long_text_is_folded_until_somebody_wants_it(room, open_page):
    for text in "\n".join("x" * 30), "\n".join("x" * 15), "long " * 180:
        await room.post(text)
    ann = await open_page(room.url, "ann", viewport={"width": 360, "height": 640})
    await room.post("\n".join("y" * 1_000)[:1_000])
    folded = ann.locator("li.folded")
    await wait(ann, "document.querySelectorAll('.folded').length === 3")
    for height in await folded.evaluate_all("items => items.map(e => e.offsetHeight)"):
        assert height < 600
    await folded.first.locator("text=Show all").click()
    assert await folded.count() == 2
    assert await ann.locator("li p").first.evaluate("e => e.offsetHeight") > 700


async def test_a_text_that_was_unfolded_stays_as_it_is(room, open_page):
    """While it gets its number, and when the next message comes."""
    ann, script = await open_scripted(open_page, room)
    await wait(ann, ONLINE)
    text = "\n".join("x" * 60)
    await write(ann, text)
    await until(lambda: script.received)
    await ann.focus("text=Show all")
    await ann.keyboard.press("Enter")
    assert await ann.evaluate("document.activeElement.id") == "log"
    before = await ann.evaluate("log.scrollTop")
    script.send_message(1, text, "ann", script.received[0]["nonce"])
    script.send_message(2)
    await shown(ann, "text 2")
    assert await ann.locator(".folded").count() == 0
    assert await ann.evaluate("log.scrollTop") == before


async def test_the_day_is_told_and_told_again_after_midnight(room, open_page):
    await room.post("yesterday's")
    ann = await open_page(room.url, "ann", locale="en-US", timezone_id="UTC")
    clock = await ann.inner_text("#messages time")
    assert re.fullmatch(r"\d+:\d\d\s[AP]M", clock)
    day = await ann.inner_text(".day")
    assert datetime.now(UTC).strftime("%A") in day
    await ann.evaluate("""() => {  // a day later
        const Today = Date;
        Date = class extends Today {
            constructor(...all) { super(...(all.length ? all : [Date.now()])); }
            static now() { return Today.now() + 86_400_000; }
        };
    }""")
    await wait(ann, f"document.querySelector('time').textContent.length > {len(clock)}")
    yesterday = datetime.now(UTC).strftime("%b %-d")
    assert await ann.inner_text("#messages time") == f"{yesterday}, {clock}"
    assert await ann.locator(".day").all_inner_texts() == [day]


async def test_unread_messages_are_counted_in_the_title(room, open_page):
    ann = await open_page(room.url, "ann")
    await ann.evaluate(
        "Object.defineProperty(document, 'hidden', { value: true, writable: true })"
    )
    for name in "bob", "bob", "ann":  # one's own are not news
        await room.post("hello", name)
    await wait(ann, f"{TEXTS}.length === 3")
    assert await ann.title() == "(2) Chat"
    await ann.evaluate("document.hidden = false")
    await ann.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    assert await ann.title() == "Chat"


async def test_after_sending_the_focus_is_in_the_box(room, open_page):
    ann = await open_page(room.url, "ann")
    await ann.fill("#text", "by the button")
    await ann.click("#send button")
    await ann.keyboard.type("next")
    assert await ann.input_value("#text") == "next"


async def test_printing_shows_all_that_is_loaded(room, open_page):
    await room.post_many(50)
    ann = await open_page(room.url, "ann")
    await ann.emulate_media(media="print")
    assert await ann.evaluate("log.scrollHeight === log.clientHeight")
    first = await ann.locator("[data-id='1']").bounding_box()
    last = await ann.locator("[data-id='50']").bounding_box()
    height = await ann.evaluate("document.documentElement.scrollHeight")
    assert 0 <= first["y"] < last["y"] < height
    assert not await ann.is_visible("#send")


async def test_a_page_in_a_frame_never_takes_the_focus(room, open_page, around):
    """As in a notebook, whose keyboard shortcuts would go into the chat."""
    ann = await open_page(room.url, "ann")
    await ann.goto(await around(room.url))
    frame = ann.frame_locator("iframe")
    await frame.locator("#status[data-status=online]").wait_for()
    assert await ann.evaluate("document.activeElement.id") == "cell"
    await frame.locator("#text").fill("from the frame")
    await frame.locator("#text").press("Enter")
    await frame.locator("[data-id]", has_text="from the frame").wait_for()


async def test_markup_arrives_as_text(room, open_page):
    ann = await open_page(room.url, "ann")
    bob = await open_page(room.url, "bob")
    markup = "<img src=x onerror=\"document.title='hacked'\"><b>bold</b>\n&amp; 'x'"
    await write(ann, markup)
    for page in ann, bob:
        await shown(page, markup)
    await bob.reload()
    assert await bob.evaluate(TEXTS) == [markup]
    assert await bob.locator("#log img, #log b").count() == 0
    assert await bob.title() == "Chat"


async def test_forms_and_history_work_without_javascript(room, open_page):
    await room.post_many(60)
    bob = await open_page(room.url, "bob", java_script_enabled=False)
    assert (await bob.locator("[data-id] p").all_inner_texts())[0] == "text 11"
    assert "needs JavaScript" in await bob.inner_text("noscript")
    await bob.click("#older")
    assert (await bob.locator("[data-id] p").all_inner_texts())[0] == "text 1"
    await bob.click("text=Sign out")
    await bob.wait_for_url("**/login")


# --- It says why ---
async def test_a_browser_that_keeps_no_cookie_is_told(room, proxy, open_page):
    between = await proxy(room.port)
    between.swap = b"Set-Cookie", b"Not-Cookie"  # the browser never gets to see it
    page = await open_page(f"{between.url}signin")
    for name, value in account("ann").items():
        await page.fill(f"#{name}", value)
    await page.click("main button")
    await page.locator("[role=status]", has_text="did not keep the cookie").wait_for()


async def test_too_many_windows_are_told(serve, open_page):
    room = await serve(CONNECTIONS_PER_PERSON=1)
    ann = await open_page(room.url, "ann")
    other = watch(await ann.context.new_page())
    await other.goto(room.url)
    await other.locator("#reason", has_text="too many windows").wait_for()
    await hurry_page(other, retry=0.2)
    await ann.close()
    await wait(other, ONLINE)
    assert await other.inner_text("#reason") == ""


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(503, "out of service"), (502, "does not answer")],
)
async def test_a_server_that_has_no_time_is_told(room, open_page, status, sentence):
    ann = await open_page(room.url, "ann")
    await ann.route("**/ws", lambda route: route.fulfill(status=status))
    room.room.settings = room.room.settings.model_copy(
        update={"CONNECTIONS_PER_PERSON": 0}
    )
    await chat.close(list(room.room.connections), 1001)
    await ann.locator("#reason", has_text=sentence).wait_for()


async def test_a_proxy_that_passes_no_websockets_is_named(room, proxy, open_page):
    between = await proxy(room.port)
    ann = await open_page(between.url, "ann")
    await hurry_page(ann, retry=0.2)
    sockets = []
    ann.on("websocket", lambda socket: sockets.append(socket))
    between.hostile = True
    between.cut_all()
    sentence = "blocks WebSockets"
    await ann.locator("#reason", has_text=sentence).wait_for()
    assert len(sockets) >= 3  # it did not say so after the first
    between.hostile = False
    await wait(ann, ONLINE)
    assert await ann.inner_text("#reason") == ""


# --- For everybody ---
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing(room, open_page, scheme):
    name = "axe_playwright_python.async_playwright"
    axe = need(optional(name), f"no axe: {BROWSERS}").Axe()
    for text in "hello https://example.org", "\n".join("x" * 30), "":
        await room.post(text)
    ann = await open_page(room.url, "ann", color_scheme=scheme)
    await write(ann, "mine")
    await shown(ann, "mine")
    await ann.evaluate("document.getElementById('reason').textContent = 'A reason.'")
    script = Script(user="carl", online=["carl"])
    waiting = await open_page(room.url, "carl", script.prepare, color_scheme=scheme)
    await write(waiting, "pending")
    form = await open_page(f"{room.url}login?why=ended", color_scheme=scheme)
    wrong = await open_page(f"{room.url}signin", color_scheme=scheme)
    await wrong.fill("#login", "a!")
    await wrong.fill("#password", "x")
    await wrong.fill("#password2", "y")
    await wrong.click("main button")
    history = await ann.context.new_page()
    await history.goto(f"{room.url}?before=9")
    for page in ann, waiting, form, wrong, history:
        results = await axe.run(page)
        assert results.violations_count == 0, results.generate_report()


@pytest.mark.parametrize("width", [320, 360])
async def test_pages_fit_a_phone(room, open_page, width):
    size = {"width": width, "height": 560}
    ann = await open_page(room.url, "x" * 32, viewport=size)
    await write(ann, "long" * 200)
    await shown(ann, "long" * 200)
    form = await open_page(f"{room.url}signin", viewport=size)
    for page in ann, form:
        assert await page.evaluate("document.documentElement.scrollWidth") == width
    box = await ann.locator("#send button").bounding_box()
    assert box["y"] + box["height"] <= 560


async def test_the_chat_works_by_keyboard_alone(room, open_page):
    page = await open_page(f"{room.url}signin")
    for text in "ann", "", PASSWORD, PASSWORD:
        await page.keyboard.press("Tab")
        await page.keyboard.type(text)
    await page.keyboard.press("Enter")
    await wait(page, ONLINE)
    await page.keyboard.type("one")
    await page.keyboard.press("Shift+Enter")
    await page.keyboard.type("two")
    await page.keyboard.press("Enter")
    await shown(page, "one\ntwo")
    await page.keyboard.press("Shift+Tab")
    assert await page.evaluate("document.activeElement.id") == "log"


async def test_forced_colours_leave_edges_and_a_mark(room, open_page):
    """High contrast takes the backgrounds away."""
    await room.post("hello")
    ann = await open_page(room.url, "ann", forced_colors="active")
    await write(ann, "mine")
    await shown(ann, "mine")
    width = "e => parseFloat(getComputedStyle(e).borderInlineEndWidth)"
    assert await ann.locator("#send button").evaluate(width) >= 1
    other, own = await ann.locator("[data-id]").all()
    assert await own.evaluate(width) > await other.evaluate(width)


async def test_the_live_region_changes_once_for_each_message(room, open_page):
    """A screen reader speaks what is added, and text that changes."""
    await room.post("before")
    ann = await open_page(room.url, "ann")
    await ann.evaluate("""() => {
        window.spoken = [];
        new MutationObserver((changes) => {
            for (const { addedNodes, type, target } of changes) {
                window.spoken.push(...[...addedNodes].map((node) => node.textContent));
                if (type === "characterData") window.spoken.push(target.data);
            }
        }).observe(document.getElementById("log"),
            { childList: true, characterData: true, subtree: true });
    }""")
    await until(lambda: datetime.now(UTC).second < 55)  # or "14:01" becomes "14:02"
    await write(ann, "mine")
    await shown(ann, "mine")
    await room.post("theirs")
    await shown(ann, "theirs")
    spoken = await ann.evaluate("spoken")
    notices = [text for text in spoken if "joined" in text]  # these are aria-live="off"
    assert [text for text in spoken if text not in notices] == [
        text for text in spoken if text.endswith(("mine", "theirs"))
    ]
    assert len(spoken) - len(notices) == 2


async def test_a_translator_leaves_names_alone(room, open_page):
    await room.post("hello")
    ann = await open_page(room.url, "ann")
    await wait(ann, "document.querySelector('#online li') !== null")
    for selector in "#user", "#online li", "#messages strong":
        assert await ann.locator(selector).first.get_attribute("translate") == "no"
