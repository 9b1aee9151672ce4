import json
from itertools import islice

from aiohttp import web


def make_frame(event):
    data = json.dumps(event).encode()
    size = [len(data)] if len(data) < 126 else [126, *len(data).to_bytes(2)]
    return bytes([0x81, *size]) + data


messages, numbers, connections = [], {}, {}


async def broadcast(event):
    frame = make_frame(event)
    for transport in connections.values():
        if transport.get_write_buffer_size() > 65_536:
            transport.abort()
        transport.write(frame)


async def talk(request):
    name, after = request.query["name"], int(request.query.get("after", 0))
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    for message in islice(messages, after, None):
        await ws.send_json(message)
    connections[ws] = request.transport
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
        del connections[ws]
        await broadcast({"type": "left", "user": name})
    return ws
