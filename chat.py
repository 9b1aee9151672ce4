"""A chat that loses no message, in one file to read from top to bottom.

    pip install -r requirements.txt
    python chat.py

A 2016 article (https://habr.com/ru/post/300942/) built a chat to show what aiohttp can
do. This is that chat today. Four rules let it lose nothing:

1. A process inserts number n + 1 only after it knows that n is stored. So numbers have
   no gaps (except foreign documents), and their order is the order of the stream.
   Kept by `post`, `save`, `apply` and `History.remember`.
2. A message is broadcast only when the database gives it back, in the stream or in a
   read. So you never see what is not stored.
   Kept by `follow`, `catch_up`, `apply` and `broadcast`.
3. If no receipt comes, the client sends the same nonce again. A unique index on user
   and nonce lets the database store it once. (In memory, `History.receipts` does, for
   the newest 1,000.) Kept by `WebSocket.answer`, `post` and `save`.
4. A client that reconnects says the last number it has. The server replays what it
   missed, of the newest 1,000. A client that counts can detect any gap.
   Kept by `WebSocket.replay` and `WebSocket.join`.

One message, from key to screen:

 browser            process A             MongoDB             process B    browser
   │ message, nonce ──▶ │ insert number n+1 ──▶ │                   │           │
   │ ◀──── receipt, n+1 │ ◀──────────────────── │                   │           │
   │                    │ ◀────── change ────── │ ───── change ───▶ │           │
   │ ◀──── message, n+1 │ broadcast             │         broadcast │ ────────▶ │

The file keeps the article's sections, in order. Additions are marked "Beyond the
article". Within a section, the code follows a message. The small print of a section
stands at its end, under "Details: skip at first".

1. Settings      2. Middlewares      3. Database and models      4. Views
5. WebSocket     6. Routes and static      7. Startup and shutdown

A run starts in section 7: `main` reads the settings, and `run` serves. Before the first
request, `run_room` connects to the database and starts three tasks that last as long as
the process: `follow`, `keep_presence` and `keep_alive`.

These words have one meaning throughout:

    app         the web application; it holds what its parts share, under typed keys
    db          the Database: MongoDB, or a stand-in in memory
    user        a registered user's document; a request keeps only `_id` and `name`
    message     what a user said: a number, a name, a text, a time
    event       a JSON object on a WebSocket; its `type` says what it is
    socket      one open WebSocket of a user; a user with three tabs has three
    room        the sockets of this process, and what they share
    change      a notification: a document was written or deleted
    stream      the changes that a room asks for, in the order of the writes
    history     the newest messages, as this process has read or heard them
    nonce       a client's random text for one message, by which a retry is recognized
    receipt     the answer to a message: it is stored, under this number
    presence    which users are online, at all processes
    foreign     a document in our collections that another program wrote
"""

# `uv run chat.py` and `pipx run chat.py` install these first (PEP 723):
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "aiohttp>=3.14,<4",
#   "aiohttp-jinja2>=1.6",
#   "aiohttp-session>=2.12",
#   "aiolimiter>=1.2",
#   "cryptography>=47",
#   "jinja2>=3.1",
#   "mongomock-motor>=0.0.36",
#   "motor>=3.7",
#   "precis-i18n>=1.1",
#   "pydantic-settings>=2.7",
# ]
# ///

import asyncio
import functools
import hashlib
import ipaddress
import json
import logging
import re
import secrets
import sys
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp_jinja2
import jinja2
import pymongo
from aiohttp import WSCloseCode, WSMsgType, http, web
from aiohttp_session import get_session, new_session, session_middleware
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from aiolimiter import AsyncLimiter
from bson import ObjectId
from bson.errors import InvalidId
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from mongomock_motor import AsyncMongoMockClient
from motor.motor_asyncio import AsyncIOMotorClient
from precis_i18n import get_profile
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError
from yarl import URL

HERE = Path(__file__).parent
log = logging.getLogger("chat")


# ------------------------------------------------------------------------------
# 1. Settings
#
# Settings come from the environment, or from a file `.env` beside this one. Every one
# has a default, so `python chat.py` works without any. Beyond the article: each is
# checked at startup, while you are still watching the console.
# ------------------------------------------------------------------------------
class Settings(BaseSettings):
    """All settings; `.env.example` explains each.

    Raises ValidationError, which lists all wrong values at once.
    """

    # Editors on Windows may add a byte order mark (utf-8-sig). `main` warns of renamed
    # settings in `.env` (extra). Defaults are validated, too: SECRET_KEY is needed with
    # MONGO_HOST. Errors hide the input: a URI may hold a password.
    model_config = SettingsConfigDict(
        env_file=HERE / ".env", env_file_encoding="utf-8-sig", case_sensitive=True,
        extra="allow", validate_default=True, hide_input_in_errors=True,
    )  # fmt: skip
    LOG_REQUESTS: bool = False
    SITE_HOST: str = Field("127.0.0.1", min_length=1)  # empty would mean every address
    PORT: int = Field(8080, ge=0, le=65_535)
    ORIGIN: str = ""
    MONGO_HOST: str = ""
    MONGO_DB_NAME: str = Field("chat", pattern=r"^[A-Za-z0-9_-]{1,38}$")
    SECRET_KEY: str = ""
    MAX_MESSAGE_LENGTH: int = Field(1_000, ge=1, le=10_000)  # characters
    MESSAGES_PER_SECOND: int = Field(5, ge=1, le=1_000_000)  # per user and process
    MESSAGE_BURST: int = Field(20, ge=1, le=1_000_000)  # at once
    CONNECTIONS_PER_PERSON: int = Field(20, ge=1, le=1_000_000)
    LOGIN_ATTEMPTS: int = Field(10, ge=1, le=1_000_000)  # per minute and login
    MAX_UNSENT_BYTES: int = Field(262_144, ge=1_024, le=1 << 30)  # per connection

    @field_validator("ORIGIN")
    def as_browsers_send_it(cls, origin: str) -> str:
        """Normalize: browsers send lower case, no default port, and no path."""
        url = URL(origin)
        if origin and (url.scheme not in {"http", "https"} or url.path_qs != "/"):
            raise ValueError("must be like https://chat.example, without a path")
        return str(url.origin()) if origin else ""

    @field_validator("SECRET_KEY")
    def hard_to_guess(cls, key: str, info) -> str:
        # `info.data` has the fields above this one: MONGO_HOST must stand there.
        if len(key) < 32 and (key or info.data.get("MONGO_HOST")):
            raise ValueError(f"must have 32 characters or more; make one: {MAKE_KEY}")
        return key


MAKE_KEY = 'python -c "import secrets; print(secrets.token_hex())"'


class CannotStart(Exception):
    """The chat cannot start; the text says why, in one line."""


# `app[KEY]` holds what the application shares; `request[KEY]`, what one request needs.
SETTINGS = web.AppKey("settings", Settings)
ROOM = web.AppKey("room", "Room")
DB = web.RequestKey("db", "Database")
USER = web.RequestKey("user", dict)


