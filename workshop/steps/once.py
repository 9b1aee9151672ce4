from asyncio import gather
from itertools import islice

from aiohttp import web

messages, numbers, connections = [], {}, set()


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
            key = name, event["nonce"]
            if key not in numbers:
                messages.append(event | {"id": len(messages) + 1, "user": name})
                numbers[key] = len(messages)
                await broadcast(messages[-1])
            await ws.send_json({"type": "receipt", "id": numbers[key], "nonce": key[1]})
    finally:
        connections.remove(ws)
        await broadcast({"type": "left", "user": name})
    return ws
