"""A mark where a user stopped reading."""

import re

from aiohttp_session import get_session

import chat


class UnreadChatList(chat.ChatList):
    async def get(self):
        response = await super().get()
        if "before" in self.request.query:
            return response
        session = await get_session(self.request)
        last = self.request.app[chat.ROOM].history.last_broadcast
        for item in re.finditer(r'<li data-id="(\d+)"[^>]*>', response.text):
            if int(item[1]) > session.get("seen", last):
                mark = '<b id="unread">New</b>'
                text = response.text
                response.text = text[: item.end()] + mark + text[item.end() :]
                break
        session["seen"] = last
        return response
