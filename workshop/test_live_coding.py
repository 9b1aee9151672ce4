"""Test of live coding: what the instructor types into chat.py reaches an open page."""

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys

import pytest
from aiohttp.test_utils import unused_port
from bson import ObjectId

from tests.parts import (
    PASSWORD,
    ROOT,
    can_connect,
    clean_environment,
    need,
    optional,
    until,
)
from workshop.servers import own_address

POST = "    async with room.saving:"
ME = """    if text.startswith("/me "):
        text = f"* {user['name']} {text[4:]}"
"""


@pytest.fixture
async def projector(request, tmp_path):
    """A function: run docs/teaching.md's command for live coding on a copy."""
    need(optional("watchfiles"), "no watchfiles: pip install -r .ci/requirements.txt")
    with contextlib.ExitStack() as stack:

        async def start(in_memory):
            for name in "chat.py", "templates", "static":
                copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
                copy(ROOT / name, tmp_path / name)
            port = unused_port()
            # Coverage is about the chat itself, not about copies of it.
            environment = {
                name: value
                for name, value in clean_environment().items()
                if not name.startswith("COV")
            } | {"PORT": str(port), "SITE_HOST": "0.0.0.0"}
            if not in_memory:
                environment["MONGO_HOST"] = request.getfixturevalue("mongodb")
                environment["MONGO_DB_NAME"] = f"test-{ObjectId()}"
                environment["SECRET_KEY"] = "0" * 32
            stack.enter_context(watching(tmp_path, environment))
            await until(lambda: can_connect(port), 30)
            return tmp_path, f"http://{own_address()}:{port}"

        yield start


@contextlib.contextmanager
def watching(folder, environment):
    command = sys.executable, "-m", "watchfiles", f"{sys.executable} chat.py"
    process = subprocess.Popen(
        [*command, "chat.py", "templates", "static"],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def sign_up(browser, url, name="ann"):
    page = await (await browser.new_context()).new_page()
    await fill_in(page, url, name)
    return page


async def fill_in(page, url, name="ann"):
    await page.goto(f"{url}/signin")
    await page.get_by_label("Name", exact=True).fill(name)
    await page.get_by_label("Password", exact=True).fill(PASSWORD)
    await page.get_by_label("Password again").fill(PASSWORD)
    await page.get_by_role("button", name="Create account").click()
    await page.get_by_text("online", exact=True).wait_for()


async def test_what_is_typed_into_the_chat_reaches_an_open_page(projector, browser):
    """With a database, each save reaches Bob's page on another machine.

    Ann says `/me waves` again and again meanwhile. Both stay signed in.
    """
    folder, url = await projector(in_memory=False)
    ann, bob = await sign_up(browser, url), await sign_up(browser, url, "bob")
    original = (folder / "chat.py").read_text()
    assert original.count(POST) == 1
    for number in range(3):
        me = ME.replace("* {", f"* {number} {{")
        (folder / "chat.py").write_text(original.replace(POST, me + POST))
        seen = bob.locator("[data-id]", has_text=f"* {number} ann")
        for _ in range(300):
            if await seen.count():
                break
            await ann.get_by_label("Message", exact=True).fill("/me waves")
            await ann.keyboard.press("Enter")
            await asyncio.sleep(0.2)
        assert await seen.count(), f"save {number} has not reached Bob's page"


async def test_without_a_database_a_save_keeps_what_was_being_typed(projector, browser):
    """In memory a restart forgets all accounts; the page keeps the half-typed text."""
    folder, url = await projector(in_memory=True)
    page = await sign_up(browser, url)
    await page.get_by_label("Message", exact=True).fill("half a sen")
    with (folder / "chat.py").open("a") as source:
        source.write("# saved\n")
    await page.get_by_role("button", name="Sign in").wait_for()
    await fill_in(page, url)
    assert await page.get_by_label("Message", exact=True).input_value() == "half a sen"
