from asyncio import gather

from aiohttp import web

connections = set()


async def broadcast(event):
    await gather(*(ws.send_json(event) for ws in connections), return_exceptions=True)


async def talk(request):
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    connections.add(ws)
    async for frame in ws:
        await broadcast(frame.json())
    return ws
