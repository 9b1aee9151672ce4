"""A second room, in an application of its own."""

from aiohttp import web

import chat


def add_kitchen(app):
    async def run_database(kitchen):
        mongo = app[chat.DATABASE].mongo.client["kitchen"]
        kitchen[chat.DATABASE] = chat.LocalDatabase(mongo)
        yield

    kitchen = web.Application(middlewares=[chat.db_handler])
    for key in chat.SETTINGS, chat.STOP, chat.aiohttp_jinja2.APP_KEY:
        kitchen[key] = app[key]
    chat.add_routes(kitchen)
    kitchen.cleanup_ctx.extend([run_database, chat.run_room])
    kitchen.on_shutdown.append(chat.close_room)
    app.add_subapp("/kitchen", kitchen)
