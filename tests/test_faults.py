"""Tests with several real processes: one room, and nothing is lost when something dies.

They stop, kill and freeze processes of the chat and members of a replica set, and do
what operators do to a database, while people write. Mostly they wait: use `-n 4`.
"""

import asyncio
import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import aiohttp
import pymongo
import pytest
from aiohttp.test_utils import unused_port
from bson import Decimal128, ObjectId
from cryptography.fernet import Fernet
from pymongo.errors import BulkWriteError

import chat
from tests import parts
from tests.parts import KEY, ROOT, connect, form, send_only, shown_ids, until


# --- Real parts: databases, processes that share one, and people ---
@pytest.fixture(scope="session")
def replica_set(tmp_path_factory):
    """Three real servers, one of which may die."""
    replica_set = parts.ReplicaSet(tmp_path_factory.mktemp("replica-set"), size=3)
    yield replica_set
    replica_set.kill()


class Place:
    """A database of its own, its operator (`db`), and the processes that share it."""

    def __init__(self, uri, run):
        self.uri, self.run, self.processes = uri, run, []
        self.client = pymongo.MongoClient(uri, tz_aware=True)
        self.db = self.client[f"test-{ObjectId()}"]
        database = {"MONGO_HOST": uri, "MONGO_DB_NAME": self.db.name}
        limits = {"MESSAGES_PER_SECOND": "1000", "MESSAGE_BURST": "1000"}
        self.settings = database | limits | {"SECRET_KEY": KEY}

    async def start(self, *settings):
        """Start a process with each of these settings, all at once; return them."""
        processes = [self.run(**self.settings | more) for more in settings]
        self.processes += processes
        for process in processes:
            await asyncio.to_thread(process.wait_until_ready)
        return processes

    def indexes(self):
        collections = self.db.users, self.db.messages, self.db.processes
        return {index["name"] for one in collections for index in one.list_indexes()}

    def end(self):
        """Stop all that still run, and see that none has had an error."""
        self.client.close()
        for process in self.processes:
            process.process.send_signal(signal.SIGCONT)
            if process.process.returncode is None:
                _, _, errors = process.stop(signal.SIGTERM)
                assert not re.search("Traceback|CRITICAL|ERROR", errors), errors


INDEXES = {"_id_", "unique email_key", "unique name_key", "unique nonce", "seen_1"}


@pytest.fixture
async def place(start, mongodb):
    """A database on a replica set with one member."""
    place = Place(mongodb, start)
    yield place
    await asyncio.to_thread(place.end)


# Pass on what two sides send each other. Arguments: our port, and MongoDB's.
CABLE = """
import asyncio, sys

async def copy(reader, writer):
    while data := await reader.read(65_536):
        writer.write(data)
    writer.close()

async def carry(reader, writer):
    far = await asyncio.open_connection("127.0.0.1", sys.argv[2])
    await asyncio.gather(copy(reader, far[1]), copy(far[0], writer))

loop = asyncio.new_event_loop()
loop.run_until_complete(asyncio.start_server(carry, "127.0.0.1", sys.argv[1]))
loop.run_forever()
"""


@pytest.fixture
def cable(mongodb):
    """The connection of one process to MongoDB. Freeze it, and nothing passes."""
    ports = str(unused_port()), re.search(r":(\d+)/", mongodb)[1]
    with parts.running(sys.executable, "-c", CABLE, *ports) as process:
        process.uri = f"mongodb://127.0.0.1:{ports[0]}/?directConnection=true"
        yield process
        process.send_signal(signal.SIGCONT)  # a frozen one does not end


class Person:
    """A user with one browser, which keeps cookies for all processes alike."""

    def __init__(self, name, address="127.0.0.1"):
        self.name, self.address = name, address
        self.jar = aiohttp.CookieJar(unsafe=True)  # also for an IP address
        self.sessions, self.tasks = {}, []

    def at(self, server):
        """Return the session that talks to a server, as a browser does."""
        if server.url not in self.sessions:
            self.sessions[server.url] = aiohttp.ClientSession(
                server.url,
                cookie_jar=self.jar,
                connector=aiohttp.TCPConnector(ssl=False, local_addr=(self.address, 0)),
                headers={"Origin": server.url},
            )
        return self.sessions[server.url]

    async def sign_up(self, server):
        status = 503  # "too many people are signing in": on a busy machine
        while status == 503:
            async with self.at(server).post("/signin", data=form(self.name)) as page:
                status, path = page.status, page.url.path
        assert (status, path) == (200, "/")
        return self

    async def get(self, server, path="/", **more):
        async with self.at(server).get(path, allow_redirects=False, **more) as page:
            return page.status, await page.text()

    async def open(self, server, after=None):
        """Open a WebSocket that is read all the time."""
        return Window(await connect(self.at(server), after))


