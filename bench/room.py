"""What a room costs: a message, a delivery, and a process that only follows.

    python bench/room.py                              # in memory
    python bench/room.py --mongo-host 'mongodb://127.0.0.1/?replicaSet=rs0'

Starts the chat as it ships (real accounts, sessions and storage; only the rate limits
are raised), lets 8 people write with 8 messages each on their way, and has other
sockets read. The figure to trust is the CPU time of the server's process: it says the
same on a busy machine as on a quiet one. The load stays on this machine, and ends
after --seconds a round.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import aiohttp
import psutil
from yarl import URL

CHAT = Path(__file__).parent.parent / "chat.py"
LIMITS = {"MESSAGES_PER_SECOND": "1000000", "MESSAGE_BURST": "1000000"}
FORM = {"password": "correct horse", "password2": "correct horse"}


class Server:
    """A process of the chat, on the first core if there are several."""

    async def start(self, **environment):
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-u",
            CHAT,
            env=os.environ | LIMITS | {"PORT": "0"} | environment,
            stdout=asyncio.subprocess.PIPE,
        )
        while not (found := re.search(r"http://\S+:(\d+)", await self.line())):
            pass
        self.port, self.url = int(found[1]), found[0]
        self.usage = psutil.Process(self.process.pid)
        if os.cpu_count() > 1 and hasattr(self.usage, "cpu_affinity"):
            self.usage.cpu_affinity([0])
        return self

    async def line(self):
        line = await self.process.stdout.readline()
        return line.decode() or sys.exit("The chat did not start.")

    def cpu(self):
        times = self.usage.cpu_times()
        return times.user + times.system

    async def stop(self):
        self.process.terminate()
        await self.process.wait()


class Reader(asyncio.Protocol):
    """A socket that reads frames and only counts them."""

    frames = 0

    def __init__(self, cookie):
        self.cookie, self.rest, self.ready = cookie, b"", asyncio.Event()

    def connection_made(self, transport):
        self.transport = transport
        transport.write(
            b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: eHh4eHh4eHh4eHh4eHh4eA==\r\n"
            b"Cookie: " + self.cookie.encode() + b"\r\n\r\n"
        )

    def data_received(self, data):
        data, start = self.rest + data, 0
        if not self.ready.is_set():
            start = data.find(b"\r\n\r\n") + 4
            if start < 4:
                self.rest = data
                return
            self.ready.set()
        while len(data) >= start + 4:
            length, header = data[start + 1], 2
            if length == 126:
                length, header = int.from_bytes(data[start + 2 : start + 4], "big"), 4
            if len(data) < start + header + length:
                break
            Reader.frames += data[start] == 0x81
            start += header + length
        self.rest = data[start:]


class Sender:
    """Somebody with so many messages on their way at any time."""

    def __init__(self, ws, name, in_flight):
        self.ws, self.name, self.in_flight = ws, name, in_flight
        self.count, self.sent, self.delays = 0, {}, []

    async def send(self):
        self.count += 1
        nonce = f"{self.name} {self.count}"
        self.sent[nonce] = time.perf_counter()
        event = {"type": "message", "text": "x" * 64, "nonce": nonce}
        await self.ws.send_str(json.dumps(event))

    async def run(self, until):
        for _ in range(self.in_flight):
            await self.send()
        async for frame in self.ws:
            event = json.loads(frame.data)
            if event["type"] == "error":
                sys.exit(f"The chat refused a message: {event['text']}")
            if sent := self.sent.pop(event.get("nonce"), None):
                self.delays.append(time.perf_counter() - sent)
                if time.perf_counter() < until:
                    await self.send()
                elif not self.sent:
                    return


async def sign_in(server, session, name):
    await session.post(f"{server.url}/signin", data=FORM | {"login": name})
    cookies = session.cookie_jar.filter_cookies(URL(server.url))
    return "; ".join(f"{cookie.key}={cookie.value}" for cookie in cookies.values())


async def measure(server, servers, readers, senders, in_flight, seconds):
    """Run one round; return messages, deliveries, each server's CPU and the delays."""
    loop, run = asyncio.get_running_loop(), os.urandom(3).hex()
    async with aiohttp.ClientSession(
        cookie_jar=aiohttp.CookieJar(unsafe=True),
        connector=aiohttp.TCPConnector(limit=0),
    ) as session:
        cookie = await sign_in(server, session, f"bench-{run}")
        sockets = []
        for _ in range(readers):
            _, reader = await loop.create_connection(
                lambda: Reader(cookie), "127.0.0.1", server.port
            )
            sockets.append(reader)
        await asyncio.gather(*(reader.ready.wait() for reader in sockets))
        people = [
            Sender(await session.ws_connect(f"{server.url}/ws"), f"{run}{n}", in_flight)
            for n in range(senders)
        ]
        await asyncio.sleep(1)
        Reader.frames, before = 0, [one.cpu() for one in servers]
        until = time.perf_counter() + seconds
        await asyncio.gather(*(sender.run(until) for sender in people))
        await asyncio.sleep(1)
        used = [one.cpu() - cpu for one, cpu in zip(servers, before, strict=True)]
        messages = sum(sender.count for sender in people)
        deliveries = Reader.frames + messages * senders
        delays = sorted(delay for sender in people for delay in sender.delays)
        for reader in sockets:
            reader.transport.abort()
    return messages, deliveries, used, delays


def report(name, seconds, messages, deliveries, used, delays):
    p99 = delays[int(len(delays) * 0.99)] * 1000
    print(
        f"| {name} | {messages / seconds:,.0f} | {used * 1e6 / messages:,.0f} | "
        f"{used * 1e6 / deliveries:.2f} | {statistics.median(delays) * 1000:.1f} | "
        f"{p99:.1f} |",
        flush=True,
    )


async def main(options):
    if os.cpu_count() > 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(1, os.cpu_count()))
    print(f"{date.today()}, Python {platform.python_version()}, {platform.machine()}\n")
    print("| room | messages/s | µs/message | µs/delivery | p50 ms | p99 ms |")
    print("|---|---|---|---|---|---|")
    server = await Server().start(MONGO_HOST="")
    for readers in (0, options.readers // 10, options.readers):
        for senders, in_flight in ((1, 1), (8, 8)):
            name = f"in memory, {readers:,} readers, {senders} × {in_flight} in flight"
            counts = senders, in_flight, options.seconds
            messages, sent, used, delays = await measure(
                server, [server], readers, *counts
            )
            report(name, options.seconds, messages, sent, used[0], delays)
    await server.stop()
    if options.mongo_host:
        environment = {
            "MONGO_HOST": options.mongo_host,
            "MONGO_DB_NAME": f"bench-{os.urandom(4).hex()}",
            "SECRET_KEY": "any text",
        }
        servers = [await Server().start(**environment) for _ in range(2)]
        for senders, in_flight in ((1, 1), (8, 8)):
            messages, sent, used, delays = await measure(
                servers[0], servers, 0, senders, in_flight, options.seconds
            )
            name = f"on MongoDB, {senders} × {in_flight} in flight"
            report(name, options.seconds, messages, sent, used[0], delays)
            cost = used[1] * 1e6 / messages
            print(f"| … a second process, which follows | | {cost:,.0f} | | | |")
        for server in servers:
            await server.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mongo-host", default="", help="a replica set, to try it too")
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=5)
    asyncio.run(main(parser.parse_args()))
