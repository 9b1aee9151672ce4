"""A middleware that refuses pages of other sites."""

from aiohttp import web

import chat


@web.middleware
async def own_origin(request, handler):
    origin = request.headers.get("Origin")  # None: not a browser
    if origin not in (None, f"http://{request.host}") or not chat.is_local(
        request.host
    ):
        raise web.HTTPForbidden()
    return await handler(request)
