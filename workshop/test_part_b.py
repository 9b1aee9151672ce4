"""Tests of part B, the coda and the take-home: what they show, break and check."""

import ast
import asyncio
import builtins
import collections
import re

import pytest

import chat
from tests.parts import need_mongod
from workshop import sources
from workshop.people import Person
from workshop.scenarios import heard
from workshop.servers import serve, serving, stop
from workshop.test_workshop import CELLS, Attendee, solution

OURS = [cell for cell in CELLS if cell["id"][0] in "bc"]
NUMBERS = range(8)  # of the sections; 0 is what stands before the first one


def calls(name):
    """Return the calls of a function in our cells, as expressions."""
    found = []
    for cell in OURS:
        if cell.cell_type == "code":
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name:
                    found.append(ast.unparse(node))
    return found


# --- The source of chat.py ---
def test_each_line_of_chat_is_shown_exactly_once(monkeypatch):
    shown = []
    monkeypatch.setattr(
        sources, "display", lambda markdown: shown.append(markdown.data)
    )
    for call in calls("section"):
        eval(call, {"section": sources.section, "chat": chat})
    blocks = re.findall(r"````python\n(.*?)\n````", "\n".join(shown), re.DOTALL)
    lines = [line for line in "\n".join(blocks).splitlines() if line.strip()]
    notes = [line for line in lines if "are shown above" in line]
    assert len(notes) == 7
    whole = [line for line in sources.LINES if line.strip()]
    assert collections.Counter(lines) - collections.Counter(notes) == (
        collections.Counter(whole)
    )


def test_each_section_has_a_chapter_with_its_number_and_name():
    source = sources.TEXT
    titles = re.findall(r"^# -+\n# (\d\. .*)$", source, re.MULTILINE)
    assert len(titles) == 7
    headings = [c.source.splitlines()[0] for c in OURS if c.source.startswith("## ")]
    assert headings[:7] == [f"## {title}" for title in titles]
    numbers = [int(re.match(r"section\((\d)", call)[1]) for call in calls("section")]
    assert numbers == list(NUMBERS)


def test_each_chapter_shows_one_definition_of_at_most_25_lines():
    for call in calls("section")[1:]:
        seen = eval(call.partition(", ")[2].removesuffix(")"), {"chat": chat})
        assert 4 <= len(sources.where(seen)) <= 25, call


def test_each_chapter_says_what_our_24_lines_lack():
    starts = [c.source for c in OURS if re.match(r"## \d\. ", c.source)]
    assert all(
        source.splitlines()[2].startswith("Our 24 lines lack ") for source in starts
    )


def test_prose_cells_are_short():
    for cell in CELLS:
        prose = re.sub(
            r"<details>.*?</details>|\|.*\|", "", cell.source, flags=re.DOTALL
        )
        if cell.cell_type == "markdown":
            assert len(prose.split()) <= 75, cell.source


# --- Breaks, repairs and attempts ---
@pytest.fixture
async def learner(capsys):
    """An attendee who has run the imports, and does exercises in any order."""
    someone = Attendee(capsys)
    await someone.run(next(c for c in CELLS if c.cell_type == "code").source)
    yield someone
    await stop()


def tags(cell):
    return cell.metadata.get("tags", [])


def position(tag):
    return next(n for n, cell in enumerate(OURS) if tag in tags(cell))


def preparation(name):
    """Return what a repair needs of its chapter: the edits, without demonstrations."""
    end = start = position(f"exercise:{name}")
    if "of=broken" not in OURS[end].source:
        return ""
    while not OURS[start].source.startswith("## "):
        start -= 1
    parts, known = [], {*dir(builtins), "edit"}
    for cell in OURS[start:end]:
        code = cell.source if cell.cell_type == "code" and not tags(cell) else ""
        for node in ast.parse(code).body:
            names = {n.id: n.ctx for n in ast.walk(node) if isinstance(n, ast.Name)}
            used = {name for name, use in names.items() if isinstance(use, ast.Load)}
            if isinstance(node, ast.Assign) and used <= known:
                parts.append(ast.unparse(node))
                known |= names.keys()
    return "\n".join(parts)


