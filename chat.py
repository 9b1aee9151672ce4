"""A chat that loses no message, in one file to read from top to bottom.

A 2016 article (https://habr.com/ru/post/300942/) built a chat to show what aiohttp can
do. This is that chat today. It keeps the article's sections, in order. Additions are
marked "Beyond the article". It is a complete application, not an excerpt.

    pip install -r requirements.txt
    python chat.py

1. Settings      2. Middlewares      3. Database and models      4. Views
5. WebSocket     6. Routes and static      7. Startup and shutdown

These words have one meaning throughout:

    app         the web application; it holds what its parts share, under typed keys
    db          the Database: MongoDB, or a stand-in in memory
    user        a registered user's document; a request keeps only `_id` and `name`
    message     what a user said: a number, a name, a text, a time
    event       a JSON object on a WebSocket; its `type` says what it is
    connection  one open WebSocket; a user with three tabs has three
    room        all connections of this process, and what they need to know
    change      a notification from the database: an insert, an update or a delete
    nonce       a client's random text for one message, by which a retry is recognized
    receipt     the answer to a message: it is stored, under this number
    replay      the messages that a client missed, sent when it connects
    presence    which users are online, at all processes
    foreign     a document in our collections that another program wrote
"""

# What `uv run chat.py` and `pipx run chat.py` install before they start (PEP 723):
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
import os
import re
import secrets
import socket
import struct
import sys
import time
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp_jinja2
import jinja2
from aiohttp import WSCloseCode, WSMsgType, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp_session import get_session, new_session, session_middleware
from aiohttp_session.cookie_storage import EncryptedCookieStorage
from bson import ObjectId
from bson.errors import InvalidId
from cryptography.exceptions import InvalidKey
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from markupsafe import Markup
from mongomock_motor import AsyncMongoMockClient
from motor.motor_asyncio import AsyncIOMotorClient
from precis_i18n import get_profile
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from pymongo.errors import DuplicateKeyError, OperationFailure, PyMongoError
from yarl import URL

try:  # the same loop in C, if installed: up to 25 % cheaper per delivery
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

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
    """What you can set; `.env.example` explains each.

    Raises ValidationError, which lists all wrong values at once.
    """

    model_config = SettingsConfigDict(
        env_file=HERE / ".env",
        env_file_encoding="utf-8-sig",  # editors on Windows may add a byte order mark
        case_sensitive=True,
        extra="ignore",
        validate_default=True,
        hide_input_in_errors=True,  # a URI may hold a password
    )
    DEBUG: bool = False
    HOST: str = Field("127.0.0.1", min_length=1)  # empty would mean every address
    PORT: int = Field(8080, ge=0, le=65_535)
    ORIGIN: str = ""
    MONGO_HOST: str = ""
    MONGO_DB_NAME: str = Field("chat", pattern=r"^[A-Za-z0-9_-]{1,38}$")
    SECRET_KEY: str = ""
    MAX_MESSAGE_LENGTH: int = Field(1_000, ge=1, le=10_000)  # characters
    MESSAGES_PER_SECOND: int = Field(5, ge=1, le=1_000_000)  # per user and process
    MESSAGE_BURST: int = Field(20, ge=1, le=1_000_000)  # at once
    CONNECTIONS_PER_PERSON: int = Field(20, ge=1, le=1_000_000)
    LOGIN_ATTEMPTS: int = Field(10, ge=1, le=1_000_000)  # per minute and account
    MAX_UNSENT_BYTES: int = Field(262_144, ge=1_024, le=1 << 30)  # per connection

    @field_validator("ORIGIN")
    @classmethod
    def as_browsers_send_it(cls, origin: str) -> str:
        """Normalize: browsers send lower case, no default port, and no path."""
        url = URL(origin)
        if origin and (url.scheme not in {"http", "https"} or url.path_qs != "/"):
            raise ValueError("must be like https://chat.example, without a path")
        return str(url.origin()) if origin else ""

    @field_validator("SECRET_KEY")
    @classmethod
    def shared_by_all_processes(cls, key: str, info) -> str:
        # `info.data` has the fields above this one: MONGO_HOST must stand there.
        if info.data.get("MONGO_HOST") and not key:
            raise ValueError("must be set with MONGO_HOST, to any text hard to guess")
        return key


class CannotStart(Exception):
    """The chat cannot start; the text says why, in one line."""


# `app[KEY]` holds what the application shares; `request[KEY]`, what one request needs.
# The keys are typed, so your editor knows what type a lookup returns.
SETTINGS = web.AppKey("settings", Settings)
DATABASE = web.AppKey("database", "Database")
ROOM = web.AppKey("room", "Room")
THROTTLE = web.AppKey("throttle", Callable)
HASHING = web.AppKey("hashing", asyncio.Lock)
STOP = web.AppKey("stop", Callable)
DB = web.RequestKey("db", "Database")
USER = web.RequestKey("user", dict)


# ------------------------------------------------------------------------------
# 2. Middlewares
#
# A middleware wraps every handler. `init_app` lists them, outermost first. Beyond the
# article: `own_origin`. A browser sends our cookie with every request to us, even if
# another site's page makes the request. So the cookie alone doesn't show who made it.
# ------------------------------------------------------------------------------
PUBLIC = {"login", "signin", "static"}


@web.middleware
async def own_origin(request: web.Request, handler) -> web.StreamResponse:
    """Reject requests for another host (421) and from another site's page (403).

    Otherwise another site's page could post our forms with the visitor's cookie (CSRF).
    It could also read our WebSocket, because the same-origin policy does not apply to
    WebSockets. Browsers send Origin with both. A client that sends none isn't a
    browser, so it carries no victim's cookie. With ORIGIN, a proxy may rewrite Host.
    """
    own, origin = request.app[SETTINGS].ORIGIN, request.headers.get("Origin")
    if not own:
        # DNS rebinding: an attacker can point their own name at 127.0.0.1, and then
        # their page has our origin. They cannot redirect `localhost` or an IP address.
        own, origin = request.host, origin and origin.partition("://")[2]
        if not is_local(own):
            log.warning("Host %r is not a local address; set ORIGIN", own)
            text = "The chat does not know this address. To allow it, set ORIGIN."
            raise web.HTTPMisdirectedRequest(text=text)
    changes = request.method not in {"GET", "HEAD", "OPTIONS"}
    is_socket = request.match_info.route.name == "chat"
    if (changes or is_socket) and origin not in {None, own}:
        log.warning("Origin %r is not %r; see the setting ORIGIN", origin, own)
        raise web.HTTPForbidden(text="This request came from another site.")
    return await handler(request)


def is_local(host: str) -> bool:
    """Tell whether a Host header is `localhost` or an IP address, with any port."""
    try:
        name = URL.build(scheme="http", authority=host).host or ""
        return name == "localhost" or ipaddress.ip_address(name) is not None
    except ValueError:
        return False


@web.middleware
async def db_handler(request: web.Request, handler) -> web.StreamResponse:
    """Give the request its database, and turn an outage into a 503."""
    request[DB] = request.app[DATABASE]
    try:
        return await handler(request)
    except DATABASE_ERRORS as error:
        log.warning("The database failed for %s: %s", request.path, reason(error))
        raise web.HTTPServiceUnavailable(
            text="The database does not answer. Please try again in a moment.",
            headers={"Retry-After": "5"},
        ) from None


@web.middleware
async def authorize(request: web.Request, handler) -> web.StreamResponse:
    """Admit requests with a valid session; redirect the others to the login.

    Routes, not path prefixes, decide which pages are public: a new page is private
    until you list it. An unknown URL is a 404 for everyone.
    """
    route = request.match_info.route
    if request.match_info.http_exception or route.name == "static":
        return await handler(request)
    request[USER] = await session_user(request)
    if not request[USER] and route.name not in PUBLIC:
        login = path_for(request, "login")
        page, _, _ = request.headers.get("Referer", "").partition("?")
        if page.endswith((login, path_for(request, "signin"))):
            login += "?why=cookie"  # just signed in: the browser kept no cookie
        raise web.HTTPSeeOther(login)
    return await handler(request)


