from asyncio import gather

from aiohttp import web

connections = set()


async def broadcast(event):
    await gather(*(ws.send_json(event) for ws in connections), return_exceptions=True)


async def talk(request):
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    connections.add(ws)
    try:
        async for frame in ws:
            await broadcast(frame.json())
    finally:
        connections.remove(ws)
    return ws
