"""The checks of the exercises. They say what an attempt lacks, and never the answer."""

import ast
import asyncio
import contextlib
import functools
import inspect
import re
import textwrap
import threading
import time
from types import FunctionType
from unittest.mock import Mock, patch

from aiohttp import web

from workshop import scenarios
from workshop.copies import NOTHING_NEW, NotAttempted, Page
from workshop.people import as_sent, patience, quiet
from workshop.scenarios import Lacking, Unable, heard, need, need_order
from workshop.tiny import fresh, functions_of, is_ours, little, page, stall_in, step

EDITED = (
    "  Later cells edit `{}`, which yours does not have. They use the notebook's own."
)
OURS = "  What follows uses the notebook's own solution, until yours passes."


# --- How a check is run ---
def is_stub(attempt) -> bool:
    """Return whether an attempt still has a `...` or a `…` to replace."""
    if isinstance(attempt, NotAttempted):
        return True
    if isinstance(attempt, FunctionType):
        return any(map(has_gap, functions_of(attempt)))
    return inspect.isclass(attempt) and has_gap(attempt)


def has_gap(thing) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, SyntaxError):  # made by other means than a cell
        return False
    subscripts = [node for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    hints = [node for one in subscripts for node in ast.walk(one.slice)]
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return any(node.value is Ellipsis and node not in hints for node in nodes)


async def verdict(function, *attempts, seconds: float = 20) -> str:
    """Run a check. Return what it says: nothing lacks where it begins with ✓."""
    for attempt in attempts:
        if isinstance(attempt, NotAttempted) and attempt.wrong:
            return attempt.wrong.replace("✗", "✗ Not yet.")
    if any(map(is_stub, attempts)):
        return "○ Not attempted yet: there is a gap to fill."
    said = "✓ Done."
    try:
        with no_sleep_of_a_thread() as slept:
            async with patience(seconds):
                await function(*attempts)
    except Unable as error:
        return f"○ {error}"
    except (Lacking, ConnectionError) as error:
        said = f"✗ Not yet. {error}"
    except TimeoutError as error:
        said = f"✗ Not yet. {str(error) or f'It takes more than {seconds} s.'}"
    except asyncio.CancelledError:
        if asyncio.current_task().cancelling():  # the cell itself is cancelled
            raise
        said = "✗ Not yet. It raised CancelledError, as awaiting a cancelled task does."
    except Exception as error:  # an attempt may raise anything
        said = f"✗ Not yet. It raised {type(error).__name__}: {error}"
    if slept:
        blocks = "`time.sleep` blocks the event loop, and everyone waits."
        return f"✗ Not yet. {blocks} Await `asyncio.sleep`."
    return said


@contextlib.contextmanager
def no_sleep_of_a_thread():
    """Note where an attempt lets the event loop sleep, which would stop the check."""
    slept, sleep = [], time.sleep

    def instead(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():
            slept.append(seconds)
        else:
            sleep(seconds)

    with patch.object(time, "sleep", instead):
        yield slept


def task(name: str, function: str = "talk", edited: str = ""):
    """Make a check of a step of part A. It returns what the notebook goes on with:

    the attempt if it passes, our own solution of that name if not, or if the attempt
    lacks a piece that later cells edit.
    """

    def decorate(check):
        @functools.wraps(check)
        async def run(*attempts):
            if is_ours(attempts[0]) or attempts[0] is page:  # run a second time
                attempts = (NOTHING_NEW,)
            said = await verdict(check, *attempts)
            passed = said.startswith("✓")
            print(said if passed else f"{said}\n{OURS}")
            if passed and edited and inspect.getsource(attempts[0]).count(edited) != 1:
                print(EDITED.format(edited))
            elif passed:
                return attempts[0]
            return step(name, function) if name else page

        return run

    return decorate


class trying:
    """Serve an attempt; what its handler raises, or forgets to await, is named."""

    def __init__(self, talk) -> None:
        self.block = little(talk)

    async def __aenter__(self):
        self.server = await self.block.__aenter__()
        return self.server

    async def __aexit__(self, kind, error, traceback):
        complaints = self.server.complaints
        await self.block.__aexit__(kind, error, traceback)
        for line in complaints:
            returned = error and "Missing return" in line
            need(not returned, "Your handler has returned, and its connection ended.")
            found = re.search(r"coroutine '(?:\w+\.)*(\w+)' was never awaited", line)
            need(
                not found or found[1] != "write",
                "This `write` is a WebSocket's, a coroutine function. What does your "
                "loop walk through: the keys, or the transports?",
            )
            need(not found, f"`{found and found[1]}` was called and never awaited.")
            _, raised, cause = line.partition("rror handling request")
            cause = cause.partition(": ")[2]
            if "type method is not" in cause:
                cause += ". A method is called with brackets: `name()`."
            if cause == "KeyError: 'nonce'":
                cause += ". A notice has none, and went on as if it were a message."
            if cause.startswith("KeyError: ("):
                cause += ". `numbers` does not have this key."
            ended = re.match("(Client)?Connection", cause)  # by the check
            need(not raised or error and ended, f"Your handler raised {cause}")


# --- Part A, step by step ---
@task("echo", edited="await ws.send_json")
async def echo(talk) -> None:
    async with trying(talk) as server:
        ann = await server.join("ann")
        for number in 1, 2:
            event = {
                "type": "message",
                "text": f"Echo {number}?",
                "nonce": f"n-{number}",
            }
            with contextlib.suppress(ConnectionError):  # has the handler ended?
                await ann.send(**event)
            await quiet(0.05)
            need(
                len(ann.heard) <= number,
                f"{number} went in, {len(ann.heard)} came back.",
            )
            need(
                ann.heard[number - 1 :],
                f"Frame {number} went in, and nothing came back.",
            )
            back = as_sent(ann.heard[number - 1])
            need(back == event, f"The server sent {back!r} back, not {event}.")


awaited = echo


@task("broadcast_ghosts")
async def broadcast(talk) -> None:
    async with trying(talk) as server:
        need_name(server, "connections")
        ann, bob = await server.join("ann"), await server.join("bob")
        failed, send_json = [], web.WebSocketResponse.send_json

        async def noted(ws, *arguments, **more):
            try:
                await send_json(ws, *arguments, **more)
            except TypeError as error:
                failed.append(error)
                raise

        noted.__qualname__ = "send_json"
        with patch.object(web.WebSocketResponse, "send_json", noted):
            await ann.send(type="message", text="Anyone here?", nonce="n-1")
            await quiet(0.05)
        hidden = "and `gather` hid it. Is a method called without brackets?"
        need(not failed, f"`send_json` raised {failed and failed[0]}, {hidden}")
        held = f"`connections` holds {len(server.connections)} of these two."
        need(bob.heard, f"Ann said something, and Bob heard nothing. {held}")
        count = len(ann.heard)
        need(count < 2, f"Ann said one thing, and heard her own words {count} times.")
        need(
            ann.heard,
            "Ann has to hear her own words, too: so she knows that they came.",
        )
        need(
            len(bob.heard) == 1, f"Ann said one thing, and Bob heard {len(bob.heard)}."
        )
        event = as_sent(bob.heard[0])
        right = isinstance(event, dict) and event.get("text") == "Anyone here?"
        need(right, f"Bob heard {event} instead of the event in the frame.")
        with contextlib.suppress(ConnectionError):  # has the handler ended?
            await ann.send(type="message", text="And now?", nonce="n-2")
        await quiet(0.05)
        count = len(bob.heard)
        need(count == 2, f"Ann said a second thing, and Bob has heard {count}.")


@task("broadcast")
async def no_ghosts(talk) -> None:
    async with trying(talk) as server:
        for leave in "disconnect", "break_off":
            guest = await server.join("eve")
            await getattr(guest, leave)()
            await quiet(0.05)
            ghosts = len(server.connections)
            need(
                not ghosts,
                f"Eve has left, and the server still holds her connection ({ghosts}).",
            )
    async with little(talk) as server:  # its handler has to raise here
        ann, eve = await server.join("ann"), await server.join("eve")
        await eve.ws.send_str("this is not JSON")
        await quiet(0.05)
        if not eve.reader.done():  # an attempt may pass over such a frame
            await eve.break_off()
            await quiet(0.05)
        need(
            len(server.connections) < 2,
            "Eve sent a frame that is not JSON. `frame.json()` raised, and what stands "
            "after the loop was never run.",
        )
        need(
            server.connections, "Eve's connection ended, and Ann's was forgotten, too."
        )
        await ann.send(type="message", text="Still here?", nonce="n-1")
        await quiet(0.05)
        need(ann.heard, "Eve has gone, and Ann cannot speak any more.")


@task("names", edited="event = frame.json()")
async def names(talk) -> None:
    async with trying(talk) as server:
        bob = await server.join("bob")
        need(bob.heard, "Bob came, but no `joined` was sent.")
        before = len(bob.heard)
        ann = await server.join("ann")
        await quiet(0.05)
        need(len(bob.heard) > before, "Ann came, and Bob heard nothing of it.")
        joined = as_sent(bob.heard[-1])
        wanted = {"type": "joined", "user": "ann"}
        need(joined == wanted, f"Ann came, and Bob heard {joined} instead of {wanted}.")
        need_once(bob, "joined", "Ann came", besides={"bob"})
        await ann.send(type="message", text="Hi", nonce="n-1")
        await quiet(0.05)
        said = as_sent(bob.heard[-1])
        right = isinstance(said, dict) and said.get("type") == "message"
        need(right, f"Ann said Hi, and Bob heard {said}.")
        need("user" in said, f"Bob heard {said}, which has no `user`: who wrote it?")
        need_once(bob, "message", "Ann said Hi")
        wrote = said["user"]
        need(wrote == "ann", f"Ann wrote, and the message says {wrote!r}.")
        wanted = {"type": "message", "text": "Hi", "nonce": "n-1", "user": "ann"}
        need(said == wanted, f"Bob heard {said} instead of {wanted}.")
        await ann.send(type="message", text="Hi", nonce="n-2", user="bob")
        await quiet(0.05)
        said = bob.heard[-1]
        need(
            said["user"] == "ann",
            f"Ann wrote, and the message says {said['user']}: she had sent "
            '"user": "bob" along. The name from the address has to win.',
        )
        await ann.break_off()
        await quiet(0.05)
        left, wanted = bob.heard[-1], {"type": "left", "user": "ann"}
        need(left != said, "Ann has gone, but no `left` was sent.")
        need(left == wanted, f"Ann left, and Bob heard {left} instead of {wanted}.")
        need_once(bob, "left", "Ann left")


def need_name(server, name: str) -> None:
    need(hasattr(server, name), f"Keep the name `{name}`: later cells look at it.")


def need_once(person, kind: str, what: str, besides: set | tuple = ()) -> None:
    """Require that a person has heard of something once."""
    events = [e for e in person.heard if e.get("type") == kind]
    count = len([e for e in events if e.get("user") not in besides])
    need(count < 2, f"{what}, and {person.title} heard it {count} times.")


# The ways to show `text`: as what is assigned, or as what is called with it.
TEXT = r"""(text|String\(text\)|text\.toString\(\)|`\$\{text\}`|""\ \+\ text
    |text\ \+\ ""|\(text\)|new\ Text\(text\))"""
SHOWN = rf"""\bwords(\.|\[['"])(textContent|innerText)(['"]\])?\s*\+?=\s*{TEXT}\s*(;|$)
|\bwords\.(append|prepend|replaceChildren)\((document\.createTextNode\()?{TEXT}\)
|\bwords\.appendChild\((document\.createTextNode|new\ Text)\({TEXT}\)
|\bwords\.insertAdjacentText\([^,]*,\s*{TEXT}\)"""


@task("")
async def as_text(mine) -> None:
    need(isinstance(mine, Page), "It should be a page: what `edit` returns.")
    before = page.splitlines()
    new = [line.strip() for line in mine.splitlines() if line not in before]
    new = [re.sub("(^| )//.*", "", line) for line in new]
    markup = re.search("innerHTML|outerHTML|insertAdjacentHTML", "".join(new))
    need(not markup, f"`{markup and markup[0]}` reads the text as markup.")
    if mine != page:
        need(" ".join(new).strip("; "), "Nothing shows the text now.")
        shown = re.search(SHOWN, "\n".join(new), re.VERBOSE | re.MULTILINE)
        unknown = "it knows `words.textContent = text` and `words.append(text)`."
        need(shown, f"The check can't tell what `{new[0]}` shows: {unknown}")


@task("me", "me")
async def me(attempt) -> None:
    actions = {
        ("ann", "/me waves"): "* ann waves",
        ("eve", "/me waves"): "* eve waves",
        ("ann", "/me says /me waves"): "* ann says /me waves",
        ("eve", "/me meets me"): "* eve meets me",  # `strip` takes letters, not words
    }
    texts = "hello", "what is /me for?", "/method", "/me"
    for name, text in [*actions, *(("ann", text) for text in texts)]:
        event = {"type": "message", "text": text, "nonce": "n-1"}
        back = attempt(name, dict(event))
        need(isinstance(back, dict), f"It should return an event, not {back!r}.")
        got = back.get("text")
        if wanted := actions.get((name, text)):
            need(got == wanted, f"Bob should hear {wanted!r}, not {got!r}.")
        else:
            need(got == text, f"{text!r} is an ordinary message, not {got!r}.")
        rest = back | {"text": text} == event
        need(rest, f"Only the text should change; it returned {back}.")


@task("history_slice")
async def history(talk) -> None:
    async with trying(talk) as server:
        need_name(server, "messages")
        ann, bob = await server.join("ann"), await server.join("bob")
        await ann.send(type="message", text="one", nonce="n-1")
        await heard(ann, 1, seconds=1)
        odd = as_sent(ann.heard[-1])
        need(ann.messages(), f"Ann said one, and no message came, but {odd}.")
        one = ann.messages()[0]
        need(one.get("id") == 1, "The first message should have `id` 1.")
        need(one.get("user") == "ann", f"Ann said one, and Bob hears {one}.")
        await bob.break_off()
        forged = {"user": "bob", "id": 7}
        await ann.send(type="message", text="two", nonce="n-2", **forged)
        await heard(ann, 2, seconds=1)
        two = {name: ann.messages()[-1].get(name) for name in forged}
        won = f"Ann had sent {forged} along. Her message has {two}: yours have to win."
        need(two["user"] != "bob" and two["id"] != 7, won)
        await ann.say("three")
        await bob.come_back(after=1)
        await heard(bob, 3)
        again = bob.texts().count("one")
        need(again == 1, "Bob said `after=1`, and was told number 1 once more.")
        again = len(ann.messages()) - 3
        need(not again, f"Ann heard {again} old ones again: replay to Bob alone.")
        need_order(bob, 3)
        eve = await server.join("eve")
        await heard(eve, 3)
        need_order(eve, 3)


@task("history")
async def nothing_between(talk) -> None:
    async with trying(talk) as server:
        await scenarios.come_back_while_they_talk(server)
    async with trying(talk) as server:
        await scenarios.come_back_and_miss_nothing(server)


USUAL = "joined", "left", "message", "receipt"


@task("receipts_twice")
async def receipt(talk) -> None:
    async with trying(talk) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        await ann.send(type="message", text="Pay 100 to Bob.", nonce="n-1")
        await heard(bob, 1, 1)
        got = [event for event in ann.heard if event["type"] == "receipt"]
        odd = [as_sent(e) for e in ann.heard if e["type"] not in USUAL]
        odd = f" Ann heard {odd[0]!r}." if odd else ""
        need(got, f"Ann's message is stored, and no receipt came.{odd}")
        wanted = {"type": "receipt", "nonce": "n-1", "id": 1}
        need(got == [wanted], f"Ann got {got} instead of one {wanted}.")
        await quiet(0.05)
        others = [event for event in bob.heard if event["type"] == "receipt"]
        need(not others, "Bob got Ann's receipt: it is for its sender only.")
        await ann.send(type="message", text="Thank you.", nonce="n-2")
        await heard(bob, 2, 1)
        got = [event["id"] for event in ann.heard if event["type"] == "receipt"]
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
            number = own[0]
            got = [e["id"] for e in person.heard if e["type"] == "receipt"]
            need(
                got == [number],
                f"Ann and Bob talk at once. {name}'s message has number {number}, and "
                f"the receipt says {got}: `broadcast` waits, and meanwhile the list "
                "grows.",
            )


@task("receipts", edited="            event = frame.json()\n")
async def once(talk) -> None:
    for scenario in scenarios.LOSING_NOTHING:
        async with trying(talk) as server:
            await scenario(server)


@task("typing")
async def typing(talk) -> None:
    async with trying(talk) as server:
        ann, bob = await server.join("ann"), await server.join("bob")
        await ann.send(type="typing", user="bob")
        await quiet(0.05)
        notices = [event for event in bob.heard if event["type"] == "typing"]
        need(not server.messages, "A notice isn't a message: it should not be stored.")
        need(notices, "Ann is typing, and Bob hears nothing of it.")
        wanted = {"type": "typing", "user": "ann"}
        need(notices == [wanted], f"Bob heard {notices} instead of one {wanted}.")
        receipts = [event for event in ann.heard if event["type"] == "receipt"]
        need(not receipts, "Ann got a receipt for a notice, which isn't a message.")
        need((await ann.say("hi"))["id"] == 1, "After a notice, messages fail.")
    for scenario in scenarios.LOSING_NOTHING:
        async with trying(talk) as server:
            await scenario(server)


@task("writes_unbounded")
async def waiting_for_nobody(talk) -> None:
    for scenario in scenarios.LOSING_NOTHING + scenarios.WAITING_FOR_NOBODY:
        async with trying(talk) as server:
            await scenario(server)


async def bounded(broadcast, talk):
    """Check a `broadcast` inside the handler that calls it."""
    return await check_bound(fresh(talk, broadcast=broadcast, __name__="__main__"))


@task("writes")
async def check_bound(talk) -> None:
    for scenario in scenarios.LOSING_NOTHING:
        async with trying(talk) as server:
            await scenario(server)
    async with trying(talk) as server:
        ann, slow = await server.join("ann"), Mock()
        slow.get_write_buffer_size.return_value = 60_000
        server.connections["slow"] = slow
        await ann.say("Hello?")
        early = "It cuts off a transport for which 60,000 bytes wait, of 65,536."
        need(not slow.abort.called, early)
    async with trying(talk) as server:
        kibibytes = max(await stall_in(server), default=0)
        need(kibibytes < 200, f"For Bob, who does not read, {kibibytes:.0f} KiB wait.")
        cut = server.transports["bob"].is_closing()
        need(
            cut, "Bob is skipped, and stays connected: he never learns what he misses."
        )
        await quiet(0.1)
        ghosts = (
            "Bob is cut off, and still waits in `connections`: `close` sends first."
        )
        need(len(server.connections) == 1, ghosts)
    async with trying(talk) as server:
        await scenarios.stop_reading(server)


# --- A scoreboard for the 24 lines ---
async def tried(talk, *more) -> None:
    """Run every scenario on a handler, and print what holds."""
    source = [
        line for f in functions_of(talk) for line in inspect.getsource(f).split("\n")
    ]
    count = sum(bool(line.strip()) for line in source) + 1
    print(f"{count} lines, with the one that makes the empty collections:")
    for scenario in (*scenarios.LOSING_NOTHING, *more):

        async def run(talk, scenario=scenario):
            async with trying(talk) as server:
                await scenario(server)

        said = await verdict(run, talk)
        print(said[0], scenario.__doc__, said[2:] if said[0] != "✓" else "")


from workshop.checks_chat import *  # noqa: E402, F403
