"""The fixtures of all tests; what they are made of is in tests/parts.py."""

import contextlib

import pytest
import pytest_asyncio
from aiohttp.test_utils import TestClient

import chat
from tests import parts


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    """Keep your own settings, and the log lines of the test before, out of a test."""
    for name in chat.Settings.model_fields:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(chat.Settings.model_config, "env_file", None)
    chat.logged.clear()


# --- The chat ---
@pytest.fixture(params=["in memory", "on MongoDB"])
def settings(request):
    """The default settings, for each of the two databases in turn."""
    if request.param == "in memory":
        return chat.Settings()
    return parts.on(request.getfixturevalue("mongodb"))


@pytest.fixture
async def serve():
    """A function that serves the chat in this process; all are closed at the end."""
    async with contextlib.AsyncExitStack() as stack:

        async def serve(settings):
            server = parts.Server(chat.init_app(settings))
            await stack.enter_async_context(server)
            server.visitor = lambda: stack.enter_async_context(TestClient(server))
            return server

        yield serve


@pytest.fixture
async def server(serve, settings):
    return await serve(settings)


@pytest.fixture
def start():
    """A function that starts the chat as a process; all are killed at the end."""
    processes = []

    def start(*script, **environment):
        processes.append(parts.Process(*script, **environment))
        return processes[-1]

    yield start
    for process in processes:
        process.process.kill()
        process.process.communicate()


# --- MongoDB ---
@pytest.fixture(scope="session")
def mongodb(tmp_path_factory):
    """The URI of a replica set with one member."""
    replica_set = parts.ReplicaSet(tmp_path_factory.mktemp("mongodb"), size=1)
    yield replica_set.uri
    replica_set.kill()


@pytest.fixture
def own_mongodb(tmp_path, monkeypatch):
    """A server for one test, which may freeze or kill it; the chat waits 2 s for it."""
    monkeypatch.setattr(chat, "DEADLINE", 2)
    for name in "timeoutMS", "serverSelectionTimeoutMS":
        shorter = min(chat.CLIENT_OPTIONS[name], 2_000)
        monkeypatch.setitem(chat.CLIENT_OPTIONS, name, shorter)
    replica_set = parts.ReplicaSet(tmp_path, size=1)
    yield replica_set.members[0]
    replica_set.kill()


@pytest.fixture
def standalone(tmp_path):
    """A server that is no member of a replica set."""
    mongod = parts.Mongod(tmp_path / "standalone")
    yield mongod
    mongod.kill()


# --- Browsers ---
def shared(function):
    """A fixture that each of pytest's workers makes once, for all of its tests."""
    return pytest_asyncio.fixture(scope="session", loop_scope="session")(function)


@pytest.fixture
async def browser():
    """Chromium for one test, driven by Playwright."""
    async with parts.launch_chromium() as browser:
        yield browser


@shared
async def chromium():
    async with parts.launch_chromium() as browser:
        yield browser


@shared
async def firefox(tmp_path_factory):
    async with parts.launch_firefox(tmp_path_factory.mktemp("firefox")) as browser:
        yield browser


@shared
async def webkit():
    async with parts.launch_webkit() as browser:
        yield browser
