"""The room that everyone joins: the instructor's chat, and how to keep it in order."""

import contextlib

from IPython.display import HTML, display

import chat
from workshop.mongodb import is_free
from workshop.servers import HOST, Server, in_memory, look, own_address, serving

opened = contextlib.AsyncExitStack()
ports = {}  # the port for each that was asked for: people have typed it
memory = in_memory()  # outlives a cell that is run again


class Room:
    """The instructor's chat, with the two things that a host has to be able to do."""

    def __init__(self, server: Server) -> None:
        self.server, self.db = server, server.db

    async def blank(self, number: int) -> None:
        """Take a message back, on every page. An unknown number lists the newest."""
        if message := await self.db.messages.find_one({"_id": number}):
            write, blank = self.db.messages.find_one_and_update, {"$set": {"text": ""}}
            query = write({"_id": number}, blank, return_document=True)
            await self.server.edit("update", query)
            print(f"Message {number} by {message['user']} is blank.")
            return
        print(f"There is no message {number}. The newest are:")
        for event in await chat.newest(self.db, 8):
            print(f"{event['id']:4} {event['user']}: {event['text']:.30}")

    async def expel(self, name: str) -> None:
        """Delete an account. All its windows close; its name is free again."""
        user = await self.db.users.find_one({"name": name})
        if not user:
            names = ", ".join(sorted(self.server.room.online))
            print(f"There is no user {name!r}. Online: {names}.")
            return
        query = self.db.users.find_one_and_delete({"_id": user["_id"]})
        await self.server.edit("delete", query)
        print(f"{name} has no account any more.")


async def open_room(host: str = HOST, port: int = 8080) -> Room:
    """Serve the chat for everyone in the room until `close_room`, or the next call.

    If the port is taken, another one is used, and stays the same. So do accounts and
    messages, until the kernel stops. With MONGO_HOST and SECRET_KEY in the environment,
    or in `.env`, they also outlive the kernel.
    """
    global opened
    await opened.aclose()
    opened = contextlib.AsyncExitStack()
    host = HOST if HOST == "0.0.0.0" else host
    asked, port = port, ports.get(port, port)
    if not is_free(host, port):
        print(f"Port {port} is taken by another program, so the room has another one.")
        port = 0
    own = chat.Settings()
    kept = {"SECRET_KEY": own.SECRET_KEY, "MONGO_DB_NAME": own.MONGO_DB_NAME}
    kept = kept | {"MONGO_HOST": own.MONGO_HOST} if own.MONGO_HOST else memory
    server = await opened.enter_async_context(serving(host, port, **kept))
    ports[asked] = server.port
    if host == "0.0.0.0":
        address = f"http://{own_address()}:{server.port}"
        big = "font-size:2.5em;font-weight:600;margin:.3em 0"
        display(HTML(f'<p>Type this address:</p><p style="{big}">{address}</p>'))
    look(server)
    return Room(server)


async def close_room() -> None:
    await opened.aclose()
