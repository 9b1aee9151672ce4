"""Tests of the chat, in the order of chat.py's sections; each name is a claim.

    python -m pytest

What is claimed of the chat holds in memory and on a real MongoDB, so most tests run on
both. A test that needs a MongoDB, a browser or a tool that is not installed says so
and is skipped, unless CI is set in the environment: there it fails.
"""

import asyncio
import base64
import contextlib
import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from html import unescape
from pathlib import Path
from urllib.parse import urlencode

import aiohttp
import pymongo
import pytest
from aiohttp.test_utils import TestClient, unused_port
from bson import DatetimeMS, Decimal128, Int64, ObjectId
from cryptography.fernet import Fernet

import chat
from tests.parts import (
    PASSWORD,
    ROOT,
    Server,
    can_connect,
    closed,
    connect,
    form,
    need,
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


# ==============================================================================
# 1. Settings
# ==============================================================================
def test_environment_wins_over_env_file(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("PORT=1234\nMONGO_DB_NAME=from-file\nDEBUG=true\n")
    monkeypatch.setenv("PORT", "4321")
    settings = chat.Settings(_env_file=tmp_path / ".env")
    assert (settings.PORT, settings.MONGO_DB_NAME) == (4321, "from-file")
    assert settings.DEBUG is True


def test_env_file_may_hold_unknown_settings_and_a_byte_order_mark(tmp_path):
    text = "\ufeffPORT=1234\nEDITOR=vi\n# a comment\n\nMONGO_DB_NAME='in quotes'\n"
    (tmp_path / ".env").write_text(text.replace("in quotes", "quoted"))
    settings = chat.Settings(_env_file=tmp_path / ".env")
    assert (settings.PORT, settings.MONGO_DB_NAME) == (1234, "quoted")


def test_example_has_every_setting_with_its_default_in_order():
    lines = (ROOT / ".env.example").read_text().splitlines()
    assignments = [line for line in lines if line and not line.startswith("#")]
    expected = []
    for name, default in chat.Settings().model_dump().items():
        default = str(default).lower() if isinstance(default, bool) else default
        expected.append(f"{name}={default}")
    assert assignments == expected


WRONG = {
    "DEBUG=perhaps": "valid boolean",
    "HOST=": "at least 1 character",
    "PORT=http": "valid integer",
    "PORT=": "valid integer",
    "PORT=65536": "less than or equal to 65535",
    "PORT=-1": "greater than or equal to 0",
    "ORIGIN=chat.example": "like https://chat.example",
    "ORIGIN=https://chat.example/path": "without a path",
    "ORIGIN=https://chat.example?a=b": "without a path",
    "ORIGIN=https://": "like https://chat.example",
    "ORIGIN=https://[": "ORIGIN",
    "ORIGIN=ws://chat.example": "like https://chat.example",
    "MAX_MESSAGE_LENGTH=0": "greater than or equal to 1",
    "MAX_MESSAGE_LENGTH=10001": "less than or equal to 10000",
    "MESSAGES_PER_SECOND=0.5": "valid integer",
    "MESSAGE_BURST=0": "greater than or equal to 1",
    "CONNECTIONS_PER_PERSON=0": "greater than or equal to 1",
    "LOGIN_ATTEMPTS=nan": "valid integer",
    "MAX_UNSENT_BYTES=1": "greater than or equal to 1024",
    "MONGO_DB_NAME=a.b": "match pattern",
    "MONGO_DB_NAME=": "match pattern",
    "MONGO_HOST=mongodb://ann:s3cret@127.0.0.1:1": "SECRET_KEY: ",
}


@pytest.mark.parametrize("assignment", WRONG)
def test_wrong_setting_is_one_line_with_its_name(monkeypatch, capsys, assignment):
    name, _, value = assignment.partition("=")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(chat, "run", None)  # it does not come to that
    with pytest.raises(SystemExit) as caught:
        chat.main()
    output, errors = capsys.readouterr()
    assert (caught.value.code, output, errors.count("\n")) == (2, "", 1)
    told = "SECRET_KEY" if name == "MONGO_HOST" else name
    assert errors.startswith(f"chat: {told}: ")
    assert WRONG[assignment] in errors and "s3cret" not in errors


def test_all_wrong_settings_are_told_at_once_and_none_with_a_password(start):
    wrong = dict(assignment.split("=", 1) for assignment in WRONG)
    code, output, errors = start(**wrong).end()
    told = [re.match("chat: ([A-Z_]+): ", line)[1] for line in errors.splitlines()]
    assert (code, output, set(told)) == (
        2,
        "",
        {*wrong} - {"MONGO_HOST"} | {"SECRET_KEY"},
    )
    assert "s3cret" not in errors


def test_env_file_with_other_bytes_than_text_is_one_clear_line(
    monkeypatch, capsys, tmp_path
):
    (tmp_path / ".env").write_bytes(b"PORT=\xff\xfe")
    monkeypatch.setitem(chat.Settings.model_config, "env_file", tmp_path / ".env")
    with pytest.raises(SystemExit, match="2"):
        chat.main()
    assert capsys.readouterr().err == "chat: .env must be a text file in UTF-8\n"


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
    for key in "x", "ключ", "\udcff", " ":
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
    for method, path in ("GET", "/"), ("GET", "/ws"), ("POST", "/signout"):
        response = await visitor.request(method, path, allow_redirects=False)
        assert (response.status, response.headers["Location"]) == (303, "/login")


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


FOREIGN = [
    "http://evil.example",
    "https://evil.example",
    "null",
    "",
    "http://127.0.0.1",
    "http://127.0.0.1:1",
    "http://user@127.0.0.1:{port}@evil.example",
    "http://127.0.0.1:{port}.evil.example",
    "évil",
]


@pytest.mark.parametrize("origin", FOREIGN)
async def test_other_origin_is_refused(server, origin):
    ann = await sign_in(server)
    headers = {"Origin": origin.format(port=server.port)}
    for path in "/login", "/signin", "/signout":
        response = await ann.post(path, data=form("eve"), headers=headers)
        assert (response.status, "another site" in await response.text()) == (403, True)
    with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
        await ann.ws_connect("/ws", headers=headers)
    assert (await ann.get("/", headers=headers)).status == 200  # changes nothing


async def test_own_origin_may_write_and_a_client_that_sends_none(server):
    ann = await sign_in(server)
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    for headers in own, {}:
        ws = await ann.ws_connect("/ws", headers=headers)
        assert (await read(ws, "welcome"))["user"] == "ann"
        response = await ann.post("/login", data=form("ann"), headers=headers)
        assert (response.status, response.url.path) == (200, "/")


ORIGIN = "https://chat.example"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "chat.example"},
        {"Host": "chat.example:443"},
        {"Host": "10.0.0.7:8080", "X-Forwarded-Host": "chat.example, proxy.internal"},
        {"Host": "internal", "X-Forwarded-Proto": "http"},
        {"Host": "evil.example"},
    ],
)
async def test_with_origin_set_no_header_of_a_proxy_refuses_the_chats_users(
    serve, headers
):
    """Only the browser's Origin counts, not what a proxy writes or forgets."""
    server = await serve(chat.Settings(ORIGIN=ORIGIN))
    ann = await server.visitor()
    headers = headers | {"Origin": ORIGIN, "Cookie": await session_header(ann)}
    ws = await ann.ws_connect("/ws", headers=headers)
    assert (await read(ws, "welcome"))["user"] == "ann"
    response = await ann.post(
        "/login", data=form("ann"), headers=headers, allow_redirects=False
    )
    assert response.status == 303


async def session_header(visitor):
    """Sign up; return what a browser would send (over TLS only, where it is Secure)."""
    response = await visitor.post("/signin", data=form("ann"), allow_redirects=False)
    assert response.status == 303
    return response.headers["Set-Cookie"].partition(";")[0]


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
        assert response.status == 403
        assert (await ann.get("/ws", headers=headers)).status == 403
    (line,) = caplog.messages  # once a minute
    assert repr(headers["Origin"]) in line and repr(ORIGIN) in line


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "",
             "localhost.evil.example",  "127.0.0.1:x", "[::1].evil.example", "a b"]
)  # fmt: skip
async def test_without_origin_a_host_name_that_others_can_point_is_refused(
    serve, caplog, host
):
    """A page of evil.example whose name points at 127.0.0.1 gets nothing."""
    server = await serve(chat.Settings())
    visitor = await server.visitor()
    headers = {"Host": host, "Origin": f"http://{host}"}
    for path in "/login", "/", "/static/chat.js", "/nothing", "/ws", "/login":
        response = await visitor.get(path, headers=headers)
        assert response.status == 421
        assert "set ORIGIN" in await response.text()
    response = await visitor.post("/signin", data=form("eve"), headers=headers)
    assert response.status == 421
    (line,) = caplog.messages
    assert repr(host) in line and "ORIGIN" in line


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1", "127.0.0.1", "192.168.1.7:8080", "[::1]:8080",
             "[fe80::1]", "LOCALHOST:8080"]
)  # fmt: skip
async def test_without_origin_localhost_and_addresses_are_served(serve, host):
    server = await serve(chat.Settings())
    visitor = await server.visitor()
    own, foreign = f"http://{host}", "http://localhost:2"
    for origin, status in (own, 303), (foreign, 403), ("null", 403):
        response = await visitor.post(
            "/signin",
            data=form("ann"),
            headers={"Host": host, "Origin": origin},
            allow_redirects=False,
        )
        assert response.status == status


async def test_browsers_are_told_to_send_the_origin_whatever_a_proxy_says(server):
    visitor = await server.visitor()
    for path in "/login", "/signin":
        page = await (await visitor.get(path)).text()
        assert '<meta name="referrer" content="same-origin">' in page


async def test_browser_that_keeps_no_cookie_is_told_so(serve):
    server = await serve(chat.Settings())
    visitor = TestClient(server, cookie_jar=aiohttp.DummyCookieJar())
    async with visitor:
        for path in "/signin", "/login":
            headers = {"Referer": str(server.make_url(path + "?why=ended"))}
            response = await visitor.post(path, data=form("ann"), headers=headers)
            assert str(response.url).endswith("/login?why=cookie")
            assert "did not keep the cookie" in await response.text()
        response = await visitor.get("/", headers={"Referer": str(server.make_url(""))})
        assert str(response.url).endswith("/login")
        assert "cookie" not in await response.text()
        page = await (await visitor.get("/login?why=ended")).text()
        assert "Your session has ended" in page
        page = await (await visitor.get("/login?why=<b>")).text()
        assert 'class="notice"' not in page


async def test_request_knows_the_id_and_the_name_of_its_user_and_no_more(server):
    """Above all not the hash of the password, which would stay with a connection."""
    await connect(await sign_in(server, email="ann@example.org"))
    (connection,) = server.app[chat.ROOM].connections
    assert connection.user.keys() == {"_id", "name"}


async def test_every_page_carries_the_security_headers(server):
    visitor = await server.visitor()
    for path in "/login", "/nothing", "/static/chat.js":
        headers = (await visitor.get(path)).headers
        assert "default-src 'self'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"


async def test_head_is_answered_wherever_get_is(server):
    ann, visitor = await sign_in(server), await server.visitor()
    for path, status in ("/login", 200), ("/signin", 200), ("/static/chat.js", 200):
        response = await visitor.head(path)
        assert (response.status, await response.text()) == (status, "")
    for path, status in ("/", 200), ("/?before=9", 200), ("/ws", 400), ("/login", 303):
        response = await ann.head(path, allow_redirects=False)
        assert response.status == status


async def test_websocket_response_carries_no_headers_of_a_page(server):
    ann = await sign_in(server)
    headers = (await ann.ws_connect("/ws"))._response.headers
    assert "Content-Security-Policy" not in headers
    assert "Content-Security-Policy" in (await ann.get("/ws")).headers  # a 400


async def test_fault_of_ours_is_a_plain_500_with_its_traceback_in_the_log(
    serve, monkeypatch, caplog
):
    server = await serve(chat.Settings())
    monkeypatch.setattr(chat, "read_number", lambda *_: {}["a fault of ours"])
    ann = await sign_in_without_page(server)
    for _ in range(2):
        caplog.clear()
        response = await ann.get("/")
        assert response.status == 500 and "fault" not in await response.text()
        assert "KeyError: 'a fault of ours'" in caplog.text


async def sign_in_without_page(server):
    visitor = await server.visitor()
    await visitor.post("/signin", data=form("ann"), allow_redirects=False)
    return visitor


