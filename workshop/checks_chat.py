"""The checks of the exercises of part B and of the take-home, on `chat.py`."""

import asyncio
import contextlib
import functools
import gc
import inspect
import os
import re
import threading
import time
import warnings
from datetime import datetime
from types import FunctionType
from unittest.mock import patch

import aiohttp
import pymongo.errors
from aiohttp import web
from bson import ObjectId
from markupsafe import Markup
from mongomock_motor import AsyncCursor

import chat
from workshop.checks import OURS, has_gap, verdict
from workshop.copies import NOT_ATTEMPTED, NOTHING_NEW, NotAttempted
from workshop.mongodb import NO_MONGODB, replica_set
from workshop.people import TURN, patience, quiet, until
from workshop.scenarios import Lacking, Unable, heard, need, need_order
from workshop.servers import DEFAULTS, serving
from workshop.tiny import is_ours, step

# fmt: off
__all__ = [
    "alike", "bot", "clock", "emphasis", "health", "host", "notify", "origin", "paced",
    "policy", "private", "rate", "rooms", "search", "successor", "timing", "title",
    "told", "undo", "unread", "who",
]
# fmt: on


# --- How a check is run ---
def adds_nothing(attempt) -> bool:
    """Return whether an attempt has a `...` in it, or is a class that adds nothing."""
    if not inspect.isclass(attempt):
        return isinstance(attempt, FunctionType) and has_gap(attempt)
    if hasattr(attempt, "model_fields"):
        return attempt.model_fields.keys() == chat.Settings.model_fields.keys()
    own = [thing for thing in vars(attempt).values() if isinstance(thing, FunctionType)]
    return not own or any(map(has_gap, own))


async def name_what_is_not_awaited(check, *attempts) -> None:
    """Run a check. A coroutine that was never awaited causes later failures."""
    gc.freeze()  # what was there before is not the attempt's
    failure, messages = None, []
    with warnings.catch_warnings(record=True, action="always") as caught:
        try:
            await check(*attempts)
        except Exception as error:
            failure = error
            while error:  # a traceback's frames hold what they have seen
                error.__traceback__, error = None, error.__context__
        for _ in range(2):  # a warning holds its coroutine, which may hold another one
            gc.collect()
            messages += [str(warning.message) for warning in caught]
            caught.clear()
    gc.unfreeze()
    for message in messages:
        found = re.search(r"coroutine '(?:\S+\.)?(\w+)' was never awaited", message)
        if found and found[1] != "wrapper":  # of mongomock-motor
            raise Lacking(f"`{found[1]}` was called and never awaited.")
    if failure:
        raise failure


async def run(check, attempts) -> str:
    """Run a check and return what it says. Our own solution isn't an attempt."""
    if any(isinstance(attempt, NotAttempted) for attempt in attempts):
        return await verdict(check, *attempts)
    if any(map(is_ours, attempts)):
        return await verdict(check, NOTHING_NEW)
    if any(map(adds_nothing, attempts)):
        return await verdict(check, NOT_ATTEMPTED)
    return await verdict(functools.partial(name_what_is_not_awaited, check, *attempts))


def repair(check):
    """Make a check of a repair. It returns the copy, or the chat if that fails."""

    @functools.wraps(check)
    async def repaired(mine):
        # A cell that could not be read leaves `mine` as it was: the chat, or the copy
        # of another chapter.
        if mine is chat or getattr(mine, "checked_by", check) is not check:
            mine = NOTHING_NEW
        elif mine is not NOT_ATTEMPTED:
            mine.checked_by = check
        said = await run(check, (mine,))
        passed = said[0] == "✓"
        print(said if passed else f"{said}\n{OURS}")
        return mine if passed else chat

    return repaired


def exercise(file: str, *names: str):
    """Make a check of an exercise. It returns what the notebook goes on with:

    the attempt if it passes, our own solution if not.
    """

    def decorate(check):
        @functools.wraps(check)
        async def exercised(*attempts):
            said = await run(check, attempts)
            passed = said[0] == "✓"
            print(said if passed else f"{said}\n{OURS}")
            if passed:
                return attempts[0] if len(attempts) == 1 else attempts
            ours = step(file, names[-1])
            both = [ours.__globals__[name] for name in names[:-1]]
            return (*both, ours) if both else ours

        return exercised

    return decorate


@contextlib.asynccontextmanager
async def trying(*arguments, **replaced):
    """Serve the chat with an attempt in it; what its log says is the cause."""
    failure = None
    try:
        async with contextlib.AsyncExitStack() as stack:
            server = await start(stack, serving(*arguments, **replaced))
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
        failure = failure or error
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