REPAIRS = ["rate", "origin", "notify", "alike", "paced", "policy", "told"]
BROKEN = {
    "rate": "A rate of 0 is still allowed",
    "origin": "The other page still opens a WebSocket, and reads",
    "notify": "The message is stored, and Bob hears nothing of it",
    "alike": "nothing was hashed",
    "paced": "of Mallory's frames have been read",
    "policy": "The pages have no Content-Security-Policy yet",
    "told": "Ann's side notes 1006",
}


@pytest.mark.parametrize("name", REPAIRS)
async def test_broken_copy_breaks_what_its_repair_mends(learner, name):
    await learner.run(preparation(name))
    said = await learner.attempt(name, "mine = broken")
    assert said.startswith("✗ Not yet.")
    assert BROKEN[name] in said


async def test_copy_of_another_chapter_is_no_attempt(learner):
    """A cell that could not be read leaves `mine` as it was."""
    await learner.run(preparation("rate"))
    assert (await learner.attempt("rate", solution("rate"))).startswith("✓")
    assert (await learner.attempt("rate", "pass")).startswith("✓")  # run once more
    assert (await learner.attempt("origin", "pass")).startswith("○ Nothing new")
    assert (await learner.attempt("origin", "mine = chat")).startswith("○ Nothing new")


# A change of the solution, and what the check says of it.
NEVER = "was called and never awaited"
DROP = "if bucket.take():\n                continue"
WRONG_ATTEMPTS = [
    ("rate", "ge=1", "gt=1", "A rate of 1 makes sense"),
    ("rate", "ge=1", "le=1", "A rate of 0 is still allowed"),
    ("title", r"chat\.Settings", "chat.BaseSettings", "inherit from chat.Settings"),
    ("title", ", max_length=30", "", "31 characters gets through"),
    ("title", "min_length=1, ", "", "An empty title gets through"),
    ("title", '"Chat"', '"Talk"', "Without a title"),
    ("title", "TITLE", "title", "no setting TITLE"),
    ("title", "=30", "=29", "30 characters should be allowed"),
    ("origin", r"raise web\.HTTPForbidden\(\)", "pass", "still opens a WebSocket"),
    ("origin", r"raise web", "if request.path == '/ws': raise web", "send Ann's forms"),
    ("origin", "HTTPForbidden", "HTTPNotFound", "403 says that it is forbidden"),
    (
        "origin",
        r"web\.HTTPForbidden",
        "HTTPForbidden",
        "name 'HTTPForbidden' is not defined",
    ),
    ("timing", r"        mark\(error, start\)\n", "", "A redirect"),
    ("timing", r"1000 \* ", "", "A page that takes 50 ms"),
    ("timing", "await handler", "handler", f"`handler` {NEVER}"),
    ("timing", "total;dur=", "", "it should be like total;dur=1.5"),
    ("notify", r"put_nowait\(change\)", "put(change)", f"`put` {NEVER}"),
    (
        "notify",
        r"\(change\)",
        "(result)",
        "The chat complained: A background task failed",
    ),
    ("notify", r"self\.queue.*\(change\)", "pass", "Bob hears nothing"),
    ("search", r"re\.escape\(text\)", "text", "What people type is text"),
    ("search", r', "\$options": "i"', "", "any case will do"),
    ("search", r'\.sort\("_id", -1\)', "", "newest should come first"),
    ("search", r"\.limit\(count\)", "", "return at most `count`"),
    ("search", r"await chat\.with_deadline\((.*)\)", r"\1", f"`to_list` {NEVER}"),
    ("search", "await chat.*", "found", "It should return a list of documents"),
    ("alike", "await self", "self", f"`in_hash_thread` {NEVER}"),
    (
        "alike",
        r"await self.*\)(?=')",
        "await asyncio.sleep(0)",
        "nothing was hashed",
    ),
    ("alike", r"await .*d\((.*), (.*)\)(?=')", r"\1(\2)", "hashes on the event loop"),
    ("emphasis", r"str\(escape\(text\)\)", "text", "has become markup"),
    ("emphasis", r"Markup\((.*)\)", r"\1", "A template escapes a plain str"),
    ("emphasis", r"\[\^\*\]\*", ".*", "becomes"),
    ("emphasis", r"\\S", "", "'2 * 3 * 4' becomes"),
    ("paced", "while", "if", "frames have been read"),
    ("paced", "await asyncio", "asyncio", f"`sleep` {NEVER}"),
    ("paced", "await asyncio", "time", "everyone waits"),
    ("paced", r"sleep\(wait\)", "sleep(0)", "wait for as long as `take` says"),
    ("paced", r"(?s)while.*wait\)", DROP, "Don't drop frames"),
    ("undo", r"own\[-1\]", "events[-1]['id']", "Bob should read"),
    ("undo", r"own\[-1\]", "own[0]", "Bob should read"),
    ("undo", ' and e."text".', "", "Bob should read"),
    (
        "undo",
        r"chat\.Message.*",
        'self.db.messages.update_one({"_id": own[-1]}, {"$set": {"text": ""}})',
        "no event came. In memory, only a change by `db.write`",
    ),
    (
        "undo",
        'text != "/undo"',
        '"/undo" not in text.split()',
        "say /undo now is an ord",
    ),
    ("undo", 'text != "/undo"', 'text[:5] != "/undo"', "is an ordinary message"),
    ("undo", "await chat", "chat", f"`blank` {NEVER}"),
    ("undo", "        return self.*", "", "a number: the receipt's"),
    ("undo", '!= "/undo"', '!= "/UNDO"', "that isn't a message"),
    ("policy", "POLICY", '"default-src *; frame-ancestors "', "Mallory's scripts run"),
    ("policy", r" \+ framed_by", "", "may not show the chat in a frame"),
    ("policy", r"\.headers", ".header", "has no attribute 'header'"),
    ("policy", "Content-", "", "no Content-Security-Policy"),
    ("policy", " . framed_by", "[:20]", "Any page may still show"),
    ("who", "room.online.names", "room.names()", "Zoe is online at another process"),
    ("who", r"return .*", "pass", "something that isn't a response"),
    ("who", r'"\\n"', '", "', "ann and bob are online"),
    ("who", r"sorted\((.*?)\)", r"reversed(sorted(\1))", "ann and bob are online"),
    ("who", "chat.Page", "web.View", "HEAD is answered by 405"),
    ("who", "text=", "content_type='text/html', text=", "It should be plain text"),
    ("told", "shutdown", "cleanup", "notes 1006, not 1001"),
    ("told", r"close_room\)", "close_room(app))", "'coroutine' object is not callable"),
    ("host", r"token_hex\(\)", '"n-1"', "a nonce of its own?"),
    ("host", "await room", "room", f"`post` {NEVER}"),
    ("host", '"host"', '"Host"', "the user `host` has said nothing"),
    ("host", "The chat is open.", "Hello", "At the start host says"),
    ("health", "await chat.*", "pass", "that is a 503"),
    ("health", "await chat", "chat", f"`with_deadline` {NEVER}"),
    ("health", r"await chat.with_deadline\((.*)\)", r"\1", "that is a 503"),
    ("bot", r"\?after=\{after\}", "", "what Ann said meanwhile has no answer"),
    ("bot", r'event\["text"\] == "!time"', '"!time" in event["text"]', "isn't a"),
    ("bot", r'f"answer to \{after\}"', '"n-1"', "It answers once only"),
    ("bot", r'f"answer to \{after\}"', "str(time.time())", "3 answers more"),
    ("bot", "await ws.send", "ws.send", f"`send_json` {NEVER}"),
    ("bot", r'f"answer to \{after\}"', "1", "gets no answer"),
    ("bot", "while True", "if True", "The bot has ended"),
    ("unread", "                break\n", "", "one mark is due"),
    ("unread", r", last\)", ", 0)", "On the first visit"),
    ("unread", "        session.*= last\n", "", "nothing is marked"),
    (
        "unread",
        '        if "before".*\n.*\n',
        "",
        "Ann has looked at older messages only",
    ),
    ("rooms", ", chat.run_room", "", "KeyError: <AppKey(chat.room"),
    ("rooms", ", chat.run_room", ", make_room", "nothing follows the kitchen's data"),
    ("rooms", ".*db.users = .*\n", "", "in `users` of its own"),
    ("rooms", ".*on_shutdown.*\n", "", "nothing closes the kitchen's connections"),
    ("rooms", r'\.client\["kitchen"\]', "", "go into the lobby's database"),
    ("private", "connection in both", "connection in room.connections", "Eve has"),
    ("private", "            room.send", "            0 and room.send", "in vain"),
    ("private", r'in \(name, user\["name"\]\)', "== name", "Ann waited"),
    ("private", r'f"\{text\}  "', "text", "ValueError: not enough values to unpack"),
    ("private", '"/msg "', '"/msg"', "is an ordinary message"),
    ("private", "wrong or not", "not", "1,009 characters passes"),
    ("clock", r"token_hex\(\)", '"n-1"', "It speaks once only"),
    ("clock", "(?s)    task.cancel.*", "", "a task of yours still runs"),
    ("clock", r"sleep\(1\)", "sleep(3)", "Between two messages"),
    ("clock", r"sleep\(1\)", "sleep(0.01)", "s passed, not 1"),
    ("clock", r"await asyncio.sleep\(1\)", "time.sleep(1)", "everyone waits"),
    (
        "clock",
        r"await asyncio.gather\(task.*\)",
        "await task",
        "It raised CancelledError",
    ),
    ("clock", "await app", "app", f"`post` {NEVER}"),
    ("clock", ".*sleep.*\n", "", "0.0 s passed, not 1"),
    ("clock", "    yield", "    await task\n    yield", "The chat does not start"),
    ("alike", r"hash_password, (.*?)\)", r'verify_password, \1, "x")', "was hashed"),
    (
        "undo",
        "await chat.*",
        "event = self.history.events[own[-1]]\n"
        "            event['text'] = ''\n"
        "            self.broadcast(event)",
        "number 2 is blank, and it is still stored",
    ),
    ("undo", "    return self", "        return self", "Eve, who has said nothing"),
    ("undo", "return await", "await", "Before any /undo Bob reads"),
    ("undo", "chat.M.*", "self.db.messages.delete_one({'_id': own[-1]})", "Blank it"),
    ("paced", r"(?s)while.*wait\)", "await asyncio.sleep(1 / 30)", "are allowed"),
    ("paced", r"(?s)while.*wait\)", "await asyncio.sleep(1 / 14)", "each frame costs"),
    ("paced", r"sleep\(wait\)", "sleep(1000 * wait)", "for as long as `take` says"),
    ("search", "return (.*)", r"return [m['text'] for m in \1]", "whole documents"),
    ("host", r"ObjectId\(\)", "ObjectId", "A user has `_id`, an ObjectId"),
    ("host", r"token_hex\(\)", "1", "`post` takes two texts"),
    ("clock", r"ObjectId\(\)", "ObjectId", "A user has `_id`, an ObjectId"),
    ("successor", "await self.mongo.watch", "self.mongo.watch", f"`watch` {NEVER}"),
    ("successor", ', full_document="updateLookup"', "", "Bob hears nothing of it"),
    ("successor", "chat.PIPELINE", "[]", "It follows new users as well"),
    ("successor", ".*create_indexes.*\n", "", "The indexes are missing"),
    ("successor", ", ..chat.CLIENT_OPTIONS", "", "a failover could undo"),
    ("successor", ".*client.close.*", "", "the client is still open"),
]
MAKE_ROOM = """
    async def make_room(kitchen):
        kitchen[chat.ROOM] = chat.Room(kitchen[chat.DATABASE], kitchen[chat.SETTINGS])
        yield
"""