async def test_database_that_does_not_answer_is_a_503_and_comes_back(standalone, serve):
    server = await serve(on(standalone.uri))
    ann = await sign_in(server)
    standalone.freeze()
    asked = time.monotonic()
    responses = await asyncio.gather(*(ann.get("/") for _ in range(30)))
    assert time.monotonic() - asked < 9  # a deadline, not a measurement: 5 are allowed
    for response in responses:
        assert (response.status, response.headers["Retry-After"]) == (503, "5")
        assert "does not answer" in await response.text()
    response = await ann.post("/login", data=form("ann"))
    assert response.status == 503
    standalone.thaw()
    assert (await ann.get("/")).status == 200


# ==============================================================================
# 3. Database and models
# ==============================================================================
def test_names_in_all_spellings_are_one():
    for spelling in "ann", "Ann", "ANN", "ａｎｎ", "Ａｎｎ":
        assert chat.fold(spelling) == "ann"
    assert chat.fold("Straße") == chat.fold("STRASSE")
    assert chat.fold("ﬁn") == chat.fold("FIN")
    assert chat.fold("İx") == chat.fold(chat.fold("İx"))


def test_password_hash_says_how_it_was_made_and_never_repeats():
    first, second = chat.hash_password(PASSWORD), chat.hash_password(PASSWORD)
    assert first.startswith("$argon2id$v=19$m=19456,t=2,p=1$") and first != second
    assert chat.verify_password(PASSWORD, first)
    assert not chat.verify_password(PASSWORD + " ", first)


async def test_message_numbers_have_no_gap(server):
    sockets = [await connect(await sign_in(server, name)) for name in ("ann", "bob")]
    for _ in range(8):
        await asyncio.gather(*(say(ws, "hello") for ws in sockets))
    last = server.app[chat.ROOM].history.last_broadcast
    messages = await chat.Message(server.app[chat.DATABASE]).newest(100)
    assert [message["_id"] for message in messages] == list(range(1, last + 1))
    assert last == 16


async def test_two_that_fight_for_every_number_leave_no_gap(serve, mongodb):
    """Two applications on one database claim numbers at the same time."""
    settings = on(mongodb)
    databases = [
        (await serve(settings)).app[chat.DATABASE],
        (await serve(settings)).app[chat.DATABASE],
    ]
    users = [{"_id": ObjectId(), "name": name} for name in ("ann", "bob")]

    async def write(db, user):
        for number in range(50):
            await chat.Message(db).save(0, user, f"{number}", f"{number}")

    await asyncio.gather(*map(write, databases, users))
    messages = await chat.Message(databases[0]).newest(200)
    assert [message["_id"] for message in messages] == list(range(1, 101))
    for user in users:
        texts = [m["text"] for m in messages if m["user_id"] == user["_id"]]
        assert texts == [f"{number}" for number in range(50)]


async def test_nonce_is_stored_once_even_when_the_process_has_forgotten(serve, mongodb):
    db = (await serve(on(mongodb))).app[chat.DATABASE]
    user = {"_id": ObjectId(), "name": "ann"}
    messages = chat.Message(db)
    assert await messages.save(0, user, "once", "n1") == 1
    assert await messages.save(1, user, "once", "n1") == 1
    assert len(await messages.newest(10)) == 1
    bob = {"_id": ObjectId(), "name": "bob"}
    assert await messages.save(1, bob, "me too", "n1") == 2  # unique for its user only


async def test_memory_holds_the_newest_messages_only(serve):
    server = await serve(chat.Settings())
    db, room = server.app[chat.DATABASE], server.app[chat.ROOM]
    user = {"_id": ObjectId(), "name": "ann"}
    kept, last = chat.HISTORY_SIZE, 3 * chat.HISTORY_SIZE
    for number in range(last):
        await room.post(user, f"{number}", f"{number}")
        if number % 100 == 99:
            assert await db.messages.estimated_document_count() < 2 * kept
    await until(lambda: room.history.last_broadcast == last)
    assert len(room.history.events) == len(room.history.receipts) == kept
    page = await (await (await sign_in(server)).get("/")).text()
    assert shown_ids(page) == list(range(last - 49, last + 1))


async def test_write_that_landed_without_an_answer_is_still_told(serve):
    """As after a deadline: stored, but not broadcast; the next number shows it."""
    server = await serve(chat.Settings())
    ws = await connect(await sign_in(server))
    late = {"_id": 1, "user_id": ObjectId(), "user": "bob", "text": "late"}
    late |= {"time": chat.datetime.now(chat.UTC), "nonce": "n1"}
    await server.app[chat.DATABASE].messages.insert_one(late)
    await ws.send_json({"type": "message", "text": "next", "nonce": "n2"})
    told = [await read(ws, "message") for _ in range(2)]
    assert [(event["id"], event["text"]) for event in told] == [
        (1, "late"),
        (2, "next"),
    ]


async def test_repeat_of_a_message_older_than_the_kept_ones_finds_it(serve, mongodb):
    server = await serve(on(mongodb))
    ws = await connect(await sign_in(server))
    first = await say(ws, "long ago", "n1")
    server.app[chat.ROOM].history.receipts.clear()
    receipt = {"type": "receipt", "nonce": "n1", "id": first["id"]}
    assert await send(ws, "long ago", "n1") == receipt
    assert (await say(ws, "next"))["id"] == 2


def stored(number, **more):
    """A message as the chat stores it."""
    message = {"_id": number, "user_id": ObjectId(), "user": "bob", "text": "hello"}
    return message | {"time": chat.datetime.now(chat.UTC), "nonce": "n1"} | more


OUT_OF_RANGE = DatetimeMS(1 << 55)
FOREIGN_DOCUMENTS = [
    {"_id": 2.0},
    {"_id": Decimal128("3")},
    {"_id": 4},
    {"_id": Int64(5), "text": "hello"},
    {"_id": "text"},
    {"_id": {"a": 1}},
    {"_id": None},
    {},
    {"_id": 1 << 60},
    stored(True),
    stored(False),
    stored(-1),
    stored(6.0),
    stored({"b": 2}),
    stored(7, time=OUT_OF_RANGE),
    stored(8, time="yesterday"),
    stored(9, text=["x"]),
    stored(10, user=17),
    stored(11, user_id=["x"]),
    stored(12, nonce=None),
    {"_id": 13, "seen": OUT_OF_RANGE, "names": ["eve"]},
    {"_id": {"c": 3}, "names": ["eve"]},
    {"names": ["eve", 17]},
    {"names": "eve"},
    {"_id": "eve", "name": "eve", "name_key": "eve", "password": "x"},
    {"name": "eva", "name_key": "eva"},
    {"_id": {"d": 4}, "name": "evi", "name_key": "evi", "password": "x"},
    {"name": 17, "name_key": 17, "email_key": ["x"], "password": 17},
]


@pytest.mark.parametrize("when", ["before the start", "while it runs"])
async def test_foreign_documents_are_passed_over_and_numbers_stay_gapless(
    serve, mongodb, caplog, when
):
    """Any shape of document, in each of our collections, also after a restart."""
    settings = on(mongodb)
    if when == "before the start":
        await asyncio.to_thread(insert_foreign_documents, settings)
    server = await serve(settings)
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    if when == "while it runs":
        first = await say(from_ann, "before")
        assert (await read(from_bob, "message")) == first
        await asyncio.to_thread(insert_foreign_documents, settings)
    texts = [f"text {number}" for number in range(15)]
    for text in texts:
        sent = await say(from_ann, text)
        while (event := await read(from_bob, "message"))["id"] < sent["id"]:
            assert event["text"] == ""  # a number that a foreign document took
        assert event == sent
    for name in "eve", "eva", "evi":
        assert (await ann.post("/login", data=form(name))).status == 422
    caplog.clear()
    chat.log_lines.cache_clear()
    await server.close()
    again = await serve(settings)
    ws = await connect(await sign_in(again, "joe"), after=0)
    ids = list(dict.fromkeys(event["id"] for event in ws.replayed))
    assert ids == list(range(ids[0], ids[-1] + 1)) and ws.welcome["last"] == ids[-1]
    shown = [event["text"] for event in ws.replayed if event["text"]]
    assert shown[-15:] == texts
    assert (await say(ws, "goes on"))["id"] == ids[-1] + 1
    told = [line for line in caplog.messages if "foreign document" in line]
    assert len(told) == len(caplog.messages) == 1


def insert_foreign_documents(settings):
    """Insert each as an operator could, if the chat's indexes let it in."""
    with pymongo.MongoClient(settings.MONGO_HOST) as client:
        for name in "messages", "users", "processes":
            for document in FOREIGN_DOCUMENTS:
                with contextlib.suppress(pymongo.errors.DuplicateKeyError):
                    client[settings.MONGO_DB_NAME][name].insert_one(dict(document))
        client[settings.MONGO_DB_NAME].elsewhere.insert_one({"names": ["eve"]})
        for name in "users", "processes":
            client[settings.MONGO_DB_NAME][name].delete_many(
                {"_id": {"$in": ["text", {"a": 1}]}}
            )


def test_history_takes_the_next_number_and_knows_the_ones_it_had():
    history, count = chat.History(), chat.HISTORY_SIZE + 5
    messages = [stored(number, nonce=f"{number}") for number in range(1, count + 1)]
    for message in messages:
        assert history.add(message) == chat.to_event(message)
    assert list(history.events) == list(range(6, count + 1))
    assert history.add(messages[-1]) is None  # heard twice: read, then streamed
    taken_back = messages[0] | {"text": ""}  # broadcast, not kept
    assert history.add(taken_back) == chat.to_event(taken_back)
    assert 1 not in history.events and history.last_broadcast == count
    with pytest.raises(chat.StreamBroken, match=f"{count + 2} came after {count}"):
        history.add(stored(count + 2))


async def test_message_taken_back_is_blank_for_every_reader(server):
    """In open windows, for newcomers, on pages and in replays."""
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    sent = [await say(from_ann, f"text {number}") for number in range(1, 4)]
    await chat.Message(server.app[chat.DATABASE]).blank(2)
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


async def test_message_taken_back_while_the_stream_is_away_is_blank_soon(serve):
    server = await serve(chat.Settings())
    ws = await connect(await sign_in(server))
    sent = await say(ws, "a mistake")
    db = server.app[chat.DATABASE]
    await db.messages.update_one({"_id": sent["id"]}, {"$set": {"text": ""}})
    db.queue.put_nowait(chat.StreamBroken("as in an outage"))
    assert await read(ws, "message") == sent | {"text": ""}
    assert (await connect(await sign_in(server, "bob"), after=1)).replayed


async def test_message_taken_back_during_a_replay_is_blank_at_its_end(
    server, monkeypatch
):
    ann = await sign_in(server)
    for number in range(1, 4):
        await say(await connect(ann), f"text {number}")
    replay, room = chat.WebSocket.replay, server.app[chat.ROOM]

    async def replay_and_lose_one(*arguments):
        await replay(*arguments)
        await chat.Message(server.app[chat.DATABASE]).blank(2)
        await until(lambda: room.history.events[2]["text"] == "")

    monkeypatch.setattr(chat.WebSocket, "replay", replay_and_lose_one)
    ws = await connect(ann, after=0)
    texts = [(event["id"], event["text"]) for event in ws.replayed]
    assert texts == [(1, "text 1"), (2, "text 2"), (3, "text 3"), (2, "")]


async def test_old_messages_stay_readable_in_memory_when_one_is_taken_back(serve):
    server = await serve(chat.Settings())
    ann = await sign_in(server)
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "bob"}
    count = chat.HISTORY_SIZE + 60
    for number in range(1, count + 1):
        await room.post(user, f"text {number}", f"{number}")
    await until(lambda: room.history.last_broadcast == count)
    await chat.Message(server.app[chat.DATABASE]).blank(chat.HISTORY_SIZE)
    page = await (await ann.get("/?before=61")).text()
    assert shown_ids(page) == list(range(11, 61))


