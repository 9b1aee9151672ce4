"""Tests of the notebook: it runs, breaks what it says it breaks, and checks fairly."""

import ast
import asyncio
import contextlib
import inspect
import itertools
import linecache
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from aiohttp import web
from aiohttp.test_utils import unused_port

from tests.parts import (
    PASSWORD,
    ROOT,
    can_connect,
    need_mongod,
    optional,
    program,
    until,
)
from workshop import pictures, scenarios, slides
from workshop import room as rooms
from workshop.room import close_room, open_room
from workshop.servers import frames, own_address, serving
from workshop.tiny import little, step


def read_notebook():
    return nbformat.read(ROOT / "tutorial.ipynb", as_version=4)


CELLS = read_notebook().cells


def tagged(kind):
    """Return the source of the notebook's cells with a tag like `check:me`, by `me`."""
    found = {}
    for cell in CELLS:
        for tag in cell.metadata.get("tags", []):
            if tag.startswith(f"{kind}:"):
                found[tag.partition(":")[2]] = cell.source
    return found


def solution(name):
    """Return the first piece of code in the folded solution of an exercise."""
    folded = tagged("solution")[name].partition("<summary>Solution</summary>")[2]
    return re.search(r"```python\n(.*?)```", folded, re.DOTALL)[1]


EXERCISES = list(tagged("exercise"))


def chapters():
    """Return the notebook's cells by the heading of their chapter."""
    found, heading = {}, ""
    for cell in CELLS:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            heading = cell.source.splitlines()[0].removeprefix("## ")
        found.setdefault(heading, []).append(cell)
    return found


class Attendee:
    """An attendee who does exercises, in a notebook whose first cell has been run."""

    numbers = itertools.count()

    def __init__(self, capsys):
        self.capsys, self.names = capsys, {"__name__": "__main__"}

    async def run(self, source):
        """Run a cell as Jupyter does, and return what it prints."""
        file = f"<cell {next(self.numbers)}>"
        lines = source.splitlines(keepends=True)
        linecache.cache[file] = len(source), None, lines, file
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, file, "exec", flags=flags)
        result = eval(code, self.names)
        if code.co_flags & inspect.CO_COROUTINE:
            await result
        return self.capsys.readouterr().out

    async def open(self, name):
        """Run the exercise's chapter up to it, but not its demonstrations."""
        cells = next(c for c in chapters().values() if self.position(name, c))
        for cell in cells[: self.position(name, cells)]:
            slow = re.search(r"await (stall|check\.tried)\(|plt\.", cell.source)
            if cell.cell_type == "code" and not slow:
                await self.run(cell.source)

    @staticmethod
    def position(name, cells):
        tags = [cell.metadata.get("tags", []) for cell in cells]
        return next((n for n, t in enumerate(tags) if f"exercise:{name}" in t), None)

    async def attempt(self, name, source):
        """Write an attempt, and return the first line that its check prints."""
        await self.run(source)
        first_line = tagged("check")[name].splitlines()[0]
        return (await self.run(first_line)).splitlines()[0]


@pytest.fixture
async def attendee(capsys, monkeypatch):
    attendee = Attendee(capsys)
    monkeypatch.syspath_prepend(ROOT)
    await attendee.run(next(c for c in CELLS if c.cell_type == "code").source)
    yield attendee
    for close in "stop", "stop_playing", "close_room":
        await attendee.run(f"from workshop import {close}\nawait {close}()")


# --- The scenarios, on our 24 lines and on chat.py ---
EVERY = scenarios.LOSING_NOTHING + scenarios.WAITING_FOR_NOBODY
STEPS = {
    "receipts": scenarios.LOSING_NOTHING,
    "typing": scenarios.LOSING_NOTHING,
    "writes_unbounded": EVERY,
    "writes": EVERY,
}
RUNS = [(name, s) for name, found in STEPS.items() for s in found]