@pytest.mark.parametrize(
    "name, old, new, hint",
    WRONG_ATTEMPTS,
    ids=[f"{w[0]}-{n}" for n, w in enumerate(WRONG_ATTEMPTS)],
)
async def test_wrong_attempt_is_told_what_it_lacks(learner, name, old, new, hint):
    source = re.sub(old, new, solution(name))
    assert source != solution(name)
    if name == "successor":
        need_mongod()
    if "make_room" in new:
        source = source.replace("    kitchen = web", f"{MAKE_ROOM}\n    kitchen = web")
    await learner.run(preparation(name))
    said = await learner.attempt(name, source)
    assert said.startswith("✗ Not yet."), said
    assert hint in said


async def test_wrong_attempt_is_wrong_again(learner):
    """The chat says a line once a minute, and the check reads what it says."""
    line = "StreamBroken('A write failed')"
    source = re.sub(r"\(change\)", f"({line})", solution("notify"))
    await learner.run(preparation("notify"))
    for _ in range(2):
        assert "The stream of changes broke" in await learner.attempt("notify", source)


# Other ways that are right, too.
RIGHT_ATTEMPTS = [
    ("paced", r"while wait := (.*):", r"while (wait := \1) > 0:"),
    ("health", r"await .*", "await chat.Message(request[chat.DB]).newest(1)"),
    ("bot", r"while True:", "while not await __import__('asyncio').sleep(2):"),
    ("search", r"\.limit(.*)\n.*", r"\n    return await found.to_list(length=count)"),
    ("search", r"\{\"\$regex.*\}\}", "re.compile(re.escape(text), re.I)}"),
    ("search", "return .*", "return [message async for message in found]"),
    ("notify", r"self\.queue\.put_nowait", "await self.queue.put"),
    ("origin", r"\(\)", "(text='No.')"),
    ("emphasis", r"str\(escape\(text\)\)", "__import__('html').escape(text)"),
    ("timing", "total;dur=", "total; dur="),
    ("who", r"(text=.*)\)\n", r"\1 + '\\n')\n"),
    ("rate", "ge=1", "gt=0"),
]


