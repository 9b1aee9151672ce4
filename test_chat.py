"""Tests of the chat, in the order of chat.py's sections; each name is a claim.

    python -m pytest test_chat.py

What the chat promises holds in memory and on a real MongoDB, so most tests run on both.
A test that needs a MongoDB that is not installed is skipped, and fails in CI.
"""

import asyncio
import base64
import contextlib
import json
import logging
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request

import aiohttp
import pymongo
import pytest
from aiohttp.test_utils import TestClient, unused_port
from bson import DatetimeMS, Decimal128, Int64, ObjectId
from cryptography.fernet import Fernet

import chat
from tests.parts import (
    KEY,
    PASSWORD,
    ROOT,
    Server,
    can_connect,
    closed,
    connect,
    form,
    on,
    read,
    say,
    send,
    send_only,
    shown_ids,
    sign_in,
    until,
    wait_for,
)  # fmt: skip

EVE = {"_id": ObjectId(), "name": "eve"}  # a user who writes without a socket
ORIGIN = "https://chat.example"


@pytest.fixture
async def memory(serve):
    """The chat with its default settings."""
    return await serve(chat.Settings())


async def connect_two(server):
    return [await connect(await sign_in(server, name)) for name in ("ann", "bob")]


async def fill(server, count, text="text {}"):
    """Store messages of Eve's, numbered from 1, and wait until all were broadcast."""
    room = server.app[chat.ROOM]
    for number in range(1, count + 1):
        await chat.post(room, EVE, text.format(number), f"{number}")
    await until(lambda: room.history.last == count)


def passwords(text):
    return {"password": text, "password2": text}


def sockets_of(server, name):
    return [s for s in server.app[chat.ROOM].sockets if s.user["name"] == name]


async def edit(server, number, **fields):
    """Change a stored message, as an operator would."""
    db, after = server.app[chat.ROOM].db, {"return_document": True}
    query = db.messages.find_one_and_update({"_id": number}, {"$set": fields}, **after)
    await (query if db.shared else db.edit("update", query))


async def delete_ann(server):
    db = server.app[chat.ROOM].db
    query = db.users.find_one_and_delete({"name": "ann"})
    await (query if db.shared else db.edit("delete", query))


async def heard_until(nonce, ws):
    """Return all events up to the message with this nonce."""
    heard = [await read(ws)]
    while (heard[-1]["type"], heard[-1].get("nonce")) != ("message", nonce):
        heard.append(await read(ws))
    return heard


async def raw_request(server, line, *headers, body=b""):
    """Send bytes as they are; return all that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    start = [line + b" HTTP/1.1", b"Host: localhost", b"Connection: close", *headers]
    writer.write(b"\r\n".join(start) + b"\r\n\r\n" + body)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


# ==============================================================================
# 1. Settings
# ==============================================================================
def test_environment_wins_over_env_file(monkeypatch, tmp_path):
    """The file may have a byte order mark, quotes, and settings of other programs."""
    text = "\ufeffPORT=1234\nEDITOR=vi\n# a comment\n\nMONGO_DB_NAME='quoted'\n"
    (tmp_path / ".env").write_text(text)
    monkeypatch.setenv("PORT", "4321")
    settings = chat.Settings(_env_file=tmp_path / ".env")
    assert (settings.PORT, settings.MONGO_DB_NAME) == (4321, "quoted")


def test_example_has_every_setting_with_its_default_in_order():
    lines = (ROOT / ".env.example").read_text().splitlines()
    assignments = [line for line in lines if line and not line.startswith("#")]
    defaults = chat.Settings().model_dump()
    assert [line.partition("=")[0] for line in assignments] == list(defaults)
    values = [line.partition("=")[2].lower() for line in assignments]
    assert values == [str(default).lower() for default in defaults.values()]


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run the chat until it would serve; return its exit code, output and errors."""
    monkeypatch.setattr(chat, "run", lambda *_: 0)

    def run_main(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        try:
            code = chat.main()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run_main


WRONG = [
    "LOG_REQUESTS=perhaps", "SITE_HOST=", "PORT=http", "PORT=-1", "PORT=65536",
    "ORIGIN=chat.example", "ORIGIN=https://chat.example/path", "ORIGIN=https://[",
    "ORIGIN=https://chat.example?a=b", "ORIGIN=ws://chat.example", "MESSAGE_BURST=0",
    "MAX_MESSAGE_LENGTH=0", "MAX_MESSAGE_LENGTH=10001", "MESSAGES_PER_SECOND=0.5",
    "CONNECTIONS_PER_PERSON=0", "LOGIN_ATTEMPTS=nan", "MAX_UNSENT_BYTES=1",
    "MONGO_DB_NAME=a.b", "MONGO_DB_NAME=", "SECRET_KEY=a", "SECRET_KEY=" + 31 * "x",
]  # fmt: skip


@pytest.mark.parametrize("assignment", WRONG)
def test_wrong_setting_is_one_line_with_its_name(run_main, assignment):
    name, _, value = assignment.partition("=")
    code, output, errors = run_main(**{name: value})
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"chat: {name}: ")


def test_mongodb_needs_a_secret_key_and_the_line_says_how_to_make_one(run_main):
    """All wrong settings are told at once, and no password is."""
    assert run_main() == (0, "", "")
    code, _, errors = run_main(MONGO_HOST="mongodb://ann:s3cret@localhost", PORT="x")
    assert (code, errors.count("\n")) == (2, 2) and "SECRET_KEY: " in errors
    assert "PORT: " in errors and "s3cret" not in errors
    program = re.search('python -c "(.+)"', errors)[1]
    key = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert run_main(SECRET_KEY=key.strip(), PORT="1") == (0, "", "")


def test_old_names_are_told_if_the_env_file_has_them(monkeypatch, run_main, tmp_path):
    """In the environment they are not ours: conda exports HOST, Node's users DEBUG."""
    assert run_main(HOST="x86_64-conda-linux-gnu", DEBUG="app:*") == (0, "", "")
    (tmp_path / ".env").write_text("HOST=0.0.0.0\nDEBUG=true\nEDITOR=vi\n")
    monkeypatch.setitem(chat.Settings.model_config, "env_file", tmp_path / ".env")
    code, output, errors = run_main()
    first, second = sorted((output + errors).splitlines())
    assert code == 0 and "DEBUG" in first and "LOG_REQUESTS" in first
    assert "HOST" in second and "SITE_HOST" in second


def test_env_file_that_is_no_text_is_one_line(monkeypatch, run_main, tmp_path):
    (tmp_path / ".env").write_bytes(b"PORT=\xff\xfe")
    monkeypatch.setitem(chat.Settings.model_config, "env_file", tmp_path / ".env")
    assert run_main() == (2, "", "chat: .env must be a text file in UTF-8\n")


SPELLINGS = {
    "HTTPS://Chat.Example:443/": "https://chat.example",
    "http://chat.example:80": "http://chat.example",
    "https://chat.example:8443": "https://chat.example:8443",
    "https://bücher.example": "https://xn--bcher-kva.example",
    "http://[::1]:8080/": "http://[::1]:8080",
}


@pytest.mark.parametrize("typed", SPELLINGS)
def test_origin_is_kept_as_browsers_send_it(typed):
    assert SPELLINGS[typed] == chat.Settings(ORIGIN=typed).ORIGIN


def test_inline_metadata_says_what_requirements_say():
    source = (ROOT / "chat.py").read_text()
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#.*$\s)+)^# ///$", source)
    inline = re.findall(r'^# *"(.+)",', block["content"], re.MULTILINE)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert sorted(inline) == sorted(line for line in lines if line[0] != "#")
    assert 'requires-python = ">=3.11"' in block["content"]


# ==============================================================================
# 2. Middlewares
# ==============================================================================
async def test_anonymous_visitor_is_sent_to_login_and_a_script_gets_our_401(server):
    """A script follows no redirect; and gateways answer 401 too, so we name ours."""
    visitor = await server.visitor()
    for method, path in ("GET", "/"), ("POST", "/signout"):
        response = await visitor.request(method, path, allow_redirects=False)
        assert (response.status, response.headers["Location"]) == (303, "/login")
    response = await visitor.get("/ws", allow_redirects=False)
    assert response.status == 401
    assert response.headers["WWW-Authenticate"] == 'Cookie realm="chat"'


async def test_unknown_url_is_a_404_with_and_without_a_session(server):
    for visitor in (await server.visitor(), await sign_in(server)):
        for path in "/nothing", "/login/more", "/static/nothing", "/ws/", "/%ff%00":
            assert (await visitor.get(path)).status == 404
    assert (await visitor.get("/static/%2e%2e/chat.py")).status in {403, 404}
    assert (await visitor.get("/signout")).status == 405


