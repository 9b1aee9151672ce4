"""A chat that loses no message, in one file to read from top to bottom.

In 2016 an article built a chat to show what aiohttp can do. This is that chat today:
its sections are here in their order, and so is what has been learnt since, marked
"Beyond the article". It is the application, not an excerpt of one.

    pip install -r requirements.txt
    python chat.py

1. Settings      2. Middlewares      3. Database and models      4. Views
5. WebSocket     6. Routes and static      7. Startup and shutdown

A few words mean one thing each, everywhere below:

    app         the web application; what it shares is kept in it, under typed keys
    db          the database: MongoDB, or a stand-in in memory when none is set
    user        the document of somebody who has an account
    message     what a user said: a number, a name, a text, a time
    event       a JSON object on a WebSocket; its `type` says what it is
    connection  one open WebSocket; a user with three tabs has three
    room        all connections of this process, and what they have to know
    change      what the database tells: a document came or went
"""

# What `uv run chat.py` and `pipx run chat.py` install before they start (PEP 723):
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "aiohttp>=3.14,<4",
#   "aiohttp-jinja2>=1.6",
#   "aiohttp-session>=2.12",
#   "cryptography>=47",
#   "environs>=14",
#   "jinja2>=3.1",
#   "mongomock-motor>=0.0.36",
#   "motor>=3.7",
#   "typing-extensions>=4.12",  # mongomock-motor imports it, and forgot to say so
# ]
# ///

import asyncio
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import struct
import sys
import time
import unicodedata
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
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
from environs import Env, EnvError
from mongomock_motor import AsyncMongoMockClient
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.errors import DuplicateKeyError, PyMongoError

try:
    from asyncio import timeout
except ImportError:  # Python 3.10, where aiohttp brings it
    from async_timeout import timeout

try:  # the same loop in C, if it is installed: up to a quarter less a delivery
    from uvloop import new_event_loop
except ImportError:
    from asyncio import new_event_loop

HERE = Path(__file__).parent
log = logging.getLogger("chat")


# ------------------------------------------------------------------------------
# 1. Settings
#
# They come from the environment, or from a file `.env` beside this one. All have a
# default, so that `python chat.py` needs none of them. Beyond the article: each is
# checked at the start, where a person still looks at the console.
# ------------------------------------------------------------------------------
class WrongSetting(Exception):
    """Say in one line which setting is wrong, what it got and what it wants."""

    def __init__(self, name: str, got, wanted: str) -> None:
        super().__init__(f"{name} is {got!r}; it must be {wanted}")


@dataclass(frozen=True)
class Settings:
    """Hold what can be set (`.env.example` explains each). Raises WrongSetting."""

    DEBUG: bool = False
    HOST: str = "127.0.0.1"
    PORT: int = 8080
    SECRET_KEY: str = ""
    SECURE_COOKIES: bool = False
    MONGO_HOST: str = ""
    MONGO_DB_NAME: str = "chat"
    MAX_MESSAGE_LENGTH: int = 1_000  # characters
    MESSAGES_PER_SECOND: int = 5  # of one connection, after
    MESSAGE_BURST: int = 20  # at once
    LOGIN_ATTEMPTS: int = 10  # a minute, from one address for one login
    MAX_UNSENT_BYTES: int = 262_144  # waiting for one reader

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise WrongSetting(name, value, f"a whole number from {low} to {high}")
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,38}", self.MONGO_DB_NAME):
            wanted = "1 to 38 letters, digits, _ or -"
            raise WrongSetting("MONGO_DB_NAME", self.MONGO_DB_NAME, wanted)
        if self.MONGO_HOST and not self.SECRET_KEY:
            wanted = "hard to guess where MONGO_HOST is set: all processes share it"
            raise WrongSetting("SECRET_KEY", self.SECRET_KEY, wanted)


RANGES = {
    "PORT": (0, 65_535),  # 0: any free one
    "MAX_MESSAGE_LENGTH": (1, 10_000),
    "MESSAGES_PER_SECOND": (1, 1_000_000),
    "MESSAGE_BURST": (1, 1_000_000),
    "LOGIN_ATTEMPTS": (1, 1_000_000),
    "MAX_UNSENT_BYTES": (1_024, 1 << 30),
}


def read_settings() -> Settings:
    """Read the environment, and `.env` for what is not there. Raises WrongSetting."""
    env, values = Env(), {}
    try:
        env.read_env(HERE / ".env", recurse=False)
    except (OSError, ValueError):
        raise WrongSetting(".env", str(HERE / ".env"), "a text file in UTF-8") from None
    readers = {bool: env.bool, int: env.int, str: env.str}
    for setting in fields(Settings):
        try:
            value = readers[setting.type](setting.name, setting.default)
        except EnvError:
            wanted = "true or false" if setting.type is bool else "a whole number"
            raise WrongSetting(setting.name, os.environ[setting.name], wanted) from None
        values[setting.name] = value
    return Settings(**values)


