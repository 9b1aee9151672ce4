"""The `websockets` library: its own `broadcast`, on asyncio's loop or on uvloop."""

import asyncio
import sys

from websockets.asyncio.server import broadcast, serve
from websockets.exceptions import ConnectionClosed

connected = set()


async def chat(websocket):
    connected.add(websocket)
    try:
        async for message in websocket:
            broadcast(connected, message)
    except ConnectionClosed:
        pass
    finally:
        connected.remove(websocket)


async def main():
    async with serve(chat, "127.0.0.1", int(sys.argv[1])) as server:
        await server.serve_forever()


if sys.argv[2:] == ["uvloop"]:
    import uvloop

    uvloop.run(main())
else:
    asyncio.run(main())
