"""Tests with several real processes: one room, and nothing is lost when something dies.

    python -m pytest test_faults.py

They stop, kill and freeze processes of the chat and members of a replica set, and they
do what operators do to a database, while people write.
"""

import asyncio
import contextlib
import json
import time

import aiohttp
import pymongo
import pytest
from aiohttp import WSMsgType
from bson import ObjectId

import chat
from conftest import (
    NO_MONGOD,
    ReplicaSet,
    connect,
    form,
    need,
    on,
    read,
    say,
    sign_in,
    until,
)
from workshop.mongodb import find_mongod


# --- Real parts ---
@pytest.fixture(scope="session")
def replica_set(tmp_path_factory):
    """Three real servers, one of which may die."""
    need(find_mongod(), NO_MONGOD)
    replica_set = ReplicaSet(tmp_path_factory.mktemp("replica-set"), size=3)
    yield replica_set
    replica_set.kill()


@pytest.fixture
def two(start, replica_set):
    """Two processes with the same database and key, each on a port of its own."""
    environment = {
        "MONGO_HOST": replica_set.uri,
        "MONGO_DB_NAME": f"test-{ObjectId()}",
        "SECRET_KEY": "any text",
        "MESSAGES_PER_SECOND": "1000",
        "MESSAGE_BURST": "1000",
    }
    processes = [start(**environment), start(**environment)]
    for process in processes:
        process.wait_until_ready()
        process.messages = MessagesOf(replica_set.uri, environment["MONGO_DB_NAME"])
    return processes


class MessagesOf:
    """What is stored in the end, read past the chat."""

    def __init__(self, uri, name):
        self.uri, self.name = uri, name

    def __call__(self):
        with pymongo.MongoClient(self.uri) as client:
            return list(client[self.name].messages.find().sort("_id", 1))


def kill_change_streams(uri):
    """Kill every cursor that follows changes, idle or waiting; return how many."""
    with pymongo.MongoClient(uri) as client:
        everything = {"$currentOp": {"allUsers": True, "idleCursors": True}}
        cursors = [
            operation["cursor"]["cursorId"]
            for operation in client.admin.aggregate([everything])
            if "$changeStream" in str(operation.get("cursor"))
        ]
        for cursor in cursors:
            for name in client.list_database_names():
                command = {"killCursors": "$cmd.aggregate", "cursors": [cursor]}
                client[name].command(command)
        return len(cursors)


# --- People ---
class Talker:
    """A person who writes all the time, as the page would.

    Cut off, it comes back to the next process. A message without a receipt it sends
    again. It notes each receipt, and each message once.
    """

    def __init__(self, name, *processes):
        self.name, self.urls = name, [process.url for process in processes]
        self.shown, self.receipts, self.gone = [], {}, []
        self.connections, self.refused, self.silent = 0, 0, False
        self.pending, self.due = None, 0

    async def __aenter__(self):
        jar = aiohttp.CookieJar(unsafe=True)
        self.session = await aiohttp.ClientSession(cookie_jar=jar).__aenter__()
        await self.session.post(f"{self.urls[0]}/signin", data=form(self.name))
        self.task = asyncio.create_task(self.live())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.session.close()

    @property
    def last(self):
        return self.shown[-1] if self.shown else 0

    async def live(self):
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                url = f"{self.urls[0]}/ws?after={self.last}"
                async with self.session.ws_connect(url) as ws:
                    self.connections, self.due = self.connections + 1, 0
                    await self.talk(ws)
            self.urls.append(self.urls.pop(0))
            await asyncio.sleep(0.3)

    async def talk(self, ws):
        while not ws.closed:
            if time.monotonic() > self.due and (self.pending or not self.silent):
                self.pending = self.pending or f"{self.name} {len(self.receipts)}"
                await ws.send_json(
                    {"type": "message", "text": self.pending, "nonce": self.pending}
                )
                self.due = time.monotonic() + 3
            with contextlib.suppress(asyncio.TimeoutError):
                message = await ws.receive(timeout=0.05)
                if message.type is WSMsgType.TEXT:
                    self.hear(json.loads(message.data))

    def hear(self, event):
        match event["type"]:
            case "message" if event["id"] > self.last:
                self.shown.append(event["id"])
            case "receipt" if event["nonce"] == self.pending:
                self.receipts[self.pending] = event["id"]
                self.pending, self.due = None, time.monotonic() + 0.03
            case "error":
                self.refused += 1
                self.due = time.monotonic() + 0.5
            case "left":
                self.gone.append(event["user"])

    async def has_gone_on(self, count=10):
        """Wait for that many further receipts."""
        enough = len(self.receipts) + count
        claim = lambda: self.task.done() or len(self.receipts) >= enough  # noqa: E731
        await until(claim, seconds=60)
        assert not self.task.done(), self.task