@pytest.mark.parametrize(
    "name, scenario", RUNS, ids=[f"{name}-{s.__name__}" for name, s in RUNS]
)
async def test_little_chat_keeps_the_promises_of_the_real_one(name, scenario):
    async with little(step(name)) as server:
        await scenario(server)
        assert not server.log


@pytest.mark.parametrize("scenario", EVERY, ids=lambda scenario: scenario.__name__)
async def test_chat_keeps_the_same_promises(scenario):
    wide = {"MESSAGES_PER_SECOND": 100_000, "MESSAGE_BURST": 100_000}
    async with serving(MAX_MESSAGE_LENGTH=10_000, **wide) as server:
        await scenario(server)
        assert not server.log


BREAKS = [
    ("history_slice", scenarios.come_back_while_they_talk, "Bob never heard number"),
    ("receipts_twice", scenarios.lose_a_receipt, "Bob heard 'Pay 100 to Bob.' 2 times"),
    ("receipts", scenarios.stop_reading, "Ann stood still"),
]


@pytest.mark.parametrize("name, scenario, said", BREAKS, ids=[b[0] for b in BREAKS])
async def test_step_before_its_repair_breaks_a_promise(name, scenario, said):
    async with little(step(name)) as server:
        with pytest.raises(scenarios.Lacking, match=said):
            await scenario(server)


def test_the_server_of_step_5_has_24_lines():
    source = Path(ROOT, "workshop", "steps", "receipts.py").read_text()
    body = source[source.index("messages, numbers") :]
    assert sum(bool(line.strip()) for line in body.splitlines()) == 24
    assert body.strip() == solution("once").strip()


# --- The instructor's room ---
async def test_instructor_takes_a_message_back_and_expels_a_person(capsys):
    room = await open_room("0.0.0.0", port=0)
    try:
        ann, bob = await room.server.join("ann"), await room.server.join("bob")
        await bob.say("Buy my coins!")
        await room.blank(0)
        assert "   1 bob: Buy my coins!\n" in capsys.readouterr().out
        await room.blank(1)
        assert "Message 1 by bob is blank." in capsys.readouterr().out
        assert (await ann.next("message"))["text"] == "Buy my coins!"
        assert (await ann.next("message"))["text"] == ""
        await room.expel("bob")
        await asyncio.wait_for(bob.reader, 5)
        assert bob.ws.close_code == 1008
        await ann.say("Thank you.")
        capsys.readouterr()
        await room.blank(99)
        await room.expel("bob")
        said = capsys.readouterr().out
        assert "message 99. The newest are:\n   1 bob: \n   2 ann: Thank you.\n" in said
        assert "There is no user 'bob'. Online: ann.\n" in said
    finally:
        await close_room()


async def test_room_keeps_the_address_that_people_have_typed(monkeypatch, capsys):
    """Its cell is run again, and 8080 belongs to another program, or is free again."""
    monkeypatch.setattr(rooms, "HOST", "0.0.0.0")  # the whole notebook serves to it
    try:
        with socket.create_server(("0.0.0.0", 0)) as other:
            taken = other.getsockname()[1]
            first = (await open_room("127.0.0.1", taken)).server
            assert "taken by another program" in capsys.readouterr().out
        again = (await open_room("127.0.0.1", taken)).server
        assert first.host == again.host == "0.0.0.0"
        assert first.port == again.port != taken
    finally:
        await close_room()


# --- The notebook as a file ---
def test_notebook_is_stored_without_outputs_and_counts():
    for cell in CELLS:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.id


def test_cells_are_short():
    for cell in CELLS:
        exercise = any("exercise" in tag for tag in cell.metadata.get("tags", []))
        lines = [line for line in cell.source.splitlines() if line.strip()]
        if cell.cell_type == "code":
            assert len(lines) <= (30 if exercise else 12), cell.source
            assert max(map(len, lines)) <= 88, cell.source
            assert cell.source.count("# new") <= 12, cell.source