async def session_user(request: web.Request) -> dict | None:
    """Return the session's user, or None.

    Look the user up on every request, so that a deleted account's cookie is worthless.
    Treat an unreadable cookie as none: a client may send any bytes.
    """
    try:
        user_id = (await get_session(request)).get("user")
        return user_id and await User(request[DB]).get(ObjectId(user_id))
    except (ValueError, TypeError, InvalidId):
        await new_session(request)
        return None


def path_for(request: web.Request, name: str) -> str:
    return str(request.app.router[name].url_for())


# ------------------------------------------------------------------------------
# 3. Database and models
#
# We talk to MongoDB through Motor; without a MongoDB, mongomock-motor answers the same
# calls in memory. Handlers never query; models do.
#
# Beyond the article: the database also notifies us. Each write comes back as a change,
# in a stream that is the same for all processes. Each room listens to this stream and
# not to its own handlers. So any number of processes act as one chat.
#
# Motor's successor is PyMongo's AsyncMongoClient; mongomock-motor cannot stand in for
# it yet. Only this section would change: the client, and `await db.watch(…)`.
# ------------------------------------------------------------------------------
DEADLINE = 5  # the longest wait for the database or for a form, in seconds
HISTORY_SIZE = 1_000  # newest messages kept by each process
DATABASE_ERRORS = (PyMongoError, TimeoutError)
Change = tuple[str, object, dict | None]  # collection, _id, document (None: deleted)


async def with_deadline(query: Awaitable):
    """Await a query for at most DEADLINE seconds. Raises DATABASE_ERRORS."""
    async with asyncio.timeout(DEADLINE):
        return await query


def reason(error: BaseException) -> str:
    """Say briefly what is wrong, without the password that a URI may contain."""
    details = getattr(error, "details", None) or {}
    return details.get("errmsg") or type(error).__name__


class StreamBroken(PyMongoError):
    """Changes may be missing, whatever the cause.

    One repair covers every cause: reopen the stream, reread the database, and follow
    again. `Follower.follow` does it.
    """


class Database:
    """The collections, and the stream of changes that all processes share."""

    shared = True  # other processes may use it at the same time

    def __init__(self, mongo) -> None:
        self.mongo = mongo  # Motor's database
        self.users, self.messages = mongo.users, mongo.messages
        self.processes = mongo.processes
        self.archives = [self.messages]  # where to look for messages, newest first

    async def write(self, query: Awaitable, change: Change):
        """Await a write. MongoDB itself notifies every process of the change."""
        return await query

    @asynccontextmanager
    async def changes(self) -> AsyncIterator[AsyncIterator[Change]]:
        """Open the stream; then yield its changes, in order. Raises DATABASE_ERRORS.

        Open before reading: the stream has every write from now on. So no write
        falls between the caller's next read and the stream. After a failover, the
        driver resumes where the stream was.
        """
        watch = self.mongo.watch(PIPELINE, full_document="updateLookup")
        async with watch as stream:
            try:  # each time: a restore may have removed the indexes
                await self.create_indexes()
            except OperationFailure as error:  # without an index, no message is lost
                log.error("An index could not be created: %s", reason(error))
            yield (as_change(change) async for change in stream)

    async def create_indexes(self) -> None:
        """Let the database decide who owns a name: only it sees every sign-up."""
        await self.create_unique_index(self.users, "name_key")
        await self.create_unique_index(self.users, "email_key")
        await self.create_unique_index(self.messages, "user_id", "nonce")
        # Entries not renewed for 45 s belong to a dead process.
        await self.processes.create_index("seen", expireAfterSeconds=45)

    async def create_unique_index(self, collection, *fields: str) -> None:
        """Create a unique index that ignores foreign documents."""
        with suppress(OperationFailure):  # drop the first edition's, which did not
            await collection.drop_index("_".join(f"{name}_1" for name in fields))
        options = {"name": f"unique {fields[-1]}", "unique": True}
        options["partialFilterExpression"] = {fields[-1]: {"$type": "string"}}
        await collection.create_index([(name, 1) for name in fields], **options)


# Ask only for changes that the room needs. Leave out new users, because their documents
# hold password hashes. Leave out updates that only renew a process's `seen`.
PIPELINE = [{"$match": {"$or": [
    {"ns.coll": "messages", "operationType": {"$in": ["insert", "update", "replace"]}},
    {"ns.coll": "processes", "operationType": {"$in": ["insert", "replace", "delete"]}},
    {"ns.coll": "processes", "updateDescription.updatedFields.names": {"$ne": None}},
    {"ns.coll": "users", "operationType": "delete"},
    {"operationType": {"$in": ["drop", "rename", "dropDatabase", "invalidate"]}},
]}}]  # fmt: skip


def as_change(change: dict) -> Change:
    """Convert MongoDB's change event to a Change. Raises StreamBroken.

    Dropping a collection (`mongorestore --drop`) does not end the stream, so end it.
    """
    if "documentKey" not in change:
        raise StreamBroken(f"{change['operationType']} of a collection")
    document = change.get("fullDocument")  # None if it has been deleted since
    return change["ns"]["coll"], change["documentKey"]["_id"], document


class LocalDatabase(Database):
    """A database without a stream of changes: a single process notifies itself."""

    shared = False

    def __init__(self, mongo) -> None:
        super().__init__(mongo)
        self.queue = asyncio.Queue()

    async def write(self, query: Awaitable, change: Change):
        """Await a write and notify ourselves of the change.

        A failed write may have happened, or may yet happen. So break the stream.
        """
        try:
            result = await query
        except BaseException:  # a deadline cancels: CancelledError is not an Exception
            self.queue.put_nowait(StreamBroken("A write failed"))
            raise
        self.queue.put_nowait(change)
        return result

    @asynccontextmanager
    async def changes(self) -> AsyncIterator[AsyncIterator[Change]]:
        self.queue = asyncio.Queue()
        await self.create_indexes()
        yield self.read(self.queue)

    async def read(self, queue: asyncio.Queue) -> AsyncIterator[Change]:
        while True:
            change = await queue.get()
            if isinstance(change, StreamBroken):
                raise change
            yield change


class MemoryDatabase(LocalDatabase):
    """A database in memory, which keeps the newest 1,000 to 2,000 messages."""

    def __init__(self, mongo) -> None:
        super().__init__(mongo)
        self.archives.append(mongo.older)

    async def write(self, query: Awaitable, change: Change):
        """Await a write. At each multiple of HISTORY_SIZE, drop the older messages.

        Rename the collection instead of deleting: mongomock takes 23 µs per document.
        """
        result = await super().write(query, change)
        collection, number, _ = change
        full = collection == "messages" and number % HISTORY_SIZE == 0
        if full and await self.messages.find_one({"_id": number}):  # new, not blanked
            await self.messages.rename("older", dropTarget=True)
        return result

    async def create_indexes(self) -> None:
        """Skip the index on messages: in one process, `receipts` recognizes a retry."""
        # Create them once: the second time, mongomock treats missing emails as equal.
        if "unique email_key" not in await self.users.index_information():
            await self.create_unique_index(self.users, "name_key")
            await self.create_unique_index(self.users, "email_key")


