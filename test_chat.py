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
from urllib.parse import urlencode

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
    Mongod,
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
)

EVE = {"_id": ObjectId(), "name": "eve"}  # a user who writes without a socket


async def fill(server, count, text="text {}"):
    """Store messages of Eve's, numbered from 1, and wait until all were broadcast."""
    room = server.app[chat.ROOM]
    for number in range(1, count + 1):
        await chat.post(room, EVE, text.format(number), f"{number}")
    await until(lambda: room.history.last == count)


def sockets_of(server, name):
    return [s for s in server.app[chat.ROOM].sockets if s.user["name"] == name]


async def operate(server, write):
    """Do to the database what an operator would do, as the chat's own docs say."""
    db = server.app[chat.ROOM].db
    await (write(db) if db.shared else db.edit(write(db)))


async def blank(server, number):
    change = {"$set": {"text": ""}}
    await operate(server, lambda db: db.messages.update_one({"_id": number}, change))


async def break_stream(server):
    """In memory: make the room read everything again, as it does after an outage."""
    await server.app[chat.ROOM].db.edit(asyncio.sleep(0))


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


def examples(strategy, count):
    """Generate that many inputs, the same on every run."""
    import hypothesis  # here, so that one test alone starts at once

    found = []

    @hypothesis.settings(max_examples=count, database=None, derandomize=True)
    @hypothesis.given(strategy(hypothesis.strategies))
    def collect(example):
        found.append(example)

    collect()
    return found


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
    expected = []
    for name, default in chat.Settings().model_dump().items():
        default = str(default).lower() if isinstance(default, bool) else default
        expected.append(f"{name}={default}")
    assert assignments == expected


def run_main(monkeypatch, capsys):
    """Run the chat up to the point where it would serve; return its exit code and
    what it said and complained of."""
    monkeypatch.setattr(chat, "run", lambda settings: None)
    try:
        code = chat.main()
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


WRONG = [
    "LOG_REQUESTS=perhaps", "SITE_HOST=", "PORT=http", "PORT=", "PORT=65536", "PORT=-1",
    "ORIGIN=chat.example", "ORIGIN=https://chat.example/path", "ORIGIN=https://[",
    "ORIGIN=https://chat.example?a=b", "ORIGIN=https://", "ORIGIN=ws://chat.example",
    "MAX_MESSAGE_LENGTH=0", "MAX_MESSAGE_LENGTH=10001", "MESSAGES_PER_SECOND=0.5",
    "MESSAGE_BURST=0", "CONNECTIONS_PER_PERSON=0", "LOGIN_ATTEMPTS=nan",
    "MAX_UNSENT_BYTES=1", "MONGO_DB_NAME=a.b", "MONGO_DB_NAME=", "SECRET_KEY=a",
    "SECRET_KEY=" + 31 * "x",
]  # fmt: skip


@pytest.mark.parametrize("assignment", WRONG)
def test_wrong_setting_is_one_line_with_its_name(monkeypatch, capsys, assignment):
    name, _, value = assignment.partition("=")
    monkeypatch.setenv(name, value)
    code, output, errors = run_main(monkeypatch, capsys)
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith(f"chat: {name}: ")


def test_all_wrong_settings_are_told_at_once_and_none_with_a_password(start):
    wrong = dict(assignment.split("=", 1) for assignment in WRONG)
    uri = "mongodb://ann:s3cret@127.0.0.1:1"
    code, output, errors = start(**wrong, MONGO_HOST=uri).end()
    told = {re.match("chat: ([A-Z_]+): ", line)[1] for line in errors.splitlines()}
    assert (code, output, told) == (2, "", set(wrong))
    assert "s3cret" not in errors


def test_mongodb_needs_a_secret_key_and_the_line_says_how_to_make_one(
    monkeypatch, capsys
):
    """Several processes need the same key; in memory each run may make its own."""
    assert run_main(monkeypatch, capsys) == (None, "", "")
    monkeypatch.setenv("MONGO_HOST", "mongodb://localhost")
    code, _, errors = run_main(monkeypatch, capsys)
    assert (code, errors.count("\n")) == (2, 1) and "SECRET_KEY: " in errors
    program = re.search('python -c "(.+)"', errors)[1]
    made = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE)
    monkeypatch.setenv("SECRET_KEY", made.stdout.decode().strip())
    assert run_main(monkeypatch, capsys) == (None, "", "")


def test_host_and_debug_in_the_environment_disturb_nothing(monkeypatch, capsys):
    """conda exports HOST, and Node's users set DEBUG."""
    monkeypatch.setenv("HOST", "x86_64-conda-linux-gnu")
    monkeypatch.setenv("DEBUG", "app:*")
    assert run_main(monkeypatch, capsys) == (None, "", "")


def test_old_name_in_env_file_is_told_in_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / ".env").write_text("HOST=0.0.0.0\nDEBUG=true\nEDITOR=vi\n")
    monkeypatch.setitem(chat.Settings.model_config, "env_file", tmp_path / ".env")
    code, output, errors = run_main(monkeypatch, capsys)
    first, second = sorted((output + errors).splitlines())
    assert code is None
    assert "DEBUG" in first and "LOG_REQUESTS" in first
    assert "HOST" in second and "SITE_HOST" in second


def test_env_file_with_other_bytes_than_text_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / ".env").write_bytes(b"PORT=\xff\xfe")
    monkeypatch.setitem(chat.Settings.model_config, "env_file", tmp_path / ".env")
    code, _, errors = run_main(monkeypatch, capsys)
    assert (code, errors) == (2, "chat: .env must be a text file in UTF-8\n")


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        ("HTTPS://Chat.Example:443/", "https://chat.example"),
        ("http://chat.example:80", "http://chat.example"),
        ("https://chat.example:8443", "https://chat.example:8443"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("http://[::1]:8080/", "http://[::1]:8080"),
        ("", ""),
    ],
)
def test_origin_is_kept_as_browsers_send_it(typed, sent):
    settings = chat.Settings(ORIGIN=typed)
    assert sent == settings.ORIGIN


async def test_secret_key_may_be_any_text_that_an_environment_can_hold(serve):
    for key in 32 * "ключ", 32 * "\udcff", 32 * " ":
        await sign_in(await serve(chat.Settings(SECRET_KEY=key)))


def test_inline_metadata_says_what_requirements_say():
    source = (ROOT / "chat.py").read_text()
    block = re.search(r"(?m)^# /// script$\s(?P<content>(^#.*$\s)+)^# ///$", source)
    metadata = "".join(line[2:] for line in block["content"].splitlines(True))
    inline = re.findall(r'^ *"(.+)",', metadata, re.MULTILINE)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line for line in lines if not line.startswith("#")]
    assert sorted(inline) == sorted(required)
    assert 'requires-python = ">=3.11"' in metadata


# ==============================================================================
# 2. Middlewares
# ==============================================================================
async def test_anonymous_visitor_is_sent_to_login(server):
    visitor = await server.visitor()
    for method, path in ("GET", "/"), ("POST", "/signout"):
        response = await visitor.request(method, path, allow_redirects=False)
        assert (response.status, response.headers["Location"]) == (303, "/login")


async def test_socket_without_a_session_is_a_401_that_only_we_send(server):
    """A script follows no redirect, and a proxy may answer 401 as well."""
    response = await (await server.visitor()).get("/ws", allow_redirects=False)
    assert response.status == 401
    assert response.headers["WWW-Authenticate"] == 'Cookie realm="chat"'


async def test_unknown_url_is_a_404_with_and_without_a_session(server):
    for visitor in (await server.visitor(), await sign_in(server)):
        for path in "/nothing", "/login/more", "/static/nothing", "/ws/", "/%ff%00":
            assert (await visitor.get(path)).status == 404
    assert (await visitor.get("/signout")).status == 405


async def test_static_files_need_no_session(server):
    visitor = await server.visitor()
    for name in "chat.js", "chat.css", "favicon.svg":
        response = await visitor.get(f"/static/{name}")
        assert response.status == 200
        assert response.headers["Cache-Control"] == "no-cache"
    assert (await visitor.get("/static/../chat.py")).status == 404
    assert (await visitor.get("/static/%2e%2e/chat.py")).status in {403, 404}


async def test_pipelined_requests_let_others_run_between_each_two(settings):
    """1,500 requests in one piece once held everybody's messages for 0.8 s."""
    app, turns, answered = chat.init_app(settings), 0, []
    loop = asyncio.get_running_loop()

    async def note(request, response):
        answered.append(turns)

    def turn():
        nonlocal turns
        turns += 1
        if len(answered) < 40:
            loop.call_soon(turn)

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


FOREIGN = [
    "http://evil.example", "null", "", "http://127.0.0.1:1", "évil",
    "http://user@127.0.0.1:{port}@evil.example", "http://127.0.0.1:{port}.evil.example",
]  # fmt: skip


@pytest.mark.parametrize("origin", FOREIGN)
async def test_other_origin_is_refused_and_the_answer_names_the_right_one(
    server, origin
):
    ann = await sign_in(server)
    headers = {"Origin": origin.format(port=server.port)}
    for path in "/login", "/signin", "/signout":
        response = await ann.post(path, data=form("eve"), headers=headers)
        assert response.status == 403
        assert f"127.0.0.1:{server.port}" in await response.text()
    with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
        await ann.ws_connect("/ws", headers=headers)
    assert (await ann.get("/", headers=headers)).status == 200  # changes nothing


async def test_own_origin_may_write_and_a_client_that_sends_none(server):
    ann = await sign_in(server)
    for headers in {"Origin": f"http://127.0.0.1:{server.port}"}, {}:
        ws = await ann.ws_connect("/ws", headers=headers)
        assert (await read(ws, "welcome"))["user"] == "ann"
        response = await ann.post("/login", data=form("ann"), headers=headers)
        assert (response.status, response.url.path) == (200, "/")


ORIGIN = "https://chat.example"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "chat.example:443"},
        {"Host": "10.0.0.7:8080", "X-Forwarded-Host": "chat.example, proxy.internal"},
        {"Host": "evil.example", "X-Forwarded-Proto": "http"},
    ],
)
async def test_with_origin_set_no_header_of_a_proxy_refuses_the_chats_users(
    serve, headers
):
    """Only the browser's Origin counts, not what a proxy writes or forgets."""
    server = await serve(chat.Settings(ORIGIN=ORIGIN))
    visitor = await server.visitor()
    data = form("ann")
    response = await visitor.post("/signin", data=data, allow_redirects=False)
    cookie = response.headers["Set-Cookie"].partition(";")[0]  # for https only
    headers = headers | {"Origin": ORIGIN, "Cookie": cookie}
    ws = await visitor.ws_connect("/ws", headers=headers)
    assert (await read(ws, "welcome"))["user"] == "ann"
    options = {"headers": headers, "allow_redirects": False}
    assert (await visitor.post("/login", data=data, **options)).status == 303


