"""A page of one's own."""

from aiohttp import web

import chat


class Who(chat.Page):
    async def get(self):
        room = self.request.app[chat.ROOM]
        return web.Response(text="\n".join(sorted(room.online.names)))