async def assert_nothing_is_lost(messages, *talkers):
    """The promise, in whole, about everything that was said so far."""
    for talker in talkers:
        talker.silent = True
    await until(lambda: not any(talker.pending for talker in talkers), seconds=60)
    stored = await asyncio.to_thread(messages)
    ids = [message["_id"] for message in stored]
    assert ids == list(range(1, len(ids) + 1))
    by_nonce = {message["nonce"]: message["_id"] for message in stored}
    assert len(by_nonce) == len(stored)
    for talker in talkers:
        assert talker.receipts.items() <= by_nonce.items()
        await until(lambda talker=talker: talker.last >= ids[-1])
        assert talker.shown == ids


# --- One room ---
async def test_two_processes_are_one_room(two):
    one, other = two
    async with Talker("ann", one) as ann, Talker("bob", other) as bob:
        await asyncio.gather(ann.has_gone_on(30), bob.has_gone_on(30))
        await assert_nothing_is_lost(one.messages, ann, bob)
        for process in two:  # a session works on both, and both know who is there
            ws = await ann.session.ws_connect(f"{process.url}/ws")
            assert (await read(ws, "welcome"))["online"] == ["ann", "bob"]
            await ws.close()
        bob.task.cancel()
        await until(lambda: ann.gone == ["bob"])
        assert ann.connections == 1


# --- A process dies ---
async def test_killed_process_loses_nothing_and_its_people_leave(two):
    """kill -9: Ann comes back through the other process; Eve does not, and leaves."""
    one, other = two
    async with (
        Talker("ann", one, other) as ann,
        Talker("bob", other) as bob,
        Talker("eve", one) as eve,
    ):
        await asyncio.gather(*(talker.has_gone_on() for talker in (ann, bob, eve)))
        one.process.kill()
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        assert (ann.connections, bob.connections) == (2, 1)
        ann.silent = bob.silent = True
        await until(lambda: bob.gone == ["eve"], seconds=120)
        assert "ann" not in bob.gone
        eve.pending, eve.shown = None, list(bob.shown)  # she has not come back
        await assert_nothing_is_lost(other.messages, ann, bob, eve)


# --- The database dies ---
async def test_killed_primary_is_a_pause(two, replica_set):
    async with Talker("ann", two[0]) as ann, Talker("bob", two[1]) as bob:
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        primary = await asyncio.to_thread(replica_set.primary)
        primary.kill()
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        assert ann.connections == bob.connections == 1  # nobody was disconnected
        await asyncio.to_thread(primary.start)
        await assert_nothing_is_lost(two[0].messages, ann, bob)


async def test_all_of_mongodb_stopped_for_20_seconds_is_a_pause(two, replica_set):
    async with Talker("ann", two[0]) as ann, Talker("bob", two[1]) as bob:
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        for member in replica_set.members:
            member.kill()
        await asyncio.sleep(20)
        assert ann.refused and bob.refused  # they were told
        for member in replica_set.members:
            await asyncio.to_thread(member.start)
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        assert ann.connections == bob.connections == 1
        await assert_nothing_is_lost(two[0].messages, ann, bob)


async def test_broken_change_stream_is_resumed(two, replica_set):
    async with Talker("ann", two[0]) as ann, Talker("bob", two[1]) as bob:
        for _ in range(3):
            await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
            assert await asyncio.to_thread(kill_change_streams, replica_set.uri) >= 1
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        await assert_nothing_is_lost(two[0].messages, ann, bob)


async def test_stream_that_can_not_be_resumed_is_opened_again(serve, mongodb, caplog):
    """The database itself is dropped: that ends a stream for good."""
    server = await serve(on(mongodb))
    ws = await connect(await sign_in(server))
    await say(ws, "before")
    with pymongo.MongoClient(mongodb) as client:
        client.drop_database(server.app[chat.SETTINGS].MONGO_DB_NAME)
    history = server.app[chat.ROOM].history
    await until(lambda: history.last_broadcast == 0)
    bob = await connect(await sign_in(server, "bob"))
    assert (await say(bob, "after"))["id"] == 1
    assert "Traceback" not in caplog.text
