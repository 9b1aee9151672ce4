"""Tests of the notebook: it runs, breaks what it says it breaks, and checks fairly."""

import ast
import inspect
import itertools
import linecache
import re
from pathlib import Path

import nbformat
import pytest

from conftest import HERE
from workshop import scenarios
from workshop.servers import serving
from workshop.tiny import little, step


def read_notebook():
    return nbformat.read(HERE / "tutorial.ipynb", as_version=4)


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
        """Run the exercise's chapter up to it, without the cells that take long."""
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
    monkeypatch.syspath_prepend(HERE)
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
    source = Path(HERE, "workshop", "steps", "receipts.py").read_text()
    body = source[source.index("messages, numbers") :]
    assert sum(bool(line.strip()) for line in body.splitlines()) == 24
    assert body.strip() == solution("once").strip()


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


# --- Exercises ---
@pytest.mark.parametrize("name", EXERCISES)
async def test_stub_is_not_attempted(attendee, name):
    await attendee.open(name)
    said = await attendee.attempt(name, tagged("exercise")[name])
    assert said.startswith("○ Not attempted yet")


@pytest.mark.parametrize("name", EXERCISES)
async def test_solution_passes_its_check(attendee, name, request):
    if name == "pymongo":
        request.getfixturevalue("mongodb")
    await attendee.open(name)
    assert await attendee.attempt(name, solution(name)) == "✓ Done."


# What people get wrong: a change of the solution, and what the check says of it.
EDITED = 'mine = edit("ws.send_json", "ws.send_json", of=broken)'
WRONG_ATTEMPTS = [
    ("echo", "await ws.send_json(frame.json())", "ws.send_json(frame.json())", "`send_json` was called and never awaited"),
    ("echo", "send_json(frame.json())", "send_json(frame)", "Back came [1,"),
    ("echo", "send_json(frame.json())", "send_json(frame.data)", "Back came"),
    ("echo", "    return ws", "        break\n    return ws", "Frame 2 went in"),
    ("awaited", "await ws.send_json", "ws.send_json", "never awaited"),
    ("broadcast", "await broadcast(", "broadcast(", "`broadcast` was called and never"),
    ("broadcast", "    connections.add(ws)\n", "", "Bob heard nothing"),
    ("broadcast", "await broadcast(frame.json())", "await ws.send_json(frame.json())", "Bob heard nothing"),
    ("no_ghosts", "    try:\n        async for frame in ws:\n            await broadcast(frame.json())\n    finally:\n        connections.remove(ws)\n", "    async for frame in ws:\n        await broadcast(frame.json())\n    connections.remove(ws)\n", "never run"),
    ("no_ghosts", "connections.remove(ws)", "connections.clear()", "taken Ann's connection along"),
    ("no_ghosts", "connections.remove(ws)", "pass", "still holds 1 of hers"),
    ("names", "event | {", "{", "Ann said Hi"),
    ("names", 'event | {"user": name}', '{"user": name} | event', "Your own value has to win"),
    ("names", '        await broadcast({"type": "joined", "user": name})\n', "", "nobody was told: no `joined`"),
    ("names", '\n        await broadcast({"type": "left", "user": name})', "", "no `left`"),
    ("names", 'await broadcast({"type": "left"', 'broadcast({"type": "left"', "never awaited"),
    ("as_text", "words.textContent", "words.outerHTML", "does not show the text"),
    ("as_text", "words.textContent = text", "words.innerHTML = String(text)", "as markup"),
    ("me", '"/me "', '"/me"', "ordinary message"),
    ("me", "[4:]", "[3:]", "should hear"),
    ("me", "    return event\n", "", "should return an event"),
    ("history", "len(messages) + 1", "len(messages)", "`id` 1"),
    ("history", "messages[after:]", "messages", "told number 1 once more"),
    ("history", "        await ws.send_json(message)", "        await broadcast(message)", "heard number"),
    ("nothing_between", "islice(messages, after, None)", "messages[after:]", "never heard"),
    ("nothing_between", "    for message in islice(messages, after, None):\n        await ws.send_json(message)\n    connections.add(ws)\n", "    connections.add(ws)\n    for message in islice(messages, after, None):\n        await ws.send_json(message)\n", "Bob heard number"),
    ("receipt", "await ws.send_json({", "await broadcast({", "for its sender only"),
    ("receipt", '"id": number', '"id": 0', "instead of one"),
    ("once", 'key = name, event["nonce"]', 'key = "", event["nonce"]', "the same nonce"),
    ("once", "if key not in numbers", "if True", "2 times"),
    ("once", "                numbers[key] = len(messages)\n", "", "KeyError"),
    ("typing", "                continue\n", "", "KeyError"),
    ("typing", '"user": name}', '"user": event["user"]}', "instead of one"),
    ("waiting_for_nobody", "transport.write(frame)", "transport.write(data)", ""),
    ("waiting_for_nobody", "        transport.write(frame)", "        await ws.send_json(event)", ""),
    ("bounded", "> 65_536", "> 65_536_000", "KiB wait"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, old, new, hint",
    WRONG_ATTEMPTS,
    ids=[f"{w[0]}-{n}" for n, w in enumerate(WRONG_ATTEMPTS)],
)
async def test_wrong_attempt_is_told_what_it_lacks(attendee, name, old, new, hint):
    source = solution(name)
    assert old in source
    await attendee.open(name)
    said = await attendee.attempt(name, source.replace(old, new))
    assert said.startswith("✗ Not yet.")
    assert hint in said