class Window:
    """An open WebSocket. It keeps what it has heard, as a page does."""

    def __init__(self, ws):
        self.ws, self.welcome, self.events = ws, ws.welcome, list(ws.replayed)
        self.receipts = {}  # numbers by nonce
        self.task = asyncio.create_task(self.listen())

    async def listen(self):
        async for frame in self.ws:
            self.events.append(event := json.loads(frame.data))
            if event["type"] == "receipt":
                self.receipts[event["nonce"]] = event["id"]

    def heard(self, kind):
        return [event for event in self.events if event["type"] == kind]

    @property
    def texts(self):
        return {event["id"]: event["text"] for event in self.heard("message")}

    def names(self, kind):
        """Return the users in events of this kind, in order, without its own user."""
        names = [event["user"] for event in self.heard(kind)]
        return [name for name in names if name != self.welcome["user"]]

    async def sees(self, name):
        """Wait until a user is online, as far as this window knows."""
        await until(lambda: name in self.welcome["online"] + self.names("joined"))

    async def say(self, text):
        """Send a message, wait until it is back, and return its number."""
        nonce = str(ObjectId())
        await send_only(self.ws, text, nonce)
        await until(lambda: self.receipts.get(nonce) in self.texts)
        return self.receipts[nonce]

    async def ended(self):
        """Wait until the server has ended it, and return the close code."""
        await asyncio.wait_for(self.task, 20)
        return self.ws.close_code


@pytest.fixture
async def person():
    """A function that makes a person; what they do ends with the test."""
    people = []

    def person(name, **more):
        people.append(Person(name, **more))
        return people[-1]

    yield person
    for each in people:
        for task in each.tasks:
            task.cancel()
        for session in each.sessions.values():
            await session.close()


async def meet(person, one, other):
    """Let Ann sign up at one process and Bob at the other, with a window each."""
    ann, bob = await person("ann").sign_up(one), await person("bob").sign_up(other)
    return ann, bob, [await ann.open(one), await bob.open(other)]


class Talker:
    """A person who signs up and writes all the time, as the page would.

    Cut off, it comes back to the next process. Without a receipt, it sends again.
    """

    def __init__(self, person, *servers):
        self.person, self.servers, self.windows = person, list(servers), []
        self.silent, self.pending = False, None
        self.task = asyncio.create_task(self.live())
        person.tasks.append(self.task)

    @property
    def shown(self):
        """Return the numbers of all messages that it has seen, in order."""
        return [e["id"] for window in self.windows for e in window.heard("message")]

    @property
    def receipts(self):
        return dict(pair for w in self.windows for pair in w.receipts.items())

    @property
    def gone(self):
        return [name for window in self.windows for name in window.names("left")]

    async def live(self):
        await self.person.sign_up(self.servers[0])
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                last = max(self.shown, default=0)
                window = await self.person.open(self.servers[0], last)
                self.windows.append(window)
                while not window.task.done():
                    await self.talk(window)
            self.servers.append(self.servers.pop(0))
            await asyncio.sleep(0.3)

    async def talk(self, window):
        """Send one message, and wait 3 seconds for the receipt."""
        await asyncio.sleep(0.03)
        if self.silent and not self.pending:
            return
        new = f"{self.person.name} {len(self.receipts)}"
        nonce = self.pending = self.pending or new
        await send_only(window.ws, nonce, nonce)
        with contextlib.suppress(AssertionError):
            await until(lambda: window.task.done() or nonce in window.receipts, 3)
        if nonce in window.receipts:
            self.pending = None


async def go_on(*talkers, count=10):
    """Wait until each talker has that many further receipts."""
    enough = {talker: len(talker.receipts) + count for talker in talkers}

    def all_have():
        for talker in talkers:
            if talker.task.done():
                talker.task.result()  # raises what ended it
        return all(len(talker.receipts) >= enough[talker] for talker in talkers)

    await until(all_have, seconds=60)


