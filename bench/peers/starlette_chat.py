"""Starlette: a WebSocketEndpoint, and a set of those who are connected."""

import sys

import uvicorn
from starlette.applications import Starlette
from starlette.endpoints import WebSocketEndpoint
from starlette.routing import WebSocketRoute

connected = set()


class Chat(WebSocketEndpoint):
    encoding = "text"

    async def on_connect(self, websocket):
        await websocket.accept()
        connected.add(websocket)

    async def on_receive(self, websocket, data):
        for other in list(connected):
            await other.send_text(data)

    async def on_disconnect(self, websocket, close_code):
        connected.discard(websocket)


app = Starlette(routes=[WebSocketRoute("/ws", Chat)])
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