async def open_database(settings: Settings) -> Database:
    """Connect. Raises CannotStart, after 4 seconds at most."""
    if not settings.MONGO_HOST:
        print("MONGO_HOST is not set: accounts and messages live in memory only.")
        client = AsyncMongoMockClient(tz_aware=True)
        return MemoryDatabase(client[settings.MONGO_DB_NAME])
    uri, client = settings.MONGO_HOST, None
    try:
        client = AsyncIOMotorClient(uri, **CLIENT_OPTIONS)
        return await asyncio.wait_for(connect(client[settings.MONGO_DB_NAME]), 3.5)
    except (*DATABASE_ERRORS, ValueError) as error:
        problem = "must be a MongoDB URI, like mongodb://localhost:27017"
        if client:
            client.close()
            problem = f"cannot be used: {reason(error)}"
        uri = re.sub(r"//.*@", "//***@", uri).partition("?")[0]
        raise CannotStart(f"MONGO_HOST {uri!r} {problem}") from None


CLIENT_OPTIONS = {
    "tz_aware": True,
    # Report a write as stored only when a majority of members has it, and read only
    # such writes. Otherwise a failover could undo a number that later ones build on.
    "w": "majority",
    "readConcernLevel": "majority",
    "readPreference": "primary",
    # A foreign document must not fail to decode: it would end the stream for good.
    "datetime_conversion": "DATETIME_AUTO",
    "unicode_decode_error_handler": "replace",
    # Motor occupies a thread per query: free it once our own deadline has passed.
    "serverSelectionTimeoutMS": 3_000,
    "connectTimeoutMS": DEADLINE * 1_000,
    "socketTimeoutMS": DEADLINE * 1_000,
}


async def connect(mongo) -> Database:
    hello = await mongo.client.admin.command("hello")
    if hello.keys() & {"setName", "msg"}:  # a replica set or a sharded cluster
        db = Database(mongo)
    else:
        print(
            "MongoDB is standalone and sends no notifications: run one process only, "
            "and restart it after you edit the database. Better: use a replica set."
        )
        db = LocalDatabase(mongo)
    await db.create_indexes()  # here a conflict can still be reported and end the start
    return db


@dataclass
class Model:
    """Own the queries on one collection."""

    db: Database


def pass_over(collection: str, key) -> None:
    """Log that a document is not ours. It must have no other effect."""
    log.warning("Passed over a foreign document in %s: %.80r", collection, key)


# --- Users ---
def fold(text: str) -> str:
    """Make all spellings one: `Ann`, `ann` and wide `ａｎｎ` are the same user."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def hash_password(password: str) -> str:
    """Hash with Argon2id (RFC 9106), at OWASP's minimum: 19 MiB and two passes.

    That takes 20 to 40 ms of one core, on purpose. See `in_hash_thread`.
    """
    salt = os.urandom(16)
    argon2 = Argon2id(salt=salt, length=32, iterations=2, lanes=1, memory_cost=19_456)
    return argon2.derive_phc_encoded(password.encode())


def verify_password(password: str, password_hash: str) -> bool:
    try:
        Argon2id.verify_phc_encoded(password.encode(), password_hash)
    except (InvalidKey, ValueError):  # the wrong one, or no hash at all
        return False
    return True


class User(Model):
    """Query registered users: `_id`, `name`, `password` (a hash), optional `email`."""

    async def get(self, user_id: ObjectId) -> dict | None:
        """Return `_id` and `name` only: a connection keeps them for hours."""
        query = {"_id": user_id, "name": {"$type": "string"}}
        return await with_deadline(self.db.users.find_one(query, ["name"]))

    async def find(self, login: str) -> dict | None:
        """Find a user by name or email, in any spelling, with the password's hash."""
        query = {"email_key" if "@" in login else "name_key": fold(login)}
        user = await with_deadline(self.db.users.find_one(query))
        match user:
            case None | {"_id": ObjectId(), "password": str()}:
                return user
        return pass_over("users", user["_id"])

    async def create(self, name: str, email: str, password_hash: str) -> dict:
        """Store a new account. Raises DuplicateKeyError if name or email is taken."""
        user = {"_id": ObjectId(), "name": name, "name_key": fold(name)}
        if email:
            user |= {"email": email, "email_key": fold(email)}
        user["password"] = password_hash
        await with_deadline(self.db.users.insert_one(user))
        return user

    async def delete(self, user_id: ObjectId) -> None:
        """Delete an account. Its connections end, on every process."""
        query = self.db.users.delete_one({"_id": user_id})
        await with_deadline(self.db.write(query, ("users", user_id, None)))

    async def existing(self, user_ids: set[ObjectId]) -> set[ObjectId]:
        found = self.db.users.find({"_id": {"$in": list(user_ids)}}, ["_id"])
        return {user["_id"] for user in await with_deadline(found.to_list(None))}


# --- Messages ---
def is_message(document: dict) -> bool:
    """Tell our documents from foreign ones, such as `_id: 2.0`, which equals 2."""
    types = {"_id": int, "user_id": ObjectId, "user": str, "text": str, "nonce": str}
    types["time"] = datetime
    ours = all(isinstance(document.get(name), kind) for name, kind in types.items())
    # In Python, True and False are ints, too.
    return ours and not isinstance(document["_id"], bool) and document["_id"] > 0


class Message(Model):
    """Query messages. Their `_id` counts 1, 2, 3 … without gaps."""

    async def save(self, last: int, user: dict, text: str, nonce: str) -> int:
        """Store a message under the number after `last`, or a later one; return it.

        A process inserts n + 1 only after it has seen n. So the numbers have the order
        in which MongoDB wrote them, which is the order of the stream. If two writers
        collide, the unique `_id` lets one win, and the other tries the next number.

        A client retries a message that got no receipt. The retry is idempotent: the
        unique index on user and nonce rejects it. Then return the existing number.
        """
        number = last + 1
        while True:
            message = {"_id": number, "user_id": user["_id"], "user": user["name"]}
            message |= {"text": text, "time": datetime.now(UTC), "nonce": nonce}
            insert = self.db.messages.insert_one(message)
            try:
                await self.db.write(insert, ("messages", number, message))
                return number
            except DuplicateKeyError:
                sent = {"user_id": user["_id"], "nonce": nonce}
                if stored := await self.db.messages.find_one(sent):
                    return stored["_id"]
                newest = await self.newest(1)  # or a foreign document is in the way
                number = max([number, *(found["_id"] for found in newest)]) + 1

    async def newest(self, count: int, before: int = 1 << 53) -> list[dict]:
        """Return up to `count` messages with a number below `before`, oldest first."""
        query = {"_id": {"$gt": 0, "$lt": before}, "nonce": {"$type": "string"}}
        found: list[dict] = []
        for archive in self.db.archives:
            if len(found) < count:
                cursor = archive.find(query).sort("_id", -1).limit(count - len(found))
                found += await with_deadline(cursor.to_list(None))
        return [message for message in reversed(found) if is_message(message)]

    async def blank(self, number: int) -> None:
        """Remove a message's text and keep its number.

        Never delete a message: its number would leave a gap, or be assigned again.
        """
        for archive in self.db.archives:
            if found := await with_deadline(archive.find_one({"_id": number})):
                update = archive.update_one({"_id": number}, {"$set": {"text": ""}})
                change = "messages", number, found | {"text": ""}
                await with_deadline(self.db.write(update, change))

    async def look_for_foreign(self) -> None:
        """Log a foreign document, if one sorts after the newest message.

        In MongoDB's order of types, texts and ObjectIds come after all numbers.
        """
        found = self.db.messages.find().sort("_id", -1).limit(1)
        for document in await with_deadline(found.to_list(None)):
            if not is_message(document):
                pass_over("messages", document["_id"])