async def assert_nothing_is_lost(place, *talkers):
    """The promise, in whole, about everything that was said so far."""
    for talker in talkers:
        talker.silent = True
    await until(lambda: not any(talker.pending for talker in talkers), seconds=60)
    stored = list(place.db.messages.find().sort("_id"))
    ids = [message["_id"] for message in stored]
    assert ids == list(range(1, len(ids) + 1))
    by_nonce = {message["nonce"]: message["_id"] for message in stored}
    assert len(by_nonce) == len(stored)
    for talker in talkers:
        assert talker.receipts.items() <= by_nonce.items()
        await until(lambda talker=talker: talker.shown[-1] >= ids[-1])
        assert talker.shown == ids


# --- One room ---
async def test_two_processes_are_one_room(place, person):
    one, other = await place.start({}, {})
    ann, bob = Talker(person("ann"), one), Talker(person("bob"), other)
    await go_on(ann, bob, count=30)
    await assert_nothing_is_lost(place, ann, bob)
    for process in one, other:  # a session works on both; both know who is there
        assert (await ann.person.open(process)).welcome["online"] == ["ann", "bob"]


async def test_no_message_falls_between_opening_the_stream_and_reading(
    place, serve, person, monkeypatch, caplog
):
    """Streams open, while another program writes some hundred messages a second.

    A reader would see a lost message late, when the next one shows the gap. So the log
    must not tell of a gap, either. It leaves out no line here.
    """
    monkeypatch.setattr(chat, "logged", MagicMock(get=lambda line, default: default))
    numbers, enough = itertools.count(1), asyncio.Event()
    ann, windows = person("ann"), []

    def write():
        eve = {"user_id": ObjectId(), "user": "eve", "text": "hello"}
        while not enough.is_set():
            number, now = next(numbers), datetime.now(UTC)
            message = {"_id": number, "time": now, "nonce": f"eve {number}"}
            place.db.messages.insert_one(message | eve)

    written = asyncio.create_task(asyncio.to_thread(write))
    for _ in range(4):
        server = await serve(chat.Settings(**place.settings))
        server.url = str(server.make_url(""))
        if not windows:
            await ann.sign_up(server)
        windows.append(await ann.open(server, after=0))
    for _ in range(20):  # a drop ends the stream, whatever was dropped
        await asyncio.to_thread(place.db.unrelated.insert_one, {})
        await asyncio.to_thread(place.db.unrelated.drop)
        await asyncio.sleep(0.5)
    enough.set()
    await written
    count = next(numbers) - 1
    for window in windows:
        await until(lambda window=window: count in window.texts)
        seen = [event["id"] for event in window.heard("message")]
        assert seen == list(range(seen[0], count + 1))
    assert caplog.text.count("drop of documents") >= 20
    assert " came after " not in caplog.text


# --- A process stops, dies, or has another clock ---
async def test_stopped_process_loses_nobody_who_comes_back_in_time(place, person):
    """SIGTERM: Ann comes back to the other process; Eve does not."""
    one, other = await place.start({}, {})
    eve = await (await person("eve").sign_up(one)).open(one)
    ann, _, [anns, bobs] = await meet(person, one, other)
    for name in "ann", "eve":
        await bobs.sees(name)
    joined = bobs.names("joined")
    one.process.send_signal(signal.SIGTERM)
    assert [await window.ended() for window in (anns, eve)] == [1001, 1001]
    stopped = time.monotonic()
    back = await ann.open(other)
    in_time = time.monotonic() - stopped < chat.GRACE / 2  # or the machine is busy
    await until(lambda: "eve" in bobs.names("left"), seconds=10)  # not FRESH
    if in_time:
        assert back.welcome["online"] == ["ann", "bob", "eve"]
        assert (bobs.names("left"), bobs.names("joined")) == (["eve"], joined)
    assert await asyncio.to_thread(one.end) == (0, "".join(one.lines), "")