@pytest.mark.parametrize(
    "origin",
    [
        "http://chat.example", "https://chat.example:8443", "https://evil.example",
        "https://chat.example.evil.example", "null", "", "http://127.0.0.1:{port}",
    ],
)  # fmt: skip
async def test_with_origin_set_every_other_origin_is_refused(serve, caplog, origin):
    server = await serve(chat.Settings(ORIGIN=ORIGIN))
    ann = await server.visitor()
    headers = {"Origin": origin.format(port=server.port), "Host": "chat.example"}
    for _ in range(3):
        response = await ann.post("/signin", data=form("ann"), headers=headers)
        assert response.status == 403 and ORIGIN in await response.text()
        assert (await ann.get("/ws", headers=headers)).status == 403
    (line,) = caplog.messages  # once a minute
    assert repr(headers["Origin"]) in line and repr(ORIGIN) in line


@pytest.mark.parametrize(
    "host", ["evil.example:8080", "127.0.0.1.evil.example", "", "127.0.0.1:x",
             "localhost.evil.example", "[::1].evil.example", "a b"]
)  # fmt: skip
async def test_without_origin_a_host_name_that_others_can_point_is_refused(
    serve, caplog, host
):
    """DNS rebinding: a page of evil.example, whose name points at 127.0.0.1."""
    server = await serve(chat.Settings())
    visitor = await server.visitor()
    headers = {"Host": host, "Origin": f"http://{host}"}
    for path in "/login", "/", "/static/chat.js", "/nothing", "/ws":
        response = await visitor.get(path, headers=headers)
        assert response.status == 421 and "set ORIGIN" in await response.text()
    response = await visitor.post("/signin", data=form("eve"), headers=headers)
    assert response.status == 421
    (line,) = caplog.messages
    assert repr(host) in line and "ORIGIN" in line


@pytest.mark.parametrize(
    "host", ["localhost", "192.168.1.7:8080", "[::1]:8080", "[fe80::1]"]
)
async def test_without_origin_localhost_and_addresses_are_served(serve, host):
    visitor = await (await serve(chat.Settings())).visitor()
    own, foreign = f"http://{host}", "http://localhost:2"
    for origin, status in (own, 303), (foreign, 403), ("null", 403):
        headers = {"Host": host, "Origin": origin}
        options = {"headers": headers, "allow_redirects": False}
        response = await visitor.post("/signin", data=form("ann"), **options)
        assert response.status == status


async def test_browser_that_keeps_no_cookie_is_told_so(serve):
    server = await serve(chat.Settings())
    async with TestClient(server, cookie_jar=aiohttp.DummyCookieJar()) as visitor:
        for path in "/signin", "/login":
            headers = {"Referer": str(server.make_url(path + "?why=ended"))}
            response = await visitor.post(path, data=form("ann"), headers=headers)
            assert str(response.url).endswith("/login?why=cookie")
        response = await visitor.get("/", headers={"Referer": str(server.make_url(""))})
        assert str(response.url).endswith("/login")


@pytest.mark.parametrize(
    ("why", "sentence"),
    [("cookie", "cookie"), ("ended", "ended"), ("<b>", None), ("", None)],
)
async def test_login_says_why_you_have_to_sign_in_again(serve, why, sentence):
    visitor = await (await serve(chat.Settings())).visitor()
    page = await (await visitor.get("/login", params={"why": why})).text()
    notice = re.search('class="notice"[^>]*>([^<]*)', page)
    assert sentence in notice[1] if sentence else not notice


async def test_request_knows_the_id_and_the_name_of_its_user_and_no_more(server):
    """Above all not the hash of the password, which would stay with a socket."""
    await connect(await sign_in(server, email="ann@example.org"))
    (mine,) = sockets_of(server, "ann")
    assert mine.user.keys() == {"_id", "name"}


async def test_head_is_answered_wherever_get_is(server):
    ann, visitor = await sign_in(server), await server.visitor()
    for path, status in ("/login", 200), ("/signin", 200), ("/static/chat.js", 200):
        response = await visitor.head(path)
        assert (response.status, await response.text()) == (status, "")
    for path, status in ("/", 200), ("/?before=9", 200), ("/login", 303):
        response = await ann.head(path, allow_redirects=False)
        assert response.status == status


async def test_fault_of_ours_is_a_plain_500_with_its_traceback_in_the_log_each_time(
    serve, monkeypatch, caplog
):
    visitor = await (await serve(chat.Settings())).visitor()
    monkeypatch.setattr(chat.Login, "page", lambda *_: {}["a fault of ours"])
    for _ in range(2):
        caplog.clear()
        response = await visitor.get("/login")
        assert response.status == 500 and "fault" not in await response.text()
        assert "KeyError: 'a fault of ours'" in caplog.text


async def test_database_that_does_not_answer_is_a_503_and_comes_back(
    own_mongodb, serve, caplog
):
    server = await serve(on(own_mongodb.uri))
    ann = await sign_in(server)
    own_mongodb.freeze()
    pages = [ann.get("/") for _ in range(30)] + [ann.post("/login", data=form("ann"))]
    pages += [ann.get("/ws")]
    async with asyncio.timeout(8):  # more than there are threads, and not in turn
        responses = await asyncio.gather(*pages)
    for response in responses:
        assert (response.status, response.headers["Retry-After"]) == (503, "5")
        assert "does not answer" in await response.text()
    own_mongodb.thaw()
    await until(lambda: is_served(ann))
    assert not re.search("Traceback|argon2", caplog.text)


async def is_served(visitor):
    return (await visitor.get("/")).status == 200


# ==============================================================================
# 3. Database and models
# ==============================================================================
def test_names_in_all_spellings_are_one():
    for spelling in "ann", "Ann", "ANN", "ａｎｎ", "Ａｎｎ":
        assert chat.fold(spelling) == "ann"
    assert chat.fold("Straße") == chat.fold("STRASSE")
    assert chat.fold("ﬁn") == chat.fold("FIN")
    assert chat.fold("İx") == chat.fold(chat.fold("İx"))


async def test_message_numbers_have_no_gap(server):
    """Rule 1, with two users who write at the same time."""
    sockets = [await connect(await sign_in(server, name)) for name in ("ann", "bob")]
    for _ in range(8):
        await asyncio.gather(*(say(ws, "hello") for ws in sockets))
    events = await chat.newest(server.app[chat.ROOM].db, 100)
    assert [event["id"] for event in events] == list(range(1, 17))


async def test_two_that_fight_for_every_number_leave_no_gap(serve, mongodb):
    """Rule 1: two applications on one database claim numbers at the same time."""
    settings = on(mongodb)
    databases = [(await serve(settings)).app[chat.ROOM].db for _ in "12"]
    users = [{"_id": ObjectId(), "name": name} for name in ("ann", "bob")]

    async def write(db, user):
        for number in range(50):
            await chat.save(db, 1, user, f"{number}", f"{number}")

    await asyncio.gather(*map(write, databases, users))
    events = await chat.newest(databases[0], 200)
    assert [event["id"] for event in events] == list(range(1, 101))
    for user in users:
        texts = [event["text"] for event in events if event["user"] == user["name"]]
        assert texts == [f"{number}" for number in range(50)]


async def test_process_that_lags_catches_up_when_its_number_is_taken(serve, mongodb):
    """It jumps to the newest number: one step a message would never catch up."""
    db, tried = (await serve(on(mongodb))).app[chat.ROOM].db, []
    for number in range(1, 21):
        await chat.save(db, number, EVE, "x", f"{number}")
    insert, bob = db.insert, {"_id": ObjectId(), "name": "bob"}
    db.insert = lambda message: tried.append(message["_id"]) or insert(message)
    assert await chat.save(db, 3, bob, "late", "n1") == 21
    assert tried == [3, 21]


async def test_nonce_is_stored_once_even_if_no_process_remembers_it(serve, mongodb):
    """Rule 3: the unique index knows it; it is unique for its user only."""
    server = await serve(on(mongodb))
    from_ann = await connect(await sign_in(server, "ann"))
    first = await say(from_ann, "long ago", "n1")
    await say(from_ann, "later")
    server.app[chat.ROOM].history.receipts.clear()
    receipt = {"type": "receipt", "nonce": "n1", "id": first["id"]}
    assert await send(from_ann, "long ago", "n1") == receipt
    from_bob = await connect(await sign_in(server, "bob"))
    assert (await send(from_bob, "me too", "n1"))["id"] == 3


async def test_memory_holds_the_newest_messages_only(serve):
    server = await serve(chat.Settings())
    db, kept = server.app[chat.ROOM].db, chat.HISTORY_SIZE
    for number in range(3 * kept):
        await chat.post(server.app[chat.ROOM], EVE, f"{number}", f"{number}")
        if number % 100 == 99:
            assert await db.messages.estimated_document_count() <= 2 * kept
    history = server.app[chat.ROOM].history
    await until(lambda: history.last == 3 * kept)
    assert len(history.events) == len(history.receipts) == kept
    page = await (await (await sign_in(server)).get("/")).text()
    assert shown_ids(page) == list(range(3 * kept - 49, 3 * kept + 1))


async def test_message_that_the_stream_did_not_bring_is_told_with_the_next(serve):
    """The next number shows the gap: the room reads everything again."""
    server = await serve(chat.Settings())
    ws = await connect(await sign_in(server))
    await server.app[chat.ROOM].db.messages.insert_one(stored(1, text="late"))
    await send_only(ws, "next", "n2")
    told = [await read(ws, "message") for _ in range(2)]
    assert [(e["id"], e["text"]) for e in told] == [(1, "late"), (2, "next")]


async def test_message_stored_while_everything_is_read_again_comes_once(
    serve, monkeypatch
):
    server = await serve(chat.Settings())
    ws, newest = await connect(await sign_in(server)), chat.newest

    async def post_then_read(*arguments):
        monkeypatch.undo()
        await chat.post(server.app[chat.ROOM], EVE, "meanwhile", "n1")
        return await newest(*arguments)

    monkeypatch.setattr(chat, "newest", post_then_read)
    await break_stream(server)
    await until(lambda: server.app[chat.ROOM].history.last)
    await send_only(ws, "next", "n2")
    heard = [e["id"] for e in await heard_until("n2", ws) if e["type"] == "message"]
    assert heard == [1, 2]