async def nothing_left(before: set) -> None:
    """Require that no task of the attempt's, or of a room of its own, is left."""
    await asyncio.sleep(0)
    for task in asyncio.all_tasks() - before:
        frame = None if task.done() else getattr(task.get_coro(), "cr_frame", None)
        theirs = frame and frame.f_globals.get("__name__") in ("__main__", "chat")
        need(not theirs, "The chat has stopped, and a task of yours still runs.")


# --- 1. Settings ---
def takes(Settings, **values) -> bool:
    try:
        Settings(_env_file=None, **DEFAULTS | values)
    except ValueError:
        return False
    return True


@repair
async def rate(mine) -> None:
    for value in 0, -1:
        still = takes(mine.Settings, MESSAGES_PER_SECOND=value)
        need(not still, f"A rate of {value} is still allowed.")
    for value in 1, 5:
        fine = takes(mine.Settings, MESSAGES_PER_SECOND=value)
        need(fine, f"A rate of {value} makes sense, and is refused now.")


@exercise("title", "MySettings")
async def title(attempt) -> None:
    kept = attempt.model_fields.keys() >= chat.Settings.model_fields.keys()
    need(kept, "The other settings have gone: inherit from chat.Settings.")
    need("TITLE" in attempt.model_fields, "There is no setting TITLE yet.")
    default = attempt(_env_file=None).TITLE
    need(default == "Chat", f"Without a title it should be 'Chat', not {default!r}.")
    with patch.dict(os.environ, TITLE="Kitchen"):
        need(
            attempt(_env_file=None).TITLE == "Kitchen",
            "TITLE in the environment is ignored.",
        )
    need(takes(attempt, TITLE="x"), "A title of one character should be allowed.")
    need(takes(attempt, TITLE="x" * 30), "A title of 30 characters should be allowed.")
    need(not takes(attempt, TITLE="x" * 31), "A title of 31 characters gets through.")
    need(not takes(attempt, TITLE=""), "An empty title gets through.")


# --- 2. Middlewares ---
@repair
async def origin(mine) -> None:
    async with serving(mine) as server:
        ann = await server.join("ann")
        await ann.say("The safe opens with 4711.")
        other = {"Origin": "http://127.0.0.1:9999"}
        got = await ann.peek("/ws?after=0", headers=other)
        read = f"The other page still opens a WebSocket, and reads {got}."
        need(not isinstance(got, dict), read)
        raised = [line for line in server.log if "rror handling" in line]
        need(not raised, f"The chat complained: {' '.join(raised)}")
        need(got == 403, f"The other page gets {got}; 403 says that it is forbidden.")
        async with ann.session.post("/login", data={}, headers=other) as answer:
            need(answer.status == 403, "The other page may still send Ann's forms.")
        own = await ann.peek("/ws", headers={"Origin": server.url})
        need(isinstance(own, dict), f"The chat's own page gets {own} now.")
        bot = await ann.peek("/ws")
        need(isinstance(bot, dict), f"A client that sends no Origin gets {bot} now.")


@exercise("timing", "timing")
async def timing(attempt) -> None:
    @web.middleware
    async def sleepy(request, handler):
        await asyncio.sleep(0.05 if request.path == "/login" else 0)
        return await handler(request)

    sleepy.__qualname__ = "handler"  # as the attempt calls it

    def change(app):
        app.middlewares[:0] = [attempt, sleepy]

    async with trying(change=change) as server:
        ann = await server.visitor("ann")
        pages = {"/login": "A page", "/": "A redirect", "/nothing": "A page not found"}
        for path, what in pages.items():
            async with ann.session.get(path, allow_redirects=False) as response:
                header = response.headers.get("Server-Timing", "")
            normal = response.status in (200, 303, 404)
            need(normal, f"{what} ({path}) came as {response.status}.")
            need(header, f"{what} ({path}) has no Server-Timing.")
            found = re.fullmatch(r"total; ?dur=(\d+(\.\d+)?)", header)
            need(found, f"The header is {header!r}; it should be like total;dur=1.5")
            least = 50 if path == "/login" else 0
            fits = least <= float(found[1]) < 10_000
            need(fits, f"{what} that takes {least} ms and more has {header!r}.")
        await ann.sign_in()
        await ann.connect()
        need((await ann.say("hello"))["type"] == "receipt", "The chat has gone silent.")


