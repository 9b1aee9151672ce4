"""Tornado's WebSocket chat demo: parse, remember the newest, write to each waiter.

The demo renders a piece of HTML besides; here the event is relayed as it came.
"""

import asyncio
import sys

from tornado.escape import json_decode
from tornado.web import Application
from tornado.websocket import WebSocketHandler


class Chat(WebSocketHandler):
    waiters, cache, cache_size = set(), [], 200

    def open(self):
        Chat.waiters.add(self)

    def on_close(self):
        Chat.waiters.remove(self)

    def on_message(self, message):
        event = json_decode(message)
        Chat.cache = [*Chat.cache, event][-Chat.cache_size :]
        for waiter in Chat.waiters:
            waiter.write_message(event)


async def main():
    app = Application([(r"/ws", Chat)])
    app.listen(int(sys.argv[1]), "127.0.0.1")
    await asyncio.Event().wait()


asyncio.run(main())
