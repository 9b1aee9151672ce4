"""The checks of part A. They say what came and what was expected, never the answer."""

import contextlib
import inspect
import re
from unittest.mock import Mock

from workshop import judge, scenarios
from workshop.judge import exercise, expect, need, scoreboard
from workshop.people import quiet
from workshop.scenarios import heard, need_order
from workshop.tiny import serving_little, stall_in


def trying(talk):
    return judge.trying(serving_little(talk), explain)


def explain(line: str, failure) -> str | None:
    """Say what a line of the log means. The check itself ends connections."""
    if failure and "Missing return" in line:
        return "Your handler has returned, and its connection ended."
    _, raised, cause = line.partition("rror handling request")
    cause = cause.partition(": ")[2]
    if not raised or failure and re.match("(Client)?Connection", cause):
        return None
    if "type method is not" in cause:
        cause += ". A method is called with brackets: `name()`."
    return f"Your handler raised {cause}"


async def tell(person, text: str, nonce: str = "n-1", **more) -> dict:
    """Send a message and return it. If the handler has ended, nothing will be heard."""
    event = {"type": "message", "text": text, "nonce": nonce}
    with contextlib.suppress(ConnectionError):
        await person.send(**event, **more)
    await quiet(0.05)
    return event


def all_of(person, *types: str) -> list:
    """Return what a person has heard, as it was sent; or only events of some types."""
    chosen = [event for event in person.heard if event["type"] in types or not types]
    return [event.get("raw", event) for event in chosen]


async def passing(talk, *chosen) -> None:
    for scenario in chosen:
        async with trying(talk) as server:
            await scenario(server)


@exercise("talk")
async def echo(talk) -> None:
    async with trying(talk) as server:
        ann, sent = await server.join("ann"), []
        for number in 1, 2:
            sent.append(await tell(ann, f"Echo {number}?", f"n-{number}"))
            expect(f"Ann sent {number}. She heard", all_of(ann), sent)


@exercise("talk")
async def broadcast(talk) -> None:
    async with trying(talk) as server:
        ann, bob = people = [await server.join(name) for name in ("ann", "bob")]
        held, sent = len(server.connections), []
        expect("Two have come. `connections` holds", held, 2)
        for number in 1, 2:
            sent.append(await tell(ann, f"Message {number}", f"n-{number}"))
            for person in people:
                said = f"Ann has said {number}. {person.title} heard"
                expect(said, all_of(person), sent)


@exercise("talk")
async def no_ghosts(talk) -> None:
    async with trying(talk) as server:
        for leave in "disconnect", "break_off":
            eve = await server.join("eve")
            expect("Eve has come. `connections` holds", len(server.connections), 1)
            await getattr(eve, leave)()
            await quiet(0.05)
            expect("Eve has left. `connections` holds", len(server.connections), 0)
    async with serving_little(talk) as server:  # its handler has to raise here
        ann, eve = await server.join("ann"), await server.join("eve")
        await eve.ws.send_str("this is not JSON")
        await quiet(0.05)
        if not eve.reader.done():  # an attempt may pass over such a frame
            await eve.break_off()
            await quiet(0.05)
        left = (
            "Eve sent what is not JSON, and `frame.json()` raised. `connections` holds"
        )
        expect(left, len(server.connections), 1)
        sent = await tell(ann, "Still here?")
        expect("Eve has gone. Ann spoke, and heard", all_of(ann), [sent])
    async with serving_little(talk) as server:
        await server.join("eve")
        await server.stop()
        cancelled = (
            "The server stopped, and aiohttp cancelled Eve's handler. Still held:"
        )
        expect(cancelled, len(server.connections), 0)


async def come_speak_and_go(server, said: str, wanted: str) -> None:
    """Require what Bob hears when Ann comes, says something, and goes."""
    bob = await server.join("bob")
    expect("Bob came, and heard", all_of(bob), [{"type": "joined", "user": "bob"}])
    ann = await server.join("ann")
    await quiet(0.05)
    expect("Ann came. Bob heard", all_of(bob)[1:], [{"type": "joined", "user": "ann"}])
    event = await tell(ann, said) | {"text": wanted, "user": "ann"}
    expect(f"Ann said {said!r}. Bob heard", all_of(bob)[2:], [event])
    event = await tell(ann, said, "n-2", user="bob") | {"text": wanted, "user": "ann"}
    forged = 'Ann sent "user": "bob" along; the name from the address has to win. Bob'
    expect(f"{forged} heard", all_of(bob)[3:], [event])
    await ann.break_off()
    await quiet(0.05)
    expect("Ann left. Bob heard", all_of(bob)[4:], [{"type": "left", "user": "ann"}])