# --- 3. Database and models ---
@repair
async def notify(mine) -> None:
    async with trying(mine) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        await ann.say("Is anyone here?")
        await heard(bob, 1, seconds=1)
        stored = await server.db.messages.count_documents({})
        need(stored == 1, f"Ann said one thing, and {stored} are stored.")
        if not server.log:  # which would be the cause
            need(bob.texts(), "The message is stored, and Bob hears nothing of it.")
        await ann.say("Hello?")
        await heard(bob, 2, seconds=1)
        need_order(bob, 2)


def as_motor_does(to_list):
    """Let mongomock keep to the length that Motor keeps to."""

    async def limited(cursor, length=None, **more):
        return (await to_list(cursor, length, **more))[:length]

    limited.__qualname__ = "to_list"
    return limited


@exercise("search", "search")
async def search(attempt) -> None:
    texts = ["a dog", "A CAT", "cats and dogs", "1+1=2", "11=2", "50 % off", "c.t"]
    to_list = as_motor_does(AsyncCursor.to_list)
    async with trying() as server:
        ann = await server.join("ann")
        for text in texts:
            await ann.say(text)

        async def found(*arguments):
            with patch.object(AsyncCursor, "to_list", to_list):
                documents = await attempt(server.db, *arguments)
            is_list = isinstance(documents, list)
            what = type(documents).__name__
            need(is_list, f"It should return a list of documents. It is: {what}.")
            texts = all(isinstance(document, dict) for document in documents)
            need(texts, f"It should return whole documents, not {documents}.")
            return [document["text"] for document in documents]

        need(await found("cats") == ["cats and dogs"], "It does not find 'cats'.")
        two = await found("cat")
        need(len(two) == 2, "'cat' should find 'A CAT' too: any case will do.")
        expected = ["cats and dogs", "A CAT"]
        first = "The newest should come first: by number, since times may be equal."
        need(two == expected, first)
        one = await found("cat", 1)
        need(len(one) < 2, "It should return at most `count` documents.")
        newest = f"With a `count` of 1 it should find the newest one, not {one}."
        need(one == expected[:1], newest)
        need(await found("zebra") == [], "It finds what was never said.")
        literal = await found("1+1") == ["1+1=2"] and await found("c.t") == ["c.t"]
        need(literal, "What people type is text: '1+1' and 'c.t' mean what they say.")


# --- 4. Views ---
@repair
async def alike(mine) -> None:
    hashed = []

    def counting(function):
        def counted(*arguments):
            if str(arguments[-1]).startswith("$argon2id$") or len(arguments) == 1:
                hashed.append(threading.get_ident())  # other hashes are refused at once
            return function(*arguments)

        return counted

    functions = {name: counting(getattr(mine, name)) for name in HASHING}
    async with trying(mine) as server:
        await server.join("ann")
        visitor = await server.visitor()
        with patch.multiple(mine, **functions):
            answers = {}
            for name in "ann", "zoe":
                hashed.clear()
                start = time.perf_counter()
                answer, _ = await visitor.post("/login", login=name, password="a guess")
                took = 1000 * (time.perf_counter() - start)
                answers[name] = answer, took, list(hashed)
    (_, known, _), (answer, unknown, times) = answers["ann"], answers["zoe"]
    need(answer == 422, f"Zoe, who has no account, gets {answer} and not 422.")
    took = f"Ann's answer takes {known:.0f} ms, Zoe's {unknown:.0f} ms"
    need(times, f"{took}, and nothing was hashed: under load the two would differ.")
    main = threading.get_ident() in times
    need(not main, "It hashes on the event loop: everyone waits meanwhile.")
    need(len(times) == 1, f"For Zoe {len(times)} hashes were made, for Ann one.")


HASHING = "hash_password", "verify_password"


@exercise("emphasis", "emphasis")
async def emphasis(attempt) -> None:
    texts = {
        "this is *so* good": "<em>so</em>",
        "*one* and *two words*": "<em>one</em> and <em>two words</em>",
        "2 * 3 * 4": "2 * 3 * 4",
        "a lonely * star": "a lonely * star",
    }
    for text, wanted in texts.items():
        html = attempt(text)
        need(isinstance(html, str), f"It should return Markup, not {html!r}.")
        need(wanted in html, f"{text!r} becomes {str(html)!r}, without {wanted!r}.")
    markup = isinstance(attempt("*so*"), Markup)
    need(markup, "A template escapes a plain str, so <em> would be seen as text.")
    for text in "<b>Hi</b>", "*<img src=x>*", 'a "quote" & more':
        html = re.sub("</?em>|&(lt|gt|amp|quot|#34|#39|#x27);", "", str(attempt(text)))
        need(not set("<>&") & set(html), f"{text!r} has become markup: escape it.")