async def test_killed_process_loses_nothing_and_its_people_leave(place, person):
    """kill -9: Ann comes back through the other process; Eve does not, and leaves."""
    one, other = await place.start({}, {})
    ann, eve = Talker(person("ann"), one, other), Talker(person("eve"), one)
    bob = Talker(person("bob"), other)
    await go_on(ann, bob, eve)
    for name in "ann", "eve":
        await bob.windows[0].sees(name)
    one.process.kill()
    left = asyncio.create_task(until(lambda: bob.gone, seconds=25))
    await go_on(ann, bob)
    assert await left == ["eve"]
    assert (len(ann.windows), len(bob.windows)) == (2, 1)
    eve.task.cancel()
    eve.pending = None
    await assert_nothing_is_lost(place, ann, bob)


async def test_slow_look_tells_no_departure(place, cable, person):
    """One process's database stalls for longer than GRACE; then Ann reloads."""
    one, other = await place.start({}, {"MONGO_HOST": cable.uri})
    ann, _, [anns, bobs] = await meet(person, one, other)
    await bobs.sees("ann")
    parts.freeze(cable)
    await asyncio.sleep(chat.GRACE + 0.5)
    await anns.ws.close()
    closed = time.monotonic()
    await until(lambda: not place.db.processes.find_one({"names": ["ann"]}))
    cable.send_signal(signal.SIGCONT)
    await asyncio.sleep(2 * chat.PAUSE)  # a look that misses her
    await ann.open(one)
    in_time = time.monotonic() - closed < chat.GRACE - chat.PAUSE  # or it is busy
    await asyncio.sleep(chat.GRACE + 1)
    if in_time:
        assert (bobs.names("left"), bobs.names("joined")[1:]) == ([], [])


# Python imports a module of this name before anything else.
SITECUSTOMIZE = """
import datetime, time

class DateTime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) - datetime.timedelta(minutes=1)

datetime.datetime, real_time = DateTime, time.time
time.time = lambda: real_time() - 60
"""


