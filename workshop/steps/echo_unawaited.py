from aiohttp import web


async def talk(request):
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    async for frame in ws:
        ws.send_json(frame.json())
    return ws