# --- Presence ---
class Presence(Model):
    """Query who is online: one document per process, with the names of its users.

    MongoDB stamps each document at every write, and removes it when the stamp is 45 s
    old. So only one clock counts.
    """

    async def write(self, process: ObjectId, names: list[str]) -> None:
        update = {"$set": {"names": names}, "$currentDate": {"seen": True}}
        query = self.db.processes.update_one({"_id": process}, update, upsert=True)
        await with_deadline(query)

    async def remove(self, process: ObjectId) -> None:
        await with_deadline(self.db.processes.delete_one({"_id": process}))

    async def entries(self) -> list[dict]:
        return await with_deadline(self.db.processes.find().to_list(None))


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
HASH_WAIT = 2.5  # the longest wait for the hash thread, in seconds
MALFORMED = (HttpProcessingError, web.RequestPayloadError)
WHY = {
    "cookie": "Your browser did not keep the cookie that signs you in. Allow cookies "
    "for this address, or open the chat in a window of its own.",
    "ended": "Your session has ended: you signed out in another tab, it expired, or "
    "the account is gone.",
}

# Characters that end a web address: brackets, quotes, spaces, controls, typographic and
# East Asian punctuation. Brackets may enclose a part. The two branches of LINK never
# match the same character, so no text can make it backtrack exponentially (ReDoS).
ENDS = r"()\s\x00-\x20\x7f-\xa0\u2000-\u206f\u3000-\u303f\ufeff\uff01-\uff0f<>\x22\x60"
LINK = re.compile(rf"([Hh]ttps?://(?:[^{ENDS}]|\([^{ENDS}]*\))+(?<![.,:;!?'*_~|\]»]))")
ANCHOR = '<a href="{0}" target="_blank" rel="noopener noreferrer nofollow">{0}</a>'


def links(text: str) -> Markup:
    """Escape a text as HTML and turn web addresses into links, as chat.js does."""
    parts = LINK.split(text)  # odd parts are addresses; Markup escapes every part
    parts[1::2] = [Markup(ANCHOR).format(address) for address in parts[1::2]]
    return Markup().join(parts)


class TokenBucket:
    """Let `burst` through at once, after that `rate` per second."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self.tokens, self.time = float(burst), time.monotonic()

    def take(self) -> float:
        """Take a token and return 0, or return the seconds until the next one."""
        now = time.monotonic()
        self.tokens += (now - self.time) * self.rate
        self.tokens, self.time = min(self.tokens, self.burst), now
        if self.tokens < 1:
            return (1 - self.tokens) / self.rate
        self.tokens -= 1
        return 0


def make_buckets(rate: float, burst: int) -> Callable:
    """Return a function that gives each key its bucket, the same one each time."""

    @functools.lru_cache(maxsize=10_000)  # the least recently used is forgotten
    def bucket(*key) -> TokenBucket:
        return TokenBucket(rate, burst)

    return bucket


class Page(web.View):
    """A page answers HEAD wherever it answers GET (RFC 9110, 9.1)."""

    async def head(self) -> web.StreamResponse:
        return await self.get()


class ChatList(Page):
    """Show the newest messages, or with `?before=17` those before number 17."""

    @aiohttp_jinja2.template("chat.html")
    async def get(self) -> dict:
        before = read_number(self.request, "before")
        messages = self.request.app[ROOM].history.newest(PAGE, before)
        if before is not None and len(messages) < PAGE:  # older than what we keep
            found = await Message(self.request[DB]).newest(PAGE, before)
            messages = [to_event(message) for message in found]
        return {
            "user": self.request[USER]["name"],
            "messages": messages,
            "live": before is None,
            "older": messages and messages[0]["id"] > 1 and messages[0]["id"],
            "max_length": self.request.app[SETTINGS].MAX_MESSAGE_LENGTH,
        }


def read_number(request: web.Request, name: str) -> int | None:
    """Read a message number from the query string. Raises HTTPBadRequest."""
    text = request.query.get(name)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,15}", text):  # what JavaScript and MongoDB can hold
        raise web.HTTPBadRequest(text=f"{name} must be the number of a message.")
    return int(text)


class FormError(Exception):
    """What is wrong with a form: a sentence per field, a status, seconds to wait."""

    def __init__(self, errors: dict[str, str], status=422, retry_after=0) -> None:
        self.errors, self.status = errors, status
        self.headers = {"Retry-After": str(retry_after)} if retry_after else {}


class Form(Page):
    """Show a form, read it, and sign in the user that `submit` returns.

    Subclasses define `template` and `submit`, which may raise FormError.
    """

    async def get(self) -> web.Response:
        if self.request[USER]:
            raise web.HTTPSeeOther(path_for(self.request, "main"))
        return self.page({}, FormError({}, status=200))

    async def post(self) -> web.Response:
        form, errors = await read_form(self.request)
        try:
            if errors:
                raise FormError(errors)
            user = await self.submit(form)
        except FormError as error:
            return self.page(form, error)
        session = await new_session(self.request)
        session["user"] = str(user["_id"])  # an id is never reused; a name may be
        raise web.HTTPSeeOther(path_for(self.request, "main"))

    def page(self, form: dict[str, str], error: FormError) -> web.Response:
        why = WHY.get(self.request.query.get("why"))
        context = {"form": form, "errors": error.errors, "why": why}
        page = aiohttp_jinja2.render_template(
            self.template, self.request, context, status=error.status
        )
        page.headers.update(error.headers)
        return page

    async def authenticate(self, form: dict[str, str]) -> dict | None:
        """Return the user with this login and password, or None. Raises FormError.

        Count attempts per account and not per spelling: all spellings share one limit.
        Hash even when no user matches, or response times would reveal existing names.
        """
        user = await User(self.request[DB]).find(form["login"])
        # Truncate: `fold` can turn 1 character into 18, and the throttle stores them.
        self.throttle(user["_id"] if user else fold(form["login"])[:LONGEST_FIELD])
        if user is None:
            await self.in_hash_thread(hash_password, form["password"])
            return None
        arguments = form["password"], user["password"]
        return user if await self.in_hash_thread(verify_password, *arguments) else None

    def throttle(self, account) -> None:
        """Count an attempt. Raises FormError (429) after too many.

        Known limit: behind a proxy, all clients have one address. Then a stranger can
        use up the attempts on an account, and its owner has to wait.
        """
        key = network(self.request.remote or ""), account
        if wait := self.request.app[THROTTLE](*key).take():
            seconds = int(wait) + 1
            sentence = f"Too many attempts. Try again in {seconds} seconds."
            raise FormError({"login": sentence}, 429, seconds)

    async def in_hash_thread(self, function: Callable, *arguments):
        """Hash in a dedicated thread: a crowd that signs in hardly delays messages.

        Wait for a turn at most HASH_WAIT, then raise FormError (503). A hash that has
        begun is finished. Don't begin one for a client that has hung up meanwhile.
        """
        loop, turn = asyncio.get_running_loop(), self.request.app[HASHING]
        try:
            async with asyncio.timeout(HASH_WAIT) as waiting, turn:
                waiting.reschedule(None)  # its turn has come in time
                if self.request.transport is None:
                    raise TimeoutError
                return await loop.run_in_executor(HASH_THREAD, function, *arguments)
        except TimeoutError:
            sentence = "Too many people are signing in. Try again in a few seconds."
            raise FormError({"login": sentence}, 503, retry_after=3) from None


# Lower the thread's priority, so that hashing yields to messages. Only Linux has
# niceness per thread; elsewhere it would slow the whole process.
NICE = {"initializer": os.nice, "initargs": (10,)} if sys.platform == "linux" else {}
HASH_THREAD = ThreadPoolExecutor(max_workers=1, **NICE)


def network(address: str) -> str:
    """Return the network to throttle: one client may own 2**64 IPv6 addresses (/64)."""
    if ":" not in address:
        return address
    return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))


async def read_form(request: web.Request) -> tuple[dict[str, str], dict[str, str]]:
    """Return the text of each field, and a sentence for each that is too long.

    Normalize here, once: the same letters can be encoded in several ways (NFC, NFD).
    Check lengths first: to normalize 16 KB of combining marks takes 112 ms. Raises
    HTTPBadRequest, and HTTPRequestTimeout if it takes longer than DEADLINE.
    """
    try:
        if request.content_type != "application/x-www-form-urlencoded":
            raise ValueError(request.content_type)
        if (request.charset or "utf-8").lower() != "utf-8":  # others may be slow
            raise ValueError(request.charset)
        data = await with_deadline(request.post())
    except TimeoutError:
        raise web.HTTPRequestTimeout(text="The form took too long.") from None
    except (ValueError, *MALFORMED):
        raise web.HTTPBadRequest(text="The form could not be read.") from None
    form, errors = {}, {}
    for name in ("login", "email", "password", "password2"):
        form[name] = data.get(name, "")
        if len(form[name]) > LONGEST_FIELD:
            form[name] = ""
            errors[name] = f"This field takes at most {LONGEST_FIELD} characters."
        form[name] = unicodedata.normalize("NFC", form[name])
    return form | {name: form[name].strip() for name in ("login", "email")}, errors


class Login(Form):
    """Sign in with a name or an email, and the password."""

    template = "login.html"

    async def submit(self, form: dict[str, str]) -> dict:
        if user := await self.authenticate(form):
            return user
        sentence = "No account has this name or email and this password."
        raise FormError({"login": sentence})


class SignIn(Form):
    """Create an account. The name of this page is the article's."""

    template = "signin.html"

    async def submit(self, form: dict[str, str]) -> dict:
        if errors := dict(find_errors(form)):
            raise FormError(errors)
        users, name = User(self.request[DB]), USERNAME.enforce(form["login"])
        self.throttle(fold(name))
        password_hash = await self.in_hash_thread(hash_password, form["password"])
        try:
            return await users.create(name, form["email"], password_hash)
        except DuplicateKeyError as error:
            if user := await self.second_click(form):
                return user
            index = error.details.get("keyPattern") or str(error)
            taken = "email" if "email_key" in index else "login"
            raise FormError({taken: "Another user has this already."}) from None

    async def second_click(self, form: dict[str, str]) -> dict | None:
        """Return the user that the same form created a moment ago, or None.

        A double click sends it twice. Check the password as for signing in, with the
        same limit: otherwise signing up would be a way to guess passwords.
        """
        user = await User(self.request[DB]).find(form["login"])
        a_minute_ago = ObjectId.from_datetime(datetime.now(UTC) - timedelta(minutes=1))
        if user and user["_id"] > a_minute_ago:
            return await self.authenticate(form)
        return None


