"""The room that everyone joins: the instructor's chat, and how to keep it in order."""

import contextlib

from IPython.display import HTML, display

import chat
from workshop.mongodb import is_free
from workshop.servers import Server, look, own_address, serving

opened = contextlib.AsyncExitStack()
memory = chat.AsyncMongoMockClient(tz_aware=True)  # outlives a cell that is run again


class Room:
    """The instructor's chat, with the two things that a host has to be able to do."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def blank(self, number: int) -> None:
        """Take a message back, on every page."""
        message = await self.server.db.messages.find_one({"_id": number})
        if not message:
            print(f"There is no message {number}.")
            return
        await chat.Message(self.server.db).blank(number)
        print(f"Message {number} is blank: {message['text']!r} by {message['user']}.")

    async def expel(self, name: str) -> None:
        """Delete an account. All its windows close; its name is free again."""
        user = await self.server.db.users.find_one({"name": name})
        if not user:
            print(f"There is no user {name!r}.")
            return
        await chat.User(self.server.db).delete(user["_id"])
        print(f"{name} has no account any more.")


async def open_room(host: str = "127.0.0.1", port: int = 8080) -> Room:
    """Serve the chat for everyone in the room until `close_room`, or the next call.

    If the port is taken, another one is used. Accounts and messages stay until the
    kernel stops.
    """
    global opened
    await opened.aclose()
    opened = contextlib.AsyncExitStack()
    kept = {"AsyncMongoMockClient": lambda **options: memory}
    block = serving(host=host, port=port if is_free(host, port) else 0, **kept)
    server = await opened.enter_async_context(block)
    if host == "0.0.0.0":
        address = f"http://{own_address()}:{server.port}"
        big = "font-size:2.5em;font-weight:600;margin:.3em 0"
        display(HTML(f'<p>Type this address:</p><p style="{big}">{address}</p>'))
    else:
        print("Only this machine can reach this chat.")
    look(server)
    return Room(server)


async def close_room() -> None:
    await opened.aclose()
