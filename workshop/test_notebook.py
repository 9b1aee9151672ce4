"""Tests of the notebook: it runs in any order, breaks what it says, checks fairly."""

import ast
import asyncio
import contextlib
import itertools
import linecache
import os
import re
import shutil
import socket
import subprocess
import sys
from urllib.parse import quote

import nbclient
import nbformat
import pytest
from aiohttp.test_utils import unused_port

from tests.parts import PASSWORD, ROOT, can_connect, need_mongod, optional, until
from workshop import check, check_chat, judge, servers
from workshop import room as rooms
from workshop.cells import STEPS
from workshop.people import Person
from workshop.room import close_room, open_room
from workshop.scenarios import heard
from workshop.servers import frames, own_address, serve, serving, stop
from workshop.tiny import stop_playing

NOTEBOOK = nbformat.read(ROOT / "tutorial.ipynb", as_version=4)
CELLS = NOTEBOOK.cells
CODE = [cell for cell in CELLS if cell.cell_type == "code"]


def tagged(kind):
    """Return the source of the notebook's cells with a tag like `check:me`, by `me`."""
    pairs = [(tag, cell) for cell in CELLS for tag in cell.metadata.get("tags", [])]
    found = [(tag.partition(":"), cell.source) for tag, cell in pairs]
    return {name: source for (start, _, name), source in found if start == kind}


EXERCISES = list(tagged("exercise"))


def solution(name):
    """Return the code in the folded solution of an exercise."""
    folded = tagged("solution")[name].partition("<summary>Solution</summary>")[2]
    return re.search(r"```python\n(.*?)```", folded, re.DOTALL)[1]


def call_of(name):
    """Return the check's call, without the demonstration below it."""
    return tagged("check")[name].splitlines()[0]


# --- The notebook as a file ---
def test_notebook_is_stored_without_outputs_and_counts():
    for cell in CODE:
        assert (cell.outputs, cell.execution_count) == ([], None), cell.id


def test_cells_are_short():
    for cell in CELLS:
        exercise = any("exercise" in tag for tag in cell.metadata.get("tags", []))
        lines = [line for line in cell.source.splitlines() if line.strip()]
        if cell.cell_type == "code":
            assert len(lines) <= (30 if exercise else 20), cell.source
            assert max(map(len, lines)) <= 88, cell.source
        folds = r"<details>.*?</details>|\|.*\|"
        prose = re.sub(folds, "", cell.source, flags=re.DOTALL).split()
        assert cell.cell_type == "code" or len(prose) <= 130, cell.source


def test_exercises_have_a_check_a_hint_and_a_solution_and_are_close_together():
    assert EXERCISES == list(tagged("check")) == list(tagged("solution"))
    places = [
        number
        for number, cell in enumerate(CELLS)
        if re.search("exercise|predict", " ".join(cell.metadata.get("tags", [])))
    ]
    assert all(after - before <= 13 for before, after in itertools.pairwise(places))
    for name in EXERCISES:
        given = (STEPS / "given" / f"{name}.txt").read_text("utf-8")
        assert ast.dump(ast.parse(given)) == ast.dump(
            ast.parse(tagged("exercise")[name])
        )
        assert solution(name).strip() in (STEPS / f"{name}.py").read_text("utf-8")


def test_part_b_has_the_sections_of_the_chat():
    titles = re.findall(r"^# -+\n# (\d\. .*)$", (ROOT / "chat.py").read_text(), re.M)
    headings = re.findall(r"^## (\d\. .*)$", "\n".join(c.source for c in CELLS), re.M)
    assert headings == titles and len(titles) == 7


def test_plan_of_the_day_names_the_cells_where_its_parts_begin():
    """JupyterLab's status bar counts cells from 1."""
    rows = re.findall(
        r"^\| .* \| (\d+) \| (\d:\d\d) \| (\d+) \|", CELLS[0].source, re.M
    )
    assert len(rows) == 17
    assert all(CELLS[int(cell) - 1].source.startswith("#") for _, _, cell in rows)
    minutes = [int(taken) for taken, _, _ in rows]
    assert (sum(minutes[:9]), sum(minutes[9:])) == (140, 95)
    for before, after in (*itertools.pairwise(rows[:9]), *itertools.pairwise(rows[9:])):
        hours, past = map(int, before[1].split(":"))
        start = (
            f"{hours + (past + int(before[0])) // 60}:{(past + int(before[0])) % 60:02}"
        )
        assert start == after[1]