async def test_deleted_account_loses_its_connections_and_its_session(
    short_grace, server
):
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    tabs = [await connect(ann) for _ in range(3)]
    from_bob = await connect(bob)
    await until(lambda: "ann" in server.app[chat.ROOM].online.names)
    db = server.app[chat.DATABASE]
    user = await chat.User(db).find("ann")
    codes = asyncio.gather(*map(closed, tabs))
    await chat.User(db).delete(user["_id"])
    assert await codes == [1008, 1008, 1008]
    for path in "/", "/ws":
        response = await ann.get(path, allow_redirects=False)
        assert (response.status, response.headers["Location"]) == (303, "/login")
    await say(from_bob, "still here")
    while await read(from_bob, "left") != {"type": "left", "user": "ann"}:
        pass
    assert (await say(await connect(await sign_in(server, "ann")), "anew"))["id"] == 2


async def test_account_deleted_while_its_connection_opens_gets_none(
    server, monkeypatch
):
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    await connect(bob)
    db, get = server.app[chat.DATABASE], chat.User.get

    async def get_then_delete(self, user_id):
        user = await get(self, user_id)
        await chat.User(db).delete(user_id)
        room = server.app[chat.ROOM]
        await until(lambda: user_id in room.deleted)
        return user

    monkeypatch.setattr(chat.User, "get", get_then_delete)
    with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
        await ann.ws_connect("/ws")


async def test_account_deleted_while_the_stream_is_away_is_noticed_later(serve):
    server = await serve(chat.Settings())
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    db = server.app[chat.DATABASE]
    code = asyncio.create_task(closed(from_ann))
    await db.users.delete_one({"name": "ann"})
    db.queue.put_nowait(chat.StreamBroken("as in an outage"))
    assert await code == 1008
    await say(from_bob, "still here")


async def test_presence_is_stamped_by_the_databases_clock(serve, mongodb, monkeypatch):
    """The users of a host whose clock is wrong stay online."""

    class Yesterday(chat.datetime):
        @classmethod
        def now(cls, zone=None):
            return super().now(zone) - chat.timedelta(days=1)

    server = await serve(on(mongodb))
    monkeypatch.setattr(chat, "datetime", Yesterday)
    db = server.app[chat.DATABASE]
    await connect(await sign_in(server))
    entry = await until(lambda: db.processes.find_one({"names": "ann"}))
    hello = await db.mongo.client.admin.command("hello")
    now = hello["localTime"].replace(tzinfo=chat.UTC)
    assert abs(now - entry["seen"]) < chat.timedelta(seconds=20)
    (index,) = [
        index
        for index in (await db.processes.index_information()).values()
        if "expireAfterSeconds" in index
    ]
    assert index["key"] == [("seen", 1)] and index["expireAfterSeconds"] == 45


async def test_indexes_that_were_dropped_are_there_as_soon_as_the_stream_is(
    serve, mongodb
):
    server = await serve(on(mongodb))
    ws, db = await connect(await sign_in(server)), server.app[chat.DATABASE]
    names = set(await db.messages.index_information())
    assert len(names) == 2
    code = asyncio.create_task(closed(ws))
    await db.mongo.client.drop_database(db.mongo.name)
    assert await code == 1008  # her account has gone as well
    await say(await connect(await sign_in(server, "ann")), "anew")
    assert set(await db.messages.index_information()) == names


async def test_conflict_between_indexes_is_reported_as_that(mongodb):
    settings = on(mongodb)
    with pymongo.MongoClient(mongodb) as client:
        users = client[settings.MONGO_DB_NAME].users
        users.insert_many([{"name_key": "ann"}, {"name_key": "ann"}])
    with pytest.raises(chat.CannotStart, match="cannot be used: .*duplicate key"):
        await chat.open_database(settings)


async def test_broken_stream_opens_again_in_memory(serve):
    """Two users without an email are not duplicates of each other."""
    server = await serve(chat.Settings())
    sockets = [await connect(await sign_in(server, name)) for name in ("ann", "bob")]
    for _ in range(2):
        outage = chat.StreamBroken("as in an outage")
        server.app[chat.DATABASE].queue.put_nowait(outage)
        await say(sockets[0], "still here")
        assert (await read(sockets[1], "message"))["text"] == "still here"


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


@pytest.mark.parametrize("login", ["ann", "ANN", " Ａnn ", "Ann@Example.org"])
async def test_name_or_email_in_any_spelling_signs_in(server, login):
    await sign_in(server, "Ann", email="ann@example.org")
    visitor = await server.visitor()
    response = await visitor.post("/login", data=form(login))
    assert (response.status, response.url.path) == (200, "/")
    assert re.search('id="user"[^>]*>Ann<', await response.text())