async def test_presence_comes_back_and_ages_by_mongodbs_clock(place, person, tmp_path):
    """Ann's host is a minute behind, and her entry is damaged in three ways."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    one, other = await place.start({"PYTHONPATH": str(tmp_path)}, {})
    ann, _, [_, bobs] = await meet(person, one, other)
    await bobs.sees("ann")
    processes, slowest = place.db.processes, 0
    for damage in (
        lambda: processes.delete_many({}),
        lambda: processes.update_many({}, {"$set": {"names": []}}),  # a late write
        processes.drop,
    ):
        damage()
        damaged = time.monotonic()
        await until(lambda: processes.find_one({"names": ["ann"]}), seconds=10)
        slowest = max(slowest, time.monotonic() - damaged)
    await asyncio.sleep(chat.GRACE + 1)
    if slowest < chat.GRACE - chat.PAUSE:  # or the machine is busy
        assert (bobs.names("left"), bobs.names("joined")[1:]) == ([], [])
    assert (await ann.open(other)).welcome["online"] == ["ann", "bob"]
    assert place.indexes() == INDEXES


# --- The database dies ---
async def test_process_stops_within_ten_seconds_though_mongodb_is_silent(place, cable):
    """Docker kills it then."""
    [process] = await place.start({"MONGO_HOST": cable.uri})
    parts.freeze(cable)
    await asyncio.sleep(chat.DEADLINE + 1)  # it opens the stream again
    code, _, errors = await asyncio.to_thread(process.stop, signal.SIGTERM, 10)
    assert (code, "Traceback" in errors) == (0, False)


def kill_streams(client):
    """Kill every cursor that follows changes, idle or waiting."""
    everything = {"$currentOp": {"allUsers": True, "idleCursors": True}}
    for operation in client.admin.aggregate([everything]):
        if "$changeStream" in str(operation.get("cursor")):
            name, _, collection = operation["ns"].partition(".")
            cursors = [operation["cursor"]["cursorId"]]
            killed = client[name].command("killCursors", collection, cursors=cursors)
            assert killed["cursorsKilled"] == cursors


@contextlib.asynccontextmanager
async def fault_of(kind, replica_set, client, process):
    primary = await asyncio.to_thread(replica_set.primary)
    match kind:
        case "primary killed":
            primary.kill()
            yield
            await asyncio.to_thread(primary.start)
        case "primary frozen":  # the others elect another one; it finds out later
            primary.freeze()
            yield
            primary.thaw()
        case "all killed":
            replica_set.kill()
            await asyncio.sleep(chat.FRESH + 1)  # longer than its entries count
            parts.freeze(process.process)  # it comes back later than the other
            for member in replica_set.members:
                await asyncio.to_thread(member.start)
            await asyncio.to_thread(replica_set.primary)
            await asyncio.sleep(2 * chat.GRACE + 2)
            process.process.send_signal(signal.SIGCONT)
            yield
        case "streams killed":
            await asyncio.to_thread(kill_streams, client)
            yield
            await asyncio.to_thread(kill_streams, client)


FAULTS = ["primary killed", "primary frozen", "all killed", "streams killed"]


@pytest.mark.parametrize("kind", FAULTS)
async def test_fault_of_mongodb_is_a_pause(start, replica_set, person, kind):
    place = Place(replica_set.uri, start)
    one, other = await place.start({}, {})
    ann, bob = Talker(person("ann"), one), Talker(person("bob"), other)
    await go_on(ann, bob)
    await ann.windows[0].sees("bob")
    await bob.windows[0].sees("ann")
    async with fault_of(kind, replica_set, place.client, other):
        await go_on(ann, bob)
    await go_on(ann, bob)
    assert len(ann.windows) == len(bob.windows) == 1  # nobody was disconnected
    assert ann.gone == bob.gone == []
    await assert_nothing_is_lost(place, ann, bob)
    await asyncio.to_thread(place.end)


# --- What operators do to a database ---
@pytest.mark.parametrize("frozen", ["process", "connection to MongoDB"])
async def test_what_is_taken_back_is_gone_everywhere(cable, place, person, frozen):
    """A message is blanked and an account deleted; the other process is away."""
    one, other = await place.start({}, {"MONGO_HOST": cable.uri})
    ann, bob, [anns, bobs] = await meet(person, one, other)
    elsewhere, near = await ann.open(other), await bob.open(one)
    blanked = {1: "", 2: "fine"}
    for text in "sesame", "fine":
        await anns.say(text)
    await until(lambda: bobs.texts == {1: "sesame", 2: "fine"})
    await bobs.sees("ann")
    away = other.process if frozen == "process" else cable
    parts.freeze(away)
    place.db.messages.update_one({"_id": 1}, {"$set": {"text": ""}})
    place.db.users.delete_one({"name": "ann"})
    assert await anns.ended() == 1008
    await until(lambda: near.texts == blanked)
    await asyncio.sleep((chat.DEADLINE + 1) * (away is cable))  # the driver gives up
    away.send_signal(signal.SIGCONT)
    assert await elsewhere.ended() == 1008
    await until(lambda: bobs.texts == blanked)
    for process in one, other:
        status, page = await bob.get(process)
        assert (status, shown_ids(page), "sesame" in page) == (200, [1, 2], False)
        assert (await bob.open(process, after=0)).texts == blanked
        late = await bob.open(process, after=2)  # it may still show what it had
        await until(lambda late=late: late.texts == {1: ""})
        answers = [(await ann.get(process, path))[0] for path in ("/", "/ws")]
        assert answers == [303, 401]
    await until(lambda: bobs.names("left") == ["ann"])
    assert await bobs.say("on we go") == 3


IDS = None, True, "a text", {"a": "document"}, 2.5, -1, Decimal128("2.7"), 4
FOREIGN = [{"_id": each} for each in IDS] + [
    {"_id": 3.0, "text": "in the place of 3"},
    {"_id": 5, "user": 1, "text": [], "time": "now", "nonce": "n"},
]


async def test_foreign_documents_are_passed_over_by_every_process(place, person):
    one, other = await place.start({}, {})
    ann, bob, windows = await meet(person, one, other)
    assert [await windows[0].say("one"), await windows[1].say("two")] == [1, 2]
    for collection in place.db.messages, place.db.processes:
        collection.insert_many([dict(document) for document in FOREIGN])
    place.db.users.insert_many([dict(document) for document in FOREIGN[3:]])
    names = {"names": ["eve", 5, ["zoe"]], "seen": datetime.now(UTC)}
    place.db.processes.insert_one(names)
    assert [await windows[0].say("six"), await windows[1].say("seven")] == [6, 7]
    kept = {1: "one", 2: "two", 6: "six", 7: "seven"}
    for _ in "before", "after":
        for window in windows:
            await until(lambda window=window: window.texts == kept)
        for process in one, other:
            assert (await ann.open(process, after=0)).texts == kept
            assert shown_ids((await ann.get(process))[1]) == list(kept)
        for process in one, other:
            code, _, errors = await asyncio.to_thread(process.stop, signal.SIGTERM)
            assert (code, "Traceback" in errors) == (0, False)
            assert errors.count("Passed over a foreign message") == 1
        one, other = await place.start({}, {})
        windows = [await ann.open(one, after=0), await bob.open(other, after=0)]
    assert await windows[0].say("eight") == 8
    await until(lambda: windows[1].texts == kept | {8: "eight"})


async def test_dropped_database_is_a_new_room_with_its_indexes(place, person):
    one, other = await place.start({}, {})
    _, _, windows = await meet(person, one, other)
    for text in "one", "two", "three":
        await windows[0].say(text)
    await until(lambda: len(windows[1].texts) == 3)
    place.client.drop_database(place.db)
    assert [await window.ended() for window in windows] == [1008, 1008]
    await until(lambda: place.indexes() == INDEXES)
    _, _, windows = await meet(person, one, other)
    assert [await windows[0].say("new"), await windows[1].say("room")] == [1, 2]
    for window in windows:
        await until(lambda window=window: window.texts == {1: "new", 2: "room"})
    assert place.indexes() == INDEXES


async def test_dropped_messages_are_a_new_history_while_people_write(place, person):
    one, other = await place.start({}, {})
    ann, bob = Talker(person("ann"), one), Talker(person("bob"), other)
    for _ in range(3):
        await go_on(ann, bob, count=20)
        await asyncio.to_thread(place.db.messages.drop)
    await go_on(ann, bob)
    ann.silent = bob.silent = True
    await until(lambda: not (ann.pending or bob.pending))
    assert len(ann.windows) == len(bob.windows) == 1
    stored = {message["_id"]: message["text"] for message in place.db.messages.find()}
    eve = await person("eve").sign_up(one)
    for process in one, other:
        window = await eve.open(process, after=0)
        await until(lambda window=window: window.texts == stored)
    assert place.indexes() == INDEXES


def drop_and_insert(db, name, documents, indexes):
    """`mongorestore --drop`: it skips what is there again, and indexes come last."""
    db.drop_collection(name)
    with contextlib.suppress(BulkWriteError):
        db[name].insert_many(documents, ordered=False)
    db.command("createIndexes", name, indexes=indexes)


def rename_over(db, name, *contents):
    """Make everything beside the old collection, then put it in its place."""
    drop_and_insert(db, "restored", *contents)
    db["restored"].rename(name, dropTarget=True)


@pytest.mark.parametrize("restore", [drop_and_insert, rename_over])
async def test_restored_database_is_the_room_that_it_was(place, person, restore):
    """Restored while people are there: what was said after the dump is gone."""
    one, other = await place.start({}, {})
    ann, bob, windows = await meet(person, one, other)
    for text in "one", "two", "three":
        await windows[0].say(text)
    dump = []
    for name in "users", "processes", "messages":
        collection = place.db[name]
        dump.append((name, list(collection.find()), list(collection.list_indexes())))
    assert await windows[1].say("not in the dump") == 4
    for contents in dump:
        await asyncio.to_thread(restore, place.db, *contents)

    async def are_restored():
        pages = [(await ann.get(process))[1] for process in (one, other)]
        return [shown_ids(page) for page in pages] == [[1, 2, 3]] * 2

    await until(are_restored)
    windows = [await ann.open(one, after=0), await bob.open(other, after=0)]
    assert [await windows[0].say("four"), await windows[1].say("five")] == [4, 5]
    kept = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}
    assert {m["_id"]: m["text"] for m in place.db.messages.find()} == kept
    for process in one, other:
        assert (await ann.open(process, after=0)).texts == kept
    assert place.indexes() == INDEXES


# --- A database of an earlier edition ---
EARLIER_HASH = (
    "$argon2id$v=19$m=19456,t=2,p=1$AusiMlHe6zJsfFWKaUVGFg"
    "$zKVbuWJwj63pvl3fxljw1OURWLOFqwY2R0pT1MDx+yY"
)


def write_as_before(db, edition):
    """Write what an earlier edition kept, and return the cookie of Ann's session."""
    for index in "users name_key", "users email_key", "messages user_id nonce":
        collection, *fields = index.split()
        options = {"sparse": True} if fields == ["email_key"] else {}
        if edition == "second":
            options = {"name": f"unique {fields[-1]}"}
            options["partialFilterExpression"] = {fields[-1]: {"$type": "string"}}
        db[collection].create_index(fields, unique=True, **options)
    ann = {"_id": ObjectId(), "name": "Ann", "name_key": "ann"}
    ann |= {"email": "Ann@example.org", "email_key": "ann@example.org"}
    bob = {"_id": ObjectId(), "name": "bob", "name_key": "bob"}
    for number, user, text in (1, ann, "old"), (2, bob, "times"):
        db.users.insert_one(user | {"password": EARLIER_HASH})
        message = {"_id": number, "user_id": user["_id"], "user": user["name"]}
        message |= {"text": text, "time": datetime.now(UTC), "nonce": f"n-{number}"}
        db.messages.insert_one(message)
    key = base64.urlsafe_b64encode(hashlib.sha256(KEY.encode()).digest())
    content = {"created": int(time.time()), "session": {"user": str(ann["_id"])}}
    value = Fernet(key).encrypt(json.dumps(content).encode())
    return {"AIOHTTP_SESSION": value.decode()}