# --- 5. WebSocket ---
@repair
async def paced(mine) -> None:
    limits = {"MESSAGES_PER_SECOND": 30, "MESSAGE_BURST": 5}
    take, asked = mine.TokenBucket.take, []
    counting = lambda bucket: asked.append(bucket) or take(bucket)  # noqa: E731
    async with trying(mine, **limits) as server:
        mallory, bob = await server.join("mallory"), await server.join("bob")
        tabs = mallory, await server.join("mallory")  # they share a bucket
        with patch.object(mine.TokenBucket, "take", counting):
            start = time.monotonic()
            for number in range(60):
                tab = tabs[number % 2]
                await tab.send(type="message", text="", nonce=f"{number}")
            try:
                await bob.say("Am I held back, too?")
            except TimeoutError:
                raise Lacking(
                    "Bob's only message is not read. `take` returns 0 if he may go on, "
                    "else the seconds to wait."
                ) from None
            for _ in range(300):
                count = sum(len(errors(tab)) for tab in tabs)
                passed = time.monotonic() - start
                fast = count > 6 + 30 * passed
                if fast or count == 60:
                    break
                await quiet(TURN)
        ended = any(tab.reader.done() for tab in tabs)
        for tab in tabs:
            await tab.break_off()
    need(not ended, "Mallory's connection has ended. Read her frames later.")
    read = f"After {passed:.1f} s {count} of Mallory's frames have been read: 5 at once"
    need(not fast, f"{read} and 30 a second are allowed.")
    times = f"For 60 frames it has asked for a token {len(asked):,} times:"
    need(len(asked) < 1_000, f"{times} wait for as long as `take` says.")
    lost = f"{count} of Mallory's 60 frames got an answer"
    slow = count < 60 and len(asked) < 60
    need(not slow, f"{lost} in {passed:.1f} s: wait only for as long as `take` says.")
    need(count == 60, f"{lost}. Don't drop frames: read them later.")
    need(len(asked) >= 60, f"{times} each frame costs one.")


def errors(person) -> list[dict]:
    return [event for event in person.heard if event["type"] == "error"]


@exercise("undo", "UndoRoom")
async def undo(attempt) -> None:
    async with trying(Room=attempt) as server:
        ann, bob, eve = [await server.join(name) for name in ("ann", "bob", "eve")]
        for person, text in (ann, "one"), (ann, "two"), (bob, "three"):
            await person.say(text)
        texts = ["one", "two", "three"]
        await heard(bob, 3, seconds=1)
        need(bob.texts() == texts, f"Before any /undo Bob reads {bob.texts()}.")
        for gone in 1, 0:
            receipt = await ann.say("/undo")
            need(receipt["type"] == "receipt", f"Ann's /undo is answered by {receipt}.")
            need(type(receipt["id"]) is int, "`post` returns a number: the receipt's.")
            await quiet(0.1)
            need("/undo" not in bob.texts(), "Bob reads '/undo': that isn't a message.")
            new = receipt["id"] > server.room.history.last_broadcast
            need(not new, "The receipt's number belongs to no message yet.")
            texts[gone] = ""
            now = {event["id"]: event["text"] for event in bob.messages()}
            stored = await server.db.messages.find_one({"_id": gone + 1})
            need(stored, f"Number {gone + 1} has gone. Blank it: numbers have no gap.")
            silent = stored["text"] == "" != now[gone + 1]
            cause = "In memory, only a change by `db.write` comes back in the stream."
            need(not silent, f"Number {gone + 1} is blank, but no event came. {cause}")
            should = f"Bob should read {texts} now, not {list(now.values())}."
            need(list(now.values()) == texts, should)
            kept = f"Bob reads that number {gone + 1} is blank, and it is still stored."
            need(stored["text"] == "", kept)
        receipt = await eve.say("/undo")
        nothing = f"Eve, who has said nothing, says /undo and gets {receipt}."
        need(type(receipt.get("id")) is int, nothing)
        for number, text in enumerate(["/undoing", "say /undo now"], 4):
            need(
                (await eve.say(text))["id"] == number, f"{text} is an ordinary message."
            )
            await heard(bob, number + 2, seconds=1)
            need(bob.texts()[-1] == text, f"{text} is an ordinary message.")


