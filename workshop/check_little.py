"""The checks of part A. They say what was expected and what came, never the answer."""

import contextlib
import inspect
import re
from unittest.mock import Mock, patch

from aiohttp import web

from workshop import scenarios
from workshop.judge import exercise, need, need_awaited, verdict
from workshop.people import as_sent, quiet
from workshop.scenarios import heard, need_order
from workshop.tiny import serving_little, stall_in


class trying:
    """Serve an attempt; what its handler raises, or forgets to await, is named."""

    def __init__(self, talk) -> None:
        self.block = serving_little(talk)

    async def __aenter__(self):
        self.server = await self.block.__aenter__()
        return self.server

    async def __aexit__(self, kind, error, traceback):
        complaints = self.server.complaints
        await self.block.__aexit__(kind, error, traceback)
        for line in complaints:
            returned = error and "Missing return" in line
            need(not returned, "Your handler has returned, and its connection ended.")
            keys = "The loop walks through the keys, WebSockets, whose `write` is"
            need("'WebSocketWriter.write'" not in line, f"{keys} a coroutine function.")
            need("Response.write'" not in line, f"{keys} a coroutine function.")
            need_awaited(line)
            _, raised, cause = line.partition("rror handling request")
            cause = cause.partition(": ")[2]
            if "type method is not" in cause:
                cause += ". A method is called with brackets: `name()`."
            ended = re.match("(Client)?Connection", cause)  # by the check
            need(not raised or error and ended, f"Your handler raised {cause}")


async def tell(person, text: str, nonce: str = "n-1", **more) -> None:
    """Send a message. The handler may have ended: what was heard will show that."""
    with contextlib.suppress(ConnectionError):
        await person.send(type="message", text=text, nonce=nonce, **more)
    await quiet(0.05)


def need_once(person, kind: str, what: str, besides: str = "") -> None:
    """Require that a person has heard of something once."""
    events = [e for e in person.heard if e.get("type") == kind]
    count = len([e for e in events if e.get("user") != besides or not besides])
    need(count < 2, f"{what}, and {person.title} heard it {count} times, not once.")


@exercise("talk")
async def echo(talk) -> None:
    async with trying(talk) as server:
        ann = await server.join("ann")
        for number in 1, 2:
            text, nonce = f"Echo {number}?", f"n-{number}"
            await tell(ann, text, nonce)
            event = {"type": "message", "text": text, "nonce": nonce}
            came = len(ann.heard)
            need(came <= number, f"{number} went in, {came} came back.")
            need(came == number, f"Frame {number} went in, and nothing came back.")
            back = as_sent(ann.heard[-1])
            need(back == event, f"The server sent {back!r} back, not {event}.")


@exercise("talk")
async def broadcast(talk) -> None:
    failed, send_json = [], web.WebSocketResponse.send_json

    async def noted(ws, *arguments, **more):
        try:
            await send_json(ws, *arguments, **more)
        except TypeError as error:
            failed.append(error)
            raise

    noted.__qualname__ = "send_json"
    async with trying(talk) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        with patch.object(web.WebSocketResponse, "send_json", noted):
            await tell(ann, "Anyone here?")
        hidden = "and `gather` hid it. Is a method called without brackets?"
        need(not failed, f"`send_json` raised {failed and failed[0]}, {hidden}")
        held = len(server.connections)
        need(held, "Ann and Bob are connected, and `connections` holds no one.")
        need(bob.heard, f"Bob heard nothing. `connections` holds {held} of two.")
        for person in ann, bob:
            count = len(person.heard)
            need(count == 1, f"Ann said one thing, and {person.title} heard {count}.")
        event = as_sent(bob.heard[0])
        right = isinstance(event, dict) and event.get("text") == "Anyone here?"
        need(right, f"Bob heard {event!r} instead of the event in the frame.")
        await tell(ann, "And now?", "n-2")
        count = len(bob.heard)
        need(count == 2, f"Ann said a second thing, and Bob has heard {count}, not 2.")


