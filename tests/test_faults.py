"""Tests with several real processes: one room, and nothing is lost when something dies.

    python -m pytest tests/test_faults.py

They stop, kill and freeze processes of the chat and members of a replica set, and they
do what operators do to a database, while people write. Most of the time they wait, so
more workers than processors are fine (`-n 4`).
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import pymongo
import pytest
from aiohttp import WSMsgType
from aiohttp.test_utils import unused_port
from bson import Decimal128, ObjectId
from cryptography.fernet import Fernet
from pymongo.errors import BulkWriteError
from yarl import URL

import chat
from tests.parts import (
    ROOT,
    ReplicaSet,
    can_connect,
    clean_environment,
    connect,
    form,
    freeze,
    need,
    need_mongod,
    program,
    read,
    running,
    shown_ids,
    until,
    wait_for,
)


# ==============================================================================
# Real parts: databases, processes that share one, and people
# ==============================================================================
@pytest.fixture(scope="session")
def replica_set(tmp_path_factory):
    """Three real servers, one of which may die."""
    need_mongod()
    replica_set = ReplicaSet(tmp_path_factory.mktemp("replica-set"), size=3)
    yield replica_set
    replica_set.kill()


class Place:
    """A database of its own, its operator (`db`), and the processes that share it."""

    def __init__(self, uri, run):
        self.uri, self.run, self.processes = uri, run, []
        self.client = pymongo.MongoClient(uri, tz_aware=True)
        self.db = self.client[f"test-{ObjectId()}"]

    def launch(self, **more):
        """Start a process without waiting for it."""
        environment = {
            "MONGO_HOST": self.uri,
            "MONGO_DB_NAME": self.db.name,
            "SECRET_KEY": "any text",
            "MESSAGES_PER_SECOND": "1000",
            "MESSAGE_BURST": "1000",
        }
        self.processes.append(self.run(**environment | more))
        return self.processes[-1]

    async def start(self, *settings):
        """Start a process with each of these settings, all at once; return them."""
        processes = [self.launch(**more) for more in settings]
        for process in processes:
            await asyncio.to_thread(process.wait_until_ready)
        return processes

    def messages(self):
        return list(self.db.messages.find({"nonce": {"$type": "string"}}).sort("_id"))

    def indexes(self):
        """Return the names of the unique indexes, and the seconds to an expiry."""
        kept = [
            index
            for name in ("users", "messages", "processes")
            for index in self.db[name].list_indexes()
        ]
        unique = sorted(index["name"] for index in kept if index.get("unique"))
        return unique, [i["expireAfterSeconds"] for i in kept if "seen" in i["key"]]

    def end(self):
        """Stop all that still run, and see that none has had an error."""
        self.client.close()
        for process in self.processes:
            process.process.send_signal(signal.SIGCONT)
            if process.process.returncode is None:
                _, _, errors = process.stop(signal.SIGTERM)
                assert not re.search("Traceback|CRITICAL|ERROR", errors), errors


INDEXES = ["unique email_key", "unique name_key", "unique nonce"], [45]


@pytest.fixture
async def place(start, mongodb):
    """A database on a replica set with one member."""
    place = Place(mongodb, start)
    yield place
    await asyncio.to_thread(place.end)


@pytest.fixture
async def three(start, replica_set):
    """A database on a replica set with three members."""
    place = Place(replica_set.uri, start)
    yield place
    await asyncio.to_thread(place.end)


def kill_change_streams(client):
    """Kill every cursor that follows changes, idle or waiting; return how many."""
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


class Cable:
    """A connection to a MongoDB that can be cut, for one process of several."""

    def __init__(self, uri):
        self.target = int(re.search(r":(\d+)/", uri)[1])
        self.open, self.writers, self.copies = True, set(), set()

    async def lay(self):
        self.server = await asyncio.start_server(self.carry, "127.0.0.1", 0)
        port = self.server.sockets[0].getsockname()[1]
        self.uri = f"mongodb://127.0.0.1:{port}/?directConnection=true"
        return self

    async def carry(self, reader, writer):
        if not self.open:
            return writer.close()
        far = await asyncio.open_connection("127.0.0.1", self.target)
        self.writers |= {writer, far[1]}
        for source, sink in (reader, far[1]), (far[0], writer):
            copy = asyncio.create_task(self.copy(source, sink))
            self.copies.add(copy)
            copy.add_done_callback(self.copies.discard)
        return None

    async def copy(self, source, sink):
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                sink.write(data)
        sink.close()

    def cut(self):
        self.open = False
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()

    def mend(self):
        self.open = True

    async def remove(self):
        self.cut()
        self.server.close()
        await asyncio.gather(*self.copies)


@pytest.fixture
async def cable(mongodb):
    cable = await Cable(mongodb).lay()
    yield cable
    await cable.remove()


class Person:
    """A user with one browser, which keeps cookies for all processes alike."""

    def __init__(self, name):
        self.name, self.sessions, self.headers = name, {}, {}
        self.jar = aiohttp.CookieJar(unsafe=True)  # also for an IP address

    def at(self, server):
        """Return the session that talks to a server, as a browser does."""
        if server.url not in self.sessions:
            self.sessions[server.url] = aiohttp.ClientSession(
                server.url,
                cookie_jar=self.jar,
                connector=aiohttp.TCPConnector(ssl=getattr(server, "tls", True)),
                headers={"Origin": server.url} | self.headers,
            )
        return self.sessions[server.url]

    async def close(self):
        for session in self.sessions.values():
            await session.close()

    async def sign_up(self, process):
        async with self.at(process).post("/signin", data=form(self.name)) as page:
            assert (page.status, page.url.path) == (200, "/")
        return self

    async def get(self, process, path="/"):
        """Return the status and the text of a page."""
        async with self.at(process).get(path, allow_redirects=False) as page:
            return page.status, await page.text()

    async def open(self, process, after=None):
        """Open a WebSocket that is read all the time."""
        return Window(await connect(self.at(process), after))


class Window:
    """An open WebSocket. It keeps what it has heard, as a page does."""

    def __init__(self, ws):
        self.ws, self.welcome, self.events = ws, ws.welcome, []
        self.texts = {event["id"]: event["text"] for event in ws.replayed}
        self.task = asyncio.create_task(self.listen())

    async def listen(self):
        async for frame in self.ws:
            self.events.append(event := json.loads(frame.data))
            if event["type"] == "message":
                self.texts[event["id"]] = event["text"]

    def names(self, kind):
        """Return whom it has heard of, in order, leaving out its own user."""
        names = [event["user"] for event in self.events if event["type"] == kind]
        return [name for name in names if name != self.welcome["user"]]

    async def say(self, text):
        """Send a message, wait until it is back, and return its number."""
        nonce = str(ObjectId())
        await self.ws.send_json({"type": "message", "text": text, "nonce": nonce})
        heard = {"type": "message", "nonce": nonce}
        event = await until(
            lambda: next((e for e in self.events if heard.items() <= e.items()), None)
        )
        return event["id"]

    async def ended(self):
        """Wait until the server has ended it, and return the close code."""
        await asyncio.wait_for(self.task, 20)
        return self.ws.close_code


@pytest.fixture
async def person():
    """A function that makes a person; their sessions are closed at the end."""
    people = []

    def person(name):
        people.append(Person(name))
        return people[-1]

    yield person
    for person in people:
        await person.close()


class Talker:
    """A person who writes all the time, as the page would.

    Cut off, it comes back to the next process. A message without a receipt it sends
    again. It notes each receipt, and each message once.
    """

    def __init__(self, name, *servers):
        self.name, self.person, self.servers = name, Person(name), list(servers)
        self.shown, self.receipts, self.gone = [], {}, []
        self.connections, self.refused, self.silent = 0, 0, False
        self.pending, self.due = None, 0

    async def __aenter__(self):
        await self.person.sign_up(self.servers[0])
        self.task = asyncio.create_task(self.live())
        return self

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.person.close()

    @property
    def last(self):
        return self.shown[-1] if self.shown else 0

    async def live(self):
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                session, url = self.person.at(self.servers[0]), f"/ws?after={self.last}"
                async with session.ws_connect(url) as ws:
                    self.connections, self.due = self.connections + 1, 0
                    await self.talk(ws)
            self.servers.append(self.servers.pop(0))
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


async def assert_nothing_is_lost(place, *talkers):
    """The promise, in whole, about everything that was said so far."""
    for talker in talkers:
        talker.silent = True
    await until(lambda: not any(talker.pending for talker in talkers), seconds=60)
    stored = await asyncio.to_thread(place.messages)
    ids = [message["_id"] for message in stored]
    assert ids == list(range(1, len(ids) + 1))
    by_nonce = {message["nonce"]: message["_id"] for message in stored}
    assert len(by_nonce) == len(stored)
    for talker in talkers:
        assert talker.receipts.items() <= by_nonce.items()
        await until(lambda talker=talker: talker.last >= ids[-1])
        assert talker.shown == ids


# ==============================================================================
# One room
# ==============================================================================
async def test_two_processes_are_one_room(place):
    one, other = await place.start({}, {})
    async with Talker("ann", one) as ann, Talker("bob", other) as bob:
        await asyncio.gather(ann.has_gone_on(30), bob.has_gone_on(30))
        await assert_nothing_is_lost(place, ann, bob)
        for process in one, other:  # a session works on both; both know who is there
            ws = await ann.person.at(process).ws_connect("/ws")
            assert (await read(ws, "welcome"))["online"] == ["ann", "bob"]
            await ws.close()
        bob.task.cancel()
        await until(lambda: ann.gone == ["bob"])
        assert ann.connections == 1


# ==============================================================================
# A process stops, dies, or has another clock
# ==============================================================================
async def test_stopped_process_loses_nobody_who_comes_back_in_time(place, person):
    """SIGTERM: Ann and Bob come back to the other process; Eve does not."""
    one, other = await place.start({}, {})
    zoe = await (await person("zoe").sign_up(other)).open(other)
    people = [await person(name).sign_up(one) for name in ("ann", "bob", "eve")]
    windows = [await each.open(one) for each in people]
    await until(lambda: zoe.names("joined") == ["ann", "bob", "eve"])
    one.process.send_signal(signal.SIGTERM)
    assert [await window.ended() for window in windows] == [1001] * 3
    stopped = time.monotonic()
    back = [await each.open(other) for each in people[:2]]
    in_time = time.monotonic() - stopped < chat.GRACE / 2  # or the machine is busy
    await until(lambda: "eve" in zoe.names("left"))
    if in_time:
        for window in back:
            assert window.welcome["online"] == ["ann", "bob", "eve", "zoe"]
        assert zoe.names("left") == ["eve"]
        assert zoe.names("joined") == ["ann", "bob", "eve"]
    assert await asyncio.to_thread(one.end) == (0, "".join(one.lines), "")


async def test_killed_process_loses_nothing_and_its_people_leave(place):
    """kill -9: Ann comes back through the other process; Eve does not, and leaves."""
    one, other = await place.start({}, {})
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
        await assert_nothing_is_lost(place, ann, bob, eve)


async def test_nothing_is_lost_or_doubled_by_one_restart_after_another(place):
    """SIGKILL and SIGTERM in turns, each to both processes, while people write."""
    ports = [str(unused_port()), str(unused_port())]
    processes = await place.start(*({"PORT": port} for port in ports))
    one, other = processes
    async with Talker("ann", one, other) as ann, Talker("bob", other, one) as bob:
        kill, stop = signal.SIGKILL, signal.SIGTERM
        for index, number in (0, kill), (1, stop), (0, stop), (1, kill):
            await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
            processes[index].process.send_signal(number)
            await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
            await asyncio.to_thread(processes[index].process.wait)
            [processes[index]] = await place.start({"PORT": ports[index]})
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        assert ann.connections + bob.connections >= 4
        await assert_nothing_is_lost(place, ann, bob)


# Python imports a module of this name before anything else.
SITECUSTOMIZE = """
import datetime, os, time