def stored(number, **more):
    """A message as the chat stores it."""
    message = {"_id": number, "user_id": ObjectId(), "user": "bob", "text": "hello"}
    return message | {"time": chat.datetime.now(chat.UTC), "nonce": "n1"} | more


OUT_OF_RANGE = DatetimeMS(1 << 55)
FOREIGN_MESSAGES = [
    {"_id": 2.0}, {"_id": Decimal128("3")}, {"_id": Int64(5), "text": "hello"},
    {"_id": "text"}, {"_id": {"a": 1}}, {"_id": None}, stored(True), stored(-1),
    stored(0), stored(6.5), stored(1 << 60), stored(7, time=OUT_OF_RANGE),
    stored(8, time="yesterday"), stored(9, text=["x"]), stored(10, user=17),
    stored(11, user_id=["x"]), stored(12, nonce=None),
]  # fmt: skip
FOREIGN_USERS = [
    {"_id": "eve", "name": "eve", "name_key": "eve", "password": "x"},
    {"name": "eva", "name_key": "eva"},
    {"_id": {"d": 4}, "name": "evi", "name_key": "evi", "password": "x"},
    {"name": 17, "name_key": 17, "email_key": ["x"], "password": 17},
]
FOREIGN_ENTRIES = [
    {"_id": 13, "seen": OUT_OF_RANGE, "names": "joe"},
    {"names": ["kim", 17]},
    {"names": [17, ["joe"]], "seen": OUT_OF_RANGE},
]


@pytest.mark.parametrize("message", FOREIGN_MESSAGES, ids=lambda m: repr(m["_id"]))
def test_foreign_document_is_no_message_and_one_line_in_the_log(caplog, message):
    assert chat.to_event(stored(1)) and not caplog.messages
    assert chat.to_event(message) is None
    (line,) = caplog.messages
    assert "foreign document" in line and "hello" not in line


async def test_foreign_documents_are_passed_over_while_it_runs_and_after_a_restart(
    serve, mongodb, caplog
):
    settings = on(mongodb)
    server = await serve(settings)
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    await say(from_ann, "before")
    await asyncio.to_thread(insert_foreign_documents, settings)
    for number in range(15):
        sent = await say(from_ann, f"text {number}")
        assert await read(from_bob, "message") == sent
    for name in "eva", "evi":
        assert (await ann.post("/login", data=form(name))).status == 422
    await server.close()
    ws = await connect(await sign_in(await serve(settings), "joe"), after=0)
    texts = ["before"] + [f"text {number}" for number in range(15)]
    assert [event["text"] for event in ws.replayed] == texts
    assert not {"eve", "joe", "kim"} & set(ws.welcome["online"]) - {"joe"}
    assert (await say(ws, "goes on"))["id"] == sent["id"] + 1
    assert [line for line in caplog.messages if "foreign document" not in line] == []


def insert_foreign_documents(settings):
    """Insert each as an operator could, if the chat's indexes let it in."""
    with pymongo.MongoClient(settings.MONGO_HOST) as client:
        db = client[settings.MONGO_DB_NAME]
        groups = FOREIGN_MESSAGES, FOREIGN_USERS, FOREIGN_ENTRIES
        for name, group in zip(("messages", "users", "processes"), groups, strict=True):
            for document in group:
                with contextlib.suppress(pymongo.errors.DuplicateKeyError):
                    db[name].insert_one(dict(document))
        db.users.delete_many({"_id": {"$in": ["eve", {"d": 4}]}})
        db.elsewhere.insert_one({"names": ["eve"]})


async def test_message_taken_back_is_blank_for_every_reader(server):
    """In open windows, for newcomers, on pages and in replays."""
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    sent = [await say(from_ann, f"text {number}") for number in range(1, 4)]
    await blank(server, 2)
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
    assert ws.welcome["last"] == 3


async def test_message_taken_back_during_a_replay_is_blank_at_its_end(
    server, monkeypatch
):
    ann = await sign_in(server)
    await fill(server, 3)
    replay, room = chat.WebSocket.replay, server.app[chat.ROOM]

    async def replay_and_lose_one(*arguments):
        await replay(*arguments)
        await blank(server, 2)
        await until(lambda: room.history.events[2]["text"] == "")

    monkeypatch.setattr(chat.WebSocket, "replay", replay_and_lose_one)
    ws = await connect(ann, after=0)
    texts = [(event["id"], event["text"]) for event in ws.replayed]
    assert texts == [(1, "text 1"), (2, "text 2"), (3, "text 3"), (2, "")]


async def test_message_older_than_what_is_kept_is_taken_back_for_open_windows(
    serve, mongodb
):
    server = await serve(on(mongodb))
    ws = await connect(await sign_in(server))
    await fill(server, chat.HISTORY_SIZE + 1)
    await blank(server, 1)
    while (event := await read(ws, "message"))["text"]:
        pass
    assert event["id"] == 1 and 1 not in server.app[chat.ROOM].history.events


async def test_deleted_account_loses_its_sockets_and_its_session(server):
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    tabs, from_bob = [await connect(ann) for _ in range(3)], await connect(bob)
    await until(lambda: "ann" in server.app[chat.ROOM].online)
    codes = asyncio.gather(*map(closed, tabs))
    await operate(server, lambda db: db.users.delete_one({"name": "ann"}))
    assert await codes == [1008, 1008, 1008]
    assert (await ann.get("/")).url.path == "/login"
    assert (await ann.get("/ws")).status == 401
    await say(from_bob, "still here")
    assert await read(from_bob, "left") == {"type": "left", "user": "ann"}
    again = await sign_in(server, "ann")  # another account, without the old session
    assert (await ann.get("/")).url.path == "/login"
    assert (await say(await connect(again), "anew"))["id"] == 2


async def test_account_deleted_during_a_replay_ends_its_socket(server, monkeypatch):
    ann, replay = await sign_in(server, "ann"), chat.WebSocket.replay

    async def delete_first(socket, after):
        await operate(server, lambda db: db.users.delete_one({"name": "ann"}))
        await until(lambda: socket.ws.closed)
        await replay(socket, after)

    monkeypatch.setattr(chat.WebSocket, "replay", delete_first)
    assert await closed(await ann.ws_connect("/ws")) == 1008
    await until(lambda: not server.app[chat.ROOM].sockets)


async def test_presence_is_stamped_by_the_databases_clock(serve, mongodb, monkeypatch):
    """The users of a host whose clock is wrong stay online, and expire in time."""

    class Yesterday(chat.datetime):
        @classmethod
        def now(cls, zone=None):
            return super().now(zone) - chat.timedelta(days=1)

    server = await serve(on(mongodb))
    monkeypatch.setattr(chat, "datetime", Yesterday)
    db = server.app[chat.ROOM].db.mongo
    await connect(await sign_in(server))
    entry = await until(lambda: db.processes.find_one({"names": "ann"}))
    now = (await db.client.admin.command("hello"))["localTime"]
    now = now.replace(tzinfo=chat.UTC)
    assert abs(now - entry["seen"]) < chat.timedelta(seconds=20)
    indexes = (await db.processes.index_information()).values()
    (expiry,) = [index for index in indexes if "expireAfterSeconds" in index]
    assert expiry["key"] == [("seen", 1)] and expiry["expireAfterSeconds"] <= 60
    await server.close()
    assert await asyncio.to_thread(count_entries, server) == 0  # signed off at the end


def count_entries(server):
    settings = server.app[chat.SETTINGS]
    with pymongo.MongoClient(settings.MONGO_HOST) as client:
        return client[settings.MONGO_DB_NAME].processes.count_documents({})


async def test_dead_process_counts_for_15_seconds_by_the_databases_clock(
    serve, mongodb
):
    server = await serve(on(mongodb))
    bob = await sign_in(server, "bob")
    ws, entries = await connect(bob), server.app[chat.ROOM].db.mongo.processes
    ago = {"fresh": 10, "stale": 16}
    now = (await entries.database.client.admin.command("hello"))["localTime"]
    for name, seconds in ago.items():
        seen = now - chat.timedelta(seconds=seconds)
        await entries.insert_one({"names": [name], "seen": seen})
    names = {(await read(ws, "joined"))["user"] for _ in range(2)}
    assert names == {"bob", "fresh"}


async def test_first_editions_indexes_are_replaced_and_dropped_ones_come_back(
    serve, mongodb
):
    """The first edition's refuse a foreign document, and conflict with ours."""
    settings = on(mongodb)
    with pymongo.MongoClient(mongodb) as client:
        first = client[settings.MONGO_DB_NAME]
        first.users.create_index("name_key", unique=True)
        first.messages.create_index([("user_id", 1), ("nonce", 1)], unique=True)
    server = await serve(settings)
    ws, db = await connect(await sign_in(server)), server.app[chat.ROOM].db
    names = set(await db.messages.index_information())
    assert len(names) == 2 and "user_id_1_nonce_1" not in names
    code = asyncio.create_task(closed(ws))
    await db.mongo.client.drop_database(db.mongo.name)
    assert await code == 1008  # her account has gone as well
    await say(await connect(await sign_in(server, "ann")), "anew")
    assert set(await db.messages.index_information()) == names


async def test_index_that_cannot_be_created_ends_the_start(mongodb):
    settings = on(mongodb)
    with pymongo.MongoClient(mongodb) as client:
        users = client[settings.MONGO_DB_NAME].users
        users.insert_many([{"name_key": "ann"}, {"name_key": "ann"}])
    with pytest.raises(chat.CannotStart, match="cannot be used: .*duplicate key"):
        await chat.open_database(settings)


async def test_index_that_cannot_be_created_again_is_told_and_the_room_goes_on(
    serve, mongodb, caplog
):
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
    "mongodb://ann:s3cret@host.invalid:99999", "mongodb://ann:s3 cret@host.invalid",
    "mongodb://ann:s3cret@[::1", "mongodb://ann:s3cret@host.invalid,b:x/",
    "mongodb+srv://ann:s3cret@host.invalid/", "mongodb://:s3cret@host.invalid",
    "mongodb://ann:x@host.invalid/?tlsCertificateKeyFilePassword=s3cret&tls=true",
]  # fmt: skip


