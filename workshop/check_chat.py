"""The checks of part B and of the take-home, on `chat.py`."""

import asyncio
import base64
import collections
import contextlib
import hashlib
import re
import threading
from unittest.mock import patch

from bson import ObjectId
from mongomock_motor import AsyncMongoMockClient
from pymongo.errors import DuplicateKeyError

import chat
from workshop import scenarios
from workshop.cells import ours
from workshop.judge import Lacking, exercise, naming_what_is_not_awaited, need, verdict
from workshop.people import patience, quiet, until
from workshop.scenarios import heard
from workshop.servers import DEFAULTS, in_memory, serving


@contextlib.asynccontextmanager
async def trying(**replaced):
    """Serve the chat with an attempt in it; what its log says is the cause."""
    failure = None
    try:
        async with naming_what_is_not_awaited(), contextlib.AsyncExitStack() as stack:
            server = await start(stack, serving(**replaced))
            try:
                yield server
            except Exception as error:
                failure = error
            if server.log:
                line = server.log[-1]
                if line.endswith("AssertionError: "):  # by aiohttp
                    line = "a handler returned something that isn't a response."
                failure = Lacking(f"The chat complained: {line}")
    except Exception as error:  # the end fails, too
        failure = error if isinstance(error, Lacking) else failure or error
    if failure:
        raise failure


async def start(stack: contextlib.AsyncExitStack, block):
    """Enter a block that serves an attempt; say so if that never ends."""
    try:
        async with patience(8):
            return await stack.enter_async_context(block)
    except TimeoutError:
        never = "The chat does not start: what stands before `yield` has to end."
        raise Lacking(never) from None


# --- The scenarios of part A ---
WIDE = {"MESSAGES_PER_SECOND": 100_000, "MESSAGE_BURST": 100_000}


async def chat_tried(**replaced) -> None:
    """Run the scenarios of part A on chat.py, and print what holds."""
    for scenario in (*scenarios.LOSING_NOTHING, scenarios.stop_reading):

        async def run(_, scenario=scenario):
            limits = WIDE | {"MAX_MESSAGE_LENGTH": 10_000}
            async with serving(**limits, **replaced) as server:
                await scenario(server)

        said = await verdict(run, None)
        print(said[0], scenario.__doc__, said[2:] if said[0] != "✓" else "")


# --- 1. Settings ---
@exercise("RoomySettings")
async def roomy(Settings) -> None:
    kept = Settings.model_fields.keys() >= chat.Settings.model_fields.keys()
    need(kept, "The other settings have gone: inherit from chat.Settings.")

    def complaints(**values) -> list[str]:
        try:
            settings = Settings(_env_file=None, **DEFAULTS | values)
        except chat.ValidationError as error:
            return [str(wrong["loc"][0]) for wrong in error.errors()]
        size, wanted = (
            settings.MAX_UNSENT_BYTES,
            values.get("MAX_UNSENT_BYTES", 262_144),
        )
        need(size == wanted, f"MAX_UNSENT_BYTES={wanted} becomes {size}.")
        return []

    own = "MAX_UNSENT_BYTES"
    cases = [
        ({}, []),
        ({own: 4_000}, []),
        ({own: 3_999}, [own]),
        ({own: 30_000, "MAX_MESSAGE_LENGTH": 10_000}, [own]),
        ({own: 1_024, "MAX_MESSAGE_LENGTH": 256}, []),
        ({own: 4_000, "MAX_MESSAGE_LENGTH": "many"}, ["MAX_MESSAGE_LENGTH"]),
        ({own: "much"}, [own]),
    ]
    for values, wanted in cases:
        typed = " ".join(f"{name}={value}" for name, value in values.items())
        try:
            came = complaints(**values)
        except KeyError as error:
            cause = f"KeyError: {error}. A value that is wrong itself is missing there."
            raise Lacking(
                f"{typed or 'Without a setting'}: it raised {cause}"
            ) from None
        said = f"should complain about {wanted or 'nothing'}, and complains about"
        need(came == wanted, f"{typed or 'Without a setting'}: it {said} {came}.")