NAMES = [
    "ann", "Zoë", "Ünal", "Ольга", "Боб", "काजल", "अनिल", "สมชาย", "محمد", "李小龍",
    "a-_", "x" * 32, "123",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
async def test_names_of_any_script_are_welcome(serve, name):
    ws = await connect(await sign_in(await serve(chat.Settings()), name))
    assert ws.welcome["user"] == name


WRONG_NAMES = [
    "", "  ", "ab", "x" * 33, "a b", "a.b", "a@b.c", "<b>ann</b>", "ann\0", "a\nb",
    "ann\u200b", "ann\u202e", "\u3164\u3164\u3164", "ann\ufe0f", "ann\u00ad",
    "😀😀😀", "';--", "ann\U000e0100", "a" + "\u0323" * 31, "x\u0325\u0329\u032ay",
    "\u0323ann", "ﬁona", "ann①", "annאבג", "אבגann", "12א", "\u200dann", "ann\u200d",
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
    found = re.search(
        rf'<p class="error" id="{name}-note" role="alert">(.*?)</p>', page
    )
    marked = re.search(rf'<input id="{name}"[^>]* aria-invalid="true"', page)
    return found[1] if found and marked else ""


OTHER = {"password": "another horse", "password2": "another horse"}


@pytest.mark.parametrize(
    ("fields", "name", "sentence"),
    [
        ({"password": "short"}, "password", "8 to 128"),
        ({"password": "x" * 129, "password2": "x" * 129}, "password", "8 to 128"),
        ({"password2": "something else"}, "password2", "not the same"),
        ({"email": "nobody"}, "email", "not an email"),
        ({"email": "a@b@c"}, "email", "not an email"),
        ({"email": "a\0@b.c"}, "email", "not an email"),
        ({"email": "x" * 250 + "@b.c" + "d"}, "email", "at most 254"),
        ({"login": "ANN"} | OTHER, "login", "has this already"),
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


async def test_two_simultaneous_sign_ups_make_one_account(server):
    visitors = [await server.visitor() for _ in range(6)]
    names = ["ann", "Ann", "ANN", "ａnn", "aNN", "anN"]
    posts = []
    for visitor, name in zip(visitors, names, strict=True):
        passwords = {"password": f"{name}'s horse", "password2": f"{name}'s horse"}
        data = form(name) | passwords
        posts.append(visitor.post("/signin", data=data, allow_redirects=False))
    statuses = [response.status for response in await asyncio.gather(*posts)]
    assert sorted(statuses) == [303] + 5 * [422]


async def test_wide_letters_become_plain_ones(server):
    assert (await connect(await sign_in(server, "Ａｎｎ"))).welcome["user"] == "Ann"


async def test_second_click_on_create_account_signs_in(server):
    visitor, other = await server.visitor(), await server.visitor()
    data = form("ann", email="ann@example.org")
    posts = [
        client.post("/signin", data=data, allow_redirects=False)
        for client in (visitor, visitor, other)
    ]
    for response in await asyncio.gather(*posts):
        assert (response.status, response.headers["Location"]) == (303, "/")
    assert await server.app[chat.DATABASE].users.count_documents({}) == 1
    for client in visitor, other:
        assert (await client.get("/")).url.path == "/"


async def test_second_click_is_an_attempt_to_sign_in(serve):
    """Otherwise the sign-up page would let you guess passwords without a limit."""
    server = await serve(chat.Settings(LOGIN_ATTEMPTS=4))
    await sign_in(server, "ann")
    visitor, statuses = await server.visitor(), []
    for number in range(4):
        guess = {"password": f"guess no. {number}", "password2": f"guess no. {number}"}
        response = await visitor.post("/signin", data=form("ann") | guess)
        statuses.append(response.status)
    assert statuses == [422, 422, 422, 429]
    response = await visitor.post("/login", data=form("Ann", password="guess no. 5"))
    assert response.status == 422  # three attempts counted twice: by name, by account
    assert (await visitor.post("/login", data=form("Ann"))).status == 429


async def test_signing_up_for_an_older_account_is_no_second_click(serve):
    server = await serve(chat.Settings())
    long_ago = chat.datetime.now(chat.UTC) - chat.timedelta(minutes=2)
    user = {"_id": ObjectId.from_datetime(long_ago), "name": "ann", "name_key": "ann"}
    user["password"] = chat.hash_password(PASSWORD)
    await server.app[chat.DATABASE].users.insert_one(user)
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


async def test_no_text_is_normalized_before_its_length_is_looked_at(serve, monkeypatch):
    """16 KB of combining marks take 112 ms, in which the room stands still."""
    lengths, normalize = [], chat.unicodedata.normalize

    def note(kind, text):
        lengths.append(len(text))
        return normalize(kind, text)

    server = await serve(chat.Settings())
    visitor = await server.visitor()
    monkeypatch.setattr(chat.unicodedata, "normalize", note)
    monkeypatch.setattr(chat, "hash_password", str.upper)
    for name in "login", "email", "password", "password2":
        for count in 150, 1_200:  # pairs of marks, of 12 bytes each
            data = form("ann") | {name: "a" + "\u0316\u0301" * count}
            for path in "/login", "/signin":
                response = await visitor.post(path, data=data)
                assert response.status == 422
    assert lengths and max(lengths) <= chat.LONGEST_FIELD


async def test_field_that_is_too_long_is_said_beside_it_and_not_sent_back(server):
    visitor = await server.visitor()
    data = form("x" * 255, email="y" * 255)
    page = await (await visitor.post("/signin", data=data)).text()
    for name in "login", "email":
        assert "at most 254 characters" in field_error(page, name)
    assert "xxx" not in page and "yyy" not in page


async def test_unknown_name_and_wrong_password_look_the_same(server):
    await sign_in(server, "ann")
    visitor = await server.visitor()
    wrong = await visitor.post("/login", data=form("ann", password="not this one"))
    unknown = await visitor.post("/login", data=form("bob", password="not this one"))
    assert wrong.status == unknown.status == 422
    page = await wrong.text()
    assert page.replace('"ann"', '"bob"') == await unknown.text()
    assert "No account has this name" in field_error(page, "login")


async def test_unknown_name_costs_a_hash_as_well(server, monkeypatch):
    hashed = []
    hash_password = chat.hash_password
    monkeypatch.setattr(
        chat, "hash_password", lambda text: hashed.append(text) or hash_password(text)
    )
    visitor = await server.visitor()
    await visitor.post("/login", data=form("nobody"))
    assert hashed == [PASSWORD]


async def test_crowd_that_signs_in_is_hashed_in_turn_and_beside_the_room(
    server, monkeypatch
):
    threads, at_once = set(), []
    hash_password = chat.hash_password

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
    """Beyond it the form comes back filled, and says when to try again."""
    first, go_on = start_hashing(monkeypatch)
    server = await serve(chat.Settings())
    visitors = [await server.visitor() for _ in range(3)]
    ann = asyncio.create_task(visitors[0].post("/signin", data=form("ann")))
    await asyncio.to_thread(first.wait)
    monkeypatch.setattr(chat, "HASH_WAIT", 0.05)
    late = visitors[1].post("/signin", data=form("bob", email="bob@example.org"))
    login = visitors[2].post("/login", data=form("bob"))
    for response in await asyncio.gather(late, login):
        page = await response.text()
        assert (response.status, response.headers["Retry-After"]) == (503, "3")
        assert "Too many people are signing in" in field_error(page, "login")
        assert 'value="bob"' in page and PASSWORD not in page
    go_on.set()
    assert (await ann).url.path == "/"
    monkeypatch.setattr(chat, "HASH_WAIT", 60)
    assert (await visitors[1].post("/signin", data=form("bob"))).url.path == "/"


async def test_hash_that_has_begun_is_finished(serve, monkeypatch):
    """A slow machine answers late, but not in vain."""
    monkeypatch.setattr(chat, "HASH_WAIT", 1)
    first, go_on = start_hashing(monkeypatch)
    server = await serve(chat.Settings())
    visitor = await server.visitor()
    ann = asyncio.create_task(visitor.post("/signin", data=form("ann")))
    await asyncio.to_thread(first.wait)
    await asyncio.sleep(1.2)
    go_on.set()
    assert (await ann).url.path == "/"


async def test_client_that_has_hung_up_gets_no_hash(serve, monkeypatch):
    first, go_on = start_hashing(monkeypatch)
    server = await serve(chat.Settings())
    ann = asyncio.create_task(sign_in(server, "ann"))
    await asyncio.to_thread(first.wait)
    body = urlencode(form("bob") | OTHER).encode()
    lines = ["POST /signin HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += ["Content-Type: application/x-www-form-urlencoded", "", ""]
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write("\r\n".join(lines).encode() + body)
    await until(lambda: server.app[chat.HASHING]._waiters)
    (bob,) = (
        handler
        for handler in server.runner.server.connections
        if handler.transport.get_extra_info("peername")
        == writer.get_extra_info("sockname")
    )
    writer.transport.abort()
    await until(lambda: bob.transport is None)
    go_on.set()
    await ann
    await sign_in(server, "joe")
    assert first.hashed == [PASSWORD, PASSWORD]


def start_hashing(monkeypatch):
    """Replace hashing by one that starts, and goes on when it is told."""
    first, go_on = threading.Event(), threading.Event()
    first.hashed, hash_password = [], chat.hash_password

    def hash_when_told(password):
        first.hashed.append(password)
        first.set()
        assert go_on.wait(20)
        return hash_password(password)

    monkeypatch.setattr(chat, "hash_password", hash_when_told)
    return first, go_on


@pytest.mark.parametrize(
    "spellings",
    [
        ["ann", "ANN", "ann ", "  ann", "ａｎｎ", "ann\t", "Ann@example.org", "Ａnn"],
        ["nobody", "NOBODY", " nobody ", "ｎobody", "Nobody"],
        ["no@body", "NO@body", " no@body", "no@ｂody"],
    ],
)
async def test_attempts_count_per_account_however_it_is_spelled(serve, spellings):
    server = await serve(chat.Settings(LOGIN_ATTEMPTS=len(spellings)))
    await sign_in(server, "ann", email="ann@example.org")
    visitor, wrong = await server.visitor(), {"password": "a wrong guess"}
    for login in spellings:
        assert (await visitor.post("/login", data=form(login) | wrong)).status == 422
    for login in spellings:
        response = await visitor.post("/login", data=form(login))
        assert response.status == 429
        assert 1 <= int(response.headers["Retry-After"]) <= 21
        assert "Too many attempts" in field_error(await response.text(), "login")
    response = await visitor.post("/login", data=form("bob") | wrong)
    assert response.status == 422  # another account has its own


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


async def test_what_the_throttle_keeps_for_strangers_has_a_bound(serve, monkeypatch):
    monkeypatch.setattr(chat, "hash_password", str.upper)
    server = await serve(chat.Settings())
    visitor, keys = await server.visitor(), []
    throttle = server.app[chat.THROTTLE]
    assert throttle.cache_info().maxsize <= 10_000
    server.app._state[chat.THROTTLE] = lambda *key: keys.append(key) or throttle(*key)
    for login in "\ufdfa" * 254, "x" * 254, "x" * 4_000, "a@" + "\ufdfa" * 252:
        for path in "/login", "/signin":
            await visitor.post(path, data=form(login))
    assert keys and max(len(account) for _, account in keys) <= 254


def test_bucket_lets_a_burst_through_and_then_a_steady_rate(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bucket = chat.TokenBucket(rate=2, burst=3)
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 0.5]
    now += 0.5
    assert [bucket.take() for _ in range(2)] == [0, 0.5]
    now += 3600
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 0.5]


KEY = base64.urlsafe_b64encode(chat.hashlib.sha256(b"any text").digest())


def cookie(content, key=KEY, at=None):
    if not isinstance(content, bytes):
        content = json.dumps(content).encode()
    return Fernet(key).encrypt_at_time(content, int(at or time.time())).decode()


def session(user, **more):
    return {"created": int(time.time()), "session": {"user": user} | more}


LONG_AGO = time.time() - 15 * 24 * 60 * 60
BAD_COOKIES = {
    "empty": "", "one letter": "x", "equation": "a=b", "backslash": "\\",
    "start of a token": "gAAAAA", "bytes": "\udcff\udcfe", "long": "x" * 4000,
    "emoji": "💥",
    "foreign key": cookie(session("0" * 24), key=Fernet.generate_key()),
    "expired": cookie(session("0" * 24), at=LONG_AGO),
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
async def test_bad_cookie_leads_to_the_login_page(serve, caplog, kind):
    server = await serve(chat.Settings(SECRET_KEY="any text"))
    cookies = f"CHAT_8080={BAD_COOKIES[kind]}".encode(errors="surrogateescape")
    for path in b"/", b"/ws":
        head = await raw_request(server, b"GET " + path, b"Cookie: " + cookies)
        assert head.startswith(b"HTTP/1.1 303") and b"Location: /login" in head
    head = await raw_request(server, b"GET /login", b"Cookie: " + cookies)
    assert head.startswith(b"HTTP/1.1 200")
    assert "Traceback" not in caplog.text


async def raw_request(server, line, *headers, body=b""):
    """Send bytes as they are; return all that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    start = [line + b" HTTP/1.1", b"Host: localhost", b"Connection: close", *headers]
    writer.write(b"\r\n".join(start) + b"\r\n\r\n" + body)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


async def test_session_of_a_deleted_user_leads_to_login(server):
    """And an account of the same name, made later, does not inherit the session."""
    ann = await sign_in(server, "ann")
    await server.app[chat.DATABASE].users.delete_one({"name": "ann"})
    await sign_in(server, "ann")
    assert (await ann.get("/")).url.path == "/login"


async def test_session_is_encrypted_and_out_of_reach_of_scripts(serve):
    server = await serve(chat.Settings(ORIGIN="https://chat.example"))
    name, value, attributes = await session_cookie(server)
    assert attributes == {"HttpOnly", "SameSite=Lax", "Secure", "Path=/"}
    assert "ann" not in value and name == "CHAT_8080"


async def test_session_in_memory_ends_with_the_browser_and_is_named_by_the_port(serve):
    """Cookies know no port: several chats on one localhost would share one."""
    name, _, attributes = await session_cookie(await serve(chat.Settings(PORT=8081)))
    assert name == "CHAT_8081"
    assert attributes == {"HttpOnly", "SameSite=Lax", "Path=/"}
    names = {
        (await session_cookie(await serve(chat.Settings(PORT=0))))[0] for _ in "12"
    }
    assert len(names) == 2


async def test_session_on_mongodb_lasts_two_weeks_on_every_process(serve, mongodb):
    name, _, attributes = await session_cookie(await serve(on(mongodb)))
    assert name == "AIOHTTP_SESSION" and "Max-Age=1209600" in attributes


async def test_two_chats_on_one_host_leave_each_others_sessions_alone(serve):
    urls = [
        str((await serve(chat.Settings(PORT=port))).make_url("")) for port in (1, 2)
    ]
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(cookie_jar=jar) as browser:
        for url in urls:
            async with browser.post(url + "/signin", data=form("ann")) as response:
                assert response.url.path == "/"
        for url in urls:
            async with browser.get(url + "/") as response:
                assert response.url.path == "/"


async def test_cookies_of_a_dozen_other_applications_do_no_harm(serve):
    server = await serve(chat.Settings())
    ann = await sign_in(server)
    (cookie,) = ann.session.cookie_jar
    others = [f"other{number}={5_000 * 'x'}" for number in range(12)]
    cookies = "; ".join([*others, f"{cookie.key}={cookie.value}"])
    head = await raw_request(server, b"GET /", b"Cookie: " + cookies.encode())
    assert head.startswith(b"HTTP/1.1 200")


async def session_cookie(server):
    """Sign up, and return the cookie's name, value and attributes."""
    visitor = await server.visitor()
    response = await visitor.post("/signin", data=form("ann"), allow_redirects=False)
    first, *attributes = response.headers["Set-Cookie"].split("; ")
    return *first.split("=", 1), set(attributes)


BAD_FORMS = {
    "json": (b"application/json", b'{"login": "ann"}'),
    "none": (b"", b""),
    "multipart": (b"multipart/form-data; boundary=x", b"--x\r\nrubbish\r\n--x--"),
    "multipart without boundary": (b"multipart/form-data", b"rubbish"),
    "unknown charset": (b"application/x-www-form-urlencoded; charset=klingon", b"a=b"),
    "no text charset": (b"application/x-www-form-urlencoded; charset=hex", b"a=b"),
    "half a surrogate pair": (
        b"application/x-www-form-urlencoded; charset=unicode_escape",
        rb"login=\ud800nn&password=12345678",
    ),
    "text that is none": (
        b"application/x-www-form-urlencoded; charset=ascii",
        b"login=\xff\xfe",
    ),
}


@pytest.mark.parametrize("path", [b"/login", b"/signin"])
@pytest.mark.parametrize("kind", BAD_FORMS)
async def test_form_that_cannot_be_read_is_a_clear_400(serve, caplog, path, kind):
    server = await serve(chat.Settings())
    content_type, body = BAD_FORMS[kind]
    length = b"Content-Length: %d" % len(body)
    headers = [b"Content-Type: " + content_type, length]
    answer = await raw_request(server, b"POST " + path, *headers, body=body)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 422"))
    assert b"could not be read" in answer or b'role="alert"' in answer
    assert "Traceback" not in caplog.text


async def test_generated_forms_are_taken_or_refused_but_never_break(
    server, caplog, monkeypatch
):
    monkeypatch.setattr(chat, "hash_password", str.upper)  # this is about the rest
    st = strategies()
    field = st.text(max_size=40) | st.text("abc_-@. ", max_size=40)
    passwords = st.just(PASSWORD) | field
    fields = {"login": field, "email": field | st.just("")}
    fields |= {"password": passwords, "password2": passwords}
    form = st.fixed_dictionaries({}, optional=fields) | st.fixed_dictionaries(fields)
    for data in examples(form, 60):
        visitor = await server.visitor()
        data = {key: text.encode(errors="replace") for key, text in data.items()}
        body = urlencode(data)
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        for path in "/login", "/signin":
            response = await visitor.post(path, data=body, headers=headers)
            assert response.status in {200, 422, 429}
    assert "Traceback" not in caplog.text


async def test_generated_cookies_origins_and_headers_break_nothing(serve, caplog):
    st, server = strategies(), await serve(chat.Settings())
    value = st.binary(max_size=60).map(lambda data: re.sub(rb"[\r\n\0]", b"", data))
    names = [b"Cookie", b"Origin", b"Host", b"X-Forwarded-Host", b"Content-Type"]
    names += [b"Upgrade", b"Connection", b"Sec-WebSocket-Key", b"Content-Length"]
    header = st.tuples(st.sampled_from(names), value).map(b": ".join)
    session = value.map(lambda data: b"Cookie: CHAT_8080=" + data)
    for line in examples(header | session, 120):
        for request in b"GET /", b"GET /ws", b"POST /login":
            answer = await raw_request(server, request, line, b"Content-Length: 0")
            assert re.match(rb"HTTP/1.[01] [34]", answer), (line, answer[:200])
    assert "Traceback" not in caplog.text


def test_log_keeps_the_traceback_of_a_fault_of_ours(caplog):
    chat.init_app(chat.Settings())
    try:
        raise KeyError("a fault of ours")
    except KeyError:
        chat.logging.getLogger("aiohttp.server").exception("Error")
    assert "Traceback" in caplog.text


async def test_body_that_trickles_is_answered_and_the_connection_ends(
    serve, monkeypatch, caplog
):
    monkeypatch.setattr(chat, "DEADLINE", 0.2)
    server = await serve(chat.Settings())
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    lines = ["POST /login HTTP/1.1", "Host: localhost", "Content-Length: 999"]
    lines += ["Content-Type: application/x-www-form-urlencoded", "", "login=an"]
    writer.write("\r\n".join(lines).encode())
    answer = b""
    async with asyncio.timeout(8):  # aiohttp itself would hold it for 10 s more
        while chunk := await reader.read(100):
            answer += chunk
            if b"took too long" not in answer:
                writer.write(b"n")
    assert answer.startswith(b"HTTP/1.1 408")
    writer.close()
    assert "Traceback" not in caplog.text


async def test_body_that_is_broken_or_huge_is_refused(serve, caplog):
    server = await serve(chat.Settings())
    kind = b"Content-Type: application/x-www-form-urlencoded"
    headers = kind, b"Content-Encoding: gzip", b"Content-Length: 9"
    answer = await raw_request(server, b"POST /login", *headers, body=b"not  gzip")
    assert answer.startswith(b"HTTP/1.1 400")
    headers = kind, b"Transfer-Encoding: chunked"
    answer = await raw_request(server, b"POST /login", *headers, body=b"zzz\r\n")
    assert answer.startswith(b"HTTP/1.0 400")
    visitor = await server.visitor()
    response = await visitor.post("/login", data=form("ann", password="x" * 20_000))
    assert response.status == 413
    assert "Traceback" not in caplog.text


async def test_older_messages_are_on_a_plain_page(server):
    ann = await sign_in(server)
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "bob"}
    for number in range(1, 121):
        await room.post(user, f"text {number}", f"{number}")
    await until(lambda: room.history.last_broadcast == 120)
    page = await (await ann.get("/")).text()
    assert shown_ids(page) == list(range(71, 121))
    assert 'href="/?before=71"' in page
    page = await (await ann.get("/?before=71")).text()
    assert shown_ids(page) == list(range(21, 71)) and "chat.js" not in page
    page = await (await ann.get("/?before=21")).text()
    assert shown_ids(page) == list(range(1, 21)) and "before=" not in page
    page = await (await ann.get("/?before=1")).text()
    assert shown_ids(page) == [] and "not kept" in page


@pytest.mark.parametrize("number", ["", "x", "-1", "1.5", "٣", "9" * 16, "1 OR 1=1"])
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


LINKS = {
    "see https://a.example/b?c=d&e#f.": ["https://a.example/b?c=d&e#f"],
    "(http://a.example/x_(y)), Https://B.example!": [
        "http://a.example/x_(y)",
        "Https://B.example",
    ],
    "https://bücher.example/ü": ["https://bücher.example/ü"],
    "javascript:alert(1) ftp://a.example www.a.example a@b.example": [],
    'https://a.example/"onclick="alert(1)': ["https://a.example/"],
    "https://a.example/'x'": ["https://a.example/'x"],
    "<https://a.example/>https://": ["https://a.example/"],
    "https://a.example/\u202ehttps://b.example": [
        "https://a.example/",
        "https://b.example",
    ],
}


@pytest.mark.parametrize("text", LINKS)
def test_web_addresses_are_links_and_the_rest_is_escaped(text):
    html = str(chat.links(text))
    hrefs = re.findall(r'<a href="([^"]*)"', html)
    assert list(map(unescape, hrefs)) == LINKS[text]
    tags = re.findall("<[^>]*>", html)
    opening = [tag for tag in tags if tag != "</a>"]
    assert len(opening) == len(hrefs) and len(tags) == 2 * len(hrefs)
    for tag in opening:
        assert 'target="_blank" rel="noopener noreferrer nofollow"' in tag
    assert unescape(re.sub("<[^>]*>", "", html)) == text


# ==============================================================================
# 5. WebSocket
# ==============================================================================
async def test_message_reaches_every_reader_with_all_its_fields(server):
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    message = await say(from_ann, "  hé <b>\n😀\0\u202e\u200b ", "n1")
    assert list(message) == ["type", "id", "user", "text", "time", "nonce"]
    assert message["text"] == "  hé <b>\n😀\0\u202e\u200b "
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", message["time"])
    assert await read(from_bob, "message") == message
    assert (message["id"], message["user"], message["nonce"]) == (1, "ann", "n1")


async def test_receipt_goes_to_the_sender_alone_also_for_a_repeated_message(server):
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    receipt = {"type": "receipt", "nonce": "n1", "id": 1}
    for _ in range(3):
        assert await send(from_ann, "once", "n1") == receipt
    await say(from_bob, "next", "n2")
    heard = await all_until("n2", from_ann)
    assert [event for event in heard if event["type"] == "receipt"] == []
    await say(from_ann, "last", "n3")
    heard = await all_until("n3", from_bob)
    assert [event for event in heard if event["type"] == "receipt"] == []


async def all_until(nonce, ws):
    """Return the events up to the message with this nonce."""
    heard = [await read(ws)]
    while (heard[-1]["type"], heard[-1].get("nonce")) != ("message", nonce):
        heard.append(await read(ws))
    return heard


async def test_message_that_is_not_stored_is_never_shown(standalone, serve):
    """Stored first, broadcast second: a message that fails is in no one's log."""
    server = await serve(on(standalone.uri))
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    standalone.kill()
    sent = [{"type": "message", "text": "lost?", "nonce": f"n{n}"} for n in range(2)]
    for event in sent:
        await from_ann.send_json(event)
        error = await read(from_ann, "error", "message")
        assert (error["code"], error["nonce"]) == ("not_saved", event["nonce"])
    standalone.start()
    for event in sent:  # the connections stayed; send again what got no receipt
        receipt = await send(from_ann, event["text"], event["nonce"])
        assert receipt["type"] == "receipt"
    seen = [(await read(from_bob, "message"))["nonce"] for _ in sent]
    assert seen == ["n0", "n1"]


async def test_frozen_database_lets_no_sender_wait_for_long(standalone, serve):
    server = await serve(on(standalone.uri))
    sockets = [await connect(await sign_in(server, name)) for name in ("ann", "bob")]
    await say(sockets[0], "before")
    standalone.freeze()
    for ws, nonce in zip(sockets, "ab", strict=True):
        await ws.send_json({"type": "message", "text": "now", "nonce": nonce})
    for ws in sockets:
        assert (await read(ws, "error"))["code"] == "not_saved"
    standalone.thaw()
    numbers = [
        (await send(ws, "now", nonce))["id"]
        for ws, nonce in zip(sockets, "ab", strict=True)
    ]
    assert sorted(numbers) == [2, 3]


async def test_lost_receipt_is_resent_and_stored_once(server):
    ann = await sign_in(server)
    ws = await connect(ann)
    await ws.send_json({"type": "message", "text": "once", "nonce": "n1"})
    await ws.close()
    await until(lambda: server.app[chat.ROOM].history.last_broadcast == 1)
    ws = await connect(ann, after=0)
    assert [event["nonce"] for event in ws.replayed] == ["n1"]
    for _ in range(3):
        assert (await send(ws, "once", "n1"))["id"] == 1
    assert shown_ids(await (await ann.get("/")).text()) == [1]


async def test_message_sent_on_two_sockets_at_once_is_stored_once(server):
    ann = await sign_in(server)
    sockets = [await connect(ann) for _ in range(5)]
    event = {"type": "message", "text": "once", "nonce": "n1"}
    await asyncio.gather(*(ws.send_json(event) for ws in sockets))
    for ws in sockets:
        assert {(await read(ws, "message", "receipt"))["id"] for _ in "12"} == {1}
    assert (await say(sockets[0], "next"))["id"] == 2


async def test_returning_reader_gets_missed_messages_in_order_and_then_welcome(server):
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann = await connect(ann)
    for number in range(1, 11):
        await say(from_ann, f"{number}")
    ws = await connect(bob, after=4)
    assert [event["id"] for event in ws.replayed] == [5, 6, 7, 8, 9, 10]
    assert ws.welcome["last"] == 10
    assert (await connect(bob)).replayed == []
    assert (await connect(bob, after=10)).replayed == []
    assert (await connect(bob, after=999)).replayed == []


async def test_nothing_falls_between_replay_and_live(server):
    """Readers come back again and again while one sender never pauses."""
    settings = server.app[chat.SETTINGS]
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "eve"}

    async def talk():
        for number in range(300):
            await room.post(user, "x" * settings.MAX_MESSAGE_LENGTH, f"{number}")
            await asyncio.sleep(0.001)

    async def listen(visitor):
        seen = [0]
        while seen[-1] < 300:
            ws = await visitor.ws_connect(f"/ws?after={seen[-1]}")
            for _ in range(23):
                event = await read(ws)
                if event["type"] == "message":
                    seen.append(event["id"])
                if seen[-1] == 300:
                    break
            await ws.close()
        return seen

    *seen, _ = await asyncio.gather(*map(listen, [ann, bob, ann, bob]), talk())
    for ids in seen:
        assert ids == list(range(301))


async def test_newcomer_hears_everything_after_what_welcome_names(server):
    """Nothing twice and nothing missed, also while another user never pauses."""
    ann = await sign_in(server)
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "eve"}

    async def talk():
        for number in range(200):
            await room.post(user, "x", f"{number}")
            await asyncio.sleep(0.001)

    talking = asyncio.create_task(talk())
    while not talking.done():
        ws = await connect(ann)
        first = ws.welcome["last"] + 1
        if first < 190:
            heard = [(await read(ws, "message"))["id"] for _ in range(5)]
            assert heard == list(range(first, first + 5))
        await ws.close()
    await talking


async def test_message_broadcast_during_a_replay_is_replayed_as_well(
    server, monkeypatch
):
    """Sending waits for a slow reader; the room goes on meanwhile."""
    ann = await sign_in(server)
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "bob"}
    await room.post(user, "1", "n1")
    await until(lambda: room.history.last_broadcast == 1)
    send_json = chat.web.WebSocketResponse.send_json

    async def send_slowly(ws, event):
        if (number := event["id"]) < 4:
            await room.post(user, f"{number + 1}", f"n{number + 1}")
            await until(lambda: room.history.last_broadcast > number)
        await send_json(ws, event)

    monkeypatch.setattr(chat.web.WebSocketResponse, "send_json", send_slowly)
    ws = await connect(ann, after=0)
    assert [event["id"] for event in ws.replayed] == [1, 2, 3, 4]
    assert ws.welcome["last"] == 4


async def test_message_broadcast_at_the_end_of_a_replay_comes_once(server, monkeypatch):
    """It is in the history by then, and waits for the next flush."""
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_bob = await connect(bob)
    await say(from_bob, "first")
    replay, history = chat.WebSocket.replay, server.app[chat.ROOM].history
    monkeypatch.setattr(chat, "TURNS", 1_000)

    async def replay_beside_a_message(*arguments):
        await send_only(from_bob, "second", "n2")
        await until(lambda: history.last_broadcast == 2)
        await replay(*arguments)

    monkeypatch.setattr(chat.WebSocket, "replay", replay_beside_a_message)
    ws = await connect(ann, after=0)
    assert [event["text"] for event in ws.replayed] == ["first", "second"]
    monkeypatch.undo()
    assert (await say(ws, "third"))["id"] == 3


async def test_reader_that_missed_more_than_is_kept_sees_the_gap(serve):
    server = await serve(chat.Settings())
    ann = await sign_in(server)
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "bob"}
    for number in range(chat.HISTORY_SIZE + 10):
        await room.post(user, "x", f"{number}")
    await until(lambda: room.history.last_broadcast == chat.HISTORY_SIZE + 10)
    ws = await connect(ann, after=5)
    ids = [event["id"] for event in ws.replayed]
    assert ids == list(range(11, chat.HISTORY_SIZE + 11))  # not 6: a gap