# What the application shares is kept in `app[KEY]`, what belongs to one request in
# `request[KEY]`. The keys carry a type, so an editor knows what comes out.
SETTINGS = web.AppKey("settings", Settings)
DATABASE = web.AppKey("database", "Database")
ROOM = web.AppKey("room", "Room")
THROTTLE = web.AppKey("throttle", Callable)
DB = web.RequestKey("db", "Database")
USER = web.RequestKey("user", dict)


# ------------------------------------------------------------------------------
# 2. Middlewares
#
# Each wraps every handler, the first one outermost: see `init_app` for their order.
# Beyond the article: `same_origin`, because a cookie alone does not tell whether
# the person or another site is asking.
# ------------------------------------------------------------------------------
PUBLIC = {"login", "signin", "static"}


@web.middleware
async def same_origin(request: web.Request, handler) -> web.StreamResponse:
    """Refuse what another site's page sends in a visitor's name, with 403.

    Forms would be forged (CSRF), WebSockets read (they ignore the same-origin policy).
    Only browsers send Origin; who sends none has no cookie of somebody else's.
    """
    changes = request.method not in {"GET", "HEAD", "OPTIONS"}
    origin = request.headers.get("Origin")
    # A proxy may name the public host in X-Forwarded-Host. No page can forge that.
    hosts = request.host, request.headers.get("X-Forwarded-Host")
    foreign = origin is not None and origin.partition("://")[2] not in hosts
    if foreign and (changes or request.match_info.route.name == "chat"):
        raise web.HTTPForbidden(text="This request came from another site.")
    return await handler(request)


@web.middleware
async def db_handler(request: web.Request, handler) -> web.StreamResponse:
    """Hand the request its database, and answer 503 when the database does not."""
    request[DB] = request.app[DATABASE]
    try:
        return await handler(request)
    except UNAVAILABLE as error:
        log.warning("%s: the database failed: %s", request.rel_url, reason(error))
        raise web.HTTPServiceUnavailable(
            text="The database does not answer. Please try again in a moment.",
            headers={"Retry-After": "5"},
        ) from None


@web.middleware
async def authorize(request: web.Request, handler) -> web.StreamResponse:
    """Let in who has a session of a living user; send everybody else to the login.

    Which pages are public is said by route, not by path prefix: a new page is private
    until somebody decides otherwise. An unknown URL is a 404 for everybody.
    """
    route = request.match_info.route
    if request.match_info.http_exception or route.name == "static":
        return await handler(request)
    request[USER] = await session_user(request)
    if not request[USER] and route.name not in PUBLIC:
        raise web.HTTPSeeOther(url(request, "login"))
    return await handler(request)


async def session_user(request: web.Request) -> dict | None:
    """Find the user of the session. The cookie is encrypted, but it may be garbage."""
    try:
        user_id = (await get_session(request)).get("user")
        return user_id and await User(request[DB]).get(ObjectId(user_id))
    except (ValueError, TypeError, InvalidId):
        await new_session(request)
        return None


def url(request: web.Request, name: str) -> str:
    return str(request.app.router[name].url_for())


# ------------------------------------------------------------------------------
# 3. Database and models
#
# MongoDB through Motor, or mongomock-motor in memory: the same calls. Handlers never
# query; models do. Beyond the article: the database also *tells*. Whatever is
# inserted or deleted comes back as a stream of changes, and that stream, not the
# handler, is what the room hears: so any number of processes are one room.
#
# Motor's heir is PyMongo's AsyncMongoClient; mongomock-motor cannot stand in for it
# yet. All that would change is in this section: the client, and `await db.watch(…)`.
# ------------------------------------------------------------------------------
DEADLINE = 5  # seconds that anybody waits for the database
KEPT = 1_000  # newest messages, held by every process; memory holds twice as many
UNAVAILABLE = (PyMongoError, asyncio.TimeoutError)


async def answer(query):
    """Wait for a query, DEADLINE seconds at most. Raises one of UNAVAILABLE.

    Not `asyncio.wait_for`, which makes a task of it: several turns of the event loop.
    """
    async with timeout(DEADLINE):
        return await query


def reason(error: BaseException) -> str:
    """Say in a few words what is wrong, without the password a URI may carry."""
    details = getattr(error, "details", None) or {}
    return details.get("errmsg") or type(error).__name__


class Database:
    """Give the collections, two ways to write them, and the changes that come of it."""

    def __init__(self, db) -> None:
        self.db = db
        self.users, self.messages, self.online = db.users, db.messages, db.online

    async def insert(self, collection, document: dict) -> None:
        await collection.insert_one(document)

    async def delete(self, collection, query: dict) -> None:
        await collection.delete_many(query)

    async def changes(self) -> AsyncIterator[tuple | None]:
        """Yield None when the stream is open, and from then on every change in order:

        the collection's name, "insert" or "delete", and the document (or its `_id`).
        The driver resumes a broken stream by itself; raises PyMongoError if it can't.
        """
        pipeline = [{"$match": {"operationType": {"$in": ["insert", "delete"]}}}]
        async with self.db.watch(pipeline) as stream:
            yield None
            async for change in stream:
                document = change.get("fullDocument", change["documentKey"])
                yield change["ns"]["coll"], change["operationType"], document


