"""A host who opens and closes the chat."""

from secrets import token_hex

from bson import ObjectId

import chat


async def run_host(app):
    room, host = app[chat.ROOM], {"_id": ObjectId(), "name": "host"}
    await room.post(host, "The chat is open.", token_hex())
    yield
    await room.post(host, "The chat is closing.", token_hex())