@pytest.mark.parametrize(
    "name, old, new",
    RIGHT_ATTEMPTS,
    ids=[f"{r[0]}-{n}" for n, r in enumerate(RIGHT_ATTEMPTS)],
)
async def test_another_right_attempt_passes(learner, name, old, new):
    source = re.sub(old, new, solution(name))
    assert source != solution(name)
    await learner.run(preparation(name))
    assert await learner.attempt(name, source) == "✓ Done."


async def test_search_that_passes_finds_the_same_on_a_real_mongodb(learner, mongodb):
    for old, new in [("^", ""), *(r[1:] for r in RIGHT_ATTEMPTS if r[0] == "search")]:
        await learner.run(re.sub(old, new, solution("search"), count=1))
        search = learner.names["search"]
        place = {"MONGO_HOST": mongodb, "MONGO_DB_NAME": "search"}
        async with serving(**place) as server:
            ann = await server.join("ann")
            for text in "a cat", "1+1=2", "CATS":
                await ann.say(text)
            found = [message["text"] for message in await search(server.db, "cat", 1)]
            assert found == ["CATS"]
            assert len(await search(server.db, "cat")) == 2
            assert len(await search(server.db, "1+1")) == 1
            await server.db.mongo.client.drop_database("search")


# --- The notebook's people ---
@pytest.fixture
async def shared():
    yield serve
    await stop()


