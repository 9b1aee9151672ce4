"""Tests of the notebook: it runs, breaks what it says it breaks, and checks fairly."""

import ast
import asyncio
import contextlib
import inspect
import os
import re
import shutil
import subprocess
import sys

import nbclient
import nbconvert
import nbformat
import pytest
from aiohttp.test_utils import unused_port

from conftest import HERE, NO_MONGOD, PASSWORD, can_connect, need, optional, until
from workshop.mongodb import find_mongod


def read_notebook():
    return nbformat.read(HERE / "tutorial.ipynb", as_version=4)


def tagged(kind):
    """Return the source of the notebook's cells with a tag like `check:me`, by `me`."""
    found = {}
    for cell in read_notebook().cells:
        for tag in cell.metadata.get("tags", []):
            if tag.startswith(f"{kind}:"):
                found[tag.partition(":")[2]] = cell.source
    return found


def solution(name):
    """Return the first piece of code in the folded solution of an exercise."""
    folded = tagged("solution")[name].partition("<summary>Solution</summary>")[2]
    return re.search(r"```python\n(.*?)```", folded, re.DOTALL)[1]


EXERCISES = list(tagged("exercise"))


class Attendee:
    """Somebody who does exercises, in a notebook whose first cell has been run."""

    def __init__(self, capsys):
        self.capsys, self.names = capsys, {"__name__": "__main__"}

    async def run(self, source):
        """Run a cell as Jupyter does, and return what it prints."""
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        code = compile(source, "<cell>", "exec", flags=flags)
        result = eval(code, self.names)
        if code.co_flags & inspect.CO_COROUTINE:
            await result
        return self.capsys.readouterr().out

    async def attempt(self, name, source):
        await self.run(source)
        return await self.run(tagged("check")[name])


@pytest.fixture
async def attendee(capsys, monkeypatch):
    attendee = Attendee(capsys)
    monkeypatch.syspath_prepend(HERE)
    await attendee.run(first_code_cell().source)
    return attendee


def first_code_cell():
    return next(cell for cell in read_notebook().cells if cell.cell_type == "code")


def test_notebook_is_stored_without_outputs_and_counts():
    for cell in read_notebook().cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None), cell.id


def chapters():
    """Return the notebook's cells by the heading of their chapter."""
    found, heading = {}, ""
    for cell in read_notebook().cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            heading = cell.source.splitlines()[0].removeprefix("## ")
        found.setdefault(heading, []).append(cell)
    return found


def sections():
    """Return the banners of chat.py, `1. Settings` and so on, by their lines."""
    lines = (HERE / "chat.py").read_text().splitlines()
    return {
        number: line.removeprefix("# ")
        for number, line in enumerate(lines, 1)
        if re.match(r"# \d\. ", line)
    }


def shown(cell):
    """Yield what a cell shows of chat.py: `Room.flush`, or `head(Room)`."""
    calls = [node for node in ast.walk(ast.parse(cell.source)) if is_call(node, "show")]
    for argument in [argument for call in calls for argument in call.args]:
        name = ast.unparse(argument)
        if name.startswith(("chat.", "head(chat.")):
            yield name.replace("chat.", "", 1)


def is_call(node, name):
    return isinstance(node, ast.Call) and ast.unparse(node.func) == name


