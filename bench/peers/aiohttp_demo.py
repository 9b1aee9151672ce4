"""aiohttp's demo chat: every message is awaited by one reader after another.

On asyncio's own loop, or on uvloop.
"""

import sys

from aiohttp import WSMsgType, web

SOCKETS = web.AppKey("sockets", list)


async def chat(request):
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    sockets = request.app[SOCKETS]
    sockets.append(ws)
    try:
        async for frame in ws:
            if frame.type is WSMsgType.TEXT:
                for other in list(sockets):
                    await other.send_str(frame.data)
    finally:
        sockets.remove(ws)
    return ws


app = web.Application()
app[SOCKETS] = []
app.router.add_get("/ws", chat)

if sys.argv[2:] == ["uvloop"]:
    from uvloop import new_event_loop
else:
    from asyncio import new_event_loop
address = {"host": "127.0.0.1", "port": int(sys.argv[1])}
web.run_app(app, **address, access_log=None, loop=new_event_loop())