def test_lesson_of_step_5_has_24_lines():
    assert len([line for line in solution("once").splitlines() if line.strip()]) == 24


# --- The notebook as it runs ---
LISTENING = """
import asyncio, psutil
process = psutil.Process()
sorted(c.laddr.port for c in process.net_connections() if c.status == "LISTEN")
"""
LEFT = """
[task.get_coro().cr_code.co_filename for task in asyncio.all_tasks()], [
    child.cmdline() for child in process.children(recursive=True)]
"""
NO_SERVER = "import workshop.mongodb as m\nm.find_mongod = lambda: None"


async def run(*sources):
    """Run cells in a kernel; return what each has shown. Nothing may stay behind."""
    every = [LISTENING, *sources, LISTENING, LEFT]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, every)])
    more = {"kernel_name": "python3", "resources": {"metadata": {"path": ROOT}}}
    client = nbclient.NotebookClient(notebook, timeout=90, **more)
    await client.async_execute()
    shown = [cell.outputs for cell in notebook.cells]
    values = [outputs[0].data["text/plain"] for outputs in (*shown[-2:], shown[0])]
    after, (tasks, processes), before = map(ast.literal_eval, values)
    assert after == before and processes == []
    ours = re.compile(r"/(chat|workshop/\w+)\.py|/aiohttp/|/pymongo/|/ipykernel_\d")
    assert not [path for path in tasks if ours.search(path)]
    red = [output for outputs in shown for output in outputs if "stderr" in str(output)]
    assert not red
    return ["".join(one.get("text", "") for one in outputs) for outputs in shown[1:-2]]


async def test_run_all_then_every_solution_then_every_solution_in_reverse(monkeypatch):
    """As somebody does who has run all first, without a MongoDB, and then begins."""
    monkeypatch.delenv("MONGO_HOST", raising=False)
    *every, end = [cell.source for cell in CODE]
    solved = [(solution(name), call_of(name)) for name in EXERCISES]
    tries = [source for pair in (*solved, *reversed(solved)) for source in pair]
    said = await run(NO_SERVER, *every, *tries, end)
    first, then = "\n".join(said[: len(every) + 1]), said[len(every) + 1 : -1]
    assert then[1::2] == ["✓ Done.\n"] * 2 * len(EXERCISES)
    assert first.count("○ Not attempted yet") == len(EXERCISES)
    assert "✗" not in first and "There is no MongoDB here." in first
    for phrase in BROKEN:
        assert re.search(phrase, first), phrase


# What the notebook shows of code that somebody could really have written.
BROKEN = [
    r"Ann heard \[\]\nPython says: coroutine 'send_json' was never awaited",
    "Connections that the server still holds: 3",
    r"Bob has \[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, (?!11, 12, 13, 14, 15, 16)",
    r"\[\(1, 'Pay 100 to Bob.'\), \(2, 'Pay 100 to Bob.'\)\]",
    r"After \d\d\d messages Ann gets no receipt any more",
    r"Ann has all 700 receipts. \d,\d\d\d KiB wait for Bob",
    "Ann waited 0.5 s for the receipt of 'three', in vain",
    "localhost.evil.example gets {'type': 'message', 'id': 1, 'user': 'ann', ",
    r"count:\n\w+'s '\w+': DuplicateKeyError",
    r"overwrite:\n1 \w+ \w+\n2 \w+ \w+\ncount_on:",
    r"count_on:\nann's 'two': Lacking It tried 300 times",
    "ann: 422 after .* This password is wrong.\nzoe: 422 after .* No one has this name",
    r"Bob has heard \[\(1, 'Meet me at six.'\), \(1, 'No, at eight.'\)",
    r"It stopped after [2-9]\.\d+ s.\nAnn's side notes code 1006",
]


async def test_solved_notebook_runs_and_survives_kill_9(monkeypatch):
    need_mongod()
    monkeypatch.delenv("MONGO_HOST", raising=False)
    solved = {tagged("exercise")[name]: solution(name) for name in EXERCISES}
    said = "\n".join(await run(*(solved.get(c.source, c.source) for c in CODE)))
    assert said.count("✓ Done.") == len(EXERCISES)
    assert "✗" not in said and "○" not in said
    heard = re.findall(r"Bob has heard (\d.*)", said)
    assert heard == ["1 before", "2 in the middle", "3 after"]