async def test_pipelined_requests_let_others_run_between_each_two(settings):
    """1,500 requests in one piece once held everyone's messages for 0.8 s."""
    app, turns, answered = chat.init_app(settings), 0, []

    async def note(request, response):
        answered.append(turns)

    def turn():
        nonlocal turns
        turns += 1
        if len(answered) < 40:
            asyncio.get_running_loop().call_soon(turn)

    app.on_response_prepare.append(note)
    kinds = ("/login", "localhost"), ("/nothing", "localhost"), ("/", "localhost")
    kinds += ("/login", "evil.example"), ("/static/chat.css", "localhost")
    lines = [f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n" for path, host in kinds]
    async with Server(app) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write("".join(8 * lines).encode())
        turn()
        await until(lambda: len(answered) == 40)
        writer.close()
    assert len(set(answered)) == 40  # each in a turn of its own


async def test_with_origin_set_no_header_of_a_proxy_matters(serve):
    """Only the browser's Origin counts, not what a proxy writes or forgets."""
    visitor = await (await serve(chat.Settings(ORIGIN=ORIGIN))).visitor()
    options = {"allow_redirects": False, "headers": {"Origin": ORIGIN}}
    response = await visitor.post("/signin", data=form("ann"), **options)
    cookie = response.headers["Set-Cookie"].partition(";")[0]  # for https only
    for host in "chat.example:443", "10.0.0.7:8080", "evil.example":
        headers = {"Host": host, "Origin": ORIGIN, "Cookie": cookie}
        headers |= {"X-Forwarded-Host": "chat.example, proxy", "X-Forwarded-Proto": "x"}
        ws = await visitor.ws_connect("/ws", headers=headers)
        assert (await read(ws, "welcome"))["user"] == "ann"
        options["headers"] = headers
        response = await visitor.post("/login", data=form("ann"), **options)
        assert response.status == 303
        policy = response.headers["Content-Security-Policy"]
        assert policy.endswith("; frame-ancestors 'self'")


OTHERS = [(set_to, origin) for set_to, origins in {
    "": ("http://127.0.0.1:1", "http://user@127.0.0.1:{port}@evil.example", "évil",
         "http://127.0.0.1:{port}.evil.example", "http://evil.example", "null", ""),
    ORIGIN: ("http://chat.example", "https://chat.example:8443", "null", "",
             "https://chat.example.evil.example", "http://127.0.0.1:{port}"),
}.items() for origin in origins]  # fmt: skip


@pytest.mark.parametrize(("set_to", "origin"), OTHERS)
async def test_other_origin_is_refused_and_told_ours(serve, caplog, set_to, origin):
    server = await serve(chat.Settings(ORIGIN=set_to))
    visitor, own = await server.visitor(), set_to or f"127.0.0.1:{server.port}"
    headers = {"Origin": origin.format(port=server.port)}
    for path in "/login", "/signin", "/signout":
        response = await visitor.post(path, data=form("eve"), headers=headers)
        assert response.status == 403 and own in await response.text()
    assert (await visitor.get("/ws", headers=headers)).status == 403
    assert (await visitor.get("/login", headers=headers)).status == 200
    (line,) = caplog.messages  # once a minute
    assert own in line


HOSTS = {
    "localhost": 303, "10.0.0.7:8080": 303, "[::1]:8080": 303, "[fe80::1]": 303,
    "evil.example:8080": 421, "127.0.0.1.evil.example": 421, "": 421, "a b": 421,
    "127.0.0.1:x": 421, "localhost.evil.example": 421, "[::1].evil.example": 421,
}  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
async def test_without_origin_only_localhost_and_ips_are_served(memory, caplog, host):
    """DNS rebinding: a page of evil.example, whose name points at 127.0.0.1."""
    visitor, status = await memory.visitor(), HOSTS[host]
    options = {"headers": {"Host": host}, "allow_redirects": False}
    for path in "/", "/static/chat.css", "/nothing", "/ws", "/login":
        response = await visitor.get(path, **options)
        assert (response.status == 421) == (status == 421)
    for origin in f"http://{host}", "http://10.0.0.9", "null":
        options["headers"]["Origin"] = origin
        response = await visitor.post("/signin", data=form("ann"), **options)
        assert response.status == (status if host in origin or status == 421 else 403)
    assert len(caplog.messages) == 1  # once a minute
    assert status == 303 or (repr(host) in caplog.text and "ORIGIN" in caplog.text)


async def test_login_says_why_you_have_to_sign_in_again(memory):
    """It knows a browser that keeps no cookie by the page from which it comes."""
    async with TestClient(memory, cookie_jar=aiohttp.DummyCookieJar()) as visitor:
        for path in "/signin", "/login":
            headers = {"Referer": str(memory.make_url(path + "?why=ended"))}
            response = await visitor.post(path, data=form("ann"), headers=headers)
            assert str(response.url).endswith("/login?why=cookie")
        assert 'class="notice"' in await response.text()
        headers = {"Referer": str(memory.make_url("/"))}
        assert str((await visitor.get("/", headers=headers)).url).endswith("/login")
        assert "ended" in await (await visitor.get("/login?why=ended")).text()
        page = await (await visitor.get("/login?why=<b>")).text()
        assert 'class="notice"' not in page


async def test_request_knows_the_id_and_the_name_of_its_user_and_no_more(server):
    """Above all not the hash of the password, which would stay with a socket."""
    await connect(await sign_in(server, email="ann@example.org"))
    assert sockets_of(server, "ann")[0].user.keys() == {"_id", "name"}


async def test_fault_of_ours_is_a_500_and_a_traceback(memory, monkeypatch, caplog):
    visitor = await memory.visitor()
    monkeypatch.setattr(chat.Login, "page", lambda *_, **__: {}["a fault of ours"])
    response = await visitor.get("/login")
    assert response.status == 500 and "fault" not in await response.text()
    assert "Traceback" in caplog.text and "KeyError: 'a fault of ours'" in caplog.text


async def test_silent_database_is_a_503_and_comes_back(own_mongodb, serve, caplog):
    """More requests than the driver has threads do not wait in turn."""
    ann = await sign_in(await serve(on(own_mongodb.uri)))
    own_mongodb.freeze()
    pages = [ann.get("/") for _ in range(30)] + [ann.post("/login", data=form("ann"))]
    async with asyncio.timeout(8):
        responses = await asyncio.gather(*pages, ann.get("/ws"))
    for response in responses:
        assert (response.status, response.headers["Retry-After"]) == (503, "5")
        assert "does not answer" in await response.text()
    own_mongodb.thaw()
    while (await ann.get("/")).status != 200:
        pass
    assert not re.search("Traceback|argon2", caplog.text)


# ==============================================================================
# 3. Database and models
# ==============================================================================
async def test_process_that_lags_catches_up_when_its_number_is_taken(serve, mongodb):
    """It jumps to the newest number: with one step a message it would lag for ever."""
    db, tried = (await serve(on(mongodb))).app[chat.ROOM].db, []
    for number in range(1, 21):
        await chat.save(db, number, EVE, "x", f"{number}")
    insert = db.insert
    db.insert = lambda message: tried.append(message["_id"]) or insert(message)
    assert await chat.save(db, 3, EVE, "late", "n1") == 21
    assert tried == [3, 21]


async def test_nonce_is_stored_once_even_if_no_process_remembers_it(serve, mongodb):
    """Rule 3: the unique index knows it. It is unique for its user only."""
    server = await serve(on(mongodb))
    from_ann, from_bob = await connect_two(server)
    first = await say(from_ann, "long ago", "n1")
    await say(from_ann, "later")
    server.app[chat.ROOM].history.receipts.clear()
    receipt = {"type": "receipt", "nonce": "n1", "id": first["id"]}
    assert await send(from_ann, "long ago", "n1") == receipt
    assert (await send(from_bob, "me too", "n1"))["id"] == 3


async def test_memory_holds_the_newest_messages_and_a_gap_can_be_seen(memory):
    room, kept = memory.app[chat.ROOM], chat.HISTORY_SIZE
    for number in range(1, 2 * kept + 11):
        await chat.post(room, EVE, f"{number}", f"{number}")
        if number % 100 == 0:
            assert await room.db.messages.estimated_document_count() <= kept
    await until(lambda: room.history.last == number)
    assert len(room.history.events) == len(room.history.receipts) == kept
    ann = await sign_in(memory)
    assert shown_ids(await (await ann.get("/")).text())[-1] == number
    ids = [event["id"] for event in (await connect(ann, after=5)).replayed]
    assert ids == list(range(number - kept + 1, number + 1))  # not 6: a gap


async def test_message_that_the_stream_did_not_bring_is_told_with_the_next(memory):
    """The next number shows the gap: the room reads everything again."""
    ws = await connect(await sign_in(memory))
    await memory.app[chat.ROOM].db.messages.insert_one(stored(1, text="late"))
    await send_only(ws, "next", "n2")
    told = [await read(ws, "message") for _ in range(2)]
    assert [(e["id"], e["text"]) for e in told] == [(1, "late"), (2, "next")]


async def test_message_stored_during_a_read_comes_once(serve, mongodb, monkeypatch):
    server = await serve(on(mongodb))
    ws, room = await connect(await sign_in(server)), server.app[chat.ROOM]
    await say(ws, "before")
    newest = chat.newest

    async def post_then_read(*arguments):
        monkeypatch.undo()
        await chat.post(room, EVE, "meanwhile", "n1")
        await edit(server, 2, text="")  # so the stream brings it with its text
        return await newest(*arguments)

    monkeypatch.setattr(chat, "newest", post_then_read)
    await room.db.mongo.drop_collection("processes")  # which breaks the stream
    await until(lambda: room.history.last == 2)
    await send_only(ws, "next", "n2")
    heard = [e for e in await heard_until("n2", ws) if e["type"] == "message"]
    assert [(e["id"], e["text"]) for e in heard] == [(2, ""), (3, "next")]


def stored(number, **more):
    """A message as the chat stores it."""
    message = {"_id": number, "user_id": ObjectId(), "user": "bob", "text": "hello"}
    return message | {"time": chat.datetime.now(chat.UTC), "nonce": "n1"} | more


OUT_OF_RANGE = DatetimeMS(1 << 55)
FOREIGN_MESSAGES = [
    {"_id": 2.0}, {"_id": Decimal128("3")}, {"_id": Int64(5), "text": "hello"},
    {"_id": {"a": 1}}, {"_id": None}, stored(True), stored(0), stored(6.5),
    stored(1 << 60), stored(7, time=OUT_OF_RANGE), stored(8, time="yesterday"),
    stored(9, text=["x"]), stored(10, user=17), stored(11, user_id=["x"]),
    stored(12, nonce=None),
]  # fmt: skip


@pytest.mark.parametrize("message", FOREIGN_MESSAGES, ids=lambda m: repr(m["_id"]))
def test_foreign_document_is_no_message_and_one_line_in_the_log(caplog, message):
    assert chat.to_event(stored(1)) and not caplog.messages
    assert chat.to_event(message) is None
    (line,) = caplog.messages
    assert "foreign" in line and "hello" not in line


async def test_foreign_documents_are_passed_over(serve, mongodb, caplog):
    """Also one that takes the next number, and one that another program deletes."""
    server = await serve(on(mongodb))
    sockets, db = await connect_two(server), server.app[chat.ROOM].db
    await db.messages.insert_many([{"_id": 1}, stored(2, text=["x"]), {"_id": 3.5}])
    await db.users.insert_many([{"_id": {"a": 1}}, {"name": "eva", "name_key": "eva"}])
    await db.users.delete_one({"_id": {"a": 1}})
    sent = [await say(sockets[0], f"text {number}") for number in range(5)]
    assert [await read(sockets[1], "message") for _ in sent] == sent
    visitor = await server.visitor()
    assert (await visitor.post("/login", data=form("eva"))).status == 422
    assert "Traceback" not in caplog.text


async def test_message_taken_back_is_blank_for_every_reader(server):
    """In open windows, for newcomers, on pages and in replays."""
    from_ann, from_bob = await connect_two(server)
    bob = await sign_in(server, "joe")
    sent = [await say(from_ann, f"text {number}") for number in range(1, 4)]
    await edit(server, 2, text="")
    for ws in from_ann, from_bob:
        while (event := await read(ws, "message"))["text"]:
            pass
        assert event == sent[1] | {"text": ""}
    for path in "/", "/?before=3":
        page = await (await bob.get(path)).text()
        assert "text 1" in page and "text 2" not in page
        assert "This message was removed." in page
    ws = await connect(bob, after=0)
    assert [event["text"] for event in ws.replayed[:3]] == ["text 1", "", "text 3"]
    ws = await connect(bob, after=3)  # had it before it was taken back
    assert ws.replayed == [sent[1] | {"text": ""}]
    await edit(server, 3, note="spam")  # changes nothing that readers see
    await send_only(from_ann, "next", "n4")
    assert "text 3" not in {event.get("text") for event in await heard_until("n4", ws)}


async def test_messages_older_than_the_history_can_be_read(serve, mongodb):
    server = await serve(on(mongodb))
    ann = await sign_in(server)
    await fill(server, chat.HISTORY_SIZE + 10)
    ws = await connect(ann)
    assert shown_ids(await (await ann.get("/?before=31")).text()) == [*range(1, 31)]
    await edit(server, 1, text="")
    event = await read(ws, "message")
    assert (event["id"], event["text"]) == (1, "")
    assert 1 not in server.app[chat.ROOM].history.events


async def test_deleted_account_loses_its_sockets_and_its_session(server):
    ann, from_bob = await sign_in(server), await connect(await sign_in(server, "bob"))
    tabs = [await connect(ann) for _ in range(3)]
    await until(lambda: "ann" in server.app[chat.ROOM].online)
    codes = asyncio.gather(*map(closed, tabs))
    await delete_ann(server)
    assert await codes == [1008, 1008, 1008]
    assert (await ann.get("/")).url.path == "/login"
    assert (await ann.get("/ws")).status == 401
    await say(from_bob, "still here")
    assert await read(from_bob, "left") == {"type": "left", "user": "ann"}
    again = await sign_in(server, "ann")  # another account, without the old session
    assert (await ann.get("/")).url.path == "/login"
    assert (await say(await connect(again), "anew"))["id"] == 2


async def test_dead_process_counts_for_15_seconds(serve, mongodb):
    settings = on(mongodb)
    server, other = await serve(settings), await serve(settings)
    ws, entries = await connect(await sign_in(server)), server.app[chat.ROOM].db.mongo
    now = (await entries.client.admin.command("hello"))["localTime"]
    for name, seconds in {"fred": 10, "dead": 16}.items():
        seen = now - chat.timedelta(seconds=seconds)
        await entries.processes.insert_one({"names": [name], "seen": seen})
    assert {(await read(ws, "joined"))["user"] for _ in "12"} == {"ann", "fred"}
    indexes = await entries.processes.index_information()
    assert indexes["seen_1"]["expireAfterSeconds"] == 45
    await other.close()
    assert await entries.processes.count_documents({}) == 3


async def test_index_that_cannot_come_back_is_told(serve, mongodb, caplog):
    """As after a restore that holds two users of one name."""
    server = await serve(on(mongodb))
    ws, db = await connect(await sign_in(server)), server.app[chat.ROOM].db
    await db.users.drop_index("unique name_key")
    await db.users.insert_many([{"name_key": "twin"}, {"name_key": "twin"}])
    await db.mongo.drop_collection("processes")  # which breaks the stream
    await until(lambda: "An index could not be created: " in caplog.text)
    assert "duplicate key" in caplog.text
    assert (await say(ws, "still here"))["text"] == "still here"


SECRETS = [
    "ann:s3cret@host.invalid", "mongodb:/ann:s3cret@host.invalid", "http://ann:s3cret@h",
    "mongodb://ann:s3\ncret@host.invalid/", "mongodb://ann:s3/cret@host.invalid",
    "mongodb://ann:s3?cret@host.invalid", "mongodb://ann:s3@cret@host.invalid",
    "mongodb://ann:s3cret:x@host.invalid", "mongodb://ann:%zs3cret@host.invalid",
    "mongodb://ann:s3cret@host.invalid:99999", "mongodb://ann:1,s3cret/x@host.invalid/",
    "mongodb+srv://ann:s3cret@host.invalid/", "mongodb://ann:5/s3cret@host.invalid",
    "mongodb://ann:x@host.invalid/?tlsCertificateKeyFilePassword=s3cret&tls=true",
]  # fmt: skip


async def test_no_secret_of_a_uri_is_ever_shown_however_it_is_malformed():
    for sentence in await asyncio.gather(*map(why_it_cannot_start, SECRETS)):
        assert sentence.startswith("MONGO_HOST '") and "\n" not in sentence
        assert not re.search("s3|cret|ann:", sentence)


async def why_it_cannot_start(uri):
    with pytest.raises(chat.CannotStart) as caught:
        await chat.open_database(on(uri))
    return str(caught.value)


CAUSES = {
    "mongodb://127.0.0.1:{free}/": "127.0.0.1:{free}: [Errno 111] Connection refused",
    "mongodb://host.invalid/": "host.invalid:27017: [Errno -2] Name or service not ",
    "mongodb://127.0.0.1:{used}/?replicaSet=wrong": 'replica set name "wrong"',
    "mongodb://127.0.0.1:{used}/?tls=true": "SSL handshake failed",
    "mongodb://127.0.0.1/?tls=true&tlsCAFile=/nowhere": "tlscafile",
    "mongodb://": "hostname",
}


async def test_why_mongodb_cannot_be_used_is_told_in_the_drivers_words(mongodb):
    ports = {"free": unused_port(), "used": re.search(r":(\d+)/", mongodb)[1]}
    uris = [uri.format(**ports) for uri in CAUSES]
    sentences = await asyncio.gather(*map(why_it_cannot_start, uris))
    for uri, cause, sentence in zip(uris, CAUSES.values(), sentences, strict=True):
        assert repr(uri.partition("?")[0]) in sentence
        assert cause.format(**ports) in sentence
        assert len(sentence) < 250 and "Timeout" not in sentence
    with pymongo.MongoClient(mongodb) as client:  # two users of one name
        client.twins.users.insert_many([{"name_key": "ann"}, {"name_key": "ann"}])
    with pytest.raises(chat.CannotStart, match="cannot be used: .*duplicate key"):
        twins = on(mongodb).model_copy(update={"MONGO_DB_NAME": "twins"})
        await chat.open_database(twins)


async def test_standalone_mongodb_is_told_what_mends_it(standalone, start, serve):
    """Its data stays: it may come from another program, or from a backup."""
    settings = on(standalone.uri)
    process = start(MONGO_HOST=standalone.uri, SECRET_KEY=KEY)
    code, _, errors = await asyncio.to_thread(process.end, 60)
    assert (code, errors.count("\n")) == (2, 1)
    with pymongo.MongoClient(standalone.uri) as client:
        db = client[settings.MONGO_DB_NAME]
        ann = {"_id": ObjectId(), "name": "ann", "name_key": "ann"}
        db.users.insert_one(ann | {"password": chat.hash_password(PASSWORD)})
        db.messages.insert_one(stored(1, user_id=ann["_id"], user="ann"))
    standalone.process.terminate()
    standalone.process.wait()
    standalone.options = re.search("`mongod (.+?)`", errors)[1].split()
    standalone.start()
    assert "standalone" not in await why_it_cannot_start(standalone.uri)  # half done
    typed = re.search(r"rs\.initiate\((.+?)\)", errors)[1].replace("'", '"')
    config = json.loads(re.sub(r"([{ ])(\w+):", r'\1"\2":', typed))  # as mongosh reads
    standalone.command("replSetInitiate", config)
    await until(lambda: standalone.command("hello")["isWritablePrimary"])
    visitor = await (await serve(settings)).visitor()
    page = await visitor.post("/login", data=form("ann"))
    assert shown_ids(await page.text()) == [1]
    assert (await say(await connect(visitor), "goes on"))["id"] == 2


# ==============================================================================
# 4. Views
# ==============================================================================
async def test_signing_out_ends_this_session_and_no_other_devices(serve):
    """Its sockets too, after the answer. Signing in begins another session."""
    server = await serve(chat.Settings(SECRET_KEY=KEY))
    ann, phone = await sign_in(server, "ann"), await server.visitor()
    tabs = [await connect(ann) for _ in range(2)]
    user_id = str(sockets_of(server, "ann")[0].user["_id"])
    content = session(user_id, created=int(time.time()) - 60)  # signed in before
    phone.session.cookie_jar.update_cookies({"CHAT_8080": cookie(content)})
    from_phone = await connect(phone)
    codes = asyncio.gather(*map(closed, tabs))
    assert (await ann.get("/login")).url.path == "/"  # there already
    response = await ann.post("/signout", allow_redirects=False)
    assert (response.status, response.headers["Location"]) == (303, "/login")
    assert not tabs[0].closed
    assert (await ann.get("/ws")).status == 401
    assert await codes == [1001, 1001]
    response = await ann.post("/login", data=form("ann"), allow_redirects=False)
    assert (response.status, response.headers["Location"]) == (303, "/")
    await say(await connect(ann), "here again")
    await say(from_phone, "still here")


SIGN_INS = [("ann", "café au lait"), (" Ａnn ", "cafe\u0301 au lait"),
            ("Ann@Example.org", "café au lait")]  # fmt: skip


@pytest.mark.parametrize(("login", "password"), SIGN_INS)
async def test_name_or_email_in_any_spelling_signs_in(server, login, password):
    """A password, too: machines encode the same letters in two ways."""
    await sign_in(server, "Ann", email="ann@example.org", **passwords("café au lait"))
    data = form(login, password=password)
    response = await (await server.visitor()).post("/login", data=data)
    assert (response.status, response.url.path) == (200, "/")
    assert re.search('id="user"[^>]*>Ann<', await response.text())


NAMES = [
    "ann", "Zoë", "Ольга", "काजल", "สมชาย", "محمد", "李小龍", "a-_", "x" * 32, "123",
]  # fmt: skip


@pytest.mark.parametrize("name", [*NAMES, "Ａｎｎ"])
async def test_names_of_any_script_are_welcome(memory, name):
    ws = await connect(await sign_in(memory, name))
    assert ws.welcome["user"] == ("Ann" if name == "Ａｎｎ" else name)


WRONG_NAMES = [
    "", "  ", "ab", "x" * 33, "a b", "a.b", "a@b.c", "<b>ann</b>", "ann\0", "a\nb",
    "ann\u200b", "ann\u202e", "\u3164\u3164\u3164", "ann\ufe0f", "😀😀😀", "annאבג",
    "ann\U000e0100", "a" + "\u0323" * 31, "x\u0325\u0329\u032ay", "\u0323ann", "12א",
]  # fmt: skip


@pytest.mark.parametrize("name", WRONG_NAMES)
async def test_wrong_name_is_refused_beside_its_field(memory, name):
    visitor = await memory.visitor()
    response = await visitor.post("/signin", data=form(name, email="a@b.c"))
    page = await response.text()
    assert response.status == 422
    assert "A name has 3 to 32 letters" in field_error(page, "login")
    assert 'value="a@b.c"' in page and PASSWORD not in page and "<b>ann" not in page


def field_error(page, name):
    """Return what a page says is wrong with a field, as a screen reader finds it."""
    found = re.search(f'<p class="error" id="{name}-note" role="alert">(.*?)</p>', page)
    marked = re.search(f'<input id="{name}"[^>]* aria-invalid="true"', page)
    return found[1] if found and marked else ""


WRONG_FIELDS = [
    (passwords("short"), "password", "8 to 128"),
    (passwords("x" * 129), "password", "8 to 128"),
    ({"password2": "something else"}, "password2", "not the same"),
    ({"email": "nobody"}, "email", "email address"),
    ({"email": "a\0@b.c"}, "email", "email address"),
    ({"login": "ANN"} | passwords("another horse"), "login", "has this already"),
    ({"email": "ANN@example.org"}, "email", "has this already"),
]


@pytest.mark.parametrize(("fields", "name", "sentence"), WRONG_FIELDS)
async def test_sign_up_says_what_is_wrong(server, fields, name, sentence):
    await sign_in(server, "ann", email="ann@example.org")
    visitor = await server.visitor()
    response = await visitor.post("/signin", data=form("bob") | fields)
    assert response.status == 422
    assert sentence in field_error(await response.text(), name)
    assert (await visitor.get("/")).url.path == "/login"


async def test_field_too_long_is_refused_unread(memory, monkeypatch):
    """16 KB of combining marks take 112 ms, in which the room stands still."""
    visitor = await memory.visitor()
    with monkeypatch.context() as patch:
        patch.setattr(chat.unicodedata, "normalize", None)
        for name in "login", "email", "password", "password2":
            data = form("ann") | {name: "a" + "\u0316\u0301" * 127}
            for path in "/login", "/signin":
                response = await visitor.post(path, data=data)
                assert response.status == 400 and "254" in await response.text()
    data = form("ann", email="a@" + "b" * 252)
    assert (await visitor.post("/signin", data=data)).url.path == "/"


async def test_second_click_on_create_account_signs_in(server):
    clients = [await server.visitor() for _ in range(2)]
    data = form("ann", email="ann@example.org")
    posts = [client.post("/signin", data=data) for client in [*clients, clients[0]]]
    for response in await asyncio.gather(*posts):
        assert (response.status, response.url.path) == (200, "/")
    assert await server.app[chat.ROOM].db.users.count_documents({}) == 1


async def test_second_click_is_an_attempt_to_sign_in(serve):
    """Otherwise the sign-up page would let you guess passwords without a limit."""
    server = await serve(chat.Settings(LOGIN_ATTEMPTS=6))
    await sign_in(server, "ann")
    visitor, statuses = await server.visitor(), []
    for number in range(7):
        data = form("ann") | passwords(f"guess no. {number}")
        statuses.append((await visitor.post("/signin", data=data)).status)
    assert statuses[:2] == [422, 422] and statuses[-1] == 429
    assert (await visitor.post("/login", data=form("ann"))).status == 429


async def test_signing_up_for_an_older_account_is_no_second_click(memory):
    """It may belong to another Ann with the same weak password."""
    long_ago = chat.datetime.now(chat.UTC) - chat.timedelta(minutes=2)
    user = {"_id": ObjectId.from_datetime(long_ago), "name": "ann", "name_key": "ann"}
    user["password"] = chat.hash_password(PASSWORD)
    await memory.app[chat.ROOM].db.users.insert_one(user)
    visitor = await memory.visitor()
    response = await visitor.post("/signin", data=form("ann"))
    assert response.status == 422
    assert "has this already" in field_error(await response.text(), "login")
    assert (await visitor.post("/login", data=form("ann"))).url.path == "/"


async def test_unknown_name_is_like_a_wrong_password(server, monkeypatch):
    await sign_in(server, "ann")
    verify, costs, pages = chat.verify_password, [], []
    note = lambda *both: costs.append(both[1][:31]) or verify(*both)  # noqa: E731
    monkeypatch.setattr(chat, "verify_password", note)
    for name in "ann", "bob":
        data = form(name, password="not this one")
        response = await (await server.visitor()).post("/login", data=data)
        assert response.status == 422
        pages.append((await response.text()).replace(f'"{name}"', '"name"'))
    assert costs == 2 * ["$argon2id$v=19$m=19456,t=2,p=1$"] and pages[0] == pages[1]
    assert "No account has this name" in field_error(pages[0], "login")


async def test_wait_for_the_hash_thread_has_a_bound(memory, monkeypatch):
    """Beyond it the form comes back filled, with when to try again, and unhashed."""
    hashed, hash_password, go_on = [], chat.hash_password, threading.Event()
    note = lambda text: hashed.append(text) or hash_password(text)  # noqa: E731
    monkeypatch.setattr(chat, "hash_password", note)
    visitor = await memory.visitor()
    busy = chat.HASH_THREAD.submit(go_on.wait, 20)
    sign_up = visitor.post("/signin", data=form("bob", email="bob@example.org"))
    login = visitor.post("/login", data=form("bob"))
    for response in await asyncio.gather(sign_up, login):
        page = await response.text()
        assert response.status == 503 and int(response.headers["Retry-After"]) > 0
        assert "Too many people are signing in" in field_error(page, "login")
        assert 'value="bob"' in page and PASSWORD not in page
    go_on.set()
    assert busy.result() and hashed == []
    assert (await visitor.post("/signin", data=form("bob"))).url.path == "/"


TYPED = [
    ["ANN", "ann ", "  ann", "ａｎｎ", "ann\t", "Ａnn"],
    ["nobody", "NOBODY", " nobody ", "ｎobody"],
    ["ann@example.org", "ANN@example.org", " ann@example.org", "ann@ｅxample.org"],
    ["no@body", "NO@body", " no@body", "no@ｂody"],
]


@pytest.mark.parametrize("spellings", TYPED)
async def test_attempts_count_by_what_was_typed_in_any_spelling(serve, spellings):
    """Counted by account, a 429 for an email after guesses at a name tells whose."""
    signed_up = spellings is TYPED[0]  # which counts as well
    server = await serve(chat.Settings(LOGIN_ATTEMPTS=len(spellings) + signed_up))
    await sign_in(server, "ann", email="ann@example.org")
    visitor, wrong = await server.visitor(), {"password": "a wrong guess"}
    for login in spellings:
        assert (await visitor.post("/login", data=form(login) | wrong)).status == 422
    for login in spellings:
        response = await visitor.post("/login", data=form(login))
        assert response.status == 429
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        assert "Too many attempts" in field_error(await response.text(), "login")
    for other in {"ann@example.org", "bob"} - set(spellings):
        data = form(other) | wrong
        assert (await visitor.post("/login", data=data)).status == 422


async def test_attempts_count_per_network_of_the_visitor(serve, monkeypatch):
    """A home has one IPv4 address, or a /64 of IPv6 ones."""
    remote = property(lambda request: request.headers.get("X-Test"))
    monkeypatch.setattr(chat.web.Request, "remote", remote)
    visitor = await (await serve(chat.Settings(LOGIN_ATTEMPTS=2))).visitor()
    statuses = []
    for address in (
        "2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:0:3::", "2001:db8:0:1::1",
        "fe80::1%eth0", "fe80::2%eth0", "fe80::3%eth1", "10.0.0.1", "10.0.0.2", "",
    ):  # fmt: skip
        headers = {"X-Test": address}
        response = await visitor.post("/login", data=form("ann"), headers=headers)
        statuses.append(response.status)
    assert statuses == [422, 422, 429, 422, 422, 422, 429, 422, 422, 422]


async def test_what_the_throttle_keeps_for_strangers_has_a_bound(memory):
    visitor, keys, room = await memory.visitor(), [], memory.app[chat.ROOM]
    attempts = room.attempts
    assert attempts.cache_info().maxsize <= 10_000
    room.attempts = lambda *key: keys.append(key) or attempts(*key)
    for login in "\ufdfa" * 254, "x" * 254, "a@" + "\ufdfa" * 252:
        await visitor.post("/login", data=form(login))
    assert len(keys) == 3 and max(len(str(key)) for key in keys) < 320


def cookie(content, key=KEY, at=None):
    """Make a session cookie as the chat would with this SECRET_KEY."""
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    digest = chat.hashlib.sha256(key.encode()).digest()
    fernet = Fernet(base64.urlsafe_b64encode(digest))
    return fernet.encrypt_at_time(content, int(at or time.time())).decode()


def session(user, **more):
    return {"created": int(time.time()), "session": {"user": user}} | more


BAD_COOKIES = {
    "empty": "", "equation": "a=b", "start of a token": "gAAAAA", "emoji": "💥",
    "bytes": "\udcff\udcfe", "foreign key": cookie(session("0" * 24), key="another"),
    "expired": cookie(session("0" * 24), at=time.time() - 15 * 24 * 60 * 60),
    "unknown user": cookie(session("0" * 24)), "no id": cookie(session("not an id")),
    "null": cookie(session(None)), "operator": cookie(session({"$gt": ""})),
    "no JSON": cookie(b"not json"), "no text": cookie(b"\xff\xfe"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_COOKIES)
async def test_bad_cookie_is_no_session_and_one_line(serve, caplog, kind):
    server = await serve(chat.Settings(SECRET_KEY=KEY))
    header = f"Cookie: CHAT_8080={BAD_COOKIES[kind]}"
    header = header.encode(errors="surrogateescape")
    for path, status in 3 * ((b"/", b"303"), (b"/ws", b"401"), (b"/login", b"200")):
        head = await raw_request(server, b"GET " + path, header)
        assert head.startswith(b"HTTP/1.1 " + status)
    assert len(caplog.messages) <= 1 and "Traceback" not in caplog.text


async def session_cookie(server):
    """Sign up, and return the cookie's name, value and attributes."""
    visitor = await server.visitor()
    response = await visitor.post("/signin", data=form("ann"), allow_redirects=False)
    first, *attributes = response.headers["Set-Cookie"].split("; ")
    return *first.split("=", 1), set(attributes)


async def test_session_is_encrypted_and_in_memory_named_by_the_port(serve):
    """Cookies know no port: two chats on one `localhost` would share one."""
    server = await serve(chat.Settings(ORIGIN=ORIGIN, PORT=8081))
    name, value, attributes = await session_cookie(server)
    assert attributes == {"HttpOnly", "SameSite=Lax", "Secure", "Path=/"}
    assert "ann" not in value and name == "CHAT_8081"
    servers = [await serve(chat.Settings(PORT=0)) for _ in "12"]
    cookies = [await session_cookie(server) for server in servers]
    assert cookies[0][0] != cookies[1][0] and "Secure" not in cookies[0][2]


async def test_session_on_mongodb_lasts_two_weeks(serve, mongodb):
    name, _, attributes = await session_cookie(await serve(on(mongodb)))
    assert name == "AIOHTTP_SESSION" and "Max-Age=1209600" in attributes


FORM = b"application/x-www-form-urlencoded"
BAD_FORMS = {
    "json": (b"application/json", b'{"login": "ann"}'),
    "none": (b"", b""),
    "multipart": (b"multipart/form-data; boundary=x", b"--x\r\nrubbish\r\n--x--"),
    "unknown charset": (FORM + b"; charset=klingon", b"a=b"),
    "half a surrogate pair": (FORM + b"; charset=unicode_escape", rb"login=\ud800nn"),
    "bytes that are no text": (FORM, b"login=\xff\xfe"),
    "gzip that is none": (FORM + b"\r\nContent-Encoding: gzip", b"not  gzip"),
    "too large": (FORM, b"login=" + 20_000 * b"x"),
}


@pytest.mark.parametrize("kind", BAD_FORMS)
async def test_form_that_cannot_be_read_is_refused(memory, caplog, kind):
    content_type, body = BAD_FORMS[kind]
    headers = b"Content-Type: " + content_type, b"Content-Length: %d" % len(body)
    for path in b"/login", b"/signin":
        answer = await raw_request(memory, b"POST " + path, *headers, body=body)
        status = b"413" if kind == "too large" else b"400"
        assert answer.startswith(b"HTTP/1.1 " + status)
    headers = b"Content-Type: " + FORM, b"Transfer-Encoding: chunked"
    answer = await raw_request(memory, b"POST /login", *headers, body=b"zzz\r\n")
    assert re.match(rb"HTTP/1.[01] 400", answer)
    assert "Traceback" not in caplog.text


async def test_form_that_trickles_is_ended(memory, monkeypatch, caplog):
    monkeypatch.setattr(chat, "DEADLINE", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", memory.port)
    lines = ["POST /login HTTP/1.1", "Host: localhost", "Content-Length: 999"]
    lines += [f"Content-Type: {FORM.decode()}", "", "login=an"]
    writer.write("\r\n".join(lines).encode())
    answer = b""
    async with asyncio.timeout(8):  # aiohttp itself would hold it for 10 s more
        while chunk := await reader.read(100):
            answer += chunk
            if b"HTTP/1.1" not in answer:
                writer.write(b"n")
    assert re.match(b"HTTP/1.1 40[08]", answer)
    writer.close()
    assert "Traceback" not in caplog.text


async def test_older_messages_are_on_a_plain_page(server):
    """There, too, the markup in a message is text."""
    ann = await sign_in(server)
    await fill(server, 120, text="<b>{}</b> &amp;")
    for path, first, last, older in (
        ("/", 71, 120, "/?before=71"), ("/?before=", 71, 120, "/?before=71"),
        ("/?before=71", 21, 70, "/?before=21"), ("/?before=21", 1, 20, None),
        ("/?before=1", 1, 0, None),
    ):  # fmt: skip
        page = await (await ann.get(path)).text()
        assert shown_ids(page) == list(range(first, last + 1))
        assert f'href="{older}"' in page if older else "?before=" not in page
        assert (page.count("&lt;b&gt;"), "<b>" in page) == (last - first + 1, False)
    assert "not kept" in page


@pytest.mark.parametrize("number", ["x", "-1", "1.5", "٣", "9" * 16, "1 OR 1=1"])
async def test_wrong_number_in_a_url_is_a_clear_400(server, number):
    ann = await sign_in(server)
    for path, name in ("/", "before"), ("/ws", "after"):
        response = await ann.get(path, params={name: number})
        assert response.status == 400
        assert "number of a message" in await response.text()


# ==============================================================================
# 5. WebSocket
# ==============================================================================
async def test_message_reaches_every_reader_and_its_receipt_the_sender_alone(server):
    from_ann, from_bob = await connect_two(server)
    text = "  hé <b>\n😀\0\u202e\u200b "
    message = await say(from_ann, text, "n1")
    assert await read(from_bob, "message") == message
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", message.pop("time"))
    fields = {"type": "message", "id": 1, "user": "ann", "text": text, "nonce": "n1"}
    assert message == fields
    for _ in range(2):  # also for a repeated message, which nobody hears twice
        receipt = {"type": "receipt", "nonce": "n1", "id": 1}
        assert await send(from_ann, text, "n1") == receipt
    await send_only(from_ann, "next", "n2")
    heard = [one for one in await heard_until("n2", from_bob) if "nonce" in one]
    assert [(one["type"], one["id"]) for one in heard] == [("message", 2)]


async def test_lost_receipt_is_resent_and_stored_once(server):
    """Rule 3, on a socket that closed, and on five sockets at once."""
    ann = await sign_in(server)
    ws = await connect(ann)
    await send_only(ws, "once", "n1")
    await ws.close()
    await until(lambda: server.app[chat.ROOM].history.last == 1)
    sockets = [await connect(ann, after=0) for _ in range(5)]
    assert [event["nonce"] for event in sockets[0].replayed] == ["n1"]
    for nonce, number in ("n1", 1), ("n2", 2):
        receipts = await asyncio.gather(*(send(ws, "once", nonce) for ws in sockets))
        assert {receipt["id"] for receipt in receipts} == {number}
    assert shown_ids(await (await ann.get("/")).text()) == [1, 2]


async def test_message_that_is_not_stored_is_never_shown(own_mongodb, serve):
    """Rule 2; and the socket stays, so what got no receipt is sent again."""
    server = await serve(on(own_mongodb.uri))
    from_ann, from_bob = await connect_two(server)
    own_mongodb.kill()
    for nonce in "n0", "n1":
        error = await send(from_ann, "lost?", nonce)
        assert error["code"] == "not_saved" and "again" not in error["text"]
    own_mongodb.start()
    await until(lambda: is_stored(from_ann, "n0"))
    assert await is_stored(from_ann, "n1")
    await say(from_ann, "next", "n2")
    heard = [e for e in await heard_until("n2", from_bob) if e["type"] == "message"]
    assert [event["nonce"] for event in heard] == ["n0", "n1", "n2"]
    own_mongodb.freeze()
    async with asyncio.timeout(20):
        await server.close()  # though MongoDB is away


async def is_stored(ws, nonce):
    return (await send(ws, "lost?", nonce))["type"] == "receipt"


async def test_returning_reader_gets_missed_messages_in_order(server, monkeypatch):
    """Rule 4. Those sent during the replay too: the room waits for no slow reader."""
    ann, room = await sign_in(server), server.app[chat.ROOM]
    await fill(server, 3)
    for after in None, 3, 999:
        assert (await connect(ann, after)).replayed == []
    send_json = chat.web.WebSocketResponse.send_json

    async def send_slowly(ws, event):
        if (number := event["id"]) < 5:
            await chat.post(room, EVE, "x", f"during {number}")
            await until(lambda: room.history.last == number + 2)
        await send_json(ws, event)

    monkeypatch.setattr(chat.web.WebSocketResponse, "send_json", send_slowly)
    ws = await connect(ann, after=1)
    assert [event["id"] for event in ws.replayed] == [2, 3, 4, 5, 6]
    assert ws.welcome["last"] == 6


async def test_what_changes_around_a_replay_comes_once(server, monkeypatch):
    """A message just before it waits for the next flush; one is blanked just after."""
    ann, from_bob = await sign_in(server), await connect(await sign_in(server, "bob"))
    await say(from_bob, "first")
    replay, room = chat.WebSocket.replay, server.app[chat.ROOM]
    monkeypatch.setattr(chat, "TURNS", 100_000)

    async def replay_between_changes(*arguments):
        await send_only(from_bob, "second", "n2")
        await until(lambda: room.history.last == 2)
        await replay(*arguments)
        await edit(server, 1, text="")
        await until(lambda: room.history.events[1]["text"] == "")

    monkeypatch.setattr(chat.WebSocket, "replay", replay_between_changes)
    ws = await connect(ann, after=0)
    texts = [(event["id"], event["text"]) for event in ws.replayed]
    assert texts == [(1, "first"), (2, "second"), (1, "")]
    monkeypatch.setattr(chat, "TURNS", 6)
    await send_only(ws, "third", "n3")
    heard = [e["text"] for e in await heard_until("n3", ws) if e["type"] == "message"]
    assert heard == ["third"]


def event(**fields):
    return json.dumps({"type": "message", "text": "x", "nonce": "n"} | fields)


BAD_EVENTS = [
    "", "null", "[]", "17", "{}", "[" * 9_000, "9" * 5_000, '{"type": "message"}',
    event(text=17), event(text=None), event(text=["x"]), event(text="\ud800"),
    event(nonce="\udfff"), event(nonce=17), event(nonce=""), event(nonce=65 * "n"),
    event(nonce="a\rb"), event(nonce="\u202e"), event(type="bad"),
    event(type=["message"]), event()[:-1], '{"\\ud800": 1}',
]  # fmt: skip


async def test_bad_event_gets_an_error_and_the_socket_stays(serve, caplog):
    """A nonce that a page cannot give back would have it reload for ever."""
    server = await serve(chat.Settings(MESSAGE_BURST=1000))
    ws = await connect(await sign_in(server))
    for frame in BAD_EVENTS:
        await ws.send_str(frame)
        error = await read(ws, "error", "receipt")
        assert error["text"].endswith("."), frame
        assert error == {"type": "error", "code": "bad_event", "text": error["text"]}
    await ws.send_bytes(b"\xff\xfe")
    assert (await read(ws, "error"))["code"] == "bad_event"
    await ws.send_str(event(id=99, user="eve", more=["\ud800"]))  # is ignored
    message = await read(ws, "message")
    assert (message["id"], message["user"]) == (1, "ann") and "more" not in message
    assert caplog.text == ""


INVISIBLE = [
    "", " \n\t", "\u200b" * 3, "\u3164", "\u2800\u2800", "\u00ad", "\u2060\ufeff",
    "\u202e \u202c", "\u2028\u2029", "\0\x1b", "\U000e0041\U000e007f", "\n" * 1_000,
]  # fmt: skip


async def test_empty_and_too_long_are_errors_that_name_the_nonce(serve):
    """Empty is what shows nothing; too long are characters, not bytes."""
    server = await serve(chat.Settings(MAX_MESSAGE_LENGTH=10_000, MESSAGE_BURST=1000))
    from_ann, from_bob = await connect_two(server)
    for texts, code in (INVISIBLE, "empty"), (["x" * 10_001], "too_long"):
        for text in texts:
            error = await send(from_ann, text, "n1")
            assert (error["type"], error.get("code")) == ("error", code), ascii(text)
    for text in "\u200bx", "\u0301", "–", "😀" * 10_000, "\0" * 9_999 + "x":
        assert (await say(from_ann, text))["text"] == text
        assert (await read(from_bob, "message"))["text"] == text
    await from_ann.send_str("x" * 200_000)
    assert await closed(from_ann) == 1009


async def test_every_frame_counts_toward_its_users_limit_on_whichever_socket(serve):
    """Also the refused ones, pings and pongs; and coming back refills nothing."""
    server = await serve(chat.Settings(MESSAGE_BURST=10, MESSAGES_PER_SECOND=5))
    ann, started = await sign_in(server), time.monotonic()
    for _ in range(2):
        ws = await connect(ann)
        for frame in "", "rubbish", event(text=""):
            await ws.send_str(frame)
        for kind in ws.ping, ws.pong, ws.send_bytes:
            await kind(b"x")
        assert [(await read(ws, "error"))["type"] for _ in range(4)]
    await send(await connect(ann), "hello", "n1")
    # 10 of these 13 frames pass at once, and each of the others after 0.2 seconds.
    assert time.monotonic() - started >= 0.6


async def test_sender_beyond_the_limit_is_read_slowly_and_delays_nobody(serve):
    server = await serve(chat.Settings(MESSAGE_BURST=1, MESSAGES_PER_SECOND=500))
    from_ann = await connect(await sign_in(server, "ann"))
    from_bob = await connect(await sign_in(server, "bob"))
    (mine,) = sockets_of(server, "ann")

    async def flood():
        for number in range(750):
            await send_only(from_ann, "x" * 900, f"n{number}")

    started, flooding = time.monotonic(), asyncio.create_task(flood())
    await until(lambda: not mine.transport.is_reading())
    await say(from_bob, "hello")
    nonces = [(await read(from_ann, "receipt"))["nonce"] for _ in range(750)]
    assert nonces == [f"n{number}" for number in range(750)]
    assert time.monotonic() - started >= 1.4
    await flooding


async def test_one_window_too_many_is_refused_before_its_upgrade(serve):
    """Also if handshakes come at once; and the limit is per person."""
    server = await serve(chat.Settings(CONNECTIONS_PER_PERSON=2))
    ann = await sign_in(server, "ann")
    attempts = [ann.ws_connect("/ws") for _ in range(5)]
    results = await asyncio.gather(*attempts, return_exceptions=True)
    refused = [error for error in results if isinstance(error, Exception)]
    assert [error.status for error in refused] == [429, 429, 429]
    response = await ann.get("/ws")
    assert response.status == 429 and "2 windows" in await response.text()
    await connect(await sign_in(server, "bob"))
    await next(ws for ws in results if ws not in refused).close()
    await until(lambda: len(sockets_of(server, "ann")) == 1)
    assert (await ann.get("/ws")).status == 400  # a plain GET, which is no handshake
    await connect(ann)


async def test_heartbeat_tells_every_reader_the_newest_number(serve, monkeypatch):
    assert chat.HEARTBEAT == 20
    monkeypatch.setattr(chat, "HEARTBEAT", 0.05)
    ws = await connect(await sign_in(await serve(chat.Settings())))
    assert await read(ws, "heartbeat") == {"type": "heartbeat", "last": 0}
    await say(ws, "hello")
    assert await read(ws, "heartbeat") == {"type": "heartbeat", "last": 1}


async def test_users_see_each_other_come_and_go_once_for_all_their_tabs(server):
    """A reload is no departure, and is not told."""
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann = await connect(ann)
    assert from_ann.welcome["online"] == ["ann"]
    assert await read(from_ann) == {"type": "joined", "user": "ann"}
    tabs = [await connect(bob) for _ in range(2)]
    assert tabs[1].welcome["online"] == ["ann", "bob"]
    assert await read(from_ann) == {"type": "joined", "user": "bob"}
    for tab in tabs:  # a reload of both
        await tab.close()
    await until(lambda: "bob" in server.app[chat.ROOM].missing)
    await asyncio.sleep(0.8)  # another look misses him, too
    tabs = [await connect(bob) for _ in range(2)]
    await tabs[0].close()
    await asyncio.sleep(chat.GRACE + 1)
    await say(tabs[1], "still here")
    assert (await read(from_ann))["type"] == "message"
    await tabs[1].close()
    assert await read(from_ann) == {"type": "left", "user": "bob"}


async def stall(server, session, path="/ws"):
    """Open a WebSocket that never reads, with a tiny buffer. Closed, it hangs up."""
    (cookie,) = session.cookie_jar
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.connect(("127.0.0.1", server.port))
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Upgrade: websocket"]
    lines += ["Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    lines += ["Sec-WebSocket-Extensions: permessage-deflate"]
    lines += [f"Sec-WebSocket-Key: {22 * 'x'}=="]
    lines += [f"Cookie: {cookie.key}={cookie.value}"]
    sock.send("\r\n".join([*lines, "", ""]).encode())
    return sock


async def test_reader_that_stops_reading_delays_nobody_and_is_cut_off(serve):
    settings = chat.Settings(MAX_MESSAGE_LENGTH=10_000, MAX_UNSENT_BYTES=100_000)
    server = await serve(settings)
    room = server.app[chat.ROOM]
    from_ann = await connect(await sign_in(server, "ann"))
    with await stall(server, (await sign_in(server, "bob")).session):
        await until(lambda: sockets_of(server, "bob"))
        for number in range(1, 1001):  # 40 MB, far beyond what the kernel holds
            await chat.post(room, EVE, "😀" * 10_000, f"{number}")
            assert (await read(from_ann, "message"))["id"] == number
            for one in room.sockets:
                assert one.transport.get_write_buffer_size() < 200_000
            if len(room.sockets) == 1:
                break
        assert sockets_of(server, "ann") and not sockets_of(server, "bob")


async def test_reader_that_stops_or_goes_during_its_replay_delays_nobody(serve, caplog):
    server = await serve(chat.Settings(MAX_MESSAGE_LENGTH=10_000))
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    await fill(server, 300, text="😀" * 10_000)
    with await stall(server, bob.session, "/ws?after=0"):
        await until(lambda: sockets_of(server, "bob"))
        ws = await connect(ann, after=0)
        assert len(ws.replayed) == 300
        assert (await say(ws, "next"))["id"] == 301
        (stalled,) = sockets_of(server, "bob")
        await until(lambda: stalled.transport.get_write_buffer_size() > 10_000)
    await until(lambda: not sockets_of(server, "bob"))
    assert caplog.text == ""


async def test_client_that_floods_and_hangs_up_is_gone(memory, caplog):
    with await stall(memory, (await sign_in(memory)).session) as client:
        await until(lambda: sockets_of(memory, "ann"))
        client.send(500 * b"\x81\x81\0\0\0\0x")  # each gets an answer
    await until(lambda: not memory.app[chat.ROOM].sockets)
    assert caplog.text == ""


async def test_client_that_answers_no_ping_is_cut_off(serve, monkeypatch):
    """It may have lost its network, which no packet tells."""
    assert chat.SOCKET["heartbeat"] == 30
    monkeypatch.setitem(chat.SOCKET, "heartbeat", 0.2)
    server = await serve(chat.Settings())
    with await stall(server, (await sign_in(server)).session):
        await until(lambda: sockets_of(server, "ann"))
        await until(lambda: not sockets_of(server, "ann"))


def test_frame_is_what_the_protocol_says():
    for length in 1, 40, 50, 60, 1000, 30_000, 70_000:
        fields = {"type": "x", "text": "é" * length}
        frame = chat.encode_frame(fields)
        payload = json.dumps(fields, ensure_ascii=False).encode()
        ((opcode, content), *more), rest = parse_frames(frame)
        assert (opcode, content, more, rest) == (1, payload, [], b"")


def parse_frames(data):
    """Return the (opcode, payload) of each whole frame of a server's, and the rest."""
    frames = []
    while len(data) >= 2:
        size, start = data[1], 2
        if size > 125:
            start = 4 if size == 126 else 10
            size = int.from_bytes(data[2:start])
            assert size > 125 if start == 4 else size > 65_535  # the shortest form
        if len(data) < start + size:
            break
        assert data[0] & 0xF0 == 0x80  # final, and nothing compressed
        frames.append((data[0] & 0x0F, data[start : start + size]))
        data = data[start + size :]
    return frames, data


def masked(opcode, payload):
    """Make a frame of a client's, whose mask changes nothing."""
    size = bytes([0x80 | len(payload)])
    if len(payload) > 125:
        size = b"\xfe" + struct.pack("!H", len(payload))
    return bytes([0x80 | opcode]) + size + bytes(4) + payload


async def test_aiohttps_writes_and_ours_keep_their_order_on_one_socket(serve):
    """Replay, pongs, pings and the close frame are aiohttp's; the others are ours.

    We write beneath its writer. If that held back, split or compressed a frame of its
    own, then frames would change places, or break. Nothing may follow the close frame.
    """
    limits = {"MESSAGE_BURST": 1_000, "MAX_MESSAGE_LENGTH": 10_000}
    server = await serve(chat.Settings(**limits))
    ann, room = await sign_in(server), server.app[chat.ROOM]
    await fill(server, 30, text="😀" * 10_000)
    sock = await stall(server, ann.session, "/ws?after=0")
    reader, writer = await asyncio.open_connection(sock=sock)
    assert b"101" in await reader.readuntil(b"\r\n\r\n")
    reading = asyncio.create_task(reader.read())
    for number in range(0, 60, 2):
        writer.write(masked(1, event(nonce=f"{number}").encode()))
        writer.write(masked(9, b"%d" % (number + 1)))
    await until(lambda: [one for one in sockets_of(server, "ann") if one.live])
    (mine,) = sockets_of(server, "ann")
    for number in range(30):
        await chat.post(room, EVE, "y" * 5_000, f"e{number}")
        await mine.ws.ping(b"ping")
    await until(lambda: room.history.last == 90)
    closing = asyncio.create_task(mine.ws.close(code=1001, drain=False))
    await asyncio.sleep(0)  # the close frame is out, and the socket still in the room
    chat.broadcast(room, {"type": "too late"})
    chat.flush(room)
    frames, rest = parse_frames(await asyncio.wait_for(reading, 10))
    writer.close()
    await closing
    events = [json.loads(payload) for opcode, payload in frames if opcode == 1]
    assert rest == b"" and frames[-1] == (8, struct.pack("!H", 1001))
    told = [one["id"] for one in events if one["type"] == "message"]
    assert told == list(range(1, 91)) and events[30]["type"] == "welcome"
    assert frames.count((9, b"ping")) == 30
    answers = [int(payload if opcode == 10 else json.loads(payload)["nonce"])
               for opcode, payload in frames
               if opcode == 10 or b'"receipt"' in payload]  # fmt: skip
    assert answers == list(range(60))


async def test_frames_that_fall_due_together_leave_in_one_write(memory):
    ws, room = await connect(await sign_in(memory)), memory.app[chat.ROOM]
    (mine,), writes = room.sockets, []
    write = mine.write
    mine.write = lambda frames: writes.append(frames) or write(frames)
    await asyncio.gather(*(chat.post(room, EVE, "x", f"{n}") for n in range(8)))
    assert [(await read(ws, "message"))["id"] for _ in range(8)] == list(range(1, 9))
    assert len(writes) < 8


# ==============================================================================
# 6. Routes and static
# ==============================================================================
async def test_every_page_has_the_security_headers_and_answers_head(memory):
    """A WebSocket has none of them: it would keep them in memory for hours."""
    ann = await sign_in(memory)
    for path in "/", "/?before=9", "/signin", "/nothing", "/static/chat.js":
        page, head = await ann.get(path), await ann.head(path)
        assert (head.status, await head.text()) == (page.status, "")
        policy = page.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy
        assert page.headers["X-Content-Type-Options"] == "nosniff"
        assert page.headers["Referrer-Policy"] == "same-origin"
        kept = "no-store" if path in {"/", "/?before=9", "/signin"} else "no-cache"
        assert page.headers["Cache-Control"] == kept
        text = await page.text()
        assert "<html" not in text or '<meta name="referrer" content="same-orig' in text
    assert "Content-Security-Policy" not in (await connect(ann))._response.headers


async def test_page_may_be_framed_by_another_port_of_its_host(memory):
    """A notebook on another port shows the chat in a frame."""
    visitor = await memory.visitor()
    for host in "127.0.0.1", "localhost", "[::1]":
        response = await visitor.get("/login", headers={"Host": f"{host}:8080"})
        policy = response.headers["Content-Security-Policy"]
        assert policy.endswith(f"; frame-ancestors 'self' http://{host}:*")


ODD = [
    b"Host:", b"\xff: x", b"X: " + 70_000 * b"y", b"Expect: rubbish", b"Host: [::1",
    b"Transfer-Encoding: rubbish", b"Content-Length: -1", b"Upgrade: rubbish",
    b"Cookie: =;;=\xff; \x01", b"Origin: \xff\xfe", b"Referer: http://[",
    b"Content-Type: \xff; charset=\xfe",
]  # fmt: skip


@pytest.mark.parametrize("header", ODD)
async def test_odd_header_breaks_nothing(memory, caplog, header):
    for request in b"GET /login", b"GET /", b"GET /ws", b"POST /login":
        answer = await raw_request(memory, request, header)
        assert re.match(rb"HTTP/1.[01] [1234]", answer), answer[:200]
    assert "Traceback" not in caplog.text


# ==============================================================================
# 7. Startup and shutdown
# ==============================================================================
def test_importing_the_module_starts_nothing():
    code = "import threading, chat; assert threading.active_count() == 1"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_chat_starts_with_nothing_set_and_stops_without_a_word(start, number):
    code, output, errors = start().wait_until_ready().stop(number)
    assert (code, errors) == (0, "")
    assert "live in memory only" in output and "CTRL+C" in output
    assert re.search(r"http://127\.0\.0\.1:\d+", output)


@pytest.mark.parametrize("redirection", ["| head -1", ">&-", ">&- 2>&- <&-"])
def test_nobody_has_to_listen_to_what_the_chat_prints(redirection):
    """As in a pipe that ends after a line, or without a console."""
    port, pipes = unused_port(), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    script = f"set -o pipefail; PORT={port} {sys.executable} chat.py {redirection}"
    options = {"cwd": ROOT, "start_new_session": True} | pipes
    process = subprocess.Popen(["bash", "-c", script], **options)
    try:
        wait_for(lambda: can_connect(port))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/login") as response:
            assert response.status == 200
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert errors == b""


def test_task_that_fails_is_logged_and_ends_the_process(start, tmp_path):
    """The host starts it again; otherwise the room would stay silent."""
    script = tmp_path / "broken.py"
    fault = "chat.HEARTBEAT, chat.broadcast = 1, None"
    script.write_text(f"import chat\n{fault}\nchat.main()\n")
    code, output, errors = start(script).end()
    assert code == 1 and "CTRL+C" in output
    assert errors.count("A background task failed") == 1
    assert "in keep_alive" in errors and "TypeError" in errors


async def test_database_that_cannot_be_followed_ends_the_start(mongodb, monkeypatch):
    """As with a MongoDB user that may read and write, but not watch."""
    monkeypatch.setattr(chat, "PIPELINE", [{"$match": {"$nonsense": 1}}])
    monkeypatch.setattr(chat, "DEADLINE", 2)
    before = asyncio.all_tasks()
    runner = chat.web.AppRunner(chat.init_app(on(mongodb)))
    with pytest.raises(chat.CannotStart, match="did not open in time"):
        await runner.setup()
    await runner.cleanup()
    assert asyncio.all_tasks() == before


def test_connections_beyond_the_limit_of_open_files_are_one_line(start, tmp_path):
    """The chat raises its own limit as far as it may: here to 64 files."""
    script = tmp_path / "limited.py"
    limit = "import resource as r\nr.setrlimit(r.RLIMIT_NOFILE, (32, 64))\n"
    script.write_text(f"{limit}import chat\nchat.main()\n")
    process = start(script).wait_until_ready()
    assert resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE) == (64, 64)
    address = "127.0.0.1", process.port
    with contextlib.ExitStack() as crowd:
        for _ in range(100):
            crowd.enter_context(socket.create_connection(address))
        time.sleep(1)
    with urllib.request.urlopen(process.url + "/login", timeout=10) as response:
        assert response.status == 200
    time.sleep(1.5)  # asyncio accepts again a second after the last refusal
    code, _, errors = process.stop()
    assert (code, errors.count("\n")) == (0, 1), errors[:2_000]
    assert "out of system resource" in errors


def test_requests_are_logged_if_you_ask_for_it(start):
    process = start(LOG_REQUESTS="true").wait_until_ready()
    with urllib.request.urlopen(process.url + "/login") as response:
        assert response.status == 200
    code, _, errors = process.stop()
    assert code == 0 and '"GET /login HTTP/1.1" 200' in errors


LOGGERS = ["chat", "aiohttp.server", "aiohttp_session", "asyncio", "pymongo.client"]


@pytest.mark.parametrize("name", LOGGERS)
def test_repeated_line_is_logged_once_a_minute(monkeypatch, caplog, name):
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    caplog.set_level(logging.WARNING, name)  # the workshop has silenced one
    chat.init_app(chat.Settings())
    for number in range(3):
        logging.getLogger(name).warning("A client has sent %s", number)
    assert len(caplog.messages) == 1
    now += 60
    logging.getLogger(name).warning("A client has sent %s", 4)
    assert len(caplog.messages) == 2


def test_what_prevents_the_start_is_one_line_that_names_the_setting(start):
    """A MongoDB that never answers, a taken port, a name that nobody has …"""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        wrong = [{"MONGO_HOST": f"mongodb://ann:s3cret@127.0.0.1:{port}/"}]
        wrong += [{"PORT": port}, {"SITE_HOST": "1.2.3.4"}]
        wrong += [{"SITE_HOST": host} for host in ("host.invalid", "a..b", "x" * 70)]
        for process in [start(**settings, SECRET_KEY=KEY) for settings in wrong]:
            code, _, errors = process.end(60)
            assert (code, errors.count("\n")) == (2, 1), errors
            blamed = "MONGO_HOST" if wrong.pop(0).get("MONGO_HOST") else "SITE_HOST"
            assert errors.startswith(f"chat: {blamed} ") and "s3cret" not in errors


async def test_all_sockets_close_at_once_with_1001_though_a_reader_has_stalled(start):
    limits = {"MESSAGES_PER_SECOND": "1000", "MESSAGE_BURST": "1000"}
    limits |= {"MAX_MESSAGE_LENGTH": "10000", "MAX_UNSENT_BYTES": str(1 << 30)}
    process = start(CONNECTIONS_PER_PERSON="501", **limits).wait_until_ready()
    jar, connector = aiohttp.CookieJar(unsafe=True), aiohttp.TCPConnector(limit=0)
    options = {"connector": connector, "cookie_jar": jar}
    async with aiohttp.ClientSession(process.url, **options) as session:
        await session.post("/signin", data=form("ann"))
        with await stall(process, session):
            ws = await session.ws_connect("/ws")
            for _ in range(250):  # 10 MB: the kernel holds about 4 of them
                await say(ws, "😀" * 10_000)
            sockets = [await session.ws_connect("/ws") for _ in range(499)]
            codes = [asyncio.create_task(closed(ws)) for ws in [ws, *sockets]]
            process.process.send_signal(signal.SIGINT)
            assert set(await asyncio.gather(*codes)) == {1001}
            code, _, errors = await asyncio.to_thread(process.end, 8)
    assert (code, errors) == (0, "")
