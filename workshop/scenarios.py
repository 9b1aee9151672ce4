"""Scenarios that a chat must pass to lose no message: a learner's chat, or ours.

The same scenarios run on a learner's 24 lines and on `chat.py`. A server has `join`,
which returns a person (people.py). A scenario that fails raises Lacking.
"""

import asyncio
import collections
import contextlib
import itertools
import json
from unittest.mock import patch

from aiohttp import web

from workshop.judge import Lacking, expect, need
from workshop.people import quiet, until


def need_order(person, count: int) -> None:
    """Require that a person has heard `count` messages in order, each of them once."""
    numbers = [event.get("id") for event in person.messages()]
    missing = [n for n in range(1, count + 1) if n not in numbers]
    need(not missing or not all(numbers), f"{person.title} never heard {missing}.")
    expect(f"{person.title} heard the numbers", numbers, [*range(1, count + 1)])


async def heard(person, count: int, seconds: float = 3) -> None:
    """Wait until a person has heard so many messages, or for a while in vain."""
    with contextlib.suppress(TimeoutError):
        await until(lambda: len(person.messages()) >= count, seconds)
    await quiet(0.05)  # is there one too many?


@contextlib.contextmanager
def slow_network(seconds: float):
    """Let each frame that a server sends take its time."""
    send = web.WebSocketResponse.send_str

    async def late(ws, *arguments, **more):
        await asyncio.sleep(seconds)
        await send(ws, *arguments, **more)

    with patch.object(web.WebSocketResponse, "send_str", late):
        yield


async def all_hear_the_same(server) -> None:
    """Everyone hears each message once, in the order of its numbers."""
    people = [await server.join(name) for name in ("ann", "bob", "eve")]
    await asyncio.gather(*(p.say(f"{n}") for p in people for n in range(5)))
    for person in people:
        await heard(person, 15)
        need_order(person, 15)
    texts = [person.texts() for person in people]
    need(texts[0] == texts[1] == texts[2], f"Three people read three chats: {texts}.")
    by = {event.get("user") for event in people[0].messages()}
    expect("Ann, Bob and Eve wrote. The messages say", by, {"ann", "bob", "eve"})


async def come_back_and_miss_nothing(server) -> None:
    """A reader that comes back hears what was said meanwhile, and nothing twice."""
    ann, bob = await server.join("ann"), await server.join("bob")
    await ann.say("one")
    await heard(bob, 1)
    await bob.break_off()
    for text in "two", "three":
        await ann.say(text)
    await bob.come_back(after=1)
    await ann.say("four")
    await heard(bob, 4)
    need_order(bob, 4)


async def come_back_while_they_talk(server) -> None:
    """What is said while a reader comes back does not fall between."""
    need_order(await come_back_slowly(server), 30)


async def come_back_slowly(server):
    """Let Bob come back on a slow network: while a frame is sent to him, Ann talks."""
    ann, bob = await server.join("ann"), await server.join("bob")
    await bob.break_off()
    bob.heard.clear()
    for number in range(1, 11):
        await ann.say(f"{number}")
    rest = iter(range(11, 31))

    async def talk_on() -> None:
        if text := str(next(rest, "")):
            with contextlib.suppress(ConnectionError):
                await ann.send(type="message", text=text, nonce=f"n-{text}")

    with slow_replay("bob", talk_on) as replaying:
        back = asyncio.create_task(bob.come_back(after=0))
        for _ in range(5):  # no frame is slow where the chat writes without waiting
            await ann.say(f"{next(rest)}")
        await back
        with contextlib.suppress(TimeoutError):
            joined = lambda: "joined" in [e["type"] for e in bob.heard]  # noqa: E731
            await until(lambda: not replaying or joined(), 2)
        for number in rest:
            await ann.say(f"{number}")
    await heard(bob, 30, seconds=1)
    return bob