BAD_EVENTS = [
    "", "x", "null", "[]", "17", '"message"', "{}", "[" * 9_000, '{"a":' * 2_000,
    '{"type": "message"}', '{"type": "message", "text": 17, "nonce": "n"}',
    '{"type": "message", "text": "x"}', '{"type": "message", "text": "x", "nonce": ""}',
    '{"type": "message", "text": "x", "nonce": 17}', '{"type": "bad", "nonce": "n"}',
    '{"type": "message", "text": null, "nonce": "n"}', '{"type": ["message"]}',
    json.dumps({"type": "message", "text": "x", "nonce": "n" * 65}),
    '{"type": "message", "text": "\\ud800", "nonce": "n"}',
    '{"type": "message", "text": "x", "nonce": "\\udfff"}',
    '{"type": "message", "text": "x", "nonce": "n"', "\0", "9" * 5_000, "NaN", "-",
    '{"\\ud800": 1}', "\u202e{}", '{"type": "message", "text": ["x"], "nonce": "n"}',
]  # fmt: skip


async def test_bad_frame_gets_an_error_and_the_connection_stays(serve, caplog):
    server = await serve(chat.Settings(MESSAGE_BURST=1000))
    ws = await connect(await sign_in(server))
    for frame in BAD_EVENTS:
        await ws.send_str(frame)
        error = await read(ws, "error")
        assert error["code"] == "bad_event" and error["text"].endswith(".")
    await ws.send_bytes(b'{"type": "message", "text": "x", "nonce": "n"}')
    assert (await read(ws, "error"))["code"] == "bad_event"
    assert (await say(ws, "still here"))["id"] == 1
    assert caplog.text == ""