async def test_no_secret_of_a_uri_is_ever_shown_however_it_is_malformed():
    sentences = await asyncio.gather(*map(why_it_cannot_start, SECRETS))
    for sentence in sentences:
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
    used = re.search(r":(\d+)/", mongodb)[1]
    ports = {"free": unused_port(), "used": used}
    uris = [uri.format(**ports) for uri in CAUSES]
    sentences = await asyncio.gather(*map(why_it_cannot_start, uris))
    for uri, cause, sentence in zip(uris, CAUSES.values(), sentences, strict=True):
        assert repr(uri.partition("?")[0]) in sentence
        assert cause.format(**ports) in sentence
        assert len(sentence) < 250 and "Timeout" not in sentence


async def test_replica_set_that_was_not_initiated_says_so(tmp_path):
    mongod = Mongod(tmp_path / "new", "--replSet", "rs0")
    try:
        sentence = await why_it_cannot_start(mongod.uri)
        assert "rs.initiate" in sentence or "not" in sentence, sentence
    finally:
        mongod.kill()


async def test_standalone_mongodb_is_refused_and_what_the_line_says_mends_it(
    start, serve, standalone
):
    """Its data stays: it may come from another program, or from a backup."""
    settings = on(standalone.uri)
    process = start(MONGO_HOST=standalone.uri, SECRET_KEY=KEY)
    code, _, errors = await asyncio.to_thread(process.end)
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
async def test_two_people_sign_up_chat_and_find_their_history(server):
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    await say(from_ann, "hello")
    assert (await read(from_bob, "message"))["text"] == "hello"
    await say(from_bob, "hello yourself")
    assert (await read(from_ann, "message"))["text"] == "hello yourself"
    page = await (await ann.get("/")).text()
    assert page.index("<p>hello</p>") < page.index("<p>hello yourself</p>")


async def test_signing_out_ends_the_session_and_signing_in_begins_another(server):
    ann = await sign_in(server)
    assert (await ann.get("/login")).url.path == "/"  # there already
    assert (await ann.post("/signout")).url.path == "/login"
    assert (await ann.get("/")).url.path == "/login"
    response = await ann.post("/login", data=form("ann"), allow_redirects=False)
    assert (response.status, response.headers["Location"]) == (303, "/")
    assert (await ann.get("/")).url.path == "/"


async def test_signing_out_ends_this_sessions_sockets_and_no_other_devices(serve):
    server = await serve(chat.Settings(SECRET_KEY=KEY))
    ann, phone = await sign_in(server, "ann"), await server.visitor()
    tabs, from_bob = await connect(ann), await connect(await sign_in(server, "bob"))
    tabs = [tabs, await connect(ann)]
    user_id = str(sockets_of(server, "ann")[0].user["_id"])
    content = session(user_id, created=int(time.time()) - 60)  # signed in before
    phone.session.cookie_jar.update_cookies({"CHAT_8080": cookie(content)})
    from_phone = await connect(phone)
    codes = asyncio.gather(*map(closed, tabs))
    response = await ann.post("/signout", allow_redirects=False)
    assert response.status == 303 and not tabs[0].closed  # first the answer
    assert await codes == [1001, 1001]
    assert (await ann.get("/ws")).status == 401
    await say(from_phone, "still here")
    assert (await read(from_bob, "message"))["text"] == "still here"


@pytest.mark.parametrize("login", ["ann", "ANN", " Ａnn ", "Ann@Example.org"])
async def test_name_or_email_in_any_spelling_signs_in(server, login):
    await sign_in(server, "Ann", email="ann@example.org")
    visitor = await server.visitor()
    response = await visitor.post("/login", data=form(login))
    assert (response.status, response.url.path) == (200, "/")
    assert re.search('id="user"[^>]*>Ann<', await response.text())


NAMES = {name: name for name in (
    "ann", "Zoë", "Ольга", "काजल", "สมชาย", "محمد", "李小龍", "a-_", "x" * 32, "123",
)} | {"Ａｎｎ": "Ann"}  # fmt: skip


@pytest.mark.parametrize("typed", NAMES)
async def test_names_of_any_script_are_welcome(serve, typed):
    ws = await connect(await sign_in(await serve(chat.Settings()), typed))
    assert ws.welcome["user"] == NAMES[typed]


WRONG_NAMES = [
    "", "  ", "ab", "x" * 33, "a b", "a.b", "a@b.c", "<b>ann</b>", "ann\0", "a\nb",
    "ann\u200b", "ann\u202e", "\u3164\u3164\u3164", "ann\ufe0f", "😀😀😀", "annאבג",
    "ann\U000e0100", "a" + "\u0323" * 31, "x\u0325\u0329\u032ay", "\u0323ann", "12א",
]  # fmt: skip


@pytest.mark.parametrize("name", WRONG_NAMES)
async def test_wrong_name_is_refused_beside_its_field(serve, name):
    visitor = await (await serve(chat.Settings())).visitor()
    response = await visitor.post("/signin", data=form(name, email="a@b.c"))
    page = await response.text()
    assert response.status == 422
    assert "A name has 3 to 32 letters" in field_error(page, "login")
    assert 'value="a@b.c"' in page and PASSWORD not in page
    assert "<b>ann" not in page


def field_error(page, name):
    """Return what a page says is wrong with a field, as a screen reader finds it."""
    found = re.search(f'<p class="error" id="{name}-note" role="alert">(.*?)</p>', page)
    marked = re.search(f'<input id="{name}"[^>]* aria-invalid="true"', page)
    return found[1] if found and marked else ""


def passwords(text):
    return {"password": text, "password2": text}


@pytest.mark.parametrize(
    ("fields", "name", "sentence"),
    [
        (passwords("short"), "password", "8 to 128"),
        (passwords("x" * 129), "password", "8 to 128"),
        ({"password2": "something else"}, "password2", "not the same"),
        ({"email": "nobody"}, "email", "email address"),
        ({"email": "a@b@c"}, "email", "email address"),
        ({"email": "a\0@b.c"}, "email", "email address"),
        ({"login": "ANN"} | passwords("another horse"), "login", "has this already"),
        ({"email": "ANN@example.org"}, "email", "has this already"),
    ],
)
async def test_sign_up_says_what_is_wrong_beside_the_field(
    server, fields, name, sentence
):
    await sign_in(server, "ann", email="ann@example.org")
    visitor = await server.visitor()
    response = await visitor.post("/signin", data=form("bob") | fields)
    assert response.status == 422
    assert sentence in field_error(await response.text(), name)
    assert (await visitor.get("/")).url.path == "/login"


async def test_field_over_254_characters_is_a_400_before_it_is_normalized(
    serve, monkeypatch
):
    """16 KB of combining marks take 112 ms, in which the room stands still."""
    lengths, normalize = [], chat.unicodedata.normalize

    def note(kind, text):
        lengths.append(len(text))
        return normalize(kind, text)

    visitor = await (await serve(chat.Settings())).visitor()
    monkeypatch.setattr(chat.unicodedata, "normalize", note)
    for name in "login", "email", "password", "password2":
        data = form("ann") | {name: "a" + "\u0316\u0301" * 127}
        for path in "/login", "/signin":
            response = await visitor.post(path, data=data)
            assert response.status == 400 and "254" in await response.text()
    assert lengths == []
    data = form("ann", email="a@" + "b" * 252)
    assert (await visitor.post("/signin", data=data)).url.path == "/"


async def test_two_simultaneous_sign_ups_make_one_account(server):
    visitors = [await server.visitor() for _ in range(4)]
    posts = []
    for visitor, name in zip(visitors, ["ann", "Ann", "ａnn", "aNN"], strict=True):
        data = form(name) | passwords(f"{name}'s horse")
        posts.append(visitor.post("/signin", data=data, allow_redirects=False))
    statuses = [response.status for response in await asyncio.gather(*posts)]
    assert sorted(statuses) == [303] + 3 * [422]


async def test_second_click_on_create_account_signs_in(server):
    visitor, other = await server.visitor(), await server.visitor()
    data = form("ann", email="ann@example.org")
    posts = [
        client.post("/signin", data=data, allow_redirects=False)
        for client in (visitor, visitor, other)
    ]
    for response in await asyncio.gather(*posts):
        assert (response.status, response.headers["Location"]) == (303, "/")
    assert await server.app[chat.ROOM].db.users.count_documents({}) == 1
    for client in visitor, other:
        assert (await client.get("/")).url.path == "/"


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


async def test_signing_up_for_an_older_account_is_no_second_click(serve):
    """It may belong to another Ann with the same weak password."""
    server = await serve(chat.Settings())
    long_ago = chat.datetime.now(chat.UTC) - chat.timedelta(minutes=2)
    user = {"_id": ObjectId.from_datetime(long_ago), "name": "ann", "name_key": "ann"}
    user["password"] = chat.hash_password(PASSWORD)
    await server.app[chat.ROOM].db.users.insert_one(user)
    visitor = await server.visitor()
    response = await visitor.post("/signin", data=form("ann"))
    assert response.status == 422
    assert "has this already" in field_error(await response.text(), "login")
    assert (await visitor.post("/login", data=form("ann"))).url.path == "/"


async def test_password_in_either_normal_form_is_one(server):
    composed, decomposed = "caf\u00e9 au lait", "cafe\u0301 au lait"
    await sign_in(server, "ann", password=composed, password2=decomposed)
    visitor = await server.visitor()
    for password in composed, decomposed:
        response = await visitor.post("/login", data=form("ann", password=password))
        assert response.url.path == "/"
        await visitor.post("/signout")


def test_password_hash_says_how_it_was_made_and_never_repeats():
    first, second = chat.hash_password(PASSWORD), chat.hash_password(PASSWORD)
    assert first.startswith("$argon2id$v=19$m=19456,t=2,p=1$") and first != second
    assert chat.verify_password(PASSWORD, first)
    assert not chat.verify_password(PASSWORD + " ", first)


async def test_unknown_name_and_wrong_password_look_and_cost_the_same(
    server, monkeypatch
):
    await sign_in(server, "ann")
    hashed, derive = [], chat.Argon2id.verify_phc_encoded

    def note(password, password_hash):
        hashed.append(password_hash.rpartition("$")[0].rpartition("$")[0])
        return derive(password, password_hash)

    monkeypatch.setattr(chat.Argon2id, "verify_phc_encoded", note)
    visitor, pages = await server.visitor(), []
    for name in "ann", "bob":
        data = form(name, password="not this one")
        response = await visitor.post("/login", data=data)
        pages.append((await response.text()).replace(f'"{name}"', '"name"'))
        assert response.status == 422
    assert pages[0] == pages[1]
    assert "No account has this name" in field_error(pages[0], "login")
    assert hashed == 2 * ["$argon2id$v=19$m=19456,t=2,p=1"]