def definitions():
    """Yield each function and class of chat.py, and the line that it begins in."""
    for node in ast.parse((HERE / "chat.py").read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield f"{node.name}.{method.name}", method.lineno


def test_chapters_are_the_sections_of_the_module():
    titles = [title for title in chapters() if title[:1].isdigit()]
    assert [title.partition(".")[0] for title in titles] == [
        str(number) for number in range(len(titles))
    ]
    assert titles[1:8] == list(sections().values())


def test_everything_in_the_module_is_shown_in_its_own_chapter_once():
    places = {}  # what is shown, and in which chapters
    for title, cells in chapters().items():
        for cell in cells:
            for name in shown(cell) if cell.cell_type == "code" else ():
                places.setdefault(name, []).append(title)
    for name, line in definitions():
        owner, _, method = name.rpartition(".")
        alone = name if method != "__init__" else f"head({owner})"
        names = name, f"head({name})", owner, alone
        found = [title for n in dict.fromkeys(names) for title in places.get(n, ())]
        section = [title for first, title in sections().items() if first < line][-1]
        assert found == [section], name


def test_what_the_notebook_says_of_2016_names_what_cures_it():
    table = next(c for t, c in chapters().items() if t.startswith("10."))[0].source
    names = re.findall(r"`([\w.]+)` \|$", table, re.MULTILINE)
    assert len(names) >= 20
    files = {path.name for path in (*HERE.iterdir(), *(HERE / "static").iterdir())}
    assert set(names) <= files | {name for name, _ in definitions()}


LISTENING = """
import asyncio, psutil
process = psutil.Process()
sorted(c.laddr.port for c in process.net_connections() if c.status == "LISTEN")
"""
LEFT = """
[task.get_coro().cr_code.co_filename for task in asyncio.all_tasks()], [
    child.cmdline() for child in process.children(recursive=True)]
"""


async def run_notebook(*first):
    """Run the notebook as it is shipped, and return it with what it shows.

    Before and after it, look which ports are open; after it, what still runs.
    """
    notebook = read_notebook()
    more = [nbformat.v4.new_code_cell(source) for source in (LISTENING, *first)]
    last = [nbformat.v4.new_code_cell(source) for source in (LISTENING, LEFT)]
    notebook.cells = [*more, *notebook.cells, *last]
    client = nbclient.NotebookClient(
        notebook,
        timeout=60,
        kernel_name="python3",
        resources={"metadata": {"path": HERE}},
    )
    await client.async_execute()
    return notebook


def shown_value(cell):
    return ast.literal_eval(cell.outputs[0].data["text/plain"])


@pytest.fixture(params=["without a MongoDB", "with a MongoDB"])
def first_cells(request):
    if request.param == "with a MongoDB":
        need(find_mongod(), NO_MONGOD)
        return []
    return ["import tutorial\ntutorial.find_mongod = lambda: None"]


async def test_notebook_runs_as_shipped_and_leaves_nothing_running(
    first_cells, monkeypatch
):
    monkeypatch.delenv("MONGO_HOST", raising=False)
    notebook = await run_notebook(*first_cells)
    before, after, (tasks, processes) = (
        shown_value(notebook.cells[n]) for n in (0, -2, -1)
    )
    assert after == before and processes == []
    ours = re.compile(r"/(chat|tutorial)\.py|/aiohttp/|/pymongo/|/ipykernel_\d")
    assert not [path for path in tasks if ours.search(path)]
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    said = "".join(output.get("text", "") for output in shown)
    assert ("There is no MongoDB here" in said) == bool(first_cells)
    assert ("Bob has heard 2 in the middle" in said) == (not first_cells)
    assert said.count("○ Not attempted yet.") == len(EXERCISES)
    for phrase in BROKEN_AND_REPAIRED:
        assert phrase in said
    assert re.search(r"Answers: \[(303, 422|422, 303)\]", said)
    assert not [output for output in shown if output.get("name") == "stderr"]


# What the notebook shows when a safeguard is off, and when it is on again.
BROKEN_AND_REPAIRED = [
    *("Ann was cut off", "ZeroDivisionError", "It did not start: MESSAGES_PER_SECOND"),
    *("the other page reads The safe opens with 4711.", "The WebSocket: 403"),
    "Answers: [303, 303]",
    *("<h1>You", "&lt;h1&gt;You"),
    *("[(1, 'Pay 100 to Bob.'), (2, 'Pay 100 to Bob.')]", "[(1, 'Pay 100 to Bob.')]"),
    *("Connections: 3\nOnline: ['ann', 'bob', 'eve']", "Connections: 0\nOnline: []"),
    *("Ann's side notes 1006", "Ann's side notes 1001"),
    *("Bob has heard []", "Bob has heard ['Is anybody there?']"),
    *("SameSite=Lax\n", "SameSite=Lax; Secure\n"),
]


@pytest.fixture(params=["lab", "notebook"])
async def jupyter(request, browser, tmp_path):
    """A page of JupyterLab or Notebook 7 that has the notebook open."""
    for name in "chat.py", "tutorial.py", "tutorial.ipynb", "templates", "static":
        copy = shutil.copytree if (HERE / name).is_dir() else shutil.copy
        copy(HERE / name, tmp_path / name)
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
    playwright, prompt = (
        optional("playwright.async_api"),
        cell.locator(".jp-InputPrompt"),
    )
    begun = prompt.filter(has_text=re.compile(r"[*\d]"))
    for _ in range(10):
        await cell.locator(".cm-content").click()
        await cell.page.keyboard.press("Shift+Enter")
        with contextlib.suppress(playwright.TimeoutError):
            await begun.wait_for(timeout=3000)
            break
    await prompt.filter(has_text=re.compile(r"\d")).wait_for()


async def test_chat_appears_in_a_frame_of_the_notebook_and_two_can_talk(jupyter):
    """Run the first cells in a real JupyterLab: sign up in the frame, and meet Ann."""
    cells = jupyter.locator(".jp-CodeCell")
    await run_in_browser(cells.nth(0))
    await run_in_browser(cells.nth(1))
    frame = jupyter.frame_locator("iframe[title='The chat']")
    await frame.get_by_role("link", name="Create an account").click()
    await frame.get_by_label("Name", exact=True).fill("bob")
    await frame.get_by_label("Password", exact=True).fill(PASSWORD)
    await frame.get_by_label("Password again").fill(PASSWORD)
    await frame.get_by_role("button", name="Create account").click()
    await frame.get_by_text("online", exact=True).wait_for()
    await run_in_browser(cells.nth(2))
    await frame.get_by_text("Hello! I am in the notebook.").wait_for()
    await frame.get_by_label("Message", exact=True).fill("And I am in the frame.")
    await frame.get_by_role("button", name="Send").click()
    await frame.locator("#messages li.own:not(.pending)").wait_for()


def test_slides_build_with_one_for_each_chapter():
    slides, _ = nbconvert.SlidesExporter().from_filename(HERE / "tutorial.ipynb")
    assert slides.count("<section><section>") == len(chapters())
    for title in filter(None, chapters()):
        anchor = title.replace(" ", "-")
        assert f'id="{anchor}"' in slides


def test_there_are_exercises_with_a_check_a_hint_and_a_folded_solution():
    assert len(EXERCISES) >= 8
    assert set(EXERCISES) == set(tagged("check")) == set(tagged("solution"))
    for folded in tagged("solution").values():
        assert folded.count("<details>") == folded.count("</details>") == 2
        assert folded.startswith("<details><summary>Hint</summary>")


@pytest.mark.parametrize("name", EXERCISES)
async def test_stub_is_not_attempted(attendee, name):
    said = await attendee.attempt(name, tagged("exercise")[name])
    assert said == "○ Not attempted yet.\n"


@pytest.mark.parametrize("name", EXERCISES)
async def test_solution_passes_its_check(attendee, name, request):
    if name == "pymongo":
        request.getfixturevalue("mongodb")
    assert await attendee.attempt(name, solution(name)) == "✓ Done.\n"


# What people get wrong: a change of the solution, and what the check says of it.
PASSING = """
@web.middleware
async def timing(request, handler):
    return await handler(request)
"""
NOTHING = """
async def search(db, text, count=20):
    return []
"""
WRONG_ATTEMPTS = [
    ("mended", "await asyncio.to_thread(slow)", "slow()", "one was inside"),
    ("mended", "await asyncio.to_thread(slow)", "'late, but here'", "has to call slow"),
    ("mended", "web.Response(text=await asyncio.to_thread(slow))", "slow()", "returns"),
    ("mended", "slow))", "slow) * 2)", "is the answer"),
    ("mended", "slow)", "undefined)", "NameError"),
    ("greeting", "super().__post_init__()", "pass", "checks that were there"),
    ("greeting", "> 100", "> 99", "hundred characters are allowed"),
    ("greeting", "> 100", "> 101", "101 characters should be refused"),
    ("greeting", ' = ""', ' = "Hi"', "sets nothing"),
    ("timing", "mark(error, start)", "pass", "a redirect"),
    ("timing", ") * 1000", ")", "takes 50 ms"),
    ("timing", solution("timing"), PASSING, "no Server-Timing"),
    ("search", solution("search"), NOTHING, "does not find"),
    ("search", "re.escape(text)", "text", "'1+1' and 'c.t'"),
    ("search", ', "$options": "i"', "", "any case"),
    ("search", "-1", "1", "newest should come first"),
    ("search", ".limit(count)", "", "keep to `count`"),
    ("unread", 'session["seen"] = last', "pass", "one mark is due"),
    ("unread", 'session.get("seen", last)', 'session.get("seen", 0)', "first visit"),
    ("unread", "new[0]", "new[-1]", "3 is marked"),
    ("me", '"/me "', '"/me"', "ordinary message"),
    ("me", "{text[4:]}", "{text[3:]}", "should hear"),
    ("me", "return await", "await", "receipt"),
    ("typing", "wait or ", "", "rate limit"),
    ("typing", '"user": user["name"]', '"user": "eve"', "Bob gets"),
    ("private", 'if connection.user["name"] in (name, user["name"])', "if True", "Eve"),
    ("private", 'event | {"type": "message"', '{"type": "message"', "whose it is"),
    ("private", "(name, user", "(user", "bob waited 3 s for a private"),
    ("private", "if name not in names:", "if False:", "Zoe is not here"),
    ("private", '"id": self.last', '"id": self.last + 1', "is a new one"),
    ("rooms", 'kitchen[chat.ROOM]}', 'app[chat.ROOM]}', "counts from 1"),
    ("rooms", "if name not in rooms:", "if False:", "complained"),
    ("clock", "sleep(1)", "sleep(2.5)", "passed, not one"),
    ("clock", "    task.cancel()\n", "    return\n", "still runs"),
    ("clock", "str(ObjectId())", '"same"', "waited 3 s for a message"),
    ("clock", "while True:", "while not await asyncio.sleep(1):", "as soon as"),
    ("health", "await chat.answer(request[chat.DB].messages.find_one())", "", "503"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, old, new, hint",
    WRONG_ATTEMPTS,
    ids=[f"{w[0]}-{w[3]}" for w in WRONG_ATTEMPTS],
)
async def test_wrong_attempt_is_told_what_it_lacks(attendee, name, old, new, hint):
    source = solution(name)
    assert old in source
    said = await attendee.attempt(name, source.replace(old, new))
    assert hint in said
    assert said.startswith("✓" if hint == "Done" else "✗ Not yet.")
