"""What else the chat does: start, pages, storage, sign-ins, crowds, floods, a stall.

Each check starts its own chat, and yields facts (what, figure) and targets (what, ratio
or difference, the most it may be). The peers have none of this.
"""

import contextlib
import http.client
import selectors
import socket
import statistics
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from load import TEXT, Load, LoadError, run, run_whole
from servers import PASSWORD, ask, post, start_chat


def milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.2g} ms"


def median(runs: list[dict], figure: str) -> float:
    return statistics.median(one[figure] for one in runs)


# --- The start ---
def check_start(chat, options):
    times = []
    for _ in range(1 if options.quick else 5):
        with start_chat(chat) as server:
            while ask(server.port, "GET", "/login")[0] != 200:
                time.sleep(0.005)
            times.append((time.perf_counter() - server.started) * 1e3)
    yield "from `python chat.py` to the first page", milliseconds(min(times))


# --- Pages ---
def time_pages(servers: list, count: int) -> list[float]:
    """Return the median time of each server's front page, asked for in turns."""
    visits = [
        (http.client.HTTPConnection("127.0.0.1", server.port), server.cookies[0], [])
        for server in servers
    ]
    for _ in range(count):
        for connection, cookie, times in visits:
            times.append(time_page(connection, cookie))
    for connection, *_ in visits:
        connection.close()
    return [statistics.median(times) for *_, times in visits]


def time_page(connection, cookie: str) -> float:
    start = time.perf_counter()
    connection.request("GET", "/", headers={"Cookie": cookie})
    response = connection.getresponse()
    body = response.read()
    took = time.perf_counter() - start
    if response.status != 200 or body.count(b"data-id") < 50:
        raise LoadError(f"the page is not as it should be ({response.status})")
    return took * 1e3


def fill_mongodb(uri: str, name: str, count: int) -> None:
    """Store messages as the chat would, but all at once."""
    import bson
    import pymongo

    with pymongo.MongoClient(uri) as client:
        for first in range(1, count + 1, 10_000):
            documents = [
                {
                    "_id": number,
                    "user_id": bson.ObjectId(),
                    "user": "sender-0",
                    "text": TEXT,
                    "time": datetime.now(UTC),
                    "nonce": str(uuid.uuid4()),
                }
                for number in range(first, min(first + 10_000, count + 1))
            ]
            client[name].messages.insert_many(documents)


def check_pages(chat, options):
    many, requests = (3_000, 100) if options.quick else (100_000, 500)

    def compare(where, few, full):
        value = f"{milliseconds(few)}, {milliseconds(full)}"
        yield f"the page `/` with 100 and with {many:,} messages, {where}", value
        yield f"`/` with {many:,} messages to 100, {where}", full / few, 1.2

    with contextlib.ExitStack() as stack:
        servers = []
        for count in (100, many):
            server = stack.enter_context(start_chat(chat, people=1))
            run_whole(server, n=1, w=64, c=count, d=120, a=0)
            servers.append(server)
        yield from compare("in memory", *time_pages(servers, requests))
    uri = options.mongodb()
    with contextlib.ExitStack() as stack:
        servers = []
        for count in (100, many):
            name = options.new_name()
            fill_mongodb(uri, name, count)
            settings = {"MONGO_HOST": uri, "MONGO_DB_NAME": name}
            servers.append(stack.enter_context(start_chat(chat, 1, **settings)))
        yield from compare("MongoDB", *time_pages(servers, requests))


# --- Storage ---
def check_storage(chat, options):
    def measure(followers=0, **settings):
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(start_chat(chat, people=8, **settings))
            others = [
                stack.enter_context(start_chat(chat, **settings))
                for _ in range(followers)
            ]
            used = [other.cpu() for other in others]
            figures = run_whole(server, n=8, s=8, w=8, a=0, d=options.seconds * 2)
            used = [other.cpu() - one for other, one in zip(others, used, strict=True)]
        messages, seconds = figures["messages"], figures["seconds"]
        each = [f"{cpu / messages * 1e6:,.0f} µs" for cpu in (figures["cpu"], *used)]
        return f"{messages / seconds:,.0f} a second", *each

    yield "messages, in memory, 8 × 8 in flight", ", ".join(measure())
    settings = {"MONGO_HOST": options.mongodb(), "MONGO_DB_NAME": options.new_name()}
    rate, each, following = measure(followers=1, **settings)
    yield "messages, MongoDB, 8 × 8 in flight", f"{rate}, {each}"
    yield "… in another process, which only follows", following


