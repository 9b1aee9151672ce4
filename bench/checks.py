"""What else the chat does: start, pages, sign-ins, storage, crowds, a stalled reader.

Each check starts its own chat, and yields facts (what, figure) and ratios (what, ratio,
the most it may be, whether it is met). The peers have none of this.
"""

import contextlib
import http.client
import socket
import statistics
import time
import uuid
from datetime import UTC, datetime

import load
from load import Load, LoadError, chat_message
from servers import (
    PASSWORD,
    ask,
    sign_up,
    sign_up_all,
    start_chat,
)


def milliseconds(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def at_most(what: str, ratio: float, target: float) -> tuple:
    return what, ratio, target, ratio <= target


def all_there(run: dict) -> dict:
    if run["missing"]:
        raise LoadError(f"{run['missing']:.2%} of the messages are missing")
    return run


@contextlib.contextmanager
def running(options, people=1, readers=0, **settings):
    """Run a chat with some who talk and some who read; give it and its load."""
    with start_chat(options.chat, **settings) as server:
        room = Load(server.port, chat_message)
        names = [f"sender-{number}" for number in range(people)]
        cookies = sign_up_all(server.port, names)
        room.connect(readers, cookies[0])
        for cookie in cookies:
            room.connect(1, cookie, talk=True)
        room.settle()
        try:
            yield server, room, cookies
        finally:
            room.close()


# --- The start ---
def check_start(options):
    times = []
    for _ in range(1 if options.quick else 5):
        with start_chat(options.chat) as server:
            while ask(server.port, "GET", "/login")[0] != 200:
                time.sleep(0.005)
            times.append(time.perf_counter() - server.started)
    what = "from `python chat.py` to the first page"
    yield what, milliseconds(statistics.median(times))


# --- Pages ---
def time_pages(visitors: list[tuple], count: int) -> list[float]:
    """Return the median time of each server's front page, asked for in turns."""
    connections = [
        (http.client.HTTPConnection("127.0.0.1", server.port, timeout=30), cookie, [])
        for server, cookie in visitors
    ]
    for _ in range(count):
        for connection, cookie, times in connections:
            times.append(time_page(connection, cookie))
    for connection, *_ in connections:
        connection.close()
    return [statistics.median(times) for *_, times in connections]


def time_page(connection, cookie: str) -> float:
    start = time.perf_counter()
    connection.request("GET", "/", headers={"Cookie": cookie})
    response = connection.getresponse()
    body = response.read()
    took = time.perf_counter() - start
    if response.status != 200 or body.count(b"data-id") != 50:
        raise LoadError(f"the page is not as it should be ({response.status})")
    return took


def fill_mongodb(uri: str, name: str, count: int) -> None:
    """Store messages as the chat would, but all at once."""
    import pymongo

    with pymongo.MongoClient(uri) as client:
        for first in range(1, count + 1, 10_000):
            documents = [
                {
                    "_id": number,
                    "user_id": "bench",
                    "user": "sender-0",
                    "text": load.TEXT,
                    "time": datetime.now(UTC),
                    "nonce": str(uuid.uuid4()),
                }
                for number in range(first, min(first + 10_000, count + 1))
            ]
            client[name].messages.insert_many(documents)


def say_many(room, count: int) -> None:
    """Let the first talker say so many messages, a hundred on their way at a time."""
    talker, left = next(iter(room.talkers.values())), count

    def next_one(talker, own):
        nonlocal left
        own = min(own, left)
        left -= own
        if own:
            room.send(talker, own)

    room.begin()
    room.on_own = next_one
    next_one(talker, 100)
    while len(room.delays) < count and room.pump(5):
        pass
    if len(room.delays) < count:
        raise LoadError(f"{count - len(room.delays)} messages did not come")


def check_pages(options):
    many, requests = (3_000, 100) if options.quick else (100_000, 500)

    def compare(where, few, full):
        yield f"the page `/` with 100 messages, {where}", milliseconds(few)
        yield f"the page `/` with {many:,} messages, {where}", milliseconds(full)
        yield at_most(f"`/` with {many:,} messages to 100, {where}", full / few, 1.2)

    with contextlib.ExitStack() as stack:
        visitors = []
        for count in (100, many):
            server, room, cookies = stack.enter_context(running(options))
            say_many(room, count)
            visitors.append((server, cookies[0]))
        yield from compare("in memory", *time_pages(visitors, requests))
    uri = options.mongodb()
    with contextlib.ExitStack() as stack:
        visitors = []
        for count in (100, many):
            settings = {"MONGO_HOST": uri, "MONGO_DB_NAME": f"bench_{count}"}
            fill_mongodb(uri, settings["MONGO_DB_NAME"], count)
            server = stack.enter_context(start_chat(options.chat, **settings))
            visitors.append((server, sign_up(server.port, "somebody")))
        yield from compare("MongoDB", *time_pages(visitors, requests))


# --- Storage ---
def check_storage(options):
    def measure(followers=0, **settings):
        with contextlib.ExitStack() as stack:
            server, room, _ = stack.enter_context(running(options, 8, **settings))
            servers = [server]
            for _ in range(followers):
                one = start_chat(options.chat, **settings)
                servers.append(stack.enter_context(one))
            room.run(options.seconds / 4, talkers=8, in_flight=8)
            used = [one.cpu() for one in servers]
            run = all_there(room.run(options.seconds * 2, talkers=8, in_flight=8))
            used = [
                one.cpu() - before for one, before in zip(servers, used, strict=True)
            ]
        each = [f"{cpu / run['messages'] * 1e6:,.0f} µs of CPU each" for cpu in used]
        return f"{run['messages'] / run['seconds']:,.0f} a second", each

    rate, (each,) = measure()
    yield "messages stored, in memory, 8 × 8 in flight", f"{rate}, {each}"
    settings = {"MONGO_HOST": options.mongodb(), "MONGO_DB_NAME": "bench_storage"}
    rate, (each, following) = measure(followers=1, **settings)
    yield "messages stored, MongoDB, 8 × 8 in flight", f"{rate}, {each}"
    yield "… in another process, which only follows", following


# --- Crowds ---
class Visit:
    """One request, sent without waiting for the answer."""

    def __init__(self, room, request: bytes) -> None:
        self.answer, self.done, self.start = b"", None, time.perf_counter()
        connection = socket.create_connection(("127.0.0.1", room.port), timeout=30)
        connection.sendall(request)
        room.handle(connection, self.take)

    def take(self, data: bytes) -> bool:
        self.answer += data
        if not data:
            self.done = time.perf_counter()
        return not data


def login_request(name: str) -> bytes:
    body = f"login={name}&password={PASSWORD.replace(' ', '+')}"
    return (
        "POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def check_signins(options):
    """Sign in 50 people at once, again and again, while somebody talks."""
    readers, people = (50, 10) if options.quick else (100, 50)
    places = {"on one core": True, "on all cores": False}
    if options.quick or len(load.CORES) == 1:
        del places["on all cores"]
    for where, pinned in places.items():
        with running(options, readers=readers, pinned=pinned) as (server, room, _):
            names = [f"person-{number}" for number in range(people)]
            sign_up_all(server.port, names)
            quiet, busy, waves = talk_while(room, names, options)
        visits = [visit for wave in waves for visit in wave]
        if any(not visit.answer.startswith(b"HTTP/1.1 303") for visit in visits):
            raise LoadError("somebody could not sign in")
        took = sum(max(visit.done for visit in wave) - wave[0].start for wave in waves)
        yield f"sign-ins, {where}", f"{len(visits) / took:,.0f} a second"
        what = f"p99 of messages while {people} sign in, {where}"
        yield what, f"{milliseconds(busy)} (undisturbed: {milliseconds(quiet)})"
        yield at_most(f"{what}, to undisturbed", busy / quiet, 3)


def talk_while(room, names, options):
    """Say 100 messages a second, without those who sign in and with them, in turns."""
    quiet, busy, waves = [], [], []

    def sign_in(now):
        if not waves or all(visit.done for visit in waves[-1]):
            waves.append([Visit(room, login_request(name)) for name in names])

    room.run(options.seconds / 2, 1, pace=0.01)
    for _ in range(1 if options.quick else 5):
        quiet.append(all_there(room.run(2 * options.seconds, 1, pace=0.01)))
        run = room.run(2 * options.seconds, 1, pace=0.01, tick=sign_in)
        busy.append(all_there(run))
        while not all(visit.done for visit in waves[-1]):
            room.pump(0.1)
    return median_p99(quiet), median_p99(busy), waves


def median_p99(runs: list[dict]) -> float:
    return statistics.median(run["p99"] for run in runs)


def check_join_storm(options):
    """Let different people come within a second, while somebody talks."""
    people = 50 if options.quick else 1_000
    names = [f"person-{number}" for number in range(people)]
    with start_chat(options.chat, pinned=False) as server:
        cookies = sign_up_all(server.port, ["sender-0", *names])
        server.usage.cpu_affinity(load.CORES[:1])
        room = Load(server.port, chat_message)
        room.connect(1, cookies.pop(0), talk=True)
        room.settle()
        welcomed, refused = [], []

        def arrive(cookie):
            connection = room.open()
            connection.sendall(load.handshake(room.port, cookie))
            state = {"head": b"", "in": False}

            def take(data):
                if not data:
                    refused.append(cookie)
                elif not state["in"]:
                    state["head"] += data
                    if b'{"type": "welcome"' in state["head"]:
                        state["in"] = True
                        welcomed.append(time.perf_counter())
                return False

            room.handle(connection, take)

        start = None

        def tick(now):
            nonlocal start
            start = start or now
            while cookies and len(cookies) > people * (1 - (now - start)):
                arrive(cookies.pop())

        used = server.cpu()
        run = room.run(1.5, 1, pace=0.01, tick=tick)
        until = time.perf_counter() + 30
        while len(welcomed) < people and time.perf_counter() < until:
            room.pump(0.1)
        room.settle()
        used = server.cpu() - used
        room.close()
    if refused or len(welcomed) < people:
        came = f"only {len(welcomed)} of {people} people came in"
        raise LoadError(f"{came}, {len(refused)} were refused")
    took = milliseconds(welcomed[-1] - start)
    what = f"{people:,} people come within a second: all are in after"
    yield what, f"{took}, {used:.2g} s of CPU"
    yield "… p99 of messages meanwhile", milliseconds(run["p99"])


def check_stalled_reader(options):
    """Let one reader stop reading, and another, while eight others talk fast."""
    readers = 50 if options.quick else 1_000
    seconds, enough = 4 * options.seconds, 6 << 20  # bytes; the kernel takes most
    quiet, busy, rates, cuts, sizes = [], [], [], [], []
    with running(options, people=8, readers=readers) as (server, room, cookies):
        room.run(options.seconds / 2, 8, 8)
        memory = [server.memory()]
        for _ in range(1 if options.quick else 3):
            quiet.append(all_there(room.run(seconds, 8, 8)))
            stalled = room.open()
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            stalled.sendall(load.handshake(room.port, cookies[0]))
            room.settle()
            sent = 0
            while sent < enough:
                busy.append(all_there(room.run(seconds, 8, 8)))
                sent += busy[-1]["messages"] * busy[-1]["frame"]
                memory.append(server.memory())
            rates.append(busy[-1]["deliveries"] / quiet[-1]["deliveries"])
            received, cut = drain(stalled)
            sizes.append(received / (1 << 20))
            cuts.append(cut)
            stalled.close()
            room.settle()
    before, beside = median_p99(quiet), median_p99(busy)
    what = f"one of {readers:,} readers stops reading: p99 of the others"
    yield what, f"{milliseconds(beside)} (undisturbed: {milliseconds(before)})"
    yield "… their deliveries, to undisturbed", f"{statistics.median(rates):.0%}"
    growth = (max(memory) - memory[0]) / (1 << 20)
    yield "… memory", f"{growth:+.1f} MiB at most"
    size = f"{max(sizes):.1f} MiB were on their way"
    yield "… the reader", f"cut off in {sum(cuts)} of {len(cuts)} cases, {size}"
    yield at_most("p99 beside a stalled reader, to undisturbed", beside / before, 1.5)


def drain(connection: socket.socket) -> tuple[int, bool]:
    """Read what is left; return its size, and whether the other side has closed."""
    received = 0
    connection.settimeout(0.5)
    try:
        while data := connection.recv(1 << 18):
            received += len(data)
    except TimeoutError:
        return received, False
    except ConnectionResetError:
        pass
    return received, True


CHECKS = {
    "start": check_start,
    "pages": check_pages,
    "storage": check_storage,
    "sign-ins": check_signins,
    "join storm": check_join_storm,
    "stalled reader": check_stalled_reader,
}