# --- 6. Routes and static ---
@repair
async def policy(mine) -> None:
    async with trying(mine) as server:
        visitor = await server.visitor()
        async with visitor.session.get("/login") as page:
            header = page.headers.get("Content-Security-Policy", "")
        need(page.status == 200, f"The page comes as {page.status} now.")
        need(header, "The pages have no Content-Security-Policy yet.")
    parts = [part.split() for part in header.split(";") if part.split()]
    rules = {n.lower(): [s.lower() for s in sources] for n, *sources in parts}
    scripts = rules.get("script-src", rules.get("default-src"))
    need(scripts is not None, "It does not say which scripts may run.")
    for source in "'unsafe-inline'", "*", "http:", "https:", "data:":
        need(source not in scripts, f"{source} lets Mallory's scripts run.")
    need("'self'" in scripts, "Quote it: 'self'. Otherwise it is the name of a host.")
    frames = rules.get("frame-ancestors")
    need(frames is not None, "Any page may still show the chat in a frame.")
    for source in "*", "http:", "https:", "http://*", "https://*":
        any_page = f"frame-ancestors {source} lets any page show the chat in a frame."
        need(source not in frames, any_page)
    notebook = "http://127.0.0.1:*" in frames
    need(notebook, "The notebook may not show the chat in a frame: add `framed_by`.")


@exercise("who", "Who")
async def who(attempt) -> None:
    def change(app):
        app.router.add_view("/who", attempt, name="who")

    async with trying(change=change) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        await until(lambda: len(server.room.online.names) == 2)
        async with ann.session.get("/who") as page:
            text = await page.text()
        need(page.status == 200, f"/who comes as {page.status}.")
        kind = page.content_type
        need(kind == "text/plain", f"It should be plain text, not {kind}.")
        names = text.splitlines()
        need(names == ["ann", "bob"], f"It says {names}: ann and bob are online.")
        process = {"another": {"zoe", "tom", "mia", "leo", "ivy"}}
        with patch.dict(server.room.online.processes, process):
            await until(lambda: "zoe" in server.room.online.names)
            names = (await ann.get("/who")).splitlines()
        need("zoe" in names, "Zoe is online at another process, and is not named.")
        need(names == sorted(names), f"It says {names}: not sorted.")
        async with ann.session.head("/who") as page:
            need(page.status == 200, f"HEAD is answered by {page.status}.")
        visitor = await server.visitor()
        async with visitor.session.get("/who", allow_redirects=False) as page:
            need(page.status == 303, "Visitors without an account can read it.")
        await bob.disconnect()


# --- 7. Startup and shutdown ---
@repair
async def told(mine) -> None:
    async with contextlib.AsyncExitStack() as end:
        async with contextlib.AsyncExitStack() as stack:
            server = await stack.enter_async_context(serving(mine))
            ann = await server.join("ann")
            server.people.clear()  # so that Ann doesn't leave by herself
            end.push_async_callback(ann.close)
            start = time.perf_counter()
        took = time.perf_counter() - start
        await ann.reader
        code = ann.ws.close_code
    slow = f"It took {took:.1f} s to stop, and Ann's side notes {code}, not 1001."
    need(code == 1001, slow)


@exercise("host", "run_host")
async def host(attempt) -> None:
    before, memory = asyncio.all_tasks(), chat.AsyncMongoMockClient(tz_aware=True)
    kept = {"AsyncMongoMockClient": lambda **options: memory}
    change = lambda app: app.cleanup_ctx.append(attempt)  # noqa: E731
    for turn in 0, 2:
        async with trying(change=change, Room=CarefulRoom, **kept) as server:
            messages = server.db.messages
            ann = await server.join("ann", "/ws?after=0")
            texts = [e["text"] for e in ann.messages() if e["user"] == "host"]
            need(texts, "When the chat has started, the user `host` has said nothing.")
            again = "After a second start, host says nothing. Is its nonce a new one?"
            need(len(texts) > turn, again)
            said = f"At the start host says {texts[turn]!r}."
            need(texts[turn] == "The chat is open.", said)
            need(len(texts) == turn + 1, f"host has said {texts}: too much.")
        own = await messages.find({"user": "host"}).sort("_id", 1).to_list(None)
        texts = [message["text"] for message in own]
        end = "At the end host says nothing. Has that message a nonce of its own?"
        need(len(texts) > turn + 1, end)
        last = f"At the end host says {texts[-1]!r}."
        need(texts[turn + 1] == "The chat is closing.", last)
    await nothing_left(before)