async def test_cell_that_is_run_again_keeps_everyone_connected(shared):
    server = await shared()
    ann = await server.join("ann")
    assert await server.join("ann") is ann
    one = await ann.say("one")
    again = await shared()
    assert (again.port, ann.is_connected) == (server.port, True)
    assert (await ann.say("two"))["id"] == one["id"] + 1
    await heard(ann, 2)
    assert ann.texts() == ["one", "two"]
    assert await again.join("ann") is ann
    assert len(again.room.connections) == 1


async def test_names_of_the_notebooks_people_are_taken_before_yours(shared):
    server = await shared()
    visitor = await server.visitor()
    form = {"login": "Ann", "password": "my password", "password2": "my password"}
    status, page = await visitor.post("/signin", **form)
    assert status == 422
    assert "Another user has this already." in page
    await server.join("ann")


async def test_two_chats_of_one_notebook_leave_each_others_sessions_alone(shared):
    server = await shared()
    async with serving() as other:
        names = set()
        for one in server, other:
            person = await one.visitor("ann")
            await person.sign_in()
            names.add(person.cookie[0])
        assert names == {f"CHAT_{server.port}", f"CHAT_{other.port}"}


# --- Payoffs, in a real browser ---
async def payoff(learner, name):
    """Solve an exercise, run the cells up to the one that serves it, and return it."""
    await learner.run(preparation(name))
    await learner.attempt(name, solution(name))
    after = OURS[position(f"check:{name}") :]
    rest = (cell.source for cell in after if "await serve(" in cell.source)
    await learner.run(next(rest))
    return learner.names["server"]