# --- 2. Middlewares ---
@exercise("own_origin")
async def origin(middleware) -> None:
    async with trying(own_origin=middleware) as server:
        ann = await server.join("ann")
        await ann.say("The safe opens with 4711.")
        port, others = server.port, {}
        for name in (
            "127.0.0.1:9999",
            f"127.0.0.1:{port}.evil.example",
            "evil.example",
        ):
            others[f"http://{name}"] = f"127.0.0.1:{port}"
        others["null"] = f"127.0.0.1:{port}"
        others[f"http://evil.example:{port}"] = f"evil.example:{port}"
        for other, host in others.items():
            headers = {"Origin": other, "Host": host}
            got = await ann.peek("/ws?after=0", headers=headers)
            reads = f"A page of {other} asks {host}, opens a WebSocket and reads {got}."
            need(isinstance(got, int), reads)
            need(400 <= got < 500, f"A page of {other} gets {got}; refuse it with 403.")
            async with ann.session.post("/login", data={}, headers=headers) as answer:
                sends = f"A page of {other} may still send Ann's forms to {host}."
                need(answer.status in (403, 421), sends)
        for own in f"127.0.0.1:{port}", f"localhost:{port}":
            headers = {"Origin": f"http://{own}", "Host": own}
            cookie = {"Cookie": "=".join(ann.cookie)}  # of 127.0.0.1 only
            got = await ann.peek("/ws?after=0", headers=headers | cookie)
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
    async with naming_what_is_not_awaited():
        await race(attempt)
        await lag(attempt)


async def race(save) -> None:
    """Require that three processes store each message once, without a gap."""
    messages, seen = await new_messages(), collections.Counter()

    async def process(user) -> None:
        number = 0
        for n in range(5):
            text = f"{user['name']} {n}"
            number = await store(save, messages, number + 1, user, text)
            seen[number] += 1

    await asyncio.gather(*map(process, USERS))
    stored = [m async for m in messages.find().sort("_id", 1)]
    texts = collections.Counter(message["text"] for message in stored)
    every = [f"{user['name']} {n}" for user in USERS for n in range(5)]
    lost = [text for text in every if not texts[text]]
    need(not lost, f"Three processes stored 15 messages, and {lost[:3]} are lost.")
    twice = [text for text in every if texts[text] > 1]
    need(not twice, f"{twice[:3]} are stored twice.")
    numbers = [message["_id"] for message in stored]
    need(numbers == [*range(1, 16)], f"15 messages have the numbers {numbers}.")
    need(seen == collections.Counter(numbers), f"It returned the numbers {dict(seen)}.")


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
        need(count == 1, f"Ann repeated her nonce, and {count} messages are stored.")
        said = (
            f"Ann's message is number {first}; for the same nonce it returned {again}."
        )
        need(again == first, said)
    messages.inserts = 0
    number = await store(save, messages, 1, ann, "I am late.")
    need(number == 102, f"A process that lags got number {number}, not 102.")
    tries = f"A process that lags 101 messages behind tried {messages.inserts} inserts."
    need(messages.inserts < 10, f"{tries} Jump to the newest number.")


# --- 4. Views ---
class Counted:
    """Argon2id, which notes each hash, and in which thread it was made."""

    made, real = [], chat.Argon2id

    def __init__(self, **options) -> None:
        self.argon2 = self.real(**options)

    def derive_phc_encoded(self, password):
        self.made.append(threading.get_ident())
        return self.argon2.derive_phc_encoded(password)

    @classmethod
    def verify_phc_encoded(cls, password, hashed):
        if str(hashed).startswith("$argon2id$"):  # others are refused at once
            cls.made.append(threading.get_ident())
        return cls.real.verify_phc_encoded(password, hashed)