@exercise("talk")
async def no_ghosts(talk) -> None:
    held = "the server still holds her connection."
    async with trying(talk) as server:
        for leave in "disconnect", "break_off":
            eve = await server.join("eve")
            need(server.connections, "Eve is connected, and `connections` is empty.")
            await getattr(eve, leave)()
            await quiet(0.05)
            need(not server.connections, f"Eve has left, and {held}")
    async with serving_little(talk) as server:  # its handler has to raise here
        ann, eve = await server.join("ann"), await server.join("eve")
        await eve.ws.send_str("this is not JSON")
        await quiet(0.05)
        if not eve.reader.done():  # an attempt may pass over such a frame
            await eve.break_off()
            await quiet(0.05)
        raised = "Eve sent a frame that is not JSON, `frame.json()` raised, and"
        need(len(server.connections) < 2, f"{raised} {held}")
        need(
            server.connections, "Eve's connection ended, and Ann's was forgotten, too."
        )
        await tell(ann, "Still here?")
        need(ann.heard, "Eve has gone, and Ann can't speak any more.")
    async with serving_little(talk) as server:
        await server.join("eve")
        await server.stop()
        cancelled = "The server stopped: aiohttp cancelled Eve's handler, and"
        need(not server.connections, f"{cancelled} {held}")


async def come_speak_and_go(server, said: str, wanted: str) -> None:
    """Require what Bob hears when Ann comes, says something, and goes."""
    bob = await server.join("bob")
    need(bob.heard, "Bob came, and no `joined` was sent.")
    before = len(bob.heard)
    ann = await server.join("ann")
    await quiet(0.05)
    need(len(bob.heard) > before, "Ann came, and Bob heard nothing of it.")
    joined, expected = as_sent(bob.heard[-1]), {"type": "joined", "user": "ann"}
    need(joined == expected, f"Ann came, and Bob heard {joined}, not {expected}.")
    need_once(bob, "joined", "Ann came", besides="bob")
    await tell(ann, said)
    event = as_sent(bob.heard[-1])
    expected = {"type": "message", "text": wanted, "nonce": "n-1", "user": "ann"}
    need(
        event == expected, f"Ann said {said!r}, and Bob heard {event}, not {expected}."
    )
    need_once(bob, "message", f"Ann said {said!r}")
    await tell(ann, said, "n-2", user="bob")
    user = bob.heard[-1].get("user")
    forged = 'she had sent "user": "bob" along. The name from the address has to win.'
    need(user == "ann", f"Ann wrote, and the message says {user!r}: {forged}")
    before = len(bob.heard)
    await ann.break_off()
    await quiet(0.05)
    need(len(bob.heard) > before, "Ann has gone, and Bob heard no `left`.")
    left, expected = bob.heard[-1], {"type": "left", "user": "ann"}
    need(left == expected, f"Ann left, and Bob heard {left}, not {expected}.")
    need_once(bob, "left", "Ann left")


@exercise("talk")
async def names(talk) -> None:
    async with trying(talk) as server:
        await come_speak_and_go(server, "Hi", "Hi")


@exercise("talk")
async def me(talk) -> None:
    async with trying(talk) as server:
        await come_speak_and_go(server, "/me waves", "* ann waves")
    async with trying(talk) as server:
        eve = await server.join("eve")
        texts = {
            "/me says /me waves": "* eve says /me waves",
            "/me meets me": "* eve meets me",  # `strip` takes letters, not words
            **{text: text for text in ("hello", "what is /me for?", "/method", "/me")},
        }
        for number, (text, wanted) in enumerate(texts.items()):
            await tell(eve, text, f"n-{number}")
            came = [event.get("text") for event in eve.messages()]
            need(len(came) > number, f"Eve said {text!r}, and no message came.")
            need(came[-1] == wanted, f"{text!r} becomes {came[-1]!r}, not {wanted!r}.")


@exercise("talk")
async def history(talk) -> None:
    async with trying(talk) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        await tell(ann, "one")
        came = as_sent(ann.heard[-1])
        wanted = {"type": "message", "text": "one", "nonce": "n-1", "id": 1}
        wanted |= {"user": "ann"}
        need(came == wanted, f"Ann said 'one', and {came} came, not {wanted}.")
        await bob.break_off()
        await tell(ann, "two", "n-2", user="bob", id=7)
        two = ann.messages()[-1]
        won = "Ann had sent a `user` and an `id` along. Yours have to win, not"
        need(two["user"] == "ann" and two["id"] == 2, f"{won} {two}.")
        await ann.say("three")
        await bob.come_back(after=1)
        await heard(bob, 3)
        again = bob.texts().count("one")
        need(again == 1, "Bob said `after=1`, and heard number 1 once more.")
        again = len(ann.messages()) - 3
        need(not again, f"Ann heard {again} old ones again: replay to Bob alone.")
        need_order(bob, 3)
        eve = await server.join("eve")
        await heard(eve, 3)
        need_order(eve, 3)


async def passing(talk, *chosen) -> None:
    for scenario in chosen:
        async with trying(talk) as server:
            await scenario(server)


