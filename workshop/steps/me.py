from asyncio import gather

from aiohttp import web

connections = set()


async def broadcast(event):
    await gather(*(ws.send_json(event) for ws in connections), return_exceptions=True)


async def talk(request):
    name = request.query["name"]
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    connections.add(ws)
    try:
        await broadcast({"type": "joined", "user": name})
        async for frame in ws:
            event = frame.json()
            if event["text"].startswith("/me "):
                event["text"] = f"* {name} {event['text'][4:]}"
            await broadcast(event | {"user": name})
    finally:
        connections.remove(ws)
        await broadcast({"type": "left", "user": name})
    return ws