# ------------------------------------------------------------------------------
# 2. Middlewares
#
# A middleware wraps every handler. `init_app` lists them, outermost first. In aiohttp,
# errors and redirects are raised as exceptions. Beyond the article: `own_origin`. A
# browser sends our cookie with every request to us, even if another site's page makes
# it. So the cookie shows whose browser it is, not which site made the request.
# ------------------------------------------------------------------------------
PUBLIC = {"login", "signin", "static", None}  # None: an unknown URL, a 404


@web.middleware
async def own_origin(request: web.Request, handler) -> web.StreamResponse:
    """Reject another site's pages (403) and, if ORIGIN is unset, other hosts (421).

    Otherwise another site's page could post our forms with the visitor's cookie (CSRF),
    or read our WebSocket, which the same-origin policy does not cover. Browsers send
    Origin with both. A client without Origin is no browser: it has no victim's cookie.
    """
    # Let others run first: a client may send 1,500 requests at once, and aiohttp starts
    # each without yielding to the event loop. All messages would wait for them.
    await asyncio.sleep(0)
    own, origin = request.app[SETTINGS].ORIGIN, request.headers.get("Origin")
    if not own:
        # DNS rebinding: an attacker can point their own name at 127.0.0.1, and then
        # their page has our origin. They cannot redirect `localhost` or an IP address.
        own, origin = request.host, origin and origin.partition("://")[2]
        if not LOCAL.fullmatch(own):
            log.warning("Host %r is not a local address; set ORIGIN", own)
            raise web.HTTPMisdirectedRequest(text="To use this address, set ORIGIN.")
    is_socket = request.match_info.route.name == "chat"
    if (request.method == "POST" or is_socket) and origin not in {None, own}:
        log.warning("Origin %r is not %r; see the setting ORIGIN", origin, own)
        text = f"This came from {origin!r}, but the chat is at {own}. Please go there."
        raise web.HTTPForbidden(text=text)
    return await handler(request)


@web.middleware
async def db_handler(request: web.Request, handler) -> web.StreamResponse:
    """Give the request its database, and turn an outage into a 503."""
    request[DB] = request.app[ROOM].db
    try:
        return await handler(request)
    except DATABASE_ERRORS as error:
        log.warning("The database failed for %s: %s", request.path, reason(error))
        text, headers = "The database does not answer. Try again.", {"Retry-After": "5"}
        raise web.HTTPServiceUnavailable(text=text, headers=headers) from None


@web.middleware
async def authorize(request: web.Request, handler) -> web.StreamResponse:
    """Admit requests with a valid session; send the others to the login.

    Routes, not path prefixes, decide which pages are public: a new page is private
    until you list it. An unknown URL is a 404 for everyone.
    """
    name = request.match_info.route.name
    if name not in {"static", None}:
        request[USER] = await session_user(request)
    if name in PUBLIC or request[USER]:
        return await handler(request)
    if name == "chat":  # a script asks; by this header it knows our 401 from a proxy's
        raise web.HTTPUnauthorized(headers={"WWW-Authenticate": 'Cookie realm="chat"'})
    login, referer = path_for(request, "login"), request.headers.get("Referer", "")
    if referer.partition("?")[0].endswith((login, path_for(request, "signin"))):
        login += "?why=cookie"  # just signed in: the browser kept no cookie
    raise web.HTTPSeeOther(login)


async def session_user(request: web.Request) -> dict | None:
    """Return the session's user, or None.

    Look the user up on every request, so that a deleted account's cookie is worthless.
    Treat an unreadable cookie as none: a client may send any bytes.
    """
    try:
        user_id = ObjectId(str((await get_session(request)).get("user")))
    except (ValueError, TypeError, InvalidId):
        return None
    async with asyncio.timeout(DEADLINE):
        return await get_user(request[DB], user_id)


# --- Details: skip at first ---
# A Host header: `localhost`, an IPv4 or an IPv6 address, with any port.
LOCAL = re.compile(r"(localhost|[0-9.]+|\[[0-9a-f:.]+\])(:[0-9]+)?")


def path_for(request: web.Request, name: str) -> str:
    return str(request.app.router[name].url_for())


# ------------------------------------------------------------------------------
# 3. Database and models
#
# We talk to MongoDB through Motor; without a MongoDB, mongomock-motor answers the same
# calls in memory. All queries but one stand in functions of this section.
#
# Beyond the article: the database also notifies us. Each write comes back as a change,
# in a stream that is the same for all processes. Each room listens to this stream and
# not to its own handlers. So any number of processes act as one chat.
#
# A stored message, the change that tells of it, and a process's presence entry:
#
#   {"_id": 17, "user_id": ObjectId("6a…"), "user": "ann", "text": "Hi!",
#    "time": datetime(2026, 11, 28, 12, 30, tzinfo=UTC), "nonce": "f3a1"}
#   {"operationType": "insert", "ns": {"db": "chat", "coll": "messages"},
#    "documentKey": {"_id": 17}, "fullDocument": {"_id": 17, …}}
#   {"_id": ObjectId("6b…"), "names": ["ann", "bob"], "seen": datetime(2026, …)}
#
# Motor's successor is PyMongo's AsyncMongoClient; mongomock-motor cannot stand in for
# it yet. Little outside this section would change.
# ------------------------------------------------------------------------------
DEADLINE = 5  # the longest wait for a query or for a form, in seconds
LARGEST_NUMBER = 1 << 53  # JavaScript holds no larger one exactly
HISTORY_SIZE = 1_000  # newest messages kept by each process
DATABASE_ERRORS = (PyMongoError, TimeoutError)


async def save(db: "Database", number: int, user: dict, text: str, nonce: str) -> int:
    """Store a message under this number, or a later one; return that number.

    Two processes may try the same number. MongoDB's `_id` is unique, so one wins:

        A: insert 18 (stored)             B: insert 18 (refused), read 18, insert 19

    A client retries a message that got no receipt. The unique index on user and nonce
    refuses the retry: return the number that the message has.
    """
    message = {"user_id": user["_id"], "user": user["name"], "text": text}
    message |= {"time": datetime.now(UTC), "nonce": nonce}
    while True:
        try:
            await db.insert({"_id": number} | message)
            return number
        except DuplicateKeyError:
            sent = {"user_id": user["_id"], "nonce": nonce}
            if stored := await db.messages.find_one(sent):
                return stored["_id"]
            # Jump to the newest, or step over a foreign document. That leaves a gap:
            # `apply` sees it and has everything read again; a page loads again, once.
            number = max([number, *(e["id"] for e in await newest(db, 1))]) + 1


async def newest(db: "Database", count: int, before=LARGEST_NUMBER) -> list[dict]:
    """Return up to `count` messages below number `before` as events, oldest first."""
    query = {"_id": {"$gt": 0, "$lt": before}, "nonce": {"$type": "string"}}
    found = db.messages.find(query).sort("_id", -1).limit(count)
    events = [to_event(message) async for message in found]
    return [event for event in reversed(events) if event]