# RFC 8265: no invisible letters, compatibility forms or mixed directions.
USERNAME = get_profile("UsernameCasePreserved")


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
    try:
        name = USERNAME.enforce(text)
    except UnicodeEncodeError:  # how the library rejects a name
        return False
    kinds = ("L" if c in "_-" else unicodedata.category(c)[0] for c in name)
    return bool(re.fullmatch(r"(?!M|.*MMM)[LMN]{3,32}", "".join(kinds)))


class SignOut(web.View):
    """End this browser's session.

    Known limit: cookies on other devices, and copies of this one, stay valid.
    """

    async def post(self) -> web.Response:
        (await get_session(self.request)).invalidate()
        raise web.HTTPSeeOther(path_for(self.request, "login"))


# ------------------------------------------------------------------------------
# 5. WebSocket
#
# One message, from key to screen:
#
#  browser            process A             MongoDB             process B    browser
#    │ message, nonce ──▶ │ insert number n+1 ──▶ │                   │           │
#    │ ◀──── receipt, n+1 │ ◀──────────────────── │                   │           │
#    │                    │ ◀────── change ────── │ ───── change ───▶ │           │
#    │ ◀──── message, n+1 │ broadcast             │         broadcast │ ────────▶ │
#
# 1. A process inserts n + 1 only after it has seen n. So numbers have no gaps, and
#    their order is the order of the stream, on every process.
# 2. A message is broadcast only when it comes back as a change. So you never see what
#    is not stored.
# 3. If no receipt comes, the client retries with the same nonce. The retry is
#    idempotent: the message is stored once.
# 4. A client that reconnects sends the last number it has. The server replays the
#    messages after it. A client that counts can detect any gap.
#
# Beyond the article: all four, and limits on what one user can send and open.
# ------------------------------------------------------------------------------
PING = 30  # seconds between pings; without a pong within 15, we disconnect
HEARTBEAT = 20  # seconds between events that show a page that it is connected
GRACE = 2  # seconds a name stays online after it has gone: time to reload
PAUSE = 0.5  # shortest time between two presence writes, in seconds
RENEWAL = 15  # longest time between two presence writes, in seconds
# Turns of the event loop from a batch's first frame to its flush. Measured: with one
# turn, a delivery under load costs 45 % more; a timer of 1 ms adds 1.4 ms to a message.
TURNS = 6

ERRORS = {
    "bad_event": "The server did not understand this.",
    "empty": "A message needs some text.",
    "too_long": "This message is too long.",
    "not_saved": "The message could not be saved yet. The page keeps trying.",
}


def to_event(message: dict) -> dict:
    """Make the event of a stored message."""
    event = {"type": "message", "id": message["_id"], "user": message["user"]}
    moment = message["time"].isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return event | {"text": message["text"], "time": moment, "nonce": message["nonce"]}


# Create one encoder: with options, `json.dumps` would create one per call.
to_json = json.JSONEncoder(ensure_ascii=False).encode


def encode_frame(event: dict) -> bytes:
    """Encode an event as a complete text frame (RFC 6455, 5.2).

    Servers don't mask frames, so the same bytes serve every connection.
    """
    # Half a surrogate pair, in a nonce that we give back, becomes JSON's `\ud800`.
    payload = to_json(event).encode(errors="backslashreplace")
    length = len(payload)
    if length < 126:
        return struct.pack("!BB", 0x81, length) + payload
    if length < 1 << 16:
        return struct.pack("!BBH", 0x81, 126, length) + payload
    return struct.pack("!BBQ", 0x81, 127, length) + payload


class History:
    """The newest messages, as events by number, without a gap; and their receipts."""

    def __init__(self) -> None:
        self.events: dict[int, dict] = {}
        self.receipts: dict[tuple[ObjectId, str], int] = {}  # by user and nonce
        self.last_broadcast = 0  # the newest number that came back as a change
        self.last_stored = 0  # the newest number known to be stored; it may be ahead

    def load(self, messages: list[dict]) -> list[dict]:
        """Replace the history with what is stored, and return the events that differ.

        A number is missing if a foreign document has it, or if an operator deleted the
        message. Show it as a removed message, so that no page ever sees a gap.
        """
        known, self.events = self.events, {}
        stored = {message["_id"]: to_event(message) for message in messages}
        first, last = min(stored, default=1), max(stored, default=0)
        event = stored.get(first)
        for number in range(max(first, last - HISTORY_SIZE + 1), last + 1):
            blank = {"id": number, "user": "", "text": "", "nonce": ""}
            event = stored.get(number) or event | blank  # with the time of the last one
            self.events[number] = event
        self.receipts = {(m["user_id"], m["nonce"]): m["_id"] for m in messages}
        self.last_broadcast = self.last_stored = last
        return [e for number, e in self.events.items() if known.get(number) != e]

    def add(self, message: dict) -> dict | None:
        """Add a message from the stream. Return its event, or None if it is known.

        Usually it has the next number. A lower number is known, or its message has been
        blanked. A higher number means that we missed a change: raises StreamBroken.
        """
        event, number = to_event(message), message["_id"]
        if number > self.last_broadcast + 1:
            raise StreamBroken(f"{number} came after {self.last_broadcast}")
        if self.events.get(number) == event:
            return None
        if number > self.last_broadcast:
            self.last_broadcast = number
            self.events.pop(number - HISTORY_SIZE, None)
            self.remember(message["user_id"], event["nonce"], number)
        if number > self.last_broadcast - HISTORY_SIZE:
            self.events[number] = event  # a new one, or one that an operator took back
        return event

    def newest(self, count: int, before: int | None = None) -> list[dict]:
        """Return up to `count` events with a number below `before`, oldest first."""
        numbers = [n for n in self.events if before is None or n < before]
        return [self.events[number] for number in numbers[-count:]]

    def remember(self, user_id: ObjectId, nonce: str, number: int) -> None:
        self.last_stored = max(self.last_stored, number)
        self.receipts[user_id, nonce] = number
        if len(self.receipts) > HISTORY_SIZE:
            del self.receipts[next(iter(self.receipts))]  # the oldest


