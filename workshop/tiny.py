"""Serve the little chat of part A: a learner's handler behind one tiny page."""

import asyncio
import collections
import contextlib
import copy
import gc
import inspect
import itertools
import linecache
import re
import secrets
import warnings
from pathlib import Path
from types import CellType, FunctionType

from aiohttp import web

from workshop import scenarios
from workshop.copies import Page
from workshop.people import Client
from workshop.servers import HOST, Lines, frames, own_address

HERE = Path(__file__).parent
STEPS = "workshop.steps"
page = Page((HERE / "page.html").read_text("utf-8"))


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

    def __repr__(self) -> str:
        return f"{self.name}, a guest"

    async def connect(self, after: int | None = None) -> "Guest":
        """Connect, and wait until it is live if the chat tells us so (from step 3)."""
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
        self.talk, self.page, self.host, self.port = fresh(talk), page, HOST, 0
        self.people, self.paths, self.transports = [], [], {}
        self.log, self.warnings = [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __repr__(self) -> str:
        return f"A little chat at {self.url}"

    def _repr_html_(self) -> str:
        host = own_address() if HOST == "0.0.0.0" else "localhost"
        address = f"http://{host}:{self.port}"
        links = ", ".join(
            f'<a href="{address}{path}" target="_blank">{re.split("[=&]", path)[1]}</a>'
            for path in self.paths
        )
        shown = frames(self, self.paths, 240)
        return f"{shown}<p>In windows of their own: {links}</p>"

    def __getattr__(self, name):
        """Return what the handler calls by this name: `server.connections`."""
        try:
            return self.talk.__globals__[name]
        except KeyError:
            raise AttributeError(f"the chat has no `{name}`") from None

    def app(self) -> web.Application:
        async def index(request):
            return web.Response(text=self.page, content_type="text/html")

        async def ws(request):
            self.transports[request.query.get("name")] = request.transport
            return await self.talk(request)

        app = web.Application()
        app.router.add_get("/", index)
        app.router.add_get("/ws", ws)
        return app

    async def join(self, name: str, greeting: str = "") -> Guest:
        """Let a guest connect. Its greeting, if any, is for people who join later."""
        guest = Guest(self.url, name, greeting)
        self.people.append(guest)
        return await guest.connect()

    async def come_back_slowly(self) -> Guest:
        """Let Bob come back on a slow network while Ann talks; return Bob."""
        return await scenarios.come_back_slowly(self)

    @property
    def complaints(self) -> list[str]:
        """Return what Python has complained of: its warnings, and errors in the log."""
        gc.collect()  # Python warns of a coroutine when it is collected
        caught = [w.message for w in self.warnings if w.category is RuntimeWarning]
        return [*map(str, caught), *self.log]

    async def send_home(self) -> None:
        for person in self.people:
            await person.close()


def fresh(talk, **changed):
    """Return the same functions with empty collections and new objects of their own.

    So each server begins without a person or a message, and a cell can be run again.
    """
    theirs = talk.__globals__ | changed
    for function in changed.values():  # with what it calls, in a notebook
        theirs = getattr(function, "__globals__", {}) | theirs
    functions, ours = functions_of(talk, theirs), dict(theirs)
    outer = [cell for function in functions for cell in function.__closure__ or ()]
    cells, copies = {id(cell): CellType() for cell in outer}, {}
    for function in functions:
        own = is_theirs(function.__globals__["__name__"])  # else a library's decorator
        names = ours if own else function.__globals__
        closure = tuple(cells[id(cell)] for cell in function.__closure__ or ())
        code, rest = function.__code__, (function.__name__, function.__defaults__)
        copies[function] = FunctionType(code, names, *rest, closure)
        copies[function].__kwdefaults__ = function.__kwdefaults__
        if not own:
            copies[function].__module__ = function.__module__
        for name in names_in(code):
            if name in theirs:
                ours[name] = emptied(theirs[name])
    for cell in outer:
        with contextlib.suppress(ValueError):  # it is empty
            value = cell.cell_contents
            known = isinstance(value, FunctionType) and value in copies
            cells[id(cell)].cell_contents = copies[value] if known else emptied(value)
    for name, value in theirs.items():
        if isinstance(value, FunctionType):
            ours[name] = copies.get(value, value)
    return copies[talk]


def emptied(value):
    """Return an empty copy of a collection, and a copy of an object of a learner's."""
    if isinstance(value, (list, dict, set, collections.deque)):
        value = copy.copy(value)
        value.clear()
    elif is_theirs(type(value).__module__) or isinstance(value, itertools.count):
        with contextlib.suppress(TypeError), warnings.catch_warnings(action="ignore"):
            return copy.deepcopy(value)
    return value


def functions_of(talk, names: dict | None = None) -> list[FunctionType]:
    """Return a handler and the functions that it calls, of the same notebook."""
    names, found = names or talk.__globals__, [talk]
    for function in found:  # the list grows meanwhile
        used = [names.get(name) for name in names_in(function.__code__)]
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # it is empty
                used.append(cell.cell_contents)
        for value in used:
            if isinstance(value, FunctionType) and value not in found:
                found += [value] * is_theirs(value.__module__)
    return found


def is_theirs(module: str | None) -> bool:
    """Return whether a module is a learner's cell or a solution, not a library."""
    return module == "__main__" or str(module).startswith(STEPS)


def is_ours(function) -> bool:
    """Return whether a function is a solution of ours, and not edited."""
    return getattr(function, "__module__", "").startswith(STEPS)


def names_in(code):
    yield from code.co_names
    for constant in code.co_consts:
        if inspect.iscode(constant):
            yield from names_in(constant)


def step(name: str, function: str = "talk"):
    """Return our own solution of a step, from `workshop/steps/`."""
    path = HERE / "steps" / f"{name}.py"
    names = {"__name__": f"{STEPS}.{name}", "__file__": str(path)}
    exec(compile(path.read_text("utf-8"), str(path), "exec"), names)
    linecache.checkcache(str(path))
    return names[function]


@contextlib.asynccontextmanager
async def little(talk, page: str = page, log: bool = False):
    """Serve a handler of part A for as long as a `with` block lasts.

    What goes wrong in it is kept, as `server.complaints`; with `log` it is printed.
    """
    server = LittleServer(talk, page)
    async with contextlib.AsyncExitStack() as stack:
        if not log:
            caught = warnings.catch_warnings(record=True, action="always")
            server.warnings = stack.enter_context(caught)
            gc.freeze()  # then `complaints` has to look at what is new only
            stack.callback(gc.unfreeze)
        stack.callback(Lines(server.log, log).close)
        runner = web.AppRunner(server.app(), shutdown_timeout=0.1, access_log=None)
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        await web.TCPSite(runner, HOST, 0).start()
        server.port = runner.addresses[0][1]
        stack.push_async_callback(server.send_home)
        yield server


KEPT = 12  # servers of the newest calls of `play`, so that frames further up stay live
playing: list[contextlib.AsyncExitStack] = []


async def play(talk, *names: str, page: str = page, typing: bool = False):
    """Serve a handler until `stop_playing`, and show a page for each name.

    A cell that is run again gets another server, without a person or a message.
    """
    stack = contextlib.AsyncExitStack()
    server = await stack.enter_async_context(little(talk, page, log=True))
    server.paths = [f"/?name={name}{'&typing' * typing}" for name in names]
    playing.append(stack)
    while len(playing) > KEPT:
        await playing.pop(0).aclose()
    return server


async def stop_playing() -> None:
    while playing:
        await playing.pop().aclose()


async def stall(talk, messages: int = 700) -> list[float]:
    """Let Bob stop reading while Ann says long things.

    Return how many KiB wait for Bob in the server after each of them. The list ends
    where Ann has had no receipt for a second.
    """
    async with little(talk) as server:
        return await stall_in(server, messages)


async def stall_in(server: LittleServer, messages: int = 700) -> list[float]:
    waiting = []
    ann, bob = await server.join("ann"), await server.join("bob")
    bob.reader.cancel()  # Bob's side reads no more
    with contextlib.suppress(TimeoutError):
        for _ in range(messages):
            await ann.say("x" * 10_000, seconds=1)
            waiting.append(server.transports["bob"].get_write_buffer_size() / 1024)
    return waiting
