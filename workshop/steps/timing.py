"""A middleware that says how long a page took."""

from time import perf_counter

from aiohttp import web


@web.middleware
async def timing(request, handler):
    start = perf_counter()
    try:
        response = await handler(request)
    except web.HTTPException as error:
        mark(error, start)
        raise
    mark(response, start)
    return response


def mark(response, start):
    took = 1000 * (perf_counter() - start)
    response.headers["Server-Timing"] = f"total;dur={took:.1f}"