@exercise("CarefulLogin")
async def login(view) -> None:
    limit = {"LOGIN_ATTEMPTS": 10}
    with patch.object(chat, "Argon2id", Counted):
        async with trying(Login=view, **limit) as server:
            await server.join("ann")
            visitor, answers = await server.visitor(), {}
            for name in "ann", "zoe":
                Counted.made.clear()
                status, html = await visitor.post(
                    "/login", login=name, password="guess"
                )
                answers[name] = status, html.replace(name, "…"), len(Counted.made)
                need(status == 422, f"A wrong guess for {name} gets {status}, not 422.")
                main = threading.get_ident() in Counted.made
                need(not main, "It hashes on the event loop: everyone waits meanwhile.")
            (_, known, hashes), (_, unknown, zoes) = answers.values()
            says = [server.sentences(html) for html in (known, unknown)]
            told = f"For Ann it says {says[0]}, for Zoe, who has no account, {says[1]}."
            need(known == unknown, told)
            work = (
                f"For Ann it made {hashes} hashes, for Zoe, who has no account, {zoes}."
            )
            need(hashes == zoes, f"{work} So the time of the answer tells them apart.")
            need(hashes, f"{work} Where is the password looked at?")
            for number in range(12):
                status, _ = await visitor.post("/login", login="zoe", password="guess")
                if status == 429:
                    break
            need(
                status == 429, f"Mallory may guess for Zoe {number + 2} times a minute."
            )
            other = await server.visitor("bob")
            await other.sign_in()
            form = {"login": "bob", "password": "correct horse"}
            status, _ = await (await server.visitor()).post("/login", **form)
            need(status == 303, f"Bob's right password gets {status}, not 303.")


# --- 5. WebSocket ---
@exercise("UndoWebSocket")
async def undo(view) -> None:
    async with trying(WebSocket=view) as server:
        ann, bob, eve = [await server.join(name) for name in ("ann", "bob", "eve")]
        texts = ["one", "two", "three"]
        for person, text in zip((ann, ann, bob), texts, strict=True):
            await person.say(text)
        await heard(bob, 3, seconds=1)
        need(bob.texts() == texts, f"Before any /undo Bob reads {bob.texts()}.")
        for gone in 1, 0:
            receipt = await ann.say("/undo")
            need(receipt["type"] == "receipt", f"Ann's /undo is answered by {receipt}.")
            await quiet(0.1)
            need("/undo" not in bob.texts(), "Bob reads '/undo': that isn't a message.")
            last, number = server.room.history.last, receipt.get("id")
            known = type(number) is int and number <= last
            need(known, f"The receipt's id is {number!r}; the newest number is {last}.")
            texts[gone] = ""
            now = {event["id"]: event["text"] for event in bob.messages()}
            stored = await server.db.messages.find_one({"_id": gone + 1})
            need(stored, f"Number {gone + 1} has gone. Blank it: numbers have no gap.")
            silent = stored["text"] == "" != now[gone + 1]
            need(not silent, f"Number {gone + 1} is stored blank, but no event came.")
            should = f"Bob should read {texts} now, not {list(now.values())}."
            need(list(now.values()) == texts, should)
            kept = f"Bob reads that number {gone + 1} is blank, and it is still stored."
            need(stored["text"] == "", kept)
        receipt = await eve.say("/undo")
        nothing = f"Eve, who has said nothing, says /undo and gets {receipt}."
        need(type(receipt.get("id")) is int, nothing)
        for number, text in enumerate(["/undoing", "say /undo now"], 4):
            same = (await eve.say(text)).get("id") == number
            need(same, f"{text!r} is an ordinary message.")


# --- 6. Routes and static ---
@exercise("allow_script")
async def policy(signal) -> None:
    notice, script = ours("policy", "Notice", "SCRIPT")

    def change(app):
        app.router.add_view("/notice", notice, name="notice")
        app.on_response_prepare.append(signal)

    headers = {}
    async with trying(change=change, PUBLIC=chat.PUBLIC) as server:
        ann = await server.visitor("ann")
        await ann.sign_in()
        for path in "/notice", "/":
            async with ann.session.get(path) as page:
                need(page.status == 200, f"{path} comes as {page.status}.")
                header = page.headers.get("Content-Security-Policy", "")
            parts = [part.split() for part in header.split(";") if part.split()]
            headers[path] = {name.lower(): sources for name, *sources in parts}
    rules, usual = headers["/notice"], headers["/"]
    need(rules, "/notice has no Content-Security-Policy now.")
    scripts = rules.get("script-src-elem", rules.get("script-src"))
    scripts = rules.get("default-src", []) if scripts is None else scripts
    for source in "'unsafe-inline'", "'unsafe-hashes'", "*", "http:", "https:", "data:":
        need(source not in scripts, f"{source} lets Mallory's scripts run.")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    wanted = f"'sha256-{digest}'"
    may = f"The page allows scripts from {scripts}; our script needs {wanted[:14]}…'."
    need(wanted in scripts, f"{may} It has quotes, and the hash is in base64.")
    need("'self'" in scripts, "The chat's own files may not run any more: add 'self'.")
    for name in "frame-ancestors", "base-uri", "form-action", "default-src":
        need(rules.get(name) == usual[name], f"`{name}` is {rules.get(name)} now.")
    same = "script-src" not in usual and wanted not in str(usual)
    need(same, "The chat's page allows that script, too: only /notice needs it.")


