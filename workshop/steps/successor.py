"""PyMongo in place of Motor."""

from contextlib import asynccontextmanager

from pymongo import AsyncMongoClient

import chat


class PyMongoDatabase(chat.Database):
    @asynccontextmanager
    async def changes(self):
        watch = await self.mongo.watch(chat.PIPELINE, full_document="updateLookup")
        async with watch as stream:
            await self.create_indexes()
            yield (chat.as_change(change) async for change in stream)


async def run_pymongo(app):
    settings = app[chat.SETTINGS]
    client = AsyncMongoClient(settings.MONGO_HOST, **chat.CLIENT_OPTIONS)
    app[chat.DATABASE] = PyMongoDatabase(client[settings.MONGO_DB_NAME])
    yield
    await client.close()