def test_there_are_exercises_with_a_check_a_hint_and_a_folded_solution():
    assert len(EXERCISES) >= 8
    assert set(EXERCISES) == set(tagged("check")) == set(tagged("solution"))
    for folded in tagged("solution").values():
        assert folded.count("<details>") == folded.count("</details>") == 2
        assert folded.startswith("<details><summary>Hint</summary>")


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


async def run_notebook(first, change):
    """Run the notebook, each cell changed by a function; return it with what it shows.

    Before and after it, look which ports are open; after it, what still runs.
    """
    notebook = read_notebook()
    for cell in notebook.cells:
        cell.source = change(cell)
    more = [nbformat.v4.new_code_cell(source) for source in (LISTENING, *first)]
    last = [nbformat.v4.new_code_cell(source) for source in (LISTENING, LEFT)]
    notebook.cells = [*more, *notebook.cells, *last]
    client = nbclient.NotebookClient(
        notebook,
        timeout=60,
        kernel_name="python3",
        resources={"metadata": {"path": ROOT}},
    )
    await client.async_execute()
    return notebook


def shown_value(cell):
    return ast.literal_eval(cell.outputs[0].data["text/plain"])


def as_shipped(cell):
    return cell.source


def solved(cell):
    for tag in cell.metadata.get("tags", []):
        if tag.startswith("exercise:"):
            return solution(tag.partition(":")[2])
    return cell.source


RUNS_OF_ALL = {"as shipped": ([NO_SERVER], as_shipped), "solved": ([], solved)}


@pytest.mark.parametrize("kind", RUNS_OF_ALL)
async def test_notebook_runs_and_leaves_nothing_running(kind, monkeypatch):
    """Run all: as shipped, without a MongoDB; and solved, with one.

    As shipped, each stub is not attempted; solved, each solution passes its check.
    """
    first, change = RUNS_OF_ALL[kind]
    if not first:
        need_mongod()
    monkeypatch.delenv("MONGO_HOST", raising=False)
    notebook = await run_notebook(first, change)
    before, after = shown_value(notebook.cells[0]), shown_value(notebook.cells[-2])
    tasks, processes = shown_value(notebook.cells[-1])
    assert after == before and processes == []
    ours = re.compile(r"/(chat|workshop/\w+)\.py|/aiohttp/|/pymongo/|/ipykernel_\d")
    assert not [path for path in tasks if ours.search(path)]
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.get("text", "") for output in shown)
    verdict = "✓ Done." if kind == "solved" else "○ Not attempted yet: there is a gap"
    assert [line for line in said.splitlines() if "✗" in line] == []
    assert said.count(verdict) == len(EXERCISES)
    for phrase in BROKEN:
        assert re.search(phrase, said), phrase
    assert not [output for output in shown if output.get("name") == "stderr"]


# What the notebook shows of a safeguard that is off.
BROKEN = [
    r"Ann heard \[\]\nPython says: coroutine 'WebSocketResponse.send_json' was never",
    "Connections that the server still holds: 3",
    r"Bob has \[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, (?!11, 12, 13, 14, 15, 16)",
    r"\[\(1, 'Pay 100 to Bob.'\), \(2, 'Pay 100 to Bob.'\)\]",
    r"After \d\d\d messages Ann gets no receipt any more",
    r"After 700 messages \d{4} KiB wait for Bob",
    "receipt of 'three', in vain.*ZeroDivisionError",
    "The other page gets {'type': 'message', 'id': 1, 'user': 'ann', 'text': 'The safe",
    r"Stored: 1\nBob has heard \[\]",
    "the server has read 1000 of 1,000 frames",
    r"It stopped after [2-9]\.\d+ s.\nAnn's side notes code 1006",
    r"Ann has heard \['Is anyone there\?'\]\nBob has heard \[\]",
]