# --- What people get wrong, and right in another way ---
class Attendee:
    """An attendee who does exercises, after the cells that import."""

    numbers = itertools.count()

    def __init__(self, capsys):
        self.capsys, self.names = capsys, {"__name__": "__main__"}

    async def run(self, source):
        """Run a cell as Jupyter does, and return what it prints."""
        file = f"<cell {next(self.numbers)}>"
        linecache.cache[file] = len(source), None, source.splitlines(True), file
        code = compile(source, file, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        if result := eval(code, self.names):
            await result
        return self.capsys.readouterr().out

    async def attempt(self, name, source):
        """Write an attempt, and return what its check says."""
        await self.run(source)
        return (await self.run(call_of(name))).splitlines()[0]


@pytest.fixture
async def attendee(capsys, monkeypatch):
    attendee = Attendee(capsys)
    for cell in CODE:
        if cell.source.startswith(("import json", "from pymongo")):
            await attendee.run(cell.source)
    yield attendee
    await stop()
    await stop_playing()


NEVER = "was called and never awaited"
LATE = """
    async for frame in ws:
        await broadcast(frame.json())
    connections.remove(ws)
    return ws
"""
SWALLOWED = """
    try:
        async for frame in ws:
            await broadcast(frame.json())
    except Exception:
        pass
    connections.remove(ws)
    return ws
"""
LOOP = r"(?s)\n    try:\n        async for.*ws\n"
REPLAY = r"    for message in islice.*\n.*\n"
OLD_LIST = r"(?s)islice\(messages, after, None\)"
EARLY = r"\g<0>    connections.add(ws)\n"
WRONG_ATTEMPTS = [
    ("echo", r"await ws.send_json", "ws.send_json", f"`send_json` {NEVER}"),
    ("echo", r"frame.json\(\)", "frame.data", "Ann sent 1. She heard"),
    ("echo", r"    return", "        break\n    return", "Ann sent 2. She heard"),
    ("broadcast", r"await broadcast\(", "broadcast(", f"`broadcast` {NEVER}"),
    ("broadcast", r"    connections.add\(ws\)\n", "", "`connections` holds 0, not 2"),
    ("broadcast", r"await broadcast", "await ws.send_json", "Bob heard [], not [{"),
    ("no_ghosts", LOOP, LATE, "`frame.json()` raised. `connections` holds 2, not 1"),
    ("no_ghosts", LOOP, SWALLOWED, "cancelled Eve's handler. Still held: 1, not 0"),
    ("no_ghosts", r"remove\(ws\)", "clear()", "raised. `connections` holds 0, not 1"),
    (
        "names",
        r'event \| ({"user": name})',
        r"\1 | event",
        "from the address has to win",
    ),
    ("names", r"        await broad.*joined.*\n", "", "Bob came, and heard [], not"),
    ("names", r'await (broadcast\({"type": "left")', r"\1", f"`broadcast` {NEVER}"),
    ("me", r'"/me "', '"/me"', "Eve said '/method'. Everyone heard"),
    ("me", r"\['text'\]\[4:\]", "['text'].lstrip('/me ')", "not ['* eve meets me']"),
    ("me", r"\* {name}", "* ann", "not ['* eve says /me waves']"),
    (
        "history",
        r"len\(messages\) \+ 1",
        "len(messages)",
        "'id': 0, 'user': 'ann'}], n",
    ),
    (
        "history",
        r"messages\[after:\]",
        "messages",
        "Bob heard the numbers [1, 1, 2, 3]",
    ),
    ("history", r"ws.send_json\(m", "broadcast(m", "replay to Bob alone"),
    ("nothing_between", OLD_LIST, "messages[after:]", "Bob never heard [1"),
    ("nothing_between", r"await ws.prepare.*\n", EARLY, "Bob heard the numbers"),
    ("nothing_between", r"message\)\n", "messages[0])\n", "Bob never heard [2, 3"),
    ("receipt", r"ws.send_json\({", "broadcast({", "She alone heard [], not"),
    (
        "receipt",
        r'"id": number',
        '"id": len(messages)',
        "while one waits, the list gro",
    ),
    ("receipt", r'await (.*"receipt")', r"return await \1", "handler has returned"),
    ("once", r"key = name", 'key = ""', "the same nonce"),
    ("once", r" *numbers\[key\] = .*\n", "", "Your handler raised KeyError"),
    (
        "once",
        r"( *numb.* = .*\n)( *await b.*\n)",
        r"\2\1",
        "the same message came again",
    ),
    ("typing", r" *continue\n", "", "Your handler raised KeyError: 'nonce'"),
    (
        "typing",
        "continue",
        "return ws",
        "Bob heard [{'type': 'typing', 'user': 'ann'}, {",
    ),
    (
        "typing",
        r'g", "user": name}',
        'g", "user": event["user"]}',
        "'user': 'bob'}], no",
    ),
    ("waiting_for_nobody", r"\(frame\)", "(b'{}')", "a frame was wrong"),
    ("waiting_for_nobody", r"\.values\(\)", "", f"`write` {NEVER}"),
    ("waiting_for_nobody", r"\n.*connections\[ws\] =.*", "", "KeyError"),
    ("bounded", r"65_536", "65_536_000", "KiB wait, not 64"),
    ("bounded", r"transport.abort\(\)", "continue", "Bob is skipped"),
    ("bounded", "65_536", "6_553", "for which 60,000 bytes wait"),
    ("roomy", r"\.get\((.*), 0\)", r"[\1]", "it raised KeyError: 'MAX_MESSAGE_LENGTH'"),
    ("roomy", "        return size\n", "", "MAX_UNSENT_BYTES becomes None"),
    ("roomy", "size < 4", "size <= 4", "complains about ['MAX_UNSENT_BYTES'], not []"),
    (
        "origin",
        r"own = .*",
        "own = None, 'http://127.0.0.1:9999'",
        "The origin http://127",
    ),
    ("origin", r" or not .*:", ":", "The origin http://evil.example"),
    ("origin", r"own = None, (.*)", r"own = [\1]", "ann could not sign in: 403"),
    (
        "save",
        r"            own = (?s:.*?)\n            newest",
        "            newest",
        "tried 300",
    ),
    ("save", r"newest = (?s:.*?) \+ 1", "number += 1", "Jump to the newest number"),
    ("save", "await messages.insert", "messages.insert", f"`insert_one` {NEVER}"),
    ("login", r" or not user:", ":\n            chat.x", "has no attribute 'x'"),
    (
        "login",
        r"        both = ",
        "        if not user:\n            raise chat.FormError("
        '{"login": "No account has this name and password."})\n        both = ',
        "hashes mad",
    ),
    (
        "login",
        r".*count_attempt.*\n",
        "",
        "Mallory may guess for Zoe 15 times a minute",
    ),
    ("undo", r"own\[-1\]", "own[0]", "Stored: ['', 'two', 'three'], not ['one', '', '"),
    ("undo", r"await blank", "blank", f"`blank` {NEVER}"),
    (
        "undo",
        r"await blank.*",
        "chat.broadcast(self.room, {**history.events[own[-1]], 'text': ''})",
        "Stored: ['one', 'two', 'three'], not",
    ),
    ("policy", r"'sha256-\{digest\}'", "'unsafe-inline'", "lets Mallory's scripts run"),
    ("policy", r"\.decode\(\)", "", "/notice may run scripts from"),
    (
        "policy",
        r"if request.path .*:",
        "if response.status == 200:",
        "Elsewhere `script-",
    ),
    ("host", r"token_hex\(\)", '"n-1"', "Start 2. A user called host has said"),
    ("host", "await chat", "chat", f"`post` {NEVER}"),
    ("host", '"host"', '"Host"', "A user called host has said [], not"),
]


@pytest.mark.parametrize(
    "name, old, new, hint",
    WRONG_ATTEMPTS,
    ids=[w[0] + w[1][:9] for w in WRONG_ATTEMPTS],
)
async def test_wrong_attempt_is_told_what_came_and_what_was_expected(
    attendee, name, old, new, hint
):
    attempt, count = re.subn(old, new, solution(name), count=1)
    assert count, "the solution has changed"
    said = await attendee.attempt(name, attempt)
    assert said.startswith("✗ Not yet."), said
    assert hint in said


SKIP = """try:
                await broadcast(frame.json())
            except ValueError:
                pass"""
STATE = """class State:
    def __init__(self):
        self.numbers = {}


state = State()
messages, connections = [], set()"""
COUNTED = """    while after < len(messages):
        missed, after = messages[after:], len(messages)
        await gather(*[ws.send_json(m) for m in missed])
"""
LEFT_OVER = r"\g<0>    ...  # new, your turn: remember this connection\n"
RIGHT_ATTEMPTS = [
    ("echo", r"send_json\(frame.json\(\)\)", "send_str(frame.data)"),
    ("broadcast", r"    connections.add\(ws\)\n", LEFT_OVER),
    ("no_ghosts", r"await broadcast\(frame.json\(\)\)", SKIP),
    ("no_ghosts", r"(?s)\A.*?(?=async def talk)", ""),
    ("nothing_between", REPLAY, COUNTED),
    ("once", r"messages, numbers, connections = .*", STATE),
    ("once", r"await broadcast\((messages.*)\)", r"task = create_task(broadcast(\1))"),
    ("origin", r"\(\)\n    return", "(text='No.')\n    return"),
    ("roomy", r"size < 4 \* longest", "longest > size / 4"),
    ("save", r"newest\[\"_id\"\] \+ 1", "max(newest['_id'], number) + 1"),
]


@pytest.mark.parametrize("name, old, new", RIGHT_ATTEMPTS)
async def test_another_right_attempt_passes(attendee, name, old, new):
    attempt, count = re.subn(old, new, solution(name), count=1)
    assert count, "the solution has changed"
    attempt = attempt.replace("state = ", "state = ").replace("numbers[", "numbers[")
    if new == STATE:
        attempt = attempt.replace("numbers[key", "state.numbers[key")
        attempt = attempt.replace("in numbers", "in state.numbers")
    await attendee.run("from asyncio import create_task")
    assert await attendee.attempt(name, attempt) == "✓ Done."


async def test_demonstration_after_a_wrong_attempt_runs_that_attempt(attendee):
    await attendee.run(solution("no_ghosts").replace("connections.remove(ws)", "pass"))
    cell = next(c.source for c in CODE if c.source.startswith("async def come_and_go"))
    await attendee.run(cell.replace("\nawait come_and_go(talk)", ""))
    said = await attendee.run(tagged("check")["no_ghosts"])
    assert said.startswith("✗") and "still holds: 3" in said


async def test_cell_that_raises_leaves_nothing_new_to_check(attendee):
    """And what runs below is not our solution. The same text in a new cell is new."""
    await attendee.attempt("history", solution("history"))
    with pytest.raises(SyntaxError):
        await attendee.run("async def talk(request): ...!")
    said = await attendee.run(call_of("nothing_between"))
    assert said.startswith("○ Nothing new to check.")
    assert not judge.is_ours(attendee.names["talk"])
    said = await attendee.attempt("nothing_between", solution("history"))
    assert "Bob never heard" in said


# --- The notebook's chats ---
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
    assert len(again.room.sockets) == 1
    visitor = await again.visitor()
    taken = {"login": "Bob", "password": PASSWORD + "!", "password2": PASSWORD + "!"}
    status, page = await visitor.post("/signin", **taken)
    assert (status, again.sentences(page)) == (422, ["Another user has this already."])


async def test_scenarios_hold_on_the_chat_and_fail_on_an_earlier_step(capsys):
    await check_chat.chat_tried()
    assert capsys.readouterr().out.count("✓") == 8
    await check.tried(judge.ours("receipt", "talk"))
    said = capsys.readouterr().out
    assert "✗ A message whose receipt was lost" in said and said.count("✓") > 3


async def test_instructor_takes_a_message_back_and_expels_a_person(capsys):
    room = await open_room("0.0.0.0", port=0)
    try:
        ann, bob = await room.server.join("ann"), await room.server.join("bob")
        await bob.say("Buy my coins!")
        await room.blank(0)
        assert "   1 bob: Buy my coins!\n" in capsys.readouterr().out
        await room.blank(1)
        assert [(await ann.next("message"))["text"] for _ in "12"] == [
            "Buy my coins!",
            "",
        ]
        await room.expel("bob")
        await asyncio.wait_for(bob.reader, 5)
        assert bob.ws.close_code == 1008
        await room.expel("bob")
        said = capsys.readouterr().out
        assert "Message 1 by bob is blank." in said and "no user 'bob'. Online:" in said
    finally:
        await close_room()


async def test_room_keeps_its_address_and_with_a_database_outlives_the_kernel(
    mongodb, monkeypatch, capsys
):
    """Its port is taken at first; then the cell runs again, as in another kernel."""
    monkeypatch.setenv("MONGO_HOST", mongodb)
    monkeypatch.setenv("MONGO_DB_NAME", "test-room")
    monkeypatch.setenv("SECRET_KEY", "0" * 32)
    monkeypatch.setattr(rooms, "HOST", "0.0.0.0")  # the whole notebook serves to it
    try:
        with socket.create_server(("0.0.0.0", 0)) as other:
            taken = other.getsockname()[1]
            first = (await open_room("127.0.0.1", taken)).server
        assert "taken by another program" in capsys.readouterr().out
        ann = await first.join("ann")
        await ann.say("Still here?")
        cookie = {"Cookie": "=".join(ann.cookie)}
        monkeypatch.setattr(rooms, "memory", None)
        again = (await open_room("127.0.0.1", taken)).server
        assert first.host == again.host == "0.0.0.0"
        assert first.port == again.port != taken
        visitor = await again.visitor()
        async with visitor.session.get("/", headers=cookie) as page:
            assert "Still here?" in await page.text()
        await again.db.mongo.client.drop_database("test-room")
    finally:
        await close_room()


# --- In a real browser ---
async def open_page(browser, server, path="/", name="bob", **options):
    """Open a page in a browser that has a person's cookie; return it."""
    person = Person(server.url, name)
    await person.sign_in()
    key, value = person.cookie
    await person.close()
    context = await browser.new_context(base_url=server.url, **options)
    await context.add_cookies([{"name": key, "value": value, "url": server.url}])
    page = await context.new_page()
    await page.goto(path)
    return page


async def test_policy_lets_one_script_run_and_stops_mallorys(attendee, browser):
    """Her script runs under the colleague's policy, and not under the solution's."""
    start = next(n for n, c in enumerate(CODE) if c.source.startswith("SCRIPT"))
    for cell in CODE[start : start + 2]:
        await attendee.run(cell.source)
    evil = "<img src=x onerror=document.querySelector('h1').textContent='M'>"
    page = await open_page(browser, servers.live, "/notice?text=" + quote(evil))
    await page.get_by_role("heading", name="M", exact=True).wait_for()
    await attendee.run(solution("policy"))
    await attendee.run("await show_notice(allow_script)")
    await page.reload()
    await page.get_by_role("heading", name="Open until six").wait_for()
    await asyncio.sleep(0.3)
    assert await page.inner_text("h1") == "Open until six"


@pytest.fixture(params=["lab", "notebook"])
async def jupyter(request, browser, tmp_path):
    """A page of JupyterLab or Notebook 7, in its dark theme, that has the notebook."""
    for name in "chat.py", "tutorial.ipynb", "templates", "static", "workshop", "docs":
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    settings = tmp_path / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    dark = '{"theme": "JupyterLab Dark"}'
    (settings / "themes.jupyterlab-settings").write_text(dark)
    # Coverage is about the chat.py here, not about copies of it.
    unmeasured = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    port = unused_port()
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "jupyter", request.param, "--allow-root"),
        *("--no-browser", f"--port={port}", "--IdentityProvider.token="),
        f"--LabApp.user_settings_dir={tmp_path / 'settings'}",
        f"--JupyterNotebookApp.user_settings_dir={tmp_path / 'settings'}",
        cwd=tmp_path,
        env=unmeasured,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await until(lambda: can_connect(port), 60)
        as_the_frame_says = await browser.new_context(color_scheme="null")
        page = await as_the_frame_says.new_page()
        # A busy Jupyter may complain of its own slowness, in a dialog.
        dialog = page.locator(".jp-Dialog")
        dismiss = dialog.locator("button").last.click
        await page.add_locator_handler(dialog, lambda: dismiss(), no_wait_after=True)
        path = {"lab": "lab/tree", "notebook": "notebooks"}[request.param]
        await page.goto(f"http://localhost:{port}/{path}/tutorial.ipynb")
        ready = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
        await page.wait_for_selector(ready, state="attached", timeout=60_000)
        yield page
    finally:
        server.terminate()
        await server.wait()


