"""A load generator: thousands of WebSockets in one process, and no event loop.

A reader only counts bytes. That is enough to know what it has: all readers get the
same frames in the same order, so a talker, who does parse them, knows at which byte
each message ends. A message has arrived when the slowest reader has passed that byte,
and nothing is lost when all of them end at the same one.
"""

import gc
import json
import os
import re
import select
import socket
import struct
import sys
import time
import uuid
from collections import deque

try:
    import resource
except ImportError:
    sys.exit("The benchmark needs Linux or macOS.")

NONCE = re.compile(rb"~(\d+)~(\d+)~")  # whose message it is, and which of theirs
NONCE_HERE = b"~0~000000~".ljust(36, b"-")
PING, PONG = 0x89, 0x8A
TEXT = "x" * 64
USER = "sender-0"  # as long as the names of those who talk


class LoadError(Exception):
    """Say what the server did that no server should."""


def chat_message(nonce: str) -> str:
    """Return what a sender says to the chat."""
    return json.dumps({"type": "message", "text": TEXT, "nonce": nonce})


def peer_message(nonce: str) -> str:
    """Return what a sender says to a peer, which relays it as it is.

    It is as long as what the chat makes of a message: like is compared with like.
    """
    event = {"type": "message", "id": 1000, "user": USER, "text": TEXT}
    event |= {"time": "2016-01-01T00:00:00.000Z", "nonce": nonce}
    return json.dumps(event)


def client_frame(opcode: int, payload: bytes) -> bytes:
    """Make a client's frame. Its mask is zero, which leaves the payload as it is."""
    length = len(payload)
    if length < 126:
        head = struct.pack("!BB", opcode, 0x80 | length)
    else:
        head = struct.pack("!BBH", opcode, 0xFE, length)
    return head + bytes(4) + payload


def handshake(port: int, cookie: str = "") -> bytes:
    host = f"127.0.0.1:{port}"
    return (
        f"GET /ws HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\n"
        "Upgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==\r\n"
        + (f"Cookie: {cookie}\r\n" if cookie else "")
        + "\r\n"
    ).encode()


