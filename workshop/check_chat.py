"""The checks of part B and of the take-home, on `chat.py`."""

import asyncio
import base64
import contextlib
import hashlib
import threading
from unittest.mock import patch

from bson import ObjectId
from mongomock_motor import AsyncMongoMockClient
from pymongo.errors import DuplicateKeyError

import chat
from workshop import judge, scenarios
from workshop.cells import ours
from workshop.judge import (
    Lacking,
    exercise,
    expect,
    need,
    need_awaited,
    noting_what_is_not_awaited,
    scoreboard,
)
from workshop.people import PASSWORD, until
from workshop.scenarios import heard
from workshop.servers import DEFAULTS, in_memory, serving


def trying(**replaced):
    return judge.trying(serving(**replaced), explain)


def explain(line: str, failure) -> str:
    if line.endswith("AssertionError: "):  # by aiohttp
        line = "a handler returned something that isn't a response."
    return f"The chat complained: {line}"


# --- The scenarios of part A ---
WIDE = dict.fromkeys(("MESSAGES_PER_SECOND", "MESSAGE_BURST"), 100_000)
WIDE["MAX_MESSAGE_LENGTH"] = 10_000


async def chat_tried(**replaced) -> None:
    """Run the scenarios of part A on chat.py, and print what holds."""

    async def run(scenario) -> None:
        async with serving(**WIDE, **replaced) as server:
            await scenario(server)

    await scoreboard([*scenarios.LOSING_NOTHING, scenarios.stop_reading], run)


# --- 1. Settings ---
@exercise("RoomySettings")
async def roomy(Settings) -> None:
    own = "MAX_UNSENT_BYTES"
    cases = [  # settings, and which of them are wrong
        ({}, []),
        ({own: 4_000}, []),
        ({own: 3_999}, [own]),
        ({own: 30_000, "MAX_MESSAGE_LENGTH": 10_000}, [own]),
        ({own: 1_024, "MAX_MESSAGE_LENGTH": 256}, []),
        ({own: 4_000, "MAX_MESSAGE_LENGTH": "many"}, ["MAX_MESSAGE_LENGTH"]),
        ({own: "much"}, [own]),
    ]
    for values, wanted in cases:
        given, wrong = DEFAULTS | values, []
        typed = " ".join(f"{name}={value}" for name, value in values.items())
        try:
            settings = Settings(_env_file=None, **given)
            expect(f"With {typed} {own} becomes", settings.MAX_UNSENT_BYTES, given[own])
        except chat.ValidationError as error:
            wrong = [str(one["loc"][0]) for one in error.errors()]
        except KeyError as error:
            cause = "A field that is wrong itself is missing in `info.data`."
            raise Lacking(f"{typed}: it raised KeyError: {error}. {cause}") from None
        expect(f"{typed or 'Without a setting'}: it complains about", wrong, wanted)


# --- 2. Middlewares ---
@exercise("own_origin")
async def origin(middleware) -> None:
    async with trying(own_origin=middleware) as server:
        ann = await server.join("ann")
        await ann.say("The safe opens with 4711.")
        here, there = f"127.0.0.1:{server.port}", f"localhost:{server.port}"
        evil = f"evil.example:{server.port}"
        others = ["127.0.0.1:9999", f"{here}.evil.example", "evil.example"]
        foreign = [(f"http://{other}", here) for other in others]
        for page, host in (*foreign, ("null", here), (f"http://{evil}", evil)):
            headers = {"Origin": page, "Host": host}
            got = await ann.peek("/ws?after=0", headers=headers)
            refused = f"The origin {page} asks {host} for a WebSocket. It gets {got}"
            need(got in (403, 421), f"{refused}, not 403.")
            async with ann.session.post("/login", data={}, headers=headers) as answer:
                sent = f"The origin {page} sends a form to {host}. It gets"
                need(answer.status in (403, 421), f"{sent} {answer.status}, not 403.")
        for own in here, there:
            headers = {"Origin": f"http://{own}", "Host": own}
            headers["Cookie"] = "=".join(ann.cookie)  # Ann's browser has it for both
            got = await ann.peek("/ws?after=0", headers=headers)
            need(isinstance(got, dict), f"The chat's own page at {own} gets {got} now.")
        bot = await ann.peek("/ws?after=0")
        need(isinstance(bot, dict), f"A client that sends no Origin gets {bot} now.")
        server.log.clear()


# --- 3. Database and models ---
class Slow:
    """A collection whose every call takes a turn, as it does over a network."""

    def __init__(self, collection) -> None:
        self.collection, self.inserts = collection, 0

    def __getattr__(self, name: str):
        call = getattr(self.collection, name)
        if name in ("find", "aggregate", "with_options"):
            return call

        async def slow(*arguments, **more):
            self.inserts += name.startswith(
                ("insert", "update", "replace", "find_one_")
            )
            need(self.inserts < 300, "It tried 300 times.")
            await asyncio.sleep(0)
            found = await call(*arguments, **more)
            await asyncio.sleep(0)
            return found

        slow.__qualname__ = name
        return slow