@pytest.mark.parametrize("edition", ["first", "second"])
async def test_database_of_an_earlier_edition_goes_on(place, person, edition):
    cookie = write_as_before(place.db, edition)
    [process] = await place.start({})
    assert place.indexes() == INDEXES
    ann = person("Ann")  # with the cookie that she had
    ann.jar.update_cookies(cookie)
    window = await ann.open(process, after=0)
    assert window.welcome["online"] == ["Ann"]
    assert window.texts == {1: "old", 2: "times"}
    await send_only(window.ws, "old", "n-1")
    await until(lambda: window.receipts == {"n-1": 1})
    assert await window.say("new") == 3
    for login in "ann", "ANN", "ann@Example.org", "bob":
        async with person(login).at(process).post("/login", data=form(login)) as page:
            assert (page.status, page.url.path) == (200, "/")
            assert shown_ids(await page.text()) == [1, 2, 3]
    data = form("ANN", password="battery staple", password2="battery staple")
    async with person("ANN").at(process).post("/signin", data=data) as page:
        assert (page.status, "has this already" in await page.text()) == (422, True)


# --- Behind a proxy, in a container, beside other applications ---
CERTIFY = """
openssl req -x509 -nodes -days 2 -subj /CN=localhost -newkey ec -keyout key.pem
-pkeyopt ec_paramgen_curve:prime256v1 -out certificate.pem
"""
NGINX = """
daemon off; error_log stderr; pid nginx.pid;
events {}
http {
    access_log off; proxy_temp_path proxy; client_body_temp_path body;
    fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi; scgi_temp_path scgi;
    %s
}
"""


