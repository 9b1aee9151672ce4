"""A middleware that refuses pages of other sites."""

from aiohttp import web

import chat


@web.middleware
async def own_origin(request, handler):
    origin = request.headers.get("Origin")  # None: not a browser
    own = None, f"http://{request.host}"
    if origin not in own or not chat.LOCAL.fullmatch(request.host):
        raise web.HTTPForbidden()
    return await handler(request)