offset, real_time = int(os.environ["OFFSET"]), time.time
time.time = lambda: real_time() + offset

class DateTime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=offset)

datetime.datetime = DateTime
"""


async def test_only_the_clock_of_the_database_counts_for_presence(
    place, person, tmp_path
):
    """A host is a minute behind, another a minute ahead: their people do not flap."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    clocks = [{"PYTHONPATH": str(tmp_path), "OFFSET": o} for o in ("-60", "60")]
    right, late, early = await place.start({}, *clocks)
    zoe = await (await person("zoe").sign_up(right)).open(right)
    await (await person("ann").sign_up(late)).open(late)
    await (await person("bob").sign_up(early)).open(early)
    await until(lambda: sorted(zoe.names("joined")) == ["ann", "bob"])
    passes = lambda: (  # noqa: E731
        place.client.admin.command("serverStatus")["metrics"]["ttl"]["passes"]
    )
    enough = passes() + 2  # looks of MongoDB for what has expired
    await until(lambda: passes() >= enough)
    await asyncio.sleep(chat.GRACE + 1)
    assert (len(zoe.names("joined")), zoe.names("left")) == (2, [])
    newest = place.db.processes.find_one({"names": ["ann"]})["seen"]
    assert abs((datetime.now(UTC) - newest).total_seconds()) < 30