# --- Sign-ins ---
def check_signins(chat, options):
    """Sign in 50 people at once, again and again, while somebody talks to 100."""
    readers, people = (50, 10) if options.quick else (100, 50)
    forms = [
        {"login": f"sender-{number}", "password": PASSWORD} for number in range(people)
    ]
    quiet, crowd, rates, sent_back = [], [], [], 0

    def come(form) -> int:
        return post(server.port, "/login", form)[1]

    talk = {"n": readers, "i": 0.01, "d": options.seconds * 2}
    with start_chat(chat, people) as server, ThreadPoolExecutor(people) as pool:
        for _ in range(1 if options.quick else 5):
            quiet.append(run_whole(server, **talk))
            room, start, waves = Load(server, **talk), time.perf_counter(), 0
            while room.process.poll() is None:
                sent_back, waves = sent_back + sum(pool.map(come, forms)), waves + 1
            rates.append(waves * people / (time.perf_counter() - start))
            crowd.append(room.figures())
    alone, beside = median(quiet, "p99"), median(crowd, "p99")
    back = f", {sent_back} were asked to come back" if sent_back else ""
    yield f"{people} sign in at once", f"{statistics.median(rates):.0f} a second{back}"
    value = f"{milliseconds(beside)} (alone: {milliseconds(alone)})"
    yield "… p99 of messages meanwhile, on one core", value
    yield "p99 of messages while people sign in, to alone", beside / alone, 3


# --- A crowd ---
def storm(server, cookies: list[str], seconds: float) -> tuple[dict, dict]:
    """Let people come as fast as the server takes them, while another talks."""
    talker, *crowd = cookies
    room = Load(server, [talker], n=1, i=0.1, d=seconds, a=0)
    time.sleep(1)
    came = run(server, crowd, n=len(crowd), s=0, d=0, a=0)
    if came["welcomes"] < len(crowd):
        raise LoadError(f"only {came['welcomes']} of {len(crowd)} people came in")
    return came, room.figures()


def check_join_storm(chat, options):
    """Let 1,000 different people come; and come back to a process that restarts."""
    people, seconds = (30, 2) if options.quick else (1_000, 10)

    def tell(what, came, room):
        value = f"{came['connecting_cpu']:.2g} s of CPU, all in after "
        value += f"{came['welcoming']:.2g} s"
        yield what, value
        longest = room["longest"]
        yield "… longest wait of a message meanwhile", milliseconds(longest)

    with start_chat(chat, people + 1, pinned=False) as server:
        server.pin()
        figures = storm(server, server.cookies, seconds)
    yield from tell(f"{people:,} people come, in memory", *figures)
    settings = {"MONGO_HOST": options.mongodb(), "MONGO_DB_NAME": options.new_name()}
    with start_chat(chat, people + 1, pinned=False, **settings) as server:
        cookies = server.cookies
    with start_chat(chat, **settings) as server:
        came, room = storm(server, cookies, seconds)
    what = f"{people:,} people come back to a restarted process, MongoDB"
    yield from tell(what, came, room)
    yield f"{what}: longest wait of a message, s", room["longest"] / 1e3, 0.5


# --- A flood ---
def client_frame(opcode: int, payload: bytes) -> bytes:
    """Make a short frame. Its mask is zero, which leaves the payload as it is."""
    return bytes([0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0]) + payload


FLOODS = {
    "empty texts": client_frame(1, b'{"type": "message", "text": "", "nonce": "n"}'),
    "pings": client_frame(9, b""),
    "messages": client_frame(1, b'{"type": "message", "text": "x", "nonce": "n"}'),
}