# --- Take home ---
@exercise("bot", "bot")
async def bot(attempt) -> None:
    async with trying() as server:
        robot = await server.visitor("robot")
        await robot.sign_in()
        ann = await server.join("ann")
        server.run(attempt(robot.session))
        await until_joined(server, "robot")
        await ann.say("What is !time?")
        await quiet(0.1)
        asked = "It answers 'What is !time?', which isn't a command."
        need(len(ann.texts()) == 1, asked)
        await ann.say("!time")
        await heard(ann, 3, seconds=1)
        need_running(server)
        need(len(ann.texts()) > 2, "Ann says !time, and gets no answer.")
        answer = ann.messages()[2]
        need(answer["user"] == "robot", f"{answer['user']} answers, not the bot.")
        clock = re.search(r"\d\d?:\d\d", answer["text"])
        need(clock, f"{answer['text']!r} does not say the time.")
        await ann.say("!time")
        await heard(ann, 5, seconds=1)
        need_running(server)
        need(len(ann.texts()) > 4, "It answers once only: is its nonce a new one?")
        need(len(ann.texts()) == 5, f"Ann hears {ann.texts()}: it answers too much.")
        [connection] = server.room.of((await server.db.users.find_one(ROBOT))["_id"])
        connection.transport.abort()  # the bot's network breaks, and comes back
        await ann.say("!time")
        await heard(ann, 7, seconds=6)
        need_running(server)
        away = "Its connection broke, and what Ann said meanwhile has no answer."
        need(len(ann.texts()) > 6, away)
        need(len(ann.texts()) == 7, "After its connection broke, it answers twice.")
        again = asyncio.create_task(attempt(robot.session))  # it hears all once more
        await quiet(0.3)
        again.cancel()
        await asyncio.gather(again, return_exceptions=True)
        more = len(ann.texts()) - 7
        need(not more, f"Started again, it answers old questions: {more} answers more.")


ROBOT = {"name": "robot"}


async def until_joined(server, name: str) -> None:
    with contextlib.suppress(TimeoutError):
        await until(lambda: name in server.room.names() or server.tasks[0].done())
    need_running(server)
    need(name in server.room.names(), "The bot has opened no WebSocket.")


def need_running(server) -> None:
    """Require that the bot runs; say how it ended."""
    [task] = server.tasks
    if task.done():
        error = None if task.cancelled() else task.exception()
        cause = f"by {type(error).__name__}: {error}" if error else "without an error"
        raise Lacking(f"The bot has ended, {cause}.")


@exercise("unread", "UnreadChatList")
async def unread(attempt) -> None:
    async with trying(ChatList=attempt) as server:
        ann, bob = await server.visitor("ann"), await server.join("bob")
        await bob.say("one")
        await ann.sign_in()
        page = await ann.get("/")
        need('id="messages"' in page, "The page has lost its messages.")
        need('id="unread"' not in page, "On the first visit nothing is marked.")
        need('id="unread"' not in await ann.get("/"), "Nothing is new yet.")
        await bob.say("two")
        await bob.say("three")
        page = await ann.get("/")
        need('id="unread"' in page, "Two messages are new, and nothing is marked.")
        need(page.count('id="unread"') == 1, "Two messages are new: one mark is due.")
        inside = r'<li data-id="(\d+)"[^>]*>(?:(?!</li>).)*id="unread"'
        marked = re.search(inside, page, re.S)
        need(marked, "The mark belongs inside the <li> of a message.")
        need(marked[1] == "2", f"Number 2 is the first unread; {marked[1]} is marked.")
        need('id="unread"' not in await ann.get("/"), "Seen once, it is not new again.")
        await bob.say("four")
        older = await ann.get("/?before=4")
        need('id="unread"' not in older, "Older pages need no mark.")
        older = "Ann has looked at older messages only, and number 4 is not marked."
        need('id="unread"' in await ann.get("/"), older)