# --- 7. Startup and shutdown ---
@exercise("run_host")
async def host(context) -> None:
    before, memory = asyncio.all_tasks(), in_memory()

    def change(app):
        app.cleanup_ctx.append(context)

    for turn in 0, 2:
        async with trying(change=change, **memory) as server:
            messages = server.db.messages
            ann = await server.join("ann", "/ws?after=0")
            texts = [e["text"] for e in ann.messages() if e["user"] == "host"]
            need(texts, "When the chat has started, the user `host` has said nothing.")
            again = "After a second start, host says nothing. Is its nonce a new one?"
            need(len(texts) > turn, again)
            said = f"At the start host says {texts[turn]!r}."
            need(texts[turn] == "The chat is open.", said)
            need(len(texts) == turn + 1, f"host has said {texts}: too much.")
        texts = [
            m["text"] async for m in messages.find({"user": "host"}).sort("_id", 1)
        ]
        end = "At the end host says nothing. Has that message a nonce of its own?"
        need(len(texts) > turn + 1, end)
        last = f"At the end host says {texts[-1]!r}."
        need(texts[turn + 1] == "The chat is closing.", last)
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - before:
        frame = None if task.done() else getattr(task.get_coro(), "cr_frame", None)
        theirs = frame and frame.f_globals.get("__name__") in ("__main__", "chat")
        need(not theirs, "The chat has stopped, and a task of yours still runs.")


# --- Take home ---
@exercise("bot")
async def bot(client) -> None:
    async with trying() as server:
        robot = await server.visitor("robot")
        await robot.sign_in()
        ann = await server.join("ann")
        server.run(client(robot.session))

        async def answers(count: int, lacking: str, seconds: float = 1) -> None:
            """Require that the bot runs, and that Ann has heard so much by now."""
            await heard(ann, count, seconds)
            [task] = server.tasks
            if task.done():
                error = None if task.cancelled() else task.exception()
                cause = f"{type(error).__name__}: {error}" if error else "no error"
                raise Lacking(f"The bot has ended, with {cause}.")
            texts = ann.texts()
            need(len(texts) >= count, lacking)
            need(len(texts) == count, f"Ann hears {texts}: it answers too much.")

        with contextlib.suppress(TimeoutError):
            here = lambda: "robot" in server.room.names()  # noqa: E731
            await until(lambda: here() or server.tasks[0].done())
        await answers(0, "")
        need("robot" in server.room.names(), "The bot has opened no WebSocket.")
        await ann.say("What is !time?")
        await quiet(0.1)
        await answers(1, "")
        await ann.say("!time")
        await answers(3, "Ann says !time, and gets no answer.")
        answer = ann.messages()[2]
        need(answer["user"] == "robot", f"{answer['user']} answers, not the bot.")
        clock = re.search(r"\d\d?:\d\d", answer["text"])
        need(clock, f"{answer['text']!r} does not say the time.")
        await ann.say("!time")
        await answers(5, "It answers once only: is its nonce a new one?")
        user = await server.db.users.find_one({"name": "robot"})
        for socket in server.room.of(user["_id"]):
            socket.transport.abort()  # the bot's network breaks, and comes back
        await ann.say("!time")
        away = "Its connection broke, and what Ann said meanwhile has no answer."
        await answers(7, away, seconds=6)
        again = asyncio.create_task(client(robot.session))  # it hears all once more
        await quiet(0.3)
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)
        more = len(ann.texts()) - 7
        need(not more, f"Started again, it answers old questions: {more} answers more.")