class LocalDatabase(Database):
    """Do the same for a single process, where the database has no streams."""

    def __init__(self, db, keep: int = 0) -> None:
        super().__init__(db)
        self.queue, self.keep = asyncio.Queue(), keep

    async def insert(self, collection, document: dict) -> None:
        with self.doubt():
            await super().insert(collection, document)
        self.queue.put_nowait((collection.name, "insert", document))
        # mongomock looks at every document for every query: let it have few of both.
        if self.keep and collection is self.messages and document["_id"] % KEPT == 0:
            old = {"_id": {"$lte": document["_id"] - self.keep}}
            await super().delete(collection, old)

    async def delete(self, collection, query: dict) -> None:
        with self.doubt():
            gone = await collection.find(query).to_list(length=None)
            await super().delete(collection, query)
        for document in gone:
            self.queue.put_nowait((collection.name, "delete", document))

    @contextmanager
    def doubt(self):
        """Where no answer came it may be done or not: as if the stream had broken."""
        try:
            yield
        except BaseException:
            self.queue.put_nowait(None)
            raise

    async def changes(self) -> AsyncIterator[tuple | None]:
        yield None
        while True:
            yield await self.queue.get()


async def open_database(settings: Settings) -> Database:
    """Connect and make the indexes. Raises WrongSetting, after 4 seconds at most."""
    if not settings.MONGO_HOST:
        print("MONGO_HOST is not set: accounts and messages live in memory only.")
        db = AsyncMongoMockClient(tz_aware=True)[settings.MONGO_DB_NAME]
        await create_indexes(db)
        return LocalDatabase(db, keep=KEPT)
    uri, client = settings.MONGO_HOST, None
    try:
        client = AsyncIOMotorClient(uri, **CLIENT_OPTIONS)
        return await asyncio.wait_for(connect(client, settings.MONGO_DB_NAME), 3.5)
    except (*UNAVAILABLE, ValueError) as error:
        wanted = "a MongoDB URI, like mongodb://localhost:27017"
        if client:
            wanted = f"the URI of a MongoDB that answers ({reason(error)})"
            client.close()
        uri = re.sub(r"//.*@", "//***@", uri).partition("?")[0]
        raise WrongSetting("MONGO_HOST", uri, wanted) from None


CLIENT_OPTIONS = {
    "tz_aware": True,
    # Call stored only what survives the loss of a member, and read nothing else: or a
    # failover could take back a number that somebody has already built upon.
    "w": "majority",
    "readConcernLevel": "majority",
    "readPreference": "primary",
    # A thread waits for each query: let none wait on when its asker has given up.
    "serverSelectionTimeoutMS": 3_000,
    "connectTimeoutMS": DEADLINE * 1_000,
    "socketTimeoutMS": DEADLINE * 1_000,
}


async def connect(client, name: str) -> Database:
    db, hello = client[name], await client.admin.command("hello")
    await create_indexes(db)
    await db.messages.create_index([("user_id", 1), ("nonce", 1)], unique=True)
    # Who is not renewed for 45 seconds was on a process that has died.
    await db.online.create_index("seen", expireAfterSeconds=45)
    if hello.keys() & {"setName", "msg"}:  # a replica set, or a router to several
        return Database(db)
    print("MongoDB is standalone: run one process only, or make it a replica set.")
    await db.online.delete_many({})
    return LocalDatabase(db)


async def create_indexes(db) -> None:
    """Let the database decide whose a name is: it alone sees everybody's sign-up."""
    await db.users.create_index("name_key", unique=True)
    await db.users.create_index("email_key", unique=True, sparse=True)


class Model:
    """Own the queries on one collection."""

    def __init__(self, db: Database) -> None:
        self.db = db