@exercise("rooms", "add_kitchen")
async def rooms(attempt) -> None:
    before = asyncio.all_tasks()
    async with trying(change=attempt) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        async with ann.session.get("/kitchen/") as page:
            html = await page.text()
        need(page.status == 200, f"/kitchen/ comes as {page.status}.")
        need('id="messages"' in html, "/kitchen/ is not a page of the chat.")
        apps = [getattr(one, "_app", None) for one in server.app.router.resources()]
        databases = [app[chat.DATABASE] for app in apps if app]
        own = server.db.mongo.name not in {db.mongo.name for db in databases}
        need(own, "The kitchen's messages go into the lobby's database.")
        await ann.say("lobby talk")
        try:
            await bob.connect("/kitchen/ws")
        except aiohttp.WSServerHandshakeError as refusal:
            raise Lacking(f"/kitchen/ws answers {refusal.status}.") from None
        receipt = await bob.say("tea?")
        await heard(bob, 1, seconds=1)
        nothing = "nothing follows the kitchen's database"
        need(bob.texts(), f"Bob's message is stored, but no one hears it: {nothing}.")
        need(receipt["id"] == 1, "Each room counts from 1.")
        need(bob.texts() == ["tea?"], "Bob, in the kitchen, hears the lobby.")
        need(ann.texts() == ["lobby talk"], "Ann, in the lobby, hears the kitchen.")
        page = await ann.get("/kitchen/")
        need("tea?" in page, "The kitchen's page lacks its messages.")
        need("lobby talk" not in page, "The kitchen's page shows the lobby.")
        need("tea?" not in await ann.get("/"), "The lobby's page shows the kitchen.")
        page = await ann.get("/kitchen/?before=2")
        need("lobby talk" not in page, "Older messages come from the lobby's database.")
        for db in databases:  # then a room looks whether its people still have accounts
            db.queue.put_nowait(chat.StreamBroken("test"))
        await quiet()
        server.log.clear()  # the stream has told that
        users = "The kitchen looks for Bob's account in `users` of its own."
        need(bob.is_connected, users)
        server.people.clear()
    await bob.reader
    code = bob.ws.close_code
    await ann.close()
    await bob.close()
    cut = f"The chat stops, and Bob's side notes {code}, not 1001: nothing closes the"
    need(code == 1001, f"{cut} kitchen's connections.")
    await nothing_left(before)


@exercise("private", "PrivateWebSocket")
async def private(attempt) -> None:
    async with trying(WebSocket=attempt) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        eve, tab = await server.join("eve"), await server.join("bob")
        receipt = await ann.say("/msg bob meet me at noon", nonce="secret")
        need(receipt["type"] == "receipt", f"Ann gets {receipt}, not a receipt.")
        last = server.room.history.last_broadcast
        need(receipt["id"] <= last, "The receipt's number belongs to no message.")
        for person in bob, tab, ann:
            event = await person.next("private", seconds=1)
            need(event.get("user") == "ann", "`user` should be the one who wrote: ann.")
            need(event.get("to") == "bob", "`to` should be the one who reads it: bob.")
            need(
                event.get("text") == "meet me at noon",
                "`text` should be the text alone: meet me at noon.",
            )
        await quiet(0.1)
        need("noon" not in str(eve.heard), "Eve has heard it as well.")
        stored = await server.db.messages.find().to_list(None)
        need(not stored, "It is stored, so /?before=… shows it to everyone.")
        wrong = await ann.say("/msg zoe are you there?")
        need(wrong["type"] == "error", "Zoe is not here: Ann should get an error.")
        need((await ann.say("hello"))["id"] == 1, "Ordinary messages do not work.")
        more = await ann.say("/msgs are great")
        need(more["type"] == "receipt", "'/msgs are great' is an ordinary message.")
        need((await eve.next("message"))["text"] == "hello", "Eve does not hear hello.")
        long = await ann.say("/msg bob " + "x" * 1_000)
        need(long["type"] == "error", "A private message of 1,009 characters passes.")
        try:
            await ann.say("/msg bob", seconds=1)
            await ann.say("Still here?")
        except (ConnectionError, TimeoutError):
            raise Lacking("Ann says `/msg bob` and nothing else: no answer.") from None


class CarefulRoom(chat.Room):
    """A room that says what `post` was given, if that is not what it takes."""

    failed = ""

    async def post(self, user, text, nonce):
        known = isinstance(user, dict) and type(user.get("_id")) is ObjectId
        known = known and isinstance(user.get("name"), str)
        if not known:
            self.failed = f"A user has `_id`, an ObjectId, and `name`, not {user!r}."
        elif not isinstance(text, str) or not isinstance(nonce, str):
            self.failed = f"`post` takes two texts, not {text!r} and {nonce!r}."
        if self.failed:
            raise Lacking(self.failed)
        return await super().post(user, text, nonce)


class PatientRoom(CarefulRoom):
    """A room that lets others run, and soon has enough, if a loop has no `sleep`."""

    posts = 0

    async def post(self, *arguments):
        await asyncio.sleep(0)
        self.posts += 1
        need(self.posts < 100, "It speaks without a pause.")
        return await super().post(*arguments)