# --- What people get wrong: a change of the solution, and what the check says of it ---
LATE_REMOVE = solution("no_ghosts").replace(
    """    try:
        async for frame in ws:
            await broadcast(frame.json())
    finally:
        connections.remove(ws)
""",
    """    async for frame in ws:
        await broadcast(frame.json())
    connections.remove(ws)
""",
)
EARLY_ADD = solution("nothing_between").replace("    connections.add(ws)\n", "")
EARLY_ADD = EARLY_ADD.replace("    for mess", "    connections.add(ws)\n    for mess")
ALL = "\\A[\\s\\S]*\\Z"  # the whole solution
REPLAY = r"    for message in islice.*\n.*\n"
RECEIPT = r"(.*await broadcast\(messages\[-1\]\)\n)(.*send_json.*\n)"
WRONG_ATTEMPTS = [
    ("echo", r"await ws.send_json", "ws.send_json", "`send_json` was called and never"),
    ("echo", r"frame.json\(\)", "frame", "sent [1,"),
    ("echo", r"frame.json\(\)", "frame.data", "The server sent"),
    ("echo", r"frame.json\(\)", "frame.json", "called with brackets"),
    ("echo", r"    return", "        break\n    return", "Frame 2 went in"),
    ("awaited", r"await ws", "ws", "never awaited"),
    ("awaited", r"await ws", "async ws", "Python can't read this copy: invalid syntax"),
    ("broadcast", r"await broadcast\(", "broadcast(", "`broadcast` was called and"),
    ("broadcast", r"    connections.add\(ws\)\n", "", "Bob heard nothing"),
    ("broadcast", r"await broadcast", "await ws.send_json", "Bob heard nothing"),
    ("broadcast", r"frame.json\(\)", "frame", "instead of the event in the frame"),
    ("no_ghosts", ALL, LATE_REMOVE, "never run"),
    ("no_ghosts", r"remove\(ws\)", "clear()", "Ann's was forgotten"),
    (
        "no_ghosts",
        r"connections.remove\(ws\)",
        "pass",
        "still holds her connection (1)",
    ),
    ("names", r"event \| {", "{", "Ann said Hi"),
    (
        "names",
        r'event \| ({"user": name})',
        r"\1 | event",
        "The name from the address has to win",
    ),
    ("names", r"        await broad.*joined.*\n", "", "but no `joined` was sent"),
    ("names", r"\n.*left.*", "", "no `left`"),
    ("names", r'await (broadcast\({"type": "left")', r"\1", "never awaited"),
    ("as_text", r"textContent", "outerHTML", "`outerHTML` reads the text as markup"),
    ("as_text", r"textContent = text", "innerHTML = String(text)", "as markup"),
    ("as_text", r"textContent = text", "textContent = escape(text)", "can't tell"),
    ("me", r'"/me "', '"/me"', "ordinary message"),
    ("me", r"\[4:\]", "[3:]", "should hear"),
    ("me", r"    return event\n", "", "should return an event"),
    ("history", r"len\(messages\) \+ 1", "len(messages)", "`id` 1"),
    ("history", r"messages\[after:\]", "messages", "told number 1 once more"),
    (
        "history",
        r"ws.send_json\(message\)",
        "broadcast(message)",
        "replay to Bob alone",
    ),
    ("nothing_between", r"islice\(.*\)", "messages[after:]", "never heard"),
    ("nothing_between", ALL, EARLY_ADD, "Bob heard number"),
    ("receipt", r"ws.send_json\({", "broadcast({", "for its sender only"),
    ("receipt", r'"id": number', '"id": 0', "instead of one"),
    ("receipt", r'"id": number', '"id": len(messages)', "meanwhile the list grows"),
    ("once", r"key = name", 'key = ""', "the same nonce"),
    ("once", r"if key not in numbers", "if True", "2 times"),
    ("once", r" *numbers\[key\] = .*\n", "", "`numbers` does not have this key"),
    (
        "once",
        r"( *numbers.* = .*\n)( *await b.*\n)",
        r"\2\1",
        "2 times: `broadcast` waits",
    ),
    ("typing", r" *continue\n", "", "A notice has none, and went on"),
    ("typing", "continue", "return", "Your handler has returned"),
    ("typing", "continue", "return ws", "your handler has returned"),
    ("typing", "continue", "break", "your handler has returned"),
    ("typing", r'"user": name}', '"user": event["user"]}', "instead of one"),
    (
        "waiting_for_nobody",
        r"write\(frame\)",
        "write(data)",
        "the bytes were not a valid frame",
    ),
    ("waiting_for_nobody", r"transport.write\(.*", "await ws.send_json(event)", ""),
    ("waiting_for_nobody", r"\.values\(\)", "", "the keys, or the transports?"),
    (
        "broadcast",
        r"(await broadcast.*)",
        r"\1; await ws.send_json(frame.json())",
        "heard her own words 2 times",
    ),
    ("names", r"( *await broad.*joined.*\n)", r"\1\1", "Ann came, and Bob heard it 2"),
    (
        "names",
        r"( *await broad.*event \|.*\n)",
        r"\1\1",
        "Ann said Hi, and Bob heard it",
    ),
    ("names", r"( *await broad.*left.*)", r"\1\n\1", "Ann left, and Bob heard it 2"),
    ("as_text", "words.textContent = text", "", "Nothing shows the text"),
    ("as_text", "words.text", "word.text", "The check can't tell"),
    ("me", r"event\['text'\]\[4:\]", "event['text'].split()[1]", "ann says /me waves"),
    ("me", r"\* {name}", "* ann", "should hear '* eve waves'"),
    ("history", '1, "user": name}', "1}", "Ann said one, and Bob hears"),
    (
        "history",
        '1, "user": name}',
        '1, "user": "name"}',
        "Ann said one, and Bob hears",
    ),
    (
        "nothing_between",
        REPLAY,
        "    await gather(*(ws.send_json(m) for m in messages[after:]))\n",
        "Bob never heard number",
    ),
    (
        "nothing_between",
        f"({REPLAY})",
        r'\1    await ws.send_json({"type": "welcome"})\n',
        "Bob never heard number",
    ),
    (
        "nothing_between",
        REPLAY,
        "    while after < len(messages):\n        await ws.send_json(messages[0])\n",
        "Bob heard number 1 twice",
    ),
    ("receipt", RECEIPT, r"\2\1", "was not broadcast: after an `await`"),
    ("once", r"len\(messages\)\n", "True\n", "It is number 2"),
    (
        "once",
        r'name, event\["nonce"\]((?:.*\n)*?.*)key\[1\]',
        r'name, event["text"]\1event["nonce"]',
        "with a nonce of its own",
    ),
    (
        "typing",
        "continue\n",
        "await ws.send_json({'type': 'receipt'})\n                continue\n",
        "a receipt for a notice",
    ),
    ("bounded", r"65_536", "900_000", "KiB wait"),
    (
        "bounded",
        r"abort\(\)",
        "close()\n            continue",
        "Bob is cut off, and still",
    ),
    ("broadcast", r"\bconnections", "clients", "Keep the name `connections`"),
    ("bounded", r"65_536", "65_536_000", "KiB wait"),
    ("bounded", r"transport.abort\(\)", "continue", "Bob is skipped"),
    ("bounded", r" > 65_536", " < 65_536", "connection has ended: it was cut off"),
    ("bounded", r"_size\(\)", "_size", "Your handler raised TypeError"),
    ("bounded", "65_536", "6_553", "for which 60,000 bytes wait"),
    ("broadcast", r"frame.json\(\)", "frame.json", "a method called without brackets"),
    ("broadcast", "await broadcast", "return await broadcast", "handler has returned"),
    ("names", r'event \| {"user": name}', "event", "has no `user`"),
    ("names", r'"type": "joined"', '"joined": True', "Bob heard {'joined': True"),
    (
        "names",
        r'event \| ({"user": name})',
        r'{"type": "message", "text": event["text"]} | \1',
        "instead of {'type': 'message', 'text': 'Hi', 'nonce': 'n-1'",
    ),
    ("me", r"\['text'\]\[4:\]", "['text'].lstrip('/me ')", "* eve meets me"),
    ("history", r"event \| ({.*})", r"\1 | event", "yours have to win"),
    ("history", r"event \| {", "{", "no message came, but {'id': 1"),
    (
        "nothing_between",
        REPLAY,
        2 * "    for message in messages[after:]:\n"
        "        await ws.send_json(message)\n"
        "        after = message['id']\n",
        "Bob never heard number",
    ),
    ("receipt", r'"type": "receipt", ', "", "no receipt came. Ann heard {'id': 1"),
    ("receipt", r'await (.*"receipt")', r"return await \1", "handler has returned"),
    (
        "once",
        r"( *)(if key.*\n) *(messages.append.*\n)",
        r"\1\3\1\2",
        "The repetition was stored, too",
    ),
]