async def run_in_browser(cell):
    """Run a cell once. Jupyter may still be busy with itself when it is asked first."""
    playwright = optional("playwright.async_api")
    prompt = cell.locator(".jp-InputPrompt")
    begun = prompt.filter(has_text=re.compile(r"[*\d]"))
    for _ in range(10):
        await cell.locator(".cm-content").click()
        await cell.page.keyboard.press("Shift+Enter")
        with contextlib.suppress(playwright.TimeoutError):
            await begun.wait_for(timeout=3000)
            break
    await prompt.filter(has_text=re.compile(r"\d")).wait_for()


async def sign_up(frame, name="ann"):
    await frame.get_by_role("link", name="Create an account").click()
    await frame.get_by_label("Name", exact=True).fill(name)
    await frame.get_by_label("Password", exact=True).fill(PASSWORD)
    await frame.get_by_label("Password again").fill(PASSWORD)
    await frame.get_by_role("button", name="Create account").click()


async def test_people_talk_in_frames_as_dark_as_the_notebook(jupyter):
    """Sign up in the frame of the room; then echo oneself in the frame of step 1."""
    cells = jupyter.locator(".jp-CodeCell")
    for number in range(5):
        await run_in_browser(cells.nth(number))
    room = jupyter.frame_locator("iframe[data-path='/']")
    await sign_up(room)
    await room.get_by_label("Message", exact=True).fill("I am in the frame.")
    await room.get_by_role("button", name="Send").click()
    await room.locator("[data-id='1']", has_text="I am in the frame.").wait_for()
    echo = jupyter.frame_locator("iframe[data-path='/?name=ann']")
    await echo.get_by_text("online", exact=True).wait_for()
    await echo.get_by_label("Message").fill("Hello?")
    await echo.get_by_role("button", name="Send").click()
    await echo.locator("li:not(.waiting)", has_text="Hello?").wait_for()
    dark = "matchMedia('(prefers-color-scheme: dark)').matches"
    for frame in room, echo:
        assert await frame.locator("body").evaluate(f"() => {dark}")