@contextlib.contextmanager
def slow_replay(name: str, meanwhile):
    """Let something happen while a frame is sent to a person who comes back.

    It happens at most 8 times for messages, and once for each other frame, until the
    person has joined. Gives a list that is empty when they are connected.
    """
    sockets, sent, turn = [], [], collections.defaultdict(asyncio.Lock)
    odd = itertools.cycle([False, True])  # not at every message: a second look misses
    prepare, send = web.WebSocketResponse.prepare, web.WebSocketResponse.send_str

    async def note(ws, request):
        if request.query.get("name") == name:
            sockets.append(ws)
        return await prepare(ws, request)

    async def late(ws, data, *arguments, **more):
        kind = None
        with contextlib.suppress(ValueError, AttributeError):
            kind = json.loads(data).get("type")
        if ws in sockets and kind == "joined":
            sockets.remove(ws)
        async with turn[id(ws)]:  # frames don't overtake each other
            if ws in sockets and (
                kind != "message" or next(odd) and sent.count(kind) < 8
            ):
                sent.append(kind)
                await meanwhile()
                await quiet(0.03)
            await send(ws, data, *arguments, **more)

    both = {"prepare": note, "send_str": late}
    with patch.multiple(web.WebSocketResponse, **both):
        yield sockets


async def lose_a_receipt(server) -> None:
    """A message whose receipt was lost is sent again, and stored once."""
    ann, bob = await server.join("ann"), await server.join("bob")
    pay = "Pay 100 to Bob."
    await bob.say("Hello.")
    await ann.send(type="message", text=pay, nonce="n-1")
    await heard(bob, 2)
    await ann.break_off()
    await ann.come_back(after=0)
    receipt = await ann.say(pay, nonce="n-1")
    await quiet(0.05)
    expect("Ann sent it twice, with one nonce. Bob heard", bob.texts(), ["Hello.", pay])
    wanted = {"type": "receipt", "id": 2, "nonce": "n-1"}
    expect("The second time Ann got", receipt, wanted)
    await ann.say(pay, nonce="n-2")
    await heard(bob, 3, seconds=1)
    again = "Ann pays once more, with another nonce. Bob heard"
    expect(again, bob.texts(), ["Hello.", pay, pay])
    expect("Its number is", bob.messages()[-1].get("id"), 3)


async def repeat_at_once(server) -> None:
    """A message that comes again while it is still on its way is stored once."""
    ann, bob = await server.join("ann"), await server.join("bob")
    tab = await server.join("ann")
    message = {"type": "message", "text": "Pay 100 to Bob.", "nonce": "n-1"}
    with slow_network(0.03):
        await ann.send(**message)
        await tab.send(**message)
        await heard(bob, 1)
        await quiet(0.2)
    again = "While `broadcast` waited, the same message came again. Bob heard"
    expect(again, bob.texts(), ["Pay 100 to Bob."])


async def choose_the_same_nonce(server) -> None:
    """Two people who choose the same nonce are two people."""
    ann, bob = await server.join("ann"), await server.join("bob")
    one, two = await ann.say("one", nonce="n-1"), await bob.say("two", nonce="n-1")
    need(one["id"] != two["id"], "Bob's message was taken for Ann's: the same nonce.")
    await heard(ann, 2)
    need_order(ann, 2)


async def come_and_go(server) -> None:
    """People hear who joins and who leaves, however they leave."""
    bob = await server.join("bob")
    for leave in "disconnect", "break_off":
        ann = await server.join("ann")
        joined = await bob.next("joined")
        while joined["user"] == "bob":
            joined = await bob.next("joined")
        expect("Ann joined. Bob heard", joined, {"type": "joined", "user": "ann"})
        await getattr(ann, leave)()
        left = await bob.next("left", seconds=5)
        expect("Ann left. Bob heard", left, {"type": "left", "user": "ann"})


async def stop_reading(server, messages: int = 600) -> None:
    """A reader that stops reading delays no one, and misses nothing."""
    ann, bob, eve = [await server.join(name) for name in ("ann", "bob", "eve")]
    bob.reader.cancel()  # Bob's side reads no more
    try:
        for _ in range(messages):
            await ann.say("x" * 10_000)
    except TimeoutError:
        stood = f"After {len(eve.messages())} messages Ann stood still."
        raise Lacking(f"Bob stopped reading. {stood}") from None
    await heard(eve, messages)
    need_order(eve, messages)
    await bob.break_off()
    bob.heard.clear()
    await bob.come_back(after=0)
    await heard(bob, messages)
    need_order(bob, messages)


LOSING_NOTHING = [
    all_hear_the_same,
    come_back_and_miss_nothing,
    come_back_while_they_talk,
    lose_a_receipt,
    repeat_at_once,
    choose_the_same_nonce,
    come_and_go,
]