class Database:
    """MongoDB's collections, and the stream of changes that all processes share."""

    shared = True  # other processes may use it at the same time

    def __init__(self, mongo) -> None:
        self.mongo = mongo  # Motor's database
        self.users, self.messages = mongo.users, mongo.messages

    async def insert(self, message: dict) -> None:
        """Store a message. MongoDB itself tells every process, through the stream."""
        await self.messages.insert_one(message)

    @asynccontextmanager
    async def changes(self):
        """Open the stream; yield a function that awaits the next change.

        Open before reading: then every later write is in the read, in the stream, or in
        both. By itself that leaves a hole: MongoDB 6.0 put a message into neither in 7
        of 250 tries. A majority write between the two closes it (0 of 120), and
        creating the indexes is one. After a failover, the driver resumes the stream.
        Raises DATABASE_ERRORS.
        """
        async with self.mongo.watch(PIPELINE, full_document="updateLookup") as stream:
            try:  # each time: a restore may have removed the indexes
                await self.create_indexes()
            except OperationFailure as error:
                # Messages are still stored, but a retry may be stored twice.
                log.error("An index could not be created: %s", reason(error))
            yield stream.next  # the function, not its result

    async def create_indexes(self) -> None:
        """Let the database decide who owns a name: only it sees every sign-up."""
        with pymongo.timeout(600):  # seconds: a large collection takes its time
            await create_unique_index(self.users, "name_key")
            await create_unique_index(self.users, "email_key")
            if self.shared:  # mongomock would take 8.5 ms more per message
                await create_unique_index(self.messages, "user_id", "nonce")
                await self.mongo.processes.create_index("seen", expireAfterSeconds=45)


class MemoryDatabase(Database):
    """The same calls on mongomock. It has no stream, so this process tells itself."""

    shared = False

    async def insert(self, message: dict) -> None:
        """Store a message. At each 1,000th, rename the rest: it replaces `older`."""
        if message["_id"] % HISTORY_SIZE == 0:  # 0.1 ms; deleting takes 25 to 50 ms
            await self.messages.rename("older", dropTarget=True)
        await super().insert(message)
        self.tell("insert", message)

    async def edit(self, operation: str, query) -> None:
        """Await an operator's `find_one_and_…`, and tell of the document it returns."""
        self.tell(operation, await query)

    def tell(self, operation: str, document: dict) -> None:
        change = {"operationType": operation, "documentKey": {"_id": document["_id"]}}
        self.queue.put_nowait(change | {"fullDocument": document})

    @asynccontextmanager
    async def changes(self):
        self.queue: asyncio.Queue[dict] = asyncio.Queue()
        yield self.queue.get


async def open_database(settings: Settings) -> Database:
    """Connect, and wait until the indexes are built. Raises CannotStart."""
    uri, client = settings.MONGO_HOST, None
    hidden, _, host = uri.rpartition("@")
    if not uri:
        say("MONGO_HOST is not set: accounts and messages live in memory only.")
        db = MemoryDatabase(AsyncMongoMockClient(tz_aware=True)[settings.MONGO_DB_NAME])
        await db.create_indexes()
        return db
    try:
        client = AsyncIOMotorClient(uri, **CLIENT_OPTIONS)
        hello = await client.admin.command("hello")
        if hello.keys() & {"setName", "msg"}:  # a replica set or a sharded cluster
            db = Database(client[settings.MONGO_DB_NAME])
            await db.create_indexes()  # here a conflict ends the start
            return db
        problem = STANDALONE % client.address
    except (*DATABASE_ERRORS, ValueError, OSError) as error:
        # In a malformed URI, the driver may take a part of the password for a host.
        secret = "|".join(re.findall(r"\w+", hidden.removeprefix("mongodb"))) or "(?!)"
        problem = "cannot be used: " + re.sub(rf"\b({secret})\b", "***", reason(error))
    if client:
        client.close()
    raise CannotStart(f"MONGO_HOST {host.partition('?')[0]!r} {problem}")


# --- Users and presence ---
async def get_user(db: Database, user_id: ObjectId) -> dict | None:
    """Return `_id` and `name` only: a socket keeps them for hours."""
    return await db.users.find_one({"_id": user_id}, ["name"])


async def find_user(db: Database, login: str) -> dict | None:
    """Find a user and their hash, by name or email in any spelling."""
    query = {"email_key" if "@" in login else "name_key": fold(login)}
    query |= {"_id": {"$type": "objectId"}, "password": {"$type": "string"}}
    return await db.users.find_one(query)


async def create_user(db: Database, name: str, email: str, password_hash: str) -> dict:
    """Store a new account. Raises DuplicateKeyError if name or email is taken."""
    user = {"_id": ObjectId(), "name": name, "name_key": fold(name)}
    user |= {"email": email, "email_key": fold(email)} if email else {}
    await db.users.insert_one(user | {"password": password_hash})
    return user


async def existing_users(db: Database, user_ids: set[ObjectId]) -> set[ObjectId]:
    return set(await db.users.distinct("_id", {"_id": {"$in": [*user_ids]}}))


async def exchange_names(db: Database, process: ObjectId, names: set[str]) -> set[str]:
    """Write the names of this process's users; return those of all processes.

    One entry per process. MongoDB stamps it at each write, and measures its age by its
    own clock: an entry older than FRESH belongs to a dead process. Write each time:
    then an entry that was lost is back at once.
    """
    entries, update = db.mongo.processes, {"$set": {"names": [*names]}}
    update["$currentDate"] = {"seen": True}
    await entries.update_one({"_id": process}, update, upsert=True)
    since = {"$subtract": ["$$NOW", FRESH * 1_000]}
    fresh = {"names": {"$type": "array"}, "$expr": {"$gt": ["$seen", since]}}
    found = [name async for entry in entries.find(fresh) for name in entry["names"]]
    return {name for name in found if isinstance(name, str)}  # none of a foreign entry


# --- Details: skip at first ---
# Ask only for what the room needs. New users are left out: their documents hold
# password hashes. Dropping a collection (`mongorestore --drop`) does not end a stream.
PIPELINE = [{"$match": {"$or": [
    {"ns.coll": "messages", "operationType": {"$in": ["insert", "update", "replace"]}},
    {"ns.coll": "users", "operationType": "delete"},
    {"operationType": {"$in": ["drop", "rename", "dropDatabase", "invalidate"]}},
]}}]  # fmt: skip
STANDALONE = (
    "is standalone. Start it with `mongod --replSet rs0`, then type once in mongosh: "
    "rs.initiate({_id: 'rs0', members: [{_id: 0, host: '%s:%s'}]}). Your data stays."
)
# Report a write as stored only when a majority of members has it, and read only such
# writes. Otherwise a failover could undo a number that later ones build on. A foreign
# document must not fail to decode: it would end the stream for good. The timeout is for
# each query, with its retries.
CLIENT_OPTIONS = {
    "w": "majority", "readConcernLevel": "majority", "timeoutMS": DEADLINE * 1_000,
    "datetime_conversion": "DATETIME_AUTO", "unicode_decode_error_handler": "replace",
    "tz_aware": True, "serverSelectionTimeoutMS": 3_000,
}  # fmt: skip