@pytest.mark.parametrize(
    "name, old, new, hint",
    WRONG_ATTEMPTS,
    ids=[f"{n}-{w[0]}" for n, w in enumerate(WRONG_ATTEMPTS)],
)
async def test_wrong_attempt_is_told_what_it_lacks(attendee, name, old, new, hint):
    attempt, count = re.subn(old, new, solution(name), count=1)
    assert count, "the solution has changed"
    await attendee.open(name)
    said = await attendee.attempt(name, attempt)
    assert said.startswith("✗ Not yet."), said
    assert hint in said


# Other ways that are right, too.
SKIP = """try:
                await broadcast(frame.json())
            except ValueError:
                pass"""
JOINED = """from contextlib import contextmanager


@contextmanager
def joined(ws):
    connections.add(ws)
    try:
        yield
    finally:
        connections.remove(ws)


async def talk(request):
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    with joined(ws):
        async for frame in ws:
            await broadcast(frame.json())
    return ws
"""
RECEIPT_FIRST = r"""new = \1
            if new:
\2\3            if new:
                await broadcast(messages[numbers[key] - 1])
"""
STATE = """class State:
    def __init__(self):
        self.numbers = {}


state = State()
messages, connections = [], set()"""
STATE = solution("once").replace(
    "messages, numbers, connections = [], {}, set()", STATE
)
STATE = STATE.replace("numbers[", "state.numbers[").replace("in numb", "in state.numb")
DEFAULT = "from collections import defaultdict\n\n" + solution("once").replace(
    "messages, numbers, connections = [], {}, set()",
    "messages, numbers, connections = [], defaultdict(int), set()",
)
DEFAULT = DEFAULT.replace("if key not in numbers", "if not numbers[key]")
RIGHT_ATTEMPTS = [
    ("once", ALL, STATE),
    ("once", ALL, DEFAULT),
    ("no_ghosts", r"await broadcast\(frame.json\(\)\)", SKIP),
    ("no_ghosts", ALL, JOINED),
    (
        "no_ghosts",
        r"async def talk",
        "def awake(f):\n    async def talk(request):\n        return await f(request)\n"
        "    return talk\n\n\n@awake\nasync def talk",
    ),
    *(
        ("as_text", '"words.textContent = text"', f"'''{shown}'''")
        for shown in (
            "words.replaceChildren(text)",
            "words.prepend(text)",
            'words["textContent"] = text',
            "words.textContent = String(text)",
            "words.textContent = `${text}`",
            'words.insertAdjacentText("beforeend", text)',
            "words.append(document.createTextNode(text))",
            "words.appendChild(new Text(text))",
            "words.textContent += text",
        )
    ),
    (
        "nothing_between",
        REPLAY,
        "    for m in islice(messages, after, None):\n"
        "        await gather(ws.send_json(m))\n",
    ),
    (
        "once",
        r"if (key not in numbers):\n((?: {16}.*\n)*?) {16}await broad.*\n(.*json.*\n)",
        RECEIPT_FIRST,
    ),
    ("echo", r"send_json\(frame.json\(\)\)", "send_str(frame.data)"),
    ("once", "key = name", "key: tuple[str, ...] = name"),
    (
        "nothing_between",
        REPLAY,
        "    while after < len(messages):\n"
        "        missed, after = messages[after:], len(messages)\n"
        "        await gather(*[ws.send_json(m) for m in missed])\n",
    ),
    ("once", r"await broadcast\((messages.*)\)", r"task = create_task(broadcast(\1))"),
]