class Online:
    """Track who is online: the union of the names that all processes have written.

    A name that has gone counts for GRACE seconds more. This one rule covers a reload, a
    move to another process, a restart, and an outage.
    """

    def __init__(self) -> None:
        self.processes: dict[object, set[str]] = {}
        self.names: set[str] = set()  # announced as online
        self.missing: dict[str, float] = {}  # those that no process has, and since when

    def changes(self) -> list[dict]:
        """Compare the union with what was announced; return `joined` and `left`."""
        now, present = time.monotonic(), set().union(*self.processes.values())
        joined = sorted(present - self.names)
        since = {name: self.missing.get(name, now) for name in self.names - present}
        left = sorted(name for name, then in since.items() if now - then >= GRACE)
        self.missing = {name: since[name] for name in since.keys() - set(left)}
        self.names = present | self.missing.keys()
        events = [{"type": "joined", "user": name} for name in joined]
        return events + [{"type": "left", "user": name} for name in left]


@dataclass(eq=False, slots=True)
class Connection:
    """One open WebSocket of a user. Broadcasts reach it once it is live."""

    ws: web.WebSocketResponse
    transport: asyncio.Transport
    user: dict
    live: bool = False

    def write(self, frames: bytes, limit: int) -> None:
        """Write without waiting for the reader.

        Unsent bytes pile up in this process. Above `limit`, disconnect the reader: when
        it reconnects, the replay sends what it missed.
        """
        if self.transport.get_write_buffer_size() > limit:
            self.transport.abort()
        elif not (self.ws.closed or self.transport.is_closing()):
            self.transport.write(frames)  # nothing may follow a close frame


class Room:
    """The connections of this process, and what they need to know."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self.db, self.settings = db, settings
        self.history, self.online = History(), Online()
        # A dictionary keeps the order of arrival; a set does not. Writing to 4,000
        # readers in this order takes 13 % less time.
        self.connections: dict[Connection, None] = {}
        self.deleted: set[ObjectId] = set()  # accounts deleted within DEADLINE
        self.bucket = make_buckets(settings.MESSAGES_PER_SECOND, settings.MESSAGE_BURST)
        self.saving = asyncio.Lock()
        self.frames: list[bytes] = []  # waiting for the next flush

    # --- Entering and leaving ---
    def register(self, connection: Connection) -> None:
        """Add a connection before its handshake, so that it counts toward the limit.

        Don't await between counting and adding, or two handshakes could both take the
        last free place. Raises HTTPTooManyRequests or HTTPForbidden.
        """
        user_id, limit = connection.user["_id"], self.settings.CONNECTIONS_PER_PERSON
        if user_id in self.deleted:
            raise web.HTTPForbidden(text="This account has been deleted.")
        if len(self.of(user_id)) >= limit:
            text = f"You have {limit} windows of the chat open. Please close one."
            raise web.HTTPTooManyRequests(text=text, headers={"Retry-After": "5"})
        self.connections[connection] = None

    def of(self, user_id: ObjectId) -> list[Connection]:
        return [c for c in self.connections if c.user["_id"] == user_id]

    def join(self, connection: Connection) -> None:
        """Make a connection live and welcome it.

        Don't await between the end of the replay and `live`, or this connection would
        miss broadcasts. Flush first: what waits in `frames` was in the replay, and
        would come twice. Then send removed messages again: one may have been removed
        after its replay.
        """
        self.flush()
        connection.live = True
        removed = [event for event in self.history.events.values() if not event["text"]]
        name, last = connection.user["name"], self.history.last_broadcast
        online = sorted(self.online.names | {name})
        welcome = {"type": "welcome", "user": name, "online": online, "last": last}
        self.send(connection, *removed, welcome)

    def leave(self, connection: Connection) -> None:
        self.connections.pop(connection, None)

    def names(self) -> list[str]:
        return sorted({c.user["name"] for c in self.connections if c.live})

    # --- Messages in ---
    async def post(self, user: dict, text: str, nonce: str) -> int:
        """Store a message and return its number. A retry returns the same number.

        After DATABASE_ERRORS, the message may or may not be stored. The client finds
        out when it retries with the same nonce.
        """
        history = self.history
        async with self.saving:  # two inserts would race for the same number
            if number := history.receipts.get((user["_id"], nonce)):
                return number
            number = await Message(self.db).save(history.last_stored, user, text, nonce)
            # Remember it before the broadcast: the sender may repeat it before that.
            history.remember(user["_id"], nonce, number)
            return number

    # --- Events out ---
    def send(self, connection: Connection, *events: dict) -> None:
        frames = b"".join(map(encode_frame, events))
        connection.write(frames, self.settings.MAX_UNSENT_BYTES)

    def broadcast(self, event: dict) -> None:
        """Queue an event for all live connections, without waiting for any of them.

        A write is a system call, and costs most of the 4 µs that a delivery takes. So
        encode the frame once for all readers, and hold it for TURNS turns of the event
        loop. Frames that arrive meanwhile are sent with it: one write per connection.
        """
        self.frames.append(encode_frame(event))
        if len(self.frames) == 1:
            self.flush_in(TURNS)

    def flush_in(self, turns: int) -> None:
        later = asyncio.get_running_loop().call_soon
        later(self.flush_in, turns - 1) if turns else self.flush()

    def flush(self) -> None:
        frames, limit = b"".join(self.frames), self.settings.MAX_UNSENT_BYTES
        self.frames.clear()
        # `abort` only schedules the disconnect, so nothing is removed meanwhile.
        for connection in self.connections if frames else ():
            if connection.live:
                connection.write(frames, limit)


async def close(connections: list[Connection], code: int) -> None:
    """Close connections concurrently, with a close code.

    Don't drain (wait until everything is sent): a stalled reader would block us. A
    reader has a second (`timeout`) to confirm. Then drop what is unsent. A connection
    that is still in its handshake cannot send a close frame; it is aborted.
    """
    closing = [c.ws.close(code=code, drain=False) for c in connections]
    await asyncio.gather(*closing, return_exceptions=True)
    for connection in connections:
        connection.transport.abort()


class Follower:
    """Follow the database and inform the room.

    No message is broadcast any other way, so all processes broadcast the same.
    """

    def __init__(self, room: Room) -> None:
        self.room, self.db, self.presence = room, room.db, Presence(room.db)
        self.process = ObjectId()
        self.written: list[str] | None = None  # the names in our presence document
        self.caught_up = asyncio.Event()
        self.expelling: set[asyncio.Task] = set()

    async def follow(self) -> None:
        """Turn changes into broadcasts, for as long as the application runs.

        After a database error, reopen the stream, reread, and follow. The first retry
        is immediate; later ones are a second apart, until a change arrives.
        """
        pause = 0
        while True:
            try:
                async with self.db.changes() as changes:
                    await self.catch_up()
                    async for change in changes:
                        self.apply(*change)
                        pause = 0
            except DATABASE_ERRORS as error:
                log.warning("The stream of changes broke: %s", reason(error))
            await asyncio.sleep(pause)
            pause = 1

    async def catch_up(self) -> None:
        """Read what was written before the stream was open, and broadcast what differs.

        A write during this read comes again in the stream. `History.add` then skips it,
        because it knows the number.
        """
        messages, room = Message(self.db), self.room
        for event in room.history.load(await messages.newest(HISTORY_SIZE)):
            room.broadcast(event)
        await messages.look_for_foreign()
        user_ids = {connection.user["_id"] for connection in room.connections}
        for user_id in user_ids - await User(self.db).existing(user_ids):
            self.expel(user_id)
        entries = await self.presence.entries()
        room.online.processes.clear()  # GRACE covers the moment until all are back
        for entry in entries:
            self.apply("processes", entry["_id"], entry)
        self.written = None  # ours may be missing there
        self.caught_up.set()

    def apply(self, collection: str, key, document: dict | None) -> None:
        match collection, key:
            case "messages", int() if document and is_message(document):
                if event := self.room.history.add(document):
                    self.room.broadcast(event)
            case "processes", ObjectId():
                self.hear_names(key, document)
            case "users", ObjectId() if document is None:
                self.expel(key)
            case _:
                pass_over(collection, key)

    def expel(self, user_id: ObjectId) -> None:
        """End the connections of a deleted account, even if they are still opening."""
        deleted, connections = self.room.deleted, self.room.of(user_id)
        deleted.add(user_id)
        # For DEADLINE, a request may still hold a user read before the deletion. Then
        # forget the id: a restore of the database may bring the account back.
        asyncio.get_running_loop().call_later(DEADLINE, deleted.discard, user_id)
        task = asyncio.create_task(close(connections, WSCloseCode.POLICY_VIOLATION))
        self.expelling.add(task)  # or it could be garbage-collected too soon
        task.add_done_callback(self.expelling.discard)

    # --- Presence ---
    def hear_names(self, process: ObjectId, entry: dict | None) -> None:
        """Update a process's names. `entry` is None if its document is gone."""
        names = entry.get("names") if entry else []
        if process == self.process and names != self.room.names():
            self.written = None  # gone, or overwritten by a late write: rewrite it
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            return pass_over("processes", process)
        self.room.online.processes[process] = set(names)
        return self.announce()

    def announce(self) -> None:
        """Tell who has come, and who has been gone for GRACE seconds."""
        self.room.online.processes[self.process] = set(self.room.names())
        for event in self.room.online.changes():
            self.room.broadcast(event)