def reason(error: BaseException) -> str:
    """Return the driver's own words, up to the details: a key may be an email."""
    return re.split(r", | \(configured| dup key", str(error))[0] or type(error).__name__


async def create_unique_index(collection, *fields: str) -> None:
    """Create a unique index that ignores foreign documents."""
    with suppress(OperationFailure):  # drop the first edition's, which did not
        await collection.drop_index("_".join(f"{name}_1" for name in fields))
    options = {"name": f"unique {fields[-1]}", "unique": True}
    options["partialFilterExpression"] = {fields[-1]: {"$type": "string"}}
    await collection.create_index([(name, 1) for name in fields], **options)


def fold(text: str) -> str:
    """Make all spellings one: `Ann`, `ann` and wide `ａｎｎ` are the same user."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


# ------------------------------------------------------------------------------
# 4. Views
#
# One class per page, one method per HTTP verb. A successful POST answers with a
# redirect (303), so that a reload does not send it again. If it fails, the form comes
# back with your input and an error beside each bad field. Only the chat itself needs
# JavaScript. Beyond the article: passwords are hashed, and attempts are limited.
# ------------------------------------------------------------------------------
PAGE = 50  # messages
LONGEST_FIELD = 254  # characters: an email address has no more (RFC 5321)
HASH_WAIT = 2.5  # the longest wait for a password's hash, in seconds
HASH_THREAD = ThreadPoolExecutor(max_workers=1)


class ChatList(web.View):
    """Show the newest messages, or with `?before=17` those before number 17."""

    @aiohttp_jinja2.template("chat.html")
    async def get(self) -> dict:
        before, db = read_number(self.request, "before"), self.request[DB]
        events = self.request.app[ROOM].history.events.values()
        messages = [event for event in events if event["id"] < before][-PAGE:]
        if len(messages) < PAGE and before < LARGEST_NUMBER and db.shared:
            async with asyncio.timeout(DEADLINE):  # older than the history
                messages = await newest(db, PAGE, before)
        return {
            "user": self.request[USER]["name"], "messages": messages,
            "live": before == LARGEST_NUMBER,
            "older": len(messages) == PAGE and messages[0]["id"],
            "max_length": self.request.app[SETTINGS].MAX_MESSAGE_LENGTH,
        }  # fmt: skip

    head = get  # a page answers HEAD wherever it answers GET (RFC 9110, 9.1)


class FormError(Exception):
    """A rejected form: one sentence per field, a status, seconds to wait."""


class Login(web.View):
    """Show a form, read it, and sign in the user that `submit` returns.

    Here you sign in with a name or an email, and the password.
    """

    async def submit(self, form: dict[str, str]) -> dict:
        """Return the user that this form signs in. Raises FormError.

        Hash even when no user matches, or response times would reveal existing names.
        """
        await self.count_attempt(form["login"])
        user = await find_user(self.request[DB], form["login"])
        known = user["password"] if user else NO_PASSWORD
        if await self.in_hash_thread(verify_password, form["password"], known):
            return user
        raise FormError({"login": "No account has this name or email and password."})

    async def get(self) -> web.Response:
        if self.request[USER]:
            raise web.HTTPSeeOther(path_for(self.request, "main"))
        return self.page({}, {}, status=200)

    head = get

    async def post(self) -> web.Response:
        form = await read_form(self.request)
        try:
            async with asyncio.timeout(DEADLINE):
                user = await self.submit(form)
        except FormError as error:
            return self.page(form, *error.args)
        # Store the id: a deleted user's name can be taken again.
        (await new_session(self.request))["user"] = str(user["_id"])
        raise web.HTTPSeeOther(path_for(self.request, "main"))

    def page(self, form: dict, errors: dict, status=422, wait=0) -> web.Response:
        name, why = self.request.match_info.route.name, self.request.query.get("why")
        context = {"form": form, "errors": errors, "why": why}
        page = aiohttp_jinja2.render_template(f"{name}.html", self.request, context)
        page.set_status(status)
        page.headers.update({"Retry-After": str(wait)} if wait else {})
        return page

    async def count_attempt(self, login: str) -> None:
        """Count an attempt. Raises FormError (429) after too many per minute.

        Count by what was typed, not by the account found: otherwise a 429 would tell
        whose email it is. Known limit: behind a proxy, all clients have one address.
        Then a stranger can use up the attempts on a name, and its owner has to wait.
        """
        # A client may own 2**64 IPv6 addresses, so a /64 counts as one. Truncate the
        # name: `fold` can turn 1 character into 18, and each limiter is kept.
        ip = (self.request.remote or "::").partition("%")[0]
        network = ip if "." in ip else ipaddress.ip_interface(f"{ip}/64").network
        limiter = self.request.app[ROOM].attempts(network, fold(login)[:LONGEST_FIELD])
        if not limiter.has_capacity():
            raise FormError({"login": "Too many attempts. Wait a minute."}, 429, 60)
        await limiter.acquire()

    async def in_hash_thread(self, work, *args):
        """Hash in a dedicated thread: a crowd that signs in hardly delays messages.

        Waiting hashes queue in the executor. After HASH_WAIT, raise FormError (503).
        """
        hashing = asyncio.get_running_loop().run_in_executor(HASH_THREAD, work, *args)
        try:
            return await asyncio.wait_for(hashing, HASH_WAIT)
        except TimeoutError:
            busy = {"login": "Too many people are signing in. Try again in 3 seconds."}
            raise FormError(busy, 503, 3) from None


class SignIn(Login):
    """Create an account. The name of this page is the article's."""

    async def submit(self, form: dict[str, str]) -> dict:
        """Return the user that this form creates. Raises FormError.

        A double click sends the form twice. So a taken name with the right password
        signs in, if the account is younger than a minute; an older one may belong to
        another ann with the same weak password. Each form is an attempt, or signing up
        would be a way to guess passwords.
        """
        if errors := dict(find_errors(form)):
            raise FormError(errors)
        db, name = self.request[DB], USERNAME.enforce(form["login"])
        await self.count_attempt(name)
        password_hash = await self.in_hash_thread(hash_password, form["password"])
        try:
            return await create_user(db, name, form["email"], password_hash)
        except DuplicateKeyError:
            taken = await find_user(db, name)
            minute_ago = datetime.now(UTC) - timedelta(minutes=1)
            if taken and taken["_id"].generation_time > minute_ago:
                with suppress(FormError):
                    return await super().submit(form)
            field = "login" if taken or not form["email"] else "email"
            raise FormError({field: "Another user has this already."}) from None