@pytest.mark.parametrize(
    "name, old, new",
    RIGHT_ATTEMPTS,
    ids=[f"{n}-{r[0]}" for n, r in enumerate(RIGHT_ATTEMPTS)],
)
async def test_another_right_attempt_passes(attendee, name, old, new):
    attempt, count = re.subn(old, new, solution(name), count=1)
    assert count, "the solution has changed"
    await attendee.open(name)
    imports = "from asyncio import create_task\n" * ("create_task" in new)
    assert await attendee.attempt(name, imports + attempt) == "✓ Done."


# --- In a real JupyterLab, and Notebook 7 ---
@pytest.fixture(params=["lab", "notebook"])
async def jupyter(request, browser, tmp_path):
    """A page of JupyterLab or Notebook 7 that has the notebook open."""
    for name in "chat.py", "tutorial.ipynb", "templates", "static", "workshop":
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    # Coverage is about the chat.py here, not about copies of it.
    unmeasured = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    port = unused_port()
    server = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "jupyter", request.param, "--allow-root"),
        *("--no-browser", f"--port={port}", "--IdentityProvider.token="),
        cwd=tmp_path,
        env=unmeasured,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await until(lambda: can_connect(port), 60)
        page = await (await browser.new_context()).new_page()
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


async def test_people_talk_in_frames_of_the_notebook(jupyter):
    """Sign up in the frame of the room; then echo oneself in the frame of step 1."""
    cells = jupyter.locator(".jp-CodeCell")
    await run_in_browser(cells.nth(0))
    await run_in_browser(cells.nth(1))
    room = jupyter.frame_locator("iframe[data-path='/']")
    await room.get_by_role("link", name="Create an account").click()
    await room.get_by_label("Name", exact=True).fill("ann")
    await room.get_by_label("Password", exact=True).fill(PASSWORD)
    await room.get_by_label("Password again").fill(PASSWORD)
    await room.get_by_role("button", name="Create account").click()
    await room.get_by_label("Message", exact=True).fill("I am in the frame.")
    await room.get_by_role("button", name="Send").click()
    await room.locator("#messages li.own:not(.pending)").wait_for()
    for number in range(4, 8):
        await run_in_browser(cells.nth(number))
    echo = jupyter.frame_locator("iframe[data-path='/?name=ann']")
    await echo.get_by_text("online", exact=True).wait_for()
    await echo.get_by_label("Message").fill("Hello?")
    await echo.get_by_role("button", name="Send").click()
    await echo.locator("li:not(.waiting)", has_text="Hello?").wait_for()


