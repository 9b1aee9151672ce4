"""A command that takes a message back."""

import chat


class UndoRoom(chat.Room):
    async def post(self, user, text, nonce):
        if text != "/undo":
            return await super().post(user, text, nonce)
        events = list(self.history.events.values())
        own = [e["id"] for e in events if e["user"] == user["name"] and e["text"]]
        if own:
            await chat.Message(self.db).blank(own[-1])
        return self.history.last_broadcast