class SignOut(web.View):
    """End this session, with the sockets that it has at this process.

    Known limit: sessions on other devices, and copies of this cookie, stay valid.
    """

    async def post(self) -> web.Response:
        room, session = self.request.app[ROOM], await get_session(self.request)
        own = self.request[USER]["_id"], session.created
        # Wait: the answer must delete the cookie before a page reconnects.
        ending = close(room, lambda s: (s.user["_id"], s.signed_in) == own, after=0.5)
        room.tasks.create_task(ending)
        session.invalidate()
        raise web.HTTPSeeOther(path_for(self.request, "login"))


# --- Details: skip at first ---
MALFORMED = (http.HttpProcessingError, web.RequestPayloadError)
# RFC 8265: no invisible letters, compatibility forms or mixed directions.
USERNAME = get_profile("UsernameCasePreserved")
# For unknown users: as slow to verify as a real hash. No password fits.
NO_PASSWORD = f"$argon2id$v=19$m=19456,t=2,p=1${'A' * 22}${'A' * 43}"


def hash_password(password: str) -> str:
    """Hash with Argon2id (RFC 9106) at OWASP's minimum: 20 to 40 ms of a core."""
    salt = secrets.token_bytes(16)
    argon2 = Argon2id(salt=salt, length=32, iterations=2, lanes=1, memory_cost=19_456)
    return argon2.derive_phc_encoded(password.encode())


def verify_password(password: str, password_hash: str) -> bool:
    with suppress(InvalidKey, ValueError):  # the wrong one, or no hash at all
        return Argon2id.verify_phc_encoded(password.encode(), password_hash) is None
    return False


def read_number(request: web.Request, name: str) -> int:
    """Read a number from the query string, or the largest. Raises HTTPBadRequest."""
    text = request.query.get(name, "")
    if not re.fullmatch("[0-9]{0,15}", text):
        raise web.HTTPBadRequest(text=f"{name} must be the number of a message.")
    return int(text or LARGEST_NUMBER)


async def read_form(request: web.Request) -> dict[str, str]:
    """Return the text of each field. Raises HTTPBadRequest, also after DEADLINE.

    Normalize here, once: the same letters can be encoded in several ways (NFC, NFD).
    Check lengths first: to normalize 16 KB of combining marks takes 112 ms.
    """
    unreadable = web.HTTPBadRequest(text="The form could not be read.")
    kind = request.content_type, (request.charset or "utf-8").lower()
    if kind != ("application/x-www-form-urlencoded", "utf-8"):
        raise unreadable  # some character sets are slow to decode
    try:
        async with asyncio.timeout(DEADLINE):
            data = await request.post()
    except (TimeoutError, ValueError, *MALFORMED):
        raise unreadable from None
    fields = "login", "email", "password", "password2"
    form = {name: data.get(name, "") for name in fields}
    if max(map(len, form.values())) > LONGEST_FIELD:  # the pages have this limit, too
        raise web.HTTPBadRequest(text=f"A field takes {LONGEST_FIELD} characters.")
    form = {name: unicodedata.normalize("NFC", text) for name, text in form.items()}
    return form | {name: form[name].strip() for name in ("login", "email")}


def find_errors(form: dict[str, str]):
    """Yield a (field, sentence) pair for each rule that the form breaks."""
    email, password = form["email"], form["password"]
    if not is_name(form["login"]):
        yield "login", "A name has 3 to 32 letters, digits, _ or -."
    if email and not (re.fullmatch(r"[^@\s]+@[^@\s]+", email) and email.isprintable()):
        yield "email", "This is not an email address. You may leave it empty."
    if not 8 <= len(password) <= 128:
        yield "password", "A password has 8 to 128 characters."
    if password != form["password2"]:
        yield "password2", "The two passwords are not the same."


def is_name(text: str) -> bool:
    """Tell whether a text is 3 to 32 letters, digits, _ or -.

    Letters may carry combining marks, at most two in a row. PRECIS alone accepts
    `<b>ann</b>`, and 32 marks in a row, which cover the lines around them.
    """
    with suppress(UnicodeEncodeError):  # how the library rejects a name
        name = USERNAME.enforce(text)
        kinds = ("L" if c in "_-" else unicodedata.category(c)[0] for c in name)
        return bool(re.fullmatch(r"(?!M|.*MMM)[LMN]{3,32}", "".join(kinds)))
    return False


# ------------------------------------------------------------------------------
# 5. WebSocket
#
# The order here is a message's: a socket receives it, `post` stores it, `follow` hears
# of it from the database, the History keeps it, `broadcast` sends it to every socket.
# Presence comes last.
#
# Beyond the article: the four rules, and limits on what one user can send and open.
# ------------------------------------------------------------------------------
# Ping every 30 seconds; without a pong within 15, we disconnect (heartbeat). A client's
# own ping counts toward its limit, like any frame (autoping). Closing waits a second
# for the other side (timeout). A compressor per reader would halve the speed. A frame
# has at most 128 KiB: 10,000 characters fit, each written as \uXXXX\uXXXX.
SOCKET = {"heartbeat": 30, "autoping": False, "timeout": 1, "compress": False}
LARGEST_FRAME = 131_072
HEARTBEAT = 20  # seconds between events that show a page that it is connected
GRACE = 2  # seconds a name stays online after it disappears: time to reload
PAUSE, IDLE = 0.5, 1.2  # seconds between presence checks; IDLE if no user is online
FRESH = 15  # seconds after which a process counts as dead, and its users as gone
# Turns of the event loop from a batch's first frame to its flush. Measured: with one
# turn, a delivery under load costs 45 % more; a timer of 1 ms adds 1.4 ms to a message.
TURNS = 6