PLACES = {
    "localhost": "localhost",
    "127.0.0.1": "127.0.0.1",
    "network": own_address(),
}


async def show_frames(stack, server, *paths):
    """Serve a page with frames, as a notebook on another port; return its port."""

    async def notebook(request):
        return web.Response(text=frames(server, paths, 400), content_type="text/html")

    app = web.Application()
    app.router.add_get("/", notebook)
    runner = web.AppRunner(app)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "0.0.0.0", 0).start()
    return runner.addresses[0][1]


@pytest.mark.parametrize("place", PLACES)
async def test_two_frames_work_wherever_the_notebook_is_opened(place, browser):
    """Sign up in one frame; after a reload the other frame is signed in as well."""
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(host="0.0.0.0"))
        port = await show_frames(stack, server, "/", "/?")
        page = await (await browser.new_context()).new_page()
        await page.goto(f"http://{PLACES[place]}:{port}")
        one = page.frame_locator("iframe[data-path='/']")
        two = page.frame_locator("iframe[data-path='/?']")
        await one.get_by_role("link", name="Create an account").click()
        await one.get_by_label("Name", exact=True).fill("ann")
        await one.get_by_label("Password", exact=True).fill(PASSWORD)
        await one.get_by_label("Password again").fill(PASSWORD)
        await one.get_by_role("button", name="Create account").click()
        await one.get_by_text("online", exact=True).wait_for()
        await page.reload()
        await one.get_by_label("Message", exact=True).fill("One room.")
        await one.get_by_role("button", name="Send").click()
        await two.locator("#messages li", has_text="One room.").wait_for()


