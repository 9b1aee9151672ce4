"""Serve the little chat of part A: a learner's handler behind one tiny page."""

import asyncio
import contextlib
import re
import secrets
from pathlib import Path

from aiohttp import web

from workshop.cells import define, file_of
from workshop.judge import noting_what_is_not_awaited
from workshop.people import Client
from workshop.servers import HOST, Lines, frames, own_address

page = Path(__file__).with_name("page.html").read_text("utf-8")


class Guest(Client):
    """A user of the little chat, who only says a name."""

    def __init__(self, url: str, name: str, greeting: str = "") -> None:
        super().__init__(url, name)
        self.greeting, self.greetings = greeting, []

    def hear(self, event: dict) -> None:
        """Take one's own words for a receipt, too. Greet a person who joins."""
        super().hear(event)
        waiting = self.receipts.get(event.get("nonce"))
        own = event["type"] == "message" and event.get("user", self.name) == self.name
        if waiting and own and not waiting.done():
            waiting.set_result(event)
        if self.greeting and event["type"] == "joined" and event["user"] != self.name:
            nonce = secrets.token_hex()
            greeting = self.send(type="message", text=self.greeting, nonce=nonce)
            self.greetings.append(asyncio.create_task(greeting))

    async def connect(self, after: int | None = None) -> "Guest":
        """Connect, and wait until it is live if the chat says so (from step 3)."""
        more = "" if after is None else f"&after={after}"
        await self.open(f"/ws?name={self.name}{more}")
        with contextlib.suppress(TimeoutError):
            while (await self.next("joined", seconds=0.2)).get("user") != self.name:
                pass
        return self

    async def come_back(self, after: int) -> None:
        await self.connect(after)


class LittleServer:
    """A little chat that runs inside the notebook, with its own empty state."""

    def __init__(self, talk, page: str) -> None:
        # A check names the cells that it has judged; else run the handler's own again.
        self.names = define(talk.__globals__, *getattr(talk, "files", [file_of(talk)]))
        self.talk = self.names[talk.__name__]
        self.page, self.host, self.port, self.runner = page, HOST, 0, None
        self.people, self.paths, self.transports = [], [], {}
        self.log = []

    def __repr__(self) -> str:
        return f"A little chat at {self.url}"

    def _repr_html_(self) -> str:
        host = own_address() if HOST == "0.0.0.0" else "localhost"
        address = f"http://{host}:{self.port}"
        links = ", ".join(
            f'<a href="{address}{path}" target="_blank">{re.split("[=&]", path)[1]}</a>'
            for path in self.paths
        )
        return f"{frames(self, self.paths, 220)}<p>In windows of their own: {links}</p>"

    def __getattr__(self, name):
        """Return what the handler calls by this name: `server.connections`."""
        try:
            return self.names[name]
        except KeyError:
            raise AttributeError(f"The chat has no `{name}`.") from None

    async def start(self) -> None:
        async def index(request):
            return web.Response(text=self.page, content_type="text/html")

        async def ws(request):
            self.transports[request.query.get("name")] = request.transport
            return await self.talk(request)

        app = web.Application()
        app.router.add_get("/", index)
        app.router.add_get("/ws", ws)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self.runner.setup()
        await web.TCPSite(self.runner, HOST, 0).start()
        self.port = self.runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """Stop serving. aiohttp cancels the handlers that still run."""
        await self.runner.cleanup()

    async def join(self, name: str, greeting: str = "") -> Guest:
        """Let a guest connect. Its greeting, if any, is for people who join later."""
        guest = Guest(self.url, name, greeting)
        self.people.append(guest)
        return await guest.connect()

    async def send_home(self) -> None:
        for person in self.people:
            await person.close()


@contextlib.asynccontextmanager
async def serving_little(talk, page: str = page, log: bool = False):
    """Serve a handler of part A for as long as a `with` block lasts.

    What goes wrong in it is kept, as `server.log`; with `log` it is printed.
    """
    server = LittleServer(talk, page)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(Lines(server.log, log).close)
        await server.start()
        stack.push_async_callback(server.stop)
        stack.push_async_callback(server.send_home)
        yield server


@contextlib.asynccontextmanager
async def little(talk):
    """Serve a handler in a demonstration, which an attempt may end early.

    At the end say what Python has complained of.
    """
    log = []
    try:
        with noting_what_is_not_awaited() as names:
            async with serving_little(talk) as server:
                log = server.log
                yield server
    except (ConnectionError, TimeoutError, AttributeError) as error:
        print(f"Here it ends: {error}")
    for name in names:
        print(f"Python says: coroutine {name!r} was never awaited.")
    for line in log:
        print("The log says:", line)


playing: list[contextlib.AsyncExitStack] = []


async def play(talk, *names: str, page: str = page, typing: bool = False):
    """Serve a handler until `stop_playing`, and show a page for each name.

    A cell that is run again gets another server, without a person or a message.
    """
    stack = contextlib.AsyncExitStack()
    server = await stack.enter_async_context(serving_little(talk, page, log=True))
    server.paths = [f"/?name={name}{'&typing' * typing}" for name in names]
    playing.append(stack)
    return server


async def stop_playing() -> None:
    while playing:
        await playing.pop().aclose()


async def stall(talk, messages: int = 700) -> list[float]:
    """Let Bob stop reading while Ann says long things; print what became of her.

    Return how many KiB wait for Bob in the server after each message. The list ends
    where Ann has had no receipt for a second.
    """
    async with little(talk) as server:
        waiting = await stall_in(server, messages)
        kibibytes = (
            f"{waiting[-1] if waiting else 0:,.0f} KiB wait for Bob in the server."
        )
        if server.transports["bob"].is_closing():
            print(f"Ann has {len(waiting)} receipts. Bob was cut off: 0 KiB wait.")
        elif len(waiting) == messages:
            print(f"Ann has all {messages} receipts. {kibibytes}")
        else:
            print(f"After {len(waiting)} messages Ann gets no receipt any more.")
            print(kibibytes)
        return waiting
    return []


async def stall_in(server: LittleServer, messages: int = 700) -> list[float]:
    waiting = []
    ann, bob = await server.join("ann"), await server.join("bob")
    bob.reader.cancel()  # Bob's side reads no more
    with contextlib.suppress(TimeoutError):
        for _ in range(messages):
            await ann.say("x" * 10_000, seconds=1)
            waiting.append(server.transports["bob"].get_write_buffer_size() / 1024)
    return waiting