class Room:
    """The sockets of this process, and what they share."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self.db, self.settings, self.process = db, settings, ObjectId()
        self.history = History()
        # A dictionary keeps the order of arrival; a set does not. Writing to 4,000
        # readers in this order takes 13 % less time.
        self.sockets: dict[WebSocket, None] = {}
        self.frames: list[bytes] = []  # broadcasts that wait for the next `flush`
        self.online: set[str] = set()  # names announced as online
        self.missing: dict[str, float] = {}  # of these, and since when it counts
        cache = functools.lru_cache(10_000)  # of the least recently used, forget some
        burst, rate = settings.MESSAGE_BURST, settings.MESSAGES_PER_SECOND
        self.frame_limiter = cache(lambda user_id: AsyncLimiter(burst, burst / rate))
        self.attempts = cache(lambda *login: AsyncLimiter(settings.LOGIN_ATTEMPTS, 60))
        self.saving, self.caught_up = asyncio.Lock(), asyncio.Event()
        self.tasks = asyncio.TaskGroup()


# --- The socket ---
class WebSocket(web.View):
    """Replay, welcome, then receive: aiohttp makes one view per request, so this object
    lives as long as the socket.
    """

    async def get(self) -> web.WebSocketResponse:
        # Local variables here stay in memory as long as the socket.
        self.room, self.user = self.request.app[ROOM], self.request[USER]
        self.transport, self.live = self.request.transport, False
        self.signed_in = (await get_session(self.request)).created
        self.ws = web.WebSocketResponse(max_msg_size=LARGEST_FRAME, **SOCKET)
        after = read_number(self.request, "after")
        # Count before the handshake, and don't await between counting and adding: two
        # handshakes could both take the last free place.
        limit = self.room.settings.CONNECTIONS_PER_PERSON
        if sum(s.user["_id"] == self.user["_id"] for s in self.room.sockets) >= limit:
            raise web.HTTPTooManyRequests(text=f"{limit} windows are open. Close one.")
        self.room.sockets[self] = None
        try:
            with suppress(ConnectionError):  # the client left while we were sending
                await self.ws.prepare(self.request)
                await self.replay(after)
                self.join()
                await self.receive()
        finally:
            self.room.sockets.pop(self, None)
        return self.ws if self.ws.prepared else web.Response()

    async def replay(self, after: int) -> None:
        """Send messages after a number until none is left, with backpressure.

        The history changes while we send. So ask again until there is nothing new.
        """
        while after < self.room.history.last:
            events = self.room.history.events
            for event in [e for number, e in events.items() if number > after]:
                await self.ws.send_json(event)
                after = event["id"]

    def join(self) -> None:
        """Make this socket live and welcome it.

        Flush first: what waits in `frames` was in the replay, and would come twice.
        Don't await between the end of the replay and `live`, or this socket would miss
        broadcasts. Then send removed messages again (an operator blanked them): one may
        have been removed after its replay. Other edits need a reload.
        """
        flush(self.room)
        self.live = True
        history, name = self.room.history, self.user["name"]
        removed = [event for event in history.events.values() if not event["text"]]
        welcome = {"type": "welcome", "user": name, "last": history.last}
        welcome["online"] = sorted(self.room.online | {name})
        self.write(b"".join(map(encode_frame, [*removed, welcome])))

    async def receive(self) -> None:
        """Read frames no faster than this user's limit allows, and answer each.

        Limit by reading slowly: TCP then holds a faster sender back (backpressure). So
        a flood delays only its sender. A pong waits behind the frames before it, so a
        flood may also cost its sender the connection.
        """
        limiter = self.room.frame_limiter(self.user["_id"])
        async for frame in self.ws:
            await limiter.acquire()
            if self.transport.is_closing():  # the client has hung up
                return
            if frame.type is WSMsgType.PING:
                await self.ws.pong(frame.data)
            elif frame.type in {WSMsgType.TEXT, WSMsgType.BINARY}:
                self.write(encode_frame(await self.answer(frame.data)))

    async def answer(self, data: str | bytes) -> dict:
        """Store a message and return its receipt, or else an error."""
        try:
            match json.loads(data):
                case {"type": "message", "text": str(text), "nonce": str(nonce)} if (
                    1 <= len(nonce) <= 64 and nonce.isprintable()
                ):
                    text.encode()  # half a surrogate pair cannot be stored: ValueError
                case _:
                    raise ValueError
        except (ValueError, RecursionError):
            return error_event("bad_event", "The server did not understand this.")
        if len(text) > self.room.settings.MAX_MESSAGE_LENGTH:
            return error_event("too_long", "This message is too long.", nonce=nonce)
        if is_blank(text):
            return error_event("empty", "A message needs some text.", nonce=nonce)
        try:
            async with asyncio.timeout(DEADLINE):
                number = await post(self.room, self.user, text, nonce)
        except DATABASE_ERRORS as error:
            log.warning("A message was not saved: %s", reason(error))
            text = "The message is not saved yet. The page keeps trying."
            return error_event("not_saved", text, nonce=nonce)
        return {"type": "receipt", "nonce": nonce, "id": number}

    def write(self, frames: bytes) -> None:
        """Write without waiting for the reader.

        Unsent bytes pile up in this process. Above the limit, disconnect the reader:
        when it reconnects, the replay sends what it missed.
        """
        if self.transport.get_write_buffer_size() > self.room.settings.MAX_UNSENT_BYTES:
            self.transport.abort()
        elif not (self.ws.closed or self.transport.is_closing()):
            self.transport.write(frames)  # nothing may follow a close frame


# --- Storing ---
async def post(room: Room, user: dict, text: str, nonce: str) -> int:
    """Store a message and return its number. A retry returns the same number.

    After DATABASE_ERRORS, the message may be stored already, or soon. The client
    finds out when it retries with the same nonce. Nothing is broadcast here: the
    message comes back through the stream.
    """
    async with room.saving:  # two inserts would race for the same number
        if number := room.history.receipts.get((user["name"], nonce)):
            return number
        number = await save(room.db, room.history.stored + 1, user, text, nonce)
        # Remember it before its change arrives: the sender may repeat it, or another
        # message may follow. By now, `catch_up` may have replaced `room.history`.
        room.history.remember(user["name"], nonce, number)
        return number


# --- Following ---
async def follow(room: Room) -> None:
    """Turn changes into broadcasts, for as long as the application runs.

    One repair covers whatever breaks: open the stream again, read what is stored, and
    follow.
    """
    while True:
        try:
            async with room.db.changes() as next_change:
                await catch_up(room)
                while True:
                    apply(room, await next_change())
        except DATABASE_ERRORS as error:
            log.warning("Reading all messages again: %s", reason(error))
        await asyncio.sleep(0.2)


async def catch_up(room: Room) -> None:
    """Read what was written before the stream was open; broadcast what differs.

    A message stored during this read also arrives in the stream. `apply` skips it then.
    """
    history = History()
    for event in await newest(room.db, HISTORY_SIZE):
        history.add(event)
    user_ids = {socket.user["_id"] for socket in room.sockets}
    expel(room, user_ids - await existing_users(room.db, user_ids))
    known, room.history = room.history.events, history
    for number, event in history.events.items():
        if known.get(number) != event:
            broadcast(room, event)
    room.caught_up.set()


def apply(room: Room, change: dict) -> None:
    """Do what a change asks for. Raises PyMongoError to have everything read again."""
    match change:
        case {"operationType": "delete", "documentKey": {"_id": user_id}}:
            expel(room, [user_id])
        case {"operationType": operation, "fullDocument": dict(message)}:
            event, last = to_event(message), room.history.last
            if event and event["id"] > last + 1:  # we missed a change
                raise PyMongoError(f"message {event['id']} came after {last}")
            if event and room.history.add(event, operation):
                broadcast(room, event)
        case _:  # collections went, or a message was deleted after its update
            raise PyMongoError(f"{change['operationType']} of documents")


def to_event(message: dict) -> dict | None:
    """Make the event of a stored message. Log a foreign document, and return None."""
    match message:
        case {"_id": int(number), "user": str(user), "text": str(text),
              "time": datetime() as moment, "nonce": str(nonce), "user_id": ObjectId(),
        } if 0 < number < LARGEST_NUMBER and number is not True:  # fmt: skip
            iso = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            event = {"type": "message", "id": number, "user": user, "text": text}
            return event | {"time": iso, "nonce": nonce}
    log.warning("Passed over a foreign message: %.80r", message["_id"])
    return None


def expel(room: Room, ids: list | set) -> None:
    """End the sockets of deleted accounts, even those that are still opening."""
    gone = close(room, lambda s: s.user["_id"] in ids, WSCloseCode.POLICY_VIOLATION)
    room.tasks.create_task(gone)


# --- What is kept ---
class History:
    """The newest messages, as events by number, and their receipts."""

    def __init__(self) -> None:
        self.events: dict[int, dict] = {}
        self.receipts: dict[tuple[str, str], int] = {}  # by user's name and nonce
        # The newest number that came back, in the stream or in a read; and the newest
        # known to be stored, which is ahead until its change arrives.
        self.last = self.stored = 0

    def add(self, event: dict, operation: str = "") -> bool:
        """Keep an event unless it is older than all. Return whether to broadcast it."""
        number, known = event["id"], self.events.get(event["id"])
        if operation == "insert" and known and known["nonce"] == event["nonce"]:
            return False  # `catch_up` has read it, and it may have been removed since
        if known or number > self.last:
            self.events[number] = event
        if number > self.last:
            self.last = number
            self.remember(event["user"], event["nonce"], number)
        return event != known

    def remember(self, user: str, nonce: str, number: int) -> None:
        self.stored = max(self.stored, number)
        self.receipts[user, nonce] = number
        for kept in self.events, self.receipts:
            if len(kept) > HISTORY_SIZE:
                del kept[next(iter(kept))]  # the oldest


# --- Fan-out ---
def broadcast(room: Room, event: dict) -> None:
    """Queue an event for all live sockets, without waiting for any of them.

    A write is a system call, and costs most of the 4 µs that a delivery takes. So
    encode the frame once for all readers, and hold it for TURNS turns of the event
    loop. Frames that arrive meanwhile are sent with it: one write per socket.
    """
    room.frames.append(encode_frame(event))
    if len(room.frames) == 1:
        flush_in(room, TURNS)


def flush_in(room: Room, turns: int) -> None:
    if turns:
        asyncio.get_running_loop().call_soon(flush_in, room, turns - 1)
    else:
        flush(room)


def flush(room: Room) -> None:
    frames, room.frames = b"".join(room.frames), []
    # `abort` only schedules the disconnect, so nothing is removed meanwhile.
    for socket in room.sockets if frames else ():
        if socket.live:
            socket.write(frames)


# Create one encoder: with options, `json.dumps` would create one per call.
to_json = json.JSONEncoder(ensure_ascii=False).encode


def encode_frame(event: dict) -> bytes:
    """Encode an event as a complete text frame (RFC 6455, 5.2).

    Servers don't mask frames, so the same bytes serve every socket. aiohttp does not
    document writing to the transport beside it; a test interleaves both.
    """
    payload = to_json(event).encode()
    if (length := len(payload)) < 126:
        return b"\x81" + length.to_bytes() + payload
    if length < 1 << 16:
        return b"\x81\x7e" + length.to_bytes(2) + payload
    return b"\x81\x7f" + length.to_bytes(8) + payload


async def keep_alive(room: Room) -> None:
    """Send heartbeats: proof that the connection works, and the newest number.

    WebSocket pings are not enough: browsers hide them from the page.
    """
    while True:
        await asyncio.sleep(HEARTBEAT)
        broadcast(room, {"type": "heartbeat", "last": room.history.last})


async def close(room: Room, chosen, code=WSCloseCode.GOING_AWAY, after=0) -> None:
    """Close the chosen sockets concurrently, with a close code, after some seconds.

    Don't drain (wait until everything is sent): a stalled reader would block us. A
    reader has a second (`timeout`) to confirm. Then drop what is unsent. A socket that
    is still in its handshake cannot send a close frame; it is aborted.
    """
    await asyncio.sleep(after)
    sockets = list(filter(chosen, room.sockets))
    closing = [socket.ws.close(code=code, drain=False) for socket in sockets]
    await asyncio.gather(*closing, return_exceptions=True)
    for socket in sockets:
        socket.transport.abort()


# --- Presence ---
async def keep_presence(room: Room) -> None:
    """Ask again and again who is online, for as long as the application runs."""
    while True:
        await asyncio.sleep(PAUSE if room.online else IDLE)
        await look(room)


async def look(room: Room) -> None:
    """Exchange names with the other processes, and announce who came and who left.

    After an outage, the other processes may come back later than this one. So count
    from FRESH seconds later, or it would look like a departure of their users.
    """
    began, present = time.monotonic(), {s.user["name"] for s in room.sockets if s.live}
    try:
        if room.db.shared:
            present = await exchange_names(room.db, room.process, present)
        announce(room, present, began)
    except DATABASE_ERRORS as error:
        log.warning("Presence could not be exchanged: %s", reason(error))
        room.missing = dict.fromkeys(room.online, time.monotonic() + FRESH)


def announce(room: Room, present: set[str], began: float) -> None:
    """Broadcast `joined`, and `left` for each name that was missing for GRACE seconds.

    So a reload, a move to another process and a restart show nothing. Answers may be
    slow: count from the end of the first look without a name to the start of this one.
    """
    now, missing = time.monotonic(), room.online - present
    room.missing = {name: room.missing.get(name, now) for name in missing}
    left = {name for name, since in room.missing.items() if began - since >= GRACE}
    for kind, names in ("joined", present - room.online), ("left", left):
        for name in sorted(names):
            broadcast(room, {"type": kind, "user": name})
    room.online = (room.online | present) - left


# --- Details: skip at first ---
def error_event(code: str, text: str, **nonce: str) -> dict:
    """Make an error event. Its nonce, if any, tells which message failed."""
    return {"type": "error", "code": code, "text": text} | nonce


def is_blank(text: str) -> bool:
    """Tell whether nothing shows: an empty Braille cell and U+3164 show nothing."""
    return not any(c.isprintable() and c not in " \u2800\u3164" for c in text)


# ------------------------------------------------------------------------------
# 6. Routes and static
#
# All views are in one table: path, handler, name. The rest of the code refers to
# routes by name, so a path can change. Beyond the article: a Content-Security-Policy.
# ------------------------------------------------------------------------------
ROUTES = [
    ("/", ChatList, "main"),
    ("/ws", WebSocket, "chat"),
    ("/login", Login, "login"),
    ("/signin", SignIn, "signin"),
    ("/signout", SignOut, "signout"),
]


def add_routes(app: web.Application) -> None:
    for path, handler, name in ROUTES:
        app.router.add_view(path, handler, name=name)
    app.router.add_static("/static/", HERE / "static", name="static")
    app.on_response_prepare.append(add_headers)


# --- Details: skip at first ---
CSP = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'self'"


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Load scripts and styles from our files only, and let only our pages frame us.

    Without ORIGIN, pages on other ports of this host may, too: a notebook does.
    Don't let browsers store the chat, or Back would show it after signing out.
    """
    if response.status == 101:
        return  # a WebSocket isn't a page, and would hold these in memory
    local = None if request.app[SETTINGS].ORIGIN else LOCAL.fullmatch(request.host)
    framed_by = f" http://{local[1]}:*" if local else ""
    response.headers["Content-Security-Policy"] = CSP + framed_by
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"
    public = request.match_info.route.name in PUBLIC
    response.headers["Cache-Control"] = "no-cache" if public else "no-store"