async def keep_presence(follower: Follower) -> None:
    """Announce who joined and who left; write our users' names, and renew them.

    Write at most every PAUSE seconds, not per connection: then a crowd that joins costs
    a single write.
    """
    room, renewed = follower.room, 0.0
    while True:
        follower.announce()
        names, now = room.names(), time.monotonic()
        if room.db.shared and (names != follower.written or now - renewed > RENEWAL):
            try:
                await follower.presence.write(follower.process, names)
                follower.written, renewed = names, now
            except DATABASE_ERRORS as error:  # the next round tries again
                log.warning("Presence could not be written: %s", reason(error))
        await asyncio.sleep(PAUSE)


async def keep_alive(room: Room) -> None:
    """Send heartbeats: proof that the connection works, and the newest number.

    WebSocket pings are not enough: browsers hide them from the page.
    """
    while True:
        await asyncio.sleep(HEARTBEAT)
        last = room.history.last_broadcast
        room.broadcast({"type": "heartbeat", "last": last})


class WebSocket(Page):
    """Replay missed messages, send the welcome, and receive until the socket closes."""

    async def get(self) -> web.WebSocketResponse:
        after, room = read_number(self.request, "after"), self.request.app[ROOM]
        ws = web.WebSocketResponse(
            heartbeat=PING,
            autoping=False,  # a client's ping costs a token, like any frame
            timeout=1,  # seconds that closing waits for the other side
            compress=False,  # a compressor per reader would halve the speed
            # A character may take 12 bytes: \uXXXX twice. A larger frame ends in 1009.
            max_msg_size=12 * room.settings.MAX_MESSAGE_LENGTH + 1_024,
        )
        connection = Connection(ws, self.request.transport, self.request[USER])
        room.register(connection)
        try:
            await ws.prepare(self.request)
            await self.replay(connection, after)
            room.join(connection)
            await self.receive(connection)
        except ConnectionError:
            pass  # the other side went while we sent
        finally:
            room.leave(connection)
        return ws

    async def replay(self, connection: Connection, after: int | None) -> None:
        """Send messages after a number until none is left, with backpressure.

        Copy the list: the history changes while we send. The outer loop sends the rest.
        """
        history = self.request.app[ROOM].history
        while after is not None and after < history.last_broadcast:
            for event in [e for number, e in history.events.items() if number > after]:
                await connection.ws.send_json(event)
                after = event["id"]

    async def receive(self, connection: Connection) -> None:
        """Read frames no faster than the limit allows: each costs its user one token.

        Limit by reading slowly: TCP then holds a faster sender back (backpressure). So
        no frame is rejected for coming too fast, and a flood delays only its sender.
        """
        room = self.request.app[ROOM]
        bucket = room.bucket(connection.user["_id"])
        async for frame in connection.ws:
            while wait := bucket.take():
                await asyncio.sleep(wait)
                if connection.transport.is_closing():  # the client has hung up
                    return
            match frame.type:
                case WSMsgType.TEXT | WSMsgType.BINARY:
                    reply = await self.answer(connection.user, read_event(frame))
                    room.send(connection, reply)
                case WSMsgType.PING:
                    await connection.ws.pong(frame.data)

    async def answer(self, user: dict, event: dict) -> dict:
        """Store a message and return its receipt, or else an error."""
        room = self.request.app[ROOM]
        if code := validate_event(event, room.settings.MAX_MESSAGE_LENGTH):
            return error_event(code, event)
        nonce = event["nonce"]
        try:
            number = await with_deadline(room.post(user, event["text"], nonce))
        except DATABASE_ERRORS as error:
            log.warning("A message was not saved: %s", reason(error))
            return error_event("not_saved", event)
        return {"type": "receipt", "nonce": nonce, "id": number}


def read_event(frame) -> dict:
    """Parse the JSON object in a text frame. Return {} for anything else."""
    try:
        event = json.loads(frame.data if frame.type is WSMsgType.TEXT else "")
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def validate_event(event: dict, max_length: int) -> str | None:
    """Return the error code for a client's event, or None if it is valid."""
    text, nonce = event.get("text"), event.get("nonce")
    if event.get("type") != "message" or not isinstance(text, str):
        return "bad_event"
    if not isinstance(nonce, str) or not 1 <= len(nonce) <= 64:
        return "bad_event"
    if len(text) > max_length:
        return "too_long"
    try:
        (text + nonce).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which cannot be stored
        return "bad_event"
    return "empty" if is_blank(text) else None


# These render as nothing, whatever Unicode calls them.
INVISIBLE = set("\u034f\u115f\u1160\u17b4\u17b5\u2065\u2800\u3164\uffa0")
INVISIBLE |= {chr(n) for n in (*range(0x180B, 0x1810), *range(0xFE00, 0xFE10))}
INVISIBLE |= {chr(n) for n in (*range(0xFFF0, 0xFFF9), *range(0xE0000, 0xE1000))}


def is_blank(text: str) -> bool:
    kinds = {"Cc", "Cf", "Zl", "Zp", "Zs"}
    return all(c in INVISIBLE or unicodedata.category(c) in kinds for c in text)


def error_event(code: str, event: dict) -> dict:
    """Make an error event. Its nonce, if any, tells which message failed."""
    nonce = {"nonce": event["nonce"]} if isinstance(event.get("nonce"), str) else {}
    return {"type": "error", "code": code, "text": ERRORS[code]} | nonce