# --- Users ---
def fold(text: str) -> str:
    """Make all spellings one: `Ann`, `ann` and wide `ａｎｎ` are the same user."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def hash_password(password: str) -> str:
    """Hash with Argon2id (RFC 9106); 19 MiB and two passes are OWASP's least.

    It takes about 40 ms of one core, on purpose: see `in_turn`.
    """
    salt = os.urandom(16)
    argon2 = Argon2id(salt=salt, length=32, iterations=2, lanes=1, memory_cost=19_456)
    return argon2.derive_phc_encoded(password.encode())


def is_password(password: str, password_hash: str) -> bool:
    try:
        Argon2id.verify_phc_encoded(password.encode(), password_hash)
    except InvalidKey:
        return False
    return True


# On Linux a thread has a niceness of its own; elsewhere it would be the whole chat's.
NICE = {"initializer": os.nice, "initargs": (10,)} if sys.platform == "linux" else {}
HASHING = ThreadPoolExecutor(max_workers=1, **NICE)


def in_turn(function: Callable, *arguments) -> asyncio.Future:
    """Hash in the one thread for it, so that a crowd signing in delays no message."""
    return asyncio.get_running_loop().run_in_executor(HASHING, function, *arguments)


class User(Model):
    """Somebody who has an account."""

    async def get(self, user_id: ObjectId) -> dict | None:
        return await answer(self.db.users.find_one({"_id": user_id}, ["name"]))

    async def create(self, name: str, email: str, password: str) -> dict:
        """Store a new account. Raises DuplicateKeyError if name or email is taken."""
        user = {"_id": ObjectId(), "name": name, "name_key": fold(name)}
        if email:
            user |= {"email": email, "email_key": fold(email)}
        user["password"] = await in_turn(hash_password, password)
        await answer(self.db.users.insert_one(user))
        return user

    async def check(self, login: str, password: str) -> dict | None:
        """Return the user who has them; take as long to find that nobody has."""
        query = {"email_key" if "@" in login else "name_key": fold(login)}
        user = await answer(self.db.users.find_one(query))
        if user is None:
            await in_turn(hash_password, password)
            return None
        right = await in_turn(is_password, password, user["password"])
        return user if right else None


# --- Messages ---
class Message(Model):
    """What somebody said. The `_id` runs 1, 2, 3 … without a gap."""

    async def save(self, last: int, user: dict, text: str, nonce: str) -> dict:
        """Store a message under the number after `last`, or after a later one.

        The sender may repeat a send that got no answer: the unique index on user and
        nonce then refuses it, and what was stored the first time is returned.
        """
        while True:
            message = {
                "_id": last + 1,
                "user_id": user["_id"],
                "user": user["name"],
                "text": text,
                "time": datetime.now(UTC),
                "nonce": nonce,
            }
            try:
                await self.db.insert(self.db.messages, message)
                return message
            except DuplicateKeyError:
                sent = {"user_id": user["_id"], "nonce": nonce}
                if stored := await self.db.messages.find_one(sent):
                    return stored
                # Another process was faster. Its number is the one to count from.
                last = (await self.newest(1))[-1]["_id"]

    async def newest(self, count: int, after: int = 0, before: int = 1 << 53) -> list:
        """Return up to `count` messages with after < number < before, oldest first."""
        query = {"_id": {"$gt": after, "$lt": before}}
        found = self.db.messages.find(query).sort("_id", -1).limit(count)
        return (await answer(found.to_list(length=count)))[::-1]


# --- Who is online ---
class Presence(Model):
    """Who is online: one document a connection, marked with its process.

    MongoDB drops what is not renewed, so people of a killed process leave as well.
    """

    def __init__(self, db: Database) -> None:
        super().__init__(db)
        self.process = ObjectId()

    async def enter(self, connection_id: ObjectId, name: str) -> None:
        document = {"_id": connection_id, "user": name, "process": self.process}
        document["seen"] = datetime.now(UTC)
        await answer(self.db.insert(self.db.online, document))

    async def leave(self, connection_ids: Iterable[ObjectId]) -> None:
        query = {"_id": {"$in": list(connection_ids)}}
        await answer(self.db.delete(self.db.online, query))

    async def leave_all(self) -> None:
        await answer(self.db.delete(self.db.online, {"process": self.process}))

    async def everybody(self) -> dict[ObjectId, str]:
        found = await answer(self.db.online.find().to_list(length=None))
        return {document["_id"]: document["user"] for document in found}

    async def renew(self, names: dict[ObjectId, str]) -> None:
        """Say that these connections are still there, and put back what is missing."""
        query = {"_id": {"$in": list(names)}}
        seen = {"$set": {"seen": datetime.now(UTC)}}
        result = await answer(self.db.online.update_many(query, seen))
        if result.matched_count < len(names):
            for connection_id in names.keys() - (await self.everybody()).keys():
                await self.enter(connection_id, names[connection_id])


# ------------------------------------------------------------------------------
# 4. Views
#
# A class a page, a method an HTTP verb. A POST that worked answers with a redirect
# (303), so that a reload does not send it again; one that did not comes back with
# what was typed and, beside the field, what is wrong. No page needs JavaScript
# but the chat itself.
# ------------------------------------------------------------------------------
PAGE = 50  # messages
MALFORMED = (HttpProcessingError, web.RequestPayloadError)


class TokenBucket:
    """Let `burst` through at once, after that `rate` a second."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self.tokens, self.time = float(burst), time.monotonic()

    def take(self) -> float:
        """Take a token and return 0; if there is none, the seconds until there is."""
        now = time.monotonic()
        self.tokens += (now - self.time) * self.rate
        self.tokens, self.time = min(self.tokens, self.burst), now
        if self.tokens < 1:
            return (1 - self.tokens) / self.rate
        self.tokens -= 1
        return 0


def make_throttle(per_minute: int) -> Callable:
    """Return a function that gives an address and a login their bucket.

    Known limits: every process has its own, and behind a proxy all have one address.
    """

    @functools.lru_cache(maxsize=10_000)  # then the longest idle bucket is forgotten
    def bucket(address: str | None, login: str) -> TokenBucket:
        return TokenBucket(per_minute / 60, per_minute)

    return bucket


class RoomView(web.View):
    """A view of the room. Several rooms would be told apart here."""

    @property
    def room(self) -> "Room":
        return self.request.app[ROOM]


class ChatList(RoomView):
    """Show the newest messages, or with `?before=17` the ones before number 17."""

    @aiohttp_jinja2.template("chat.html")
    async def get(self) -> dict:
        before = read_number(self.request, "before")
        messages = list(self.room.recent)[-PAGE:]
        if before is not None:
            messages = await Message(self.request[DB]).newest(PAGE, before=before)
            messages = [to_event(message) for message in messages]
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