async def test_frame_says_why_it_cannot_be_shown(browser):
    """The notebook is opened from another machine, and the chat listens on this one."""
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving())
        port = await show_frames(stack, server, "/")
        page = await (await browser.new_context()).new_page()
        await page.goto(f"http://{PLACES['network']}:{port}")
        await page.get_by_text("start Jupyter with WORKSHOP_HOST=0.0.0.0").wait_for()


# --- Pictures ---
def test_picture_in_the_readme_is_the_one_of_the_notebook():
    """See `python -m workshop.pictures`. GitHub shows it on a card of its own."""
    stored = Path(ROOT, "docs", "one-message.svg").read_text("utf-8").strip()
    assert stored == pictures.one_message().draw(pictures.CARD)
    assert "prefers-color-scheme: dark" in stored


# --- Slides ---
def test_slides_need_no_network(tmp_path):
    """One slide per chapter, and nothing that a browser would fetch."""
    parts = "dist/reveal.js", "plugin/notes/notes.js", "dist/reveal.css"
    for name in (*parts, "dist/theme/simple.css"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        fonts = "@import url(https://fonts.example);" * name.endswith("css")
        (tmp_path / name).write_text(f"/* {name} */\n{fonts}\n")
    page = slides.build(tmp_path, read_notebook())
    assert page.count("<section><section>") >= len(chapters())
    for title in filter(None, chapters()):
        assert f'id="{title.replace(" ", "-")}"' in page
    assert all(f"/* {name} */" in page for name in parts)
    assert not re.search(r"<script[^>]* src=|<link[^>]* href=|@import", page)


# --- The day before ---
def set_up_check(tmp_path, *command, **environment):
    """Run it in a process group of its own: a browser that it opens ends with it."""
    said = tmp_path / "said.txt"
    with said.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        code = process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return code, said.read_text("utf-8").rstrip().splitlines()


def test_set_up_check_fits_on_a_screen_and_ends_with_a_line_to_send(tmp_path):
    code, lines = set_up_check(tmp_path, "-m", "workshop", "--no-browser")
    assert code == 0
    assert len(lines) <= 24
    assert lines[-1].startswith(" READY · Python 3.")
    assert " · receipt " in lines[-1]


@pytest.mark.parametrize("name", ["__init__", "__main__", "mongodb"])
def test_set_up_check_runs_on_a_python_that_it_calls_too_old(name):
    """Such as macOS's own 3.9: its grammar, and annotations that are not evaluated."""
    source = Path(ROOT, "workshop", f"{name}.py").read_text("utf-8")
    tree = ast.parse(source, feature_version=(3, 9))
    unions = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp)]
    unions = [node for node in unions if isinstance(node.op, ast.BitOr)]
    assert not unions or "from __future__ import annotations" in source


def test_set_up_check_names_what_is_missing(tmp_path):
    code, lines = set_up_check(tmp_path, "-S", "-m", "workshop")  # -S: no site-packages
    assert code == 1
    assert lines[-1].startswith(" NOT READY · ") and "missing aiohttp" in lines[-1]


def test_set_up_check_looks_through_a_browser(tmp_path):
    path = program("chromium", "chromium-browser", "google-chrome")
    command = f"{path} --headless --no-sandbox --disable-gpu %s"
    code, lines = set_up_check(tmp_path, "-m", "workshop", BROWSER=command)
    assert code == 0
    assert "a frame with a WebSocket works and keeps cookies" in "".join(lines)