async def test_crowd_that_signs_in_is_hashed_in_turn_and_beside_the_room(
    server, monkeypatch
):
    threads, at_once, hash_password = set(), [], chat.hash_password

    def note(password):
        threads.add(threading.current_thread())
        at_once.append(None)
        assert len(at_once) == 1
        password_hash = hash_password(password)
        at_once.pop()
        return password_hash

    monkeypatch.setattr(chat, "hash_password", note)
    await asyncio.gather(*(sign_in(server, f"ann{number}") for number in range(8)))
    assert len(threads) == 1 and threading.main_thread() not in threads


async def test_wait_for_the_hash_thread_has_a_bound(serve, monkeypatch):
    """Beyond it the form comes back filled, with when to try again, and unhashed."""
    hashed, hash_password, go_on = [], chat.hash_password, threading.Event()
    monkeypatch.setattr(
        chat, "hash_password", lambda text: hashed.append(text) or hash_password(text)
    )
    server = await serve(chat.Settings())
    visitors = [await server.visitor() for _ in range(2)]
    busy = chat.HASH_THREAD.submit(go_on.wait, 20)
    sign_up = visitors[0].post("/signin", data=form("bob", email="bob@example.org"))
    login = visitors[1].post("/login", data=form("bob"))
    for response in await asyncio.gather(sign_up, login):
        page = await response.text()
        assert response.status == 503 and int(response.headers["Retry-After"]) > 0
        assert "Too many people are signing in" in field_error(page, "login")
        assert 'value="bob"' in page and PASSWORD not in page
    go_on.set()
    assert busy.result() and hashed == []
    assert (await visitors[1].post("/signin", data=form("bob"))).url.path == "/"


@pytest.mark.parametrize(
    "spellings",
    [
        ["ann", "ANN", "ann ", "  ann", "ａｎｎ", "ann\t", "Ａnn"],
        ["nobody", "NOBODY", " nobody ", "ｎobody"],
        ["ann@example.org", "ANN@example.org", " ann@example.org", "ann@ｅxample.org"],
        ["no@body", "NO@body", " no@body", "no@ｂody"],
    ],
)
async def test_attempts_count_by_what_was_typed_in_any_spelling(serve, spellings):
    """Counted by account, a 429 for an email after guesses at a name tells whose."""
    server = await serve(chat.Settings(LOGIN_ATTEMPTS=len(spellings)))
    await sign_in(server, "ann", email="ann@example.org")
    visitor, wrong = await server.visitor(), {"password": "a wrong guess"}
    spellings = spellings[1:] if spellings[0] == "ann" else spellings  # she signed up
    for login in spellings:
        assert (await visitor.post("/login", data=form(login) | wrong)).status == 422
    for login in spellings:
        response = await visitor.post("/login", data=form(login))
        assert response.status == 429
        assert 1 <= int(response.headers["Retry-After"]) <= 21
        assert "Too many attempts" in field_error(await response.text(), "login")
    for other in {"ann", "ann@example.org", "bob"} - set(spellings) - {"ann"}:
        data = form(other) | wrong
        assert (await visitor.post("/login", data=data)).status == 422


async def test_attempts_count_per_network_of_the_visitor(serve, monkeypatch):
    """A home has one IPv4 address, or a /64 of IPv6 ones."""
    remote = property(lambda request: request.headers.get("X-Test"))
    monkeypatch.setattr(chat.web.Request, "remote", remote)
    server = await serve(chat.Settings(LOGIN_ATTEMPTS=2))
    visitor, statuses = await server.visitor(), []
    for address in (
        "2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:0:3::", "2001:db8:0:1::1",
        "fe80::1%eth0", "fe80::2%eth0", "fe80::3%eth1", "10.0.0.1", "10.0.0.2", "",
    ):  # fmt: skip
        headers = {"X-Test": address}
        response = await visitor.post("/login", data=form("ann"), headers=headers)
        statuses.append(response.status)
    assert statuses == [422, 422, 429, 422, 422, 422, 429, 422, 422, 422]


async def test_what_the_throttle_keeps_for_strangers_has_a_bound(serve):
    server = await serve(chat.Settings())
    visitor, keys, room = await server.visitor(), [], server.app[chat.ROOM]
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
    fernet = Fernet(
        base64.urlsafe_b64encode(chat.hashlib.sha256(key.encode()).digest())
    )
    return fernet.encrypt_at_time(content, int(at or time.time())).decode()


def session(user, **more):
    return {"created": int(time.time()), "session": {"user": user}} | more