class Invalid(Exception):
    """Carry what is wrong with a form: a sentence by field name."""


class Form(web.View):
    """Show a form, take it, and sign in the user whom `submit` makes of it.

    A form of its own has a `template`, and a `submit` that may raise Invalid.
    """

    async def get(self) -> web.Response:
        if self.request[USER]:
            raise web.HTTPSeeOther(url(self.request, "main"))
        return self.page({}, {})

    async def post(self) -> web.Response:
        form = await read_form(self.request)
        bucket = self.request.app[THROTTLE](self.request.remote, fold(form["login"]))
        if wait := bucket.take():
            seconds = int(wait) + 1
            errors = {"login": f"Too many attempts. Try again in {seconds} seconds."}
            headers = {"Retry-After": str(seconds)}
            return self.page(form, errors, status=429, headers=headers)
        try:
            user = await self.submit(form)
        except Invalid as invalid:
            return self.page(form, invalid.args[0], status=422)
        session = await new_session(self.request)
        session["user"] = str(user["_id"])  # not the name: another may have it later
        raise web.HTTPSeeOther(url(self.request, "main"))

    def page(self, form, errors, status=200, headers=None) -> web.Response:
        context = {"form": form, "errors": errors}
        page = aiohttp_jinja2.render_template(
            self.template, self.request, context, status=status
        )
        page.headers.update(headers or {})
        return page


async def read_form(request: web.Request) -> dict[str, str]:
    """Return the fields that our forms have. Raises HTTPBadRequest if it is no form."""
    try:
        if request.content_type != "application/x-www-form-urlencoded":
            raise ValueError(request.content_type)
        data = await request.post()
        names = "login", "email", "password", "password2"
        form = {name: data.get(name, "") for name in names}
        "".join(form.values()).encode()  # half a surrogate pair could not be stored
        return form
    except (ValueError, LookupError, *MALFORMED):
        raise web.HTTPBadRequest(text="The form could not be read.") from None


class Login(Form):
    """Sign in with a name or an email, and the password."""

    template = "login.html"

    async def submit(self, form: dict[str, str]) -> dict:
        users = User(self.request[DB])
        if user := await users.check(form["login"].strip(), form["password"]):
            return user
        raise Invalid({"login": "No account has this name or email and this password."})


class SignIn(Form):
    """Create an account."""

    template = "signin.html"

    async def submit(self, form: dict[str, str]) -> dict:
        name = unicodedata.normalize("NFKC", form["login"].strip())
        email, users = form["email"].strip(), User(self.request[DB])
        if errors := dict(find_errors(name, email, form)):
            raise Invalid(errors)
        try:
            return await users.create(name, email, form["password"])
        except DuplicateKeyError as error:
            index = error.details.get("keyPattern") or str(error)
            field = "email" if "email_key" in index else "login"
            raise Invalid({field: "Somebody has this already."}) from None


# Letters that show as nothing: with them one name could look like another.
INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f]")


def find_errors(name: str, email: str, form: dict[str, str]):
    """Yield (field, sentence) for everything a new account must not have."""
    letters = all(c in "_-" or unicodedata.category(c)[0] in "LMN" for c in name)
    if not (letters and 3 <= len(name) <= 32) or INVISIBLE.search(name):
        yield "login", "A name has 3 to 32 letters, digits, _ or -."
    if email and not (re.fullmatch(r"[^@\s]+@[^@\s]+", email) and email.isprintable()):
        yield "email", "This is not an email address. You may leave it empty."
    if len(email) > 254:
        yield "email", "An email address has at most 254 characters."
    if not 8 <= len(form["password"]) <= 128:
        yield "password", "A password has 8 to 128 characters."
    if form["password"] != form["password2"]:
        yield "password2", "The two passwords are not the same."


class SignOut(web.View):
    """End the session. Other tabs talk on until they reload: no cookie is revoked."""

    async def post(self) -> web.Response:
        (await get_session(self.request)).invalidate()
        raise web.HTTPSeeOther(url(self.request, "login"))


# ------------------------------------------------------------------------------
# 5. WebSocket
#
# One message in, one for everybody out. The handler below stores what comes in; the
# room hears of it from the database, like every other process, and broadcasts it.
# Look for three promises: nothing is lost (replay, receipts), nothing comes twice
# (numbers), and nobody waits for anybody (broadcast).
# ------------------------------------------------------------------------------
HEARTBEAT = 30  # seconds between pings; proxies cut what is idle for 60
ABSENCE = 2  # seconds until a connection that closed counts as gone: not a reload
RENEWAL = 15  # seconds between two renewals of presence
TURNS = 6  # of the event loop from a batch's first frame to its flush; 1 costs double

ERRORS = {
    "bad_event": "The server did not understand this.",
    "empty": "A message needs some text.",
    "too_long": "This message is too long.",
    "too_fast": "Too many messages at once. Please slow down.",
    "not_saved": "The message could not be saved. Please send it again.",
}