@exercise("talk")
async def nothing_between(talk) -> None:
    both = scenarios.come_back_while_they_talk, scenarios.come_back_and_miss_nothing
    await passing(talk, *both)


@exercise("talk")
async def receipt(talk) -> None:
    async with trying(talk) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        await tell(ann, "Pay 100 to Bob.")
        await heard(bob, 1, 1)
        wanted, got = {"type": "receipt", "id": 1, "nonce": "n-1"}, receipts(ann)
        others = [e for e in map(as_sent, ann.heard[1:]) if e not in bob.heard]
        need(got, f"Ann's message is stored, and no receipt came, but {others}.")
        need(got == [wanted], f"Ann got {got}, not one {wanted}.")
        need(not receipts(bob), "Bob got Ann's receipt: it is for its sender only.")
        await tell(ann, "Thank you.", "n-2")
        got = [event.get("id") for event in receipts(ann)]
        need(got == [1, 2], f"Ann said two things, and got receipts for {got}.")
    async with trying(talk) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        with scenarios.slow_network(0.02):
            for person in ann, bob:
                await person.send(type="message", text=person.name, nonce="n-1")
            await heard(ann, 2)
            await quiet(0.2)
        for person in ann, bob:
            own = [m["id"] for m in ann.messages() if m["text"] == person.name]
            name, last = person.title, "`messages[-1]` is another one's"
            need(own, f"{name}'s message was not broadcast: after an `await`, {last}.")
            got = [event.get("id") for event in receipts(person)]
            both = (
                f"Ann and Bob talk at once. {name}'s message has number {own[0]}, and"
            )
            need(got == own[:1], f"{both} the receipt says {got}: the list has grown.")


def receipts(person) -> list[dict]:
    return [event for event in person.heard if event["type"] == "receipt"]


@exercise("talk")
async def once(talk) -> None:
    await passing(talk, *scenarios.LOSING_NOTHING)


@exercise("talk")
async def typing(talk) -> None:
    async with trying(talk) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        with contextlib.suppress(ConnectionError):
            await ann.send(type="typing", user="bob")
        await quiet(0.05)
        notices = [event for event in bob.heard if event["type"] == "typing"]
        need(not server.messages, "A notice isn't a message: it should not be stored.")
        need(notices, "Ann is typing, and Bob heard nothing of it.")
        wanted = {"type": "typing", "user": "ann"}
        need(notices == [wanted], f"Bob heard {notices}, not one {wanted}.")
        need(
            not receipts(ann), "Ann got a receipt for a notice, which isn't a message."
        )
        number = (await ann.say("hi")).get("id")
        need(number == 1, f"After a notice, Ann's first message is number {number}.")
    await passing(talk, *scenarios.LOSING_NOTHING)


@exercise("talk")
async def waiting_for_nobody(talk) -> None:
    await passing(talk, *scenarios.LOSING_NOTHING, scenarios.stop_reading)


@exercise("broadcast", "talk")
async def bounded(talk) -> None:
    """Check a `broadcast` inside our handler, which calls it."""
    await passing(talk, *scenarios.LOSING_NOTHING)
    async with trying(talk) as server:
        ann, slow = await server.join("ann"), Mock()
        slow.get_write_buffer_size.return_value = 60_000
        server.connections["slow"] = slow
        await ann.say("Hello?")
        early = "It cuts off a transport for which 60,000 bytes wait, of 65,536."
        need(not slow.abort.called, early)
    async with trying(talk) as server:
        most = max(await stall_in(server), default=0)
        need(most < 200, f"For Bob, who does not read, {most:.0f} KiB wait, not 64.")
        cut = server.transports["bob"].is_closing()
        need(
            cut, "Bob is skipped, and stays connected: he never learns what he misses."
        )
        await quiet(0.1)
        ghosts = (
            "Bob is cut off, and still waits in `connections`: `close` sends first."
        )
        need(len(server.connections) == 1, ghosts)
    await passing(talk, scenarios.stop_reading)


# --- A scoreboard for the 24 lines ---
async def tried(talk) -> None:
    """Run every scenario on a handler, and print what holds."""
    lines = (
        inspect.getsource(talk).splitlines()
        + inspect.getsource(talk.__globals__["broadcast"]).splitlines()
    )
    print(
        f"{sum(bool(line.strip()) for line in lines) + 1} lines, with the collections:"
    )
    for scenario in scenarios.LOSING_NOTHING:
        said = await verdict(lambda talk, s=scenario: passing(talk, s), talk)
        print(said[0], scenario.__doc__, said[2:] if said[0] != "✓" else "")