# ------------------------------------------------------------------------------
# 7. Startup and shutdown
#
# A `cleanup_ctx` function starts something before its `yield`, and stops it after.
# aiohttp runs the first halves in order, and the second ones in reverse. To shut down,
# it stops listening, runs `on_shutdown`, waits for handlers, and runs second halves.
# Beyond the article: if a background task fails, the process says so and ends.
# ------------------------------------------------------------------------------
def main(loop=None) -> None:
    """Run the chat until Ctrl-C. If it cannot start, print why and exit with 2."""
    try:
        settings = Settings()
        for name in settings.model_extra.keys() & RENAMED.keys():
            say(f"{name} in .env has no effect any more; it is now {RENAMED[name]}.")
        return run(settings, loop)
    except ValidationError as error:
        problems = [f"{wrong['loc'][0]}: {wrong['msg']}" for wrong in error.errors()]
    except UnicodeDecodeError:
        problems = [".env must be a text file in UTF-8"]
    except CannotStart as error:
        problems = [str(error)]
    except (OSError, UnicodeError) as error:
        problems = [f"SITE_HOST and PORT must be a free address: {error}"]
    print(*(f"chat: {problem}" for problem in problems), sep="\n", file=sys.stderr)
    sys.exit(2)


def run(settings: Settings, loop=None) -> None:
    """Serve until SIGINT or SIGTERM. Raises OSError if the address is not free."""
    level = logging.INFO if settings.LOG_REQUESTS else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource  # on open files, one per socket: macOS starts with 256

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = hard if 0 < hard < 1 << 30 else 10_240  # it may say "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    address = {"host": settings.SITE_HOST, "port": settings.PORT, "print": say}
    web.run_app(init_app(settings), **address, shutdown_timeout=1, loop=loop)