@pytest.mark.parametrize("place", ["localhost", "127.0.0.1", "another machine"])
async def test_frames_work_wherever_the_notebook_is_opened(place, browser):
    """Sign up in one frame; after a reload the other frame is signed in as well."""
    host = own_address() if place == "another machine" else place
    async with serving(host="0.0.0.0") as server, serving() as closed:
        page, url = await browser.new_page(), f"http://{host}:{server.port}"
        for name, one in {"open": server, "closed": closed}.items():
            shown = {"body": frames(one, ["/", "/?"], 400), "content_type": "text/html"}
            await page.route(f"**/{name}", lambda route, _, a=shown: route.fulfill(**a))
        await page.goto(f"{url}/open")
        one = page.frame_locator("iframe[data-path='/']")
        two = page.frame_locator("iframe[data-path='/?']")
        await sign_up(one)
        await one.get_by_text("online", exact=True).wait_for()
        await page.reload()
        await one.get_by_label("Message", exact=True).fill("One room.")
        await one.get_by_role("button", name="Send").click()
        await two.locator("[data-id]", has_text="One room.").wait_for()
        if place == "another machine":
            await page.goto(f"{url}/closed")
            why = "start Jupyter with WORKSHOP_HOST=0.0.0.0"
            await page.get_by_text(why).wait_for()


