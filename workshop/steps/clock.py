"""A clock that talks."""

import asyncio
import time
from secrets import token_hex

from bson import ObjectId

import chat


async def run_clock(app):
    async def talk():
        user = {"_id": ObjectId(), "name": "clock"}
        while True:
            await app[chat.ROOM].post(user, time.strftime("%H:%M:%S"), token_hex())
            await asyncio.sleep(1)

    task = asyncio.create_task(talk())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
