"""People who use a chat from the notebook, through the same doors as a browser.

They wait in turns of the event loop. On a busy machine a second may pass before a task
has had its turn; a check that counts seconds would blame the attempt for it. But a turn
that computes for long counts as long as it computes.
"""

import asyncio
import contextlib
import json
import time

import aiohttp
from bson import ObjectId

PASSWORD = "correct horse"
TURN = 0.01  # seconds that a turn takes at least
ENDS = {1000: "your handler has returned", 1002: "a frame was wrong", 1006: "cut off"}


async def quiet(seconds: float = 0.3) -> None:
    """Give everyone time to hear what is on its way."""
    passed, computed = 0, time.process_time()
    while passed < seconds:
        await asyncio.sleep(TURN)
        before, computed = computed, time.process_time()
        passed += max(TURN, computed - before)


@contextlib.asynccontextmanager
async def patience(seconds: float):
    """Limit a block as `asyncio.timeout` does, in turns. Raises TimeoutError."""

    async def expire() -> None:
        await quiet(seconds)
        limit.reschedule(0)  # a time that has passed

    async with asyncio.timeout(None) as limit:
        clock = asyncio.create_task(expire())
        try:
            yield
        finally:
            clock.cancel()


async def until(condition, seconds: float = 3) -> None:
    """Wait until a condition holds. Raises TimeoutError."""
    async with patience(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(TURN)


class Client:
    """One WebSocket at a time, and everything that was heard on it."""

    def __init__(self, url: str, name: str = "") -> None:
        self.name, self.title = name, name.capitalize()  # the start of a sentence
        self.heard, self.receipts = [], {}
        self.events, self.reader, self.ws = asyncio.Queue(), None, None
        jar = aiohttp.CookieJar(unsafe=True)  # `unsafe`: keep cookies of 127.0.0.1
        self.session = aiohttp.ClientSession(url, cookie_jar=jar)

    async def open(self, path: str, **more) -> None:
        await self.disconnect()
        brief = aiohttp.ClientWSTimeout(ws_close=0.5)  # a server may stand still
        self.ws = await self.session.ws_connect(path, timeout=brief, **more)
        self.reader = asyncio.create_task(self.read())

    async def read(self) -> None:
        async for frame in self.ws:
            if frame.type is aiohttp.WSMsgType.ERROR:  # the bytes are not a valid frame
                return
            event = json.loads(frame.data)
            known = isinstance(event, dict) and "type" in event
            self.hear(event if known else {"type": "", "raw": event})

    def hear(self, event: dict) -> None:
        self.heard.append(event)
        self.events.put_nowait(event)
        receipt = event.get("type") in ("receipt", "error")
        waiting = receipt and self.receipts.pop(event.get("nonce"), None)
        if waiting and not waiting.done():
            waiting.set_result(event)

    async def next(self, *types: str, seconds: float = 3) -> dict:
        """Return the next event, or the next of some types. Raises TimeoutError."""
        try:
            async with patience(seconds):
                while True:
                    event = await self.events.get()
                    if not types or event["type"] in types:
                        return event
        except TimeoutError:
            wanted = " or ".join(types) or "event"
            waited = f"{self.title} waited {seconds:g} s for a {wanted}, in vain."
            raise TimeoutError(waited) from None

    async def send(self, **event) -> None:
        """Send an event. Raises ConnectionError, which says how it ended."""
        try:
            await self.ws.send_json(event)
        except ConnectionError:
            how = ENDS.get(self.ws.close_code, self.ws.close_code)
            ended = f"{self.title}'s connection has ended: {how}."
            raise ConnectionError(ended) from None

    async def say(self, text: str, nonce: str = "", seconds: float = 3) -> dict:
        """Say something; return the receipt, or the error. Raises TimeoutError."""
        nonce = nonce or str(ObjectId())
        receipt = asyncio.get_running_loop().create_future()
        self.receipts[nonce] = receipt
        await self.send(type="message", text=text, nonce=nonce)
        try:
            async with patience(seconds):
                return await receipt
        except TimeoutError:
            waited = f"{self.title} waited {seconds:g} s for the receipt of {text!r}"
            raise TimeoutError(f"{waited}, in vain.") from None

    def messages(self) -> list[dict]:
        """Return all messages that this person has heard, in order."""
        return [event for event in self.heard if event["type"] == "message"]

    def texts(self) -> list[str]:
        return [event["text"] for event in self.messages()]

    async def break_off(self) -> None:
        """Lose the connection without a word, as a phone in a tunnel does."""
        if connection := self.ws._response.connection:
            connection.transport.abort()
        await self.disconnect()

    async def disconnect(self) -> None:
        if self.reader:
            await self.ws.close()
            self.reader.cancel()
            await asyncio.gather(self.reader, return_exceptions=True)
            self.reader = None

    async def close(self) -> None:
        await self.disconnect()
        await self.session.close()


class Person(Client):
    """A user of `chat.py`, with a browser's cookies."""

    async def post(self, path: str, **form) -> tuple[int, str]:
        """Send a form; return the status, before any redirect, and the page."""
        async with self.session.post(path, data=form, allow_redirects=False) as answer:
            return answer.status, await answer.text()

    async def sign_in(self) -> None:
        """Create an account; where there is one already, sign in with it."""
        both = {"login": self.name, "password": PASSWORD}
        status, _ = await self.post("/signin", **both, password2=PASSWORD)
        if status != 303:
            status, _ = await self.post("/login", **both)
        if status != 303:
            raise RuntimeError(f"{self.name} could not sign in: {status}")

    @property
    def cookie(self) -> tuple[str, str]:
        """The session as a browser keeps it: the cookie's name and value."""
        cookie = next(iter(self.session.cookie_jar))
        return cookie.key, cookie.value

    async def connect(self, path: str = "/ws", **more) -> "Person":
        """Open a WebSocket and wait until it is live."""
        await self.open(path, **more)
        await self.next("welcome")
        return self

    async def come_back(self, after: int) -> None:
        """Connect again, and say the number of the last message seen."""
        await self.connect(f"/ws?after={after}")

    @property
    def is_connected(self) -> bool:
        return self.reader is not None and not self.reader.done()

    async def peek(self, path: str, **more) -> dict | int:
        """Return the first event of a new WebSocket, or the status that refuses it."""
        try:
            async with self.session.ws_connect(path, **more) as ws:
                return await ws.receive_json(timeout=3)
        except aiohttp.WSServerHandshakeError as refusal:
            return refusal.status