def to_event(message: dict) -> dict:
    """Make the event of a stored message."""
    event = {"type": "message", "id": message["_id"]}
    event |= {key: message[key] for key in ("user", "text", "time", "nonce")}
    moment = message["time"].isoformat(timespec="milliseconds")
    return event | {"time": moment.replace("+00:00", "Z")}


def encode_frame(event: dict) -> bytes:
    """Make a whole text frame (RFC 6455, 5.2), up to 64 KiB, which no event exceeds.

    What a server sends is not masked: the same bytes are right for every reader.
    """
    payload = json.dumps(event, ensure_ascii=False).encode()
    if len(payload) < 126:
        return struct.pack("!BB", 0x81, len(payload)) + payload
    return struct.pack("!BBH", 0x81, 126, len(payload)) + payload


@dataclass(eq=False)
class Connection:
    """One open WebSocket of a user."""

    ws: web.WebSocketResponse
    transport: asyncio.Transport
    user: dict
    id: ObjectId = field(default_factory=ObjectId)
    skip: int = 0  # bytes of the next flush that it has already got, replayed


class Room:
    """Know who is here and what was said last, and tell everybody what changes."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self.db, self.settings, self.presence = db, settings, Presence(db)
        self.connections: dict[ObjectId, Connection] = {}  # of this process
        self.gone: dict[ObjectId, float] = {}  # closed connections, and when they did
        self.online: dict[ObjectId, str] = {}  # names, by connection, on all processes
        self.recent: deque[dict] = deque()  # the newest KEPT messages, as events
        self.receipts: dict[tuple[str, str], dict] = {}  # those by user and nonce
        self.last = self.claimed = 0  # newest number that was broadcast; that is taken
        self.saving = asyncio.Lock()
        self.frames: list[bytes] = []  # waiting for the next flush
        self.caught_up = asyncio.Event()

    # --- What the database tells ---
    async def follow(self) -> None:
        """Turn changes into broadcasts, for ever. A broken stream is opened again."""
        while True:
            try:
                async for change in self.db.changes():
                    if change is None:
                        await self.catch_up()
                    else:
                        self.apply(*change)
            except UNAVAILABLE as error:
                log.warning("The stream of changes broke: %s", reason(error))
            await asyncio.sleep(1)

    async def catch_up(self) -> None:
        """Read what the stream cannot tell: what changed before it was open.

        What changed since will come twice; messages are known by their number then,
        connections by their id.
        """
        for message in await Message(self.db).newest(KEPT, after=self.last):
            self.add_message(message)
        online = await self.presence.everybody()
        for connection_id in self.online.keys() - online.keys():
            self.remove_online(connection_id)
        for connection_id, name in online.items():
            self.add_online(connection_id, name)
        self.caught_up.set()

    def apply(self, collection: str, operation: str, document: dict) -> None:
        match collection, operation:
            case "messages", "insert":
                self.add_message(document)
            case "online", "insert":
                self.add_online(document["_id"], document["user"])
            case "online", "delete":
                self.remove_online(document["_id"])

    def add_message(self, message: dict) -> None:
        if message["_id"] <= self.last:
            return
        event = to_event(message)
        self.recent.append(event)
        self.receipts[event["user"], event["nonce"]] = event
        if len(self.recent) > KEPT:
            oldest = self.recent.popleft()
            self.receipts.pop((oldest["user"], oldest["nonce"]), None)
        self.last = event["id"]
        self.broadcast(event)

    def add_online(self, connection_id: ObjectId, name: str) -> None:
        if name not in self.online.values():
            self.broadcast({"type": "joined", "user": name})
        self.online[connection_id] = name

    def remove_online(self, connection_id: ObjectId) -> None:
        name = self.online.pop(connection_id, None)
        if name and name not in self.online.values():
            self.broadcast({"type": "left", "user": name})

    # --- What everybody hears ---
    def broadcast(self, event: dict) -> None:
        """Send an event to all connections, soon, and wait for none of them.

        A system call costs about 5 microseconds, the rest of a delivery less than one.
        So a frame is encoded once for all, waits some turns of the event loop for those
        that are about to come, and they leave together: one write a connection.
        Measured: 8 µs a delivery alone, 0.25 under load; a turn takes microseconds.
        """
        self.frames.append(encode_frame(event))
        if len(self.frames) == 1:
            self.flush_in(TURNS)

    def flush_in(self, turns: int) -> None:
        later = asyncio.get_running_loop().call_soon
        later(self.flush_in, turns - 1) if turns > 1 else later(self.flush)

    def flush(self) -> None:
        batch, limit = b"".join(self.frames), self.settings.MAX_UNSENT_BYTES
        self.frames.clear()
        for connection in self.connections.values() if batch else ():
            transport = connection.transport
            # What a reader does not take piles up here: it is cut off, and gets
            # everything when it comes back.
            if transport.get_write_buffer_size() > limit:
                transport.abort()
            elif not (connection.ws.closed or transport.is_closing()):
                transport.write(batch[connection.skip :])  # nothing follows a close
            connection.skip = 0

    # --- What a connection does ---
    async def replay(self, ws: web.WebSocketResponse, after: int | None) -> None:
        """Send what came after a number, waiting for the reader, until none is left."""
        while after is not None and after < self.last:
            for event in [event for event in self.recent if event["id"] > after]:
                await ws.send_json(event)
                after = event["id"]

    async def join(self, connection: Connection) -> None:
        """Make a connection live and say `welcome`.

        No await until it is in: else what is broadcast meanwhile would be missing.
        """
        connection.skip = sum(map(len, self.frames))  # this has just been replayed
        self.connections[connection.id] = connection
        name = connection.user["name"]
        online = sorted({name, *self.online.values()})
        welcome = {"type": "welcome", "user": name, "online": online, "last": self.last}
        await connection.ws.send_json(welcome)
        try:
            await self.presence.enter(connection.id, name)
        except UNAVAILABLE as error:  # the next renewal puts it right
            log.warning("%s is not announced yet: %s", name, reason(error))

    def leave(self, connection: Connection) -> None:
        self.connections.pop(connection.id, None)
        self.gone[connection.id] = time.monotonic()

    async def say(self, user: dict, text: str, nonce: str) -> dict | None:
        """Store a message. Return it if it is a repeated one that all have seen.

        Raises one of UNAVAILABLE: then it may have been stored or not, and the sender
        finds out by sending it again with the same nonce.
        """
        async with self.saving:  # two at once would only fight for the number
            told = self.last
            event = self.receipts.get((user["name"], nonce))
            event = event or await self.store(user, text, nonce)
        return event if event["id"] <= told else None  # else the broadcast tells it

    async def store(self, user: dict, text: str, nonce: str) -> dict:
        last = max(self.last, self.claimed)
        event = to_event(await Message(self.db).save(last, user, text, nonce))
        if event["id"] > last:
            self.claimed = event["id"]
            self.receipts[user["name"], nonce] = event
        return event

    async def keep_presence(self) -> None:
        """Tell the database twice a second who has gone, and at times who is here."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            gone = [key for key, since in self.gone.items() if now - since > ABSENCE]
            try:
                if gone:
                    await self.presence.leave(gone)
                    for connection_id in gone:
                        del self.gone[connection_id]
                if now - renewed > RENEWAL:
                    names = {c.id: c.user["name"] for c in self.connections.values()}
                    await self.presence.renew(names)
                    renewed = now
            except UNAVAILABLE as error:
                log.warning("Presence could not be written: %s", reason(error))

    async def close(self) -> None:
        """Close every connection with 1001 (going away), all at the same time.

        Without waiting for their readers (drain): one that has stalled would hold us.
        """
        connections, code = list(self.connections.values()), WSCloseCode.GOING_AWAY
        closing = [c.ws.close(code=code, drain=False) for c in connections]
        await asyncio.gather(*closing, return_exceptions=True)
        for connection in connections:
            connection.transport.abort()  # what nobody has read by now