DAMAGES = {
    "removed": lambda processes, mine: processes.delete_one(mine),
    "late": lambda processes, mine: processes.update_one(mine, {"$set": {"names": []}}),
    "foreign": lambda processes, mine: processes.replace_one(mine, {"names": 5}),
    "dropped": lambda processes, mine: processes.drop(),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_presence_that_was_damaged_is_written_again(place, person, damage):
    """Also by a write of our own that timed out and lands late."""
    one, other = await place.start({}, {})
    ann, bob = await person("ann").sign_up(one), await person("bob").sign_up(other)
    await ann.open(one)
    bobs = await bob.open(other)
    entry = await until(lambda: place.db.processes.find_one({"names": ["ann"]}))
    await until(lambda: "ann" in bobs.welcome["online"] + bobs.names("joined"))
    bobs.events.clear()
    DAMAGES[damage](place.db.processes, {"_id": entry["_id"]})
    damaged = time.monotonic()
    again = {"_id": entry["_id"], "names": ["ann"]}
    await until(lambda: place.db.processes.find_one(again), seconds=10)
    in_time = time.monotonic() - damaged < chat.GRACE - 0.5  # or the machine is busy
    await asyncio.sleep(chat.GRACE + 1)
    if in_time:
        assert (bobs.names("left"), bobs.names("joined")) == ([], [])
    assert (await ann.open(other)).welcome["online"] == ["ann", "bob"]
    assert place.indexes() == INDEXES


# ==============================================================================
# The database dies
# ==============================================================================
async def test_killed_primary_is_a_pause(three, replica_set):
    one, other = await three.start({}, {})
    async with Talker("ann", one) as ann, Talker("bob", other) as bob:
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        primary = await asyncio.to_thread(replica_set.primary)
        primary.kill()
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        assert ann.connections == bob.connections == 1  # nobody was disconnected
        await asyncio.to_thread(primary.start)
        await assert_nothing_is_lost(three, ann, bob)


async def test_all_of_mongodb_stopped_for_20_seconds_is_a_pause(three, replica_set):
    one, other = await three.start({}, {})
    async with Talker("ann", one) as ann, Talker("bob", other) as bob:
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        for member in replica_set.members:
            member.kill()
        await asyncio.sleep(20)
        assert ann.refused and bob.refused  # they were told
        for member in replica_set.members:
            await asyncio.to_thread(member.start)
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        assert ann.connections == bob.connections == 1
        await assert_nothing_is_lost(three, ann, bob)


async def test_broken_change_stream_is_resumed(three):
    one, other = await three.start({}, {})
    async with Talker("ann", one) as ann, Talker("bob", other) as bob:
        for _ in range(3):
            await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
            assert await asyncio.to_thread(kill_change_streams, three.client) >= 1
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        await assert_nothing_is_lost(three, ann, bob)


# ==============================================================================
# What operators do to a database
# ==============================================================================
OUTAGES = ["connected", "frozen", "stream killed", "cut off"]


@contextlib.asynccontextmanager
async def away(outage, place, process, cable):
    """Keep a process from hearing of changes for a while, in one of several ways."""
    match outage:
        case "connected":
            yield
        case "frozen":
            freeze(process.process)
            yield
            process.process.send_signal(signal.SIGCONT)
        case "stream killed":
            kill_change_streams(place.client)
            yield
            kill_change_streams(place.client)
        case "cut off":
            cable.cut()
            yield
            await asyncio.sleep(4)  # the driver tries for 3 seconds to go on
            cable.mend()


@pytest.mark.parametrize("outage", OUTAGES)
async def test_blanked_message_is_blank_everywhere(cable, place, person, outage):
    """An operator takes a message back, while the other process may be away."""
    one, other = await place.start({}, {"MONGO_HOST": cable.uri})
    ann, bob = await person("ann").sign_up(one), await person("bob").sign_up(other)
    windows = [await ann.open(one), await bob.open(other)]
    for text in "sesame", "fine":
        await windows[0].say(text)
    await until(lambda: all(window.texts.get(2) == "fine" for window in windows))
    async with away(outage, place, other, cable):
        place.db.messages.update_one({"_id": 1}, {"$set": {"text": ""}})
        await until(lambda: windows[0].texts == {1: "", 2: "fine"})
    await until(lambda: windows[1].texts == {1: "", 2: "fine"})
    for process in one, other:
        status, page = await ann.get(process)
        assert (status, shown_ids(page), "sesame" in page) == (200, [1, 2], False)
        assert (await bob.open(process, after=0)).texts == {1: "", 2: "fine"}
        late = await bob.open(process, after=2)  # it may still show what it had
        assert late.texts == {1: ""}
    assert await windows[1].say("on we go") == 3


@pytest.mark.parametrize("outage", OUTAGES)
async def test_deleted_account_is_out_everywhere(cable, place, person, outage):
    """An operator deletes an account, while the other process may be away."""
    one, other = await place.start({}, {"MONGO_HOST": cable.uri})
    ann, bob = await person("ann").sign_up(one), await person("bob").sign_up(other)
    windows = [await ann.open(one), await ann.open(other)]
    bobs = await bob.open(other)
    await until(lambda: "ann" in bobs.welcome["online"] + bobs.names("joined"))
    async with away(outage, place, other, cable):
        place.db.users.delete_one({"name": "ann"})
        assert await windows[0].ended() == 1008
    assert await windows[1].ended() == 1008
    for process in one, other:
        for path in "/", "/ws":
            assert (await ann.get(process, path))[0] == 303
    await until(lambda: bobs.names("left") == ["ann"])
    assert not bobs.ws.closed
    assert await bobs.say("on we go") == 1


FOREIGN = [
    {},
    {"_id": None},
    {"_id": True},
    {"_id": "a text"},
    {"_id": {"a": "document"}},
    {"_id": 2.5},
    {"_id": -1},
    {"_id": Decimal128("2.7")},
    {"_id": 3.0, "text": "in the place of 3"},
    {"_id": 4},
    {"_id": 5, "user": 1, "text": [], "time": "now", "nonce": "n"},
]


async def test_foreign_documents_are_passed_over_before_and_after_a_start(
    place, person
):
    one, other = await place.start({}, {})
    ann, bob = await person("ann").sign_up(one), await person("bob").sign_up(other)
    windows = [await ann.open(one), await bob.open(other)]
    assert [await windows[0].say("one"), await windows[1].say("two")] == [1, 2]
    for collection in place.db.messages, place.db.processes:
        collection.insert_many([dict(document) for document in FOREIGN])
    place.db.users.insert_many([dict(document) for document in FOREIGN[3:]])
    place.db.processes.insert_one({"_id": ObjectId(), "names": ["eve", 5]})
    assert [await windows[0].say("six"), await windows[1].say("seven")] == [6, 7]
    kept = {1: "one", 2: "two", 3: "", 4: "", 5: "", 6: "six", 7: "seven"}
    for _ in "before", "after":
        for window in windows:
            await until(lambda window=window: window.texts == kept)
        for process in one, other:
            assert (await ann.open(process, after=0)).texts == kept
            assert shown_ids((await ann.get(process))[1]) == list(kept)
        for process in one, other:
            code, _, errors = await asyncio.to_thread(process.stop, signal.SIGTERM)
            assert (code, "Traceback" in errors) == (0, False)
            assert errors.count("Passed over a foreign document") == 1
        one, other = await place.start({}, {})
        windows = [await ann.open(one, after=0), await bob.open(other, after=0)]
    assert await windows[0].say("eight") == 8
    await until(lambda: windows[1].texts == kept | {8: "eight"})


async def test_dropped_database_is_a_new_room_with_its_indexes(place, person):
    one, other = await place.start({}, {})
    ann, bob = await person("ann").sign_up(one), await person("bob").sign_up(other)
    windows = [await ann.open(one), await bob.open(other)]
    for text in "one", "two", "three":
        await windows[0].say(text)
    await until(lambda: len(windows[1].texts) == 3)
    place.client.drop_database(place.db)
    assert [await window.ended() for window in windows] == [1008, 1008]
    await until(lambda: place.indexes() == INDEXES)
    ann, bob = await person("ann").sign_up(one), await person("bob").sign_up(other)
    windows = [await ann.open(one), await bob.open(other)]
    assert [await windows[0].say("new"), await windows[1].say("room")] == [1, 2]
    for window in windows:
        await until(lambda window=window: window.texts == {1: "new", 2: "room"})
    assert place.indexes() == INDEXES


async def test_dropped_messages_are_a_new_history_while_people_write(place, person):
    one, other = await place.start({}, {})
    async with Talker("ann", one) as ann, Talker("bob", other) as bob:
        for _ in range(3):
            await asyncio.gather(ann.has_gone_on(20), bob.has_gone_on(20))
            await asyncio.to_thread(place.db.messages.drop)
        await asyncio.gather(ann.has_gone_on(), bob.has_gone_on())
        ann.silent = bob.silent = True
        await until(lambda: not (ann.pending or bob.pending))
        assert ann.connections == bob.connections == 1
    stored = {message["_id"]: message["text"] for message in place.messages()}
    eve = await person("eve").sign_up(one)
    for process in one, other:
        window = await eve.open(process, after=0)
        await until(lambda window=window: stored.items() <= window.texts.items())
        texts = (await eve.open(process, after=0)).texts  # a gap is shown as removed
        assert {number: text for number, text in texts.items() if text} == stored
        assert list(texts) == list(range(min(texts), max(texts) + 1))
    assert place.indexes() == INDEXES


def drop_and_insert(db, name, documents, indexes):
    """`mongorestore --drop`: it skips what is there again, and indexes come last."""
    db.drop_collection(name)
    with contextlib.suppress(BulkWriteError):
        db[name].insert_many(documents, ordered=False)
    for index in indexes:
        options = {key: index[key] for key in index if key not in ("key", "v")}
        db[name].create_index(list(index["key"].items()), **options)


def rename_over(db, name, documents, indexes):
    """Make everything beside the old collection, then put it in its place."""
    drop_and_insert(db, "restored", documents, indexes)
    db["restored"].rename(name, dropTarget=True)


@pytest.mark.parametrize("restore", [drop_and_insert, rename_over])
async def test_restored_database_is_the_room_that_it_was(place, person, restore):
    """Restored while people are there: what was said after the dump is gone."""
    one, other = await place.start({}, {})
    ann, bob = await person("ann").sign_up(one), await person("bob").sign_up(other)
    windows = [await ann.open(one), await bob.open(other)]
    for text in "one", "two", "three":
        await windows[0].say(text)
    names = "messages", "processes", "users"
    dump = [(place.db[name].find(), place.db[name].list_indexes()) for name in names]
    dump = [(list(documents), list(indexes)) for documents, indexes in dump]
    assert await windows[1].say("not in the dump") == 4
    for name, (documents, indexes) in zip(names, dump, strict=True):
        await asyncio.to_thread(restore, place.db, name, documents, indexes)
    windows = [await come_back(ann, one), await come_back(bob, other)]
    await until(lambda: place.indexes() == INDEXES)
    assert [await windows[0].say("four"), await windows[1].say("five")] == [4, 5]
    kept = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
    assert {m["_id"]: m["text"] for m in place.messages()} == kept
    for process in one, other:
        assert (await ann.open(process, after=0)).texts == kept
    assert place.indexes() == INDEXES


async def come_back(person, process):
    """Open a window as the page does: try again until it opens."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(aiohttp.WSServerHandshakeError):
            return await person.open(process, after=0)
        await asyncio.sleep(0.3)
    raise AssertionError(f"{person.name} could not come back")


# ==============================================================================
# A database of the first edition
# ==============================================================================
def write_first_edition(db):
    """Write a database exactly as the first edition of the chat wrote it."""
    db.users.create_index("name_key", unique=True)
    db.users.create_index("email_key", unique=True, sparse=True)
    db.messages.create_index([("user_id", 1), ("nonce", 1)], unique=True)
    db.online.create_index("seen", expireAfterSeconds=45)
    ann = {"_id": ObjectId(), "name": "Ann", "name_key": "ann"}
    ann |= {"email": "Ann@example.org", "email_key": "ann@example.org"}
    bob = {"_id": ObjectId(), "name": "bob", "name_key": "bob"}
    for user in ann, bob:
        user["password"] = FIRST_HASH
        db.users.insert_one(user)
    for number, user, text in (1, ann, "old"), (2, bob, "times"):
        message = {"_id": number, "user_id": user["_id"], "user": user["name"]}
        message |= {"text": text, "time": datetime.now(UTC), "nonce": f"n-{number}"}
        db.messages.insert_one(message)
    eve = {"_id": ObjectId(), "user": "eve", "process": ObjectId()}
    db.online.insert_one(eve | {"seen": datetime.now(UTC)})
    return ann


FIRST_HASH = (
    "$argon2id$v=19$m=19456,t=2,p=1$AusiMlHe6zJsfFWKaUVGFg"
    "$zKVbuWJwj63pvl3fxljw1OURWLOFqwY2R0pT1MDx+yY"
)


def first_session(user):
    """Make the cookie of a session as the first edition did."""
    key = base64.urlsafe_b64encode(hashlib.sha256(b"any text").digest())
    content = {"created": int(time.time()), "session": {"user": str(user["_id"])}}
    value = Fernet(key).encrypt(json.dumps(content).encode())
    return {"AIOHTTP_SESSION": value.decode()}


async def test_database_of_the_first_edition_goes_on(place, person):
    user = write_first_edition(place.db)
    [process] = await place.start({})
    names = [index["name"] for index in place.db.users.list_indexes()]
    assert (place.indexes(), "name_key_1" in names) == (INDEXES, False)
    ann = person("Ann")  # with the cookie that she had
    ann.jar.update_cookies(first_session(user), URL(process.url))
    window = await ann.open(process, after=0)
    assert window.welcome["online"] == ["Ann"]
    assert window.texts == {1: "old", 2: "times"}
    event = {"type": "message", "text": "old", "nonce": "n-1"}
    await window.ws.send_json(event)
    receipt = {"type": "receipt", "nonce": "n-1", "id": 1}
    await until(lambda: receipt in window.events)
    assert await window.say("new") == 3
    for login in "ann", "ANN", "ann@Example.org", "bob":
        async with person(login).at(process).post("/login", data=form(login)) as page:
            assert (page.status, page.url.path) == (200, "/")
            assert shown_ids(await page.text()) == [1, 2, 3]
    data = form("ANN", password="battery staple", password2="battery staple")
    async with person("ANN").at(process).post("/signin", data=data) as page:
        assert (page.status, "has this already" in await page.text()) == (422, True)


# ==============================================================================
# Behind a proxy, in a container, beside other applications
# ==============================================================================
class Proxy:
    """Debian's nginx in front of two processes, with the lines of docs/nginx.conf."""

    def __init__(self, folder):
        self.port, self.ports = unused_port(), (unused_port(), unused_port())
        self.url, self.folder = f"https://localhost:{self.port}", folder
        self.certificate, self.key = folder / "certificate.pem", folder / "key.pem"
        command = "openssl req -x509 -nodes -days 2 -subj /CN=localhost"
        command += " -newkey ec -pkeyopt ec_paramgen_curve:prime256v1"
        command += " -addext subjectAltName=DNS:localhost"
        paths = ["-out", self.certificate, "-keyout", self.key]
        subprocess.run([*command.split(), *paths], check=True, capture_output=True)
        self.tls = ssl.create_default_context(cafile=self.certificate)

    def configure(self, more):
        """Write the configuration: docs/nginx.conf with names of this machine."""
        text = (ROOT / "docs/nginx.conf").read_text()
        for old, new in {
            "127.0.0.1:8081": f"127.0.0.1:{self.ports[0]}",
            "127.0.0.1:8082": f"127.0.0.1:{self.ports[1]}",
            "443 ssl http2": f"127.0.0.1:{self.port} ssl http2",
            "server_name chat.example": "server_name localhost",
            "/etc/ssl/certs/chat.example.pem": str(self.certificate),
            "/etc/ssl/private/chat.example.key": str(self.key),
            "proxy_pass http://chat;": f"proxy_pass http://chat; {more}",
        }.items():
            assert text.count(old) == 1, f"docs/nginx.conf has no {old!r}"
            text = text.replace(old, new)
        (self.folder / "chat.conf").write_text(text)
        (self.folder / "nginx.conf").write_text(NGINX)

    async def start(self, place):
        """Start a process for each port; return them."""
        ports = [{"PORT": str(port), "ORIGIN": self.url} for port in self.ports]
        return await place.start(*ports)


NGINX = """
daemon off; error_log stderr; pid nginx.pid;
events {}
http {
    access_log off; proxy_temp_path proxy; client_body_temp_path body;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    include chat.conf;
}
"""


@pytest.fixture
def proxy(request, tmp_path):
    nginx, proxy = program("nginx"), Proxy(tmp_path)
    proxy.configure(getattr(request, "param", ""))
    with running(nginx, "-p", tmp_path, "-c", "nginx.conf", "-e", "stderr"):
        wait_for(lambda: can_connect(proxy.port))
        yield proxy


HOSTS = {
    "left to nginx": "",
    "passed on": "proxy_set_header Host $http_host;",
    "rewritten": "proxy_set_header Host inner.example:99;"
    "proxy_set_header X-Forwarded-Host 'a.example, b.example';",
}


@pytest.mark.parametrize("proxy", HOSTS.values(), ids=HOSTS, indirect=True)
async def test_two_people_chat_through_a_proxy_whatever_it_does_with_host(
    place, proxy, person
):
    one, other = await proxy.start(place)
    people = [await person(name).sign_up(proxy) for name in ("ann", "bob")]
    windows = [await people[n % 2].open(proxy) for n in range(4)]
    used = {"names": {"$ne": []}}  # both processes
    await until(lambda: place.db.processes.count_documents(used) == 2)
    for number, window in enumerate(windows, 1):
        assert await window.say(f"text {number}") == number
    for window in windows:
        await until(lambda window=window: list(window.texts) == [1, 2, 3, 4])
    assert all(cookie["secure"] for cookie in people[0].jar)
    foreign = {"Origin": f"https://evil.example:{proxy.port}"}
    for path in "/login", "/ws", "/login":
        method = "GET" if path == "/ws" else "POST"
        async with people[0].at(proxy).request(method, path, headers=foreign) as answer:
            assert answer.status == 403
    for process in one, other:
        _, _, errors = await asyncio.to_thread(process.stop, signal.SIGTERM)
        line = (
            f"Origin '{foreign['Origin']}' is not '{proxy.url}'; see the setting ORIGIN"
        )
        assert errors.count(line) == errors.count("Origin") == 1


async def test_restart_of_one_process_after_another_loses_nothing_behind_a_proxy(
    place, proxy
):
    """Who is cut off is connected again at once, through the other process."""
    processes = await proxy.start(place)
    async with contextlib.AsyncExitStack() as stack:
        people = [
            await stack.enter_async_context(Talker(name, proxy))
            for name in ("ann", "bob", "eve", "zoe")
        ]
        await asyncio.gather(*(talker.has_gone_on() for talker in people))
        assert [talker.connections for talker in people] == [1] * 4
        for index, port in enumerate(proxy.ports):
            await asyncio.to_thread(processes[index].stop, signal.SIGTERM)
            await asyncio.gather(*(talker.has_gone_on() for talker in people))
            settings = {"PORT": str(port), "ORIGIN": proxy.url}
            [processes[index]] = await place.start(settings)
        await asyncio.gather(*(talker.has_gone_on() for talker in people))
        assert [talker.gone for talker in people] == [[]] * 4
        await assert_nothing_is_lost(place, *people)


async def test_page_behind_a_proxy_is_connected_again_through_the_other_process(
    place, proxy, browser
):
    """HTTP/2 in a real browser; the page says "connecting" and never "offline"."""
    processes = await proxy.start(place)
    async with await browser.new_context(ignore_https_errors=True) as context:
        page = await context.new_page()
        await page.goto(f"{proxy.url}/signin")
        assert await page.evaluate(PROTOCOL) == "h2"
        for name, value in form("ann").items():
            await page.fill(f"[name={name}]", value)
        await page.click("main button")
        await page.wait_for_selector("[data-status=online]")
        await page.evaluate(OBSERVE)
        for index, port in enumerate(proxy.ports):
            await asyncio.to_thread(processes[index].stop, signal.SIGTERM)
            await page.fill("#text", f"text {index}")
            await page.press("#text", "Enter")
            await page.wait_for_selector(f"[data-id='{index + 1}']:not(.pending)")
            settings = {"PORT": str(port), "ORIGIN": proxy.url}
            [processes[index]] = await place.start(settings)
        said = await page.evaluate("said")
        assert said in (["connecting", "online"], 2 * ["connecting", "online"])
        assert await page.locator("#messages p").all_inner_texts() == [
            "text 0",
            "text 1",
        ]


PROTOCOL = "performance.getEntriesByType('navigation')[0].nextHopProtocol"
# Note what the page says of its connection from now on.
OBSERVE = """() => {
  const status = document.querySelector("#status");
  window.said = [];
  new MutationObserver(() => window.said.push(status.dataset.status))
    .observe(status, { attributeFilter: ["data-status"] });
}"""


async def test_chat_in_a_container_is_heard_at_once_and_stops_at_sigterm():
    """As process 1, which no signal ends by default; its output is a pipe."""
    need(can_unshare(), "no new PID namespace: needs Linux's unshare, and root")
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable]
    environment = clean_environment() | {"HOST": "0.0.0.0", "PORT": "0"}
    environment.pop("PYTHONUNBUFFERED", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with running(*command, ROOT / "chat.py", env=environment, **pipes) as container:
        try:
            said = ""
            while "From other machines: http://" not in said:
                line = asyncio.to_thread(container.stdout.readline)
                said += await asyncio.wait_for(line, 20) or pytest.fail(said)
            os.kill(child_of(container.pid), signal.SIGTERM)
            assert await asyncio.to_thread(container.wait, 20) == 0
            assert container.stderr.read() == ""
        finally:
            container.kill()  # with its child, or nothing here would ever end


def can_unshare():
    command = ["unshare", "--pid", "--fork", "true"]
    return shutil.which("unshare") and subprocess.run(command).returncode == 0


def child_of(process_id):
    [child] = Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()
    return int(child)


async def test_chats_on_one_host_name_leave_each_others_sessions_alone(start, person):
    """Cookies know no port: a second chat, and a dozen other applications."""
    one, other = start().wait_until_ready(), start().wait_until_ready()
    ann, foreign = person("ann"), (f"application-{n}={'x' * 700}" for n in range(12))
    ann.headers["Cookie"] = "; ".join(foreign)
    await (await ann.sign_up(one)).sign_up(other)
    for process in one, other:
        assert (await ann.get(process))[0] == 200
        assert await (await ann.open(process)).say("hello") == 1
