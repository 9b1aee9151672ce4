from asyncio import gather
from itertools import islice

from aiohttp import web

messages, connections = [], set()


async def broadcast(event):
    await gather(*(ws.send_json(event) for ws in connections), return_exceptions=True)


async def talk(request):
    name, after = request.query["name"], int(request.query.get("after", 0))
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    for message in islice(messages, after, None):
        await ws.send_json(message)
    connections.add(ws)
    try:
        await broadcast({"type": "joined", "user": name})
        async for frame in ws:
            event = frame.json()
            messages.append(event | {"id": len(messages) + 1, "user": name})
            await broadcast(messages[-1])
    finally:
        connections.remove(ws)
        await broadcast({"type": "left", "user": name})
    return ws