class WebSocket(RoomView):
    """Replay what was missed, welcome, then take messages until the socket closes."""

    async def get(self) -> web.WebSocketResponse:
        after, room = read_number(self.request, "after"), self.room
        ws = web.WebSocketResponse(
            heartbeat=HEARTBEAT,
            timeout=1,  # seconds that closing waits for the other side
            compress=False,  # a compressor for each reader would halve the speed
            # JSON may write a character as 12: two times \uXXXX. Above that: 1009.
            max_msg_size=12 * room.settings.MAX_MESSAGE_LENGTH + 1_024,
        )
        connection = Connection(ws, self.request.transport, self.request[USER])
        try:
            await ws.prepare(self.request)
            await room.replay(ws, after)
            await room.join(connection)
            await self.receive(connection)
        except ConnectionResetError:
            pass  # the other side went while we sent
        finally:
            room.leave(connection)
        return ws

    async def receive(self, connection: Connection) -> None:
        settings = self.request.app[SETTINGS]
        bucket = TokenBucket(settings.MESSAGES_PER_SECOND, settings.MESSAGE_BURST)
        async for frame in connection.ws:
            if frame.type is WSMsgType.ERROR:
                break  # a frame too big, or a connection that broke
            event, wait = read_event(frame), bucket.take()
            if reply := await self.take(connection.user, event, wait):
                await connection.ws.send_json(reply)

    async def take(self, user: dict, event: dict, wait: float) -> dict | None:
        """Store a message. Return what only its sender is told: error or receipt."""
        if code := find_fault(event, wait, self.room.settings.MAX_MESSAGE_LENGTH):
            return error_event(code, event)
        try:
            return await answer(self.room.say(user, event["text"], event["nonce"]))
        except UNAVAILABLE as error:
            log.warning("A message was not saved: %s", reason(error))
            return error_event("not_saved", event)


def read_event(frame) -> dict:
    """Return the JSON object in a text frame; an empty one if there is none."""
    try:
        event = json.loads(frame.data if frame.type is WSMsgType.TEXT else "")
        json.dumps(event, ensure_ascii=False).encode()  # fails on half a surrogate pair
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def find_fault(event: dict, wait: float, max_length: int) -> str | None:
    """Return the code of what is wrong with an event from a client, if anything is."""
    text = event.get("text")
    if wait:
        return "too_fast"
    if event.get("type") != "message" or not isinstance(text, str):
        return "bad_event"
    if not is_nonce(event.get("nonce")):
        return "bad_event"
    if not text.strip():
        return "empty"
    return "too_long" if len(text) > max_length else None


