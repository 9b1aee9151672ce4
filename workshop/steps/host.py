"""A host who opens and closes the chat."""

from secrets import token_hex

from bson import ObjectId

import chat


async def run_host(app):
    room, host = app[chat.ROOM], {"_id": ObjectId(), "name": "host"}
    await chat.post(room, host, "The chat is open.", token_hex())
    yield
    await chat.post(room, host, "The chat is closing.", token_hex())