async def test_generated_frames_never_break_the_connection(serve, caplog):
    """Any JSON, any text, any bytes: an answer, or the message; never silence."""
    st = strategies()
    text = st.text(st.characters(), max_size=70)
    scalar = st.none() | st.booleans() | st.floats() | st.integers() | text
    value = st.recursive(scalar, lambda v: st.lists(v) | st.dictionaries(text, v))
    names = st.sampled_from(["type", "text", "nonce", "id"])
    kinds = st.just("message") | value
    event = st.dictionaries(names, value) | st.fixed_dictionaries(
        {"type": kinds, "text": value, "nonce": value}
    )
    frames = examples(event | value | text | st.binary(max_size=50), 300)
    server = await serve(chat.Settings(MESSAGE_BURST=1000))
    ws = await connect(await sign_in(server))
    for frame in frames:
        if isinstance(frame, bytes):
            await ws.send_bytes(frame)
        else:
            await ws.send_str(json.dumps(frame))
        assert (await read(ws, "error", "receipt"))["type"] in {"error", "receipt"}
    assert (await say(ws, "still here"))["text"] == "still here"
    assert caplog.text == ""


def strategies():
    import hypothesis  # here, so that one test alone starts at once

    return hypothesis.strategies


def examples(strategy, count):
    """Generate that many, the same on every run."""
    import hypothesis

    found = []

    @hypothesis.settings(max_examples=count, database=None, derandomize=True)
    @hypothesis.given(strategy)
    def collect(example):
        found.append(example)

    collect()
    return found


INVISIBLE = [
    "", " \n\t", "\u200b" * 3, "\u3164", "\u2800\u2800", "\u00ad", "\ufe0f", "\u115f",
    "\u180e", "\u2060\ufeff", "\u202e \u202c", "\u2028\u2029", "\0\x1b", "\u034f",
    "\U000e0100", "\U000e0041\U000e007f", "\U0001d173", "\u2065", "\ufff0", "\uffa0",
    "\u17b4", "\u180b\u180f", "\n" * 1_000,
]  # fmt: skip


async def test_text_that_shows_nothing_is_empty(serve):
    server = await serve(chat.Settings(MESSAGE_BURST=1000))
    ws = await connect(await sign_in(server))
    for text in INVISIBLE:
        error = await send(ws, text, "n1")
        assert (error["type"], error.get("code")) == ("error", "empty"), ascii(text)
    for text in "x", "\u200bx", "😀\ufe0f", "👩\u200d🚀", "\u0301", "\U0010ffff", "–":
        assert (await say(ws, text))["text"] == text


async def test_error_has_the_nonce_wherever_the_event_has_one(serve):
    """Half a surrogate pair in it, too, which comes back as it was sent."""
    server = await serve(chat.Settings())
    ws = await connect(await sign_in(server))
    for nonce in "n1", "", "x" * 65, "\ud800", "é\udfff", "😀":
        for kind in "rubbish", "message":
            await ws.send_json({"type": kind, "nonce": nonce})
            error = await read(ws)
            while error["type"] != "error":
                error = await read(ws)
            assert (error["code"], error["nonce"]) == ("bad_event", nonce)
    for nonce in 17, None, ["x"]:
        await ws.send_json({"type": "message", "text": "x", "nonce": nonce})
        assert "nonce" not in await read(ws, "error")


async def test_unknown_fields_of_an_event_are_ignored(serve):
    ws = await connect(await sign_in(await serve(chat.Settings())))
    event = {"type": "message", "text": "x", "nonce": "n1", "id": 99, "user": "eve"}
    await ws.send_json(event | {"more": ["\ud800"]})
    message = await read(ws, "message")
    assert (message["id"], message["user"]) == (1, "ann") and "more" not in message


async def test_sentence_about_a_message_not_saved_says_what_the_page_does():
    assert "keeps trying" in chat.ERRORS["not_saved"]
    assert "again" not in chat.ERRORS["not_saved"]


async def test_limits_answer_with_an_error_that_names_the_nonce(serve):
    server = await serve(chat.Settings(MAX_MESSAGE_LENGTH=10))
    ws = await connect(await sign_in(server))
    for text, code in ("", "empty"), (" \n\t", "empty"), ("x" * 11, "too_long"):
        await ws.send_json({"type": "message", "text": text, "nonce": "n1"})
        error = await read(ws, "error")
        assert (error["code"], error["nonce"]) == (code, "n1")
    await ws.send_json({"type": "rubbish", "nonce": "n2"})
    assert (await read(ws, "error"))["nonce"] == "n2"
    assert (await say(ws, "😀" * 10))["text"] == "😀" * 10  # characters, not bytes


async def test_longest_message_fits_in_however_it_is_written(serve):
    server = await serve(chat.Settings(MAX_MESSAGE_LENGTH=10_000))
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    for text in "😀" * 10_000, "\0" * 9_999 + "x", "é" * 10_000:
        assert (await say(from_ann, text))["text"] == text
        assert (await read(from_bob, "message"))["text"] == text


async def test_frame_too_big_closes_with_1009(server):
    ann = await sign_in(server)
    ws = await connect(ann)
    await ws.send_str("x" * 20_000)
    assert await closed(ws) == 1009
    assert (await connect(ann)).welcome["user"] == "ann"


class Tokens:
    """The bucket of a connected person, with as many tokens as the test puts in."""

    def __init__(self, server, left):
        self.left, self.taken, self.app = left, 0, server.app

    def of(self, name):
        room = self.app[chat.ROOM]
        (user_id,) = {c.user["_id"] for c in room.connections if c.user["name"] == name}
        room.bucket(user_id).take = self.take
        return self

    def take(self):
        if self.taken == self.left:
            return 0.01
        self.taken += 1
        return 0


async def test_every_frame_costs_its_person_a_token_on_whichever_socket(serve):
    """Also the refused ones, pings and pongs; and coming back refills nothing."""
    server = await serve(chat.Settings())
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_bob, first = await connect(bob), await connect(ann)
    tokens = Tokens(server, left=1000).of("ann")
    for ws in first, await connect(ann):
        await ws.send_str("")
        await ws.send_str("rubbish")
        await ws.send_bytes(b"rubbish")
        await ws.ping(b"x")
        await ws.pong(b"x")
        await send(ws, "x" * 2_000, "n1")
    assert tokens.taken == 12
    await first.close()
    third = await connect(ann)
    await send(third, "hello", "n2")
    await send(from_bob, "hello", "n1")
    assert tokens.taken == 13


async def test_sender_beyond_the_limit_is_not_read_until_there_is_a_token(serve):
    server = await serve(chat.Settings())
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    tokens = Tokens(server, left=3).of("ann")
    (connection,) = (
        c for c in server.app[chat.ROOM].connections if c.user["name"] == "ann"
    )

    async def flood():
        for number in range(4_000):
            await send_only(from_ann, "x" * 900, f"n{number}")

    flooding = asyncio.create_task(flood())
    await until(lambda: not connection.transport.is_reading())
    await say(from_bob, "hello")
    assert tokens.taken == 3
    numbers = [(await read(from_ann, "receipt"))["nonce"] for _ in range(3)]
    assert numbers == ["n0", "n1", "n2"]
    tokens.left = 4_000
    await flooding
    for number in range(3, 4_000):  # nothing has to be sent again
        assert (await read(from_ann, "receipt"))["nonce"] == f"n{number}"


async def test_one_window_too_many_is_refused_before_its_upgrade(serve):
    server = await serve(chat.Settings(CONNECTIONS_PER_PERSON=2))
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    tabs = [await connect(ann) for _ in range(2)]
    with pytest.raises(aiohttp.WSServerHandshakeError, match="429"):
        await ann.ws_connect("/ws")
    response = await ann.get("/ws")
    assert (response.status, response.headers["Retry-After"]) == (429, "5")
    assert "2 windows" in await response.text()
    await connect(bob)  # the limit is per person
    await tabs[0].close()
    await until(lambda: len(server.app[chat.ROOM].connections) == 2)
    await connect(ann)


async def test_handshakes_at_once_cannot_share_the_last_free_place(server):
    ann = await sign_in(server)
    limit = server.app[chat.SETTINGS].CONNECTIONS_PER_PERSON
    assert limit == 20
    attempts = [ann.ws_connect("/ws") for _ in range(limit + 5)]
    results = await asyncio.gather(*attempts, return_exceptions=True)
    refused = [error for error in results if isinstance(error, Exception)]
    assert [error.status for error in refused] == 5 * [429]
    assert len(server.app[chat.ROOM].connections) == limit


async def test_heartbeat_tells_every_reader_the_newest_number(serve, monkeypatch):
    assert chat.HEARTBEAT == 20
    monkeypatch.setattr(chat, "HEARTBEAT", 0.05)
    server = await serve(chat.Settings())
    sockets = [await connect(await sign_in(server, name)) for name in ("ann", "bob")]
    for ws in sockets:
        assert await read(ws, "heartbeat") == {"type": "heartbeat", "last": 0}
    await say(sockets[0], "hello")
    for ws in sockets:
        while (event := await read(ws, "heartbeat"))["last"] == 0:
            pass
        assert event["last"] == 1


def test_person_is_online_while_any_process_has_the_name(monkeypatch):
    now, online = 1_000.0, chat.Online()
    monkeypatch.setattr(time, "monotonic", lambda: now)

    def told(**processes):
        online.processes = {name: set(names) for name, names in processes.items()}
        return [(event["type"], event["user"]) for event in online.changes()]

    assert told(a=["ann", "bob"]) == [("joined", "ann"), ("joined", "bob")]
    assert told(a=["ann"], b=["bob"]) == []  # moved to another process
    assert told(a=["ann", "bob"], b=["bob"]) == []
    assert told(a=["ann"]) == told() == []  # a restart, a reload, an outage
    now += chat.GRACE - 0.1
    assert told(a=["bob"], b=["eve"]) == [("joined", "eve")]
    now += 0.1
    assert told(b=["eve"]) == [("left", "ann")]  # bob came back in between
    now += chat.GRACE
    assert told(b=["eve"]) == [("left", "bob")]
    assert told(a=["ann"]) == [("joined", "ann")]


@pytest.fixture
def short_grace(monkeypatch):
    """Shorten the grace, for tests in which users do not come back."""
    monkeypatch.setattr(chat, "GRACE", 0.5)
    monkeypatch.setattr(chat, "PAUSE", 0.1)


async def test_people_see_each_other_come_and_go(short_grace, server):
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann = await connect(ann)
    assert from_ann.welcome["online"] == ["ann"]
    assert await read(from_ann) == {"type": "joined", "user": "ann"}
    from_bob = await connect(bob)
    assert from_bob.welcome["online"] == ["ann", "bob"]
    assert await read(from_ann) == {"type": "joined", "user": "bob"}
    await from_bob.close()
    assert await read(from_ann) == {"type": "left", "user": "bob"}


async def test_several_tabs_of_a_person_come_once_and_leave_once(short_grace, server):
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann = await connect(ann)
    assert (await read(from_ann))["user"] == "ann"
    tabs = [await connect(bob) for _ in range(3)]
    assert tabs[2].welcome["online"] == ["ann", "bob"]
    for tab in tabs[:2]:
        await tab.close()
    await asyncio.sleep(3 * chat.GRACE)
    await say(tabs[2], "still here")
    await tabs[2].close()
    events = [await read(from_ann) for _ in range(3)]
    assert [event["type"] for event in events] == ["joined", "message", "left"]
    assert events[2] == {"type": "left", "user": "bob"}


async def test_reload_is_not_announced_as_a_departure(server):
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    for _ in range(3):
        await from_bob.close()
        from_bob = await connect(bob)
    await asyncio.sleep(chat.GRACE + 1)
    await say(from_bob, "here again")
    events = [await read(from_ann) for _ in range(3)]
    assert [event["type"] for event in events] == ["joined", "joined", "message"]


async def test_two_tabs_see_each_message_once(server):
    ann = await sign_in(server)
    tabs = [await connect(ann) for _ in range(2)]
    for number in range(1, 6):
        assert (await say(tabs[0], f"{number}"))["id"] == number
    assert [(await read(tabs[1], "message"))["id"] for _ in range(5)] == [1, 2, 3, 4, 5]