async def open_page(browser, server, path="/", name="bob"):
    """Open a page in a browser that has a person's cookie; return it."""
    person = Person(server.url, name)
    await person.sign_in()
    key, value = person.cookie
    await person.close()
    context = await browser.new_context(base_url=server.url)
    await context.add_cookies([{"name": key, "value": value, "url": server.url}])
    page = await context.new_page()
    await page.goto(path)
    return page


async def write(page, text):
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")


async def test_payoffs_show_the_attempt_in_the_page(learner, browser):
    page = await open_page(browser, await payoff(learner, "title"))
    await page.get_by_role("heading", name="Our kitchen").wait_for()

    page = await open_page(browser, await payoff(learner, "timing"))
    await page.get_by_role("heading", name=re.compile(r"Made in [\d.]+ ms")).wait_for()

    page = await open_page(browser, await payoff(learner, "search"))
    await write(page, "hello there")
    await page.locator("[data-id]", has_text="hello there").wait_for()
    await page.goto("/search?text=Hello")
    assert "bob: hello there" in await page.inner_text("body")

    page = await open_page(browser, await payoff(learner, "emphasis"))
    await page.locator("em", has_text="so").wait_for()

    page = await open_page(browser, await payoff(learner, "undo"))
    await write(page, "a slip of the tongue")
    slip = page.locator("[data-id]", has_text="a slip of the tongue")
    await slip.wait_for()
    await write(page, "/undo")
    await page.locator(".removed").wait_for()
    assert not await slip.count()

    page = await open_page(browser, await payoff(learner, "who"))
    await page.get_by_text("online", exact=True).wait_for()
    await asyncio.sleep(0.6)
    who = await page.context.new_page()
    await who.goto("/who")
    assert "bob" in (await who.inner_text("body")).split()

    page = await open_page(browser, await payoff(learner, "host"))
    await page.get_by_text("The chat is open.").wait_for()


async def test_take_home_payoffs_show_the_attempt_in_the_page(learner, browser):
    page = await open_page(browser, await payoff(learner, "health"), "/health")
    assert await page.inner_text("body") == "well"

    page = await open_page(browser, await payoff(learner, "bot"))
    await write(page, "!time")
    answer = page.locator("[data-id]", has_text="robot")
    await answer.wait_for()
    assert re.search(r"\d\d:\d\d", await answer.inner_text())

    server = await payoff(learner, "unread")
    page = await open_page(browser, server)
    await (await server.join("ann")).say("something new")
    await page.reload()
    await page.locator("#unread").wait_for()

    page = await open_page(browser, await payoff(learner, "rooms"), "/kitchen/")
    await page.get_by_text("online", exact=True).wait_for()
    await write(page, "tea?")
    await page.locator("[data-id='1']", has_text="tea?").wait_for()

    server = await payoff(learner, "private")
    page = await open_page(browser, server)
    await page.get_by_text("online", exact=True).wait_for()
    ann = await server.join("ann")
    await ann.say("/msg bob meet me at noon")
    await page.get_by_text("ann to bob alone: meet me at noon").wait_for()


async def test_policy_stops_a_script_that_has_got_into_the_page(learner, browser):
    await learner.run(preparation("policy"))
    attack = next(c.source for c in OURS if "Mallory was here" in c.source)
    await learner.run(attack)
    page = await open_page(browser, learner.names["server"])
    await page.get_by_role("heading", name="Mallory was here").wait_for()
    repaired = await payoff(learner, "policy")
    page = await open_page(browser, repaired)
    await page.get_by_text("online", exact=True).wait_for()
    assert await page.locator("img").count()  # the first wall is down
    await page.get_by_role("heading", name="Chat").wait_for()
