"""What else the chat does: floods, strangers, a restart, storage, an idle process.

Each check starts its own chat and yields what was measured and its figure, as text. The
peers have none of this. Limits are as shipped, except where storage is measured.
"""

import asyncio
import contextlib
import time
from collections import Counter

from load import Load, LoadError, run
from servers import RAISED, mongodb, start_chat

TALK = {"n": 10, "s": 10, "i": 0.25}  # ten people, four messages a second each


def milliseconds(value: float) -> str:
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.2g} ms"


# --- What delays others ---
async def flood(port: int, opening: str, data: bytes, count: int, seconds: float):
    """Open connections, and send the same bytes over and over, as the server reads."""

    async def ignore(reader) -> None:
        while await reader.read(65_536):
            pass

    async def send() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            if opening:
                writer.write(opening.encode())
                answer = await reader.readuntil(b"\r\n\r\n")
                if not answer.startswith(b"HTTP/1.1 101"):
                    raise LoadError("a connection of the flood was refused")
            async with asyncio.TaskGroup() as group:
                group.create_task(ignore(reader))
                while True:
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.transport.abort()

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            results = await asyncio.gather(
                *(send() for _ in range(count)), return_exceptions=True
            )
            raise LoadError(f"the flood ended too soon: {results[0]!r}")


def wait_beside(server, opening: str, data: bytes, count: int, seconds: float) -> str:
    """Let ten people talk, alone and then beside a flood; tell their waits."""
    *talkers, _ = server.cookies
    alone = run(server, talkers, **TALK, d=seconds)
    talk = Load(server, talkers, **TALK, a=0, d=seconds + 1)
    time.sleep(1)  # they have connected
    asyncio.run(flood(server.port, opening, data, count, seconds))
    beside = talk.figures()
    waits = [milliseconds(beside[which]) for which in ("p50", "p99", "longest")]
    return f"{'; '.join(waits)} (alone p99 {milliseconds(alone['p99'])})"


def client_frame(opcode: int, payload: bytes) -> bytes:
    """Make a short frame. Its mask is zero, which leaves the payload unchanged."""
    return bytes([0x80 | opcode, 0x80 | len(payload), 0, 0, 0, 0]) + payload


FRAMES = {
    "empty texts": client_frame(1, b'{"type": "message", "text": "", "nonce": "n"}'),
    "pings": client_frame(9, b""),
    "messages": client_frame(1, b'{"type": "message", "text": "x", "nonce": "n"}'),
}
UPGRADE = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
UPGRADE += "Sec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==\r\n"


def check_flood(chat, quick):
    """Let one person send as fast as the server reads, on all sockets they may have."""
    for what, frame in FRAMES.items():
        with start_chat(chat, people=11) as server:
            opening = f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n"
            opening += f"Cookie: {server.cookies[-1]}\r\n{UPGRADE}\r\n"
            data = frame * (65_536 // len(frame))
            waits = wait_beside(server, opening, data, 20, 1 if quick else 4)
        yield f"others wait, one person floods 20 sockets: {what}", waits


def check_strangers(chat, quick):
    """Let five clients without an account send 1,500 requests in one piece, again."""
    with start_chat(chat, people=11) as server:
        request = f"GET /login HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n"
        data = request.encode() * 1_500
        waits = wait_beside(server, "", data, 5, 1 if quick else 6)
    what = "others wait, 5 strangers pipeline 1,500 requests at a time"
    yield what, waits


# --- MongoDB ---
def check_restart(chat, quick):
    """Let people reconnect to a process that has just started, while one talks."""
    people = 30 if quick else 1_000
    with mongodb() as uri:
        with start_chat(chat, people + 1, MONGO_HOST=uri) as server:
            talker, *crowd = server.cookies
        with start_chat(chat, MONGO_HOST=uri) as server:
            talk = Load(server, [talker], n=1, i=0.25, d=3 if quick else 10, a=0)
            time.sleep(1)
            came = run(server, crowd, n=people, s=0, d=0, a=0)
            longest = talk.figures()["longest"]
    if came["welcomes"] < people:
        raise LoadError(f"only {came['welcomes']} of {people} people came back")
    figure = f"{came['connecting_cpu']:.2g} s of CPU, "
    figure += f"the last after {came['welcoming']:.2g} s"
    yield f"{people:,} people come back after a restart, MongoDB", figure
    yield "longest wait of a message meanwhile", milliseconds(longest)


def check_storage(chat, quick):
    """Store messages as fast as it goes, with the limits raised."""

    def measure(**settings) -> str:
        with start_chat(chat, people=8, **settings, **RAISED) as server:
            figures = run(server, n=8, s=8, w=8, a=0, d=1 if quick else 4)
        messages, each = figures["messages"], figures["cpu"] / figures["messages"]
        rate = f"{messages / figures['seconds']:,.0f} a second"
        return f"{rate}, {each * 1e6:,.0f} µs of CPU each"

    what = "messages, 8 × 8 in flight, 8 readers"
    yield f"{what}, in memory", measure()
    with mongodb() as uri:
        yield f"{what}, MongoDB", measure(MONGO_HOST=uri)


def check_idle(chat, quick):
    """Count the commands that an idle process sends to MongoDB, beside `hello`."""
    import pymongo

    seconds = 4 if quick else 10

    def counts() -> Counter:
        commands = client.admin.command("serverStatus")["metrics"]["commands"]
        ours = commands.keys() - {"<UNKNOWN>", "hello", "isMaster", "serverStatus"}
        return Counter({name: int(commands[name]["total"]) for name in ours})

    def count() -> str:
        time.sleep(3)  # until presence has settled
        before = counts()
        time.sleep(seconds)
        sent = counts() - before
        each = ", ".join(f"{name} {n / seconds:.2g}" for name, n in sent.items())
        return f"{sent.total() / seconds:.2g} commands a second ({each})"

    with contextlib.ExitStack() as stack:
        uri = stack.enter_context(mongodb())
        client = stack.enter_context(pymongo.MongoClient(uri))
        server = stack.enter_context(start_chat(chat, people=1, MONGO_HOST=uri))
        yield "an idle process, nobody connected, MongoDB", count()
        load = Load(server, n=1, s=0, i=1, a=0, d=seconds + 4)
        counted, used = count(), load.figures()
        share = f"{used['cpu'] / used['seconds']:.1%} of a core"
        yield "an idle process, one connected, MongoDB", f"{counted}, {share}"


CHECKS = {
    "flood": check_flood,
    "strangers": check_strangers,
    "restart": check_restart,
    "storage": check_storage,
    "idle": check_idle,
}