async def stall(server, session, path="/ws"):
    """Open a WebSocket that never reads, with as little room as the kernel allows."""
    (cookie,) = session.cookie_jar
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.connect(("127.0.0.1", server.port))
    request = (
        f"GET {path} HTTP/1.1\r\nHost: localhost\r\n"
        "Upgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + 22 * "x" + "==\r\n"
        f"Cookie: {cookie.key}={cookie.value}\r\n\r\n"
    )
    sock.send(request.encode())
    return sock


async def test_reader_that_stops_reading_delays_nobody_and_is_cut_off(serve):
    settings = chat.Settings(MAX_MESSAGE_LENGTH=10_000, MAX_UNSENT_BYTES=100_000)
    server = await serve(settings)
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "eve"}
    from_ann = await connect(await sign_in(server, "ann"))
    with await stall(server, (await sign_in(server, "bob")).session) as stalled:
        assert (await read(from_ann, "joined"))["user"] == "ann"
        assert (await read(from_ann, "joined"))["user"] == "bob"
        for number in range(1, 1001):  # 40 MB, far beyond what the kernel holds
            await room.post(user, "😀" * 10_000, f"{number}")
            assert (await read(from_ann, "message"))["id"] == number
            for connection in room.connections:
                size = connection.transport.get_write_buffer_size()
                assert size < settings.MAX_UNSENT_BYTES + 100_000
            if len(room.connections) == 1:
                break
        assert len(room.connections) == 1
        assert await read(from_ann, "left") == {"type": "left", "user": "bob"}
        stalled.setblocking(False)


async def test_reader_that_stops_during_the_replay_delays_nobody(serve):
    server = await serve(chat.Settings(MAX_MESSAGE_LENGTH=10_000))
    ann, bob = await sign_in(server, "ann"), await sign_in(server, "bob")
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "eve"}
    for number in range(300):
        await room.post(user, "😀" * 10_000, f"{number}")
    await until(lambda: room.history.last_broadcast == 300)
    with await stall(server, bob.session, "/ws?after=0"):
        await until(lambda: len(room.connections) == 1)
        ws = await connect(ann, after=0)
        assert len(ws.replayed) == 300
        assert (await say(ws, "next"))["id"] == 301
        assert len(room.connections) == 2


async def test_reader_that_is_gone_in_the_middle_of_its_replay_is_no_error(
    serve, caplog
):
    server = await serve(chat.Settings(MAX_MESSAGE_LENGTH=10_000))
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "eve"}
    for number in range(300):
        await room.post(user, "😀" * 10_000, f"{number}")
    await until(lambda: room.history.last_broadcast == 300)
    bob = await sign_in(server, "bob")
    with await stall(server, bob.session, "/ws?after=0") as reader:
        await until(lambda: stalled_bytes(room) > 10_000)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await until(lambda: not room.connections)
    assert caplog.text == ""


def stalled_bytes(room):
    return sum(c.transport.get_write_buffer_size() for c in room.connections)


def test_frame_is_what_the_protocol_says():
    for length in 1, 40, 50, 60, 1000, 30_000, 70_000:
        event = {"type": "x", "text": "é" * length}
        frame = chat.encode_frame(event)
        payload = json.dumps(event, ensure_ascii=False).encode()
        if len(payload) < 126:
            assert frame == bytes((0x81, len(payload))) + payload
        elif len(payload) < 1 << 16:
            assert frame == b"\x81\x7e" + struct.pack("!H", len(payload)) + payload
        else:
            assert frame == b"\x81\x7f" + struct.pack("!Q", len(payload)) + payload


async def test_frames_that_fall_due_together_leave_in_one_write(serve, monkeypatch):
    server = await serve(chat.Settings())
    ws = await connect(await sign_in(server))
    await read(ws, "joined")
    room = server.app[chat.ROOM]
    (connection,) = room.connections
    writes, write = [], connection.transport.write
    monkeypatch.setattr(
        connection, "transport", Recorder(connection.transport, writes, write)
    )
    user = {"_id": ObjectId(), "name": "eve"}
    await asyncio.gather(*(room.post(user, "x", f"{n}") for n in range(8)))
    assert [(await read(ws, "message"))["id"] for _ in range(8)] == list(range(1, 9))
    assert len(writes) < 8


async def test_crowd_that_joins_hears_nothing_twice(serve):
    """A frame that waits for the flush has been replayed to newcomers already."""
    server = await serve(chat.Settings())
    ws = await connect(await sign_in(server))
    await read(ws, "joined")
    room, user = server.app[chat.ROOM], {"_id": ObjectId(), "name": "eve"}
    room.broadcast({"type": "left", "user": "before"})
    crowd = [chat.Connection(Nobody(), Nobody(), user) for _ in range(5)]
    for connection in crowd:
        room.register(connection)
        room.join(connection)
    room.broadcast({"type": "left", "user": "after"})
    assert [(await read(ws, "left"))["user"] for _ in range(2)] == ["before", "after"]
    for connection in crowd:
        welcome, heard = connection.transport.heard
        assert b"welcome" in welcome and b"after" in heard
        assert b"before" not in welcome + heard
        room.leave(connection)


class Nobody:
    """A WebSocket and its transport, without another side."""

    closed = False

    def __init__(self):
        self.heard = []
        self.write = self.heard.append

    def is_closing(self):
        return False

    def get_write_buffer_size(self):
        return 0


class Recorder:
    """A transport that notes what is written to it."""

    def __init__(self, transport, writes, write):
        self.transport, self.writes, self.real_write = transport, writes, write

    def __getattr__(self, name):
        return getattr(self.transport, name)

    def write(self, data):
        self.writes.append(data)
        self.real_write(data)


async def test_connection_that_is_closing_gets_nothing_after_the_close_frame(serve):
    server = await serve(chat.Settings())
    ann = await sign_in(server)
    room, ws = server.app[chat.ROOM], await connect(ann)
    (mine,) = room.connections
    other = await connect(ann)
    code = asyncio.create_task(closed(ws))
    closing = asyncio.create_task(mine.ws.close(code=1001, drain=False))
    await asyncio.sleep(0)  # the close frame is out, the connection still in the room
    writes = []
    mine.transport = Recorder(mine.transport, writes, mine.transport.write)
    room.broadcast({"type": "left", "user": "nobody"})
    room.flush()
    assert writes == []
    assert mine in room.connections
    assert await read(other, "left") == {"type": "left", "user": "nobody"}
    assert await code == 1001
    await closing


async def test_presence_that_was_lost_or_overwritten_is_written_again(
    serve, mongodb, monkeypatch
):
    """Before the other process announces that Ann has left."""
    monkeypatch.setattr(chat, "GRACE", 30)  # as long as a busy machine takes
    settings = on(mongodb)
    one, other = await serve(settings), await serve(settings)
    ann, bob = await sign_in(one, "ann"), await sign_in(other, "bob")
    from_ann, from_bob = await connect(ann), await connect(bob)
    both = {(await read(from_bob, "joined"))["user"] for _ in "12"}
    assert both == {"ann", "bob"}
    processes = one.app[chat.DATABASE].processes
    for harm in (
        lambda: processes.delete_one({"names": "ann"}),
        lambda: processes.update_one({"names": "ann"}, {"$set": {"names": []}}),
    ):
        await harm()
        await until(lambda: processes.find_one({"names": "ann"}))
    await until(lambda: not other.app[chat.ROOM].online.missing)
    await say(from_ann, "still here")
    assert (await read(from_bob))["type"] == "message"


async def test_presence_that_could_not_be_written_is_written_later(
    serve, mongodb, monkeypatch, caplog
):
    server = await serve(on(mongodb))
    write, failures = chat.Presence.write, iter([TimeoutError, TimeoutError])

    async def fail_at_first(*arguments):
        for error in failures:
            raise error
        await write(*arguments)

    monkeypatch.setattr(chat.Presence, "write", fail_at_first)
    await connect(await sign_in(server))
    processes = server.app[chat.DATABASE].processes
    await until(lambda: processes.find_one({"names": "ann"}))
    assert caplog.messages == ["Presence could not be written: TimeoutError"]


async def test_catching_up_announces_departures_and_arrivals(short_grace, serve):
    """As after a stream that was broken while people came and went."""
    server = await serve(chat.Settings())
    ws = await connect(await sign_in(server))
    assert await read(ws, "joined") == {"type": "joined", "user": "ann"}
    room, db = server.app[chat.ROOM], server.app[chat.DATABASE]
    room.online.processes[ObjectId()] = {"bob"}
    assert await read(ws) == {"type": "joined", "user": "bob"}
    await db.processes.insert_one({"_id": ObjectId(), "names": ["eve"]})
    db.queue.put_nowait(chat.StreamBroken("as after an outage"))
    assert await read(ws) == {"type": "joined", "user": "eve"}
    assert await read(ws) == {"type": "left", "user": "bob"}


async def test_joining_while_the_database_is_away_is_announced_later(
    standalone, serve, monkeypatch
):
    monkeypatch.setattr(chat, "RENEWAL", 0.5)
    server = await serve(on(standalone.uri))
    from_ann = await connect(await sign_in(server, "ann"))
    await read(from_ann, "joined")
    bob = await sign_in(server, "bob")
    real_get = chat.User.get

    async def get_then_lose_the_database(self, user_id):
        user = await real_get(self, user_id)
        standalone.freeze()
        return user

    monkeypatch.setattr(chat.User, "get", get_then_lose_the_database)
    from_bob = await connect(bob)
    assert from_bob.welcome["online"] == ["ann", "bob"]
    await asyncio.sleep(chat.DEADLINE + 1)
    standalone.thaw()
    assert await read(from_ann, "joined") == {"type": "joined", "user": "bob"}
    await from_bob.close()
    assert await read(from_ann, "left") == {"type": "left", "user": "bob"}


async def test_departure_while_the_database_is_away_is_told_later(
    short_grace, standalone, serve
):
    server = await serve(on(standalone.uri))
    from_ann = await connect(await sign_in(server, "ann"))
    from_bob = await connect(await sign_in(server, "bob"))
    while await read(from_ann, "joined") != {"type": "joined", "user": "bob"}:
        pass
    standalone.freeze()
    await from_bob.close()
    await asyncio.sleep(chat.GRACE + chat.DEADLINE + 1)
    standalone.thaw()
    assert await read(from_ann, "left") == {"type": "left", "user": "bob"}


async def test_peer_that_is_gone_in_the_middle_of_an_answer_is_no_error(serve, caplog):
    server = await serve(chat.Settings())
    with await stall(server, (await sign_in(server)).session) as peer:
        await until(lambda: server.app[chat.ROOM].connections)
        peer.send(500 * b"\x81\x81\0\0\0\0x")  # each gets an answer
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await until(lambda: not server.app[chat.ROOM].connections)
    assert caplog.text == ""


async def test_why_a_handshake_fails_is_told_to_a_plain_get(standalone, serve):
    """No session, too many windows, no database; with a 400, all of that is well."""
    server = await serve(on(standalone.uri, CONNECTIONS_PER_PERSON=1))
    visitor, ann = await server.visitor(), await sign_in(server)
    response = await visitor.get("/ws", allow_redirects=False)
    assert (response.status, response.headers["Location"]) == (303, "/login")
    assert (await ann.get("/ws")).status == 400
    half = {"Upgrade": "websocket", "Connection": "Upgrade"}
    assert (await ann.get("/ws", headers=half)).status == 400
    ws = await connect(ann)
    assert (await ann.get("/ws")).status == 429
    await ws.close()
    standalone.freeze()
    response = await ann.get("/ws")
    assert response.status == 503 and "does not answer" in await response.text()


# ==============================================================================
# 6. Routes and static
# ==============================================================================
def test_routes_have_the_names_of_the_article():
    app = chat.init_app(chat.Settings())
    assert {route.name for route in app.router.routes()} == {
        "main", "chat", "login", "signin", "signout", "static"
    }  # fmt: skip
    paths = {name: app.router[name].canonical for name in ("main", "chat", "signout")}
    assert paths == {"main": "/", "chat": "/ws", "signout": "/signout"}