# ------------------------------------------------------------------------------
# 6. Routes and static
#
# All routes are in one table: path, handler, name. The rest of the code refers to
# routes by name, so a path can change. Beyond the article: a Content-Security-Policy.
# ------------------------------------------------------------------------------
ROUTES = [
    ("/", ChatList, "main"),
    ("/ws", WebSocket, "chat"),
    ("/login", Login, "login"),
    ("/signin", SignIn, "signin"),
    ("/signout", SignOut, "signout"),
]


POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors "


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """Restrict scripts and styles to our own files, and framing to our own pages.

    Without ORIGIN, pages on other ports of this host may frame us too: a notebook does.
    Don't let browsers store pages, or Back would show messages after signing out.
    """
    if response.status == 101:
        return  # a WebSocket isn't a page, and would hold these in memory
    local = not request.app[SETTINGS].ORIGIN and is_local(request.host)
    framed_by = f"'self' http://{request.url.host}:*" if local else "'self'"
    response.headers["Content-Security-Policy"] = POLICY + framed_by
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "same-origin"
    static = request.match_info.route.name == "static"
    response.headers["Cache-Control"] = "no-cache" if static else "no-store"


def add_routes(app: web.Application) -> None:
    for path, handler, name in ROUTES:
        app.router.add_view(path, handler, name=name)
    app.router.add_static("/static/", HERE / "static", name="static")
    app.on_response_prepare.append(add_headers)


# ------------------------------------------------------------------------------
# 7. Startup and shutdown
#
# A `cleanup_ctx` function starts something before its `yield`, and stops it after.
# aiohttp runs the first halves in order, and the second ones in reverse. To shut down,
# it stops listening, runs `on_shutdown`, waits for handlers, and runs second halves.
# Beyond the article: if a background task fails, the process says so and ends.
# ------------------------------------------------------------------------------
async def run_database(app: web.Application) -> AsyncIterator[None]:
    app[DATABASE] = await open_database(app[SETTINGS])
    yield
    app[DATABASE].mongo.client.close()


async def run_room(app: web.Application) -> AsyncIterator[None]:
    """Run the room's tasks. Accept no request before the history has been read."""
    app[ROOM] = room = Room(app[DATABASE], app[SETTINGS])
    follower = Follower(room)
    work = follower.follow(), keep_presence(follower), keep_alive(room)
    tasks = [asyncio.create_task(one) for one in work]
    for task in tasks:
        task.add_done_callback(functools.partial(report, app))
    try:
        await with_deadline(follower.caught_up.wait())
        yield
    except TimeoutError:
        raise CannotStart("The stream of changes did not open in time.") from None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    with suppress(*DATABASE_ERRORS):  # it expires by itself
        await follower.presence.remove(follower.process)


def report(app: web.Application, task: asyncio.Task) -> None:
    """Log a task that failed, and stop the process: its host will restart it.

    Otherwise the room would fall silent, and the log would not say why.
    """
    if not task.cancelled() and task.exception():
        log.critical("A background task failed", exc_info=task.exception())
        app[STOP](1)


async def close_room(app: web.Application) -> None:
    await close(list(app[ROOM].connections), WSCloseCode.GOING_AWAY)


log_lines = make_buckets(rate=1 / 60, burst=1)  # by the template of a line


def once_per_minute(record: logging.LogRecord) -> bool:
    """Log a repeated line once a minute, and external faults without a traceback.

    External faults are a client's garbage, and errors of the system or the database.
    """
    error = record.exc_info and record.exc_info[1]
    if error and not isinstance(error, (*MALFORMED, OSError, PyMongoError)):
        return True  # a fault of ours, with its traceback
    # Compare templates, not texts: a client's values must not make each line new.
    if log_lines(str(record.msg).partition("\n")[0]).take():
        return False
    if error:
        first_line = record.getMessage().partition("\n")[0]
        record.msg = f"{first_line}: {type(error).__name__}"
        record.args = record.exc_info = record.exc_text = None
    return True


def init_app(settings: Settings) -> web.Application:
    """Make the application; a runner starts it."""
    session = session_middleware(make_storage(settings))
    app = web.Application(
        middlewares=[own_origin, session, db_handler, authorize],
        client_max_size=16_384,  # bytes of a form
        handler_args={
            "max_field_size": 65_536,  # bytes: all of localhost shares cookies
            "lingering_time": 1,  # seconds to read on after an early answer
        },
    )
    app[SETTINGS], app[HASHING] = settings, asyncio.Lock()
    app[THROTTLE] = make_buckets(settings.LOGIN_ATTEMPTS / 60, settings.LOGIN_ATTEMPTS)
    app[STOP] = lambda code: None  # `run` replaces it: a notebook's kernel lives on
    loader = jinja2.FileSystemLoader(HERE / "templates")
    aiohttp_jinja2.setup(app, loader=loader, filters={"links": links})
    add_routes(app)
    for name in "chat", "aiohttp.server", "asyncio", "pymongo.client":
        logging.getLogger(name).addFilter(once_per_minute)
    app.cleanup_ctx.extend([run_database, run_room])
    app.on_shutdown.append(close_room)
    return app


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
    # SHA-256 only fits the key to 32 bytes: it does not strengthen a weak SECRET_KEY.
    key = settings.SECRET_KEY.encode(errors="surrogateescape") or secrets.token_bytes()
    return EncryptedCookieStorage(
        hashlib.sha256(key).digest(),
        httponly=True,
        samesite="Lax",
        secure=settings.ORIGIN.startswith("https:"),
        **options,
    )


def main() -> None:
    """Run the chat until Ctrl-C. If it cannot start, print why and exit with 2."""
    try:
        return run(Settings())
    except ValidationError as error:
        problems = [f"{wrong['loc'][0]}: {wrong['msg']}" for wrong in error.errors()]
    except UnicodeDecodeError:
        problems = [".env must be a text file in UTF-8"]
    except CannotStart as error:
        problems = [str(error)]
    for problem in problems:
        print(f"chat: {problem}", file=sys.stderr)
    sys.exit(2)


def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises CannotStart if the address is not free."""
    sys.stdout.reconfigure(line_buffering=True)  # or a container's log stays empty
    level = logging.DEBUG if settings.DEBUG else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("pymongo").setLevel(logging.INFO)  # DEBUG has hashes and emails
    raise_descriptor_limit()
    if not settings.SECRET_KEY:
        print("SECRET_KEY is not set: sessions end when the chat stops.")
    app, loop = init_app(settings), new_event_loop()
    app[STOP] = sys.exit
    address = {"host": settings.HOST, "port": settings.PORT, "print": print_addresses}
    try:
        web.run_app(app, **address, shutdown_timeout=1, loop=loop)
    except (OSError, UnicodeError) as error:
        names = f"HOST {settings.HOST!r} and PORT {settings.PORT}"
        problem = f"must be an address of this machine and a free port ({error})"
        raise CannotStart(f"{names} {problem}") from None


def raise_descriptor_limit() -> None:
    """Raise the limit on open files, one per connection: macOS starts with 256."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = hard if 0 < hard < 1 << 30 else 10_240
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def print_addresses(text: str) -> None:
    """Print the chat's address and, for 0.0.0.0, one that other machines can reach."""
    print(text)
    port = re.search(r"//0\.0\.0\.0:(\d+)", text)
    if port and (address := own_address()):
        print(f"From other machines: http://{address}:{port[1]}")


def own_address() -> str | None:
    """Return this machine's address, or None without a route to other machines.

    Nothing is sent: the system only says from which address it would send.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # an address for documentation (RFC 5737)
        return probe.getsockname()[0]
    return None


if __name__ == "__main__":
    main()