class Flood:
    """Some sockets of one person, which send a frame over and over."""

    def __init__(self, server, cookie: str, frame: bytes, count: int) -> None:
        self.data, self.over = frame * (65_536 // len(frame)), False
        self.sockets = [self.open(server.port, cookie) for _ in range(count)]
        self.thread = threading.Thread(target=self.send)

    def open(self, port: int, cookie: str) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        request = [
            "GET /ws HTTP/1.1",
            f"Host: 127.0.0.1:{port}",
            f"Origin: http://127.0.0.1:{port}",
            f"Cookie: {cookie}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==",
        ]
        connection.sendall(("\r\n".join(request) + "\r\n\r\n").encode())
        if not connection.recv(65_536).startswith(b"HTTP/1.1 101"):
            raise LoadError("a connection of the flood was refused")
        connection.setblocking(False)
        return connection

    def send(self) -> None:
        """Send as fast as the server takes it, and read what comes back."""
        selector = selectors.DefaultSelector()
        for connection in self.sockets:
            selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
        left = dict.fromkeys(self.sockets, b"")
        while not self.over:
            for key, events in selector.select(0.01):
                connection = key.fileobj
                try:
                    if events & selectors.EVENT_READ:
                        connection.recv(65_536)
                    if events & selectors.EVENT_WRITE:
                        data = left[connection] or self.data
                        left[connection] = data[connection.send(data) :]
                except BlockingIOError:
                    pass
                except OSError:  # the server has cut it off
                    selector.unregister(connection)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error) -> None:
        self.over = True
        self.thread.join()
        for connection in self.sockets:
            connection.close()


def check_flood(chat, options):
    """Let one person send as fast as it goes, with the limits that the chat ships."""
    talk = {"n": 10, "i": 0.25, "a": 0.5, "d": 1 if options.quick else 5}
    for count in (3,) if options.quick else (1, 20):
        for what in list(FLOODS)[: 1 if options.quick else None]:
            with start_chat(chat, people=2, limits=True) as server:
                talker, flooder = server.cookies
                alone = run(server, [talker], **talk)["longest"]
                with Flood(server, flooder, FLOODS[what], count):
                    longest = run(server, [talker], **talk)["longest"]
            sockets = f"{count} socket{'s' * (count > 1)}"
            what = f"one person floods by {what}, {sockets}: longest wait of others"
            yield what, f"{milliseconds(longest)} (alone: {milliseconds(alone)})"
            yield f"{what}, s more than alone", (longest - alone) / 1e3, 0.1


# --- A reader that stops reading ---
def check_stalled_reader(chat, options):
    """Let one reader stop reading, and another, while eight others talk fast.

    Until it has missed some 6 MB: the system keeps most of that for it.
    """
    readers, messages = (50, 3_000) if options.quick else (1_000, 30_000)
    talk = {"n": readers, "s": 8, "w": 8, "c": messages, "d": 60}
    quiet, beside = [], []
    with start_chat(chat, people=8) as server:
        for _ in range(1 if options.quick else 3):
            quiet.append(run_whole(server, **talk))
            beside.append(run_whole(server, k=1, **talk))
    before, after = median(quiet, "p99"), median(beside, "p99")
    what = f"one of {readers:,} readers stops reading: p99 of the others"
    yield what, f"{milliseconds(after)} (alone: {milliseconds(before)})"
    rate = median(quiet, "seconds") / median(beside, "seconds")
    yield "… their deliveries per second, to alone", f"{rate:.0%}"
    growth = max(one["growth"] for one in beside) / 1_024
    yield "… memory", f"{growth:+.1f} MiB at most"
    cut = sum(one["cut"] for one in beside)
    yield "… the reader", f"cut off in {cut} of {len(beside)} cases"
    yield "p99 beside a stalled reader, to alone", after / before, 1.5


CHECKS = {
    "start": check_start,
    "pages": check_pages,
    "storage": check_storage,
    "sign-ins": check_signins,
    "join storm": check_join_storm,
    "flood": check_flood,
    "stalled reader": check_stalled_reader,
}