BAD_COOKIES = {
    "empty": "", "one letter": "x", "equation": "a=b", "start of a token": "gAAAAA",
    "bytes": "\udcff\udcfe", "long": "x" * 4000, "emoji": "💥",
    "foreign key": cookie(session("0" * 24), key="another"),
    "expired": cookie(session("0" * 24), at=time.time() - 15 * 24 * 60 * 60),
    "unknown user": cookie(session("0" * 24)),
    "no id": cookie(session("not an id")),
    "number": cookie(session(17)),
    "list": cookie(session(["x"])),
    "null": cookie(session(None)),
    "operator": cookie(session({"$gt": ""})),
    "no JSON": cookie(b"not json"),
    "no text": cookie(b"\xff\xfe"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_COOKIES)
async def test_bad_cookie_is_no_session_and_one_line_in_the_log_at_most(
    serve, caplog, kind
):
    server = await serve(chat.Settings(SECRET_KEY=KEY))
    header = f"Cookie: CHAT_8080={BAD_COOKIES[kind]}"
    header = header.encode(errors="surrogateescape")
    for _ in range(3):
        head = await raw_request(server, b"GET /", header)
        assert head.startswith(b"HTTP/1.1 303") and b"Location: /login" in head
        assert (await raw_request(server, b"GET /ws", header)).startswith(
            b"HTTP/1.1 401"
        )
        head = await raw_request(server, b"GET /login", header)
        assert head.startswith(b"HTTP/1.1 200")
    assert len(caplog.messages) <= 1 and "Traceback" not in caplog.text


async def session_cookie(server):
    """Sign up, and return the cookie's name, value and attributes."""
    visitor = await server.visitor()
    response = await visitor.post("/signin", data=form("ann"), allow_redirects=False)
    first, *attributes = response.headers["Set-Cookie"].split("; ")
    return *first.split("=", 1), set(attributes)


async def test_session_is_encrypted_and_out_of_reach_of_scripts(serve):
    name, value, attributes = await session_cookie(
        await serve(chat.Settings(ORIGIN=ORIGIN))
    )
    assert attributes == {"HttpOnly", "SameSite=Lax", "Secure", "Path=/"}
    assert "ann" not in value and name == "CHAT_8080"


async def test_session_in_memory_ends_with_the_browser_and_is_named_by_the_port(serve):
    """Cookies know no port: two chats on one `localhost` would share one."""
    name, _, attributes = await session_cookie(await serve(chat.Settings(PORT=8081)))
    assert name == "CHAT_8081"
    assert attributes == {"HttpOnly", "SameSite=Lax", "Path=/"}
    servers = [await serve(chat.Settings(PORT=0)) for _ in "12"]
    assert len({(await session_cookie(server))[0] for server in servers}) == 2


async def test_session_on_mongodb_lasts_two_weeks_on_every_process(serve, mongodb):
    settings = on(mongodb)
    name, value, attributes = await session_cookie(await serve(settings))
    assert name == "AIOHTTP_SESSION" and "Max-Age=1209600" in attributes
    header = f"Cookie: {name}={value}".encode()
    page = await raw_request(await serve(settings), b"GET /", header)
    assert page.startswith(b"HTTP/1.1 200")


async def test_cookies_of_a_dozen_other_applications_do_no_harm(serve):
    server = await serve(chat.Settings())
    (cookie,) = (await sign_in(server)).session.cookie_jar
    others = [f"other{number}={5_000 * 'x'}" for number in range(12)]
    cookies = "; ".join([*others, f"{cookie.key}={cookie.value}"])
    head = await raw_request(server, b"GET /", b"Cookie: " + cookies.encode())
    assert head.startswith(b"HTTP/1.1 200")


FORM = b"application/x-www-form-urlencoded"
BAD_FORMS = {
    "json": (b"application/json", b'{"login": "ann"}'),
    "none": (b"", b""),
    "multipart": (b"multipart/form-data; boundary=x", b"--x\r\nrubbish\r\n--x--"),
    "unknown charset": (FORM + b"; charset=klingon", b"a=b"),
    "half a surrogate pair": (FORM + b"; charset=unicode_escape", rb"login=\ud800nn"),
    "text that is none": (FORM + b"; charset=ascii", b"login=\xff\xfe"),
    "bytes that are no text": (FORM, b"login=\xff\xfe"),
    "gzip that is none": (FORM + b"\r\nContent-Encoding: gzip", b"not  gzip"),
}


@pytest.mark.parametrize("path", [b"/login", b"/signin"])
@pytest.mark.parametrize("kind", BAD_FORMS)
async def test_form_that_cannot_be_read_is_a_400_without_a_traceback(
    serve, caplog, path, kind
):
    content_type, body = BAD_FORMS[kind]
    headers = b"Content-Type: " + content_type, b"Content-Length: %d" % len(body)
    server = await serve(chat.Settings())
    answer = await raw_request(server, b"POST " + path, *headers, body=body)
    assert answer.startswith(b"HTTP/1.1 400") and b"could not be read" in answer
    assert "Traceback" not in caplog.text


async def test_form_that_is_broken_or_huge_is_refused(serve, caplog):
    server = await serve(chat.Settings())
    headers = b"Content-Type: " + FORM, b"Transfer-Encoding: chunked"
    answer = await raw_request(server, b"POST /login", *headers, body=b"zzz\r\n")
    assert re.match(rb"HTTP/1.[01] 400", answer)
    visitor = await server.visitor()
    response = await visitor.post("/login", data=form("ann", password="x" * 20_000))
    assert response.status == 413
    assert "Traceback" not in caplog.text


async def test_form_that_trickles_is_answered_and_its_connection_ends(
    serve, monkeypatch, caplog
):
    monkeypatch.setattr(chat, "DEADLINE", 0.2)
    server = await serve(chat.Settings())
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
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


async def test_generated_forms_are_taken_or_refused_but_never_break(
    serve, caplog, monkeypatch
):
    monkeypatch.setattr(chat, "hash_password", str.upper)  # this is about the rest

    def forms(st):
        field = st.text(max_size=40) | st.text("abc_-@. ", max_size=40)
        password = st.just(PASSWORD) | field
        fields = {"login": field, "email": field | st.just("")}
        fields |= {"password": password, "password2": password}
        return st.fixed_dictionaries({}, optional=fields) | st.fixed_dictionaries(
            fields
        )

    server = await serve(chat.Settings())
    for data in examples(forms, 60):
        visitor = await server.visitor()
        data = {key: text.encode(errors="replace") for key, text in data.items()}
        headers = {"Content-Type": FORM.decode()}
        for path in "/login", "/signin":
            response = await visitor.post(path, data=urlencode(data), headers=headers)
            assert response.status in {200, 422, 429}
    assert "Traceback" not in caplog.text


async def test_older_messages_are_on_a_plain_page(server):
    ann = await sign_in(server)
    await fill(server, 120)
    page = await (await ann.get("/")).text()
    assert shown_ids(page) == list(range(71, 121))
    assert 'href="/?before=71"' in page
    page = await (await ann.get("/?before=71")).text()
    assert shown_ids(page) == list(range(21, 71))
    page = await (await ann.get("/?before=21")).text()
    assert shown_ids(page) == list(range(1, 21)) and "before=" not in page
    page = await (await ann.get("/?before=1")).text()
    assert shown_ids(page) == [] and "not kept" in page


async def test_messages_older_than_what_is_kept_come_from_mongodb(serve, mongodb):
    server = await serve(on(mongodb))
    ann = await sign_in(server)
    await fill(server, chat.HISTORY_SIZE + 30)
    page = await (await ann.get("/?before=41")).text()
    assert shown_ids(page) == list(range(1, 41))


async def test_replay_in_memory_reaches_as_far_back_as_the_page(serve):
    """Whatever the trimming leaves: both show what this process keeps."""
    server = await serve(chat.Settings())
    ann, count = await sign_in(server), chat.HISTORY_SIZE + 60
    await fill(server, count)
    await blank(server, chat.HISTORY_SIZE)  # reads everything again
    await until(lambda: server.app[chat.ROOM].history.events[1000]["text"] == "")
    ids = [event["id"] for event in (await connect(ann, after=0)).replayed]
    assert ids[-60:-1] + [ids[-1]] == [*range(count - 58, count + 1), 1_000]
    page = await (await ann.get(f"/?before={ids[0] + 10}")).text()
    assert shown_ids(page) == list(range(ids[0], ids[0] + 10))


@pytest.mark.parametrize("number", ["x", "-1", "1.5", "٣", "9" * 16, "1 OR 1=1"])
async def test_wrong_number_in_a_url_is_a_clear_400(server, number):
    ann = await sign_in(server)
    for path, name in ("/", "before"), ("/ws", "after"):
        response = await ann.get(path, params={name: number})
        assert response.status == 400
        assert "number of a message" in await response.text()


async def test_markup_in_a_message_is_text_on_the_page(server):
    ann = await sign_in(server)
    await say(await connect(ann), "<script>alert(1)</script> & {{ 7 * 7 }}")
    page = await (await ann.get("/")).text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; {{ 7 * 7 }}" in page


# ==============================================================================
# 5. WebSocket
# ==============================================================================
async def test_message_reaches_every_reader_with_all_its_fields(server):
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    text = "  hé <b>\n😀\0\u202e\u200b "
    message = await say(from_ann, text, "n1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", message.pop("time"))
    event = {"type": "message", "id": 1, "user": "ann", "text": text, "nonce": "n1"}
    assert message == event and (await read(from_bob, "message"))["text"] == text


async def test_receipt_goes_to_the_sender_alone_also_for_a_repeated_message(server):
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    receipt = {"type": "receipt", "nonce": "n1", "id": 1}
    for _ in range(3):
        assert await send(from_ann, "once", "n1") == receipt
    await say(from_bob, "next", "n2")
    assert "receipt" not in {
        event["type"] for event in await heard_until("n2", from_ann)
    }


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
    from_ann = await connect(await sign_in(server, "ann"))
    from_bob = await connect(await sign_in(server, "bob"))
    own_mongodb.kill()
    for nonce in "n0", "n1":
        error = await send(from_ann, "lost?", nonce)
        assert error["code"] == "not_saved" and "again" not in error["text"]
    own_mongodb.start()
    await until(lambda: is_stored(from_ann, "n0"))
    assert await is_stored(from_ann, "n1")
    heard = [e for e in await heard_until("n1", from_bob) if e["type"] == "message"]
    assert [event["nonce"] for event in heard] == ["n0", "n1"]


async def is_stored(ws, nonce):
    return (await send(ws, "lost?", nonce))["type"] == "receipt"


async def test_returning_reader_gets_missed_messages_in_order_and_then_welcome(server):
    """Rule 4."""
    ann = await sign_in(server)
    await fill(server, 10)
    ws = await connect(ann, after=4)
    assert [event["id"] for event in ws.replayed] == [5, 6, 7, 8, 9, 10]
    assert ws.welcome["last"] == 10
    for after in None, 10, 999:
        assert (await connect(ann, after)).replayed == []


async def test_nothing_falls_between_replay_and_live_and_nothing_comes_twice(server):
    """Readers come back again and again while one sender never pauses."""
    ann, room = await sign_in(server), server.app[chat.ROOM]

    async def talk():
        for number in range(1, 301):
            await chat.post(room, EVE, 1_000 * "x", f"{number}")
            await asyncio.sleep(0.001)

    async def listen():
        seen = [0]
        while seen[-1] < 300:
            ws = await ann.ws_connect(f"/ws?after={seen[-1]}")
            for _ in range(23):
                event = await read(ws)
                if event["type"] == "message":
                    seen.append(event["id"])
                if seen[-1] == 300:
                    break
            await ws.close()
        return seen

    *seen, _ = await asyncio.gather(*(listen() for _ in range(4)), talk())
    assert seen == 4 * [list(range(301))]


async def test_message_broadcast_during_a_replay_is_replayed_as_well(
    server, monkeypatch
):
    """Sending waits for a slow reader; the room goes on meanwhile."""
    ann, room = await sign_in(server), server.app[chat.ROOM]
    await fill(server, 1)
    send_json = chat.web.WebSocketResponse.send_json

    async def send_slowly(ws, event):
        if (number := event["id"]) < 4:
            await chat.post(room, EVE, f"{number + 1}", f"n{number + 1}")
            await until(lambda: room.history.last > number)
        await send_json(ws, event)

    monkeypatch.setattr(chat.web.WebSocketResponse, "send_json", send_slowly)
    ws = await connect(ann, after=0)
    assert [event["id"] for event in ws.replayed] == [1, 2, 3, 4]
    assert ws.welcome["last"] == 4


async def test_message_broadcast_at_the_end_of_a_replay_comes_once(server, monkeypatch):
    """It is in the history by then, and waits for the next flush."""
    ann, from_bob = await sign_in(server), await connect(await sign_in(server, "bob"))
    await say(from_bob, "first")
    replay, room = chat.WebSocket.replay, server.app[chat.ROOM]
    monkeypatch.setattr(chat, "TURNS", 1_000)

    async def replay_beside_a_message(*arguments):
        await send_only(from_bob, "second", "n2")
        await until(lambda: room.history.last == 2)
        await replay(*arguments)

    monkeypatch.setattr(chat.WebSocket, "replay", replay_beside_a_message)
    ws = await connect(ann, after=0)
    assert [event["text"] for event in ws.replayed] == ["first", "second"]
    await send_only(ws, "third", "n3")
    heard = [e["text"] for e in await heard_until("n3", ws) if e["type"] == "message"]
    assert heard == ["third"]


async def test_reader_that_missed_more_than_is_kept_sees_the_gap(serve):
    server = await serve(chat.Settings())
    ann = await sign_in(server)
    await fill(server, chat.HISTORY_SIZE + 10)
    ids = [event["id"] for event in (await connect(ann, after=5)).replayed]
    assert ids == list(range(11, chat.HISTORY_SIZE + 11))  # not 6: a gap


def event(**fields):
    return json.dumps({"type": "message", "text": "x", "nonce": "n"} | fields)


BAD_EVENTS = [
    "", "null", "[]", "17", "{}", "[" * 9_000, '{"a":' * 2_000, "9" * 5_000, "\0",
    '{"type": "message"}', event(text=17), event(text=None), event(text=["x"]),
    event(text="\ud800"), event(nonce="\udfff"), event(nonce=17), event(nonce=""),
    event(nonce=65 * "n"), event(nonce="a\rb"), event(nonce="\u202e"),
    event(type="bad"), event(type=["message"]), event()[:-1], '{"\\ud800": 1}',
]  # fmt: skip


async def test_bad_event_gets_an_error_without_a_nonce_and_the_socket_stays(
    serve, caplog
):
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


async def test_generated_frames_never_break_the_socket(serve, caplog):
    """Any JSON, any text, any bytes: an answer, or the message; never silence."""

    def frames(st):
        text = st.text(st.characters(), max_size=70)
        scalar = st.none() | st.booleans() | st.floats() | st.integers() | text
        value = st.recursive(scalar, lambda v: st.lists(v) | st.dictionaries(text, v))
        fields = {"type": st.just("message") | value, "text": value, "nonce": value}
        names = st.sampled_from(["type", "text", "nonce", "id"])
        events = st.fixed_dictionaries(fields) | st.dictionaries(names, value)
        return events | value | text | st.binary(max_size=50)

    ws = await connect(await sign_in(await serve(chat.Settings(MESSAGE_BURST=1000))))
    for frame in examples(frames, 200):
        if isinstance(frame, bytes):
            await ws.send_bytes(frame)
        else:
            await ws.send_str(json.dumps(frame))
        assert (await read(ws, "error", "receipt"))["type"] in {"error", "receipt"}
    assert (await say(ws, "still here"))["text"] == "still here"
    assert caplog.text == ""


INVISIBLE = [
    "", " \n\t", "\u200b" * 3, "\u3164", "\u2800\u2800", "\u00ad", "\u2060\ufeff",
    "\u202e \u202c", "\u2028\u2029", "\0\x1b", "\U000e0041\U000e007f", "\n" * 1_000,
]  # fmt: skip


async def test_empty_and_too_long_are_errors_that_name_the_nonce(serve):
    """Empty is what shows nothing; too long are characters, not bytes."""
    server = await serve(chat.Settings(MAX_MESSAGE_LENGTH=1_000, MESSAGE_BURST=1000))
    ws = await connect(await sign_in(server))
    for texts, code in (INVISIBLE, "empty"), (["x" * 1_001], "too_long"):
        for text in texts:
            error = await send(ws, text, "n1")
            assert (error["type"], error.get("code")) == ("error", code), ascii(text)
    for text in "\u200bx", "😀\ufe0f", "\u0301", "–", "😀" * 1_000:
        assert (await say(ws, text))["text"] == text


async def test_longest_message_fits_in_however_it_is_written(serve):
    server = await serve(chat.Settings(MAX_MESSAGE_LENGTH=10_000))
    from_ann = await connect(await sign_in(server, "ann"))
    from_bob = await connect(await sign_in(server, "bob"))
    for text in "😀" * 10_000, "\0" * 9_999 + "x", "é" * 10_000:
        assert (await say(from_ann, text))["text"] == text
        assert (await read(from_bob, "message"))["text"] == text


async def test_frame_too_big_closes_with_1009(server):
    ann = await sign_in(server)
    ws = await connect(ann)
    await ws.send_str("x" * 200_000)
    assert await closed(ws) == 1009
    assert (await connect(ann)).welcome["user"] == "ann"


async def test_every_frame_counts_toward_its_users_limit_on_whichever_socket(serve):
    """Also the refused ones, pings and pongs; and coming back refills nothing."""
    server = await serve(chat.Settings(MESSAGE_BURST=10, MESSAGES_PER_SECOND=5))
    ann, from_bob = await sign_in(server), await connect(await sign_in(server, "bob"))
    first, second = await connect(ann), await connect(ann)
    started = time.monotonic()
    for ws in first, second:
        for frame in "", "rubbish", event(text=""):
            await ws.send_str(frame)
        for frame in first.ping, first.pong, ws.send_bytes:
            await frame(b"x")
    await until(lambda: is_answered(second, 4))
    await first.close()
    assert (await send(await connect(ann), "hello", "n1"))["type"] == "receipt"
    # 14 frames, of which 10 pass at once: the others take 0.2 seconds each, at least.
    assert time.monotonic() - started >= 0.8
    async with asyncio.timeout(0.8 * 5):
        for number in range(10):  # Bob has a limit of his own
            await send(from_bob, "hello", f"{number}")


async def is_answered(ws, count):
    for _ in range(count):
        await read(ws, "error")
    return True


async def test_sender_beyond_the_limit_is_not_read_delays_nobody_and_loses_nothing(
    serve,
):
    server = await serve(chat.Settings(MESSAGE_BURST=1, MESSAGES_PER_SECOND=500))
    from_ann = await connect(await sign_in(server, "ann"))
    from_bob = await connect(await sign_in(server, "bob"))
    (mine,) = sockets_of(server, "ann")

    async def flood():
        for number in range(1_500):
            await send_only(from_ann, "x" * 900, f"n{number}")

    started, flooding = time.monotonic(), asyncio.create_task(flood())
    await until(lambda: not mine.transport.is_reading())
    await say(from_bob, "hello")
    nonces = [(await read(from_ann, "receipt"))["nonce"] for _ in range(1_500)]
    assert nonces == [f"n{number}" for number in range(1_500)]
    assert time.monotonic() - started >= 2.9
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
    server = await serve(chat.Settings())
    sockets = [await connect(await sign_in(server, name)) for name in ("ann", "bob")]
    for ws in sockets:
        assert await read(ws, "heartbeat") == {"type": "heartbeat", "last": 0}
    await say(sockets[0], "hello")
    for ws in sockets:
        while (heartbeat := await read(ws, "heartbeat"))["last"] == 0:
            pass
        assert heartbeat["last"] == 1


async def test_user_is_online_while_any_process_has_the_name(monkeypatch):
    now, told, room = 1_000.0, [], chat.Room(None, chat.Settings())
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(chat, "broadcast", lambda room, event: told.append(event))

    def look(*names):
        told.clear()
        chat.announce(room, set(names))
        return [(event["type"], event["user"]) for event in told]

    assert look("ann", "bob") == [("joined", "ann"), ("joined", "bob")]
    assert look("ann") == look() == []  # a restart, a reload
    now += chat.GRACE - 0.1
    assert look("bob", "eve") == [("joined", "eve")]
    now += 0.1
    assert look("eve") == [("left", "ann")]  # Bob came back in between
    now += chat.GRACE
    assert look("eve") == [("left", "bob")]
    assert look("ann", "eve") == [("joined", "ann")]


async def test_users_see_each_other_come_and_go_once_for_all_their_tabs(server):
    """A reload is no departure, and is not told."""
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann = await connect(ann)
    assert from_ann.welcome["online"] == ["ann"]
    assert await read(from_ann) == {"type": "joined", "user": "ann"}
    tabs = [await connect(bob) for _ in range(2)]
    assert tabs[1].welcome["online"] == ["ann", "bob"]
    assert await read(from_ann) == {"type": "joined", "user": "bob"}
    for _ in range(2):  # a reload of both
        for tab in tabs:
            await tab.close()
        tabs = [await connect(bob) for _ in range(2)]
    await tabs[0].close()
    await asyncio.sleep(chat.GRACE + 1)
    await say(tabs[1], "still here")
    assert (await read(from_ann))["type"] == "message"
    await tabs[1].close()
    assert await read(from_ann) == {"type": "left", "user": "bob"}


async def test_outage_is_no_departure_and_what_happened_meanwhile_is_told_after_it(
    own_mongodb, serve, caplog
):
    server = await serve(on(own_mongodb.uri))
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    while await read(from_ann, "joined") != {"type": "joined", "user": "bob"}:
        pass
    own_mongodb.freeze()
    await from_bob.close()
    await asyncio.sleep(chat.GRACE + chat.DEADLINE + 1)
    assert "bob" in server.app[chat.ROOM].online
    own_mongodb.thaw()
    assert await read(from_ann) == {"type": "left", "user": "bob"}
    lines = [line for line in caplog.messages if line.startswith("Presence")]
    assert len(lines) == 1


async def stall(server, session, path="/ws"):
    """Open a WebSocket that never reads, with as little room as the kernel allows."""
    (cookie,) = session.cookie_jar
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", server.port))
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", "Upgrade: websocket"]
    lines += ["Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    lines += [
        f"Sec-WebSocket-Key: {22 * 'x'}==",
        f"Cookie: {cookie.key}={cookie.value}",
    ]
    sock.send("\r\n".join([*lines, "", ""]).encode())
    return sock


def reset_at_close(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


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
    with await stall(server, bob.session, "/ws?after=0") as reader:
        await until(lambda: sockets_of(server, "bob"))
        ws = await connect(ann, after=0)
        assert len(ws.replayed) == 300
        assert (await say(ws, "next"))["id"] == 301
        (stalled,) = sockets_of(server, "bob")
        await until(lambda: stalled.transport.get_write_buffer_size() > 10_000)
        reset_at_close(reader)
    await until(lambda: not sockets_of(server, "bob"))
    assert caplog.text == ""


async def test_client_that_is_gone_in_the_middle_of_an_answer_is_no_error(
    serve, caplog
):
    server = await serve(chat.Settings())
    with await stall(server, (await sign_in(server)).session) as client:
        await until(lambda: sockets_of(server, "ann"))
        client.send(500 * b"\x81\x81\0\0\0\0x")  # each gets an answer
        reset_at_close(client)
    await until(lambda: not server.app[chat.ROOM].sockets)
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
    own, then frames would change places, or break.
    """
    settings = chat.Settings(MESSAGE_BURST=1000, MAX_MESSAGE_LENGTH=10_000)
    server = await serve(settings)
    ann, room, data = await sign_in(server), server.app[chat.ROOM], b""
    await fill(server, 30, text="😀" * 10_000)
    (cookie,) = ann.session.cookie_jar
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    lines = ["GET /ws?after=0 HTTP/1.1", "Host: localhost", "Upgrade: websocket"]
    lines += ["Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    lines += ["Sec-WebSocket-Extensions: permessage-deflate"]
    lines += [
        f"Sec-WebSocket-Key: {22 * 'x'}==",
        f"Cookie: {cookie.key}={cookie.value}",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    assert b"101" in await reader.readuntil(b"\r\n\r\n")
    sent = [(9, b"p%d" % n) if n % 2 else (1, event(nonce=f"n{n}").encode())
            for n in range(60)]  # fmt: skip
    writer.write(b"".join(masked(*frame) for frame in sent))
    await until(lambda: sockets_of(server, "ann") and sockets_of(server, "ann")[0].live)
    (mine,) = sockets_of(server, "ann")
    for number in range(31, 61):
        await chat.post(room, EVE, "y" * 5_000, f"{number}")
        await mine.ws.ping(b"from aiohttp")
    await until(lambda: room.history.last == 90)
    await chat.close([mine])
    chat.broadcast(room, {"type": "too late"})
    chat.flush(room)
    data = await asyncio.wait_for(reader.read(), 10)
    frames, rest = parse_frames(data)
    writer.close()
    events = [json.loads(payload) for opcode, payload in frames if opcode == 1]
    assert rest == b"" and frames[-1] == (8, struct.pack("!H", 1001))
    told = [e.get("id") or e["type"] for e in events if e["type"] not in {"receipt"}]
    assert [n for n in told if isinstance(n, int)] == list(range(1, 91))
    assert told.index("welcome") == told.index(30) + 1 and "too late" not in told
    assert frames.count((9, b"from aiohttp")) == 30
    answers = [p if o == 10 else json.loads(p)["nonce"].encode() for o, p in frames
               if o == 10 or (o == 1 and b'"receipt"' in p)]  # fmt: skip
    assert answers == [b"p%d" % n if n % 2 else b"n%d" % n for n in range(60)]


class Recorder:
    """A transport that notes what is written to it."""

    def __init__(self, transport):
        self.transport, self.writes = transport, []

    def __getattr__(self, name):
        return getattr(self.transport, name)

    def write(self, data):
        self.writes.append(data)
        self.transport.write(data)


async def test_frames_that_fall_due_together_leave_in_one_write(serve):
    server = await serve(chat.Settings())
    ws, room = await connect(await sign_in(server)), server.app[chat.ROOM]
    (mine,) = room.sockets
    mine.transport = Recorder(mine.transport)
    await asyncio.gather(*(chat.post(room, EVE, "x", f"{n}") for n in range(8)))
    assert [(await read(ws, "message"))["id"] for _ in range(8)] == list(range(1, 9))
    assert len(mine.transport.writes) < 8


async def test_socket_that_is_closing_gets_nothing_after_the_close_frame(serve):
    server = await serve(chat.Settings())
    ann, room = await sign_in(server), server.app[chat.ROOM]
    ws = await connect(ann)
    (mine,) = room.sockets
    other = await connect(ann)
    closing = asyncio.create_task(mine.ws.close(code=1001, drain=False))
    await asyncio.sleep(0)  # the close frame is out, the socket still in the room
    mine.transport = Recorder(mine.transport)
    chat.broadcast(room, {"type": "left", "user": "nobody"})
    chat.flush(room)
    assert mine in room.sockets and mine.transport.writes == []
    assert await read(other, "left") == {"type": "left", "user": "nobody"}
    assert await closed(ws) == 1001
    await closing


# ==============================================================================
# 6. Routes and static
# ==============================================================================
def test_routes_have_the_names_and_paths_of_the_contract():
    app = chat.init_app(chat.Settings())
    paths = {route.name: route.resource.canonical for route in app.router.routes()}
    assert paths == {
        "main": "/", "chat": "/ws", "login": "/login", "signin": "/signin",
        "signout": "/signout", "static": "/static",
    }  # fmt: skip


async def test_every_page_carries_the_security_headers_and_a_websocket_none(serve):
    """A WebSocket would keep them in memory for hours."""
    server = await serve(chat.Settings())
    visitor = await server.visitor()
    for path in "/login", "/nothing", "/static/chat.js", "/ws":
        headers = (await visitor.get(path)).headers
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "same-origin"
    page = await (await visitor.get("/login")).text()
    assert '<meta name="referrer" content="same-origin">' in page
    headers = (await connect(await sign_in(server)))._response.headers
    assert "Content-Security-Policy" not in headers


@pytest.mark.parametrize(
    ("host", "framed_by"),
    [
        ("127.0.0.1:8080", "'self' http://127.0.0.1:*"),
        ("localhost", "'self' http://localhost:*"),
        ("[::1]:8080", "'self' http://[::1]:*"),
        (ORIGIN, "'self'"),
    ],
)
async def test_page_may_be_framed_by_this_host_unless_origin_is_set(
    serve, host, framed_by
):
    """A notebook on another port shows the chat in a frame."""
    origin = host if host == ORIGIN else ""
    visitor = await (await serve(chat.Settings(ORIGIN=origin))).visitor()
    headers = {"Host": host.removeprefix("https://")}
    policy = (await visitor.get("/login", headers=headers)).headers
    policy = policy["Content-Security-Policy"]
    assert policy.partition("frame-ancestors ")[2] == framed_by


async def test_odd_headers_break_nothing(serve, caplog):
    def lines(st):
        value = st.binary(max_size=60).map(lambda data: re.sub(rb"[\r\n\0]", b"", data))
        names = [b"Cookie", b"Origin", b"Host", b"X-Forwarded-Host", b"Content-Type"]
        names += [b"Upgrade", b"Connection", b"Content-Length", b"Referer"]
        header = st.tuples(st.sampled_from(names), value).map(b": ".join)
        return header | value.map(lambda data: b"Cookie: CHAT_8080=" + data)

    server = await serve(chat.Settings())
    odd = [b"Host:", b"\xff: x", b"X: " + 9_000 * b"y", b"Expect: rubbish"]
    odd += [b"Transfer-Encoding: rubbish", b"Content-Length: -1", b"Host: [::1"]
    for line in odd + examples(lines, 100):
        for request in b"GET /", b"GET /ws", b"POST /login":
            answer = await raw_request(server, request, line, b"Content-Length: 0")
            assert re.match(rb"HTTP/1.[01] [34]", answer), (line, answer[:200])
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
def test_nobody_has_to_listen_to_what_the_chat_prints(start, redirection):
    """As in a pipe that ends after a line, or without a console."""
    port = unused_port()
    script = f"{sys.executable} chat.py {redirection}"
    process = subprocess.Popen(
        ["bash", "-c", f"set -o pipefail; PORT={port} exec {script}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: can_connect(port))
        for _ in range(2):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/login") as response:
                assert response.status == 200
    finally:
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, b"")


def test_task_that_fails_is_logged_and_ends_the_process(start, tmp_path):
    """The host starts it again; otherwise the room would stay silent."""
    script = tmp_path / "broken.py"
    fault = "chat.HEARTBEAT, chat.broadcast = 1, None"
    script.write_text(f"import chat\n{fault}\nchat.main()\n")
    code, output, errors = start(script).end()
    assert code == 1 and "CTRL+C" in output
    assert errors.count("A background task failed") == 1
    assert "in keep_alive" in errors and "TypeError" in errors


@pytest.mark.parametrize("name", ["follow", "keep_presence", "keep_alive"])
async def test_every_background_task_is_watched(monkeypatch, caplog, name):
    async def fail(room):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(chat, name, fail)
    runner = chat.web.AppRunner(chat.init_app(chat.Settings()))
    with pytest.raises(BaseException) as caught:
        await runner.setup()
        await asyncio.sleep(10)  # the group cancels whoever entered it
    assert isinstance(caught.value, asyncio.CancelledError | BaseExceptionGroup)
    asyncio.current_task().uncancel()
    with contextlib.suppress(BaseExceptionGroup):
        await runner.cleanup()
    assert "KeyError: 'a fault of ours'" in caplog.text


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
    with contextlib.ExitStack() as crowd:
        for _ in range(100):
            address = "127.0.0.1", process.port
            crowd.enter_context(socket.create_connection(address))
        time.sleep(1)
    with urllib.request.urlopen(process.url + "/login", timeout=10) as response:
        assert response.status == 200
    code, _, errors = process.stop()
    assert (code, errors.count("\n")) == (0, 1), errors[:2_000]
    assert "out of system resource" in errors


async def test_log_of_requests_has_no_password_hash_and_no_email(start, mongodb):
    environment = {"MONGO_HOST": mongodb, "MONGO_DB_NAME": f"test-{ObjectId()}"}
    environment |= {"SECRET_KEY": KEY, "LOG_REQUESTS": "true"}
    process = start(**environment).wait_until_ready()
    async with aiohttp.ClientSession(process.url) as visitor:
        data = form("ann", email="ann@example.org")
        for path in "/signin", "/signin", "/login":
            await visitor.post(path, data=data)
    code, _, errors = await asyncio.to_thread(process.stop)
    assert code == 0 and '"POST /signin HTTP/1.1" 303' in errors
    assert "argon2" not in errors and "ann@" not in errors and PASSWORD not in errors


def test_repeated_line_is_logged_once_a_minute_whatever_a_client_puts_into_it(
    monkeypatch, caplog
):
    now = 1_000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    chat.init_app(chat.Settings())
    for name in (
        "chat",
        "aiohttp.server",
        "aiohttp_session",
        "asyncio",
        "pymongo.client",
    ):
        for number in range(3):
            logging.getLogger(name).warning(f"{name} has seen %s", number)
    assert len(caplog.messages) == 5
    now += 60
    logging.getLogger("chat").warning("chat has seen %s", 4)
    assert len(caplog.messages) == 6


def test_database_that_never_answers_is_one_line_and_exit_code_2(start):
    """So is a file of MONGO_HOST's that is not there: the address is not to blame."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uris = (
            f"mongodb://ann:s3cret@127.0.0.1:{silent.getsockname()[1]}/",
            ("mongodb://127.0.0.1/?tls=true&tlsCAFile=/nowhere"),
        )
        for process in [start(MONGO_HOST=uri, SECRET_KEY=KEY) for uri in uris]:
            code, _, errors = process.end()
            assert (code, errors.count("\n")) == (2, 1), errors
            assert errors.startswith("chat: MONGO_HOST ") and "s3cret" not in errors


def test_address_that_cannot_be_listened_on_is_one_line(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wrong = [{"PORT": str(taken.getsockname()[1])}]
        hosts = "no.such.host.invalid", "1.2.3.4", "a..b", "x" * 70
        wrong += [{"SITE_HOST": host} for host in hosts]
        for process in [start(**settings) for settings in wrong]:
            code, _, errors = process.end()
            assert (code, errors.count("\n")) == (2, 1), errors
            assert errors.startswith("chat: SITE_HOST and PORT ")


async def test_every_socket_is_closed_with_1001(serve, settings):
    server = await serve(settings)
    sockets = [await connect(await sign_in(server, name)) for name in ("ann", "bob")]
    codes = asyncio.gather(*map(closed, sockets))
    await asyncio.sleep(0)
    await server.close()
    assert await codes == [1001, 1001]


async def test_a_thousand_sockets_close_at_once_and_a_stalled_reader_holds_nothing(
    start,
):
    limits = {"MESSAGES_PER_SECOND": "1000", "MESSAGE_BURST": "1000"}
    limits |= {"MAX_MESSAGE_LENGTH": "10000", "MAX_UNSENT_BYTES": str(1 << 30)}
    process = start(CONNECTIONS_PER_PERSON="1001", **limits).wait_until_ready()
    jar, connector = aiohttp.CookieJar(unsafe=True), aiohttp.TCPConnector(limit=0)
    options = {"connector": connector, "cookie_jar": jar}
    async with aiohttp.ClientSession(process.url, **options) as session:
        await session.post("/signin", data=form("ann"))
        with await stall(process, session):
            ws = await session.ws_connect("/ws")
            for _ in range(400):  # 16 MB: the kernel holds about 4 of them
                await say(ws, "😀" * 10_000)
            sockets = [await session.ws_connect("/ws") for _ in range(999)]
            codes = [asyncio.create_task(closed(ws)) for ws in [ws, *sockets]]
            process.process.send_signal(signal.SIGINT)
            assert set(await asyncio.gather(*codes)) == {1001}
            code, _, errors = await asyncio.to_thread(process.end, 8)
    assert (code, errors) == (0, "")