def init_app(settings: Settings) -> web.Application:
    """Make the application; a runner starts it."""
    session = session_middleware(make_storage(settings))
    stack = [own_origin, session, db_handler, authorize]
    # Read on for a second after an early answer (lingering_time). Cookies of all ports
    # of localhost arrive here, and make a long header (max_field_size). A form has at
    # most 16 KiB.
    limits = {"max_field_size": 65_536, "lingering_time": 1}
    app = web.Application(middlewares=stack, handler_args=limits, client_max_size=16384)
    app[SETTINGS] = settings
    aiohttp_jinja2.setup(app, loader=jinja2.FileSystemLoader(HERE / "templates"))
    add_routes(app)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(once_per_minute)
    app.cleanup_ctx.append(run_room)
    app.on_shutdown.append(lambda app: close(app[ROOM], lambda socket: True))
    return app


async def run_room(app: web.Application):
    """Connect to the database, run the room's tasks, and disconnect at the end.

    Accept no request before the history has been read. If a task fails, the group ends
    the others and the process (exit code 1); a host restarts it. Raises CannotStart.
    """
    db = await open_database(app[SETTINGS])
    app[ROOM] = room = Room(db, app[SETTINGS])
    async with room.tasks:
        work = follow(room), keep_presence(room), keep_alive(room)
        tasks = [room.tasks.create_task(watched(one)) for one in work]
        with suppress(TimeoutError):  # then nothing is served, and the last line raises
            async with asyncio.timeout(DEADLINE):
                await room.caught_up.wait()
            await look(room)  # who is online, before the first request
            yield
        with pymongo.timeout(2):  # seconds in all: the database may be away
            with suppress(*DATABASE_ERRORS):  # the entry expires by itself
                await db.mongo.processes.delete_one({"_id": room.process})
            db.mongo.client.close()
        for task in tasks:
            task.cancel()
    if not room.caught_up.is_set():
        raise CannotStart("MONGO_HOST: the stream of changes did not open in time")


async def watched(work) -> None:
    """Log a failure at once. Otherwise you would only see it when the process ends."""
    try:
        await work
    except Exception:
        log.critical("A background task failed", exc_info=True)
        raise


# --- Details: skip at first ---
LOGGERS = "chat", "aiohttp.server", "aiohttp_session", "asyncio", "pymongo.client"
RENAMED = {"HOST": "SITE_HOST", "DEBUG": "LOG_REQUESTS"}
logged: dict[str, float] = {}  # when a line was last logged


def say(text: str) -> None:
    """Print and flush, or a container shows it late. Ignore a closed stdout."""
    with suppress(OSError):
        print(text, flush=True)


def once_per_minute(record: logging.LogRecord) -> bool:
    """Log a repeated line once a minute, and external faults without a traceback.

    External faults are a client's garbage, and errors of the system or the database.
    Compare templates, not texts: a client's values must not make each line new.
    """
    error, line = record.exc_info and record.exc_info[1], str(record.msg).split("\n")[0]
    if error:
        line = f"{line}: {type(error).__name__}"
    if isinstance(error, (*MALFORMED, OSError, PyMongoError)):
        record.msg, record.exc_info, record.exc_text = line, None, None
    now = time.monotonic()
    is_due = now - logged.get(line, -60) >= 60
    if is_due:
        logged[line] = now
    return is_due


def make_storage(settings: Settings) -> EncryptedCookieStorage:
    """Keep the session in an encrypted cookie, which scripts cannot read.

    Without a database, accounts end with this run, so the cookie ends with the browser.
    Name it by the port then: all ports of a host share their cookies, and two chats on
    `localhost` would sign each other out.
    """
    options = {"max_age": 14 * 24 * 60 * 60}  # seconds
    if not settings.MONGO_HOST:
        options = {"cookie_name": f"CHAT_{settings.PORT or secrets.token_hex(4)}"}
    # The environment may hold bytes that aren't UTF-8; Python reads them as surrogates.
    key = settings.SECRET_KEY.encode(errors="surrogateescape") or secrets.token_bytes()
    key = hashlib.sha256(key).digest()  # fits it to 32 bytes
    secure = settings.ORIGIN.startswith("https:")
    return EncryptedCookieStorage(key, secure=secure, samesite="Lax", **options)


if __name__ == "__main__":
    main()