async def new_messages() -> Slow:
    """Return an empty collection, with the unique index that chat.py makes."""
    messages = AsyncMongoMockClient(tz_aware=True).chat.messages
    await messages.create_index([("user_id", 1), ("nonce", 1)], unique=True)
    return Slow(messages)


USERS = [{"_id": ObjectId(), "name": name} for name in ("ann", "bob", "eve")]


async def two_writers(save) -> None:
    """Let two processes store what Ann and Bob say, and print what is stored."""
    messages, (ann, bob, _) = await new_messages(), USERS

    async def process(user, *texts: str) -> None:
        number = 0  # the newest that this process has seen
        for text in texts:
            try:
                number = await save(messages, number + 1, said(user, text))
            except Exception as error:
                print(
                    f"{user['name']}'s {text!r}: {type(error).__name__}",
                    str(error)[:60],
                )

    await asyncio.gather(process(ann, "one", "two"), process(bob, "one", "two"))
    await process(ann, "two")  # she got no receipt
    async for message in messages.find().sort("_id", 1):
        print(message["_id"], message["user"], message["text"])


def said(user: dict, text: str) -> dict:
    """Return a message without a number. Its nonce is its text."""
    return {"user_id": user["_id"], "user": user["name"], "text": text, "nonce": text}


@exercise("save")
async def save(attempt) -> None:
    try:
        with noting_what_is_not_awaited() as names:
            await race(attempt)
            await lag(attempt)
    finally:
        need_awaited(names)  # the cause of whatever failed


async def race(save) -> None:
    """Require that three processes store each message once, without a gap."""
    messages, returned = await new_messages(), []

    async def process(user) -> None:
        number = 0
        for n in range(5):
            number = await store(
                save, messages, number + 1, user, f"{user['name']} {n}"
            )
            returned.append(number)

    await asyncio.gather(*map(process, USERS))
    stored = [m async for m in messages.find().sort("_id", 1)]
    every = {f"{user['name']} {n}" for user in USERS for n in range(5)}
    lost = every - {message["text"] for message in stored}
    expect("Three processes stored 15 messages. Lost:", sorted(lost), [])
    numbers = [message["_id"] for message in stored]
    expect("15 messages have the numbers", numbers, [*range(1, 16)])
    expect("It returned the numbers", sorted(returned), numbers)


async def store(save, messages, number: int, user: dict, text: str) -> int:
    try:
        got = await save(messages, number, said(user, text))
    except DuplicateKeyError as error:
        which = "user and nonce" if "nonce" in str(error) else "`_id`"
        raise Lacking(f"{text!r} raised DuplicateKeyError: {which}.") from None
    need(type(got) is int, f"It should return the number of {text!r}, not {got!r}.")
    return got


async def lag(save) -> None:
    """Require that a retry is stored once, and that a process that lags jumps."""
    messages, (ann, bob, _) = await new_messages(), USERS
    for n in range(1, 101):
        await store(save, messages, n, bob, f"bob {n}")
    first = await store(save, messages, 101, ann, "Pay 100 to Bob.")
    for number in 102, 1:  # at the same process, and at one that lags
        again = await store(save, messages, number, ann, "Pay 100 to Bob.")
        count = await messages.count_documents({"text": "Pay 100 to Bob."})
        expect("Ann repeated her nonce. So often it is stored:", count, 1)
        expect("Ann repeated her nonce. The number returned is", again, first)
    messages.inserts = 0
    number = await store(save, messages, 1, ann, "I am late.")
    expect("A process that lags 101 messages behind got number", number, 102)
    tries = f"A process that lags 101 messages behind tried {messages.inserts} inserts."
    need(messages.inserts < 10, f"{tries} Jump to the newest number.")


