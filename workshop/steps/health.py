"""A page that says whether a process is well."""

from aiohttp import web

import chat


async def health(request):
    await chat.with_deadline(request[chat.DB].messages.find_one())
    return web.Response(text="well")