@exercise("clock", "run_clock")
async def clock(attempt) -> None:
    before = asyncio.all_tasks()
    change = lambda app: app.cleanup_ctx.append(attempt)  # noqa: E731
    async with trying(Room=PatientRoom, change=change) as server:
        ann = await server.join("ann", "/ws?after=0")
        await heard(ann, 1, seconds=0.3)
        need(not server.room.failed, server.room.failed)
        need(ann.messages(), "It should speak as soon as the chat has started.")
        first = ann.messages()[0]
        need(first["user"] == "clock", "It should speak as the user `clock`.")
        for count in range(1, 6):
            await heard(ann, count, seconds=4)
            start = time.monotonic()
            await asyncio.sleep(1.6)  # in seconds: the attempt sleeps beside it
            await quiet(0.1)
            if time.monotonic() - start < 2.5:  # else the machine is busy: look again
                break
        late = len(ann.messages()) <= count
        await heard(ann, 2, seconds=3)
        times = [datetime.fromisoformat(event["time"]) for event in ann.messages()]
        need(len(times) > 1, "It speaks once only: is its nonce a new one?")
        passed = (times[1] - times[0]).total_seconds()
        wrong = late or passed < 0.5
        need(not wrong, f"Between two messages {passed:.1f} s passed, not 1.")
    await nothing_left(before)


@exercise("health", "health")
async def health(attempt) -> None:
    def change(app):
        app.router.add_get("/health", attempt, name="health")

    public = patch.object(chat, "PUBLIC", chat.PUBLIC | {"health"})
    with public:
        async with trying(change=change) as server:
            visitor = await server.visitor()
            async with visitor.session.get("/health", allow_redirects=False) as answer:
                need(answer.status == 200, f"All is well, and it says {answer.status}.")

            class Away:
                """A database that is away: you notice when you await an answer."""

                def __getattr__(self, name):
                    return self

                def __getitem__(self, name):
                    return self

                def __call__(self, *arguments, **more):
                    return self

                async def answer(self):
                    raise pymongo.errors.AutoReconnect("the database is away")

                def __await__(self):
                    return self.answer().__await__()

                def __aiter__(self):
                    return self

                __anext__ = answer

            names = "mongo", "users", "messages", "processes"
            away = dict.fromkeys(names, Away()) | {"archives": [Away()]}
            with patch.multiple(server.db, **away):
                async with visitor.session.get("/health") as answer:
                    need(answer.status == 503, "The database is away: that is a 503.")
            server.log.clear()


@exercise("successor", "PyMongoDatabase", "run_pymongo")
async def successor(database, run_database) -> None:
    async with replica_set() as uri:
        if not uri:
            raise Unable(NO_MONGODB)
        place = {"MONGO_HOST": uri, "MONGO_DB_NAME": f"exercise-{ObjectId()}"}
        with patch.object(chat, "AsyncIOMotorClient", None):
            async with trying(run_database=run_database, **place) as server:
                own = isinstance(server.db, database)
                need(own, "The chat runs on another Database.")
                client = server.db.mongo.client
                name = server.db.mongo.name
                need(name == place["MONGO_DB_NAME"], f"It uses the database {name!r}.")
                is_new = isinstance(client, pymongo.AsyncMongoClient)
                need(is_new, "It is not PyMongo's client.")
                concern = server.db.messages.write_concern.document
                majority = concern.get("w") == "majority"
                need(
                    majority,
                    "Without CLIENT_OPTIONS, a failover could undo a stored message.",
                )
                ann, bob = await server.join("ann"), await server.join("bob")
                need((await ann.say("hello"))["id"] == 1, "Nothing was stored.")
                await heard(bob, 1)
                need(bob.texts() == ["hello"], "Bob hears nothing.")
                names = set(await server.db.messages.index_information())
                need("unique nonce" in names, "The indexes are missing.")
                await need_changes(server)
                await chat.Message(server.db).blank(1)
                await heard(bob, 2)
                server.log.clear()
                blanked = "Number 1 is blank, but Bob hears nothing of it."
                need(bob.texts() == ["hello", ""], blanked)
                await client.drop_database(place["MONGO_DB_NAME"])
                server.log.clear()  # the stream has told that
        with contextlib.suppress(pymongo.errors.InvalidOperation):
            await client.admin.command("ping")
            raise Lacking("The chat has stopped, and the client is still open.")


async def need_changes(server) -> None:
    """Require that a stream has what the room follows, and no new users."""
    users = server.db.users
    async with server.db.changes() as changes:
        await users.insert_one({"name": "zoe"})
        await users.delete_one({"name": "zoe"})
        document, collection = None, ""
        async with patience(5):
            while collection != "users":
                collection, _, document = await anext(changes)
    server.log.clear()
    hashes = "It follows new users as well, with their password hashes: use PIPELINE."
    need(document is None, hashes)