# --- 4. Views ---
@exercise("CarefulLogin")
async def login(view) -> None:
    made, answers = [], {}

    def counted(function):
        def call(*arguments):
            if len(arguments) == 1 or arguments[1].startswith("$argon2id$"):
                made.append(threading.get_ident())  # other hashes are refused at once
            return function(*arguments)

        return call

    names = "hash_password", "verify_password"
    functions = {name: counted(getattr(chat, name)) for name in names}
    async with trying(Login=view, LOGIN_ATTEMPTS=10) as server:
        await server.join("ann")
        bob, visitor = await server.visitor("bob"), await server.visitor()
        await bob.sign_in()
        with patch.multiple(chat, **functions):
            for name in "ann", "zoe":
                made.clear()
                status, html = await visitor.post(
                    "/login", login=name, password="guess"
                )
                expect(f"A wrong guess for {name} gets", status, 422)
                need(threading.get_ident() not in made, "It hashes on the event loop.")
                answers[name] = (
                    server.sentences(html),
                    html.replace(name, "…"),
                    len(made),
                )
        (said, page, hashes), (zoes, other, zoe_hashes) = answers.values()
        expect("For Zoe, who has no account, it says", zoes, said)
        need(page == other, "Ann's page and Zoe's differ: beside which field?")
        expect("Zoe has no account. The hashes made for her:", zoe_hashes, hashes)
        need(hashes, "Nothing was hashed: where is the password looked at?")
        tries = 2
        while status != 429 and tries < 15:
            status, _ = await visitor.post("/login", login="zoe", password="guess")
            tries += 1
        need(status == 429, f"Mallory may guess for Zoe {tries} times a minute.")
        status, _ = await visitor.post("/login", login="bob", password=PASSWORD)
        expect("Bob's right password gets", status, 303)


# --- 5. WebSocket ---
@exercise("UndoWebSocket")
async def undo(view) -> None:
    async with trying(WebSocket=view) as server:
        ann, bob, eve = [await server.join(name) for name in ("ann", "bob", "eve")]
        texts = ["one", "two", "three"]
        for person, text in zip((ann, ann, bob), texts, strict=True):
            await person.say(text)
        await heard(bob, 3, seconds=1)
        expect("Before any /undo Bob reads", bob.texts(), texts)
        for number, wanted in (2, ["one", "", "three"]), (1, ["", "", "three"]):
            receipt = await ann.say("/undo", nonce=f"undo-{number}")
            answer = {"type": "receipt", "nonce": f"undo-{number}", "id": 3}
            expect("Ann's /undo is answered by", receipt, answer)
            with contextlib.suppress(TimeoutError):
                await until(lambda wanted=wanted: read_by(bob) == wanted, 2)
            found = server.db.messages.find().sort("_id", 1)
            stored = [message["text"] async for message in found]
            expect(f"Ann takes number {number} back. Stored:", stored, wanted)
            expect(f"Ann takes number {number} back. Bob reads", read_by(bob), wanted)
        receipt = await eve.say("/undo")
        expect("Eve has said nothing. Her /undo gets a", receipt["type"], "receipt")
        for number, text in enumerate(["/undoing", "say /undo now"], 4):
            receipt = await eve.say(text)
            expect(f"{text!r} is a message. Its number:", receipt.get("id"), number)


def read_by(person) -> list[str]:
    """Return what stands on a person's page: of each number, the newest text."""
    return [*{event["id"]: event["text"] for event in person.messages()}.values()]


# --- 6. Routes and static ---
@exercise("allow_script")
async def policy(signal) -> None:
    notice, script = ours("policy", "Notice", "SCRIPT")

    def change(app):
        app.router.add_view("/notice", notice, name="notice")
        app.on_response_prepare.append(signal)

    headers = {}
    async with trying(change=change) as server:
        ann = await server.visitor("ann")
        await ann.sign_in()
        for path in "/notice", "/":
            async with ann.session.get(path) as page:
                need(page.status == 200, f"{path} comes as {page.status}.")
                header = page.headers.get("Content-Security-Policy", "")
            parts = [part.split() for part in header.split(";") if part.split()]
            headers[path] = {name.lower(): sources for name, *sources in parts}
    rules, usual = headers["/notice"], headers["/"]
    scripts = rules.get("script-src", rules.get("default-src", []))
    for source in "'unsafe-inline'", "'unsafe-hashes'", "*", "http:", "https:", "data:":
        need(source not in scripts, f"{source} lets Mallory's scripts run.")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    wanted = {"'self'", f"'sha256-{digest}'"}
    expect("/notice may run scripts from", set(scripts), wanted)
    for name in usual.keys() - {"script-src"}:
        expect(f"On /notice `{name}` is", rules.get(name), usual[name])
    expect("Elsewhere `script-src` is", usual.get("script-src"), None)


# --- 7. Startup and shutdown ---
@exercise("run_host")
async def host(context) -> None:
    memory = in_memory()

    def change(app):
        app.cleanup_ctx.append(context)

    for turn in 1, 2:
        async with trying(change=change, **memory) as server:
            messages = server.db.messages
            ann = await server.join("ann", "/ws?after=0")
            texts = [e["text"] for e in ann.messages() if e["user"] == "host"]
            said = f"Start {turn}. A user called host has said"
            expect(said, texts, (HOST_SAYS * turn)[: 2 * turn - 1])
        texts = [
            m["text"] async for m in messages.find({"user": "host"}).sort("_id", 1)
        ]
        expect(f"Stop {turn}. A user called host has said", texts, HOST_SAYS * turn)


HOST_SAYS = ["The chat is open.", "The chat is closing."]