@exercise("talk")
async def names(talk) -> None:
    async with trying(talk) as server:
        await come_speak_and_go(server, "Hi", "Hi")


@exercise("talk")
async def me(talk) -> None:
    async with trying(talk) as server:
        await come_speak_and_go(server, "/me waves", "* ann waves")
    texts = {
        "/me says /me waves": "* eve says /me waves",
        "/me meets me": "* eve meets me",  # `strip` takes letters, not words
        **{text: text for text in ("hello", "what is /me for?", "/method", "/me")},
    }
    async with trying(talk) as server:
        eve = await server.join("eve")
        for number, (text, wanted) in enumerate(texts.items()):
            await tell(eve, text, f"n-{number}")
            came = [event.get("text") for event in eve.messages()[number:]]
            expect(f"Eve said {text!r}. Everyone heard", came, [wanted])


@exercise("talk")
async def history(talk) -> None:
    async with trying(talk) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        one = await tell(ann, "one") | {"id": 1, "user": "ann"}
        expect("Ann said 'one'. She heard", all_of(ann)[2:], [one])
        await bob.break_off()
        forged = "Ann sent a `user` and an `id` along; yours have to win. She heard"
        two = await tell(ann, "two", "n-2", user="bob", id=7) | {"id": 2, "user": "ann"}
        expect(forged, all_of(ann, "message")[1:], [two])
        await ann.say("three")
        await bob.come_back(after=1)
        await heard(bob, 3)
        again = len(ann.messages()) - 3
        need(not again, f"Ann heard {again} old ones again: replay to Bob alone.")
        need_order(bob, 3)
        eve = await server.join("eve")
        await heard(eve, 3)
        need_order(eve, 3)


@exercise("talk")
async def nothing_between(talk) -> None:
    both = scenarios.come_back_while_they_talk, scenarios.come_back_and_miss_nothing
    await passing(talk, *both)


@exercise("talk")
async def receipt(talk) -> None:
    async with trying(talk) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        wanted = [{"type": "receipt", "id": n, "nonce": f"n-{n}"} for n in (1, 2)]
        for number in 1, 2:
            await tell(ann, f"Message {number}", f"n-{number}")
            got = [e for e in all_of(ann) if e not in all_of(bob)][
                1:
            ]  # not her `joined`
            expect(f"Ann said {number}. She alone heard", got, wanted[:number])
    async with trying(talk) as server:
        ann, bob = people = [await server.join(name) for name in ("ann", "bob")]
        with scenarios.slow_network(0.02):
            for person in people:
                await person.send(type="message", text=person.name, nonce="n-1")
            await heard(ann, 2)
            await quiet(0.2)
        for person in people:
            own = [m["id"] for m in ann.messages() if m["text"] == person.name]
            name = person.title
            need(own, f"Two talk at once, and {name}'s message was not broadcast.")
            got = [event.get("id") for event in all_of(person, "receipt")]
            both = "Two talk at once: while one waits, the list grows."
            expect(f"{both} {name}'s receipt says", got, own)


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
        wanted = [{"type": "typing", "user": "ann"}]
        expect("A notice isn't a message. Stored:", list(server.messages), [])
        expect("Ann is typing. Bob heard", all_of(bob)[1:], wanted)
        expect("Ann is typing. She heard", all_of(ann)[2:], wanted)
        number = (await ann.say("hi")).get("id")
        expect("After a notice, Ann's first message has the number", number, 1)
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
        ghosts = "Bob is cut off. (`close` would send first.) `connections` holds"
        expect(ghosts, len(server.connections), 1)
    await passing(talk, scenarios.stop_reading)


# --- A scoreboard for the 24 lines ---
async def tried(talk) -> None:
    """Run every scenario on a handler, and print what holds."""
    parts = map(inspect.getsource, (talk, talk.__globals__["broadcast"]))
    lines = [line for part in parts for line in part.splitlines() if line.strip()]
    print(f"{len(lines) + 1} lines, with the one that makes the collections:")
    await scoreboard(scenarios.LOSING_NOTHING, lambda scenario: passing(talk, scenario))