# --- The day before ---
def set_up_check(*options):
    command = [sys.executable, *options, "-m", "workshop"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.rstrip().splitlines()


def test_set_up_check_fits_on_a_screen_and_ends_with_a_line_to_send():
    code, lines = set_up_check()
    assert (code, len(lines) <= 24) == (0, True)
    assert lines[-1].startswith(" READY · Python 3.") and " · receipt " in lines[-1]
    if path := shutil.which("chromium") or shutil.which("firefox-esr"):
        assert f"✓ Browser      {path}" in "\n".join(lines)


def test_set_up_check_names_what_is_missing():
    code, lines = set_up_check("-S")  # without site-packages
    assert code == 1
    assert lines[-1].startswith(" NOT READY · ") and "missing aiohttp" in lines[-1]


@pytest.mark.parametrize("name", ["__init__", "__main__", "mongodb"])
def test_set_up_check_runs_on_a_python_that_it_calls_too_old(name):
    """Such as macOS's own 3.9: its grammar, and annotations that are not evaluated."""
    source = (ROOT / "workshop" / f"{name}.py").read_text("utf-8")
    tree = ast.parse(source, feature_version=(3, 9))
    unions = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp)]
    unions = [node for node in unions if isinstance(node.op, ast.BitOr)]
    assert not unions or "from __future__ import annotations" in source