@pytest.fixture
def proxy(tmp_path):
    """Debian's nginx in front of two processes, with the lines of docs/nginx.conf."""
    nginx, port = parts.program("nginx"), unused_port()
    url, ports = f"https://localhost:{port}", [str(unused_port()) for _ in range(2)]
    subprocess.run(CERTIFY.split(), cwd=tmp_path, check=True, capture_output=True)
    text = (ROOT / "docs/nginx.conf").read_text()
    for old, new in (
        ("127.0.0.1:8081", f"127.0.0.1:{ports[0]}"),
        ("127.0.0.1:8082", f"127.0.0.1:{ports[1]}"),
        ("443 ssl http2", f"127.0.0.1:{port} ssl http2"),
        ("server_name chat.example", "server_name localhost"),
        ("/etc/ssl/certs/chat.example.pem", "certificate.pem"),
        ("/etc/ssl/private/chat.example.key", "key.pem"),
    ):
        assert text.count(old) == 1, f"docs/nginx.conf has no {old!r}"
        text = text.replace(old, new)
    (tmp_path / "nginx.conf").write_text(NGINX % text)
    with parts.running(nginx, "-p", tmp_path, "-c", "nginx.conf", "-e", "stderr"):
        parts.wait_for(lambda: parts.can_connect(port))
        settings = [{"PORT": each, "ORIGIN": url} for each in ports]
        yield SimpleNamespace(url=url, settings=settings)