@pytest.mark.parametrize(
    "header",
    [
        b"Host:",
        b"Cookie: AIOHTTP_SESSION",
        b"Cookie: =;;=\xff; \x01",
        b"X-Forwarded-Host: \xff\xfe",
        b"Origin: \xff\xfe",
        b"X: " + b"y" * 9_000,
        b"Accept-Encoding: \xff",
        b"Upgrade: rubbish",
        b"Expect: rubbish",
        b"Content-Length: -1",
        b"Transfer-Encoding: rubbish",
        b"\xff: x",
    ],
)
async def test_odd_header_never_breaks_the_server(serve, caplog, header):
    server = await serve(chat.Settings())
    for line in b"GET /login", b"GET /", b"POST /login", b"GET /ws":
        answer = await raw_request(server, line, header)
        assert re.match(rb"HTTP/1.[01] [1234]", answer), answer[:200]
    assert (await (await server.visitor()).get("/login")).status == 200
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


def test_task_that_fails_is_logged_and_ends_the_process(start, tmp_path):
    """The host starts it again; otherwise the room would stay silent."""
    script = tmp_path / "broken.py"
    fault = "chat.HEARTBEAT, chat.Room.broadcast = 1, None"
    script.write_text(f"import chat\n{fault}\nchat.main()\n")
    code, output, errors = start(script).end()
    assert code == 1 and "CTRL+C" in output
    assert errors.count("A background task failed") == 1
    assert "in keep_alive" in errors and "TypeError" in errors


@pytest.mark.parametrize("name", ["follow", "keep_presence", "keep_alive"])
async def test_every_background_task_is_watched(serve, monkeypatch, caplog, name):
    async def fail(*_):
        raise KeyError("a fault of ours")

    server, codes = await serve(chat.Settings()), []
    place = chat.Follower if name == "follow" else chat
    monkeypatch.setattr(place, name, fail)
    app = chat.init_app(chat.Settings())
    app[chat.STOP] = codes.append
    if name == "follow":
        monkeypatch.setattr(chat, "DEADLINE", 0.1)
    with contextlib.suppress(chat.CannotStart):
        async with Server(app):
            await until(lambda: codes)
    assert codes == [1] and "KeyError: 'a fault of ours'" in caplog.text
    assert not server.closed


async def test_index_that_cannot_be_created_again_is_told_and_the_room_goes_on(
    serve, mongodb, caplog
):
    """As after a restore that holds two users of one name."""
    server = await serve(on(mongodb))
    ws = await connect(await sign_in(server))
    with pymongo.MongoClient(mongodb) as client:
        db = client[server.app[chat.SETTINGS].MONGO_DB_NAME]
        db.users.drop_index("unique name_key")
        db.users.insert_many([{"name_key": "twin"}, {"name_key": "twin"}])
        db.drop_collection("processes")  # which breaks the stream
    await until(lambda: "An index could not be created: " in caplog.text)
    assert "duplicate key" in caplog.text
    assert (await say(ws, "still here"))["text"] == "still here"


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


def test_chat_raises_its_limit_of_open_files(tmp_path):
    code = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (64, 2_000)); import chat;"
    )
    code += "chat.raise_descriptor_limit(); print(r.getrlimit(r.RLIMIT_NOFILE))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "(2000, 2000)\n"


def test_connections_beyond_the_limit_of_open_files_are_one_line(start, tmp_path):
    """With asyncio's own loop: uvloop closes them and logs nothing."""
    script = tmp_path / "limited.py"
    limit = "import asyncio, resource as r\nr.setrlimit(r.RLIMIT_NOFILE, (64, 64))\n"
    loop = "chat.new_event_loop = asyncio.new_event_loop\n"
    script.write_text(f"{limit}import chat\n{loop}chat.main()\n")
    process = start(script).wait_until_ready()
    address = "127.0.0.1", process.port
    with contextlib.ExitStack() as crowd:
        for _ in range(100):
            crowd.enter_context(socket.create_connection(address))
        time.sleep(1)
    with urllib.request.urlopen(process.url + "/login", timeout=10) as response:
        assert response.status == 200
    code, _, errors = process.stop()
    assert (code, errors.count("\n")) == (0, 1), errors[:2_000]
    assert "out of system resource" in errors


def test_chat_for_a_whole_room_prints_the_address_that_others_can_type(start):
    process = start(HOST="0.0.0.0").wait_until_ready()
    process.lines.append(process.process.stdout.readline())
    url = re.search(r"From other machines: (http://(\S+):\d+)\n", process.lines[-1])
    assert url[2] != "0.0.0.0"
    with urllib.request.urlopen(url[1] + "/login") as response:
        assert response.status == 200
    assert process.stop()[::2] == (0, "")


def test_machine_without_a_network_prints_no_address_for_others(monkeypatch, capsys):
    class NoNetwork(socket.socket):
        def connect(self, address):
            raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "socket", NoNetwork)
    chat.print_addresses("Running on http://0.0.0.0:8080")
    assert capsys.readouterr().out == "Running on http://0.0.0.0:8080\n"


def test_chat_for_this_machine_prints_no_address_for_others(capsys):
    chat.print_addresses("Running on http://127.0.0.1:8080")
    assert "other machines" not in capsys.readouterr().out


async def test_debug_log_has_no_password_hash_and_no_email(start, mongodb):
    environment = {"MONGO_HOST": mongodb, "MONGO_DB_NAME": f"test-{ObjectId()}"}
    environment |= {"SECRET_KEY": "x", "DEBUG": "true", "PYTHONWARNINGS": "default"}
    process = start(**environment).wait_until_ready()
    async with aiohttp.ClientSession(process.url) as visitor:
        data = form("ann", email="ann@example.org")
        for path in "/signin", "/signin", "/login":
            await visitor.post(path, data=data)
    code, _, errors = await asyncio.to_thread(process.stop)
    assert code == 0 and "POST /signin" in errors
    assert "argon2" not in errors and "ann@" not in errors and PASSWORD not in errors


@pytest.mark.parametrize("installed", [True, False])
def test_uvloop_is_taken_where_it_is_installed(start, tmp_path, installed):
    """A module of this name stands in for it, or for its absence."""
    loop = "from asyncio import new_event_loop; print('uvloop')"
    code = loop if installed else "raise ImportError('not installed')"
    (tmp_path / "uvloop.py").write_text(code)
    process = start(PYTHONPATH=str(tmp_path)).wait_until_ready()
    code, output, errors = process.stop()
    assert (code, errors, "uvloop" in output) == (0, "", installed)


def test_debug_shows_every_request(start):
    process = start(DEBUG="true", PYTHONWARNINGS="default").wait_until_ready()
    with urllib.request.urlopen(process.url + "/login") as response:
        assert response.status == 200
    code, _, errors = process.stop()
    assert code == 0 and '"GET /login HTTP/1.1" 200' in errors


URIS = {
    "mongodb://ann:s3cret@127.0.0.1:{port}/": "cannot be used: ",
    "mongodb://ann:s3cret@127.0.0.1:{port}/?replicaSet=rs0": "cannot be used: ",
    "mongodb+srv://ann:s3cret@nowhere.invalid/": "cannot be used: ",
    "mongodb://ann:s3c@ret@127.0.0.1:{port}/": "must be a MongoDB URI",
    "mongodb://ann:s3c/ret@127.0.0.1:{port}/": "must be a MongoDB URI",
    "http://ann:s3cret@127.0.0.1/": "must be a MongoDB URI",
    "mongodb://": "must be a MongoDB URI",
    "s3cret:": "must be a MongoDB URI",
    "nowhere.invalid": "cannot be used: ",
}


async def test_database_that_cannot_be_reached_is_named_without_its_password():
    async def why(uri):
        with pytest.raises(chat.CannotStart) as caught:
            await chat.open_database(on(uri.format(port=unused_port())))
        return str(caught.value)

    sentences = await asyncio.gather(*map(why, URIS))
    for uri, sentence in zip(URIS, sentences, strict=True):
        assert sentence.startswith("MONGO_HOST '") and URIS[uri] in sentence
        assert "s3c" not in sentence or uri == "s3cret:"
        assert "\n" not in sentence


def test_database_that_refuses_or_never_answers_is_one_line_and_exit_code_2(start):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ports = unused_port(), silent.getsockname()[1]
        uris = [f"mongodb://ann:s3cret@127.0.0.1:{port}/" for port in ports]
        for process in [start(MONGO_HOST=uri, SECRET_KEY="x") for uri in uris]:
            code, _, errors = process.end()
            assert (code, errors.count("\n")) == (2, 1), errors
            assert errors.startswith("chat: MONGO_HOST ") and "s3cret" not in errors


def test_port_in_use_is_one_line(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, _, errors = start(PORT=port).end()
    assert (code, errors.count("\n")) == (2, 1), errors
    assert port in errors and "free port" in errors


@pytest.mark.parametrize("host", ["no.such.host.invalid", "1.2.3.4", "a..b", "x" * 70])
def test_host_that_is_not_ours_is_one_line(start, host):
    code, _, errors = start(HOST=host).end()
    assert (code, errors.count("\n")) == (2, 1), errors
    assert host in errors


def test_standalone_mongodb_is_said_in_one_line(start, standalone):
    process = start(MONGO_HOST=standalone.uri, SECRET_KEY="x").wait_until_ready()
    code, output, errors = process.stop()
    assert (code, errors) == (0, "") and "run one process only" in output


@pytest.fixture
def sqlite_server(tmp_path):
    """The URI of the server that the README names for machines without MongoDB."""
    command = shutil.which("nx-27017", path=Path(sys.executable).parent)
    need(command, "no nx-27017: pip install -r .ci/requirements.txt")
    port = unused_port()
    process = subprocess.Popen(
        [command, "--db", tmp_path / "chat.db", "--pid-file", tmp_path / "pid"]
        + ["--log-file", tmp_path / "log", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: can_connect(port))
        yield f"mongodb://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def test_accounts_messages_and_sessions_outlive_the_chat_on_the_readmes_server(
    serve, sqlite_server
):
    """Accounts, messages and sessions outlive the chat; only changes do not come."""
    settings = on(sqlite_server)
    server = await serve(settings)
    ann = await sign_in(server)
    receipt = await say(await connect(ann), "hello", nonce="n-1")
    response = await ann.post("/signin", data=form("ANN") | OTHER)
    assert (response.status, "has this already" in await response.text()) == (422, True)
    await server.close()
    again = await (await serve(settings)).visitor()
    again.session.cookie_jar.update_cookies(
        {cookie.key: cookie.value for cookie in ann.session.cookie_jar},
        again.make_url("/"),
    )
    ws = await connect(again, after=0)
    assert [event["text"] for event in ws.replayed] == ["hello"]
    assert (await send(ws, "hello", "n-1"))["id"] == receipt["id"]


async def test_every_socket_is_closed_with_1001_and_then_the_database(serve, settings):
    server = await serve(settings)
    sockets = [await connect(await sign_in(server, name)) for name in ("ann", "bob")]
    codes = asyncio.gather(*map(closed, sockets))
    await asyncio.sleep(0)
    await server.close()
    assert await codes == [1001, 1001]


async def test_a_thousand_sockets_close_at_once(start):
    process = start(CONNECTIONS_PER_PERSON="1000").wait_until_ready()
    connector = aiohttp.TCPConnector(limit=0)
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(
        process.url, connector=connector, cookie_jar=jar
    ) as session:
        await session.post("/signin", data=form("ann"))
        sockets = [await session.ws_connect("/ws") for _ in range(1000)]
        codes = [asyncio.create_task(closed(ws)) for ws in sockets]
        process.process.send_signal(signal.SIGINT)
        assert set(await asyncio.gather(*codes)) == {1001}
        code, _, errors = await asyncio.to_thread(process.end)
    assert (code, errors) == (0, "")


async def test_reader_that_has_stalled_does_not_hold_the_exit(start):
    limits = {"MESSAGES_PER_SECOND": "1000", "MESSAGE_BURST": "1000"}
    limits |= {"MAX_MESSAGE_LENGTH": "10000", "MAX_UNSENT_BYTES": str(1 << 30)}
    process = start(**limits).wait_until_ready()
    jar = aiohttp.CookieJar(unsafe=True)
    async with aiohttp.ClientSession(process.url, cookie_jar=jar) as session:
        await session.post("/signin", data=form("ann"))
        ws = await session.ws_connect("/ws")
        with await stall(process, session):
            for _ in range(400):  # 16 MB: the kernel holds about 4 of them
                await say(ws, "😀" * 10_000)
            process.process.send_signal(signal.SIGINT)
            assert await closed(ws) == 1001
            code, _, errors = await asyncio.to_thread(process.end, 8)
    assert (code, errors) == (0, "")
