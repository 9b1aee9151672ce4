"""A second room, in an application of its own."""

import aiohttp_jinja2
from aiohttp import web

import chat


def add_kitchen(app):
    async def run_database(kitchen):
        lobby = app[chat.DATABASE]
        db = type(lobby)(lobby.mongo.client["kitchen"])
        db.users = lobby.users
        kitchen[chat.DATABASE] = db
        yield

    kitchen = web.Application(middlewares=[chat.db_handler])
    loader = app[aiohttp_jinja2.APP_KEY].loader
    aiohttp_jinja2.setup(kitchen, loader=loader, filters={"links": chat.links})
    kitchen[chat.SETTINGS], kitchen[chat.STOP] = app[chat.SETTINGS], app[chat.STOP]
    chat.add_routes(kitchen)
    kitchen.cleanup_ctx.extend([run_database, chat.run_room])
    kitchen.on_shutdown.append(chat.close_room)
    app.add_subapp("/kitchen", kitchen)