def raise_file_limit() -> None:
    """Let this process, and the servers that it starts, open what the system allows."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit == resource.RLIM_INFINITY:
        limit = 65_536
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def percentile(values: list[float], share: float) -> float:
    if not values:
        return float("nan")
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


class Poller:
    """Wait for sockets with epoll; with poll where there is none."""

    def __init__(self) -> None:
        self.epoll = hasattr(select, "epoll")
        self.poller = select.epoll() if self.epoll else select.poll()

    def add(self, connection: socket.socket) -> None:
        self.poller.register(connection.fileno(), select.POLLIN)

    def remove(self, connection: socket.socket) -> None:
        self.poller.unregister(connection.fileno())

    def wait(self, seconds: float) -> list[tuple[int, int]]:
        if self.epoll:
            return self.poller.poll(seconds, 1024)
        return self.poller.poll(seconds * 1000)


class Talker:
    """A socket that sends, and parses what it gets."""

    def __init__(self, connection: socket.socket, number: int) -> None:
        self.connection, self.number = connection, number
        self.count, self.rest = 0, b""


class Load:
    """All connections to one server."""

    def __init__(self, port: int, message=peer_message) -> None:
        self.port, self.message = port, message
        self.id = uuid.uuid4().hex[:26]  # a nonce is as long as a UUID, and as unique
        self.frame = client_frame(0x81, message(NONCE_HERE.decode()).encode())
        self.poller, self.buffer = Poller(), bytearray(1 << 18)
        self.sockets = {}  # file descriptor -> index, recv_into, connection
        self.handlers = {}  # file descriptor -> function, for what is no reader
        self.position = []  # bytes that each connection has read
        self.talkers = {}  # index -> Talker
        self.half_pings = {}  # index -> the first bytes of a ping
        self.sent = {}  # (talker, count) -> when
        self.begin()

    # --- Connections ---
    def connect(self, count: int, cookie: str = "", talk: bool = False) -> None:
        """Open connections, fewer at a time than any server's backlog."""
        request = handshake(self.port, cookie)
        while count:
            wave = [self.open() for _ in range(min(count, 50))]
            for connection in wave:
                connection.sendall(request)
            for connection in wave:
                self.admit(connection, talk)
            count -= len(wave)
            self.pump(0)

    def open(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def admit(self, connection: socket.socket, talk: bool) -> None:
        """Wait for the answer to the handshake; then the connection is a reader."""
        answer = b""
        while b"\r\n\r\n" not in answer:
            piece = connection.recv(4096)
            if not piece:
                raise LoadError("the server closed a connection in its handshake")
            answer += piece
        if not answer.startswith(b"HTTP/1.1 101"):
            raise LoadError(f"the server answered {answer.splitlines()[0]!r}")
        connection.setblocking(False)
        index = len(self.position)
        self.position.append(0)
        if talk:
            talker = Talker(connection, len(self.talkers))
            talker.rest = answer.partition(b"\r\n\r\n")[2]
            self.talkers[index] = talker
        self.sockets[connection.fileno()] = index, connection.recv_into, connection
        self.poller.add(connection)

    def handle(self, connection: socket.socket, function) -> None:
        """Give what this connection reads to a function, until it returns true."""
        connection.setblocking(False)
        self.handlers[connection.fileno()] = function, connection
        self.poller.add(connection)

    def close(self) -> None:
        for *_, connection in [*self.sockets.values(), *self.handlers.values()]:
            connection.close()

    # --- Reading ---
    def pump(self, seconds: float) -> bool:
        """Read what has arrived, waiting for it if need be. Return false if nothing."""
        sockets, position, buffer = self.sockets, self.position, self.buffer
        talkers, events = self.talkers, self.poller.wait(seconds)
        for fd, _ in events:
            if fd not in sockets:
                self.let_handle(fd)
                continue
            index, receive, _ = sockets[fd]
            try:
                size = receive(buffer)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                size = 0
            if not size:
                raise LoadError("the server closed a connection")
            # No text that goes round here has this byte: it can only be a ping's.
            if buffer.find(PING, 0, size) >= 0 or index in self.half_pings:
                data = self.answer_pings(index, fd, bytes(buffer[:size]))
                size = len(data)
            elif index in talkers:
                data = bytes(buffer[:size])
            position[index] += size
            if index in talkers:
                self.hear(talkers[index], data)
        if self.ends and position[self.slowest] >= self.ends[0][0]:
            self.note_arrivals()
        return bool(events)

    def let_handle(self, fd: int) -> None:
        function, connection = self.handlers[fd]
        try:
            data = connection.recv(1 << 18)
        except ConnectionResetError:
            data = b""
        if function(data) or not data:
            self.poller.remove(connection)
            del self.handlers[fd]
            connection.close()

    def answer_pings(self, index: int, fd: int, data: bytes) -> bytes:
        """Answer the pings in some data, and return the rest of it."""
        data, start = self.half_pings.pop(index, b"") + data, 0
        while (start := data.find(PING, start)) >= 0:
            end = start + 2 + (data[start + 1] if len(data) > start + 1 else 0)
            if len(data) < max(end, start + 2):
                self.half_pings[index] = data[start:]
                return data[:start]
            self.sockets[fd][2].send(client_frame(PONG, data[start + 2 : end]))
            data = data[:start] + data[end:]
        return data

    def hear(self, talker: Talker, data: bytes) -> None:
        """Parse frames; where one is the talker's own, it may send its next."""
        data, start, own = talker.rest + data, 0, 0
        while len(data) >= start + 4:
            length, head = data[start + 1], 2
            if length == 126:
                length, head = int.from_bytes(data[start + 2 : start + 4], "big"), 4
            end = start + head + length
            if len(data) < end:
                break
            if data.startswith(b'{"type": "error"', start + head):
                raise LoadError(f"the server refused a message: {data[start:end]!r}")
            found = NONCE.search(data, start + head, end)
            number = int(found[1]) if found else None
            own += number == talker.number
            if talker.number == 0:
                self.offset += end - start
                self.heard += 1
                if found and (sent := self.sent.pop((number, int(found[2])), None)):
                    self.ends.append((self.offset, sent))
            start = end
        talker.rest = data[start:]
        if own and self.on_own:
            self.on_own(talker, own)

    def note_arrivals(self) -> None:
        """Take the time of each message that even the slowest reader has."""
        position, now = self.position, time.perf_counter()
        least = min(position)
        while self.ends and self.ends[0][0] <= least:
            self.delays.append(now - self.ends.popleft()[1])
        # Servers mostly go from first to last, so watch the last one that is behind.
        self.slowest = len(position) - 1 - position[::-1].index(least)

    # --- Talking ---
    def send(self, talker: Talker, count: int = 1) -> None:
        """Say some messages, all in one write, so that they arrive together."""
        frames, now = [], time.perf_counter()
        for number in range(talker.count + 1, talker.count + count + 1):
            nonce = f"~{talker.number}~{number:06}~{self.id}"
            frames.append(self.frame.replace(NONCE_HERE, nonce.encode()))
            self.sent[talker.number, number] = now
        talker.count += count
        data = b"".join(frames)
        if talker.connection.send(data) != len(data):
            raise LoadError("the server stopped reading from a sender")

    def begin(self) -> None:
        """Count from zero. Nothing may be on its way."""
        self.position[:] = [0] * len(self.position)
        self.offset, self.heard, self.slowest = 0, 0, 0
        self.ends, self.delays = deque(), []
        self.half_pings.clear()
        self.on_own = None

    def settle(self, quiet: float = 0.2, limit: float = 20) -> bool:
        """Read until nothing has come for a while. Return false if it never ends."""
        until = time.perf_counter() + limit
        while self.pump(quiet):
            if time.perf_counter() > until:
                return False
        return True

    def run(self, seconds, talkers, in_flight=0, pace=None, cpu=None, tick=None):
        """Let people talk, then wait for all to have everything. Return the figures.

        Either with so many messages each on their way at any time, or, with `pace`,
        one that often. `tick` is called with the time of each round of reading.
        """
        self.begin()
        speakers = list(self.talkers.values())
        if talkers == 1:
            speakers = [speakers[len(speakers) // 2]]
        counts = sum(talker.count for talker in speakers)
        cpu = cpu or time.process_time
        gc.collect()
        gc.disable()
        used, own, start = cpu(), time.process_time(), time.perf_counter()
        until = start + seconds

        def next_one(talker, own):
            if not pace and time.perf_counter() < until:
                self.send(talker, own)

        self.on_own = next_one
        for talker in speakers:
            next_one(talker, in_flight)
        due = start
        while (now := time.perf_counter()) < until:
            if pace and now >= due:
                self.send(speakers[0])
                due += pace
            if tick:
                tick(now)
            wait = max(due - time.perf_counter(), 0) if pace else 0.02
            self.pump(min(wait, 0.02))
        took, used = time.perf_counter() - start, cpu() - used
        own = time.process_time() - own
        read = sum(self.position)
        sent = sum(talker.count for talker in speakers) - counts
        missing = self.wait_for_the_rest(sent, limit=max(1, 2 * seconds))
        gc.enable()
        size = self.offset / max(self.heard, 1)
        return {
            "messages": sent,
            "frame": size,
            "deliveries": read / size if size else 0,
            "seconds": took,
            "cpu": used,
            "load": own / took,  # of the generator's core
            "p50": percentile(self.delays, 0.5),
            "p99": percentile(self.delays, 0.99),
            "missing": missing,
        }

    def wait_for_the_rest(self, sent: int, limit: float) -> float:
        """Return the share of deliveries that have not come; zero, if all is well."""
        until = time.perf_counter() + limit
        while len(self.delays) < sent and time.perf_counter() < until:
            self.pump(0.02)
        self.settle(quiet=0.05, limit=0.5)
        if len(self.delays) == sent and set(self.position) == {self.offset}:
            return 0
        now = time.perf_counter()
        waiting = [*(when for _, when in self.ends), *self.sent.values()]
        self.delays += [now - when for when in waiting]  # at least
        self.sent.clear()
        size = self.offset / max(self.heard, 1)
        due = sent * len(self.position) * size
        return abs(due - sum(self.position)) / due if due else 1


def pin(core: int) -> None:
    """Put this process, and what it starts from now on, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {CORES[core]})


def unpin() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, CORES)


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