async def test_proxy_limits_the_forms_that_one_address_sends(place, proxy, person):
    """Beyond 30 at once, an address gets 429; another one signs in meanwhile."""
    await place.start(*proxy.settings)
    eve, statuses = person("eve"), []
    while 429 not in statuses and len(statuses) < 60:  # one more every 2 seconds
        async with eve.at(proxy).post("/signin", data={}) as answer:
            statuses.append(answer.status)
    assert (set(statuses[:-1]), 30 < len(statuses) < 60) == ({422}, True)
    async with eve.at(proxy).post("/login", data={}) as answer:
        assert (answer.status, answer.headers["Server"][:5]) == (429, "nginx")
    for path in "/login", "/signin":
        assert (await eve.get(proxy, path))[0] == 200
    await person("ann", address="127.0.0.2").sign_up(proxy)
    async with eve.at(proxy).get("/static/chat.css") as answer:
        assert answer.headers["Content-Encoding"] == "gzip"


async def test_restarts_in_turn_behind_a_proxy_lose_nothing(place, proxy, person):
    """Clients that are cut off connect again at once, through the other process."""
    processes = await place.start(*proxy.settings)
    people = [Talker(person(name), proxy) for name in ("ann", "bob", "eve")]
    await go_on(*people)
    stop, kill = signal.SIGTERM, signal.SIGKILL
    for index, number in (0, stop), (1, stop), (0, kill), (1, kill):
        processes[index].process.send_signal(number)
        await asyncio.to_thread(processes[index].process.wait)
        await go_on(*people)
        [processes[index]] = await place.start(proxy.settings[index])
        await go_on(*people)
    assert all(len(talker.windows) >= 4 for talker in people)  # each was cut off
    assert [talker.gone for talker in people] == [[]] * 3
    foreign = {"Origin": "https://evil.example"}  # nginx has rewritten Host
    assert (await people[0].person.get(proxy, "/ws", headers=foreign))[0] == 403
    await assert_nothing_is_lost(place, *people)


# Note what the page says of its connection from now on.
OBSERVE = """() => {
  window.said = [];
  new MutationObserver(([change]) => said.push(change.target.dataset.status))
    .observe(document.querySelector("#status"), { attributeFilter: ["data-status"] });
  return performance.getEntriesByType("navigation")[0].nextHopProtocol;
}"""


async def test_page_behind_a_proxy_comes_back_to_the_other_process(place, proxy):
    """HTTP/2 in a real browser; the page says "connecting" and never "offline"."""
    processes = await place.start(*proxy.settings)
    async with parts.launch_chromium() as browser:
        page = await browser.new_page(ignore_https_errors=True)
        await page.goto(f"{proxy.url}/signin")
        for name, value in form("ann").items():
            await page.fill(f"[name={name}]", value)
        await page.click("main button")
        await page.wait_for_selector("[data-status=online]")
        assert await page.evaluate(OBSERVE) == "h2"
        for number, process in enumerate(processes, 1):
            await asyncio.to_thread(process.stop, signal.SIGTERM)
            await page.fill("#text", f"text {number}")
            await page.press("#text", "Enter")
            await page.wait_for_selector(f"[data-id='{number}']:not(.pending)")
            await place.start(proxy.settings[number - 1])
        said = await page.evaluate("said")
        assert said in (["connecting", "online"], 2 * ["connecting", "online"])


UNSHARE = "unshare", "--pid", "--fork", "--kill-child"


def test_chat_in_a_container_is_heard_at_once_and_stops_at_sigterm(start):
    """As process 1, which no signal ends by default; its output is a pipe."""
    can_unshare = shutil.which("unshare") and not subprocess.call([*UNSHARE, "true"])
    parts.need(can_unshare, "no new PID namespace: needs Linux's unshare, and root")
    chat = start(ROOT / "chat.py", *UNSHARE, SITE_HOST="0.0.0.0").wait_until_ready()
    [child] = Path(f"/proc/{chat.process.pid}/task").glob("*/children")
    os.kill(int(child.read_text()), signal.SIGTERM)
    assert chat.end() == (0, "".join(chat.lines), "")