def is_nonce(nonce) -> bool:
    return isinstance(nonce, str) and 1 <= len(nonce) <= 64


def error_event(code: str, event: dict) -> dict:
    error = {"type": "error", "code": code, "text": ERRORS[code]}
    return error | ({"nonce": event["nonce"]} if is_nonce(event.get("nonce")) else {})


# ------------------------------------------------------------------------------
# 6. Routes and static
#
# Explicit, in one table: verb, path, handler, name. Names are what the rest of the
# code says; a path may change.
# ------------------------------------------------------------------------------
ROUTES = [
    ("GET", "/", ChatList, "main"),
    ("GET", "/ws", WebSocket, "chat"),
    ("*", "/login", Login, "login"),
    ("*", "/signin", SignIn, "signin"),
    ("POST", "/signout", SignOut, "signout"),
]

# Scripts and styles from our own files only; frames only in this machine's notebook.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'self' http://localhost:* http://127.0.0.1:*",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    if response.status == 101:
        return  # a WebSocket is no page, and would keep them: 1 KiB a connection
    response.headers.update(SECURITY_HEADERS)
    static = request.match_info.route.name == "static"
    response.headers["Cache-Control"] = "no-cache" if static else "no-store"


def add_routes(app: web.Application) -> None:
    for method, path, handler, name in ROUTES:
        app.router.add_route(method, path, handler, name=name)
    app.router.add_static("/static/", HERE / "static", name="static")
    app.on_response_prepare.append(add_headers)


# ------------------------------------------------------------------------------
# 7. Startup and shutdown
#
# What starts before the first request ends after the last one, in reverse: a
# `cleanup_ctx` has both halves in one function, around its `yield`. aiohttp stops
# listening, runs `on_shutdown`, waits for the handlers, then comes back to the yields.
# ------------------------------------------------------------------------------
async def run_database(app: web.Application) -> AsyncIterator[None]:
    app[DATABASE] = await open_database(app[SETTINGS])
    yield
    app[DATABASE].db.client.close()


async def run_room(app: web.Application) -> AsyncIterator[None]:
    app[ROOM] = room = Room(app[DATABASE], app[SETTINGS])
    tasks = [asyncio.create_task(room.follow())]
    tasks += [asyncio.create_task(room.keep_presence())]
    await room.caught_up.wait()
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    try:
        await room.presence.leave_all()
    except UNAVAILABLE as error:
        log.warning("Presence was left to expire: %s", reason(error))


async def close_room(app: web.Application) -> None:
    await app[ROOM].close()


def in_one_line(record: logging.LogRecord) -> bool:
    """Log a stranger's malformed request without a traceback: the fault is not here."""
    error = record.exc_info and record.exc_info[1]
    if isinstance(error, MALFORMED):
        record.msg = f"{record.getMessage()}: {type(error).__name__}"
        record.args = record.exc_info = None
    return True


def init_app(settings: Settings | None = None) -> web.Application:
    """Make the application; it starts when a runner starts it. Raises WrongSetting."""
    settings = settings or read_settings()
    secret = settings.SECRET_KEY.encode(errors="surrogateescape")
    storage = EncryptedCookieStorage(
        hashlib.sha256(secret or secrets.token_bytes()).digest(),
        max_age=14 * 24 * 60 * 60,  # seconds
        httponly=True,
        samesite="Lax",
        secure=settings.SECURE_COOKIES,
    )
    middlewares = [session_middleware(storage), same_origin, db_handler, authorize]
    app = web.Application(middlewares=middlewares, client_max_size=16_384)  # bytes
    app[SETTINGS], app[THROTTLE] = settings, make_throttle(settings.LOGIN_ATTEMPTS)
    aiohttp_jinja2.setup(app, loader=jinja2.FileSystemLoader(HERE / "templates"))
    add_routes(app)
    logging.getLogger("aiohttp.server").addFilter(in_one_line)
    app.cleanup_ctx.extend([run_database, run_room])
    app.on_shutdown.append(close_room)
    return app


def main() -> None:
    """Run the chat until Ctrl-C. Exits with 2, and one line, if it cannot start."""
    try:
        run(read_settings())
    except WrongSetting as error:
        print(f"chat: {error}", file=sys.stderr)
        sys.exit(2)


def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM. Raises WrongSetting if the address is not free."""
    level = logging.DEBUG if settings.DEBUG else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    if not settings.SECRET_KEY:
        print("SECRET_KEY is not set: sessions end when the chat stops.")
    access_log = logging.getLogger("aiohttp.access") if settings.DEBUG else None
    address = {"host": settings.HOST, "port": settings.PORT}
    try:
        app = init_app(settings)
        options = {"access_log": access_log, "shutdown_timeout": 1}
        web.run_app(app, **address, **options, loop=new_event_loop())
    except (OSError, UnicodeError) as error:
        wanted = f"an address of this machine and a free port ({error})"
        raise WrongSetting("HOST and PORT", address, wanted) from None


if __name__ == "__main__":
    main()
